"""Text tables: what is embedded, by which encoders, and what the cache keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastdg
from fastdg import text

NAMES = ["dog", "polar_bear", "guitar"]
DOMAINS = ["photo", "art_painting"]


def letters(texts: list[str]) -> Tensor:
    """How often each letter is there: as good an encoder as any, and easy to check."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return torch.tensor([[float(t.lower().count(c)) for c in alphabet] for t in texts])


class Counter(nn.Module):
    """As a model of open_clip is to those who call it."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(3, 2)
        self.table = nn.Embedding(128, 8)
        self.drop = nn.Dropout(0.5)
        self.calls: list[int] = []

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.calls.append(len(tokens))
        return self.drop(self.table(tokens)).sum(1).half()


def codes(texts: list[str]) -> Tensor:
    """A tokenizer as open_clip's: of texts alone."""
    return torch.tensor([[ord(c) for c in t[:40].ljust(40)] for t in texts])


# -- what is embedded --


def test_classes_are_the_mean_of_the_templates_and_anchors_one_sentence_each() -> None:
    classes, anchors = fastdg.text_tables(NAMES, DOMAINS, letters)
    for c, name in enumerate(("dog", "polar bear", "guitar")):
        sentences = [template.format(name) for template in text.TEMPLATES]
        torch.testing.assert_close(classes[c], letters(sentences).mean(0))
        for a, domain in enumerate(("photo", "art painting")):
            torch.testing.assert_close(anchors[c, a], letters([f"a {domain} of a {name}"])[0])


def test_templates_and_domains_are_chosen() -> None:
    seen: list[str] = []

    def encoder(texts: list[str]) -> Tensor:
        seen.extend(texts)
        return letters(texts)

    tables = fastdg.text_tables(["dog"], (), encoder, templates=["the {}", "one {}!"])
    assert seen == ["the dog", "one dog!"] and tables.anchors is None
    assert tables.classes.shape == (1, 26)
    tables = fastdg.text_tables(["dog"], text.PHOTOS, encoder)
    assert tables.anchors.shape == (1, 4, 26) and "a dark photo of a dog" in seen


def test_names_may_be_an_array_and_hold_braces() -> None:
    names = np.array(["dog", "set {0}"])
    seen: list[str] = []
    fastdg.text_tables(names, (), lambda texts: (seen.extend(texts), letters(texts))[1],
                       templates=["a {} in {x}"])  # fmt: skip
    assert seen == ["a dog in {x}", "a set {0} in {x}"]


def test_many_texts_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fastdg.text_tables(NAMES, DOMAINS, letters)
    monkeypatch.setattr(text, "BATCH", 4)
    for one, two in zip(fastdg.text_tables(NAMES, DOMAINS, letters), whole, strict=True):
        assert torch.equal(one, two)


# -- encoders --


def test_open_clip() -> None:
    model = Counter().train()
    tables = fastdg.text_tables(NAMES, DOMAINS, (model, codes), templates=["a {}"])
    expected = model.table(codes(["a dog", "a polar bear", "a guitar"])).sum(1)
    torch.testing.assert_close(tables.classes, expected.half().float().detach())
    assert tables.classes.dtype == torch.float32 and not tables.classes.requires_grad
    assert model.training and model.drop.training


@pytest.fixture(scope="module")
def clip(
    tmp_path_factory: pytest.TempPathFactory, small_clip: Callable[[Path, int], tuple[Any, Any]]
) -> tuple[Any, Any, Path]:
    folder = tmp_path_factory.mktemp("clip")
    return *small_clip(folder, 8), folder


