"""Which parameters are asked for: the argument ``params``, and advice about it in messages."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

# A wrapper without params= gives its own advice in place of this one
LEAVE_OUT = "leave these parameters out (params='head', or a list of the others), or freeze them"
NAMES = (
    "For names in place of param_groups[...] pass model=model, or make the optimizer of "
    "model.named_parameters()"
)

Selection = str | Iterable[str | Tensor] | Callable[[str, Tensor], bool]


def select(params: Selection, named: Mapping[str, Tensor]) -> Callable[[str, Tensor], bool]:
    """Return a predicate on (name, parameter) for the user's ``params``."""
    if isinstance(params, str):
        if params not in ("head", "all"):
            like = f", for that parameter alone [{params!r}]" if params in named else ""
            raise ValueError(
                "params: expected 'head', 'all', a list of names or parameters, or a predicate, "
                f"got {params!r}. Pass one of these{like}."
            )
        return lambda name, p: True
    if callable(params):
        chosen = params

        def selected(name: str, p: Tensor) -> bool:
            if not name.startswith("param_groups["):
                return bool(chosen(name, p))
            try:
                return bool(chosen(None, p))  # type: ignore[arg-type]
            except (TypeError, AttributeError) as error:
                raise ValueError(
                    f"params: the predicate reads names ({error}), got None, since this optimizer "
                    "knows none. Pass model=model, or make the optimizer of "
                    "model.named_parameters()."
                ) from error

        return selected
    if not isinstance(params, Iterable):
        raise TypeError(
            "params: expected 'head', 'all', a list of names or parameters, or a predicate, "
            f"got {type(params).__name__}. Pass one of these."
        )
    ids = {id(p): name for name, p in named.items()}
    names: set[str] = set()
    for item in [params] if isinstance(params, Tensor) else params:
        if isinstance(item, str):
            if item not in named:
                near = difflib.get_close_matches(item, named, n=3, cutoff=0.0)
                raise ValueError(
                    f"params: expected names of parameters, got {item!r}. The nearest are {near}."
                )
            names.add(item)
        elif isinstance(item, Tensor):
            if id(item) not in ids:
                raise ValueError(
                    f"params: expected tracked parameters, got another tensor of shape "
                    f"{tuple(item.shape)}. Pass parameters of the model or the optimizer "
                    "themselves; a copy or a .data of one is another tensor."
                )
            names.add(ids[id(item)])
        else:
            raise TypeError(
                f"params: expected names or parameters, got {type(item).__name__}. Pass a list of "
                "these."
            )
    if not names:
        raise ValueError(
            "params: expected at least one name or parameter, got an empty list. Name one."
        )
    return lambda name, p: name in names


def listed(params: Selection) -> Selection:
    """Return ``params`` as a list that can be read again; one tensor becomes a list of one."""
    if isinstance(params, nn.Module):
        raise TypeError(
            "params: expected 'head', 'all', a list of names or parameters, or a predicate, got a "
            f"module. Pass list(module.parameters()) of that {type(params).__name__}."
        )
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, str) or callable(params) or not isinstance(params, Iterable):
        return params
    return list(params)
