"""The optimizers a wrapper has to get along with, and a small training to try it on."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RAdam, RMSprop

import fastdg

Make = Callable[[Any], Optimizer]
Wrap = Callable[..., Any]
BASES: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, dampening=0.1),
    "adam": lambda p: Adam(p, lr=1e-2),
    "fused_adamw": lambda p: AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=1e-2, momentum=0.5),
    "adagrad": lambda p: Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "radam": lambda p: RAdam(p, lr=1e-2),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def through_a_file(made: Callable[[], tuple[Any, Any]], model: Any, opt: Any) -> tuple[Any, Any]:
    """Save the states of a model and its optimizer, and load them into a new pair."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other = made()
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    return again, other


def wrap(base: Optimizer, **settings: Any) -> fastdg.Fishr:
    return fastdg.Fishr(base, **{"penalty_weight": 5.0, "anneal_steps": 2, **settings})


class Fish(fastdg.Fish):
    """Takes every batch for one of a single domain, so that it may be given what all are given."""

    def backward(
        self, losses: Tensor, domains: Tensor, final: bool = True, **inputs: Any
    ) -> Tensor:
        return super().backward(losses, domains * 0, final, **inputs)


class PGrad(fastdg.PGrad):
    """Takes every batch for one of a single domain."""

    def backward(
        self, losses: Tensor, domains: Tensor, final: bool = True, **inputs: Any
    ) -> Tensor:
        return super().backward(losses, domains * 0, final, **inputs)


class POGM(fastdg.POGM):
    """Takes every batch for one of the domain whose turn it is."""

    def backward(
        self, losses: Tensor, domains: Tensor, final: bool = True, **inputs: Any
    ) -> Tensor:
        return super().backward(losses, domains * 0 + self._domain, final, **inputs)


def with_made_up_inputs(kind: Any) -> Any:
    """The wrapper, which takes the losses for features and logits, so that it may be given what all
    are given."""

    def backward(
        self: Any, losses: Tensor, domains: Tensor, final: bool = True, **inputs: Any
    ) -> Tensor:
        names = {"features"} & {*self.takes} or {"logits"}
        with torch.inference_mode(False):  # gradients may be off
            made = dict.fromkeys(names, losses.unsqueeze(1))
        return kind.backward(self, losses, domains, final, **{**made, **inputs})

    return type(kind.__name__, (kind,), {"backward": backward, "__module__": __name__})


CORAL, CausIRL, IBERM, IBIRM, MMD, SD = map(
    with_made_up_inputs,
    (fastdg.CORAL, fastdg.CausIRL, fastdg.IBERM, fastdg.IBIRM, fastdg.MMD, fastdg.SD),
)


WRAPS: dict[str, Wrap] = {
    "Fishr": wrap,
    "ERM": fastdg.ERM,
    "AgrSum": fastdg.AgrSum,
    "AgrRand": lambda base, **more: fastdg.AgrRand(base, generator=seeded(), **more),
    "PCGrad": lambda base, **more: fastdg.PCGrad(base, generator=seeded(), **more),
    "GramSurgery": lambda base, **more: fastdg.GramSurgery(base, even, **more),
    "CAGrad": fastdg.CAGrad,
    "ANDMask": lambda base, **more: fastdg.ANDMask(base, **{"threshold": 0.5, **more}),
    "SANDMask": lambda base, **more: fastdg.SANDMask(base, **{"threshold": 0.3, **more}),
    "Fish": lambda base, **more: Fish(base, **{"num_domains": 3, **more}),
    "IGA": lambda base, **more: fastdg.IGA(base, **{"penalty_weight": 0.5, **more}),
    "IRM": lambda base, **more: fastdg.IRM(base, **{"anneal_steps": 2, **more}),
    "VREx": lambda base, **more: fastdg.VREx(base, **{"anneal_steps": 2, **more}),
    "GroupDRO": lambda base, **more: fastdg.GroupDRO(base, **{"eta": 0.5, **more}),
    "EQRM": lambda base, **more: fastdg.EQRM(base, **{"anneal_steps": 2, **more}),
    "RDM": lambda base, **more: fastdg.RDM(
        base, **{"penalty_weight": 0.1, "anneal_steps": 2, **more}
    ),
    "CORAL": CORAL,
    "IBIRM": lambda base, **more: IBIRM(base, **{"anneal_steps": 2, **more}),
    "MIRO": lambda base, **more: miro(base, **more),
    "Fishr(MIRO)": lambda base, **more: wrap(miro(base), **more),
    "AgrSum(MIRO)": lambda base, **more: fastdg.AgrSum(miro(base), **more),
    "RISE": lambda base, **more: rise(base, **more),
    "SWAD(Fishr)": lambda base, **more: fastdg.SWAD(wrap(base, **more), model_of(base)),
}

