"""Operands in bfloat16 and float16 are read as they are; sums and statistics are float32.

The budget of a statistic is that of float32 operands: a product of halves is exact in float32. A
gradient of an operand is rounded once more, to the operand's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import OPERANDS, arguments, cast
from op_cases import deal
from torch import Tensor
from torch.utils import _pytree as pytree

import fastdg.kernels
from fastdg.ops import window as windows
from fastdg.ops.dispatch.registry import OPS

DTYPES = [torch.bfloat16, torch.float16]
# The interpreter computes with NumPy, which warns of overflow and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
CASES = {
    name: args for name, args in arguments("cpu", False).items() if name.split(",")[0] in OPERANDS
}


def patches(channels: int, outputs: int, size: tuple[int, ...], window: list[int]) -> None:
    """Add each op on the patches of a convolution, whose channels kernels read 16 bytes at a
    time; where they lie apart they copy them first."""
    order, offsets = deal((3, 0, 2))
    a = torch.randn(5, channels, *size)
    T, inputs = windows.sizes(a.shape, window)
    delta = torch.randn(5, outputs, T).mT
    up = torch.randn(3, 3, outputs, inputs)
    where = order, offsets, window
    kind = f"{channels} channels of {size}"
    for layout, rows in (("apart", a), ("side by side", a.movedim(1, -1).contiguous())):
        x = rows.movedim(-1, 1) if layout == "side by side" else rows
        for name, args in {
            "outer_moments": (x, delta, *where),
            "outer_domain": (x, delta, *where),
            "outer_norms": (x, delta, window),
            "outer_agreement": (x, delta, order, offsets, torch.ones(3), 0.5, 3.0, window),
            "outer_moments_backward": (*up[:2], x, delta, up[2], *where[:2], True, window),
        }.items():
            CASES[f"{name}, {kind}, {layout}"] = args


patches(16, 20, (5, 6), [3, 2, 1, 1, 1, 2])
patches(48, 8, (9,), [3, 2, 1])
patches(32, 16, (5, 6), [1, 1, 2, 1, 1, 1])
patches(0, 3, (4,), [2, 1, 1])
patches(80, 2, (3, 4, 3), [2, 1, 2, 1, 2, 1, 1, 1, 1])


ROWS = [(name, dtype) for name in CASES for dtype in DTYPES[: 1 if "channels of" in name else 2]]


def rounded(name: str, dtype: torch.dtype) -> list[Any]:
    args: list[Any] = list(CASES[name])
    for k in OPERANDS[name.split(",")[0]]:
        args[k] = cast(args[k], dtype)
    return args


def leaves(x: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def assert_right(name: str, args: list[Any], results: Any) -> None:
    op = OPS[name.split(",")[0]]
    exact, found = (
        [x for x in leaves(out) if x.is_floating_point()]
        for out in (op.reference(*cast(args, torch.float64)), results)
    )
    like = [args[k].dtype for k in op.halves or ()] or [torch.float32] * len(found)
    assert [x.dtype for x in found] == like
    for got, want in zip(found, exact, strict=True):
        budget = 1e-5 if got.dtype is torch.float32 else torch.finfo(got.dtype).eps
        assert float((got.double().cpu() - want).norm()) <= budget * max(1.0, float(want.norm()))


def test_every_op_that_takes_halves_is_here() -> None:
    assert set(OPERANDS) == {name for name, op in OPS.items() if op.halves is not None}


@pytest.mark.parametrize(("name", "dtype"), ROWS)
def test_halves_are_read_as_they_are(device: str, name: str, dtype: torch.dtype) -> None:
    args = rounded(name, dtype)
    moved = pytree.tree_map_only(Tensor, lambda x: x.to(device), args)
    assert_right(name, args, OPS[name.split(",")[0]](*moved))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[..., Any]]]:
    """The kernels, interpreted; `tl.dot` there would take the bits of bfloat16 for integers."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("they run on the device")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot = InterpreterBuilder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype("uint32") << 16
        return TensorHandle(bits.view("float32"), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest),
    )
    yield {name: function for name, function, _ in fastdg.kernels.implementations(OPERANDS)}


@pytest.mark.parametrize(("name", "dtype"), ROWS)
def test_kernels_read_halves_as_they_are(
    kernels: dict[str, Callable[..., Any]], name: str, dtype: torch.dtype
) -> None:
    if (kernel := kernels.get(name.split(",")[0])) is None:
        pytest.skip("no kernel of its own")
    args = rounded(name, dtype)
    assert_right(name, args, kernel(*args))


@pytest.mark.parametrize("name", [name for name in CASES if "agreement" in name])
def test_tile_by_tile(
    kernels: dict[str, Callable[..., Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that the tiles of this weight fill."""
    monkeypatch.setattr(
        fastdg.kernels.outer_agreement, "fills", lambda programs, device: True, raising=True
    )
    test_kernels_read_halves_as_they_are(kernels, name, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "name", ["outer_moments", "outer_domain", "outer_norms", "outer_agreement"]
)
def test_operands_of_two_dtypes_are_refused(name: str, place: int, dtype: torch.dtype) -> None:
    args = list(CASES[name])
    args[place] = args[place].to(dtype)
    with pytest.raises(ValueError, match=r"^delta: expected .* as a"):
        OPS[name](*args)
