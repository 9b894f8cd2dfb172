"""Many small layers: what a step computes of them is computed in few calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastdg
from fastdg import ops
from fastdg.domains import partition
from fastdg.factors import Dense, NormCall, OfNorm, Outer
from fastdg.gradients import engine, route
from fastdg.statistics import small
from fastdg.statistics.small import Small

N, WIDTH, D = 12, 6, 3


class Counted(TorchDispatchMode):
    """Counts the ops that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def layers(count: int) -> nn.Sequential:
    torch.manual_seed(count)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count)))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(N)
    return torch.randn(N, WIDTH), rows % WIDTH, rows % D


def step(
    count: int, wrapper: Any, make: Callable[[int], nn.Module] = layers, **settings: Any
) -> Counter[str]:
    """The ops of the sixth step, which looks at nothing anew."""
    model, (x, y, domains) = make(count), batch()
    opt = wrapper(
        torch.optim.SGD(model.parameters(), lr=0.1, foreach=True), num_domains=D, **settings
    )
    for _ in range(6):
        with Counted() as counted:
            opt.zero_grad()
            opt.backward(F.cross_entropy(model(x), y, reduction="none"), domains)
            opt.step()
    return counted.calls


@pytest.mark.parametrize(
    ("wrapper", "settings", "each"),
    [
        (fastdg.Fishr, {"params": "all"}, 4),  # forward: t, addmm; backward: t, mm
        (fastdg.AgrSum, {}, 6),  # and the domains' rows of the weight and of the bias, as views
    ],
)
def test_calls_of_a_step_do_not_grow_with_layers(
    wrapper: Any, settings: dict[str, Any], each: int
) -> None:
    few, many = step(10, wrapper, **settings), step(30, wrapper, **settings)
    more = {name: (many[name] - few[name]) / 20 for name in many if many[name] != few[name]}
    assert sum(more.values()) == each, more
    assert many["fastdg.foreach_moments"] == 1
    assert not any(name in many for name in ("fastdg.moments", "fastdg.outer_moments"))


def convolutions(count: int) -> nn.Sequential:
    """Blocks as those of a ResNet, too large to wait for one another."""
    torch.manual_seed(count)
    blocks = (
        module
        for _ in range(count)
        for module in (nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    )
    head = nn.Flatten(), nn.Linear(64 * 16, WIDTH)
    spread = nn.Linear(WIDTH, 64 * 8 * 8), nn.Unflatten(1, (64, 8, 8))
    return nn.Sequential(*spread, *blocks, nn.AdaptiveAvgPool2d(4), *head).eval()


@pytest.mark.parametrize(
    ("wrapper", "settings"),
    [(fastdg.Fishr, {"params": "all"}), (fastdg.AgrSum, {}), (fastdg.PCGrad, {})],
)
def test_a_block_of_convolution_and_norm_adds_two_ops(
    wrapper: Any, settings: dict[str, Any]
) -> None:
    def block(wrapper: Any, **settings: Any) -> Counter[str]:
        few, many = (step(count, wrapper, convolutions, **settings) for count in (4, 8))
        return Counter({name: many[name] - few[name] for name in many})

    more = block(wrapper, **settings) - block(fastdg.ERM)
    own = {name: count / 4 for name, count in more.items() if name.startswith("fastdg.")}
    assert own.pop("fastdg.norm_gradients") == 1
    assert list(own.values()) == [1]
    # And the padded copy that the op of a convolution reads
    views = {f"aten.{name}" for name in ("view", "unbind", "split", "transpose", "expand")}
    rest = {name for name in more if not name.startswith("fastdg.")} - views
    assert rest <= {"aten.constant_pad_nd"}, more


def factors() -> dict[str, Dense | Outer]:
    return {
        "single": Dense(torch.randn(N, 4)),
        "double": Dense(torch.randn(N, 2, 3).double()),
        "number": Dense(torch.randn(N)),
        "rows": Outer(torch.randn(N, 5), torch.randn(N, 4), (4, 5)),
        "one place": Outer(torch.randn(N, 5), torch.randn(N, 4), (4, 5, 1, 1)),
        "positions": Outer(torch.randn(N, 3, 5), torch.randn(N, 3, 4), (4, 5)),
        "last": Dense(torch.randn(N, 4).double()),
    }


@pytest.mark.parametrize("waiting", [0, 100, 1 << 18])
def test_small_gradients_are_what_each_alone_is(
    waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "WAITING", waiting)
    parts = partition(torch.arange(N) % D, torch.ones(N), D + 1)
    both: Small[str] = Small(parts, variance=True)
    means: Small[str] = Small(parts, variance=False)
    given = factors()
    for name, factor in given.items():
        assert both.takes(name, factor)
        assert means.takes(name, factor)
    found, alone = both.results(), means.results()
    for name, factor in given.items():
        for got, want in zip(found[name], factor.moments(parts), strict=True):
            torch.testing.assert_close(got, want)
        mean, variance = alone[name]
        torch.testing.assert_close(mean, factor.domain(parts))
        assert variance is None


def test_large_and_grouped_gradients_do_not_wait() -> None:
    found: Small[str] = Small(partition(torch.arange(N) % D, torch.ones(N)), variance=True)
    wide = torch.randn(N, 300)
    assert not found.takes("weight", Outer(wide, wide, (300, 300)))
    assert not found.takes("bias", Dense(torch.randn(N, small.SMALL)))
    image = torch.randn(N, 2, 5)
    assert not found.takes("kernel", Outer(image, torch.randn(N, 3, 4), (4, 2, 3), [3, 1, 1]))
    assert not found.takes(
        "groups", Outer(torch.randn(N, 4, 1), torch.randn(N, 1, 4), (4, 2), (), 2)
    )
    assert found.results() == {}


def test_on_a_device_far_larger_gradients_wait_for_one_launch() -> None:
    there = torch.device("meta")
    waiting: Small[str] = Small(partition(torch.arange(N) % D, torch.ones(N)), variance=True)
    big = torch.empty(96, 2048, device=there)  # of the norms in a ResNet-50's last stage
    assert not waiting.takes("norm", Dense(torch.empty(96, 2048)))
    assert all(waiting.takes(str(k), Dense(big)) for k in range(40))
    assert waiting.made == {}  # not one launch yet
    assert not waiting.takes("positions", Dense(torch.empty(96, 197, 768, device=there)))
    wide = torch.empty(N, 300, device=there)
    assert not waiting.takes("weight", Outer(wide, wide, (300, 300)))


@pytest.mark.parametrize("caught", [0, 1 << 16])
def test_gradients_that_wait_for_the_end_are_those_that_arrive(
    caught: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "CAUGHT", caught)
    monkeypatch.setattr(engine, "_plans", type(engine._plans)())
    model = layers(4)
    model.insert(2, nn.LayerNorm(WIDTH))
    tied = model[0].weight
    x, y, domains = batch()
    out = F.linear(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), tied)
    losses = F.cross_entropy(out, y, reduction="none")
    grads = [
        torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses
    ]
    found = fastdg.domain_moments(losses, domains, params=model)
    for k, (name, _) in enumerate(model.named_parameters()):
        rows = torch.stack([grad[k] for grad in grads])
        for d in range(D):
            own = rows[domains == d]
            torch.testing.assert_close(found.mean[name][d], own.mean(0))
            torch.testing.assert_close(found.variance[name][d], own.var(0, correction=0))