# One function of the Gram matrix or of features each, and all else CAGrad's, AgrRand's, Fish's,
# CORAL's or MIRO's: these keep the contract, too, and are not tried again in every framework
RULES: dict[str, Wrap] = {
    "MGDA": fastdg.MGDA,
    "UPGrad": fastdg.UPGrad,
    "DualProj": fastdg.DualProj,
    "IMTLG": fastdg.IMTLG,
    "AlignedMTL": fastdg.AlignedMTL,
    "ConFIG": fastdg.ConFIG,
    "NashMTL": lambda base, **more: fastdg.NashMTL(base, **{"num_domains": 3, **more}),
    "FairGrad": fastdg.FairGrad,
    "GradVac": lambda base, **more: fastdg.GradVac(
        base, **{"num_domains": 3, "generator": seeded(), **more}
    ),
}
RULES |= {"MMD": MMD, "SD": SD}
RULES["CausIRL"] = lambda base, **more: CausIRL(base, generator=seeded(), **more)
RULES["IBERM"] = lambda base, **more: IBERM(base, **{"anneal_steps": 2, **more})
RULES["GGAL"] = lambda base, **more: fastdg.GGAL(base, generator=seeded(), **more)
RULES["SMA(Fishr)"] = lambda base, **more: fastdg.SMA(wrap(base, **more), model_of(base), start=2)
RULES["GENIE"] = lambda base, **more: fastdg.GENIE(base, generator=seeded(), **more)
RULES["GGA"] = lambda base, **more: fastdg.GGA(base, generator=seeded(), **more)
RULES["PGrad"] = lambda base, **more: PGrad(
    base, **{"num_domains": 3, "splits": 1, "generator": seeded(), **more}
)
RULES["POGM"] = lambda base, **more: POGM(base, **{"num_domains": 3, **more})
EVERY = {**WRAPS, **RULES}


def model_of(base: Optimizer) -> nn.Sequential:
    """The network that the optimizer was made for."""
    first = base.param_groups[0]["params"][0]
    return next(model for model in NETWORKS if model[0].weight is first)


def miro(base: Optimizer, **more: Any) -> fastdg.MIRO:
    """With the same oracle each time, as a run that is resumed has it."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        oracle = Network().to(base.param_groups[0]["params"][0].dtype)
    return fastdg.MIRO(base, model_of(base), oracle, layers=["0", "2"], **more)


class RISE(fastdg.RISE):
    """Makes up its labels, so that it may be given what all are given."""

    def backward(
        self, losses: Tensor, domains: Tensor, final: bool = True, **inputs: Any
    ) -> Tensor:
        with torch.inference_mode(False):  # no tensor made in inference mode can be saved
            labels = torch.arange(len(losses)) % 3
        return super().backward(losses, domains, final, **{"labels": labels, **inputs})


def rise(base: Optimizer, **more: Any) -> RISE:
    """Embeddings are what is before the last layer."""
    generator = torch.Generator().manual_seed(2)
    anchors = torch.randn(3, 2, 5, generator=generator)
    return RISE(base, model_of(base)[1], anchors.mean(1), anchors, **more)


def even(gram: Tensor) -> Tensor:
    """A weighting that can be pickled."""
    return gram.new_full(gram.shape[:1], 1 / len(gram))


class Network(nn.Sequential):
    """Remembered, with its copies, by who has to find it again."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        NETWORKS.append(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        NETWORKS.append(self)


NETWORKS: deque[Network] = deque(maxlen=8)


@dataclass(frozen=True)
class Case:
    """A wrapper around an optimizer."""

    wrapper: str
    base: str

    @property
    def axes(self) -> tuple[str, str]:
        """Of a product: every wrapper is tried, and every optimizer."""
        return self.wrapper, self.base

    @property
    def make(self) -> Make:
        return BASES[self.base]

    def wrap(self, base: Optimizer, **settings: Any) -> Any:
        return EVERY[self.wrapper](base, **settings)

    def trained(self, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        return trained(self.make, dtype, self.wrap, **settings)


def has_two(wrapper: str) -> bool:
    """Whether a wrapper is tried around both of `TWO`: chains and rules are of parts that are."""
    return "(" not in wrapper and wrapper not in RULES


# What differs between the optimizers inside is no wrapper's own: one has them all
TWO = ("fused_adamw", "adagrad")
CASES = [
    Case(wrapper, base)
    for wrapper in EVERY
    for base in (BASES if wrapper == "Fishr" else TWO if has_two(wrapper) else TWO[:1])
]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return Network().to(dtype)


def batch(model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Losses and domains of a forward on data that only the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 4, generator=generator).to(next(model.parameters()).dtype)
    y = torch.randint(3, (9,), generator=generator)
    domains = torch.randint(3, (9,), generator=generator)
    return F.cross_entropy(model(x), y, reduction="none"), domains


def steps(model: nn.Module, opt: Any, seeds: Iterable[int]) -> None:
    for seed in seeds:
        opt.zero_grad()
        opt.backward(*batch(model, seed))
        opt.step()


def trained(
    make: Make, dtype: torch.dtype = torch.float32, wrap: Wrap = wrap, **settings: Any
) -> Any:
    model = network(dtype)
    opt = wrap(make(model.parameters()), **settings)
    steps(model, opt, range(4))
    return model, opt


def same(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def shared(opt: Any) -> None:
    assert opt.param_groups is opt.base.param_groups
    assert opt.state is opt.base.state
    assert opt.defaults is opt.base.defaults


def emas(opt: fastdg.Fishr) -> list[Tensor]:
    state = opt.state_dict()["state"]
    return [state[i]["fishr_ema"] for i in sorted(state) if "fishr_ema" in state[i]]
