"""Autograd's errors, reworded to name the argument and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class in_words:
    """Context in which autograd's errors are reworded; other errors pass through.

    Args:
        names: returns the names of the parameters in question.
    """

    def __init__(self, names: Callable[[], Sequence[str]] = tuple) -> None:
        self.names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            worded = _worded(str(error), self.names())
            if worded is not None:
                raise worded from error


def _worded(text: str, names: Sequence[str]) -> RuntimeError | None:
    if "after they have already been freed" in text:
        return RuntimeError(
            "losses: their graph was freed by an earlier backward. Pass retain_graph=True there, "
            "or run the model again."
        )
    if "modified by an inplace operation" in text:
        which = text.partition("inplace operation: ")[2].partition(". Hint")[0]
        of = f" of {listed(names)}" if names else ""
        return RuntimeError(
            f"losses: a tensor that the backward{of} needs was changed in place after the "
            f"operation that reads it ({which}). Make the change out of place, such as x = x + y "
            "for x += y, or call x.clone() before it."
        )
    if "donated buffers" in text:
        return RuntimeError(
            "losses: a compiled part of the model frees its saved tensors in the first backward. "
            "Set torch._functorch.config.donated_buffer = False before compiling."
        )
    if "heckpoint" in text and "grad()" in text:
        return reentrant(names)
    return None


def reentrant(names: Sequence[str]) -> RuntimeError:
    """Return the error for parameters that a reentrant checkpoint hides."""
    which = f" ({listed(names)})" if names else ""
    return RuntimeError(
        f"params: torch.utils.checkpoint with use_reentrant=True hides its parameters{which} from "
        "the graph of the losses. Pass use_reentrant=False, or select parameters outside the "
        "checkpoint (params='head', or a list of names)."
    )


def listed(names: Sequence[str]) -> str:
    """List the first three names, and the number of others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def not_a_tensor(losses: Any) -> TypeError:
    """Return the error for losses that are no tensor."""
    text = f"losses: expected a tensor (N,), got {type(losses).__name__}."
    if isinstance(losses, Mapping):
        text += " Pass those of several tasks to opt.backward as a list, list(losses.values())."
    return TypeError(text)
