"""Derivatives of operations' backwards that cost less than those of autograd."""

from ..rules.norm import KINDS
from .activation import ActivationBackward
from .attention import AttentionBackward
from .base import OwnDerivative
from .convolution import ConvolutionBackward
from .norm import NormBackward
from .piecewise import HardsigmoidBackward, ReluBackward

# Node -> its hooks; a norm's also need the rules of its parameters
OWN: dict[str, type[OwnDerivative]] = {
    "ConvolutionBackward0": ConvolutionBackward,
    "GeluBackward0": ActivationBackward,
    "HardsigmoidBackward0": HardsigmoidBackward,
    "ReluBackward0": ReluBackward,
    "SiluBackward0": ActivationBackward,
    "ScaledDotProductCudnnAttentionBackward0": AttentionBackward,
    "ScaledDotProductEfficientAttentionBackward0": AttentionBackward,
    "ScaledDotProductFlashAttentionBackward0": AttentionBackward,
    "ScaledDotProductFlashAttentionForCpuBackward0": AttentionBackward,
}
DERIVED = {*KINDS, *OWN}

__all__ = ["DERIVED", "OWN", "NormBackward", "OwnDerivative"]
