"""ADIOS and bad input: every message says the argument, what came, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adioses import Masker, encoder, made, objective, views
from torch import Tensor
from torch.optim import SGD

import fastdg


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"masker": 3}, TypeError, "masker: expected an nn.Module, got int"),
        ({"objective": encoder()}, TypeError, r"objective: expected a fastdg.Objective.*Seq"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int"),
        ({"penalty": -1.0}, ValueError, "penalty: expected a finite number >= 0, got -1"),
        ({"entropy": float("nan")}, ValueError, "entropy: expected a finite number >= 0"),
        ({"single": 1}, ValueError, "single: expected True or False, got 1"),
        ({"encoder_optimizer": 1}, TypeError, "encoder_optimizer: expected a torch.optim"),
        ({"masker_optimizer": SGD(encoder().parameters())}, ValueError,
         "masker_optimizer: has no parameter of this Masker. Make it from"),
        ({"encoder_optimizer": fastdg.VREx(SGD(encoder().parameters()))}, TypeError,
         "encoder_optimizer: VREx needs losses of domains, and ADIOS has none. Pass"),
    ],
)  # fmt: skip
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    aim, masker = objective("SimCLR"), Masker()
    arguments = {
        "encoder_optimizer": SGD(aim.parameters()),
        "masker_optimizer": SGD(masker.parameters()),
        "masker": masker,
        "objective": aim,
    }
    with pytest.raises(error, match=message):
        fastdg.ADIOS(**{**arguments, **given})


def test_an_optimizer_of_both_networks() -> None:
    aim, masker = objective("SimCLR"), Masker()
    both = SGD([*aim.parameters(), *masker.parameters()])
    with pytest.raises(
        ValueError, match="encoder_optimizer: also has parameters of the masker, got 'layers"
    ):
        fastdg.ADIOS(both, SGD(masker.parameters()), masker, objective=aim)
    with pytest.raises(
        ValueError,
        match=r"masker_optimizer: .* of the objective, got 'network.*opposite directions",
    ):
        fastdg.ADIOS(SGD(aim.parameters()), both, masker, objective=aim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.sum(1), r"masker: expected masks \[4, N, 7, 7\] with N >= 2, got \[4, 7, 7\]"),
        (lambda m: m[:, :1], r"got \[4, 1, 7, 7\]"),
        (lambda m: m[:, :, ::2], r"got \[4, 3, 4, 7\]"),
        (
            lambda m: 2 * m,
            "masks that are >= 0 and sum to one at every pixel, got sums from 2 to 2",
        ),
        (lambda m: torch.cat([m - 1, m + 1], 1)[:, [0, 4]], "masker: expected masks that are >= 0"),
        (lambda m: [m], "got list"),
    ],
)
def test_what_is_no_mask(change: Callable[[Tensor], Any], message: str) -> None:
    adios = made()
    adios.masker.register_forward_hook(lambda module, inputs, output: change(output))
    with pytest.raises(ValueError, match=message):
        adios.step(*views(0))


def test_bad_views() -> None:
    adios = made()
    x, view = views(0)
    with pytest.raises(
        ValueError, match=r"view: expected another view of the 4 whole images, got 3\. Pass"
    ):
        adios.step(x, view[1:])
    with pytest.raises(TypeError, match="whole: expected a tensor of images, got list"):
        adios.step([x], view)  # type: ignore[arg-type]
    with (
        pytest.raises(
            RuntimeError, match=r"masker: its masks have no graph, got requires_grad=False\. Call"
        ),
        torch.no_grad(),
    ):
        adios.step(x, view)
