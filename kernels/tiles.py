"""Device functions that several kernels share: reading rows, sharing out domains, and variances."""

# ruff: noqa: E741  (O and I are shapes)

from __future__ import annotations

import triton
import triton.language as tl

# WINDOW, how rows are read: of their matrix; of patches, element (t, i) at row[t] + column[i]; of
# patches whose channels lie side by side, channel i of tap k at (row[t] + column[k]) * row_stride
# + i; of patches of an input without its padding, as `ops.window.masked_offsets` has them
MATRIX = tl.constexpr(0)
GATHER = tl.constexpr(1)
TAPS = tl.constexpr(2)
PADDED = tl.constexpr(3)


@triton.jit
def tile_of(tile, O, I, taps, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):  # fmt: skip
    """Rows o and columns i of a tile, and the tap that its columns belong to."""
    tiles_i = tl.cdiv(I, BLOCK_I) * taps
    tile_i = tile % tiles_i
    o = tile // tiles_i * BLOCK_O + tl.arange(0, BLOCK_O)
    return o, tile_i // taps * BLOCK_I + tl.arange(0, BLOCK_I), tile_i % taps


@triton.jit
def result_at(o, i, tap, I, taps, WINDOW: tl.constexpr):  # fmt: skip
    """Where the elements of a tile are in a weight ``[O, I * taps]``."""
    if WINDOW == TAPS:
        at = o[:, None] * (I * taps) + (i * taps + tap)[None, :]
    else:
        at = o[:, None] * I + i[None, :]
    return at


@triton.jit
def columns_at(column, i, tap, I, row_stride, column_stride, WINDOW: tl.constexpr):  # fmt: skip
    """Offsets of columns i within a sample."""
    if WINDOW == MATRIX:
        at = i * column_stride
    elif WINDOW == TAPS:
        at = tl.load(column + tap) * row_stride + i
    else:
        at = tl.load(column + i, mask=i < I, other=0)
    return at


@triton.jit
def rows_at(row, t, inside, row_stride, WINDOW: tl.constexpr):  # fmt: skip
    """Offsets of rows t within a sample."""
    if WINDOW == MATRIX:
        at = t * row_stride
    else:
        at = tl.load(row + t, mask=inside, other=0)
        if WINDOW == TAPS:
            at *= row_stride
    return at


@triton.jit
def place(at, WINDOW: tl.constexpr):  # fmt: skip
    """The offsets alone."""
    if WINDOW == PADDED:
        at = at.to(tl.int32)
    return at


@triton.jit
def meet(along_i, along_t, inside, WINDOW: tl.constexpr):  # fmt: skip
    """Whether elements are inside; of patches also whether they are no padding."""
    if WINDOW == PADDED:  # beyond the edges no bit is set
        inside = ((along_i >> 32).to(tl.int32) & (along_t >> 32).to(tl.int32)) != 0
    return inside


