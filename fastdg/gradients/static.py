"""Whether the rows of two graphs of one signature belong to the same samples.

A map of rows to samples may be remembered only if nothing above the rows chooses or mixes them by
values, which a signature does not show. Operations that keep rows apart by structure are listed
here; whatever is not listed has to be probed in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.autograd.graph import Node

from .graph import Graph, output_shapes, signed
from .layout import lead
from .provenance import Found, Output, Owner

# Each entry of the result comes from entries whose places do not depend on values
_ENTRYWISE = (
    *("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Addcmul", "Addcdiv", "Lerp", "Where", "Pow"),
    *("Relu", "Gelu", "Silu", "Mish", "Tanh", "Sigmoid", "Softplus", "Elu", "Celu", "Selu"),
    *("LeakyRelu", "Hardtanh", "Hardswish", "Hardsigmoid", "LogSigmoid", "Threshold", "Prelu"),
    *("RreluWithNoise", "Softshrink", "Hardshrink", "Exp", "Exp2", "Expm1", "Log", "Log1P", "Log2"),
    *("Sqrt", "Rsqrt", "Reciprocal", "Square", "Abs", "Sgn", "Sin", "Cos", "Erf", "Clamp", "Xlogy"),
    *("ClampMin", "ClampMax", "Maximum", "Minimum", "MaskedFill", "NativeDropout", "FusedDropout"),
    *("BinaryCrossEntropyWithLogits", "BinaryCrossEntropy", "MseLoss", "SmoothL1Loss", "HuberLoss"),
    *("Logsumexp", "Norm", "LinalgVectorNorm", "Sum", "Mean", "Var", "VarMean", "Std", "StdMean"),
    *("Amax", "Amin", "Max", "Min", "Prod", "NllLoss", "NllLoss2D", "Embedding", "SoftMarginLoss"),
    *("T", "View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Unsqueeze", "Squeeze"),
    *("Expand", "ToCopy", "Alias", "Clone", "Slice", "Select", "Split", "SplitWithSizes", "Unbind"),
    *("Stack", "AsStrided", "Movedim", "Flip", "Roll", "Repeat", "Unfold", "UnfoldBackward"),
    *("ConstantPadNd", "Diagonal", "Squeeze", "Narrow", "Copy", "CopySlices", "AsStridedScatter"),
    *("ReflectionPad1D", "ReflectionPad2D", "ReplicationPad1D", "ReplicationPad2D", "GluBackward"),
    *("Glu", "PixelShuffle", "PixelUnshuffle", "ViewAsReal", "ViewAsComplex", "Triu", "Tril"),
)
# Everything but dimension 0 may be mixed
_BATCHED = (
    *("Convolution", "MkldnnConvolution", "CudnnConvolution", "NativeGroupNorm", "AvgPool2D"),
    *("AvgPool3D", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "MkldnnMaxPool2D", "MaxPool2D"),
    *("AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MkldnnAdaptiveAvgPool2D", "AdaptiveMaxPool2D"),
    *("UpsampleNearest2D", "UpsampleBilinear2D", "UpsampleBicubic2D", "UpsampleNearest1D"),
    *("UpsampleLinear1D", "GridSampler2D", "Bmm", "Baddbmm", "ScaledDotProductFlashAttention"),
    *("ScaledDotProductFlashAttentionForCpu", "ScaledDotProductEfficientAttention", "Im2Col"),
    *("ScaledDotProductCudnnAttention", "ThnnFusedLstmCell", "ThnnFusedGruCell", "Col2Im"),
    *("NativeBatchNorm", "CudnnBatchNorm", "AdaptiveMaxPool1D", "MaxPool1DWithIndices"),
)


def _numbered(names: Iterable[str]) -> frozenset[str]:
    return frozenset(f"{name}Backward{n}" for name in names for n in range(4))


ENTRYWISE = _numbered(_ENTRYWISE) | {
    "torch::autograd::CopySlices",
    "torch::autograd::CopyBackwards",
    "FastdgNoteBackward",
    "GeneratedBackwardFor_fastdg_oracle_nll_defaultBackward",
    "GeneratedBackwardFor_fastdg_text_distance_defaultBackward",
}
BATCHED = _numbered(_BATCHED)


def _last(node: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (len(shape) - 1,)


def _dim(node: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (signed(node._saved_dim) % len(shape),)


def _normalized(node: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(shape) - len(node._saved_normalized_shape), len(shape)))


# Operation -> the dimensions of the result along which samples must not change
_MIXES: dict[str, Callable[[Any, tuple[int, ...]], tuple[int, ...]]] = {
    **dict.fromkeys(BATCHED, lambda node, shape: tuple(range(1, len(shape)))),
    "SoftmaxBackward0": _dim,
    "LogSoftmaxBackward0": _dim,
    "CumsumBackward0": _dim,
    "NativeLayerNormBackward0": _normalized,
    "FusedRmsNormBackward0": _normalized,
    "AddmmBackward0": _last,
    "MmBackward0": _last,
    "MvBackward0": lambda node, shape: (),
}
# Which input of a matrix product may hold samples, whose rows then stay apart
_ROWS = {"AddmmBackward0": (0, 1), "MmBackward0": (0,), "MvBackward0": (0,)}


def watched(graph: Graph, uses: Iterable[Node]) -> list[Output] | None:
    """The outputs above ``uses`` whose owners decide; None if an operation is not listed."""
    uses = list(uses)
    outputs: list[Output] = []
    for node in dict.fromkeys([*graph.above(uses), *uses]):
        name = node.name()
        if name in _MIXES or name == "CatBackward0":
            outputs.append(Output(node, 0))
        elif name not in ENTRYWISE and node not in uses:
            return None
    return outputs


def structural(graph: Graph, uses: Iterable[Node], outputs: list[Output], found: Found) -> bool:
    """Whether samples are kept apart by structure alone at ``outputs``."""
    uses = list(uses)
    carrying = {*graph.above(uses), *uses}
    for out in outputs:
        owner, shape = found.get(out), output_shapes(out.node)[out.nr]
        if owner is None or shape is None:
            continue
        if not isinstance(owner, Owner):
            return False
        below = out.node.next_functions
        slots = [s for s, (child, _) in enumerate(below) if child in carrying]
        if not slots:
            continue  # its inputs are shared, and a rule or its own backward serves them
        name = out.node.name()
        if name == "CatBackward0":
            dims = _dim(out.node, shape)
            if all(child is not None for child, _ in below):
                continue
        else:
            dims = _MIXES[name](out.node, shape)
        if any(slot not in _ROWS.get(name, slots) for slot in slots):
            return False
        if lead(owner.ids, shape, [d for d in range(len(shape)) if d not in dims]) is None:
            return False
    return True
