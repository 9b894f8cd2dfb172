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
    """A predicate on (name, parameter) from what the user passed as ``params``."""
    if isinstance(params, str):
        if params not in ("head", "all"):
            like = f"; for that parameter alone: [{params!r}]" if params in named else ""
            raise ValueError(
                "params: expected 'head', 'all', a list of names or parameters, or a predicate, "
                f"got {params!r}{like}"
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
                    f"params: the predicate looks at names ({error}), and this optimizer knows "
                    "none (its name is None): give model=, or the optimizer "
                    "model.named_parameters()"
                ) from error

        return selected
    if not isinstance(params, Iterable):
        raise TypeError(
            "params: expected 'head', 'all', a list of names or parameters, or a predicate, "
            f"got {type(params).__name__}"
        )
    ids = {id(p): name for name, p in named.items()}
    names: set[str] = set()
    for item in [params] if isinstance(params, Tensor) else params:
        if isinstance(item, str):
            if item not in named:
                near = difflib.get_close_matches(item, named, n=3, cutoff=0.0)
                raise ValueError(f"params: no parameter is called {item!r}; nearest: {near}")
            names.add(item)
        elif isinstance(item, Tensor):
            if id(item) not in ids:
                raise ValueError(
                    f"params: a tensor of shape {tuple(item.shape)} is not one of the tracked "
                    "parameters (those of the model or the optimizer; a copy or a .data of one is "
                    "not it)"
                )
            names.add(ids[id(item)])
        else:
            raise TypeError(f"params: expected names or parameters, got {type(item).__name__}")
    if not names:
        raise ValueError("params: expected at least one name or parameter, got an empty list")
    return lambda name, p: name in names


def listed(params: Selection) -> Selection:
    """``params`` so that it can be read again and again; one tensor is a list of one."""
    if isinstance(params, nn.Module):
        raise TypeError(
            "params: expected 'head', 'all', a list of names or parameters, or a predicate, got a "
            f"module; pass list(module.parameters()) of that {type(params).__name__}"
        )
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, str) or callable(params) or not isinstance(params, Iterable):
        return params
    return list(params)
