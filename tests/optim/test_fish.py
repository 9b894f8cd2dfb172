"""Fish against deep copies of the network and an optimizer made anew, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import MAKES, alike, close, fish, losses_of, net
from fishes import Round, inner, linear, one, rounds, run, wrapped
from torch import nn
from torch.optim import SGD, Adam

import fastdg


@pytest.mark.parametrize("meta_lr", [0.5, 0.05])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("make", MAKES)
def test_definition(make: str, batch_norm: bool, meta_lr: float) -> None:
    """Weights, running statistics and counters, with the inner optimizer's state going on."""
    model, data = net(batch_norm), rounds(5)
    twin = copy.deepcopy(model)
    truth = fish(twin, MAKES[make], data, meta_lr)
    opt = wrapped(model, make, meta_lr=meta_lr)
    for domains, length in zip(data, truth, strict=True):
        for d, (x, y) in enumerate(domains):
            expected = losses_of(copy.deepcopy(model), x, y).mean()
            close(inner(opt, model, x, y, d), expected)
        close(opt.statistics["trajectory"], torch.tensor(length, dtype=torch.float64))
        alike(model, twin)
        assert opt.position == 0


@pytest.mark.parametrize("make", MAKES)
def test_a_closure_makes_the_whole_iteration(make: str) -> None:
    model, data = net(batch_norm=True), rounds(3)
    twin = copy.deepcopy(model)
    opt, loop = wrapped(model, make), wrapped(twin, make)
    with pytest.raises(RuntimeError, match="needs a backward"):
        opt.step()
    for domains in data:

        def closure(d: int, domains: Round = domains) -> Any:
            assert all(p.grad is None for p in model.parameters())
            losses = losses_of(model, *domains[d])
            return losses if d % 2 else (losses, torch.full(losses.shape, d))

        loss = opt.step(closure)
        losses = [inner(loop, twin, x, y, d) for d, (x, y) in enumerate(domains)]
        alike(model, twin, 0)
        close(loss, torch.stack(losses).mean())
        s = opt.statistics
        close(s["domain_loss"], torch.stack(losses))
        assert s["domain_count"].tolist() == [len(y) for _, y in domains]
        assert torch.equal(s["trajectory"], loop.statistics["trajectory"])
    assert opt.steps == loop.steps == 9
    inner(opt, model, *data[0][0], 0)
    with pytest.raises(RuntimeError, match=r"^closure: .*1 of the 3 inner steps"):
        opt.step(closure)


def test_the_ends_of_the_way_are_exact() -> None:
    """A meta_lr of 1 is plain training, one of 0 stays; to the last bit."""
    model, data = net(batch_norm=True).float(), rounds(2, torch.float32)
    plain, still = copy.deepcopy(model), copy.deepcopy(model)
    run(wrapped(model, meta_lr=1.0), model, data)
    base = MAKES["adam"](plain)
    for x, y in (pair for domains in data for pair in domains):
        base.zero_grad()
        losses_of(plain, x, y).mean().backward()
        base.step()
    start = copy.deepcopy(still)
    opt = wrapped(still, meta_lr=0.0)
    run(opt, still, data)
    for p, q, r, s in zip(*(m.parameters() for m in (model, plain, still, start)), strict=True):
        assert torch.equal(p, q) and torch.equal(r, s)
    alike(model, plain, 1e-6)
    alike(still, start, 0)
    assert opt.steps == 6


