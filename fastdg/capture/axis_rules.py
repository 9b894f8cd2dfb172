"""Rules of operations: the dimensions of their outputs that have samples and channels.

A dimension is a list of factors, outermost first, each with a label and a size. A rule takes the
known dimensions of tensors, the operation's arguments by name, and one output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor

N, C, OTHER = "N", "C", ""
Dim: TypeAlias = tuple[tuple[str, int], ...]  # (label, size) of each factor
Dims: TypeAlias = list[Dim]


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def unlabelled(shape: Iterable[int]) -> Dims:
    return [((OTHER, size),) for size in shape]


def size_of(dim: Dim) -> int:
    total = 1
    for _, size in dim:
        total *= size
    return total


def channels_in(dims: Sequence[Dim]) -> set[int]:
    """Return the dimensions with a factor of channels."""
    return {d for d, dim in enumerate(dims) if any(label == C for label, _ in dim)}


def resized(dim: Dim, size: int) -> Dim:
    """Resize a dimension, and keep its label if it has one."""
    if size_of(dim) == size:
        return dim
    labels = {label for label, n in dim if n != 1} or {label for label, _ in dim}
    return ((labels.pop() if len(labels) == 1 else OTHER, size),)


def fitted(dims: Dims, out: Tensor) -> Dims:
    """Resize each dimension to its size in ``out``."""
    return [resized(dim, n) for dim, n in zip(dims, out.shape, strict=True)]


def regroup(dims: Sequence[Dim], shape: Sequence[int]) -> Dims | None:
    """Regroup the factors into dimensions of other sizes, as a view does; None if one is split."""
    joined: list[tuple[str, int]] = []
    for label, n in (factor for dim in dims for factor in dim):
        if joined and joined[-1][0] == label:
            joined[-1] = (label, joined[-1][1] * n)
        else:
            joined.append((label, n))
    rest, out = joined[::-1], []
    for size in shape:
        dim: list[tuple[str, int]] = []
        if size == 1 and rest and rest[-1][1] == 1:
            dim.append(rest.pop())
        missing = size
        while missing > 1:
            if not rest:
                return None
            label, n = rest.pop()
            if n and missing % n == 0:
                dim.append((label, n))
                missing //= n
            elif n % missing == 0:
                dim.append((label, missing))
                rest.append((label, n // missing))
                missing = 1
            else:
                return None
        out.append(tuple(dim) or ((OTHER, 1),))
    if out and rest and all(n == 1 for _, n in rest):
        out[-1] += tuple(rest[::-1])
    return out


def combined(operands: Sequence[Dims], shape: Sequence[int]) -> Dims:
    """Combine the dimensions of operands that are broadcast to ``shape``.

    If operands differ in the dimensions of channels, only their common ones count.
    """
    aligned = [[*unlabelled([1] * (len(shape) - len(dims))), *dims] for dims in operands]
    claims = [having for dims in aligned if (having := channels_in(dims))]
    agreed = set.intersection(*claims) or set.union(*claims) if claims else set()
    out: Dims = []
    for d, size in enumerate(shape):
        full = [dims[d] for dims in aligned if size_of(dims[d]) == size]
        best: Dim = next(
            (dim for dim in full if any(label for label, _ in dim)), (full or [((OTHER, size),)])[0]
        )
        if d not in agreed:
            best = tuple((OTHER if label == C else label, n) for label, n in best)
        out.append(best)
    return out


# -- rules --

Known: TypeAlias = Callable[[Any], Any]
Call: TypeAlias = dict[str, Any]


def first(of: Known, call: Call) -> tuple[Tensor, Dims]:
    """Return the first tensor among the arguments, and its dimensions."""
    x = next(tensors_of(call.values()))
    return x, of(x) or unlabelled(x.shape)


def elementwise(of: Known, call: Call, out: Tensor) -> Dims:
    """Combine broadcast operands; weights are ignored."""
    operands = [dims for x in tensors_of(call.values()) if (dims := of(x)) is not None]
    return combined([dims for dims in operands if len(dims) <= out.dim()], out.shape)


def copied(of: Known, call: Call, out: Tensor) -> Dims:
    return elementwise(of, {"src": call["src"]}, out)


def same_order(of: Known, call: Call, out: Tensor) -> Dims | None:
    """Keep the dimensions; some may change their size or disappear."""
    x, dims = first(of, call)
    if out.dim() != x.dim():
        gone = call.get("dim", call.get("dims"))
        gone = {d % x.dim() for d in ([gone] if isinstance(gone, int) else gone or range(x.dim()))}
        dims = [dim for d, dim in enumerate(dims) if d not in gone]
    if out.dim() != len(dims):
        return None
    return fitted(dims, out)


def viewed(of: Known, call: Call, out: Tensor) -> Dims | None:
    return regroup(first(of, call)[1], out.shape) if out.numel() else None


def permuted(of: Known, call: Call, out: Tensor) -> Dims:
    x, dims = first(of, call)
    order = list(range(x.dim()))
    if "dims" in call:
        order = [d % x.dim() for d in call["dims"]]
    elif x.dim() > 1:
        a, b = call.get("dim0", 0), call.get("dim1", 1)
        order[a], order[b] = order[b], order[a]
    return [dims[d] for d in order]


def unsqueezed(of: Known, call: Call, out: Tensor) -> Dims:
    _, dims = first(of, call)
    at = call["dim"] % out.dim()
    return [*dims[:at], ((OTHER, 1),), *dims[at:]]


def squeezed(of: Known, call: Call, out: Tensor) -> Dims:
    x, dims = first(of, call)
    of_one = call.get("dim", list(range(x.dim())))
    wanted = {d % max(1, x.dim()) for d in ([of_one] if isinstance(of_one, int) else of_one)}
    return [dim for d, dim in enumerate(dims) if not (d in wanted and x.shape[d] == 1)]


def expanded(of: Known, call: Call, out: Tensor) -> Dims:
    _, dims = first(of, call)
    dims = [*unlabelled([1] * (out.dim() - len(dims))), *dims]
    return [
        dim if size_of(dim) == n else ((OTHER, n),) for dim, n in zip(dims, out.shape, strict=True)
    ]


def joined(of: Known, call: Call, out: Tensor) -> Dims:
    """Combine the operands of ``cat`` as for a sum."""
    operands = [dims for x in tensors_of(call.values()) if (dims := of(x)) is not None]
    return combined([fitted(dims, out) for dims in operands if len(dims) == out.dim()], out.shape)


def stacked(of: Known, call: Call, out: Tensor) -> Dims:
    operands = [dims for x in tensors_of(call.values()) if (dims := of(x)) is not None]
    at = call.get("dim", 0) % out.dim()
    rest = combined(operands, [*out.shape[:at], *out.shape[at + 1 :]])
    return [*rest[:at], ((OTHER, out.shape[at]),), *rest[at:]]


def indexed(of: Known, call: Call, out: Tensor) -> Dims | None:
    """Select rows of one dimension by one index."""
    x, dims = first(of, call)
    lists = [index for index in call["indices"] if index is not None]
    if out.dim() != x.dim() or len(lists) != 1 or lists[0].dim() != 1:
        return None
    return fitted(dims, out)


def convolved(of: Known, call: Call, out: Tensor) -> Dims:
    _, dims = first(of, call)
    around = fitted(dims, out)
    return [around[0], ((C, out.shape[1]),), *around[2:]]


def normalised(of: Known, call: Call, out: Tensor) -> Dims | None:
    """Label the channels of a norm, unless known before: it may normalise tokens."""
    x, dims = first(of, call)
    if out.shape != x.shape:
        return None
    features = call.get("normalized_shape")
    at = 1 if features is None else -1
    if channels_in(dims) or (features is not None and len(features) != 1) or x.dim() < 2:
        return dims
    dims = list(dims)
    dims[at] = tuple((label or C, n) for label, n in dims[at])
    return dims


def to_features(of: Known, call: Call, out: Tensor) -> Dims:
    """Label the last dimension channels: linear, recurrent, whole transformer layers."""
    _, dims = first(of, call)
    return [*dims[:-1], ((C, out.shape[-1]),)]


def embedded(of: Known, call: Call, out: Tensor) -> Dims:
    return [*(of(call["indices"]) or unlabelled(out.shape[:-1])), ((C, out.shape[-1]),)]


def multiplied(of: Known, call: Call, out: Tensor) -> Dims:
    """Follow a product of matrices; the free dimension of a weight has channels."""
    matrices = [x for key, x in call.items() if key in ("self", "mat1", "mat2", "batch1", "batch2")]
    a, b = matrices[-2:]
    rows, columns = ((C, out.shape[-2]),), ((C, out.shape[-1]),)
    batch: Dims = []
    if (of_a := of(a)) is not None:
        rows, batch = of_a[-2], of_a[:-2]
    if (of_b := of(b)) is not None:
        columns, batch = of_b[-1], batch if of_a is not None else of_b[:-2]
    if of_a is not None and of_b is not None and batch:
        batch = combined([of_a[:-2], of_b[:-2]], out.shape[:-2])
    return [*batch, rows, columns]


def attended(of: Known, call: Call, out: Tensor) -> Dims:
    query, value = of(call["query"]), of(call["value"])
    dims = query or unlabelled(out.shape)
    return [*dims[:-1], value[-1] if value else ((C, out.shape[-1]),)]


def unfolded(of: Known, call: Call, out: Tensor) -> Dims:
    """Follow ``im2col`` and its reverse: (N, C, ...)."""
    _, dims = first(of, call)
    label = C if 1 in channels_in(dims) else OTHER
    return [dims[0], ((label, out.shape[1]),), *unlabelled(out.shape[2:])]


def _named(names: str, rule: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), rule)


NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm")
RULES: dict[str, Any] = {
    **_named(
        "clone contiguous detach alias _to_copy lift_fresh zeros_like ones_like empty_like "
        "native_dropout bernoulli _softmax _log_softmax _safe_softmax softmax cumsum flip roll "
        "tril triu _fft_c2c hardswish hardsigmoid hardtanh leaky_relu log_sigmoid_forward "
        "rrelu_with_noise _prelu_kernel masked_fill where",
        elementwise,
    ),
    **_named(
        "slice narrow split split_with_sizes chunk unsafe_split unsafe_split_with_sizes "
        "index_select gather topk sort constant_pad_nd reflection_pad1d reflection_pad2d "
        "replication_pad1d replication_pad2d repeat avg_pool1d avg_pool2d avg_pool3d max_pool1d "
        "max_pool2d_with_indices max_pool3d_with_indices max_pool2d _adaptive_avg_pool2d "
        "_adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d "
        "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d "
        "grid_sampler_2d pixel_shuffle pixel_unshuffle channel_shuffle select unbind sum mean amax "
        "amin max min var std var_mean std_mean logsumexp linalg_vector_norm argmax argmin any all "
        "prod median glu",
        same_order,
    ),
    **_named("view _unsafe_view reshape _reshape_alias", viewed),
    **_named("permute transpose t", permuted),
    **_named("mm addmm bmm baddbmm _addmm_activation", multiplied),
    **_named(
        "linear _transformer_encoder_layer_fwd _native_multi_head_attention mkldnn_rnn_layer "
        "_cudnn_rnn miopen_rnn _thnn_fused_lstm_cell _thnn_fused_gru_cell",
        to_features,
    ),
    **_named(
        "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable",
        attended,
    ),
    **_named("convolution _convolution convolution_overrideable", convolved),
    **_named("im2col col2im", unfolded),
    "copy": copied,
    "unsqueeze": unsqueezed,
    "squeeze": squeezed,
    "expand": expanded,
    "cat": joined,
    "stack": stacked,
    "index": indexed,
    "embedding": embedded,
}
