"""What every test relies on: a fixed seed, poisoned scratch memory, data where there is some."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, at its first import: kernels then run on CPU tensors, interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Deterministic mode also fills torch.empty with NaN: an op that forgets to write an element of
    # its output is found.
    torch.use_deterministic_algorithms(True)


def _fit_torchvision() -> Any:
    """Let `import torchvision` work beside a torch that its compiled part was not built for.

    Python looks up two of its ops at import; timm and transformers import it for their models,
    which use neither.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
            torch.ops.load_library(library)
            return None
    except OSError:
        pass
    ops = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return ops


_torchvision_ops = _fit_torchvision()  # for as long as it lives


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fastdg_data() -> Path:
    """The folder of data sets that FASTDG_DATA names; the test is skipped without one."""
    folder = os.environ.get("FASTDG_DATA")
    if folder is None:
        pytest.skip("FASTDG_DATA is not set: no data sets to test with")
    if not Path(folder).is_dir():
        pytest.skip(f"FASTDG_DATA={folder} is not a folder: no data sets to test with")
    return Path(folder)


@pytest.fixture(scope="session")
def small_clip() -> Callable[[Path, int], tuple[Any, Any]]:
    """Makes a small CLIP of transformers for images of a size, and its tokenizer, and saves them in
    a folder."""

    def make(folder: Path, image_size: int) -> tuple[Any, Any]:
        transformers = pytest.importorskip(
            "transformers", reason="transformers is not installed: pip install 'fastdg[text]'"
        )
        folder.mkdir(exist_ok=True)
        ends = ["<|startoftext|>", "<|endoftext|>"]
        pieces = [chr(k) for k in range(33, 127)]
        words = [*pieces, *(piece + "</w>" for piece in pieces), *ends]
        (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        small |= {"num_attention_heads": 2, "projection_dim": 12}
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config={
                **small,
                "vocab_size": len(words),
                "bos_token_id": len(words) - 2,
                "eos_token_id": len(words) - 1,
                "max_position_embeddings": 77,
            },
            vision_config={**small, "image_size": image_size, "patch_size": 4},
            projection_dim=12,
        )
        model = transformers.CLIPModel(config)
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        return model, tokenizer

    return make


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
