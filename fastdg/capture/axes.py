"""Find the dimensions of samples and channels of a tensor, by the operations of a forward.

Equal sizes are ambiguous: (N, 16, 16) is 16 tokens of 16 channels or the reverse. So a dispatch
mode follows one forward. Samples begin in dimension 0 of the inputs, channels in the output of a
layer (of a convolution in dimension 1, of a linear layer in the last). Views regroup dimensions,
permutations move them, element-wise operations keep them. If two dimensions may have the channels
(a linear layer mixes tokens), the sum with an unambiguous branch decides; else nothing does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .._torch import TorchDispatchMode, pytree
from .axis_rules import (
    NORMS,
    RULES,
    N,
    channels_in,
    elementwise,
    normalised,
    size_of,
    tensors_of,
    unlabelled,
)


class Axes(TorchDispatchMode):
    """Follows samples and channels through one forward.

    Args:
        inputs: all inputs of the network. The first tensor, and each tensor of its length, has the
            samples in dimension 0.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        leaves = pytree.tree_leaves(inputs)
        boxes = [x for x in leaves if hasattr(x, "__dict__") and not isinstance(x, nn.Module)]
        inside = [vars(box) for box in boxes]  # fields of containers that pytree does not know
        tensors = list(tensors_of([leaves, pytree.tree_leaves(inside)]))
        self.samples = next((len(x) for x in tensors if x.dim()), 0)
        # Of tensors that depend on the inputs; all others depend on weights alone
        self._dims: Any = WeakTensorKeyDictionary()
        for x in tensors:
            dims = unlabelled(x.shape)
            if x.dim() and len(x) == self.samples:
                dims[0] = ((N, self.samples),)
            self._dims[x] = dims

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        call: dict[str, Any] = {}
        for i, argument in enumerate(func._schema.arguments):
            default = argument.default_value if argument.has_default_value() else None
            call[argument.name] = args[i] if i < len(args) else kwargs.get(argument.name, default)
        if any(x in self._dims for x in tensors_of(call.values())):
            self._follow(func, call, out)
        return out

    def _follow(self, func: Any, call: dict[str, Any], out: Any) -> None:
        """Record the dimensions of the outputs of ``func``."""
        name = func._schema.name.split("::")[1].rstrip("_")
        rule = RULES.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = elementwise
        elif any(norm in name for norm in NORMS):
            rule = normalised
        for x in tensors_of([out]):
            dims = rule(self._dims.get, call, x) if rule is not None else None
            if dims is None or [size_of(dim) for dim in dims] != list(x.shape):
                dims = unlabelled(x.shape)
            self._dims[x] = dims

    def channel(self, x: Tensor) -> int | None:
        """Return the dimension of the channels, if only one may have them."""
        if x.dim() == 2:
            return 1
        having = channels_in(self._dims.get(x) or ())
        return having.pop() if len(having) == 1 else None

    def sample(self, x: Tensor, channel: int) -> int | None:
        """Return the dimension of the samples: a labelled one, or the only one of their size."""
        dims = self._dims.get(x) or unlabelled(x.shape)
        fits = [d for d, n in enumerate(x.shape) if n == self.samples and d != channel % x.dim()]
        labels = [{label for label, n in dim if n > 1 or label == N} for dim in dims]
        seen = [d for d in fits if labels[d] == {N}]
        return next((found[0] for found in (seen, fits) if len(found) == 1), None)
