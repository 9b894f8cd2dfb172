"""The names of graph nodes, and what they save, are torch's own and may change with its version.

Each name in the tables of `fastdg.gradients` is built here with the torch that is installed: run
these with the oldest torch that fastdg claims, and with the newest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastdg
from fastdg.gradients import checkpoints, graph, heads, plan, release
from fastdg.gradients.ownership import carry
from fastdg.gradients.rules import registry as rules

Built = Callable[[], Tensor]


def t(*sizes: int) -> Tensor:
    """Positive numbers below one, the result of an operation, so that nodes lie below."""
    return torch.rand(sizes, requires_grad=True) * 0.9 + 0.05


def attention(backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(t(1, 2, 3, 4) for _ in range(3)))


def script() -> Tensor:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    made = [scripted(t(2, 3)) for _ in range(3)]  # the executor looks at the first runs
    return made[-1]


def compiled() -> Tensor:
    torch._dynamo.reset()  # after many graphs of one function it would run eagerly
    return torch.compile(torch.sin, backend="aot_eager")(torch.rand(3, requires_grad=True))


ALONE = {  # of one tensor
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Atan": torch.atan,
    "Celu": F.celu, "Clamp": lambda x: x.clamp(x.detach(), x.detach()),
    "ClampMax": lambda x: x.clamp_max(0.5), "ClampMin": lambda x: x.clamp_min(0.5),
    "Clone": torch.clone, "Cos": torch.cos,
    "Cosh": torch.cosh, "Elu": F.elu, "Erf": torch.erf, "Erfc": torch.erfc, "Exp": torch.exp,
    "Exp2": torch.exp2, "Expm1": torch.expm1, "Floor": torch.floor, "Frac": torch.frac,
    "Gelu": F.gelu, "Hardshrink": F.hardshrink, "Hardsigmoid": F.hardsigmoid,
    "Hardswish": F.hardswish, "Hardtanh": F.hardtanh, "LeakyRelu": F.leaky_relu, "Log": torch.log,
    "Log10": torch.log10, "Log1P": torch.log1p, "Log2": torch.log2, "LogSigmoid": F.logsigmoid,
    "Mish": F.mish, "NativeDropout": lambda x: torch.native_dropout(x, 0.5, True),
    "Neg": torch.neg, "Pow": lambda x: x.pow(3), "Reciprocal": torch.reciprocal, "Relu": F.relu,
    "Round": torch.round, "RreluWithNoise": lambda x: F.rrelu(x, training=True),
    "Rsqrt": torch.rsqrt, "Sgn": torch.sgn, "Sigmoid": torch.sigmoid, "Silu": F.silu,
    "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softshrink": F.softshrink,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh, "Tril": torch.tril,
    "Triu": torch.triu, "Threshold": lambda x: F.threshold(x, 0.5, 0.0), "T": torch.t,
    "Alias": lambda x: torch.ops.aten.alias(x), "Diagonal": lambda x: x.diagonal(0, 0, 1),
    "ToCopy": lambda x: x.to(torch.float32), "Rsub": lambda x: torch.rsub(x, torch.ones(3)),
    "Flip": lambda x: x.flip(0), "Roll": lambda x: x.roll(1, 0), "Slice": lambda x: x[1:],
    "Select": lambda x: x[0], "Unbind": torch.unbind, "Split": lambda x: x.split(1),
    "SplitWithSizes": lambda x: x.split([1, 2]), "Permute": lambda x: x.permute(1, 0),
    "Transpose": lambda x: x.transpose(0, 1), "ConstantPadNd": lambda x: F.pad(x, (1, 0)),
    "Expand": lambda x: x.expand(2, 3, 3), "Repeat": lambda x: x.repeat(2, 1),
    "View": lambda x: x.view(9), "UnsafeView": lambda x: torch.ops.aten._unsafe_view(x, [9]),
    "ReshapeAlias": lambda x: torch.ops.aten._reshape_alias(x, [9], [1]),
    "Unsqueeze": lambda x: x.unsqueeze(0), "AsStrided": lambda x: x.as_strided((2, 2), (3, 1)),
    "Softmax": lambda x: x.softmax(1), "LogSoftmax": lambda x: x.log_softmax(1),
    "SafeSoftmax": lambda x: torch.ops.aten._safe_softmax(x, 1),
    "Cumsum": lambda x: x.cumsum(1), "Glu": lambda x: F.glu(t(3, 4)),
    "Amax": lambda x: x.amax(1), "Amin": lambda x: x.amin(1), "Dot": lambda x: x[0].dot(x[1]),
    "Logsumexp": lambda x: x.logsumexp(1), "Var": lambda x: x.var(1), "Std": lambda x: x.std(1),
    "LinalgVectorNorm": lambda x: torch.linalg.vector_norm(x, 2, 1),
    "VarMean": lambda x: torch.var_mean(x, 1), "StdMean": lambda x: torch.std_mean(x, 1),
    "MaskedFill": lambda x: x.masked_fill(x > 0.5, 0.0),
}  # fmt: skip
TWO = {  # of two tensors of one shape
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div,
    "Addcmul": lambda a, b: torch.addcmul(a, b, b), "Addcdiv": lambda a, b: torch.addcdiv(a, b, b),
    "Atan2": torch.atan2, "BinaryCrossEntropy": lambda a, b: F.binary_cross_entropy(a, b),
    "BinaryCrossEntropyWithLogits": lambda a, b: F.binary_cross_entropy_with_logits(a, b),
    "HuberLoss": F.huber_loss, "Lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "Maximum": torch.maximum, "Minimum": torch.minimum, "MseLoss": F.mse_loss,
    "SmoothL1Loss": F.smooth_l1_loss,
    "SoftMarginLoss": lambda a, b: F.soft_margin_loss(a, b.detach()),
    "Where": lambda a, b: torch.where(a > b, a, b), "Xlogy": torch.xlogy,
    "PreluKernel": lambda a, b: F.prelu(a, b[0]), "Mm": torch.mm, "Mv": lambda a, b: a @ b[0],
    "Addmm": lambda a, b: torch.addmm(a, a, b), "Addmv": lambda a, b: torch.addmv(b[0], a, b[1]),
    "Cat": lambda a, b: torch.cat([a, b]), "Stack": lambda a, b: torch.stack([a, b]),
}  # fmt: skip
IMAGES = {  # of ``[2, 4, 6, 6]``
    "AvgPool2D": lambda x: F.avg_pool2d(x, 2),
    "MaxPool2DWithIndices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "AdaptiveAvgPool2D": lambda x: F.adaptive_avg_pool2d(x, 2),
    "AdaptiveMaxPool2D": lambda x: F.adaptive_max_pool2d(x, 2),
    "Im2Col": lambda x: F.unfold(x, 2), "Col2Im": lambda x: F.fold(t(2, 4, 25), 6, 2),
    "UpsampleNearest2D": lambda x: F.interpolate(x, scale_factor=2),
    "UpsampleBilinear2D": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "UpsampleBicubic2D": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "Convolution": lambda x: F.conv2d(x, t(4, 4, 3, 3)),
    "NativeGroupNorm": lambda x: F.group_norm(x, 2),
    "ReflectionPad2D": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "ReplicationPad2D": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "PixelShuffle": lambda x: F.pixel_shuffle(x, 2),
    "PixelUnshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "ChannelShuffle": lambda x: F.channel_shuffle(x, 2),
    "GridSampler2D": lambda x: F.grid_sample(x, t(2, 3, 3, 2), align_corners=False),
    "NativeBatchNorm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "NllLoss2D": lambda x: F.nll_loss(x, torch.zeros(2, 6, 6, dtype=torch.int64)),
}  # fmt: skip
OTHERS: dict[str, Built] = {
    "AvgPool3D": lambda: F.avg_pool3d(t(1, 2, 4, 4, 4), 2),
    "MaxPool3DWithIndices": lambda: F.max_pool3d(t(1, 2, 4, 4, 4), 2),
    "AdaptiveAvgPool3D": lambda: F.adaptive_avg_pool3d(t(1, 2, 4, 4, 4), 2),
    "AdaptiveMaxPool3D": lambda: F.adaptive_max_pool3d(t(1, 2, 4, 4, 4), 2),
    "UpsampleNearest1D": lambda: F.interpolate(t(1, 2, 4), scale_factor=2),
    "UpsampleLinear1D": lambda: F.interpolate(t(1, 2, 4), scale_factor=2, mode="linear"),
    "UpsampleNearest3D": lambda: F.interpolate(t(1, 2, 4, 4, 4), scale_factor=2),
    "ReflectionPad1D": lambda: F.pad(t(1, 2, 4), (1, 1), mode="reflect"),
    "ReplicationPad1D": lambda: F.pad(t(1, 2, 4), (1, 1), mode="replicate"),
    "GridSampler3D": lambda: F.grid_sample(t(1, 2, 4, 4, 4), t(1, 2, 2, 2, 3), align_corners=False),
    "NativeLayerNorm": lambda: F.layer_norm(t(2, 3), (3,)),
    "Bmm": lambda: t(2, 3, 3).bmm(t(2, 3, 3)),
    "Baddbmm": lambda: torch.baddbmm(t(2, 3, 3), t(2, 3, 3), t(2, 3, 3)),
    "NllLoss": lambda: F.nll_loss(t(2, 3), torch.zeros(2, dtype=torch.int64)),
    "Embedding": lambda: F.embedding(torch.tensor([1, 0]), t(3, 4)),
    "EmbeddingBag": lambda: F.embedding_bag(torch.tensor([[1, 0]]), t(3, 4)),
    "ScaledDotProductFlashAttentionForCpu": lambda: attention(SDPBackend.FLASH_ATTENTION),
}
NODES: dict[str, Built] = {
    **{f"{name}Backward0": lambda f=f: f(t(3, 3)) for name, f in ALONE.items()},
    **{f"{name}Backward0": lambda f=f: f(t(3, 3), t(3, 3)) for name, f in TWO.items()},
    **{f"{name}Backward0": lambda f=f: f(t(2, 4, 6, 6)) for name, f in IMAGES.items()},
    **{f"{name}Backward0": built for name, built in OTHERS.items()},
    "SqueezeBackward0": lambda: t(1, 3, 1).squeeze(),
    "SqueezeBackward1": lambda: t(1, 3).squeeze(0),
    "SqueezeBackward2": lambda: t(1, 3, 1).squeeze((0, 2)),
    "ClampBackward1": lambda: t(3).clamp(0.1, 0.5),
    "RsubBackward1": lambda: torch.rsub(t(3), 1.0),
    "PowBackward1": lambda: t(3).pow(t(3)),
    "SumBackward0": lambda: t(3, 3).sum(),
    "SumBackward1": lambda: t(3, 3).sum(1),
    "MeanBackward0": lambda: t(3, 3).mean(),
    "MeanBackward1": lambda: t(3, 3).mean(1),
    "ProdBackward0": lambda: t(3, 3).prod(),
    "ProdBackward1": lambda: t(3, 3).prod(1),
    "MaxBackward0": lambda: t(3, 3).max(1)[0],
    "MaxBackward1": lambda: t(3, 3).max(),
    "MinBackward0": lambda: t(3, 3).min(1)[0],
    "MinBackward1": lambda: t(3, 3).min(),
    "MedianBackward0": lambda: t(3, 3).median(),
    "MedianBackward1": lambda: t(3, 3).median(1)[0],
    "NormBackward0": lambda: torch.ops.aten.norm(t(3, 3), 2),
    "NormBackward1": lambda: torch.ops.aten.norm(t(3, 3), 2, [1]),
    "NormBackward2": lambda: torch.ops.aten.norm(t(3, 3), 2, dtype=torch.float64),
    "NormBackward3": lambda: torch.ops.aten.norm(t(3, 3), 2, [1], False, dtype=torch.float64),
    "torch::autograd::CopyBackwards": lambda: torch.zeros(3).copy_(t(3)),
    "CheckpointFunctionBackward": lambda: checkpoint(torch.sin, t(3), use_reentrant=True),
    "CompiledFunctionBackward": compiled,
    "torch::jit::(anonymous namespace)::DifferentiableGraphBackward": script,
}
# What a CPU does not have, and what torch no longer makes but did, or does where it was built so
ELSEWHERE = ("Cudnn", "Mkldnn", "FusedDropout", "FusedRmsNorm", "ThnnFused", "MaxPool2DBackward")
ELSEWHERE += ("ScaledDotProductFlashAttentionB", "ScaledDotProductE", "ScaledDotProductC", "fastdg")

# Read of a node beside `graph._LAYOUT`
ATTENTION = ("query", "key", "value", "scale", "dropout_p", "is_causal")
READ: dict[str, tuple[str, ...]] = {
    "AddBackward0": ("alpha",),
    "SubBackward0": ("alpha",),
    "MulBackward0": ("self", "other"),
    "DivBackward0": ("self", "other"),
    "AddcmulBackward0": ("tensor1", "tensor2", "value"),
    "PreluKernelBackward0": ("self",),
    "WhereBackward0": ("condition",),
    "AddmmBackward0": ("mat1", "mat2", "alpha", "beta"),
    "MmBackward0": ("self", "mat2"),
    "BmmBackward0": ("self", "mat2"),
    "MvBackward0": ("self",),
    "ConvolutionBackward0": (
        *("input", "weight", "stride", "padding", "dilation", "transposed", "output_padding"),
        *("groups", "bias_sym_sizes_opt"),
    ),
    "LogSoftmaxBackward0": ("result",),
    "GeluBackward0": ("self", "approximate"),
    "ReluBackward0": ("result",),
    "SiluBackward0": ("self",),
    "ScaledDotProductFlashAttentionForCpuBackward0": (*ATTENTION, "attn_mask"),
    "ScaledDotProductFlashAttentionBackward0": ATTENTION,
    "ScaledDotProductEfficientAttentionBackward0": (*ATTENTION, "attn_bias"),
    "ScaledDotProductCudnnAttentionBackward0": (*ATTENTION, "attn_bias"),
    "BinaryCrossEntropyWithLogitsBackward0": ("self",),
    "EmbeddingBackward0": ("indices", "padding_idx", "scale_grad_by_freq", "sparse"),
    "EmbeddingBagBackward0": (
        *("indices", "offsets", "padding_idx", "result2", "per_sample_weights"),
        *("mode", "scale_grad_by_freq", "sparse"),
    ),
    "HardsigmoidBackward0": ("self",),
    "NativeLayerNormBackward0": ("input", "result1", "result2", "normalized_shape"),
    "NativeGroupNormBackward0": ("input", "result1", "result2"),
    "NativeBatchNormBackward0": ("input", "running_mean", "running_var", "eps", "training"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # which we do not use
@pytest.mark.parametrize("name", NODES)
def test_a_node_has_its_name_and_what_is_read_of_it(name: str) -> None:
    made = NODES[name]()
    node = (made if isinstance(made, Tensor) else made[0]).grad_fn
    assert node is not None
    assert node.name() == name
    read = (*graph._LAYOUT.get(name, ()), *(f"_saved_{of_it}" for of_it in READ.get(name, ())))
    missing = [attribute for attribute in read if not hasattr(node, attribute)]
    assert not missing
    shapes, dtypes = graph.output_shapes(node), graph.output_dtypes(node)
    assert len(shapes) == len(dtypes) >= 1
    assert node._sequence_nr() >= 0
    if name in READ and any(isinstance(getattr(node, a), Tensor) for a in read):
        assert release._raw_names(node)


@pytest.mark.parametrize("name", [name for name in READ if name.startswith("ScaledDotProduct")])
def test_attention_of_each_device_has_what_is_read_of_it(name: str) -> None:
    kind = getattr(torch._C._functions, name)
    assert not [of_it for of_it in READ[name] if not hasattr(kind, f"_saved_{of_it}")]


def test_every_name_of_the_tables_is_built() -> None:
    exact = {
        *(name for name, _ in rules.RULES if isinstance(name, str)),
        *(*heads._VALUES, *heads._ELEMENTWISE, *graph._LAYOUT, *graph._PRODUCTS),
        *(*rules.CASTS, *rules.RESHAPES, *plan.COPIES, checkpoints._NAME),
    }
    alike = {_family(name) for name in (*plan.MOVES, *carry.CARRY)}
    here = {name for name in exact - NODES.keys() if not name.startswith(ELSEWHERE)}
    assert not {name for name in here if "fastdg" not in name}
    missing = alike - {_family(name) for name in NODES}
    assert not {name for name in missing if not name.startswith(ELSEWHERE) and "astdg" not in name}


def _family(name: str) -> str:
    """Without its number: torch numbers the forms of an operation, in place or not."""
    return re.sub(r"\d+$", "", name)


def test_what_is_read_is_listed() -> None:
    """So that what a new rule reads is looked for here, too."""
    folder = Path(fastdg.__file__).parent
    found = {
        attribute
        for path in (*(folder / "gradients").rglob("*.py"), folder / "core" / "amp.py")
        for attribute in re.findall(r"_saved_[a-z]\w*", path.read_text(encoding="utf-8"))
    }
    listed = {f"_saved_{name}" for names in READ.values() for name in names}
    assert found == listed | {name for names in graph._LAYOUT.values() for name in names}
