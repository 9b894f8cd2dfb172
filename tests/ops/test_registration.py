"""The ops as PyTorch sees them: schemas, compilers, ``torch.func``, and the choice of a backend."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import PUBLIC, arguments, cast, differentiable
from op_cases import deal
from torch import Tensor

import fastdg
import fastdg.kernels
from fastdg import ops
from fastdg.ops.dispatch import derivatives, registry

KERNELS = [path for folder in fastdg.kernels.__path__ for path in Path(folder).glob("[a-z]*.py")]

# -- schemas and compilers --


@pytest.mark.product("name", "device")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", arguments("cpu", False))
def test_registration(device: str, name: str, grad: bool) -> None:
    """``opcheck`` with all its utilities; the last runs the backward where there is one."""
    op = getattr(torch.ops.fastdg, name.split(",")[0]).default
    args = arguments(device, grad and differentiable(name))[name]
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}
    if grad and not differentiable(name):
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        result = torch.library.opcheck(op, arguments(device, True)[name], test_utils=utilities)
        assert set(result.values()) == {"SUCCESS"}


def test_every_op_is_covered() -> None:
    tested = {name.split(",")[0] for name in arguments("cpu", False)}
    assert tested == set(ops.dispatch.registry.OPS)


@pytest.mark.product
@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_whole(device: str, name: str) -> None:
    function, key = PUBLIC[name]
    args = arguments(device, differentiable(name))[key]

    def value(run: Callable[..., object]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        out = run(*args)
        outs = torch.utils._pytree.tree_leaves(out)
        if not differentiable(name):
            return outs, ()
        leaves = [
            x
            for arg in args
            for x in (arg if isinstance(arg, list) else [arg])
            if isinstance(x, Tensor) and x.requires_grad
        ]
        loss = sum(o.square().sum() for o in outs)
        return outs, torch.autograd.grad(loss, leaves)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value(compiled), value(function))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch in itself
def test_compiles_with_inductor() -> None:
    order, offsets = deal((4, 0, 2))
    a, delta = torch.randn(6, 3, 4), torch.randn(6, 3, 5, requires_grad=True)

    def spread(a: Tensor, delta: Tensor) -> Tensor:
        variance = ops.outer_moments(a * 2, delta, order, offsets)[1]
        return ops.variance_gap([variance], [], torch.ones(3).bool(), 0.0) + variance.sum()

    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(spread, fullgraph=True)(a, delta), delta)
    torch.testing.assert_close(got, torch.autograd.grad(spread(a, delta), delta))


# -- torch.func --


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch in itself
def test_transforms_go_through(device: str) -> None:
    order, offsets = deal((4, 0, 2), device)
    a, delta = torch.randn(6, 3, 4, device=device), torch.randn(6, 3, 5, device=device)
    grads, present = torch.randn(6, 9, device=device), torch.ones(3, device=device).bool()
    functions: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "moments": (lambda g: ops.moments(g, order, offsets)[1].sum(), grads),
        "a": (lambda a: ops.outer_moments(a, delta, order, offsets)[1].sum(), a),
        "delta": (lambda d: ops.outer_moments(a, d, order, offsets)[0].square().sum(), delta),
        "gap": (
            lambda g: ops.variance_gap([g[:3], g[3:].square()], [g[:3], g[:3]], present, 2.0),
            grads,
        ),
    }
    for name, (function, x) in functions.items():
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(function)(x), expected, msg=name)
        several = torch.stack([x, 2 * x, x + 1])
        got = torch.func.vmap(torch.func.grad(function))(several)
        for row, one in zip(several, got, strict=True):
            torch.testing.assert_close(one, torch.func.grad(function)(row), msg=name)
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(function, (x,), (x,))

    batch = torch.stack([a, -a, a * a])
    for function in (
        lambda a: ops.outer_domain(a, delta, order, offsets),
        lambda a: ops.outer_gram(a, delta, order, offsets),
        lambda a: ops.outer_norms(a, delta),
        lambda a: ops.outer_moments(a, delta, order, offsets)[1],
    ):
        expected = torch.stack([function(one) for one in batch])
        torch.testing.assert_close(torch.func.vmap(function)(batch), expected)


def test_transforms_over_the_domains(device: str) -> None:
    """Many ways to deal the same samples, as for a permutation test."""
    grads = torch.randn(6, 9, device=device)
    orders = torch.stack([torch.randperm(6) for _ in range(4)]).to(device)
    offsets = torch.tensor([0, 2, 6], device=device)
    got = torch.func.vmap(lambda order: ops.moments(grads, order, offsets)[1])(orders)
    for order, one in zip(orders, got, strict=True):
        torch.testing.assert_close(one, ops.moments(grads, order, offsets)[1])


# -- choosing a backend --


def test_backends_name_themselves() -> None:
    status = fastdg.backends()
    assert set(status) == {"reference", "cpp", "triton", "cuda"}
    for name, (available, why) in status.items():
        assert why, name
        if not available:
            with pytest.raises(RuntimeError, match=f"backend '{name}' is not available"):
                fastdg.use_backend(name).__enter__()


def test_use_backend_ends_with_its_block() -> None:
    route = ops.dispatch.registry.OPS["moments"].route
    args = arguments("cpu", False)["moments"]
    before = route(*args)
    with fastdg.use_backend("reference"):
        assert route(*args) is ops.dispatch.registry.OPS["moments"].reference
    with pytest.raises(KeyError), fastdg.use_backend("reference"):
        raise KeyError
    assert route(*args) is before


def test_a_backward_runs_on_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """On whichever thread: autograd has one of its own for each accelerator."""
    op, seen = ops.dispatch.registry.OPS["moments_backward"], []
    reference = op.reference
    monkeypatch.setattr(op, "reference", lambda *args: (seen.append(args), reference(*args))[1])
    grads, order, offsets = arguments("cpu", True)["moments"]
    expected = torch.autograd.grad(ops.moments(grads, order, offsets)[1].sum(), grads)[0]
    seen.clear()
    with fastdg.use_backend("reference"):
        loss = ops.moments(grads, order, offsets)[1].sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert len(seen) == 1
    torch.testing.assert_close(grads.grad, expected)


def test_what_a_backend_does_not_take_goes_to_the_reference(device: str) -> None:
    order, offsets = deal((4, 2), device)
    mean, _ = ops.moments(torch.randn(6, 5, device=device).double(), order, offsets)
    assert mean.dtype == torch.float64
    (mean,) = ops.combine_rows([torch.randn(2, 5, device=device).bfloat16()], torch.ones(2))
    assert mean.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tritom", ValueError, "^FASTDG_BACKEND: .*got 'tritom'"),
        ("cuda", RuntimeError, "^FASTDG_BACKEND=cuda: "),
    ],
)
def test_a_forced_backend_that_is_not_here_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], message: str
) -> None:
    if name == "cuda" and fastdg.backends()["cuda"][0]:
        pytest.skip("it is here")
    monkeypatch.setattr(registry, "from_environment", lambda: name)
    with pytest.raises(error, match=message):
        ops.moments(torch.randn(4, 3), torch.arange(4), torch.tensor([0, 4]))


@pytest.mark.parametrize(
    "name", ["moments", "outer_moments", "variance_gap", "oracle_nll", "norm_gradients"]
)
@pytest.mark.parametrize("drop_lists", [False, True])
def test_eager_calls_record_what_the_dispatcher_records(name: str, drop_lists: bool) -> None:
    """They go around it: same values, same gradients, a node of the same name."""
    found = []
    for way in (derivatives.call, lambda name, *args: getattr(torch.ops.fastdg, name)(*args)):
        torch.manual_seed(0)
        args = [*arguments("cpu", True)[name]]
        if drop_lists and name == "variance_gap":
            args[1] = []
        out = way(name, *args)
        first = out if isinstance(out, Tensor) else out[0]
        leaves = [
            x
            for arg in args
            for x in (arg if isinstance(arg, (list, tuple)) else [arg])
            if isinstance(x, Tensor) and x.requires_grad
        ]
        grads = torch.autograd.grad(first.square().sum(), leaves, allow_unused=True)
        found.append((first.grad_fn.name(), first.detach(), grads))
    (eager, one, grads), (dispatched, two, others) = found
    assert eager == dispatched
    torch.testing.assert_close((one, grads), (two, others), rtol=0, atol=0)


@pytest.mark.skipif(not fastdg.backends()["cpp"][0], reason="no compiled ops")
def test_the_extension_has_no_schemas_of_its_own() -> None:
    for name in ops.dispatch.registry.OPS:
        own = getattr(torch.ops.fastdg_cpp, name).default._schema
        schema = getattr(torch.ops.fastdg, name).default._schema
        assert str(own) == str(schema).replace("fastdg::", "fastdg_cpp::", 1)
    sources = [path.read_text() for path in Path(__file__).parents[2].glob("csrc/*")]
    assert len(re.findall(r"m\.def\(", "".join(sources))) == 1  # set_instruction_set, no op


def test_kernels_are_found_by_name_and_say_what_they_take() -> None:
    pytest.importorskip("triton")
    device, OPS = "cuda" if torch.cuda.is_available() else "cpu", ops.dispatch.registry.OPS
    found = {name: supports for name, _, supports in fastdg.kernels.implementations(OPS)}
    assert {path.stem for path in KERNELS} - {"launch", "tiles"} < set(found)
    assert "moments_backward" in found
    every = arguments(device, False)
    assert set(found) <= set(every)
    for case, args in every.items():
        if (name := case.partition(",")[0]) not in found:
            continue
        for dtype in (torch.float32, torch.float16, torch.float64):
            reason = found[name](*cast(args, dtype))
            if device == "cpu":
                assert reason is not None and "CUDA device, not on cpu" in reason
            elif dtype is torch.float64:
                assert reason is not None and "not torch.float64" in reason
            else:
                assert reason is None


@pytest.mark.skipif(not fastdg.backends()["cpp"][0], reason="no compiled ops")
def test_the_log_says_why_a_call_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    registry._logged.clear()
    order, offsets = deal((4, 2))
    with caplog.at_level(logging.INFO, "fastdg.ops"):
        ops.moments(torch.randn(6, 5).double(), order, offsets)
        assert not caplog.records
    with caplog.at_level(logging.DEBUG, "fastdg.ops"):
        for dtype in (torch.float64, torch.float64, torch.float32):
            ops.moments(torch.randn(6, 5, dtype=dtype), order, offsets)
        registry.OPS["combine"].route([torch.ones(2)], torch.ones(1).double())
    assert [record.getMessage() for record in caplog.records] == [
        "fastdg::moments: cpp does not serve this call: it takes torch.float32 on cpu, not "
        "torch.float64 on cpu",
        "fastdg::combine: cpp does not serve this call: it takes torch.float32 alone, not "
        "torch.float64",
    ]


def test_what_the_checks_refuse_is_said_once() -> None:
    order, offsets = deal((2, 1))
    with fastdg.use_backend("reference"), pytest.raises(ValueError, match=r"^delta: ") as caught:
        ops.outer_domain(torch.ones(3, 1, 2), torch.ones(3, 2, 2), order, offsets)
    assert caught.value.__context__ is None
