"""``oracle_nll`` on every backend that is here, against the formula, element by element."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from op_cases import assert_close
from torch import Tensor

import fastdg
from fastdg import native, ops


def naive(features: Tensor, oracle: Tensor, bias: Tensor) -> Tensor:
    """Of ``[N, C, *]`` maps, in float64."""
    variance = bias.exp().log1p() + 1e-5
    variance = variance.view(1, -1, *[1] * (features.dim() - 2))
    nll = 0.5 * ((features - oracle) ** 2 / variance + variance.log())
    return nll.flatten(1).mean(1)


SHAPES = [
    (6, 3, 4, 5),
    (1, 1, 1, 1),
    (2, 5),
    (3, 70, 33),
    (2, 130, 9, 17),
    (3, 1030, 3, 2),
    (2, 3, 2, 3, 4),
]
Lay = Callable[[Tensor], tuple[Tensor, int, int]]
LAYOUTS: dict[str, Lay] = {
    "NC": lambda x: (x.contiguous(), 0, 1),
    "channels last": lambda x: (x.movedim(1, -1).contiguous().movedim(-1, 1), 0, 1),
    "NLC": lambda x: (x.movedim(1, -1).contiguous(), 0, -1),
    "LNC": lambda x: (x.flatten(2).permute(2, 0, 1).contiguous() if x.dim() > 2 else x, 1, -1),
    "sliced": lambda x: (torch.cat([x, x], -1)[..., x.shape[-1] :], 0, 1),
    "strided": lambda x: (x.repeat_interleave(2, -1)[..., ::2], 0, 1),
}


def laid_out(x: Tensor, layout: str) -> tuple[Tensor, int, int]:
    x, sample, channel = LAYOUTS[layout](x)
    return (x, 0, 1) if x.dim() == 2 else (x, sample, channel)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(device: str, shape: tuple[int, ...], layout: str) -> None:
    for dtype, other in itertools.product((torch.float32, torch.float64), (layout, "NC")):
        exact = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
        exact[0] += 0.3
        bias, up = torch.randn(shape[1]).double(), torch.randn(shape[0]).double()
        leaves = [exact[0].requires_grad_(), bias.clone().requires_grad_()]
        expected = naive(leaves[0], exact[1], leaves[1])
        wanted = torch.autograd.grad(expected, leaves, up)

        x, sample, channel = laid_out(exact[0].detach().to(device, dtype), layout)
        y, _, _ = laid_out(exact[1].to(device, dtype), layout)
        if other == "NC":  # the oracle's lies otherwise
            y = y.contiguous()
        mine = [x.requires_grad_(), bias.to(device, dtype).requires_grad_()]
        values = ops.oracle_nll(mine[0], y, mine[1], sample=sample, channel=channel)
        got = torch.autograd.grad(values, mine, up.to(device, dtype))
        assert values.dtype == dtype
        assert_close(values, expected.detach())
        assert_close(got[0], laid_out(wanted[0], layout)[0])
        assert_close(got[1], wanted[1])
        if layout in ("NC", "channels last"):
            assert got[0].stride() == x.stride() or x.shape[1] == 1 or x[0, 0].numel() == 1


def test_derivatives_in_double() -> None:
    with fastdg.use_backend("reference"):
        features = torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True)
        oracle = torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(ops.oracle_nll, (features, oracle, bias))
        tokens = features.detach().permute(2, 3, 0, 1).requires_grad_()
        there = oracle.detach().permute(2, 3, 0, 1)
        assert torch.autograd.gradcheck(
            lambda x, b: ops.oracle_nll(x, there, b, sample=2, channel=3), (tokens, bias)
        )


def test_one_derivative_alone(device: str) -> None:
    x, y = torch.randn(2, 3, 4, 5, device=device).unbind()
    b = torch.randn(4, device=device)
    both = [x.clone().requires_grad_(), b.clone().requires_grad_()]
    expected = torch.autograd.grad(ops.oracle_nll(both[0], y, both[1]).sum(), both)
    for i, args in enumerate([(both[0], b), (x, both[1])]):
        values = ops.oracle_nll(args[0], y, args[1])
        (got,) = torch.autograd.grad(values.sum(), both[i])
        torch.testing.assert_close(got, expected[i])


def test_for_the_bias_alone_no_map_is_kept(device: str) -> None:
    x, y = torch.randn(2, 3, 4, 5, device=device).unbind()
    bias = torch.zeros(4, device=device, requires_grad=True)
    seen: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    for needed in (False, True):
        seen.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            ops.oracle_nll(x.requires_grad_(needed), y, bias)
        assert (sum(t.numel() == x.numel() for t in seen) == 2) == needed
        assert all(t.numel() in (x.numel(), 4, 3 * 4) for t in seen)


def test_only_once(device: str) -> None:
    x, y = torch.randn(2, 3, 4, 5, device=device).unbind()
    bias = torch.zeros(4, device=device)
    x.requires_grad_()
    (first,) = torch.autograd.grad(ops.oracle_nll(x, y, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^fastdg::oracle_nll_backward "):
        first.sum().backward()


def test_features_that_coincide(device: str) -> None:
    x, bias = torch.randn(3, 4, 5, device=device), torch.full((4,), -60.0, device=device)
    values = ops.oracle_nll(x, x, bias.requires_grad_())
    assert_close(values, torch.full((3,), 0.5 * math.log(1e-5)).double())
    (slope,) = torch.autograd.grad(values.sum(), bias)
    assert slope.isfinite().all()
    big = ops.oracle_nll(x, -x, torch.full((4,), 60.0, device=device))
    assert_close(big, naive(x.double().cpu(), -x.double().cpu(), torch.full((4,), 60.0).double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_through(device: str, value: float) -> None:
    for layout in ("NC", "channels last"):
        x, y = torch.randn(2, 3, 4, 5, 7, device=device).unbind()
        x[1, 2, 3, 4] = value
        x = laid_out(x, layout)[0].requires_grad_()
        values = ops.oracle_nll(x, y, torch.zeros(4, device=device))
        assert values.isfinite().tolist() == [True, False, True]
        (grad,) = torch.autograd.grad(values[[0, 2]].sum() + values[1], x)
        assert grad.isfinite().logical_not().sum() == 1


def test_half_precision(device: str) -> None:
    x, y = torch.randn(2, 3, 4, 500, device=device).unbind()
    bias = torch.randn(4, device=device)
    expected = ops.oracle_nll(x, y, bias)
    for one, two in ((x, y.bfloat16()), (x.bfloat16(), y.bfloat16()), (x.bfloat16(), y)):
        one.requires_grad_()
        values = ops.oracle_nll(one, two, bias)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected, rtol=1e-2, atol=1e-2)
        assert torch.autograd.grad(values.sum(), one)[0].dtype == one.dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ((2, 3, 4), (2, 3, 5), (3,), {}),
            "^oracle: ",
        ),
        (
            ((2, 3, 4), (2, 3, 4), (4,), {}),
            "^bias: ",
        ),
        (((2,), (2,), (2,), {}), "^features: "),
        (((2, 3), (2, 3), (3,), {"channel": 0}), "^features: .*sample=0, channel=0"),
    ],
)
def test_arguments(arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    *shapes, more = arguments
    with pytest.raises(ValueError, match=message):
        ops.oracle_nll(*(torch.zeros(shape) for shape in shapes), **more)
    with pytest.raises(ValueError, match=r"^oracle: .*got one on meta"):
        ops.oracle_nll(torch.ones(2, 3), torch.ones(2, 3, device="meta"), torch.ones(3))


@pytest.mark.skipif(not native.status()[0], reason="no compiled ops")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    cpp = torch.ops.fastdg_cpp
    try:
        before = cpp.set_instruction_set(isa)
    except RuntimeError:
        pytest.skip(f"this machine or this build has no {isa}")
    try:
        for shape, rows in itertools.product([(3, 5, 7), (2, 1100, 300), (2, 33, 129)], (0, 1)):
            x, y = torch.randn(2, *shape).unbind()
            if rows:
                x, y = x.mT.contiguous().mT, y.mT.contiguous().mT
            bias, up = torch.randn(shape[1]), torch.randn(shape[0])
            values, squares = cpp.oracle_nll(x, y, bias)
            assert_close(values, naive(x.double(), y.double(), bias.double()))
            assert_close(squares, (x.double() - y.double()).square().sum(2))
            got = cpp.oracle_nll_backward(up, x, y, bias, squares)
            leaves = [x.double().requires_grad_(), bias.double().requires_grad_()]
            exact = naive(leaves[0], y.double(), leaves[1])
            for one, two in zip(got, torch.autograd.grad(exact, leaves, up.double()), strict=True):
                assert_close(one, two)
            assert got[0].stride() == x.stride()
    finally:
        cpp.set_instruction_set(before)


@pytest.mark.parametrize("asked", range(3), ids=["features", "oracle", "bias"])
def test_one_gradient_inside_of_a_transform(asked: int) -> None:
    """As outside of it: which arguments want a gradient is told by their places."""
    given = [torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(4)]
    x = given[asked].clone().requires_grad_()

    def total(x: Tensor) -> Tensor:
        return ops.oracle_nll(*given[:asked], x, *given[asked + 1 :]).sum()

    (expected,) = torch.autograd.grad(total(x), x)
    assert float(expected.norm()) > 0.1
    torch.testing.assert_close(torch.func.grad(total)(given[asked]), expected)
