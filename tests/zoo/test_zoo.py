"""A few cases of the zoo; `python tests/zoo` runs all."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo_modules
import zoo_oracle
import zoo_peft
import zoo_steps
import zoo_transformers
import zoo_vision
from torch import Tensor, nn
from zoo_cases import Case

import fastdg

PACKAGES = ("timm", "torchvision", "transformers", "peft")
SOME = {
    "timm": ("test_vit", "test_convnext", "swinv2_tiny_window8_256"),
    "torchvision": ("squeezenet1_1",),
    "peft": ("LoRA", "DoRA", "IA3", "OSF", "prompt tuning", "VeRA"),
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
    for case in [
        *zoo_modules.cases(),
        *zoo_peft.cases(),
        *zoo_vision.cases(),
        *zoo_transformers.cases(),
    ]
    if case.name in SOME[case.family]
]


@pytest.mark.product
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family} {case.name}")
@pytest.mark.filterwarnings("ignore")  # of the packages, about their own models
def test_a_case_equals_plain_autograd(case: Case, training: bool) -> None:
    if case.family in PACKAGES and importlib.util.find_spec(case.family) is None:
        pytest.skip(f"{case.family} is not installed")
    try:
        # The second derivatives of images take most of the time, and are left to the whole run
        result = zoo_oracle.run(case, training, fishr=case.family not in ("timm", "torchvision"))
    except zoo_oracle.NotHere as error:
        if case.family == "torch.nn":
            raise
        pytest.skip(f"this {case.family} does not make {case.name} so: {error}")
    assert not result.wrong, f"{result.where}: {result.errors}"
    assert result.parameters == result.rules + result.chained + result.slow > 0


def test_all_named_cases_are_there() -> None:
    assert len(CASES) == sum(map(len, SOME.values()))


def test_every_module_class_of_torch_has_a_case() -> None:
    """Apart from containers, losses and base classes, which are named one by one."""
    missing = zoo_modules.without_entry()
    assert not missing, f"no case of the zoo has {sorted(missing)}"
    assert not {name for name in zoo_modules.TABLE if not hasattr(nn, name)}


def off(honest: Callable[..., dict[str, Tensor | None]]) -> Callable[..., Any]:
    """The same, with the first parameter's gradient wrong by a little."""

    def one_is_off(*args: Any, **kwargs: Any) -> dict[str, Any]:
        out = honest(*args, **kwargs)
        first = next(iter(out))
        return out | {first: out[first] * (1 + 1e-6)}

    return one_is_off


@pytest.mark.parametrize("what", ["domain gradient", "PCGrad", "AgrSum", "Fishr"])
def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The comparison fails where one parameter's gradient is off by a little."""
    if what == "domain gradient":
        honest = zoo_oracle.fastdg.domain_gradients
        monkeypatch.setattr(zoo_oracle.fastdg, "domain_gradients", off(honest))
    else:
        stepped = zoo_steps.stepped

        def some(make: Any, *args: Any) -> Any:
            mine = make is fastdg.AgrSum if what == "AgrSum" else what.lower() in str(make)
            return (off(stepped) if mine else stepped)(make, *args)

        monkeypatch.setattr(zoo_steps, "stepped", some)
    case = next(c for c in CASES if c.name == "LayerNorm")
    result = zoo_oracle.run(case, True)
    assert result.wrong and result.where.startswith(f"{what} of ")


def test_a_sign_of_rounding_is_no_error_and_a_known_one_is() -> None:
    domains = torch.tensor([0, 0, 1])
    # agree; disagree; a sign of rounding; a domain without a gradient
    samples = torch.tensor(
        [[1.0, 1.0, 1e-17, 0.0], [1.0, 1.0, 1e-17, 0.0], [3.0, -3.0, 2.0, 2.0]], dtype=torch.float64
    )

    def errors(*got: float) -> list[float]:
        grad = torch.tensor(got, dtype=torch.float64)
        return zoo_steps.agrsum_error(grad, samples, domains, 5.0, 1e-8).tolist()

    assert errors(2, 0, 1, 0) == errors(2, 0, 0, 0) == [0, 0, 0, 0]
    assert errors(0, -1, 0.5, 1) == [2, 1, 0.5, 1]