@triton.jit
def load_rows(base, row, along_i, t, i, T, I, row_stride, WINDOW: tl.constexpr):  # fmt: skip
    """Tile ``[i, t]`` of one sample's rows."""
    inside = (i < I)[:, None] & (t < T)[None, :]
    along_t = rows_at(row, t, t < T, row_stride, WINDOW)
    inside = meet(along_i[:, None], along_t[None, :], inside, WINDOW)
    if WINDOW == PADDED:
        pointers = base + (place(along_i, WINDOW)[:, None] + place(along_t, WINDOW)[None, :])
    else:
        pointers = base + along_i[:, None] + along_t[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_delta(base, t, o, T, O, row_stride, column_stride):
    """Tile ``[o, t]`` of one sample's output gradients."""
    inside = (o < O)[:, None] & (t < T)[None, :]
    pointers = base + o[:, None] * column_stride + t[None, :] * row_stride
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_pairs(
    a, delta, order, row, first, k, end, along_i, o, i, T, O, I,
    a_sample, a_row, d_sample, d_row, d_column, WINDOW: tl.constexpr,
):  # fmt: skip
    """Tiles ``[o, k]`` of output gradients and ``[i, k]`` of rows: pairs k of a domain that begins
    at ``first``, pair k its sample ``k // T`` at position ``k % T``."""
    t = k % T
    sample = tl.load(order + first + k // T, mask=k < end, other=0)
    along_t = rows_at(row, t, k < end, a_row, WINDOW)
    along_k = sample * a_sample + place(along_t, WINDOW)
    d = tl.load(
        delta + o[:, None] * d_column + (sample * d_sample + t * d_row)[None, :],
        mask=(o < O)[:, None] & (k < end)[None, :], other=0.0,
    )  # fmt: skip
    inside = (i < I)[:, None] & (k < end)[None, :]
    inside = meet(along_i[:, None], along_t[None, :], inside, WINDOW)
    x = tl.load(a + place(along_i, WINDOW)[:, None] + along_k[None, :], mask=inside, other=0.0)
    return d, x


@triton.jit
def add_sample(total, second, g, seen):
    """Sum and centred sum of squares of ``seen`` samples, and of one more: ``g``.

    As Welford does: nothing cancels, nothing gets negative.
    """
    before = g - total * (1.0 / tl.maximum(seen, 1).to(tl.float32))
    total += g
    second += before * (g - total * (1.0 / (seen + 1).to(tl.float32)))
    return total, second


@triton.jit
def samples_of(part, split, samples, BLOCK: tl.constexpr):  # fmt: skip
    """Begin and end of a part of a domain's samples, which is shared out in blocks."""
    share = tl.cdiv(tl.cdiv(samples, BLOCK), split) * BLOCK
    begin = tl.minimum(samples, part * share)
    return begin, tl.minimum(samples, begin + share)


@triton.jit
def transpose_kernel(
    x, out, T, T_padded, C, sample_stride, row_stride, column_stride,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``x [N, T, C]`` of any strides -> contiguous ``out [N, C, T_padded]``, zero beyond T."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks = tl.cdiv(T_padded, BLOCK_T) * blocks_c
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks
    t = tile // blocks_c * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tile % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    at = t[:, None] * row_stride + c[None, :] * column_stride
    inside = (t < T)[:, None] & (c < C)[None, :]
    values = tl.load(x + sample * sample_stride + at, mask=inside, other=0.0)
    inside = (c < C)[:, None] & (t < T_padded)[None, :]
    at = c[:, None] * T_padded + t[None, :]
    tl.store(out + sample * C * T_padded + at, tl.trans(values), mask=inside)


@triton.jit(do_not_specialize=["split"])
def finish_kernel(
    partial, offsets, mean, variance, size, slab, split,
    SQUARES: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Partial sums ``[split, 1, D, size]`` -> mean; or sums and centred sums of squares ``[split,
    2, D, size]`` of parts of the samples, as `samples_of` has them -> mean and variance.

    Parts are merged as Chan, Golub and LeVeque do.
    """
    blocks = tl.cdiv(size, BLOCK)
    domain = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    start = partial + domain * size + at
    total = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    samples = (tl.load(offsets + domain + 1) - tl.load(offsets + domain)).to(tl.int32)
    for part in range(split):
        own = tl.load(start, mask=inside, other=0.0)
        start += slab
        if SQUARES:
            begin, end = samples_of(part, split, samples, SHARE)
            if begin > 0 and end > begin:
                seen, new = begin.to(tl.float32), (end - begin).to(tl.float32)
                apart = own / new - total / seen
                second += apart * apart * (seen * new / (seen + new))
            second += tl.load(start, mask=inside, other=0.0)
            start += slab
        total += own
    count = tl.maximum(samples, 1).to(tl.float32)
    tl.store(mean + domain * size + at, total / count, mask=inside)
    if SQUARES:
        tl.store(variance + domain * size + at, second / count, mask=inside)
