"""The ops as PyTorch sees them: schemas, compilers, ``torch.func``, and the choice of a backend."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import deal
from torch import Tensor

import fastdg
from fastdg import ops
from fastdg.ops.dispatch import derivatives

# -- schemas and compilers --


def arguments(device: str, grad: bool) -> dict[str, tuple[object, ...]]:
    order, offsets = deal((4, 0, 2), device)
    a = torch.randn(6, 3, 4, device=device, requires_grad=grad)
    delta = torch.randn(6, 5, 3, device=device).transpose(1, 2).requires_grad_(grad)
    x = torch.randn(6, 2, 5, 4, device=device, requires_grad=grad)
    out = torch.randn(6, 9, 3, device=device, requires_grad=grad)
    window = [3, 2, 1, 1, 1, 1]
    flat = torch.randn(6, 9, device=device, requires_grad=grad)
    variance = [torch.rand(3, n, device=device, requires_grad=grad) for n in (2, 5)]
    ema = [torch.rand(3, n, device=device) for n in (2, 5)]
    present = torch.tensor([True, False, True], device=device)
    up, wide, patch = (torch.randn(3, *shape, device=device) for shape in ((9,), (5, 4), (3, 12)))
    scalar = torch.ones((), device=device)
    lists = [torch.randn(s, device=device, requires_grad=grad) for s in ((2, 3), (5,)) * 3]
    weights = torch.tensor([0.5, 0.0, -2.0], device=device)
    inf = float("inf")
    labels = torch.tensor([0, 1, 1, 0, 2, 1], device=device)
    tables = [torch.randn(3, *shape, device=device) for shape in ((9,), (2, 9), (2,))]
    each = torch.randn(6, device=device)
    scale = torch.randn(2, device=device)
    maps = torch.randn(6, 2, 20, device=device, requires_grad=grad)
    tokens = torch.randn(6, 3, 4, device=device).mT.requires_grad_(grad)
    planes = torch.randn(6, 2, 4, 5, device=device, requires_grad=grad)
    above = torch.randn(6, 2, 5, 4, device=device).mT
    given = torch.randn(6, 2, 2, device=device), torch.rand(6, 2, 2, device=device)
    return {
        "gram": (lists, 3),
        "combine": (lists, weights),
        "combine_rows": (variance, weights),
        "foreach_moments": (order, offsets, [flat], [a, flat], [delta, out[:, 0]], True),
        "foreach_moments, means": (order, offsets, [], [a], [delta], False),
        "agreement": (lists, weights, 0.5, inf),
        "agreement, soft": (lists, weights, 0.5, 3.0),
        "meta_step": (lists[:2], [x.detach() for x in lists[2:4]], 0.3),
        "outer_agreement": (a, delta, order, offsets, weights, 0.5, inf, []),
        "outer_agreement, window": (x, out, order, offsets, weights, 0.5, 3.0, window),
        "moments": (flat, order, offsets),
        "moments_backward": (up, up, flat, up, order, offsets),
        "outer_moments": (a, delta, order, offsets, []),
        "outer_moments, window": (x, out, order, offsets, window),
        "outer_moments_backward": (wide, wide, a, delta, wide, order, offsets, []),
        "outer_moments_backward, window": (patch, patch, x, out, patch, order, offsets, window),
        "outer_domain": (a, delta, order, offsets, []),
        "outer_domain, window": (x, out, order, offsets, window),
        "outer_norms": (a, delta, []),
        "outer_norms, window": (x, out, window),
        "outer_gram": (a, delta, order, offsets, []),
        "outer_gram, window": (x, out, order, offsets, window),
        "norm_gradients": (planes, above, *given, True),
        "norm_gradients, rows": (above.clone().requires_grad_(grad), above, *given, False),
        "norm_gradients, no mean": (planes, above, None, given[1], True),
        "norm_gradients, no norm": (planes, above, None, None, False),
        "norm_gradients_backward": (flat[:, :4], flat[:, 4:8], planes, above, *given, True),
        "norm_gradients_backward, rows": (
            *(flat[:, :4], flat[:, 4:8], above.clone(), above, *given),
            False,
        ),
        "oracle_nll": (maps, maps.detach() + 1, scale.requires_grad_(grad)),
        "oracle_nll, rows": (tokens, tokens.detach() + 1, up[0, :4]),
        "oracle_nll, no maps": (maps.detach(), maps.detach() + 1, scale),
        "oracle_nll_backward": (each, maps, maps.detach() + 1, scale, flat[:, :2]),
        "oracle_nll_backward, rows": (each, tokens, tokens.detach() + 1, up[0, :4], flat[:, :4]),
        "text_distance": (flat, labels, *tables),
        "text_distance_backward": (each, each, flat, labels, *tables),
        "variance_gap": (variance, ema, present, 2.0),
        "variance_gap, no history": (variance, [], present, 0.0),
        "variance_gap_backward": (scalar, variance, ema, present, 2.0),
    }


def differentiable(name: str) -> bool:
    once = ("moments", "norm_gradients", "oracle_nll", "outer_moments", "text_distance")
    return name.split(",")[0] in (*once, "variance_gap")


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


def domains(flat: list[Tensor], D: int) -> list[list[Tensor]]:
    P = len(flat) // D
    return [flat[d * P : (d + 1) * P] for d in range(D)]


def meta_step(parameters: list[Tensor], kept: list[Tensor], rate: float) -> list[Tensor]:
    """On copies: what it changes is part of the result."""
    parameters, kept = [p.clone() for p in parameters], [k.clone() for k in kept]
    length = ops.meta_step(parameters, kept, rate)
    return [length, *parameters, *kept]


def norm_gradients(*args: Any) -> tuple[Tensor, Tensor]:
    return ops.norm_gradients(*args[:-1], own=args[-1])


PUBLIC: dict[str, tuple[Callable[..., object], str]] = {
    "moments": (ops.moments, "moments"),
    "outer_moments": (ops.outer_moments, "outer_moments"),
    "outer_moments, window": (ops.outer_moments, "outer_moments, window"),
    "outer_domain": (ops.outer_domain, "outer_domain"),
    "outer_norms": (ops.outer_norms, "outer_norms, window"),
    "outer_gram": (ops.outer_gram, "outer_gram"),
    "norm_gradients": (norm_gradients, "norm_gradients"),
    "norm_gradients, rows": (norm_gradients, "norm_gradients, rows"),
    "oracle_nll": (ops.oracle_nll, "oracle_nll"),
    "oracle_nll, rows": (ops.oracle_nll, "oracle_nll, rows"),
    "text_distance": (ops.text_distance, "text_distance"),
    "variance_gap": (ops.variance_gap, "variance_gap"),
    "gram": (lambda flat, D: ops.gram(domains(flat, D)), "gram"),
    "combine": (lambda flat, w: ops.combine(domains(flat, 3), w), "combine"),
    "combine_rows": (ops.combine_rows, "combine_rows"),
    "foreach_moments": (
        lambda order, offsets, grads, a, delta, variance: ops.foreach_moments(
            grads, a, delta, order, offsets, variance
        ),
        "foreach_moments",
    ),
    "agreement": (lambda flat, *args: ops.agreement(domains(flat, 3), *args), "agreement"),
    "agreement, soft": (
        lambda flat, *args: ops.agreement(domains(flat, 3), *args),
        "agreement, soft",
    ),
    "meta_step": (meta_step, "meta_step"),
    "outer_agreement": (ops.outer_agreement, "outer_agreement"),
    "outer_agreement, window": (ops.outer_agreement, "outer_agreement, window"),
}


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
    for dtype in (torch.bfloat16, torch.float64):
        grads = torch.randn(6, 5, device=device).to(dtype)
        mean, _ = ops.moments(grads, order, offsets)
        assert mean.dtype == dtype


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tritom", ValueError, "expected one of .*'triton'.*, got 'tritom'"),
        ("cuda", RuntimeError, "FASTDG_BACKEND=cuda: not available here: .*(not compiled|no CUDA)"),
    ],
)
def test_a_forced_backend_that_is_not_here_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], message: str
) -> None:
    if name == "cuda" and fastdg.backends()["cuda"][0]:
        pytest.skip("it is here")
    monkeypatch.setenv("FASTDG_BACKEND", name)
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
