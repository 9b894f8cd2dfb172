"""What autograd's own threads see: the nodes of an accelerator, and their hooks, run there."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
import torch
from bases import batch
from scalers import WRAPPERS, flat, start
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdg
from fastdg.carried import Carried, continued
from fastdg.ops.dispatch.registry import OPS, forced_backend

needs_cpp = pytest.mark.skipif(
    not fastdg.backends()["cpp"][0], reason="there is one backend without the compiled ops"
)


def in_a_hook(see: Any) -> Any:
    """What ``see`` returns in a hook of a backward."""
    found = []
    x = torch.ones(2, requires_grad=True)
    y = (2 * x).sum()
    y.grad_fn.register_prehook(lambda grads: found.append((threading.get_ident(), see())))
    y.backward()
    ((thread, value),) = found
    return thread, value


def test_a_carried_variable_is_seen_there(engine_thread: None) -> None:
    variable = Carried("tested", 0)
    plain = contextvars.ContextVar("plain", default=0)
    plain.set(5)
    for value in (0, 5, 7):
        if value:
            variable.set(value)
        thread, (carried, lost) = in_a_hook(lambda: (variable.get(), plain.get()))
        assert thread != threading.get_ident()
        assert carried == value
        assert lost == 0  # the engine's threads have a context of their own


def test_one_set_there_is_that_thread_s_own(engine_thread: None) -> None:
    variable = Carried("tested", 0)
    variable.set(1)

    def change() -> tuple[int, int]:
        token = variable.set(2)
        inside = variable.get()
        variable.reset(token)
        return inside, variable.get()

    assert in_a_hook(change)[1] == (2, 1)
    assert variable.get() == 1


def test_a_backward_in_a_hook_there(engine_thread: None) -> None:
    """It is called by the hook, in whose thread nothing is set."""
    variable = Carried("tested", 0)
    variable.set(3)

    def look() -> tuple[int, int, int]:
        before = variable.get()
        with torch.enable_grad():
            _, inside = in_a_hook(variable.get)
        return before, inside, variable.get()

    assert in_a_hook(continued(look))[1] == (3, 3, 3)


def test_a_block_holds_there(engine_thread: None) -> None:
    assert in_a_hook(forced_backend)[1] is None
    with fastdg.use_backend("reference"):
        assert in_a_hook(forced_backend)[1] == "reference"
    assert in_a_hook(forced_backend)[1] is None


@needs_cpp
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_op_of_a_step_runs_on_the_backend_chosen(
    monkeypatch: pytest.MonkeyPatch, engine_thread: None, name: str
) -> None:
    ran: list[str] = []

    def refuse(op: str) -> Any:
        def run(*args: Any) -> Any:
            ran.append(op)
            raise AssertionError(f"{op} ran on cpp")

        return run

    model, opt = start(WRAPPERS[name])
    for op in OPS.values():
        if "cpp" in op.backends:
            _, supports = op.backends["cpp"]
            monkeypatch.setitem(op.backends, "cpp", (refuse(op.name), supports))
            monkeypatch.setattr(op, "direct", refuse(op.name))
    with fastdg.use_backend("reference"):
        for seed in range(4):
            opt.zero_grad()
            opt.backward(*batch(model, seed))
            opt.step()
    assert not ran


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_step_there_is_a_step_here(name: str, request: pytest.FixtureRequest) -> None:
    found = []
    for there in (False, True):
        if there:
            request.getfixturevalue("engine_thread")
        model, opt = start(WRAPPERS[name])
        for seed in range(4):
            opt.zero_grad()
            opt.backward(*batch(model, seed))
            opt.step()
        found.append(flat(model.parameters()))
    if name in ("IRM", "IBIRM"):
        # Three gradients meet at its logits, and which two the engine adds up first depends on the
        # numbers that nodes get in the thread that makes them
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(*found)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_recomputation_there_is_no_forward_of_the_user_s(request: pytest.FixtureRequest) -> None:
    found = []
    for there in (False, True):
        if there:
            request.getfixturevalue("engine_thread")
        torch.manual_seed(0)
        model = Checkpointed()
        opt = fastdg.AgrSum(torch.optim.SGD(model.parameters(), lr=0.1))
        for seed in range(3):
            opt.zero_grad()
            opt.backward(*batch(model, seed))
            opt.step()
        found.append(flat(model.parameters()))
    assert torch.equal(*found)