def test_inner_products() -> None:
    """For plain SGD those of all pairs of gradients, two ways; free of it for any optimizer."""
    model, rate = net(), 0.01
    opt = fastdg.Fish(SGD(model.parameters(), lr=rate), num_domains=3, inner_product=True)
    for domains in rounds(2):
        grads = []
        for d, (x, y) in enumerate(domains):
            inner(opt, model, x, y, d)
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        s = opt.statistics
        pairs = sum(grads[i] @ grads[j] for i in range(3) for j in range(i + 1, 3))
        close(s["inner_product"], rate * pairs)
        squares = sum(g @ g for g in grads)
        close((s["trajectory"] / rate**2 - squares) / 2, pairs, 1e-10)
    model = net()
    opt = wrapped(model, inner_product=True)
    (domains,) = rounds(1)
    start, expected = copy.deepcopy(model), torch.zeros(()).double()
    for d, (x, y) in enumerate(domains):
        before = copy.deepcopy(model)
        inner(opt, model, x, y, d)
        for p, q, r in zip(*(m.parameters() for m in (model, before, start)), strict=True):
            expected = expected - (p.grad * (q - r)).sum()
    close(opt.statistics["inner_product"], expected)


def test_statistics() -> None:
    model, opt = linear(num_domains=3, meta_steps=2)
    one(model, opt, 2)
    s = opt.statistics
    assert s.keys() == {"loss", "domain_loss", "domain_count"}
    assert s["domain_count"].tolist() == [0, 0, 5] and s["domain_loss"].isnan().tolist()[:2]
    torch.testing.assert_close(s["domain_loss"][2], s["loss"])
    one(model, opt, 0)
    length = opt.statistics["trajectory"]
    one(model, opt, 0)
    assert opt.statistics["trajectory"] is length  # that of the last meta step
    assert not any(value.requires_grad for value in opt.statistics.values())


def test_the_paper_s_sampling_of_domains() -> None:
    """Five of many domains in a meta-iteration, and its rate divided by their number."""
    model, opt = linear(num_domains=40, meta_steps=5, meta_lr=0.01 / 5)
    for _ in range(2):
        for d in torch.randperm(40)[:5].tolist():
            one(model, opt, d)
    assert opt.position == 0 and opt.steps == 10
    losses = losses_of(model, torch.randn(5, 4), torch.arange(5) % 3)
    seen = []
    opt.step(lambda k: (seen.append(k), losses_of(model, torch.randn(3, 4), torch.arange(3)))[1])
    assert seen == [0, 1, 2, 3, 4] and losses.shape == (5,)


@pytest.mark.parametrize("meta_steps", [1, 2])
def test_short_iterations(meta_steps: int) -> None:
    model, opt = linear(meta_steps=meta_steps)
    plain = copy.deepcopy(model)
    base = SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        start = copy.deepcopy(plain)
        for _ in range(meta_steps):
            x, y = torch.randn(5, 4), torch.arange(5) % 3
            inner(opt, model, x, y, 0)
            base.zero_grad()
            losses_of(plain, x, y).mean().backward()
            base.step()
        with torch.no_grad():
            for p, q in zip(plain.parameters(), start.parameters(), strict=True):
                p.lerp_(q, 0.5)
        alike(model, plain, 1e-6)


def test_parameters_that_come_and_go() -> None:
    """Frozen, unused, unfrozen within an iteration, added later: each from where it was."""
    body, head, unused, late = (nn.Linear(4, 4) for _ in range(4))
    model = nn.Sequential(body, head)
    body.requires_grad_(False)
    opt = fastdg.Fish(Adam([*model.parameters(), *unused.parameters()]), num_domains=2)
    x, y = torch.randn(5, 4), torch.arange(5) % 4
    before = copy.deepcopy(model)
    inner(opt, model, x, y, 0)
    body.requires_grad_(True)
    frozen = body.weight.detach().clone()
    inner(opt, model, x, y, 1)
    torch.testing.assert_close(
        opt.state[body.weight]["fish_kept"], body.weight.detach(), rtol=0, atol=0
    )
    assert (body.weight - frozen).abs().max() < 0.75e-3  # half of one step of Adam
    assert not torch.equal(head.weight, before[1].weight)
    assert all(p.grad is None and "fish_kept" not in opt.state[p] for p in unused.parameters())
    opt.add_param_group({"params": late.parameters()})
    longer = nn.Sequential(body, head, late)
    for d in (0, 1):
        inner(opt, longer, x, y, d)
    assert torch.equal(opt.state[late.weight]["fish_kept"], late.weight)


