"""From the owners of an output gradient to the owners of an input gradient, per operation.

Owners depend only on an operation's sizes and dimensions, which are in a graph's signature:
`fastdg.gradients.graph` lists the attributes read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from ..graph import output_shapes, signed

Shape = tuple[int, ...]
# None: the gradient may mix samples
Ids = Tensor | None
# (node, number of the output, owners of its gradient, its shape, slot, shape there) -> owners there
Carry = Callable[[Any, int, Tensor, Shape, int, Shape], Ids]


class Unknown(Exception):
    """The source of an operation's rows is unknown."""


def _along(ids: Tensor, dims: Iterable[int]) -> Ids:
    """Reduce owners where each entry depends on all along ``dims``; size 1 there."""
    for d in dims:
        if ids.shape[d] > 1:
            most = ids.amax(d, keepdim=True)
            if bool(((ids != most) & (ids >= 0)).any()):
                return None
            ids = most
    return ids


def _all(ids: Tensor, shape: Shape) -> Ids:
    one = _along(ids, range(ids.dim()))
    return None if one is None else one.reshape([1] * len(shape))


def _entrywise(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    """Carry entry by entry, with broadcasting; or from a scalar loss to all."""
    if not out:
        return ids.reshape([1] * len(shape))
    extra = len(out) - len(shape)
    if extra < 0:
        raise Unknown
    sizes = (*[1] * extra, *shape)
    if any(n not in (1, m) for n, m in zip(sizes, out, strict=True)):
        raise Unknown
    made = _along(ids, [d for d, n in enumerate(sizes) if n == 1])
    return None if made is None else made.reshape(made.shape[extra:])


def _viewed(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    """Carry through a view: join and split dimensions group by group."""
    wide: list[int] = []
    made: list[int] = []
    i = j = 0
    while i < len(out) or j < len(shape):
        a, b, p, q = i, j, 1, 1
        while True:
            if i < len(out) and (p <= q or j == len(shape)):
                p, i = p * out[i], i + 1
            else:
                q, j = q * shape[j], j + 1
            if p == q:
                break
        same = all(n == 1 for n in ids.shape[a:i])
        wide += [1] * (i - a) if same else out[a:i]
        made += [1] * (j - b) if same else shape[b:j]
    return ids.expand(wide).reshape(made)


def _permuted(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    back = [0] * len(out)
    for place, d in enumerate(node._saved_dims):
        back[signed(d) % len(out)] = place
    return ids.permute(back)


def _transposed(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    return ids.transpose(signed(node._saved_dim0), signed(node._saved_dim1))


def _into(ids: Tensor, shape: Shape, dim: int, where: Any) -> Tensor:
    """Put ``ids`` at the places ``where`` along a dimension, -1 elsewhere."""
    full = ids.new_full([*ids.shape[:dim], shape[dim], *ids.shape[dim + 1 :]], -1)
    full[(slice(None),) * dim + (where,)] = ids
    return full


def _sliced(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    start, end = signed(node._saved_start), signed(node._saved_end)
    dim = signed(node._saved_dim) % len(shape)
    return _into(ids, shape, dim, slice(start, end, node._saved_step))


def _selected(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    dim = signed(node._saved_dim) % len(shape)
    where = signed(node._saved_index) % shape[dim]
    return _into(ids.unsqueeze(dim), shape, dim, slice(where, where + 1))


def _unbound(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    dim = signed(node._saved_dim) % len(shape)
    return _into(ids.unsqueeze(dim), shape, dim, slice(nr, nr + 1))


def _split(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    dim = signed(node._saved_dim) % len(shape)
    begin = nr * node._saved_split_size
    return _into(ids, shape, dim, slice(begin, begin + out[dim]))


def _split_with_sizes(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    dim = signed(node._saved_dim) % len(shape)
    begin = sum(node._saved_split_sizes[:nr])
    return _into(ids, shape, dim, slice(begin, begin + out[dim]))


def _joined(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    dim = signed(node._saved_dim) % len(out)
    if ids.shape[dim] == 1:
        return ids
    before = [_shape_of(child, place) for child, place in node.next_functions[:slot]]
    if any(b is None for b in before):  # a constant: its neighbours may tell its size
        after = [_shape_of(child, place) for child, place in node.next_functions[slot + 1 :]]
        if any(b is None for b in after):
            raise Unknown
        begin = out[dim] - shape[dim] - _length(after, dim)
    else:
        begin = _length(before, dim)
    return ids.narrow(dim, begin, shape[dim])


def _length(shapes: Sequence[Shape | None], dim: int) -> int:
    return sum(shape[dim] for shape in shapes if shape is not None and shape != (0,))


def _shape_of(node: Node | None, nr: int) -> Shape | None:
    """Return the shape of a tensor of the graph; None for a tensor outside it."""
    if node is None:
        return None
    variable = getattr(node, "variable", None)
    return tuple(variable.shape) if variable is not None else output_shapes(node)[nr]


def _stacked(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    dim = signed(node._saved_dim) % len(out)
    return ids.select(dim, 0 if ids.shape[dim] == 1 else slot)


def _flipped(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    return ids.flip([signed(d) % len(out) for d in node._saved_dims])


def _rolled(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    dims = [signed(d) % len(out) for d in node._saved_dims]
    if not dims:
        raise Unknown
    return ids.roll([-signed(n) for n in node._saved_shifts], dims)


def _padded(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    pad = [signed(n) for n in node._saved_pad]
    for place in range(0, len(pad), 2):
        dim = len(out) - 1 - place // 2
        if ids.shape[dim] > 1 or min(pad[place : place + 2]) < 0:
            ids = ids.expand([n if d == dim else -1 for d, n in enumerate(out)])
            moved = ids.new_full([*ids.shape[:dim], shape[dim], *ids.shape[dim + 1 :]], -1)
            begin, end = max(0, -pad[place]), min(shape[dim], out[dim] - pad[place])
            source = ids.narrow(dim, begin + pad[place], end - begin)
            moved.narrow(dim, begin, end - begin).copy_(source)
            ids = moved
    return ids


def _diagonal(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    full = ids.new_full(shape, -1)
    dims = signed(node._saved_dim1), signed(node._saved_dim2)
    full.diagonal(signed(node._saved_offset), *dims).copy_(ids.expand(out))
    return full


def _reduced(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    """Carry through a reduction along some dimensions."""
    if not out:
        return ids.reshape([1] * len(shape))
    if len(out) != len(shape):
        dim = node._saved_dim
        for d in sorted(signed(d) % len(shape) for d in ([dim] if isinstance(dim, int) else dim)):
            ids = ids.unsqueeze(d)
    return ids


def _classes(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    """Carry through a negative log-likelihood: one loss from all classes, dimension 1."""
    return ids.reshape([1] * len(shape)) if not out or len(shape) < 2 else ids.unsqueeze(1)


def _mixing(dims: Callable[[Any, Shape], Sequence[int]], slots: Sequence[int] = (0,)) -> Carry:
    """Return a carry that mixes along ``dims`` and not along other dimensions."""

    def carry(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
        if slot not in slots:
            return _all(ids, shape)
        mixed = dims(node, out)
        kept = [d for d in range(len(out)) if d not in mixed]
        if any(d >= len(shape) or shape[d] != out[d] for d in kept):
            raise Unknown
        made = _along(ids, mixed)
        return None if made is None else made.reshape([*made.shape, *[1] * 9][: len(shape)])

    return carry


def _saved_dim(node: Any, out: Shape) -> Sequence[int]:
    return (signed(node._saved_dim) % len(out),)


def _normalized(node: Any, out: Shape) -> Sequence[int]:
    return range(len(out) - len(node._saved_normalized_shape), len(out))


def _but_first(node: Any, out: Shape) -> Sequence[int]:
    return range(1, len(out))


def _batch_norm(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    if slot:
        return _all(ids, shape)
    return _along(ids, [0, *range(2, len(out))]) if node._saved_training else ids


def _product(rows: int, columns: int) -> Carry:
    """Return the carry of a matrix product of these slots; an earlier slot is a summand."""

    def carry(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
        if slot not in (rows, columns):
            return _entrywise(node, nr, ids, out, slot, shape)
        return _along(ids, [len(out) - (1 if slot == rows else 2)])

    return carry


def _matrix_vector(node: Any, nr: int, ids: Tensor, out: Shape, slot: int, shape: Shape) -> Ids:
    if slot == len(node.next_functions) - 1:
        return _along(ids, [0])
    return ids.unsqueeze(1) if len(shape) == 2 else _entrywise(node, nr, ids, out, slot, shape)


_ENTRYWISE = (
    *("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Addcmul", "Addcdiv", "Lerp", "Where", "Pow"),
    *("Relu", "Gelu", "Silu", "Mish", "Tanh", "Sigmoid", "Softplus", "Elu", "Celu"),
    *("LeakyRelu", "Hardtanh", "Hardswish", "Hardsigmoid", "LogSigmoid", "Threshold"),
    *("PreluKernel", "RreluWithNoise", "Softshrink", "Hardshrink", "Exp", "Exp2", "Expm1", "Log"),
    *("Log1P", "Log2", "Log10", "Sqrt", "Rsqrt", "Reciprocal", "Abs", "Sgn", "Sin", "Cos", "Tan"),
    *("Sinh", "Cosh", "Asin", "Acos", "Atan", "Atan2", "Erf", "Erfc", "Clamp", "Xlogy", "Frac"),
    *("ClampMin", "ClampMax", "Maximum", "Minimum", "MaskedFill", "NativeDropout", "FusedDropout"),
    *("BinaryCrossEntropyWithLogits", "BinaryCrossEntropy", "MseLoss", "SmoothL1Loss", "HuberLoss"),
    *("SoftMarginLoss", "Expand", "ToCopy", "Alias", "Clone", "Triu", "Tril", "Round", "Floor"),
)
_REDUCED = (
    *("Sum", "Mean", "Amax", "Amin", "Logsumexp", "Norm", "LinalgVectorNorm", "Var", "Std"),
    *("VarMean", "StdMean", "Prod", "Max", "Min", "Median", "Dot"),
)
_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze")
_FIRST = (
    *("AvgPool2D", "AvgPool3D", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "MkldnnMaxPool2D"),
    *("MaxPool2D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MkldnnAdaptiveAvgPool2D", "Im2Col"),
    *("AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "UpsampleNearest1D", "UpsampleNearest2D", "Col2Im"),
    *("UpsampleNearest3D", "UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleBicubic2D"),
    *("Convolution", "MkldnnConvolution", "CudnnConvolution", "NativeGroupNorm"),
    *("ReflectionPad1D", "ReflectionPad2D", "ReplicationPad1D", "ReplicationPad2D"),
    *("PixelShuffle", "PixelUnshuffle", "ChannelShuffle"),
)
_OWN = ("oracle_nll", "text_distance")
_ATTENTION = ("FlashAttention", "FlashAttentionForCpu", "EfficientAttention", "CudnnAttention")


def _numbered(names: Iterable[str]) -> list[str]:
    return [f"{name}Backward{n}" for name in names for n in range(6)]


CARRY: dict[str, Carry] = {
    **dict.fromkeys(_numbered(_ENTRYWISE), _entrywise),
    "torch::autograd::CopyBackwards": _entrywise,
    "FastdgNoteBackward": _entrywise,
    **dict.fromkeys(_numbered(_REDUCED), _reduced),
    **dict.fromkeys(_numbered(_VIEWS), _viewed),
    **dict.fromkeys(_numbered(_FIRST), _mixing(_but_first)),
    **dict.fromkeys(
        _numbered(f"ScaledDotProduct{name}" for name in _ATTENTION), _mixing(_but_first, (0, 1, 2))
    ),
    **dict.fromkeys(_numbered(["GridSampler2D", "GridSampler3D"]), _mixing(_but_first, (0, 1))),
    **dict.fromkeys(
        _numbered(["ThnnFusedLstmCell", "ThnnFusedGruCell"]), _mixing(_but_first, (0, 1, 2))
    ),
    **dict.fromkeys(
        (
            f"GeneratedBackwardFor_fastdg_{op}_defaultBackward"
            for op in ("oracle_nll", "text_distance")
        ),
        _mixing(_but_first, (0, 1)),
    ),
    **dict.fromkeys(
        _numbered(["Softmax", "SafeSoftmax", "LogSoftmax", "Cumsum", "Glu"]), _mixing(_saved_dim)
    ),
    **dict.fromkeys(_numbered(["NativeLayerNorm", "FusedRmsNorm"]), _mixing(_normalized)),
    **dict.fromkeys(_numbered(["NativeBatchNorm", "CudnnBatchNorm"]), _batch_norm),
    **dict.fromkeys(_numbered(["NllLoss", "NllLoss2D"]), _classes),
    "MmBackward0": _product(0, 1),
    "BmmBackward0": _product(0, 1),
    "AddmmBackward0": _product(1, 2),
    "BaddbmmBackward0": _product(1, 2),
    "MvBackward0": _matrix_vector,
    "AddmvBackward0": _matrix_vector,
    "TBackward0": lambda node, nr, ids, out, slot, shape: ids.t(),
    "TransposeBackward0": _transposed,
    "PermuteBackward0": _permuted,
    "SliceBackward0": _sliced,
    "SelectBackward0": _selected,
    "UnbindBackward0": _unbound,
    "SplitBackward0": _split,
    "SplitWithSizesBackward0": _split_with_sizes,
    "CatBackward0": _joined,
    "StackBackward0": _stacked,
    "FlipBackward0": _flipped,
    "RollBackward0": _rolled,
    "ConstantPadNdBackward0": _padded,
    "DiagonalBackward0": _diagonal,
}
