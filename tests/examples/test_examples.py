"""Every example runs, to its end."""

import importlib
import pkgutil
import re
import sys

import pytest

from fastdg import examples
from fastdg.examples import __main__ as listing

# A part of what an example prints
SAYS = {
    "accelerate_training": "8 steps",
    "accumulation": "micro-batches of 7",
    "adios_miro": "MIRO: its term is",
    "choose_data": "weight",
    "domain_forwards": "cosines between the domains' gradients",
    "fish": "on a new camera",
    "fishr": "epoch 3",
    "gradient_statistics": "cosines between the domains",
    "lightning_training": "Manual: 16 steps",
    "log_statistics": "cosine",
    "mislabelled": "have a label that was flipped",
    "miro_swad": "averaged",
    "quickstart": "on a new one",
    "resume": "validation loss",
    "rise": "rise_distillation after 8 steps",
    "sam": "SAM(Fishr): ",
    "trainer_training": "16 steps",
}
NEEDS = {name: packages for name, _, packages in listing.examples()}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    importlib.import_module(f"fastdg.examples.{name}").main()
    said = capsys.readouterr().out
    assert SAYS[name] in said
    if name == "quickstart":
        plain, fishr = map(int, re.findall(r"(\d+) % on a new one", said))
        assert fishr > plain + 20
    if name == "choose_data":
        everything, half, best = map(int, re.findall(r"(\d+) % on the new camera", said))
        assert best > max(everything, half) + 30
        weights = [float(w) for w in re.findall(r"weight (0\.\d+)", said)]
        assert weights == sorted(weights) and weights[0] < weights[-1]
    if name == "mislabelled":
        found, chance = map(int, re.findall(r"(\d+) %", said))
        assert found > 2 * chance


def test_none_is_forgotten() -> None:
    files = {module.name for module in pkgutil.iter_modules(examples.__path__)}
    assert files - {"__main__", "data", "wilds_training"} == set(
        SAYS
    )  # the latter has tests of its own


def test_the_list_has_each_with_a_sentence_and_what_it_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    listing.main()
    said = capsys.readouterr().out
    for name in (*SAYS, "wilds_training"):
        assert f"\n{name}\n  " in said
    assert " ".join(said.split()).count("pip install 'fastdg[integrations]'") == 4
    assert NEEDS["trainer_training"] == ["transformers", "accelerate"]
    assert NEEDS["wilds_training"] == ["wilds"] and NEEDS["quickstart"] == []
    assert max(map(len, said.splitlines())) <= 80
    sentences = {name: sentence for name, sentence, _ in listing.examples()}
    assert all(len(s.split()) >= 5 and s.endswith((".", "?")) for s in sentences.values()), (
        sentences
    )


@pytest.mark.parametrize("name", [name for name, packages in NEEDS.items() if packages])
def test_an_example_says_which_package_it_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "find_spec", lambda package: None)
    monkeypatch.delitem(sys.modules, f"fastdg.examples.{name}", raising=False)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"fastdg.examples.{name}")
    monkeypatch.delitem(sys.modules, f"fastdg.examples.{name}", raising=False)
    by = examples.INSTALLED_BY[NEEDS[name][0]]
    assert str(stop.value) == (
        f"fastdg: this example needs {', '.join(NEEDS[name])}: pip install '{by}'"
    )
