"""The documents of the project, their fenced blocks, and names that these use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fastdg

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
# A fenced block that is not run says so: ```{.python .fragment}
FRAGMENT = "{.python .fragment}"


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks of a document."""
    return [(kind, text) for _, kind, text in FENCE.findall(path.read_text(encoding="utf-8"))]


def around() -> dict[str, Any]:
    """Names that the blocks use without making them."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    x, y, domains = torch.randn(12, 5), torch.arange(12) % 3, torch.arange(12) % 2
    words = torch.randn(128, 8)
    return {
        "torch": torch,
        "F": F,
        "fastdg": fastdg,
        "model": model,
        "x": x,
        "y": y,
        "domains": domains,
        "loader": [(x, y, domains)] * 2,
        "dataset": torch.utils.data.TensorDataset(x, y, domains),
        "held_out_x": x,
        "held_out_y": y,
        "batches": [(x, y)] * 2,
        "minibatches": [(x, y)] * 2,
        "text_encoder": lambda texts: torch.stack([words[[*map(ord, t)]].sum(0) for t in texts]),
        "teacher": lambda x: torch.randn(len(x), 3),
        "encoder": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8)),
        "pairs": [(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))] * 2,
    }
