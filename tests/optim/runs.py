"""Small trainings with every wrapper, and with all that decides how they go on in one state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bases import CORAL, IBIRM, CausIRL, even, seeded
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import fastdg
from fastdg.files import replace

SAMPLES, BATCH, DOMAINS = 54, 9, 3
Wrap = Callable[[Optimizer, "Net"], Any]


class Net(nn.Sequential):
    """Draws random numbers; layers have names."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if batch_norm else nn.LayerNorm(8)
        self.drop = nn.Dropout(0.2)
        self.embed = nn.Linear(8, 5)
        self.act = nn.Tanh()
        self.head = nn.Linear(5, 3)


class Run:
    """A training loop, one step at a time; `state` is its checkpoint.

    Each epoch goes through the samples in an order that its number decides, so that the number of
    steps made says which batch is next. Dropout, and wrappers without a generator, draw from
    torch's global one.

    Args:
        wrap: makes the wrapper.
        base: makes the optimizer inside.
        alone: batches are of one domain each, in turn.
        batch_norm: the model has batch norm, in training mode.
    """

    def __init__(
        self,
        wrap: Wrap,
        base: Callable[[Any], Optimizer] = lambda p: Adam(p, lr=1e-2),
        *,
        alone: bool = False,
        batch_norm: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randn(SAMPLES, 6), torch.randint(3, (SAMPLES,))
        self.domains = torch.arange(SAMPLES) % DOMAINS
        self.alone, self.steps = alone, 0
        self.model = Net(batch_norm)
        self.opt = wrap(base(self.model.named_parameters()), self.model)
        self.scheduler = CosineAnnealingWarmRestarts(self.opt, T_0=11)

    def step(self) -> None:
        batches = SAMPLES // BATCH
        epoch, place = divmod(self.steps, batches)
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        if self.alone:
            order = order[self.domains[order].argsort(stable=True)].view(DOMAINS, -1)
            order = order.view(DOMAINS, -1, BATCH).transpose(0, 1).reshape(-1)
        rows = order[place * BATCH : (place + 1) * BATCH]
        x, y, domains = self.x[rows], self.y[rows], self.domains[rows]
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        self.opt.zero_grad()
        links = [self.opt]
        while isinstance(links[-1], fastdg.DomainOptimizer):
            links.append(links[-1].base)
        inputs = {"labels": y} if any(isinstance(o, fastdg.RISE) for o in links) else {}
        self.opt.backward(losses, domains, **inputs)
        self.opt.step()
        self.scheduler.step()
        self.steps += 1
        if isinstance(self.opt, fastdg.SWAD) and self.steps % 4 == 0:
            self.model.eval()
            with torch.no_grad():
                validation = F.cross_entropy(self.model(self.x), self.y)
            self.model.train()
            self.opt.evaluate(validation)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "opt": self.opt.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "steps": self.steps,
            "random": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.steps = state["steps"]
        torch.set_rng_state(state["random"])

    def result(self) -> dict[str, Tensor]:
        """The trained weights, and the averaged ones."""
        found = dict(self.model.state_dict())
        if isinstance(self.opt, fastdg.SMA | fastdg.SWAD):
            averaged = self.opt.averaged().module.state_dict()
            found |= {f"averaged.{name}": value for name, value in averaged.items()}
        return found


class Adversarial:
    """ADIOS's loop, with the same methods."""

    def __init__(self, single: bool) -> None:
        torch.manual_seed(0)
        self.images = torch.randn(24, 1, 8, 8)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 6)
        )
        masker = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Softmax(1))
        objective = fastdg.BYOL(network, nn.Linear(6, 6)) if single else fastdg.SimCLR(network)
        self.opt = fastdg.ADIOS(
            SGD(objective.parameters(), lr=0.05, momentum=0.9),
            Adam(masker.parameters(), lr=1e-2),
            masker,
            objective=objective,
            single=single,
            generator=seeded() if single else None,
        )

    @property
    def steps(self) -> int:
        return self.opt.steps

    def step(self) -> None:
        rows = torch.arange(8) + self.steps % 3 * 8
        images = self.images[rows]
        self.opt.step(images, images + 0.1 * torch.randn_like(images))

    def state(self) -> dict[str, Any]:
        return {"opt": self.opt.state_dict(), "random": torch.get_rng_state()}

    def load(self, state: dict[str, Any]) -> None:
        self.opt.load_state_dict(state["opt"])
        torch.set_rng_state(state["random"])

    def result(self) -> dict[str, Tensor]:
        return {**self.opt.objective.state_dict(), **self.opt.masker.state_dict(prefix="masker.")}


