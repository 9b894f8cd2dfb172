"""Derivatives of operations' backwards that cost less than those of autograd."""

from .base import OwnDerivative
from .convolution import ConvolutionBackward
from .norm import NormBackward

__all__ = ["ConvolutionBackward", "NormBackward", "OwnDerivative"]
