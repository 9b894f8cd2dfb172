"""The output of a module in the forward that losses come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .._torch import in_backward
from ..dtypes import to_statistics_dtype
from .graph_notes import Seen, found, hook_on, mark, recording


@dataclass
class Forward:
    """A forward of the module.

    Attributes:
        output: the result.
        seen: the result, if it has a graph.
        token: left on its graph node then, to tell losses that come from it.
    """

    output: Any
    seen: Seen | None = None
    token: object = field(default_factory=object)


class ModuleOutput:
    """Holds the output of a module's last forward until the losses of that come.

    Args:
        module: it, which is hooked for as long as this lives.
        wrapper: whose it is, in messages.
    """

    def __init__(self, module: nn.Module, wrapper: str) -> None:
        self.module, self.name, self.wrapper = module, type(module).__name__, wrapper
        self.last: Forward | None = None  # the one that waits for its backward
        hook_on(module.register_forward_hook, self, "_see")

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # In a backward it is a checkpoint that runs the module again
        if not recording() or in_backward():
            return
        self.last = Forward(output)
        if isinstance(output, Tensor) and output.requires_grad:
            self.last.seen = Seen.now(output)
            mark(output, self, self.last.token)

    def of(self, losses: Tensor, size: int) -> Tensor:
        """The output ``[N, size]`` in the forward of ``losses``, in the dtype of statistics.

        Raises:
            RuntimeError: the losses do not come from the last forward, and from it alone; the
                output was changed in place.
            ValueError: it has another shape.
        """
        forward, self.last = self.last, None
        name = self.name
        if forward is None:
            raise RuntimeError(
                f"embedding: the module {name} has not run, with gradients enabled, since the last "
                "backward; run the model that it belongs to, once for each backward (under "
                "activation checkpointing with use_reentrant=False: the reentrant kind runs it "
                "without gradients)"
            )
        output = forward.output
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] != size:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"embedding: expected that the module {name} gives a tensor [N, {size}], as wide "
                f"as the texts' embeddings, got {got}"
            )
        if len(output) != len(losses):
            raise ValueError(
                f"losses: expected one for each of the {len(output)} embeddings of the last "
                f"forward, got {len(losses)}"
            )
        if len(known := found(losses, self)) > 1:
            raise RuntimeError(
                f"losses: {len(known)} forwards of the module {name} lead to them, and "
                f"{self.wrapper} would know the embeddings of the last only; call backward for "
                "each forward (with final=False for all but the last)"
            )
        if known and forward.token not in known:
            raise RuntimeError(
                f"losses: they come from an earlier forward of the module {name}, not the last, "
                "whose embeddings would be taken for theirs; call backward (with final=False, if "
                "more are to come) before the model runs again"
            )
        if forward.seen is not None and forward.seen.changed():
            raise RuntimeError(
                f"embedding: the output of the module {name} is changed in place after it (an "
                "activation with inplace=True, or +=); name the module that does so in its place, "
                "or make that operation out of place"
            )
        return to_statistics_dtype(output)