def test_the_rate_can_be_scheduled() -> None:
    model, opt = linear()
    assert (
        opt.param_groups[0]["fish_meta_lr"] == 0.5 and opt.param_groups[0]["fish_meta_steps"] == 2
    )
    start = model.weight.detach().clone()
    one(model, opt)
    opt.param_groups[0]["fish_meta_lr"] = 0.0
    one(model, opt, 1)
    assert torch.equal(model.weight, start)
    for part in ("num_domains=2", "meta_lr=0.0", "meta_steps=2"):
        assert part in repr(opt)


def test_mixed_batches() -> None:
    model, opt = linear()
    y = torch.arange(6) % 3
    words = r"^domains: .*one domain, got domains \[0, 1\]\. Draw each batch from one domain"
    with pytest.raises(ValueError, match=words):
        opt.backward(losses_of(model, torch.randn(6, 4), y), y % 2)
    opt.backward(losses_of(model, torch.randn(6, 4), y), torch.ones_like(y), final=False)
    with pytest.raises(ValueError, match=r"^domains: .*micro-batches of a step, got domains \[0\]"):
        opt.backward(losses_of(model, torch.randn(6, 4), y), torch.zeros_like(y))
    assert model.weight.grad is None and opt.position == 0
    with pytest.raises(RuntimeError, match="needs a backward"):
        opt.step()


def test_micro_batches_of_a_domain() -> None:
    model, opt = linear()
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    for k in range(2):
        part = slice(4 * k, 4 * k + 4)
        opt.backward(losses_of(model, x[part], y[part]), torch.ones_like(y[part]), final=k == 1)
    losses_of(twin, x, y).mean().backward()
    torch.testing.assert_close(model.weight.grad, twin.weight.grad)


@pytest.mark.gpu
def test_mixed_batches_on_a_device_are_asserted_there() -> None:
    from fastdg.core.closures import check_same

    same = torch.zeros(4, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        check_same(same, same[0], "one domain", "Split it.")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_domains": None}, ValueError, "^num_domains: .*got None"),
        ({"num_domains": 0}, ValueError, "^num_domains: .*got 0"),
        ({"meta_steps": 0}, ValueError, "^meta_steps: .*got 0"),
        ({"meta_lr": -0.5}, ValueError, "^meta_lr: .*got -0.5"),
        ({"inner_product": 1}, ValueError, "^inner_product: .*got 1"),
        ({"model": "net"}, TypeError, "^model: .*got str"),
        ({"model": nn.Linear(2, 2)}, ValueError, "^model: "),
    ],
)
def test_arguments(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear(**settings)


@pytest.mark.parametrize("which", ["model", "compiled"])
def test_compiled_models(which: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager")
    opt = wrapped(model)
    seen = compiled if which == "compiled" else twin
    other = fastdg.Fish(MAKES["adam"](twin), num_domains=3, model=seen)
    data = [[(torch.randn(6, 4), torch.arange(6) % 3) for _ in range(3)] for _ in range(2)]
    run(opt, model, data)
    run(other, compiled, data)
    alike(model, twin, 1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("change", ["data", "numpy", "in place"])
def test_weights_changed_between_iterations_begin_the_next(change: str) -> None:
    """Also where the change leaves no trace in autograd's version of the weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = fastdg.Fish(SGD(model.parameters(), lr=0.1), num_domains=2)
    x, y = torch.randn(2, 5, 3), torch.arange(5) % 2

    def iterate(model: nn.Module, opt: Any) -> None:
        opt.step(lambda d: F.cross_entropy(model(x[d]), y, reduction="none"))

    iterate(model, opt)
    for p in model.parameters():
        if change == "data":
            p.data.mul_(0.5)
        elif change == "numpy":
            p.detach().numpy()[...] *= 0.5
        else:
            with torch.no_grad():
                p.mul_(0.5)
    twin = copy.deepcopy(model)
    iterate(twin, fastdg.Fish(SGD(twin.parameters(), lr=0.1), num_domains=2))
    iterate(model, opt)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
