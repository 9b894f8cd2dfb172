"""``norm_gradients`` on every backend that is here, against autograd through the norm itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from op_cases import assert_close
from torch import Tensor

import fastdg
from fastdg import native, ops

EPS = 0.3  # so large that what is constant amplifies no rounding
# N, T, C, S and the groups
SHAPES = [
    (5, 1, 6, 7, 3),
    (3, 4, 6, 1, 1),
    (1, 1, 1, 1, 1),
    (2, 3, 70, 1, 1),
    (3, 1, 40, 300, 8),
    (2, 2, 33, 5, 33),
    (2, 2, 33, 5, 1),
    (3, 2, 65, 1, 13),
    (0, 2, 4, 3, 2),
    (3, 0, 4, 3, 2),
    (3, 2, 4, 0, 2),
]
KINDS = ["norm", "rms", "fixed", "product"]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "channels last": lambda x: x.mT.contiguous().mT,
    "rows first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "samples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    "expanded": lambda x: x[..., :1].expand_as(x),
}
Problem = tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]


def statistics(x: Tensor, groups: int, kind: str) -> tuple[Tensor | None, Tensor | None]:
    """Of x itself, with its graph; those of another tensor for a norm of fixed statistics."""
    if kind == "product":
        return None, None
    if kind == "fixed":
        x = x.detach() * 2 + 1
    each = x.unflatten(2, (groups, x.shape[2] // groups))
    mean = None if kind == "rms" else each.mean((3, 4))
    centred = each if mean is None else each - mean[..., None, None]
    return mean, (centred.square().mean((3, 4)) + EPS).rsqrt()


def naive(x: Tensor, delta: Tensor, groups: int, kind: str) -> tuple[Tensor, Tensor]:
    """From the definition, element by element of the input's groups."""
    return (of_norm(x, groups, kind) * delta).sum((1, 3)), delta.sum((1, 3))


