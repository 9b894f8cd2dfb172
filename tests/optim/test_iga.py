"""IGA by closure: a forward for each domain, and one graph at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import (
    MAKES,
    alike,
    batches,
    close,
    iga,
    iga_of,
    losses_of,
    net,
    trained,
)
from invariances import run, wrapped
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import SGD

import fastdg


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_iga_by_closure(batch_norm: bool, make: str) -> None:
    """A forward for each domain, and only one domain's graph at a time."""
    model, data = net(batch_norm), batches(4, absent=False)
    twin = copy.deepcopy(model)
    truth = trained(iga, twin, MAKES[make], data, penalty_weight=0.3)
    opt = wrapped("IGA", model, make, num_domains=3)
    for (x, y, d), (total, penalty) in zip(data, truth, strict=True):

        def losses(k: int, x: Tensor = x, y: Tensor = y, d: Tensor = d) -> Any:
            found = losses_of(model, x[d == k], y[d == k])
            return found if k % 2 else (found, d[d == k])

        loss = opt.step(losses)
        close(opt.statistics["objective"], total)
        close(opt.statistics["penalty"], penalty)
        s = opt.statistics
        assert torch.equal(s["domain_count"], torch.bincount(d))
        close((s["domain_loss"] * s["domain_count"]).sum() / len(d), loss)
    alike(model, twin)


def test_iga_both_ways() -> None:
    one, data = net(), batches(4, absent=False)
    two = copy.deepcopy(one)
    mixed, closure = wrapped("IGA", one, num_domains=3), wrapped("IGA", two, num_domains=3)
    seen = run(mixed, one, data)
    for (x, y, d), s in zip(data, seen, strict=True):
        closure.step(lambda k, x=x, y=y, d=d: losses_of(two, x[d == k], y[d == k]))
        assert s.keys() == closure.statistics.keys()
        for key, value in s.items():
            close(closure.statistics[key].double(), value.double())
    alike(one, two)


class Noisy(nn.Module):
    """Random numbers, running statistics, and a buffer that is made anew in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4)
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.body(x)))
        self.shift = 0.5 * self.shift + h.detach().mean(0)
        return self.head(self.drop(h + self.shift))


def test_iga_runs_a_closure_again_from_where_it_began() -> None:
    model = Noisy().double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(3, 5, 4).double(), torch.randint(3, (3, 5))
    opt = fastdg.IGA(SGD(model.parameters(), lr=0.1), penalty_weight=2.0, num_domains=3)
    calls: list[int] = []

    def closure(d: int) -> Tensor:
        calls.append(d)
        opt.zero_grad()
        return losses_of(model, x[d] + torch.randn(5, 4).double(), y[d])

    torch.manual_seed(3)
    opt.step(closure)
    ended = torch.random.get_rng_state()
    torch.manual_seed(3)
    losses = [losses_of(twin, x[d] + torch.randn(5, 4).double(), y[d]).mean() for d in range(3)]
    assert torch.equal(ended, torch.random.get_rng_state())
    assert calls == [0, 1, 2, 0, 1, 2]
    total, _ = iga_of(losses, list(twin.parameters()), 2.0)
    total.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad)
    for b, c in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, c)
    model.shift.zero_()  # none of autograd's, though made in the forward
    assert not torch_module._global_forward_pre_hooks


def test_iga_with_branches_that_not_every_domain_takes() -> None:
    body, own, idle = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(2, 2)
    model = nn.ModuleList([body, nn.Linear(4, 3), own, idle]).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(2, 5, 4).double(), torch.randint(3, (5,))

    def loss(m: nn.ModuleList, d: int) -> Tensor:
        return F.cross_entropy(m[1 + d](m[0](x[d]).tanh()), y, reduction="none")

    opt = fastdg.IGA(SGD(model.parameters(), lr=0.1), penalty_weight=2.0, num_domains=2)
    opt.step(lambda d: loss(model, d))
    both = [loss(twin, d).mean() for d in range(2)]
    used = [p for part in twin[:3] for p in part.parameters()]
    total, penalty = iga_of(both, used, 2.0)
    total.backward()
    close(opt.statistics["penalty"], penalty)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None
        else:
            close(p.grad, q.grad)


def test_iga_closure_and_what_else_shares_the_graph() -> None:
    """Hooks see the final gradient once; parameters of others get the objective's."""
    other, model = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
    both = nn.ModuleList([other, model])
    twin = copy.deepcopy(both)
    x, y = torch.randn(2, 5, 4).double(), torch.randint(3, (5,))
    seen: list[Tensor] = []
    model.weight.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    model.weight.register_post_accumulate_grad_hook(seen.append)
    opt = fastdg.IGA(SGD(model.parameters(), lr=0.1), penalty_weight=2.0, num_domains=2)
    opt.step(lambda d: losses_of(nn.Sequential(*both), x[d], y))
    losses = [losses_of(nn.Sequential(*twin), x[d], y).mean() for d in range(2)]
    iga_of(losses, list(twin[1].parameters()), 2.0)[0].backward()
    close(other.weight.grad, twin[0].weight.grad)
    close(model.bias.grad, twin[1].bias.grad)
    close(model.weight.grad, twin[1].weight.grad.clamp(-1e-3, 1e-3))
    assert len(seen) == 1


