"""An operation's backward that runs as one operation and gets a derivative of ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..._torch import is_plain, register_first_hook
from ..reading import unpack_hook

Gradients = tuple[Tensor | None, ...]


class OwnDerivative(ABC):
    """Hooks of one node in a differentiable backward.

    The node runs with grad mode off, and its input gradient is replaced by one with a derivative
    that costs less than the derivative of autograd.

    Args:
        node: the operation.
    """

    def __init__(self, node: Any) -> None:
        self.node = node
        self.runs = False

    @abstractmethod
    def operands(self) -> Sequence[Tensor | None]:
        """Return the saved tensors that `derived` uses."""

    @abstractmethod
    def derived(self, found: Sequence[Tensor | None], delta: Tensor) -> Gradients:
        """Return ``found``, the node's gradients by its inputs, with derivatives."""

    def serves(self) -> bool:
        """Whether the node gets our derivative; else autograd has to do it."""
        node: Node = self.node
        return node.next_functions[0][0] is not None and unpack_hook(node) is None

    def register(self) -> list[Any]:
        """Register the hooks if they serve; returns their handles."""
        node: Node = self.node
        if not self.serves():
            return []
        return [node.register_prehook(self._before), register_first_hook(node, self._after)]

    def _before(self, grads: Sequence[Tensor | None]) -> None:
        tensors = (grads[0], *self.operands())
        self.runs = grads[0] is not None and all(t is None or is_plain(t) for t in tensors)
        if self.runs:
            torch.set_grad_enabled(False)  # for this node: autograd sets it anew for each

    def _after(
        self, found: Sequence[Tensor | None], grads: Sequence[Tensor | None]
    ) -> Gradients | None:
        if not self.runs:
            return None
        torch.set_grad_enabled(True)
        assert grads[0] is not None
        return self.derived(found, grads[0])