def of_norm(x: Tensor, groups: int, kind: str) -> Tensor:
    mean, rstd = statistics(x, groups, kind)
    each = x.unflatten(2, (groups, x.shape[2] // groups))
    if mean is not None:
        each = each - mean[..., None, None]
    if rstd is not None:
        each = each * rstd[..., None, None]
    return each.flatten(2, 3)


def problem(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> tuple[Problem, int]:
    *sizes, groups = shape
    x, delta = torch.randn(sizes).to(dtype) + 0.4, torch.randn(sizes).to(dtype) - 0.1
    mean, rstd = statistics(x, groups, kind)
    return (x, delta, mean, rstd, kind in ("norm", "rms")), groups


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(device: str, shape: tuple[int, ...], kind: str) -> None:
    for layout, dtype in [(key, torch.float32) for key in LAYOUTS] + [("plain", torch.float64)]:
        for other in (layout, "plain"):
            (x, delta, *_, own), groups = problem(shape, kind, torch.float64)
            x, delta = LAYOUTS[layout](x.to(dtype)), LAYOUTS[other](delta.to(dtype))
            exact = [x.detach().double().requires_grad_(), delta.double().requires_grad_()]
            wanted = naive(*exact, groups, kind)
            up = torch.randn(2, *wanted[0].shape, dtype=torch.float64)
            slopes = torch.autograd.grad(wanted, exact, list(up))

            inputs = [t.to(device).requires_grad_() for t in (x, delta)]
            given = [
                None if s is None else s.to(device) for s in statistics(x.double(), groups, kind)
            ]
            given = [None if s is None else s.to(dtype) for s in given]
            if kind == "fixed":  # as running statistics come, without memory of their own
                given = [s[:1, :1].expand_as(s) if s.numel() else s for s in given]
                wanted, slopes = fixed(exact, given, up)
            ways = [(given, None)]
            if kind == "fixed":
                ways.append(([given[0], given[1].pow(-2) - 0.01], 0.01))
            for arguments, eps in ways:
                got = ops.norm_gradients(*inputs, *arguments, own=own, eps=eps)
                for one, two in zip(got, (w.detach() for w in wanted), strict=True):
                    assert one.dtype == dtype
                    assert_close(one, two, 1 + float(two.norm()))
                grads = torch.autograd.grad(got, inputs, list(up.to(device, dtype)))
                for one, two in zip(grads, slopes, strict=True):
                    assert_close(one, two, 1 + float(two.norm()))


def fixed(
    exact: list[Tensor], given: list[Tensor], up: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    mean, rstd = (s.detach().double().cpu() for s in given)
    groups, channels = mean.shape[2], exact[0].shape[2]
    mean, rstd = (s.repeat_interleave(channels // groups, 2).unsqueeze(3) for s in (mean, rstd))
    values = [((exact[0] - mean) * rstd * exact[1]).sum((1, 3)), exact[1].sum((1, 3))]
    return values, list(torch.autograd.grad(values, exact, list(up)))


def derivative(
    x: Tensor, delta: Tensor, gain: Tensor | None, up: Tensor, rows: Tensor, groups: int, kind: str
) -> list[Tensor]:
    """By autograd through the norm's own backward."""
    x, delta = (t.detach().double().cpu().requires_grad_() for t in (x, delta))
    each = torch.ones(x.shape[0], 1, x.shape[2], 1) if gain is None else gain.double().view(-1, 1)
    each = each.expand(x.shape[0], 1, x.shape[2], 1).double().requires_grad_()
    out = of_norm(x, groups, kind) * delta * each
    (of_input,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    found = (of_input * up.double()).sum()
    for out, slope in zip(naive(x, delta, groups, kind), rows.double(), strict=True):
        found = found + (out * slope).sum()
    of_x, of_delta, of_gain = torch.autograd.grad(found, (x, delta, each), allow_unused=True)
    of_x = torch.zeros_like(x) if of_x is None else of_x
    of_gain = torch.zeros_like(each) if of_gain is None else of_gain
    return [of_x, of_delta, of_gain.sum((1, 3))]


@pytest.mark.parametrize("kind", ["norm", "rms", "product"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_derivative_of_the_input_gradient(
    device: str, shape: tuple[int, ...], kind: str
) -> None:
    for layout, dtype in [(key, torch.float32) for key in LAYOUTS] + [("plain", torch.float64)]:
        (x, delta, *_, own), groups = problem(shape, kind, dtype)
        up, rows = torch.randn(x.shape, dtype=dtype), torch.randn(2, *x.shape[::2][:2], dtype=dtype)
        x, up = LAYOUTS[layout](x), LAYOUTS[layout](up)
        given = [None if s is None else s.to(dtype) for s in statistics(x.double(), groups, kind)]
        for gain in (None, torch.rand(x.shape[2], dtype=dtype) + 0.5):
            args = (*rows, x, delta, *given, own, None, gain, up)
            args = tuple(t.to(device) if isinstance(t, Tensor) else t for t in args)
            got = torch.ops.fastdg.norm_gradients_backward(*args)
            want = derivative(x, delta, gain, up, rows, groups, kind)
            for one, two in zip(got, want, strict=True):
                assert one.dtype == dtype
                assert_close(one, two, 1 + float(two.norm()))


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_in_double(kind: str) -> None:
    (x, delta, mean, rstd, own), groups = problem((2, 2, 4, 3, 2), kind, torch.float64)
    inputs = x.requires_grad_(), delta.requires_grad_()

    def run(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        given = statistics(x, groups, kind) if own else (mean, rstd)
        constants = [s if s is None else s.detach() for s in given]
        return ops.norm_gradients(x, delta, *constants, own=own)

    with fastdg.use_backend("reference"):
        assert torch.autograd.gradcheck(run, inputs)


def test_an_input_far_from_zero(device: str) -> None:
    """Sums of products would cancel."""
    for layout in ("plain", "channels last"):
        x, delta = torch.randn(3, 1, 8, 500) + 1000, torch.randn(3, 1, 8, 500)
        given = [s.float().to(device) for s in statistics(x.double(), 2, "norm")]
        x, delta = LAYOUTS[layout](x), LAYOUTS[layout](delta)
        weight, _ = ops.norm_gradients(x.to(device), delta.to(device), *given, own=True)
        mean, rstd = (s.double().cpu().repeat_interleave(4, 2).unsqueeze(3) for s in given)
        assert_close(weight, ((x.double() - mean) * rstd * delta.double()).sum((1, 3)))


@pytest.mark.parametrize("layout", ["plain", "channels last"])
def test_results_lie_as_the_input_does(device: str, layout: str) -> None:
    (x, delta, mean, rstd, own), _ = problem((3, 1, 6, 5, 2), "norm", torch.float32)
    x, delta = LAYOUTS[layout](x).to(device), LAYOUTS[layout](delta).to(device)
    x.requires_grad_()
    given = mean.to(device), rstd.to(device)
    weight, bias = ops.norm_gradients(x, delta, *given, own=own)
    (grad,) = torch.autograd.grad((weight * bias).sum(), x)
    assert grad.stride() == x.stride()


def test_only_once(device: str) -> None:
    (x, delta, mean, rstd, own), _ = problem((3, 1, 6, 5, 2), "norm", torch.float32)
    x, delta, mean, rstd = (t.to(device) for t in (x, delta, mean, rstd))
    weight, _ = ops.norm_gradients(x, delta.requires_grad_(), mean, rstd, own=own)
    (first,) = torch.autograd.grad(weight.square().sum(), delta, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^fastdg::norm_gradients_backward "):
        first.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["plain", "channels last"])
def test_what_is_not_finite_comes_through(device: str, value: float, layout: str) -> None:
    (x, delta, mean, rstd, own), _ = problem((3, 2, 4, 50, 2), "norm", torch.float32)
    delta[1, 1, 2, 30] = value
    args = [LAYOUTS[layout](t).to(device) for t in (x, delta)]
    for found in ops.norm_gradients(*args, mean.to(device), rstd.to(device), own=own):
        assert found.isfinite().logical_not().nonzero().tolist() == [[1, 2]]


def test_half_precision(device: str) -> None:
    """Two dtypes, as autocast makes them, and sums in float32."""
    (x, delta, mean, rstd, own), _ = problem((3, 2, 6, 500, 2), "norm", torch.float32)
    given = mean.to(device), rstd.to(device)
    for one, two in ((torch.bfloat16, torch.float32), (torch.bfloat16,) * 2, (torch.float16,) * 2):
        inputs = [x.to(device, one).requires_grad_(), delta.to(device, two).requires_grad_()]
        got = ops.norm_gradients(*inputs, *given, own=own)
        exact = [t.detach().double().cpu() for t in (*inputs, *given)]
        wanted = ops.norm_gradients(*exact, own=own)
        for found, want in zip(got, wanted, strict=True):
            assert found.dtype == torch.float32
            assert_close(found, want)
        grads = torch.autograd.grad(got, inputs, [torch.ones_like(found) for found in got])
        assert [g.dtype for g in grads] == [one, two]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 3, 4)}, "^x: .*got 3 dimensions"),
        ({"delta": (2, 3, 4, 6)}, "^delta: "),
        ({"rstd": (2, 3, 3)}, "^rstd: .*got 3"),
        ({"mean": (2, 3, 1)}, "^mean: "),
        ({"rstd": None}, "^rstd: "),
    ],
)
def test_arguments(change: dict[str, tuple[int, ...] | None], message: str) -> None:
    shapes = {"x": (2, 3, 4, 5), "delta": (2, 3, 4, 5), "mean": (2, 3, 2), "rstd": (2, 3, 2)}
    made = {k: None if s is None else torch.ones(s) for k, s in (shapes | change).items()}
    with pytest.raises(ValueError, match=message):
        ops.norm_gradients(**made)
    made = {k: torch.ones(s) for k, s in shapes.items()}
    with pytest.raises(ValueError, match=r"^eps: "):
        ops.norm_gradients(**made, eps=math.nan)
    with pytest.raises(TypeError, match=r"^mean: "):
        ops.norm_gradients(**made | {"mean": made["mean"].double()})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_infinite_input_of_given_statistics(layout: str) -> None:
    """It has no part in the derivative by the input, which stays finite."""
    (x, delta, mean, rstd, _), _ = problem((3, 1, 6, 5, 2), "norm", torch.float32)
    x = LAYOUTS[layout](x.masked_fill(torch.rand(x.shape) < 0.1, torch.inf)).requires_grad_()
    weight, _ = ops.norm_gradients(x, delta, mean, rstd)
    (found,) = torch.autograd.grad(weight.sum(), x)
    wide = rstd.repeat_interleave(3, 2).unsqueeze(3)
    torch.testing.assert_close(found, delta * wide)


@pytest.mark.skipif(not native.status()[0], reason="no compiled ops")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_instruction_set(isa: str, layout: str, kind: str) -> None:
    cpp = torch.ops.fastdg_cpp
    for shape in SHAPES:
        args, _ = problem(shape, kind, torch.float32)
        args = *(LAYOUTS[layout](t) for t in args[:2]), *args[2:], None
        more = torch.rand(shape[2]) + 0.5, LAYOUTS[layout](torch.randn(shape[:4]))
        exact = [t.double() if isinstance(t, Tensor) else t for t in args]
        reference = fastdg.ops.dispatch.registry.OPS["norm_gradients"].reference
        up = torch.randn(2, shape[0], shape[2])
        backward = fastdg.ops.dispatch.registry.OPS["norm_gradients_backward"].reference
        want, got = list(reference(*exact)), list(cpp.norm_gradients(*args))
        for gain, coming in ((None, None), (None, more[1]), more):
            known = [t if t is None else t.double() for t in (gain, coming)]
            want += backward(*up.double(), *exact, *known)
            got += cpp.norm_gradients_backward(*up, *args, gain, coming)
        for one, two in zip(got, want, strict=True):
            assert_close(one, two, 1 + float(two.norm()))
        assert [one.stride() for one in got] == [two.stride() for two in want]


@pytest.mark.skipif(not native.status()[0], reason="no compiled ops")
@pytest.mark.parametrize("layout", ["plain", "channels last"])
def test_results_do_not_depend_on_the_threads(isa: str, layout: str) -> None:
    args, _ = problem((2, 1, 200, 90, 4), "norm", torch.float32)
    args = *(LAYOUTS[layout](t) for t in args[:2]), *args[2:], None
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(torch.ops.fastdg_cpp.norm_gradients(*args))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
