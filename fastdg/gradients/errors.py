"""Autograd's errors, in words that name the argument and say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def in_words(names: Callable[[], Sequence[str]] = tuple) -> Iterator[None]:
    """Where autograd raises inside, raise in words of ours; errors of another kind go through.

    Args:
        names: of the parameters that are asked for when the error comes.
    """
    try:
        yield
    except RuntimeError as error:
        worded = _worded(str(error), names())
        if worded is None:
            raise
        raise worded from error


def _worded(text: str, names: Sequence[str]) -> RuntimeError | None:
    if "after they have already been freed" in text:
        return RuntimeError(
            "losses: this graph was freed by an earlier backward; pass retain_graph=True there, or "
            "run the model again"
        )
    if "modified by an inplace operation" in text:
        which = text.partition("inplace operation: ")[2].partition(". Hint")[0]
        of = f" of {listed(names)}" if names else ""
        return RuntimeError(
            f"losses: a tensor that the backward{of} needs was changed in place after the "
            f"operation that reads it ({which}). Make that change out of place, as by x = x + y "
            "for x += y, or x.clone() before it"
        )
    if "donated buffers" in text:
        return RuntimeError(
            "losses: a part of the model that torch.compile has compiled frees what it saved in "
            "its first backward. Set torch._functorch.config.donated_buffer = False before it is "
            "compiled"
        )
    if "heckpoint" in text and "grad()" in text:
        return reentrant(names)
    return None


def reentrant(names: Sequence[str]) -> RuntimeError:
    """What to raise where a reentrant checkpoint hides parameters."""
    which = f" ({listed(names)})" if names else ""
    return RuntimeError(
        f"params: torch.utils.checkpoint with use_reentrant=True hides the parameters{which} that "
        "it runs from the graph of the losses; pass use_reentrant=False, or ask for parameters "
        "above it (params='head', or a list of the others)"
    )


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
