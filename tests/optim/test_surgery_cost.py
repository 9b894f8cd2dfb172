"""What a step of gradient surgery asks of the machine, counted: tensors alive and calls."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdg
from fastdg import ops
from fastdg.core.combine import gathering
from fastdg.gradients import engine

N, D, DEPTH, WIDTH = 24, 3, 12, 256


class Watch(TorchDispatchMode):
    """Counts calls, and the most bytes alive at one time of storages made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.alive: set[int] = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        there = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in there:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.bytes -= size


WRAPPERS: dict[str, Callable[..., Any]] = {
    "PCGrad": fastdg.PCGrad,
    "AgrSum": fastdg.AgrSum,
    "ANDMask": fastdg.ANDMask,
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_small_parameters_take_one_call(
    wrapper: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call on rows wakes torch's threads, however little there is to do."""
    calls, run = [], ops.outer_domain

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return run(*args)

    monkeypatch.setattr(ops, "outer_domain", counted)
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh()) for _ in range(DEPTH)]
    model = nn.Sequential(*layers, nn.Linear(8, 3))
    opt = wrapper(torch.optim.SGD(model.parameters(), lr=0.1), num_domains=D)
    domains = torch.arange(N) % D
    for _ in range(3):  # the third step does not look at the graph again
        losses = F.cross_entropy(model(torch.randn(N, 8)), domains, reduction="none")
        calls.clear()
        with Watch() as watch:
            opt.backward(losses, domains)
        opt.step()
        opt.zero_grad()
    assert len(calls) <= DEPTH + 1 + 1  # a weight of a layer each, and the small ones
    assert watch.calls["aten::index_add"] <= 1, watch.calls  # of the losses: it takes several


@pytest.mark.parametrize(("most", "launches"), [(0, 5), (2 * D * 300 * 300, 2), (1 << 25, 1)])
def test_gradients_that_wait_for_one_launch_as_on_a_gpu(
    most: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four weights wait until their entries are too many; the small ones come last."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(300, 300), nn.Tanh()) for _ in range(4)))
    opt = fastdg.AgrSum(torch.optim.SGD(model.parameters(), lr=0.1), num_domains=D)
    x, domains = torch.randn(N, 300), torch.arange(N) % D
    runs, run = [], ops.agreement

    def step() -> list[Tensor | None]:
        opt.zero_grad()
        opt.backward(model(x).square().mean(1), domains)
        return [p.grad for p in model.parameters()]

    def counted(*args: Any) -> Any:
        runs.append(args)
        return run(*args)

    expected = step()
    opt._one_domain.told = True  # it would ask the device for an event
    monkeypatch.setattr(Tensor, "is_cpu", False)
    monkeypatch.setattr(gathering, "ROWS_THERE", most)
    monkeypatch.setattr(ops, "agreement", counted)
    torch.testing.assert_close(step(), expected)
    assert len(runs) == launches


def test_a_look_at_the_graph_holds_few_gradients() -> None:
    """Not those of all layers at a time, of which the profiles alone are wanted."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)]
    model = nn.Sequential(*layers)
    losses = model(torch.randn(4 * N, 8, WIDTH)).square().mean((1, 2))
    one = 4 * N * 8 * WIDTH * 4
    engine._plans.clear()
    with Watch() as watch:
        engine.plan_gradients(losses, dict(model.named_parameters()))
    assert watch.peak <= 5 * one, watch.peak / one
    assert sum(p.numel() for p in model.parameters()) * 4 < DEPTH * one  # there are many of them
