"""IRM: the logits, found or given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import (
    alike,
    batches,
    close,
    net,
)
from invariances import run, wrapped
from torch import Tensor, nn
from torch.optim import SGD

import fastdg


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_irm_with_logits(weight: float) -> None:
    """Given or found: the same; after a head that draws, or that runs twice, they must be given."""
    model, (batch,) = net(), batches(1, absent=False)
    twin = copy.deepcopy(model)
    x, y, d = batch
    found = wrapped("IRM", model, anneal_steps=0, penalty_weight=weight)
    given = wrapped("IRM", twin, anneal_steps=0, penalty_weight=weight)
    run(found, model, [batch])

    def closure() -> tuple[Tensor, Tensor, Tensor]:
        logits = twin(x)
        return F.cross_entropy(logits, y, reduction="none"), d, logits

    given.zero_grad()
    given.step(closure)
    close(given.statistics["penalty"], found.statistics["penalty"])
    alike(model, twin)
    given.step(lambda: closure()[:2])
    assert given.steps == 2


class Head(nn.Module):
    def __init__(self, drop: float = 0.0, outputs: int = 1) -> None:
        super().__init__()
        self.weight, self.drop, self.outputs = nn.Parameter(torch.randn(3, 4)), drop, outputs

    def forward(self, x: Tensor) -> Any:
        logits = F.dropout(F.linear(x, self.weight), self.drop)
        return logits if self.outputs == 1 else (logits, logits * 2)


def test_irm_with_heads_of_several_outputs() -> None:
    """The logits are the result of the last layer, whatever the module returns."""
    x, y, d = torch.randn(6, 4), torch.arange(6) % 3, torch.arange(6) % 2
    for drop, outputs in ((0.5, 1), (0.0, 2)):
        head = Head(drop, outputs)
        made = []
        for given in (False, True):
            opt = fastdg.IRM(SGD(head.parameters(), lr=0.1), check=False)
            torch.manual_seed(0)
            out = head(x)
            logits = out[0] if outputs == 2 else out
            losses = F.cross_entropy(logits, y, reduction="none")
            opt.zero_grad()
            opt.backward(losses, d, **({"logits": logits} if given else {}))
            made.append((head.weight.grad.clone(), opt.statistics["penalty"]))
        torch.testing.assert_close(*made)


@pytest.mark.parametrize("binary", [False, True])
def test_irm_of_what_a_cross_entropy_was_taken_of(binary: bool) -> None:
    """Whatever made it: frozen parts, tied weights, batch statistics, a temperature."""
    model, bias = nn.Linear(4, 4).double(), nn.Parameter(torch.arange(4.0).double())
    x, y, d = torch.randn(6, 4).double(), torch.arange(6) % 2, torch.arange(6) % 2
    made: list[Callable[[], Tensor]] = [
        lambda: model(x).tanh() + bias,
        lambda: F.linear(model(x).tanh().mean(0, keepdim=True) * x, model.weight),
        lambda: (model(x) - model(x).mean(0)) * bias.exp(),
    ]
    opts = [fastdg.IRM(SGD([*model.parameters(), bias], lr=0.1)) for _ in range(2)]
    for frozen in ([], [bias], [model.weight], [model.bias, bias]):
        for logits in made:
            for p in (*model.parameters(), bias):
                p.requires_grad_(all(p is not q for q in frozen))
            found = []
            for opt, given in zip(opts, (False, True), strict=True):
                z = logits()
                if binary:
                    z = z[:, 0]
                    losses = F.binary_cross_entropy_with_logits(z, y.double(), reduction="none")
                else:
                    losses = F.cross_entropy(z, y, reduction="none")
                opt.zero_grad()
                opt.backward(losses, d, **({"logits": z} if given else {}))
                found.append([opt.statistics["penalty"], *(p.grad for p in opt._names)])
            for one, two in zip(*found, strict=True):
                assert (one is None) == (two is None)
                if one is not None:
                    close(one, two)


def test_irm_looks_again_where_another_layer_is_the_head() -> None:
    """A bias that is frozen later is no longer in what the last layer returns."""
    model, bias = nn.Linear(4, 3, bias=False), nn.Parameter(torch.arange(3.0))
    opt = fastdg.IRM(SGD([model.weight, bias], lr=0.1))
    x, y, d = torch.randn(6, 4), torch.arange(6) % 3, torch.arange(6) % 2

    def losses() -> Tensor:
        return F.cross_entropy(model(x) + bias, y, reduction="none") * 2

    opt.backward(losses(), d)
    bias.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"^losses: .*cross-entropy"):
        opt.backward(losses(), d)


def test_irm_with_heads_whose_logits_are_not_known() -> None:
    x, y, d = torch.randn(6, 4), torch.arange(6) % 3, torch.arange(6) % 2
    head = nn.Linear(4, 3)
    opt = fastdg.IRM(SGD(head.parameters(), lr=0.1))
    logits = head(x) + head(-x)
    with pytest.raises(RuntimeError, match=r"^losses: .*several times.*logits=logits"):
        opt.backward(F.cross_entropy(logits, y, reduction="none") * 2, d)
    logits = head(x) + head(-x)
    losses = F.cross_entropy(logits, y, reduction="none")
    opt.backward(losses, d, final=False, logits=logits)
    with pytest.raises(RuntimeError, match=r"^losses: .*already called"):
        opt.backward(losses, d, logits=logits)
    opt.backward(losses, d, logits=logits)
    opt.step()


@pytest.mark.parametrize("given", [False, True])
def test_irm_of_losses_that_samples_share(given: bool) -> None:
    model = nn.Linear(4, 3)
    x, y, d = torch.randn(6, 4), torch.arange(6) % 3, torch.arange(6) % 2

    def backward(opt: fastdg.IRM) -> None:
        logits = model(x)
        losses = F.cross_entropy(logits - logits.mean(0), y, reduction="none") * 1.5
        opt.backward(losses, d, **({"logits": logits} if given else {}))

    message = (
        "depends on the logits of other samples" if given else "last layer is .* logits=logits"
    )
    with pytest.raises(RuntimeError, match=message):
        backward(fastdg.IRM(SGD(model.parameters(), lr=0.1)))
    assert model.weight.grad is None
    if given:
        backward(fastdg.IRM(SGD(model.parameters(), lr=0.1), check=False))


def test_irm_with_positions_and_binary_logits() -> None:
    """Tokens fold into one loss a sample; a column of logits may be squeezed."""
    y, d = torch.arange(6) % 2, torch.arange(6) % 2
    model = nn.Linear(4, 1).double()
    opt = fastdg.IRM(SGD(model.parameters(), lr=0.1))
    x = torch.randn(6, 5, 4).double()
    for inputs, shape in ((x[:, 0], (6,)), (x, (6, 5))):
        logits = model(inputs).squeeze(-1)
        assert logits.shape == shape
        target = y.double().view(6, *[1] * (len(shape) - 1)).expand(shape)
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        losses = losses.view(6, -1).mean(1)
        opt.zero_grad()
        opt.backward(losses, d)
        delta = (logits.sigmoid() - target) * logits
        c = delta.reshape(6, -1).mean(1)
        halves = [(c[d == k][0::2].mean() * c[d == k][1::2].mean()) for k in (0, 1)]
        close(opt.statistics["penalty"], torch.stack(halves).mean())


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (lambda z: "logits", TypeError, "^logits: .*got str"),
        (
            lambda z: z[:2],
            ValueError,
            "^logits: .*got shape",
        ),
        (lambda z: z.detach(), ValueError, "^logits: .*graph"),
        (lambda z: z.clone(), ValueError, "^logits: .*depend"),
    ],
)
def test_irm_with_wrong_logits(logits: Any, error: type[Exception], message: str) -> None:
    model = nn.Linear(4, 3)
    opt = fastdg.IRM(SGD(model.parameters(), lr=0.1))
    z = model(torch.randn(6, 4))
    with pytest.raises(error, match=message):
        losses = F.cross_entropy(z, torch.arange(6) % 3, reduction="none")
        opt.backward(losses, torch.arange(6) % 2, logits=logits(z))
    assert model.weight.grad is None


@pytest.mark.parametrize("outputs", [1, 2, 4])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_head_whose_output_is_not_the_logits_is_warned_of(factor: float, outputs: int) -> None:
    """Weights of samples are no matter."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, outputs))
    opt = fastdg.IRM(SGD(model.parameters(), lr=0.1))
    x, d = torch.randn(12, 5), torch.arange(12) % 3
    y = torch.randint(max(2, outputs), (12,))
    scale = torch.full((), factor, requires_grad=True)
    logits = model(x) * scale

    def losses(logits: Tensor) -> Tensor:
        if outputs > 1:
            return F.cross_entropy(logits, y, reduction="none") * torch.linspace(0.1, 2, 12)
        return 2 * F.binary_cross_entropy_with_logits(logits[:, 0], y.float(), reduction="none")

    if factor == 1:
        opt.backward(losses(logits), d)
        return
    with pytest.warns(UserWarning, match=r"^losses: .*cross-entropy.*logits=logits") as told:
        opt.backward(losses(logits), d)
    assert told[0].filename == __file__
    opt = fastdg.IRM(SGD(model.parameters(), lr=0.1))
    logits = model(x) * scale
    opt.backward(losses(logits), d, logits=logits)
