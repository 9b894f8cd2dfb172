"""ADIOS and bad input: every message says the argument, what came, and what to do."""

from __future__ import annotations

import copy
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
        ({"masker": 3}, TypeError, "^masker: .*got int"),
        ({"objective": encoder()}, TypeError, "^objective: "),
        ({"generator": 3}, TypeError, "^generator: .*got int"),
        ({"penalty": -1.0}, ValueError, "^penalty: .*got -1"),
        ({"entropy": float("nan")}, ValueError, "^entropy: "),
        ({"single": 1}, ValueError, "^single: .*got 1"),
        ({"encoder_optimizer": 1}, TypeError, "^encoder_optimizer: "),
        ({"masker_optimizer": SGD(encoder().parameters())}, ValueError,
         "^masker_optimizer: "),
        ({"encoder_optimizer": fastdg.VREx(SGD(encoder().parameters()))}, TypeError,
         "^encoder_optimizer: .*VREx"),
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
    with pytest.raises(ValueError, match=r"^encoder_optimizer: .*got 'layers"):
        fastdg.ADIOS(both, SGD(masker.parameters()), masker, objective=aim)
    with pytest.raises(
        ValueError,
        match=r"^masker_optimizer: .*got 'network",
    ):
        fastdg.ADIOS(SGD(aim.parameters()), both, masker, objective=aim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.sum(1), r"^masker: .*got \[4, 7, 7\]"),
        (lambda m: m[:, :1], r"^masker: .*got \[4, 1, 7, 7\]"),
        (lambda m: m[:, :, ::2], r"^masker: .*got \[4, 3, 4, 7\]"),
        (
            lambda m: 2 * m,
            "^masker: .*got sums from 2 to 2",
        ),
        (lambda m: torch.cat([m - 1, m + 1], 1)[:, [0, 4]], "^masker: .*>= 0"),
        (lambda m: [m], "^masker: .*got list"),
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
    with pytest.raises(ValueError, match=r"^view: .*got 3"):
        adios.step(x, view[1:])
    with pytest.raises(TypeError, match=r"^whole: .*got list"):
        adios.step([x], view)  # type: ignore[arg-type]
    with (
        pytest.raises(RuntimeError, match=r"^masker: .*requires_grad=False"),
        torch.no_grad(),
    ):
        adios.step(x, view)


def _fails() -> None:
    raise OSError("the step failed")


BREAKS: dict[str, Callable[[fastdg.ADIOS], Any]] = {
    "masker's forward": lambda adios: adios.masker.register_forward_hook(lambda *a: _fails()),
    "encoder's step": lambda adios: adios.encoder_optimizer.register_step_post_hook(
        lambda *a: _fails()
    ),
    "masker's loss": lambda adios: adios.encoder_optimizer.register_step_post_hook(
        lambda *a: adios.objective.network.register_forward_hook(lambda *a: _fails())
    ),
    "masker's step": lambda adios: adios.masker_optimizer.register_step_pre_hook(
        lambda *a: _fails()
    ),
    "after both": lambda adios: adios.masker_optimizer.register_step_post_hook(lambda *a: _fails()),
}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("place", BREAKS)
def test_a_step_is_made_whole_or_not_at_all(place: str, done: int, average: bool) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    adios = made("BYOL", norm=True, single=True, generator=generator)
    if average:
        adios.encoder_optimizer = fastdg.SMA(adios.encoder_optimizer, adios.objective, start=1)
    for seed in range(done):
        adios.step(*views(seed))
    before = copy.deepcopy(adios.state_dict())
    good = copy.deepcopy(adios)
    broken = BREAKS[place](adios)
    with pytest.raises(OSError, match="the step failed"):
        adios.step(*views(done))
    broken.remove()
    adios.objective.network._forward_hooks.clear()
    same(adios.state_dict(), before)
    for seed in range(done, done + 2):
        adios.step(*views(seed))
        good.step(*views(seed))
    same(adios.state_dict(), good.state_dict())


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)