def fishr(base: Optimizer, **more: Any) -> fastdg.Fishr:
    return fastdg.Fishr(base, **{"penalty_weight": 5.0, "anneal_steps": 7, **more})


def miro(base: Optimizer, model: Net) -> fastdg.MIRO:
    return fastdg.MIRO(base, model, layers=["body", "embed"])


def rise(base: Optimizer, model: Net) -> fastdg.RISE:
    anchors = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(2))
    return fastdg.RISE(base, model.embed, anchors.mean(1), anchors)


RUNS: dict[str, Callable[..., Any]] = {
    "Fishr": partial(Run, lambda o, m: fishr(o, num_domains=3)),
    "Fishr, all layers": partial(Run, lambda o, m: fishr(o, params="all", num_domains=3)),
    "ERM": partial(Run, lambda o, m: fastdg.ERM(o), batch_norm=True),
    "AgrSum": partial(Run, lambda o, m: fastdg.AgrSum(o)),
    "AgrRand": partial(Run, lambda o, m: fastdg.AgrRand(o)),
    "AgrRand, a generator": partial(Run, lambda o, m: fastdg.AgrRand(o, generator=seeded())),
    "PCGrad": partial(Run, lambda o, m: fastdg.PCGrad(o, generator=seeded())),
    "GramSurgery": partial(Run, lambda o, m: fastdg.GramSurgery(o, even)),
    "CAGrad": partial(Run, lambda o, m: fastdg.CAGrad(o)),
    "ANDMask": partial(Run, lambda o, m: fastdg.ANDMask(o, threshold=0.3)),
    "SANDMask": partial(Run, lambda o, m: fastdg.SANDMask(o, threshold=0.3)),
    "Fish": partial(
        Run,
        lambda o, m: fastdg.Fish(o, num_domains=3, model=m),
        alone=True,
        batch_norm=True,
    ),
    "PGrad": partial(
        Run,
        lambda o, m: fastdg.PGrad(o, num_domains=3, model=m),
        alone=True,
        batch_norm=True,
    ),
    "IGA": partial(Run, lambda o, m: fastdg.IGA(o, penalty_weight=0.5)),
    "IRM": partial(Run, lambda o, m: fastdg.IRM(o, anneal_steps=7)),
    "VREx": partial(Run, lambda o, m: fastdg.VREx(o, anneal_steps=7)),
    "EQRM": partial(Run, lambda o, m: fastdg.EQRM(o, anneal_steps=7)),
    "RDM": partial(Run, lambda o, m: fastdg.RDM(o, penalty_weight=0.1, anneal_steps=7)),
    "CORAL": partial(Run, lambda o, m: CORAL(o)),
    "IBIRM": partial(Run, lambda o, m: IBIRM(o, anneal_steps=7)),
    "CausIRL": partial(
        Run, lambda o, m: CausIRL(o, distance="mmd", generator=seeded(), num_domains=3)
    ),
    "GENIE": partial(Run, lambda o, m: fastdg.GENIE(o, generator=seeded())),
    "GroupDRO": partial(Run, lambda o, m: fastdg.GroupDRO(o, eta=0.1, num_domains=3)),
    "MIRO": partial(Run, miro),
    "RISE": partial(Run, rise),
    "Fishr(MIRO(RISE))": partial(Run, lambda o, m: fishr(miro(rise(o, m), m), num_domains=3)),
    "Fish(MIRO)": partial(Run, lambda o, m: fastdg.Fish(miro(o, m), num_domains=3), alone=True),
    "SWAD(Fishr)": partial(Run, lambda o, m: fastdg.SWAD(fishr(o, num_domains=3), m, n_converge=2)),
    "SWAD": partial(Run, lambda o, m: fastdg.SWAD(o, m, n_converge=2, rule="code")),
    "SMA(Fishr)": partial(
        Run, lambda o, m: fastdg.SMA(fishr(o, num_domains=3), m, start=5), batch_norm=True
    ),
    "SWAD(PCGrad(MIRO))": partial(
        Run,  # with a valley that does not end
        lambda o, m: fastdg.SWAD(fastdg.PCGrad(miro(o, m)), m, tolerance_ratio=100.0),
    ),
    "ADIOS": partial(Adversarial, single=False),
    "ADIOS-s": partial(Adversarial, single=True),
}


def save(run: Any, path: Path) -> None:
    """A kill at any moment leaves the checkpoint before this one, or this one."""
    replace(path, lambda file: torch.save(run.state(), file))


def resume(run: Any, path: Path) -> None:
    """Go on from the checkpoint, if there is one."""
    if path.exists():
        run.load(torch.load(path, weights_only=True))
