"""What MIRO, RISE, ADIOS and SWAD cost, each beside what it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import adios_cases as adios
import rise_cases as rise
import teacher_cases as teacher
import torch
from cases import DEEP_TOLERANCE
from contenders import OURS
from torch import Tensor

import fastdg

Run = Callable[[], Any]


@dataclass(frozen=True)
class Term:
    """One row of the table.

    Attributes:
        title: what is measured.
        unit: the contender whose time the others' are multiples of.
        goal: what is to be reached, in words.
        made: number of samples, or None for that of the row -> what a contender runs on.
        ways: who answers.
        error: number of samples -> how far our numbers are from others', relative.
        tolerance: of that.
        extra: what else the row says.
    """

    title: str
    unit: str
    goal: str
    made: Callable[[int | None], Any]
    ways: Mapping[str, Callable[[Any], Run]]
    error: Callable[[int | None], float]
    tolerance: float
    extra: Callable[[Any], dict[str, Any]] = lambda on: {}


def apart(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative error, by norm."""
    pairs = zip(got, wanted, strict=True)
    return max(float((g.double() - w).norm() / w.norm().clamp(min=1e-30)) for g, w in pairs)


def _regulariser(samples: int | None) -> float:
    on, exact = (teacher.Maps(samples or teacher.SAMPLES) for _ in range(2))
    for tensors in (exact.features, exact.biases):
        tensors[:] = [x.detach().double().requires_grad_() for x in tensors]
    exact.oracles = [x.double() for x in exact.oracles]
    return apart(teacher.fused(on)(), teacher.eager(exact)())


def _miro(samples: int | None) -> float:
    ours, other = (teacher.Training(samples or teacher.SAMPLES) for _ in range(2))
    runs = [teacher.ours(ours), teacher.by_hooks(other)]
    for at, run in zip((ours, other), runs, strict=True):
        torch.manual_seed(1)
        with torch.no_grad():  # or the maps would be the oracle's, and add nothing
            for p in at.on.model.parameters():
                p += 0.1 * p.std(correction=0) * torch.randn_like(p)
        run()
    found = [[p.grad for p in at.on.model.parameters()] for at in (ours, other)]
    return apart(found[0], [g.double() for g in found[1]])


def _rise(samples: int | None) -> float:
    on = rise.Batch.of()
    return apart(list(rise.ours(on)()), list(rise.loops(on.double())()))


def _adios(samples: int | None) -> float:
    ours, other = (adios.Setup(samples or adios.IMAGES) for _ in range(2))
    adios.ours(ours)()
    adios.by_pairs(other)()
    return apart(ours.weights(), [w.double() for w in other.weights()])


# ---- SWAD, whose average is one more pass over the weights ----


def averaging(at: teacher.Training) -> Run:
    opt = fastdg.SWAD(teacher.adam(at.on), at.on.model)

    def run() -> None:
        opt.zero_grad()
        at.on.losses().mean().backward()
        opt.step()

    return run


def averaged_model(at: teacher.Training) -> Run:
    """torch's own, an update a step."""
    step = teacher.plain(at)
    average = torch.optim.swa_utils.AveragedModel(at.on.model)

    def run() -> None:
        step()
        average.update_parameters(at.on.model)

    return run


def _swad(samples: int | None) -> float:
    at = teacher.Training(samples or 8)
    opt = fastdg.SWAD(teacher.adam(at.on), at.on.model)
    kept = []
    for _ in range(3):
        opt.zero_grad()
        at.on.losses().mean().backward()
        opt.step()
        kept.append([p.detach().double() for p in at.on.model.parameters()])
    opt.evaluate(1.0)
    wanted = [torch.stack(of).mean(0) for of in zip(*kept, strict=True)]
    return apart([p.detach() for p in opt.averaged().parameters()], wanted)


SHAPES = "ResNet-18, frozen BN, 3×64×64"
TERMS = {
    "MIRO's regulariser": Term(
        f"MIRO's regulariser and its gradients, 5 maps of {SHAPES}, N={teacher.SAMPLES}",
        "eager",
        "0.5 times the eager formula",
        lambda samples: teacher.Maps(samples or teacher.SAMPLES),
        teacher.REGULARISERS,
        _regulariser,
        1e-5,
    ),
    "MIRO's step": Term(
        f"MIRO's whole step, {SHAPES}, N={teacher.SAMPLES}",
        "plain and a frozen forward",
        "1.1 frozen forwards, and 1.1 times the memory of the frozen network's maps, added to the "
        "plain step",
        lambda samples: teacher.Training(samples or teacher.SAMPLES),
        teacher.STEPS,
        _miro,
        DEEP_TOLERANCE,
        lambda at: {"maps_bytes": sum(4 * x.numel() for x in teacher.Maps(at.on.samples).oracles)},
    ),
    "RISE's losses": Term(
        "RISE's losses and their gradients, B=128, C=65, A=3, E=512",
        "loop over samples",
        "1.5 ms, a twentieth of the loops",
        lambda samples: rise.Batch.of(),
        rise.WAYS,
        _rise,
        1e-5,
    ),
    "ADIOS's step": Term(
        f"ADIOS's whole step, {adios.MASKS} masks, {SHAPES}, N={adios.IMAGES}",
        "encodes alone",
        "1.1 times its N + 1 encodes alone",
        lambda samples: adios.Setup(samples or adios.IMAGES),
        adios.WAYS,
        _adios,
        1e-3,
    ),
    "SWAD's step": Term(
        f"SWAD's whole step, {SHAPES}, N={teacher.SAMPLES}",
        "plain",
        "1.02 plain steps",
        lambda samples: teacher.Training(samples or teacher.SAMPLES),
        {"plain": teacher.plain, OURS: averaging, "torch's AveragedModel": averaged_model},
        _swad,
        1e-6,
    ),
}
