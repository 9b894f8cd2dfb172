"""The tape of a statistic: the parameters whose gradients it describes, as users name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..gradients.sharded import leaf_of
from ..gradients.tape import Tape
from ..selection import Selection, listed, select

Params = nn.Module | Optimizer | Tape | Tensor | Iterable[Tensor] | Mapping[str, Tensor]


@contextmanager
def record(model: nn.Module, params: Selection = "all", *, check: bool = True) -> Iterator[Tape]:
    """Name the parameters whose gradients the statistics describe.

    Args:
        model: the module whose parameters are meant.
        params: ``"head"`` (the parameters of the last layer before the losses), ``"all"``, a list
            of names or parameters, or a predicate ``(name, parameter)``.
        check: has no effect any more: rows and samples are matched exactly.

    Nothing is recorded: the graph of the losses holds all that the statistics need. The functions
    take ``params=model`` just as well.

    Statistics run backward from ``losses.sum()``: hooks on activations (``tensor.register_hook``)
    see N times the gradient that ``losses.mean()`` gives them.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> with fastdg.record(model) as tape:
        ...     losses = F.cross_entropy(model(x), y, reduction="none")
        >>> fastdg.domain_moments(tape, losses, domains).variance["0.weight"]  # (D, O, I)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected an nn.Module, got {type(model).__name__}. Pass the whole network."
        )
    named = dict(model.named_parameters())
    if not any(p.requires_grad for p in named.values()):
        raise ValueError(
            "model: expected a parameter that requires a gradient, got none. Unfreeze one with "
            "requires_grad_()."
        )
    if not callable(params):
        params = listed(params) if isinstance(params, Iterable) else params
        select(params, named)
    yield Tape({p: name for name, p in named.items()}, params, leaf_of(model.modules))


def tape_of(params: Any) -> Tape:
    """Return the parameters that ``params`` names.

    Args:
        params: a model, an optimizer (a wrapper of fastdg among them), a tape, one parameter, a
            list of parameters, or a mapping from names to parameters.

    Raises:
        TypeError: ``params`` is something else.
        ValueError: it has no parameter that requires a gradient.
    """
    if isinstance(params, Tape):
        return params
    if isinstance(tape := getattr(params, "tape", None), Tape):
        return tape
    modules: Callable[[], Iterable[nn.Module]] = tuple
    named: dict[str, Tensor] = {}
    if isinstance(params, nn.Module):
        named, modules = dict(params.named_parameters()), params.modules
    elif isinstance(params, Optimizer):
        for g, group in enumerate(params.param_groups):
            known = group.get("param_names") or []
            for k, p in enumerate(group["params"]):
                named[known[k] if k < len(known) else f"param_groups[{g}][{k}]"] = p
    elif isinstance(params, Mapping):
        named = dict(params)
    elif isinstance(params, Iterable):
        items = [params] if isinstance(params, Tensor) else list(params)
        named = {f"params[{k}]": p for k, p in enumerate(items)}
    if (not named and not isinstance(params, (nn.Module, Iterable))) or any(
        not isinstance(p, Tensor) for p in named.values()
    ):
        raise TypeError(
            "params: expected a model, an optimizer, a tape, a parameter, a list of parameters or "
            f"a mapping from names to them, got {type(params).__name__}. Pass one of these."
        )
    if not any(p.requires_grad for p in named.values()):
        raise ValueError(
            "params: expected a parameter that requires a gradient, got none. Unfreeze one with "
            "requires_grad_()."
        )
    return Tape({p: name for name, p in named.items()}, "all", leaf_of(modules))


def tape_and_tensors(given: Sequence[Any], params: Any, wanted: int) -> tuple[Any, ...]:
    """Return ``(tape, losses, ...)`` from ``(tape, losses, ...)`` or ``(losses, ..., params=)``."""
    first, *others = [x for x in given if x is not None] or [None]
    call = "Call it with " + ("losses", "losses, domains")[wanted - 1] + ", params=model."
    if params is not None:
        if isinstance(first, Tape):
            raise TypeError("params: expected either a tape or params=, got both. Leave one out.")
        tape, rest = tape_of(params), [first, *others]
    elif isinstance(first, Tape):
        tape, rest = first, others
    elif isinstance(first, Tensor):
        named = next((type(x).__name__ for x in others if not isinstance(x, Tensor)), None)
        got = f"a {named} without the name params" if named else "none"
        raise TypeError(f"params: expected a model, an optimizer or parameters, got {got}. {call}")
    else:
        raise TypeError(
            f"tape: expected a tape or losses, got {type(first).__name__}. Pass params=model, the "
            "tape of `with fastdg.record(model) as tape:`, or a wrapper's opt.tape."
        )
    if len(rest) != wanted:
        if len(rest) > wanted:
            raise TypeError(f"domains: expected none, since each sample counts alone. {call}")
        raise TypeError(f"domains: expected the domain of each sample (N,), got none. {call}")
    return (tape, *rest)
