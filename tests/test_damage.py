"""Damaged files end in a sentence, or are made anew where this is promised."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdg import text
from fastdg.files import load_arrays, load_torch
from fastdg.models.resnet20 import ResNet20
from fastdg.studies.experiments import storage, units
from fastdg.studies.experiments.units import run_units

SETTINGS = {"steps": 1, "given": {"lr": 0.1}}


def value(k: int) -> dict[str, int]:
    return {"value": k}


def flips(content: bytes, every: bool) -> list[bytes]:
    """The content with one bit flipped: every bit, or one of each byte."""
    out = []
    for k in range(len(content)):
        for bit in range(8) if every else (k * 5 % 8,):
            flipped = bytearray(content)
            flipped[k] ^= 1 << bit
            out.append(bytes(flipped))
    return out + [content[:k] for k in range(0, len(content), 1 if every else 7)]


def test_every_damage_of_a_result_file_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "machine", dict)
    path = tmp_path / "results.json"
    run_units({"a": partial(value, 1)}, SETTINGS, path, fields=("value",))
    good, runs = path.read_bytes(), json.loads(path.read_text())["runs"]
    said: set[str] = set()
    for content in flips(good, every=True):
        path.write_bytes(content)
        try:
            assert run_units({}, SETTINGS, path, fields=("value",))["runs"] == {}
            assert json.loads(path.read_text())["runs"] == runs
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            said.add(str(error).split(":", 1)[1].split("(")[0].split(":")[0])
            assert path.read_bytes() == content
    assert said == {
        " damaged, or not a result file of this program ",
        " damaged, or changed by hand",
    }


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "[" * 100_000,
        "\xff",
        '{"settings": {"steps": 1}}',
        '{"settings": 5, "machine": {}, "runs": {}}',
        '{"settings": {}, "machine": {}, "runs": null}',
        '{"settings": {}, "machine": {}, "runs": {"a": 3}}',
        '{"settings": {}, "machine": {}, "runs": {"a": {}}}',
        '{"settings": {}, "machine": {}, "runs": {}, "more": 1}',
        '{"settings": {}, "machine": {}, "runs": {}, "data": 1}',
    ],
)
def test_what_is_no_result_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"\.json: .*--fresh"):
        run_units({}, {}, path, fields=("value",))


def test_a_result_file_without_a_checksum_is_taken_and_one_changed_by_hand_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "results.json"
    run_units({"a": partial(value, 1)}, SETTINGS, path)
    changed = json.loads(path.read_text())
    changed["runs"]["a"]["value"] = 5
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match='"sha256"'):
        run_units({}, SETTINGS, path)
    del changed["sha256"]
    path.write_text(json.dumps(changed))
    assert run_units({"a": partial(value, 1)}, SETTINGS, path)["runs"] == {"a": {"value": 5}}


def test_a_result_file_says_which_data_it_was_made_from(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run_units({"a": partial(value, 1)}, SETTINGS, path, data={"digits": "ab"})
    found = run_units({"b": partial(value, 2)}, SETTINGS, path, data={"heart": "cd"})
    assert found["data"] == {"digits": "ab", "heart": "cd"}
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(data\.digits was 'ab', now 'ef'\)"):
        run_units({"a": partial(value, 1)}, SETTINGS, path, data={"digits": "ef"})
    assert path.read_bytes() == before
    run_units({"a": partial(value, 1)}, SETTINGS, path, fresh=True, data={"digits": "ef"})
    assert json.loads(path.read_text())["data"] == {"digits": "ef"}


def test_a_result_file_without_fingerprints_goes_on_without(tmp_path: Path) -> None:
    """Of a version before: nobody knows what its results were made from."""
    path = tmp_path / "results.json"
    run_units({"a": partial(value, 1)}, SETTINGS, path)
    found = run_units({"b": partial(value, 2)}, SETTINGS, path, data={"heart": "cd"})
    assert "data" not in found and found["runs"] == {"b": {"value": 2}}


def test_every_damage_of_a_checkpoint_is_said(tmp_path: Path) -> None:
    path, identity = tmp_path / "checkpoint", {"seed": 0}
    state = {"identity": identity, "step": 3, "model": {"weight": torch.arange(5.0)}}
    storage.save_atomically(state, path)
    for content in flips(path.read_bytes(), every=False):
        path.write_bytes(content)
        try:
            found = storage.load_checkpoint(path, identity, ("step", "model"))
            assert found is not None and found["step"] == 3
            assert torch.equal(found["model"]["weight"], torch.arange(5.0))
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "Remove it to start" in str(error)


@pytest.mark.parametrize("state", [[1], {"identity": 3}, {"identity": {}, "step": 1}, {}])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="checkpoint: "):
        storage.load_checkpoint(tmp_path / "checkpoint", {}, ("step", "model"))


def test_a_damaged_table_of_texts_is_made_anew(tmp_path: Path) -> None:
    path, draw = tmp_path / "tables.npz", np.random.default_rng(0)
    classes = draw.random((3, 4), np.float32)
    anchors = draw.random((3, 2, 4), np.float32)
    for arrays, A in (({"classes": classes}, 0), ({"classes": classes, "anchors": anchors}, 2)):
        np.savez(path, **arrays)
        for content in flips(path.read_bytes(), every=A == 0):
            path.write_bytes(content)
            if (tables := text._read(path, (3, 7, A))) is not None:
                assert np.array_equal(tables.classes, classes)
                assert A == 0 or np.array_equal(tables.anchors, anchors)
    for number in (np.nan, np.inf, 0.0):
        broken = anchors.copy()
        broken[1, 1] = number
        np.savez(path, classes=classes, anchors=broken)
        assert text._read(path, (3, 7, 2)) is None
        broken = classes.copy()
        broken[2] = number
        np.savez(path, classes=broken)
        assert text._read(path, (3, 7, 0)) is None
    for wrong in (anchors, classes[:2], classes.astype("float64"), classes[0], classes[:, :0]):
        np.savez(path, classes=wrong)
        assert text._read(path, (3, 7, 0)) is None


def test_tables_that_cannot_be_kept_are_given_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def tokens(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(len(t)), 1.0] for t in texts])

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1)})
    model.encode_text = lambda x: x  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"^cache: "):
        tables = text.text_tables(["dog"], [], (model, tokens), cache=tmp_path / "file" / "cache")
    assert tables.classes.shape == (1, 2)


@pytest.mark.parametrize("end", ["th", "npz"])
def test_a_damaged_network_is_said(tmp_path: Path, end: str) -> None:
    model, path = ResNet20(7), tmp_path / f"resnet20.{end}"
    state = {name: x.clone() for name, x in ResNet20(10).state_dict().items()}

    def write(state: dict[str, torch.Tensor]) -> None:
        if end == "th":
            torch.save(state, path)
        else:
            np.savez(path, **{name: x.numpy() for name, x in state.items()})

    write(state)
    model.load_published(path)
    whole = path.read_bytes()
    for content in (b"", b"no network", whole[:1000], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"resnet20.*: damaged"):
            model.load_published(path)
    write({**state, "conv1.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'conv1\.weight'.* got \[3\]"):
        model.load_published(path)
    write({**state, "bn1.bias": torch.full((16,), torch.nan)})
    with pytest.raises(ValueError, match=r"'bn1\.bias'"):
        model.load_published(path)


def test_files_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    for load in (load_torch, load_arrays):
        with pytest.raises(FileNotFoundError, match="none: cannot read it"):
            load(tmp_path / "none", remedy="Ask.")
        with pytest.raises(IsADirectoryError, match=r"cannot read it, .*folder"):
            load(tmp_path, remedy="Ask.")
