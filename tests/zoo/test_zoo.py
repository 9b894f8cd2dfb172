"""A few cases of the zoo; `python tests/zoo` runs all."""

from __future__ import annotations

import importlib.util

import pytest
import zoo_modules
import zoo_oracle
import zoo_transformers
import zoo_vision
from torch import nn
from zoo_cases import Case

PACKAGES = ("timm", "torchvision", "transformers")
SOME = {
    "timm": ("test_vit", "test_convnext", "swinv2_tiny_window8_256"),
    "torchvision": ("squeezenet1_1",),
    "transformers": ("bert", "gpt2", "t5", "mixtral", "deberta", "vit"),
    "torch.nn": (
        "BatchNorm2d", "Bilinear", "Conv2d", "ConvTranspose1d", "EmbeddingBag", "Embedding", "Fold",
        "GRUCell", "GroupNorm", "InstanceNorm2d", "LSTM", "LayerNorm", "LazyLinear",
        "MultiheadAttention", "PReLU", "PairwiseDistance", "RMSNorm", "Softmax",
        "TransformerDecoder", "TransformerEncoder, tokens first",
    ),
}  # fmt: skip
CASES = [
    case
    for case in [*zoo_modules.cases(), *zoo_vision.cases(), *zoo_transformers.cases()]
    if case.name in SOME[case.family]
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family} {case.name}")
@pytest.mark.filterwarnings("ignore")  # of the packages, about their own models
def test_a_case_equals_plain_autograd(case: Case, training: bool) -> None:
    if case.family in PACKAGES and importlib.util.find_spec(case.family) is None:
        pytest.skip(f"{case.family} is not installed")
    try:
        result = zoo_oracle.run(case, training)
    except zoo_oracle.NotHere as error:
        if case.family == "torch.nn":
            raise
        pytest.skip(f"this {case.family} does not make {case.name} so: {error}")
    assert not result.wrong, f"{result.where}: relative error {result.worst:.1e}"
    assert result.parameters == result.rules + result.pulled + result.slow > 0


def test_all_named_cases_are_there() -> None:
    assert len(CASES) == sum(map(len, SOME.values()))


def test_every_module_class_of_torch_has_a_case() -> None:
    """Apart from containers, losses and base classes, which are named one by one."""
    missing = zoo_modules.without_entry()
    assert not missing, f"no case of the zoo has {sorted(missing)}"
    assert not {name for name in zoo_modules.TABLE if not hasattr(nn, name)}


def test_a_wrong_statistic_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails where one parameter's gradient is off by a little."""
    honest = zoo_oracle.fastdg.domain_gradients

    def off(*args: object, **kwargs: object) -> dict[str, object]:
        out = honest(*args, **kwargs)
        first = next(iter(out))
        return out | {first: out[first] * (1 + 1e-6)}

    monkeypatch.setattr(zoo_oracle.fastdg, "domain_gradients", off)
    case = next(c for c in CASES if c.name == "LayerNorm")
    result = zoo_oracle.run(case, True)
    assert result.wrong and result.where.startswith("domain gradient of ")
