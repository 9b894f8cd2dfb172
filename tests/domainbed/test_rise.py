"""RISE in DomainBed, with a small CLIP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from beds import Bed
from torch.nn import functional as F

import fastdg
from fastdg.domainbed.__main__ import main
from fastdg.domainbed.plug import find, plugged_in

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["dog", "guitar"]


@pytest.fixture
def hparams(
    small_clip: Callable[[Path, int], tuple[Any, Any]], tmp_path: Path, bed: Bed
) -> dict[str, Any]:
    small_clip(tmp_path / "clip", 28)
    with plugged_in():
        default = find("hparams_registry").default_hparams("RISE", "Debug28")
    given = {"rise_clip": str(tmp_path / "clip"), "rise_classes": NAMES, "batch_size": 2}
    return {**default, **given}


def test_trains_and_goes_by_the_paper(bed: Bed, hparams: dict[str, Any], tmp_path: Path) -> None:
    from transformers import CLIPModel

    with plugged_in():
        made = find("algorithms").get_algorithm_class("RISE")
    algorithm = made((3, 28, 28), 2, 3, hparams)
    clip = CLIPModel.from_pretrained(hparams["rise_clip"]).eval()
    classes, anchors = fastdg.text_tables(NAMES, fastdg.text.PHOTOS, hparams["rise_clip"])
    words = F.normalize(classes, dim=1)
    torch.testing.assert_close(algorithm.classifier[1].weight.detach(), words)

    x, y = torch.randn(6, 3, 28, 28), torch.tensor([0, 1, 0, 1, 1, 0])
    with torch.no_grad():
        embedding = algorithm.classifier[0](algorithm.featurizer(x))
        logits = algorithm.predict(x)
        seen = clip.visual_projection(clip.vision_model(x).pooler_output)
        teacher = 100 * F.normalize(seen, dim=1) @ words.t()
        cosine = F.cosine_similarity(embedding[:, None], anchors[y], dim=2).softmax(1)
        target = F.cosine_similarity(classes[y][:, None], anchors[y], dim=2).softmax(1)
        parts = [
            0.1 * F.cross_entropy(logits, y),
            0.9 * 9 * F.kl_div((logits / 3).log_softmax(1), (teacher / 3).softmax(1),
                               reduction="batchmean"),
            (1 - F.cosine_similarity(embedding, classes[y])).mean(),
            10 * (cosine - target).square().mean(),
        ]  # fmt: skip
    values = algorithm.update([(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:])])
    assert values["loss"] == pytest.approx(float(sum(parts)), rel=1e-5)
    assert not any(name.startswith("teacher") for name in algorithm.state_dict())


def test_runs(bed: Bed, hparams: dict[str, Any], tmp_path: Path) -> None:
    run = ["--algorithm", "RISE", "--dataset", "Debug28", "--data_dir", "", "--steps", "3"]
    main([*run, "--output_dir", str(tmp_path / "run"), "--hparams", json.dumps(hparams)])
    assert (tmp_path / "run" / "done").exists()
