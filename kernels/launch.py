"""How kernels are launched: tile sizes, shares of the work, precision, supported arguments."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..ops import window as windows
from .tiles import GATHER, MATRIX, PADDED, TAPS, transpose_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT32 = 2**31 - 1
# Partial sums of one launch, in elements (256 MiB of fp32).
PARTIAL_ELEMENTS = 1 << 26
# Of a loop over products whose operands a table of samples points to: Triton spends two of them on
# the table's loads, and three tiles of operands are under way.
STAGES = 5


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Run ``kernel`` as ``programs`` programs on the device of the first tensor."""
    if programs == 0:
        return
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **meta)


def integers(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Return integers, which kernels read, on the device; the CPU does not wait for the copy."""
    made = torch.tensor(numbers, dtype=torch.int64)
    if device.type != "cuda":
        return made
    return made.pin_memory().to(device, non_blocking=True)


def processors(device: torch.device) -> int:
    """Programs that run at the same time, at least; interpreted kernels run one after the other."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def fills(programs: int, device: torch.device) -> bool:
    """Return whether ``programs`` leave no multiprocessor idle."""
    return programs >= processors(device)


def hopper(device: torch.device) -> bool:
    """Return whether matrix instructions read shared memory, so that registers hold accumulators.
    Later GPUs do so too, but Triton spills some there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def registers(device: torch.device, most: int) -> dict[str, int]:
    """Options of a product. Blackwell has its accumulators in memory of their own, and ptxas would
    give the rest too few registers, and spill some."""
    return {"maxnreg": most} if blackwell(device) else {}


def blackwell(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def gradient_like(x: Tensor, order: Tensor) -> Tensor:
    """Allocate a gradient of ``x``; it is zero for samples that belong to no domain."""
    return x.new_empty(x.shape) if order.numel() == x.shape[0] else x.new_zeros(x.shape)


def parts(programs: int, steps: int, size: int, device: torch.device) -> int:
    """Into how many parts each program's sum is split, to have two programs a multiprocessor.

    Args:
        programs: programs there are without a split.
        steps: parts that the longest sum can be divided into.
        size: elements of the partial result of one part.
        device: where they run.
    """
    wanted = (2 * processors(device)) // max(1, programs)
    return max(1, min(wanted, steps, PARTIAL_ELEMENTS // max(1, size)))


def block(size: int, largest: int, smallest: int = 16) -> int:
    """Power of two that covers ``size``, within the limits of `tl.dot` and the registers."""
    return max(smallest, min(largest, next_power_of_2(max(1, size))))


def warps(block_o: int, block_i: int) -> int:
    """Warps for a tile: at most 64 elements of it a thread."""
    return 8 if block_o * block_i > 64 * 64 else 4


def stages(device: torch.device, windowed: bool) -> int:
    """`STAGES` of a loop that has few registers left: none where they hold operands or the places
    of patches, too."""
    return STAGES if hopper(device) and not windowed else 3


def tile(
    outputs: int, inputs: int, precise: str, a: Tensor, window: Sequence[int]
) -> tuple[int, int, int]:
    """``(O, I, summed)`` sizes of a tile that keeps three accumulators in registers without spills.

    Hopper's instructions take operands from shared memory and leave room for twice the tile of
    earlier GPUs. Splitting fp32 into TF32 parts happens in registers and costs that room again,
    and so do patches of two-byte numbers, which cannot be copied to shared memory one by one.
    """
    gathered = window and a.dtype != torch.float32 and not by_taps(a, window)
    wide = precise == "tf32" and hopper(a.device) and not gathered
    summed = 32 if precise == "tf32" else 16
    return block(outputs, 128), block(inputs, 128 if wide else 64), summed


def pairs(summed: int, a: Tensor, window: Sequence[int]) -> int:
    """Pairs of sample and position that a step sums, by `tile`; fewer where registers hold the
    place of each, unless operands go to shared memory alone."""
    held = window and not by_taps(a, window) and not hopper(a.device)
    return 16 if held else summed


def precision(a: Tensor, window: Sequence[int]) -> str:
    """Precision of products of fp32 numbers, as PyTorch's own layers are set.

    Without TF32, three TF32 products for each: nearly fp32's accuracy, and still tensor cores.
    """
    if a.dtype != torch.float32:
        return "tf32"  # exact for fp16 and bf16
    backend = torch.backends.cudnn.conv if window else torch.backends.cuda.matmul
    return "tf32" if backend.fp32_precision == "tf32" else "tf32x3"


def by_taps(a: Tensor, window: Sequence[int]) -> bool:
    """Whether patches are read tap by tap, 16 bytes of channels at a time (`tiles.TAPS`): the
    matrix instructions take halves with the summed dimension apart, but not fp32."""
    return bool(window) and a.dtype != torch.float32 and a.shape[1] % 16 == 0


def masks(a: Tensor, window: Sequence[int]) -> bool:
    """Whether kernels mask the places of patches outside an input without its padding."""
    taps = prod(windows.split(window)[0])
    return 1 < taps <= windows.MOST_TAPS and any(windows.padding(window)) and not by_taps(a, window)


def columns(a: Tensor, window: Sequence[int]) -> tuple[int, int]:
    """Columns of a tap, and taps, as `address` has them: of patches that are not read so, all I
    columns are of one."""
    if by_taps(a, window):
        return a.shape[1], prod(windows.split(window)[0])
    return windows.sizes(a.shape, window)[1], 1


def copied(x: Tensor, width: int) -> Tensor:
    """Contiguous copy ``[N, R, width]`` of ``x [N, R, W]``, with zeros beyond W."""
    N, R, W = x.shape
    rows = x.new_empty((N, R, width))
    block_w, block_r = block(width, 64), block(R, 64)
    launch(
        transpose_kernel, N * cdiv(width, block_w) * cdiv(R, block_r),
        x, rows, W, width, R, x.stride(0), x.stride(2), x.stride(1),
        BLOCK_T=block_w, BLOCK_C=block_r,
    )  # fmt: skip
    return rows


def side_by_side(x: Tensor) -> Tensor:
    """Rows ``[N, T, C]`` with their channels next to each other."""
    C = x.shape[2]
    there = x.stride(2) == 1 and (x.stride(1) % 16 == 0 or C % 16 > 0)
    return x if there else copied(x, C)


def summable(x: Tensor) -> Tensor:
    """Rows ``[N, T, C]`` whose loads are 16 bytes wide in a product that sums over T; with T
    rounded up to 16 by zeros, if need be.

    Tensor cores take TF32 operands with the summed dimension contiguous only. fp16 and bf16 may lie
    either way. Loads are wide only if every row starts and ends at a boundary.
    """
    _, T, C = x.shape
    if T % 16 == 0 and x.stride(1) == 1 and x.stride(2) % 16 == 0:
        return x
    if x.dtype != torch.float32 and C % 16 == 0:
        return side_by_side(x)
    return copied(x.transpose(1, 2), cdiv(T, 16) * 16).transpose(1, 2)


def summed_last(a: Tensor, delta: Tensor, window: Sequence[int]) -> tuple[Tensor, Tensor, int, int]:
    """``a`` and ``delta`` for products over positions, and how many positions each has now."""
    T = windows.sizes(a.shape, window)[0]
    delta = summable(delta)
    if window:
        return a, delta, T, delta.shape[1]
    a = summable(a)
    return a, delta, a.shape[1], delta.shape[1]


def address(
    a: Tensor, window: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, int, int, int, int, int]:
    """How kernels read rows ``[N, T, I]`` of ``a`` (see `tiles.WINDOW`).

    Returns:
        ``(a, row, column, sample stride, row stride, column stride, taps, window)``. Patches are
        read along the positions, or along the channels, which therefore have to be next to each
        other in memory.
    """
    if not window:
        return a, a, a, *a.stride(), 1, MATRIX.value  # the tables are not read
    spatial, taps = tuple(a.shape[2:]), columns(a, window)[1]
    if not by_taps(a, window):
        a = a.contiguous()
        where = a.shape[1], spatial, tuple(a.stride()[1:]), tuple(window), a.device
        tables = windows.masked_offsets if windows.padding(window) else windows.offsets
        read = PADDED if windows.padding(window) else GATHER
        return a, *tables(*where), a.stride(0), 0, 0, taps, read.value
    a = side_by_side(a.flatten(2).transpose(1, 2))
    row, tap = places_of(spatial, tuple(window), a.device)
    return a, row, tap, a.stride(0), a.stride(1), 1, taps, TAPS.value


def places_of(
    spatial: tuple[int, ...], window: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The place ``[T]`` of an input where each patch begins, and the distance ``[taps]`` from there
    to each tap."""
    strides = tuple(prod(spatial[j + 1 :]) for j in range(len(spatial)))
    return windows.offsets(1, spatial, (0, *strides), window, device)


def paired(a: Tensor, delta: Tensor, window: Sequence[int]) -> tuple[Any, Tensor, int]:
    """Return ``address(a, window)``, ``delta`` and T for sums over (sample, position) pairs."""
    T = windows.sizes(a.shape, window)[0]
    if T >= 16 and not window:
        a, delta, T, _ = summed_last(a, delta, window)
    elif delta.dtype != torch.float32 and delta.shape[2] % 16 == 0:
        delta = summable(delta)  # without further positions
    return address(a, window), delta, T


def pointwise(
    a: Tensor, window: Sequence[int], strided: bool = True
) -> tuple[Tensor, Sequence[int]]:
    """``a`` and ``window``; a convolution that sees one place at a time becomes plain rows, with
    strides a copy, if these are wanted. Zeros that kernels do not mask are filled in."""
    if len(window) in windows.PADDED and not masks(a, window):
        a, window = windows.fill(a, window)
    kernel, stride, _ = windows.split(window)
    if not window or any(taps > 1 for taps in kernel):
        return a, window
    if any(step > 1 for step in stride):
        if not strided:
            return a, window
        a = a[(..., *(slice(None, None, step) for step in stride))]
        if a.dtype != torch.float32:
            return a.movedim(1, -1).flatten(1, -2), ()
    return a.flatten(2).transpose(1, 2), ()


def supports(*args: Any) -> str | None:
    """Why kernels cannot take the tensors: all on a CUDA device, of one dtype, not too large."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    floats = [x for x in tensors if x.is_floating_point()]
    for x in tensors:
        if not x.is_cuda:
            return f"kernels read tensors on a CUDA device, not on {x.device.type}"
    for x in floats:
        if x.dtype not in DTYPES:
            return f"kernels read float32, bfloat16 and float16, not {x.dtype}"
        if x.dtype != floats[0].dtype:
            return f"its kernel reads one dtype, not {floats[0].dtype} and {x.dtype}"
        if _extent(x) > INT32:
            return "kernels address 2**31 - 1 elements of a row"
    return None


def supports_outer(a: Tensor, delta: Tensor, *args: Any) -> str | None:
    """`supports`, for ``(a, delta, ..., window)``; T may be missing."""
    window = args[-1]
    T, inputs = (1, a.shape[1]) if a.dim() == 2 else windows.sizes(a.shape, window)
    outputs = delta.shape[-1]
    padded = cdiv(T, 16) * 16  # by `summable`
    widest = outputs if window else max(outputs, inputs)
    if max(a.shape[0] * padded, outputs * inputs, padded * widest) > INT32:
        return "kernels address 2**31 - 1 rows, and as many elements of a gradient"
    return supports(a, delta, *args)


def _extent(tensor: Tensor) -> int:
    """Distance from the first to the last element of a row; rows are addressed with 64 bits."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    return max(reach, prod(tensor.shape[1:]))  # a contiguous copy may reach further
