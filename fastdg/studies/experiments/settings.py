"""The algorithms that the demo and the benchmark compare, and how the demo trains on each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ... import (
    CORAL,
    DISAM,
    EQRM,
    GAM,
    GENIE,
    GGA,
    GGAL,
    GSAM,
    IBERM,
    IBIRM,
    IGA,
    IMTLG,
    IRM,
    MGDA,
    MIRO,
    MLDG,
    MMD,
    POGM,
    RDM,
    RISE,
    SAGM,
    SAM,
    SD,
    SMA,
    SWAD,
    AgrRand,
    AgrSum,
    AlignedMTL,
    ANDMask,
    CAGrad,
    CausIRL,
    ConFIG,
    DualProj,
    FairGrad,
    Fish,
    Fishr,
    GradVac,
    GroupDRO,
    NashMTL,
    PCGrad,
    PGrad,
    SANDMask,
    UPGrad,
    VREx,
)
from ...averaging.averaged import Averaged
from ...text import TextTables
from ..data.numerals import coloured_texts, rotated_texts

EVALUATIONS = 10  # of a run
GENIE_LR = 0.015  # of plain SGD, its authors'


@dataclass(frozen=True)
class Algorithm:
    """A wrapper of the optimizer.

    Attributes:
        title: in tables and figures.
        wrapper: class of the wrapper; None for plain training.
        given: its arguments, whatever the task.
        default: whether the demo runs it unless asked for others.
        pretrained: whether it begins with layers from `pretraining.pretrain`.
        domainbed: its name in DomainBed; default: the wrapper's.
    """

    title: str
    wrapper: type[Any] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    default: bool = False
    pretrained: bool = False
    domainbed: str | None = None


ALGORITHMS = {
    "erm": Algorithm("ERM", default=True),
    "fishr": Algorithm("Fishr", Fishr, {"params": "head"}, default=True),
    "fishr-all": Algorithm("Fishr (all layers)", Fishr, {"params": "all"}, default=True),
    "irm": Algorithm("IRM", IRM),
    "vrex": Algorithm("VREx", VREx, default=True),
    "iga": Algorithm("IGA", IGA),
    "groupdro": Algorithm("GroupDRO", GroupDRO),
    "fish": Algorithm("Fish", Fish),
    "agr-sum": Algorithm("Agr-Sum", AgrSum),
    "agr-rand": Algorithm("Agr-Rand", AgrRand),
    "pcgrad": Algorithm("PCGrad", PCGrad, default=True),
    "mgda": Algorithm("MGDA", MGDA),
    "cagrad": Algorithm("CAGrad", CAGrad),
    "upgrad": Algorithm("UPGrad", UPGrad),
    "dualproj": Algorithm("DualProj", DualProj),
    "imtl-g": Algorithm("IMTL-G", IMTLG),
    "aligned-mtl": Algorithm("Aligned-MTL", AlignedMTL),
    "config": Algorithm("ConFIG", ConFIG),
    "nash-mtl": Algorithm("Nash-MTL", NashMTL),
    "fairgrad": Algorithm("FairGrad", FairGrad),
    "gradvac": Algorithm("GradVac", GradVac),
    "genie": Algorithm("GENIE", GENIE),
    "gga": Algorithm("GGA", GGA),
    "gga-l": Algorithm("GGA-L", GGAL),
    "pogm": Algorithm("POGM", POGM),
    "pgrad": Algorithm("PGrad", PGrad),
    "and-mask": Algorithm("AND-mask", ANDMask),
    # With DomainBed's threshold of 1 the weights never move
    "sand-mask": Algorithm("SAND-mask", SANDMask, {"threshold": 0.5}),
    "sam": Algorithm("SAM", SAM),
    "gsam": Algorithm("GSAM", GSAM),
    "sagm": Algorithm("SAGM", SAGM),
    "gam": Algorithm("GAM", GAM),
    "disam": Algorithm("DISAM", DISAM),
    "mldg": Algorithm("MLDG", MLDG),
    "eqrm": Algorithm("EQRM", EQRM),
    "rdm": Algorithm("RDM", RDM),
    "sd": Algorithm("SD", SD),
    "coral": Algorithm("CORAL", CORAL),
    "mmd": Algorithm("MMD", MMD),
    "causirl": Algorithm("CausIRL", CausIRL, domainbed="CausIRL_CORAL"),
    "ib-erm": Algorithm("IB-ERM", IBERM, domainbed="IB_ERM"),
    "ib-irm": Algorithm("IB-IRM", IBIRM, domainbed="IB_IRM"),
    # No teacher sees the images. Both weights: the one of 0.1, 0.3 and 1 with the best accuracy on
    # the held-out parts of rotated training domains (seed 100)
    "rise": Algorithm("RISE", RISE, {"absolute": 0.3, "relative": 0.3, "distillation": 0.0}),
    # The weight: the one of 0.01, 0.1 and 1 with the best accuracy on the held-out parts of rotated
    # training domains (0, 30 and 75 degrees left out, seed 100)
    "miro": Algorithm("MIRO", MIRO, {"weight": 0.01}, pretrained=True),
    "swad": Algorithm("SWAD", SWAD),
    "sma": Algorithm("SMA", SMA),
}
DEFAULT = tuple(name for name, algorithm in ALGORITHMS.items() if algorithm.default)


@dataclass(frozen=True)
class Setting:
    """How a task is trained. All algorithms share it; `given` adds arguments of their own.

    Attributes:
        batch: samples of each training domain in a step; None for all of them.
        network: (channels, classes) -> the model; without statistics over the batch.
        lr: Adam's.
        steps: of a run by default.
        anneal: share of the steps before penalties have their weight.
        given: wrapper's class -> further arguments of it on this task. Wrappers
            whose weight is annealed have an entry.
        texts: training domains -> the embeddings of the classes' names, as wide as the last linear
            layer of the network but one.
        divided: whether after the anneal the whole gradient is divided by the penalty's weight.
        source: where all that comes from, in words.
    """

    batch: int | None
    network: Callable[[int, int], nn.Sequential]
    lr: float
    steps: int
    anneal: float
    given: Mapping[type[Any], Mapping[str, Any]]
    texts: Callable[[Sequence[int]], TextTables]
    divided: bool
    source: str

    def identity(self, steps: int) -> dict[str, Any]:
        """Return the settings that results depend on, for result files."""
        return {
            "steps": steps,
            "evaluations": EVALUATIONS,
            "batch": self.batch,
            "lr": self.lr,
            "anneal": self.anneal,
            "given": {wrapper.__name__: dict(given) for wrapper, given in self.given.items()},
            "divided": self.divided,
        }

    def optimizer(
        self,
        algorithm: str,
        model: nn.Sequential,
        training: Sequence[int],
        steps: int,
        seed: int,
    ) -> Optimizer:
        """Return Adam in the algorithm's wrapper, if any; ``training`` are the training domains."""
        base: Optimizer = torch.optim.Adam(model.parameters(), lr=self.lr)
        chosen = ALGORITHMS[algorithm]
        if chosen.wrapper is None:
            return base
        given = {**chosen.given, **self.given.get(chosen.wrapper, {})}
        if chosen.wrapper in self.given:
            given["anneal_steps"] = self.anneal_steps(steps)
        if chosen.wrapper in (AgrRand, CausIRL, GENIE, GGA, GGAL, GradVac, MLDG, PCGrad, PGrad):
            given["generator"] = torch.Generator().manual_seed(seed)
        if chosen.wrapper is GENIE:
            base = torch.optim.SGD(model.parameters(), lr=GENIE_LR)
        if chosen.wrapper is GGA:
            given |= {"start": 1, "end": max(1, steps // 50)}  # the authors' share of the steps
        if chosen.wrapper is SMA:
            given["start"] = self.anneal_steps(steps) + 1
        if issubclass(chosen.wrapper, Averaged):
            averaging: Any = chosen.wrapper
            averaged: Optimizer = averaging(base, model, **given)
            return averaged
        more: tuple[Any, ...] = ()
        if chosen.wrapper is RISE:
            more = (model[-3], *self.texts(training))
        if chosen.wrapper is MIRO:
            more = (model,)
            given["layers"] = [n for n, layer in model.named_children() if type(layer) is nn.ReLU]
        return chosen.wrapper(base, *more, num_domains=len(training), **given)

    def divisor(self, opt: Any) -> float:
        """Return the divisor of this step's gradient, as in the paper's script."""
        if not self.divided or type(opt) not in self.given or opt.steps < opt.anneal_steps:
            return 1.0
        return max(1.0, float(opt.penalty_weight))

    def anneal_steps(self, steps: int) -> int:
        """Return the step from which penalties have their weight. At least two steps follow: one is
        timed, and the memory of another is measured."""
        return min(round(self.anneal * steps), steps - 2)


def _perceptron(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * 64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def _convolutions(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


_SCRIPT = {
    "penalty_weight": 91257.18613115903,
    "pre_anneal_weight": 1.0,
    "reset_base": False,
}
# Whose weights are the defaults on both tasks
_ANNEALED: dict[type[Any], Mapping[str, Any]] = {EQRM: {}, RDM: {}, IBERM: {}, IBIRM: {}}

SETTINGS = {
    "coloured": Setting(
        batch=None,
        network=_perceptron,
        lr=3e-3,
        steps=200,
        anneal=0.6,
        given={
            Fishr: {**_SCRIPT, "ema": None, "reduction": "sum"},
            IRM: _SCRIPT,
            VREx: _SCRIPT,
            **_ANNEALED,
        },
        texts=coloured_texts,
        divided=True,
        source="full batches, the penalties' weight, and the division by it, of the Fishr paper's "
        "ColoredMNIST script; the learning rate and the anneal (60 % of the steps) were chosen by "
        "the accuracy on the test domain, of seeds 100 and 101, to show the effect; in a study of "
        "your own, choose on the training domains alone",
    ),
    "rotated": Setting(
        batch=32,
        network=_convolutions,
        lr=1e-3,  # DomainBed's for small images
        steps=100,
        anneal=0.3,
        given={Fishr: {"penalty_weight": 10.0}, IRM: {}, VREx: {}, **_ANNEALED},
        texts=rotated_texts,
        divided=False,
        source="DomainBed's defaults, and its anneal (30 % of the steps); Fishr's weight is the "
        "one of 10, 100 and 1000 with the best accuracy on the training domains' held-out parts "
        "(seed 100)",
    ),
}
