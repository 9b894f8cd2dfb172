"""The output of a module in the forward of some losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .._torch import in_backward
from ..dtypes import to_statistics_dtype
from .graph_notes import Seen, attach, attached, hook_on, recording


@dataclass
class Forward:
    """A forward of the module.

    Attributes:
        output: result of the module.
        seen: the result and its version, if it has a graph.
        token: attached to the result's graph node, to recognise losses of this forward.
    """

    output: Any
    seen: Seen | None = None
    token: object = field(default_factory=object)


class ModuleOutput:
    """Holds the output of a module's last forward until the backward of its losses.

    Args:
        module: the module, with a hook for the lifetime of this object.
        wrapper: name of the wrapper, for messages.
    """

    def __init__(self, module: nn.Module, wrapper: str) -> None:
        self.module, self.name, self.wrapper = module, type(module).__name__, wrapper
        self.last: Forward | None = None  # waits for its backward
        hook_on(module.register_forward_hook, self, "_on_forward")

    def _on_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # In a backward, an activation checkpoint runs the module again
        if not recording() or in_backward():
            return
        self.last = Forward(output)
        if isinstance(output, Tensor) and output.requires_grad:
            self.last.seen = Seen.now(output)
            attach(output, self, self.last.token)

    def of(self, losses: Tensor, size: int) -> Tensor:
        """Return the output ``[N, size]`` in the forward of ``losses``, in the statistics' dtype.

        Raises:
            RuntimeError: the losses come from another forward than the last, or from several; the
                output was changed in place.
            ValueError: the output has another shape.
        """
        forward, self.last = self.last, None
        name = self.name
        if forward is None:
            raise RuntimeError(
                f"embedding: the module {name} has not run with gradients enabled since the last "
                "backward. Run its model once for each backward (with activation checkpointing, "
                "pass use_reentrant=False, as the reentrant kind disables gradients)."
            )
        output = forward.output
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] != size:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"embedding: the module {name} must return a tensor [N, {size}], as wide as the "
                f"texts' embeddings, got {got}."
            )
        if len(output) != len(losses):
            raise ValueError(
                f"losses: expected one for each of the {len(output)} embeddings of the last "
                f"forward, got {len(losses)}."
            )
        if len(known := attached(losses, self)) > 1:
            raise RuntimeError(
                f"losses: they come from {len(known)} forwards of the module {name}, but "
                f"{self.wrapper} has the embeddings of the last only. Call backward for each "
                "forward (with final=False for all except the last)."
            )
        if known and forward.token not in known:
            raise RuntimeError(
                f"losses: they come from an earlier forward of the module {name}, but "
                f"{self.wrapper} has the embeddings of the last. Call backward (with final=False "
                "if more follow) before the model runs again."
            )
        if forward.seen is not None and forward.seen.changed():
            raise RuntimeError(
                f"embedding: the output of the module {name} was changed in place (by an "
                "activation with inplace=True, or +=). Pass the module that does so as embedding, "
                "or make that operation out of place."
            )
        return to_statistics_dtype(output)
