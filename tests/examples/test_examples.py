"""Every example runs, to its end."""

import importlib
import pkgutil
import re

import pytest

from fastdg import examples

# What an example says of itself, and the optional packages that it needs
SAYS = {
    "accelerate_training": "8 steps",
    "accumulation": "micro-batches of 7",
    "adios_miro": "MIRO: its term is",
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
NEEDS = {
    "accelerate_training": ["accelerate"],
    "lightning_training": ["lightning"],
    "log_statistics": ["tensorboard"],
    "trainer_training": ["transformers", "accelerate"],
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDS.get(name, []):
        pytest.importorskip(package, reason=f"{package} is not installed")
    importlib.import_module(f"fastdg.examples.{name}").main()
    said = capsys.readouterr().out
    assert SAYS[name] in said
    if name == "quickstart":
        plain, fishr = map(int, re.findall(r"(\d+) % on a new one", said))
        assert fishr > plain + 20
    if name == "mislabelled":
        found, chance = map(int, re.findall(r"(\d+) %", said))
        assert found > 2 * chance


def test_none_is_forgotten() -> None:
    files = {module.name for module in pkgutil.iter_modules(examples.__path__)}
    assert files - {"data", "wilds_training"} == set(SAYS)  # the latter has tests of its own