def peak(step: Any) -> int:
    from fastdg.studies.experiments.memory import measured

    return measured(step)[1]


@pytest.mark.cpu("memory of the CPU")
def test_iga_closure_holds_one_domain() -> None:
    """Not more than 1.2 times what one domain takes, however many there are."""
    model = nn.Sequential(
        *(layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.Tanh())), nn.Linear(32, 3)
    )
    x, y = torch.randn(6, 400, 32), torch.randint(3, (400,))

    def one() -> None:
        loss = losses_of(model, x[0], y).mean()
        found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (loss + sum(g.square().sum() for g in found)).backward()
        model.zero_grad()

    opt = fastdg.IGA(SGD(model.parameters(), lr=0.1), num_domains=6, check=False)

    def several() -> None:
        opt.step(lambda d: losses_of(model, x[d], y))
        opt.zero_grad()

    one()
    several()
    alone, ours = peak(one), peak(several)
    assert ours <= 1.2 * alone, (ours, alone)


@pytest.mark.parametrize("name", ["attention", "hardsigmoid"])
def test_iga_closure_where_autograd_has_no_second_derivative(name: str) -> None:
    def plain(q: Tensor) -> Tensor:
        if name == "hardsigmoid":
            return (q / 6 + 0.5).clamp(0, 1)
        return (q @ q.mT / 2).softmax(-1) @ q

    def fused(q: Tensor) -> Tensor:
        if name == "hardsigmoid":
            return F.hardsigmoid(q)
        return F.scaled_dot_product_attention(q, q, q)

    first, last = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
    x, y = torch.randn(2, 6, 1, 5, 4).double(), torch.arange(6) % 3
    found = []
    for function in (fused, plain):
        copies = copy.deepcopy((first, last))
        parameters = [*copies[0].parameters(), *copies[1].parameters()]

        def closure(d: int, function: Any = function, copies: Any = copies) -> Tensor:
            z = copies[1](function(3 * copies[0](x[d])).mean((1, 2)))
            return F.cross_entropy(z, y, reduction="none")

        opt = fastdg.IGA(SGD(parameters, lr=0.1), penalty_weight=2.0, num_domains=2)
        opt.step(closure)
        found.append([p.grad for p in parameters])
    # PyTorch's hardsigmoid multiplies by 1/6 in float32
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


def test_iga_closure_that_draws_anew_is_found_out() -> None:
    model = nn.Linear(4, 3)
    opt = fastdg.IGA(SGD(model.parameters(), lr=0.1), num_domains=2)
    generator = torch.Generator().manual_seed(0)

    def closure(d: int) -> Tensor:
        return losses_of(model, torch.randn(5, 4, generator=generator), torch.arange(5) % 3)

    with pytest.raises(RuntimeError, match=r"^closure: .*other losses"):
        opt.step(closure)
    assert opt.steps == 0 and model.weight.grad is None
    with pytest.raises(RuntimeError, match="needs a backward"):
        opt.step()


def test_iga_with_batch_norm_in_a_mixed_batch() -> None:
    model, (batch,) = net(batch_norm=True), batches(1, absent=False)
    twin, (x, y, d) = copy.deepcopy(model), batch
    opt = wrapped("IGA", model)
    with pytest.warns(UserWarning, match=r"^params: .*NativeBatchNorm"):
        opt.backward(losses_of(model, x, y), d)
    losses = losses_of(twin, x, y)
    means = [losses[d == k].mean() for k in range(3)]
    total, penalty = iga_of(means, list(twin.parameters()), 0.3)
    close(opt.statistics["penalty"], penalty)
    twin.zero_grad()
    total.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad)


def test_iga_closure_with_bad_results() -> None:
    model = nn.Linear(4, 3)
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    free = fastdg.IGA(SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"^num_domains: .*opt.step\(closure\)"):
        free.step(lambda d: losses_of(model, x, y))
    opt = fastdg.IGA(SGD(model.parameters(), lr=0.1), num_domains=2)
    for result, error, message in (
        (lambda d: (losses_of(model, x, y), y), ValueError, "^domains: .*num_domains=2.*got 2"),
        (lambda d: (losses_of(model, x, y), y % 2), ValueError, "^closure: .*domain 0, got .*1"),
        (lambda d: losses_of(model, x, y).mean(), ValueError, "^losses: .*reduction='none'"),
        (lambda d: None, TypeError, r"^closure: .*\(losses, domains\)"),
        (lambda d: torch.ones(3), ValueError, "^losses: .*graph"),
    ):
        with pytest.raises(error, match=message):
            opt.step(result)
        assert opt.steps == 0 and model.weight.grad is None


def test_the_penalty_is_the_linear_mmd_of_per_sample_gradients() -> None:
    """Summed over pairs, D times it, with the mean kernels between all pairs of samples."""
    model, (batch,) = net(), batches(1, absent=False)
    x, y, domains = batch
    opt = wrapped("IGA", model, num_domains=3)
    opt.backward(losses_of(model, x, y), domains)
    between = fastdg.per_sample_gram(losses_of(model, x, y), params=model)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(i):
            a, b = domains == i, domains == j
            total += between[a][:, a].mean() + between[b][:, b].mean()
            total -= 2 * between[a][:, b].mean()
    close(total / 3, opt.statistics["penalty"])