def norm_calls() -> list[NormCall]:
    """Of batch norms, with the variance in place of its root, and of a layer norm."""
    calls = []
    for C, S in ((3, 5), (4, 2), (3, 5)):
        x, delta = torch.randn(2, N, 1, C, S)
        mean, variance = torch.randn(N, 1, C), torch.rand(N, 1, C)
        calls.append(NormCall(x, delta, mean, variance, False, 0.1))
    x, delta = torch.randn(2, N, 2, 4, 1)
    return [*calls, NormCall(x, delta, torch.randn(N, 2, 1), torch.rand(N, 2, 1), True, None)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("most", [0, 500, 1 << 20])
def test_norms_wait_for_others_until_their_maps_are_many(
    most: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    run, run_many = ops.norm_gradients, ops.foreach_norm_gradients
    monkeypatch.setattr(ops, "norm_gradients", lambda *a, **k: (ran.append(1), run(*a, **k))[1])
    monkeypatch.setattr(
        ops, "foreach_norm_gradients", lambda x, *a: (ran.append(len(x)), run_many(x, *a))[1]
    )
    monkeypatch.setattr(small, "MAPS_THERE", most)
    parts = partition(torch.arange(N) % D, torch.ones(N), D)
    waiting: Small[Any] = Small(parts, variance=True)
    calls = norm_calls()
    expected = [run(*call.maps, *call.statistics, own=call.own, eps=call.eps) for call in calls]
    arriving = [(k, bias) for k in range(len(calls)) for bias in (False, True)]
    if apart:  # all weights before all biases
        arriving.sort(key=lambda key: key[1])
    widths = [call.maps[0].shape[2] for call in calls]
    for k, bias in arriving:
        assert waiting.takes((k, bias), OfNorm(calls[k], bias, (N, widths[k])))
        assert waiting.held <= max(most, calls[k].bytes)
    found = waiting.results()
    assert ran == {0: [1, 1, 1, 1], 500: [1, 1, 1, 1], 1 << 20: [3, 1]}[most]
    for (k, bias), got in found.items():
        for one, want in zip(got, Dense(expected[k][bias]).moments(parts), strict=True):
            torch.testing.assert_close(one, want)
    assert not any(hasattr(call, "maps") for call in calls)  # nothing holds them any more


def test_autograd_records_no_views_around_the_moments_of_a_head() -> None:
    """Each is a node in both directions, and a sum with a gradient that is a view takes new
    memory."""
    head, x = nn.Linear(WIDTH, 4), torch.randn(N, WIDTH, requires_grad=True)
    losses = F.cross_entropy(head(x), torch.arange(N) % 4, reduction="none")
    moments = fastdg.domain_moments(losses, torch.arange(N) % D, params=head, create_graph=True)
    expected = {"weight": ["AccumulateGrad", "LogSoftmax"], "bias": ["LogSoftmax"]}
    for name, below in expected.items():
        node = moments.variance[name].grad_fn
        assert node is not None
        names = [n.name() for n in (node, *(f for f, _ in node.next_functions if f is not None))]
        for got, want in zip(names, ["fastdg", *below], strict=True):
            assert want in got