def test_transformers(clip: tuple[Any, Any, Path]) -> None:
    model, tokenizer, _ = clip
    model.train()
    tables = fastdg.text_tables(NAMES, DOMAINS, (model, tokenizer))
    assert model.training
    model.eval()
    assert tables.classes.shape == (3, 12) and tables.anchors.shape == (3, 2, 12)

    def embed(sentence: str) -> Tensor:
        """Each sentence alone, so that nothing is padded."""
        tokens = tokenizer(sentence, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model.text_model(input_ids=tokens).pooler_output
            return model.text_projection(hidden)[0]

    for c, name in enumerate(("dog", "polar bear", "guitar")):
        expected = torch.stack([embed(t.format(name)) for t in text.TEMPLATES]).mean(0)
        torch.testing.assert_close(tables.classes[c], expected)
    torch.testing.assert_close(tables.anchors[1, 1], embed("a art painting of a polar bear"))
    assert float((tables.classes[0] - tables.classes[1]).abs().max()) > 1e-3


def test_a_folder_of_transformers(clip: tuple[Any, Any, Path], tmp_path: Path) -> None:
    model, tokenizer, folder = clip
    expected = fastdg.text_tables(NAMES, DOMAINS, (model, tokenizer))
    for _ in range(2):  # the second from the cache
        tables = fastdg.text_tables(NAMES, DOMAINS, str(folder), cache=tmp_path)
        for one, two in zip(tables, expected, strict=True):
            torch.testing.assert_close(one, two)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_text_model_and_an_older_result(clip: tuple[Any, Any, Path]) -> None:
    """The text half of CLIP alone, and the plain tensor that version 4 returns."""
    model, tokenizer, folder = clip
    import transformers

    expected = fastdg.text_tables(NAMES, (), (model, tokenizer)).classes
    half = transformers.CLIPTextModelWithProjection.from_pretrained(folder)
    got = fastdg.text_tables(NAMES, (), (half, tokenizer)).classes
    torch.testing.assert_close(got, expected)

    class Older(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def get_text_features(self, **tokens: Tensor) -> Tensor:
            return self.inner.get_text_features(**tokens).pooler_output

    got = fastdg.text_tables(NAMES, (), (Older(), tokenizer)).classes
    torch.testing.assert_close(got, expected)
    with pytest.raises(TypeError, match=r"^encoder: .*text_embeds"):
        inner = transformers.CLIPTextModel.from_pretrained(folder)
        fastdg.text_tables(NAMES, (), (inner, tokenizer))


def test_a_model_that_cannot_be_had_says_what_to_pass(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(OSError, match=r"^encoder: .*nowhere.*downloaded"):
        fastdg.text_tables(NAMES, (), str(tmp_path / "nowhere" / "at" / "all"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"^encoder: .*'bert'"):
        fastdg.text_tables(NAMES, (), str(tmp_path))


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model_is_said(
    tmp_path: Path, small_clip: Callable[[Path, int], tuple[Any, Any]], part: str
) -> None:
    small_clip(tmp_path / "clip", 8)
    path = tmp_path / "clip" / part
    for content in (path.read_bytes()[:-100], b"\xff" * 40):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"^encoder: .*clip'"):
            fastdg.text_tables(NAMES, (), str(tmp_path / "clip"))


def test_transformers_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^encoder: .*'fastdg\[text\]'"):
        fastdg.text_tables(NAMES, (), "openai/clip-vit-base-patch32")


def test_real_embeddings(fastdg_data: Path) -> None:
    """CLIP's own, of names: what is alike in the world is alike in the tables."""
    path = fastdg_data / "clip_text" / "clip_vitb32_text.npz"
    if not path.is_file():
        pytest.skip(f"{path}: no embeddings of text to test with")
    with np.load(path, allow_pickle=False) as file:
        rows = dict(zip(file["names"].tolist(), file["emb"].astype(np.float32), strict=True))
        pacs = torch.from_numpy(file["pacs"])

    def encoder(texts: list[str]) -> Tensor:
        return torch.from_numpy(np.stack([rows[f"oid/{t.capitalize()}"] for t in texts]))

    names = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    tables = fastdg.text_tables(names, (), encoder, templates=["{}"])
    torch.testing.assert_close(tables.classes, pacs, rtol=0, atol=1e-3)  # kept in half precision
    cosine = torch.nn.functional.cosine_similarity(tables.classes[:1], tables.classes)
    assert cosine.argsort(descending=True)[0] == 0
    assert cosine[names.index("horse")] > cosine[names.index("house")]


# -- the cache --


def tables_of(model: Counter, cache: Path, **more: Any) -> text.TextTables:
    names, domains = more.pop("names", NAMES), more.pop("domains", DOMAINS)
    return fastdg.text_tables(names, domains, (model, codes), cache=cache, **more)


def test_what_was_encoded_is_kept(tmp_path: Path) -> None:
    model = Counter()
    first = tables_of(model, tmp_path / "new" / "folder")
    calls = len(model.calls)
    again = tables_of(model, tmp_path / "new" / "folder")
    assert calls > 0 and len(model.calls) == calls
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    without = tables_of(model, tmp_path / "new" / "folder", domains=())
    assert without.anchors is None and torch.equal(without.classes, first.classes)
    with_none = tables_of(model, tmp_path / "new" / "folder", domains=())
    assert with_none.anchors is None and len(model.calls) == calls + 1


CHANGES: dict[str, Callable[[Counter], dict[str, Any]]] = {
    "names": lambda model: {"names": [*NAMES[:2], "house"]},
    "order": lambda model: {"names": NAMES[::-1]},
    "domains": lambda model: {"domains": DOMAINS[:1]},
    "templates": lambda model: {"templates": ["a {}"]},
    "weights": lambda model: model.table.weight.data.mul_(1.001) is None or {},
    "precision": lambda model: model.half() is None or {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_encoder_or_other_texts_are_another_file(tmp_path: Path, change: str) -> None:
    model = Counter()
    tables_of(model, tmp_path)
    tables_of(model, tmp_path, **CHANGES[change](model))
    assert len(list(tmp_path.iterdir())) == 2


def test_what_does_not_act_on_text_is_not_looked_at(tmp_path: Path) -> None:
    model = Counter()
    tables_of(model, tmp_path)
    model.visual.weight.data.zero_()
    tables_of(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_broken_file_is_made_anew(tmp_path: Path) -> None:
    model = Counter()
    expected = tables_of(model, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()

    def arrays(**given: np.ndarray) -> bytes:
        np.savez(tmp_path / "other.npz", **given)
        content = (tmp_path / "other.npz").read_bytes()
        (tmp_path / "other.npz").unlink()
        return content

    C, A, E = expected.anchors.shape
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 255
    for broken in (
        b"",
        b"not a file of numpy's",
        whole[: len(whole) // 2],
        bytes(flipped),
        arrays(classes=expected.classes.numpy()),
        arrays(classes=np.zeros((C, E)), anchors=np.zeros((C, A, E))),
        arrays(classes=np.zeros((C + 1, E), np.float32), anchors=np.zeros((C, A, E), np.float32)),
        arrays(classes=np.array(["a"] * C, object), anchors=np.zeros((C, A, E), np.float32)),
    ):
        path.write_bytes(broken)
        for one, two in zip(tables_of(model, tmp_path), expected, strict=True):
            assert torch.equal(one, two)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing half-written is left
        calls = len(model.calls)
        tables_of(model, tmp_path)
        assert len(model.calls) == calls


def test_a_name_is_looked_up_before_its_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a machine without a network gets what another has made."""
    model = Counter()
    monkeypatch.setattr(text, "_load", lambda name: (model, codes))
    first = fastdg.text_tables(NAMES, DOMAINS, "some/name", cache=tmp_path)
    monkeypatch.setattr(text, "_load", lambda name: pytest.fail("it was loaded"))
    again = fastdg.text_tables(NAMES, DOMAINS, "some/name", cache=tmp_path)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)


# -- bad input --


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"class_names": "dog"}, TypeError, "^class_names: "),
        ({"class_names": []}, ValueError, "^class_names: "),
        (
            {"class_names": ["dog", " "]},
            ValueError,
            r"^class_names\[1\]: ",
        ),
        ({"class_names": ["dog", None]}, ValueError, r"^class_names\[1\]: .*got None"),
        ({"class_names": ["a_b", "a b"]}, ValueError, "^class_names: .*'a b'"),
        ({"domain_names": "photo"}, TypeError, "^domain_names: "),
        ({"domain_names": ["photo", ""]}, ValueError, r"^domain_names\[1\]: "),
        ({"templates": ["a dog"]}, ValueError, "^templates: "),
        ({"templates": []}, ValueError, "^templates: "),
        ({"encoder": None}, TypeError, "^encoder: .*got NoneType"),
        ({"encoder": Counter()}, TypeError, "^encoder: .*got Counter"),
        ({"encoder": (letters, codes)}, TypeError, "^encoder: .*got tuple"),
        (
            {"encoder": lambda texts: letters(texts).sum(1)},
            ValueError,
            r"^encoder: .*got \(27,\)",
        ),
        ({"encoder": lambda texts: texts}, ValueError, "^encoder: .*got list"),
        (
            {"encoder": lambda texts: letters(texts) * torch.tensor([[0.0]])},
            ValueError,
            r"^encoder: .*'itap of a dog\.'",
        ),
        (
            {"encoder": lambda texts: letters(texts) / 0},
            ValueError,
            r"^encoder: .*'itap of a dog\.'",
        ),
        ({"cache": "folder"}, ValueError, "^cache: "),
    ],
)
def test_bad_input(given: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"class_names": NAMES, "domain_names": DOMAINS, "encoder": letters}
    with pytest.raises(error, match=message):
        fastdg.text_tables(**{**arguments, **given})


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = Counter().train()
    model.encode_text = lambda tokens: SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^encoder: "):
        fastdg.text_tables(NAMES, (), (model, codes))
    assert model.training


def test_arrays_are_taken_too() -> None:
    arrays = fastdg.text_tables(NAMES, DOMAINS, lambda texts: letters(texts).numpy())
    for array, table in zip(arrays, fastdg.text_tables(NAMES, DOMAINS, letters), strict=True):
        assert torch.equal(array, table)
