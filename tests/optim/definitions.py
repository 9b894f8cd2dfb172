"""DomainBed's way of making each step, in a few lines of plain PyTorch and no part of fastdg."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, labels, domains
Make = Callable[[nn.Module], Optimizer]

MAKES: dict[str, Make] = {
    "momentum": lambda m: SGD(m.parameters(), lr=0.02, momentum=0.9),
    "adam": lambda m: Adam(m.parameters(), lr=1e-2, eps=1e-3, weight_decay=1e-2),
}


class Scale(nn.Module):
    """A module that no library knows, with a parameter that has no dimensions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / 3)
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.temperature


class Net(nn.Module):
    """Convolutions, norms, an embedding and a module of its own, on images with a word each.

    The word is the number in the image's first corner.
    """

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if batch_norm else nn.GroupNorm(2, 4)
        self.down = nn.Conv2d(4, 6, 3, stride=2)
        self.words = nn.Embedding(5, 6)
        self.scale = Scale(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(torch.tanh(self.norm(self.conv(x)))).mean((2, 3))
        words = (x[:, 0, 0, 0].abs() * 3).long().clamp(max=4)
        return self.head(torch.tanh(self.scale(h + self.words(words))))


def net(batch_norm: bool = False) -> Net:
    return Net(batch_norm).double()


def batches(steps: int, domains: int = 3, absent: bool = True) -> list[Batch]:
    """Ragged domains; where ``absent``, every third batch lacks one of them."""
    made = []
    for step in range(steps):
        samples = 9 + step % 4
        d = torch.randint(0, domains, (samples,))
        d[:domains] = torch.arange(domains)
        if absent and step % 3 == 1:
            d[d == step % domains] = (step + 1) % domains
        made.append((torch.randn(samples, 2, 6, 6).double(), torch.randint(3, (samples,)), d))
    return made


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def parts(batch: Batch) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each domain's samples, of the domains that have some."""
    x, y, domains = batch
    for d in sorted(set(domains.tolist())):
        yield d, x[domains == d], y[domains == d]


Objective = Callable[[nn.Module, Batch, float], tuple[Tensor, Tensor]]


def trained(
    objective: Objective,
    model: nn.Module,
    make: Make,
    data: Sequence[Batch],
    penalty_weight: float,
    anneal_steps: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Objective and penalty of each step; the optimizer is made anew when the anneal ends."""
    base = make(model)
    for step, batch in enumerate(data):
        total, penalty = objective(model, batch, penalty_weight if step >= anneal_steps else 1.0)
        if step == anneal_steps != 0:
            base = make(model)
        base.zero_grad()
        total.backward()
        base.step()
        yield total.detach(), penalty.detach()


def vrex(model: nn.Module, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
    losses = torch.stack([F.cross_entropy(model(x), y) for _, x, y in parts(batch)])
    penalty = ((losses - losses.mean()) ** 2).mean()
    return losses.mean() + weight * penalty, penalty


def irm(model: nn.Module, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
    losses, penalties = [], []
    for _, x, y in parts(batch):
        logits = model(x)
        losses.append(F.cross_entropy(logits, y))
        scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
        if len(y) == 1:
            penalties.append(scale.detach().sum() * 0)
            continue
        grads = [
            torch.autograd.grad(
                F.cross_entropy(logits[half::2] * scale, y[half::2]), scale, create_graph=True
            )[0]
            for half in (0, 1)
        ]
        penalties.append((grads[0] * grads[1]).sum())
    penalty = torch.stack(penalties).mean()
    return torch.stack(losses).mean() + weight * penalty, penalty


def iga(model: nn.Module, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
    losses = [F.cross_entropy(model(x), y) for _, x, y in parts(batch)]
    return iga_of(losses, list(model.parameters()), weight)


def iga_of(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], weight: float
) -> tuple[Tensor, Tensor]:
    rows = [
        torch.autograd.grad(
            loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        for loss in losses
    ]
    penalty = losses[0].new_zeros(())
    for grads in zip(*rows, strict=True):
        mean = torch.stack(grads).mean(0).detach()
        penalty = penalty + torch.stack([((g - mean) ** 2).sum() for g in grads]).sum()
    return torch.stack(list(losses)).mean() + weight * penalty, penalty


def group_dro(eta: float, domains: int) -> Objective:
    """q is as long as there are domains; who is absent keeps its share."""
    q = torch.ones(domains, dtype=torch.float64) / domains

    def objective(model: nn.Module, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
        found = {d: F.cross_entropy(model(x), y) for d, x, y in parts(batch)}
        share = sum(q[d].clone() for d in found)
        for d, loss in found.items():
            q[d] *= (eta * loss.detach()).exp()
        grown = sum(q[d].clone() for d in found)
        for d in found:
            q[d] *= share / grown
        total = sum(q[d] / share * loss for d, loss in found.items())
        return total, q.clone()

    return objective


def fish(
    model: nn.Module, make: Make, rounds: Sequence[Sequence[tuple[Tensor, Tensor]]], meta_lr: float
) -> Iterator[float]:
    """The squared length of each trajectory; a network and an optimizer for every round."""
    state = None
    for domains in rounds:
        inner = copy.deepcopy(model)
        opt = make(inner)
        if state is not None:
            opt.load_state_dict(state)
        for x, y in domains:
            opt.zero_grad()
            F.cross_entropy(inner(x), y).backward()
            opt.step()
        state = opt.state_dict()
        meta, found = model.state_dict(), inner.state_dict()
        pairs = zip(model.parameters(), inner.parameters(), strict=True)
        length = sum(float((p.detach() - q.detach()).square().sum()) for p, q in pairs)
        moved = {key: value + meta_lr * (found[key] - value) for key, value in meta.items()}
        model.load_state_dict(copy.deepcopy(moved))
        yield length


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    error = float((got.detach() - expected.detach()).abs().max())
    assert error <= tolerance * scale, f"off by {error:.1e}, largest entry {scale:.1e}"


def alike(model: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    """Parameters and buffers."""
    state = other.state_dict()
    for name, tensor in model.state_dict().items():
        close(tensor.double(), state[name].double(), tolerance)
