"""PACS: its data, the network it starts from, and runs that end in a table and a figure."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastdg.cli.app import app
from fastdg.models.resnet20 import ResNet20
from fastdg.studies.data import pacs as data
from fastdg.studies.experiments import pacs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of noise a class and domain, and weights that are none."""
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for domain in data.DOMAINS:
        for name in data.CLASSES:
            (root / "pacs" / domain / name).mkdir(parents=True)
            for k in range(3):
                pixels = draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "pacs" / domain / name / f"{k}.png")
    (root / "weights").mkdir()
    torch.manual_seed(0)
    state = {f"module.{name}": value for name, value in ResNet20(10).state_dict().items()}
    torch.save({"state_dict": state}, root / "weights" / "resnet20-12fca82f.th")
    return root


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pacs.Plan:
    monkeypatch.setattr(pacs, "BATCH", 2)
    monkeypatch.setattr(pacs, "EVALUATIONS", 4)
    return pacs.Plan(folder, tuple(pacs.ALGORITHMS), seeds=1, steps=8)


def test_images_and_arrays_are_the_same_task(folder: Path, tmp_path: Path) -> None:
    task = data.read(folder / "pacs")
    assert task.domains == data.DOMAINS
    assert [len(y) for y in task.labels] == [21] * 4 and task.images[0].shape == (21, 3, 32, 32)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.DEVIATION))
    pixels = [((x * deviation + mean) * 255).round().byte() for x in task.images]
    np.savez(
        tmp_path / data.ARRAYS,
        x=torch.cat(pixels).permute(0, 2, 3, 1).numpy(),
        y=torch.cat(task.labels).numpy().astype("uint8"),
        d=np.repeat(np.arange(4), 21),
    )
    same = data.read(tmp_path)
    for k in range(4):
        assert torch.equal(same.images[k], task.images[k])
        assert torch.equal(same.labels[k], task.labels[k])


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"PACS.*art_painting/dog"):
        data.read(tmp_path)


def test_damaged_images_are_said(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pacs", tmp_path / "pacs")
    path = tmp_path / "pacs" / "cartoon" / "horse" / "1.png"
    whole = path.read_bytes()
    for content in (b"", b"no image", whole[:-200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"horse/1\.png: "):
            data.read(tmp_path / "pacs")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"x": np.zeros((28, 32, 32, 1), "uint8")}, r"got x uint8 \(28, 32, 32, 1\)"),
        ({"x": np.zeros((28, 32, 32, 3), "float32")}, "got x float32"),
        ({"y": np.zeros(27, "uint8")}, r"y uint8 \(27,\)"),
        ({"y": np.tile(np.arange(7.0), 4)}, "y float64"),
        ({"d": np.repeat([0, 1, 2, 4], 7)}, "domains 0 to 3"),
        ({"x": np.uint8(3)}, r"x uint8 \(\)"),
        ({"d": None}, "damaged, or of another kind"),
    ],
)
def test_arrays_that_are_none_of_pacs_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str | None
) -> None:
    arrays = {"x": np.zeros((28, 32, 32, 3), "uint8"), "y": np.tile(np.arange(7), 4)}
    arrays = {**arrays, "d": np.repeat(np.arange(4), 7), **changes}
    np.savez(tmp_path / data.ARRAYS, **{k: v for k, v in arrays.items() if v is not None})
    if words is None:
        data.check(tmp_path)
        return
    for look in (data.check, data.read):
        with pytest.raises(ValueError, match=rf"pacs_images32\.npz: .*{words}.* Make it again"):
            look(tmp_path)


def test_missing_images_are_said_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "weights", tmp_path / "weights")
    output = tmp_path / "new" / "out"
    done = CliRunner().invoke(app, ["pacs", "--data", str(tmp_path), "--output", str(output)])
    assert done.exit_code == 2 and "expected PACS's images here" in done.output
    assert not (tmp_path / "new").exists()


def test_runs_resume_to_the_same_numbers(small: pacs.Plan, tmp_path: Path) -> None:
    def accuracies(results: dict) -> dict:
        return {
            key: {k: v for k, v in run.items() if k != "step_seconds"}
            for key, run in results["runs"].items()
        }

    small = replace(small, algorithms=("erm", "miro+fishr"), steps=4)
    whole = pacs.run(small, tmp_path / "whole.json")
    assert len(whole["runs"]) == 4 * 2

    def kill(key: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pacs.run(small, tmp_path / "killed.json", progress=kill)
    assert len(json.loads((tmp_path / "killed.json").read_text())["runs"]) == 5
    assert accuracies(pacs.run(small, tmp_path / "killed.json")) == accuracies(whole)


def test_algorithms_part_ways_and_swad_averages(small: pacs.Plan) -> None:
    runs = {name: pacs.train(small, name, 3, 0) for name in pacs.ALGORITHMS}
    losses = {name: [point["loss"] for point in run["curve"]] for name, run in runs.items()}
    assert losses["swad"] == losses["erm"] and losses["miro+swad"] == losses["miro"]
    others = [losses[name] for name in ("erm", "miro", "fishr", "miro+fishr", "agr-sum")]
    assert all(a != b for k, a in enumerate(others) for b in others[:k])


def test_the_command_draws_and_tables(small: pacs.Plan, tmp_path: Path) -> None:
    asked = ["--data", str(small.data), "--algorithms", "erm,swad", "--seeds", "2", "--steps", "4"]
    done = CliRunner().invoke(
        app, ["pacs", *asked, "--output", str(tmp_path / "out"), "--workers", "1"]
    )
    assert done.exit_code == 0, done.output
    assert "SWAD" in done.output and "sketch" in done.output and "±" in done.output
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000


def test_missing_data_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDG_DATA", raising=False)
    assert "--data" in CliRunner().invoke(app, ["pacs"]).output
    said = CliRunner().invoke(app, ["pacs", "--data", str(tmp_path)]).output
    assert "resnet20-12fca82f.th" in said


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "resnet20.npz", conv1=np.zeros(3))
    with pytest.raises(ValueError, match=r"'conv1\.weight'.* got none"):
        ResNet20(7).load_published(tmp_path / "resnet20.npz")


@pytest.mark.parametrize(
    ("name", "class_", "images", "right"), [("horse", 7, 199, 143), ("dog", 5, 189, 102)]
)
def test_the_published_network_knows_animals(
    fastdg_data: Path, name: str, class_: int, images: int, right: int
) -> None:
    """CIFAR-10's network on PACS's photos of what both have."""
    path = fastdg_data / "weights" / "resnet20_cifar10.npz"
    if not path.exists() or not (fastdg_data / "pacs").exists():
        pytest.skip(f"{fastdg_data} has no pacs/ and weights/")
    model = ResNet20(10).eval()
    model.load_published(path)
    with np.load(path) as arrays:
        for key in ("weight", "bias"):
            getattr(model.linear, key).data = torch.from_numpy(arrays[f"linear.{key}"])
    task = data.read(fastdg_data / "pacs")
    photo = data.DOMAINS.index("photo")
    rows = task.labels[photo] == data.CLASSES.index(name)
    assert int(rows.sum()) == images
    with torch.no_grad():
        assert int((model(task.images[photo][rows]).argmax(1) == class_).sum()) == right
