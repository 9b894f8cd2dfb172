"""State of a weighting between steps: seen to change, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import version_of

_OF_MODULES = vars(nn.Module()).keys() - {"training"}


def stamp(weighting: Any) -> Any:
    """Return a value that changes when a call changes the attributes of a weighting. It reads no
    tensor."""
    return [(path, _stamp(table[name])) for path, table, name in _places(weighting)]


def _stamp(x: Any) -> Any:
    if isinstance(x, Tensor):
        return id(x), version_of(x)
    if isinstance(x, torch.Generator):
        return bytes(x.get_state().numpy())
    if isinstance(x, (tuple, list)):
        return [_stamp(item) for item in x]
    if isinstance(x, dict):
        return [(key, _stamp(item)) for key, item in x.items()]
    return x if _is_value(x) else id(x)


def _places(
    thing: Any, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, MutableMapping[str, Any], str]]:
    """Yield path, table and name of each value in a weighting and in its attributes.

    This includes values that `_encoded` cannot encode.
    """
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (type, FunctionType, ModuleType)):
        return
    seen.add(id(thing))
    tables: list[MutableMapping[str, Any]] = [getattr(thing, "__dict__", {})]
    if isinstance(thing, nn.Module):
        tables += [thing._buffers, thing._parameters, thing._modules]
    for table in tables:
        for name, value in table.items():
            if isinstance(thing, nn.Module) and table is tables[0] and name in _OF_MODULES:
                continue
            if _is_value(value) or not (hasattr(value, "__dict__") or callable(value)):
                yield f"{path}{name}", table, name
            else:
                yield from _places(value, f"{path}{name}.", seen)


def _is_value(x: Any) -> bool:
    if isinstance(x, (tuple, list)):
        return all(map(_is_value, x))
    if isinstance(x, dict):
        return all(map(_is_value, [*x.keys(), *x.values()]))
    plain = (bool, int, float, str, Tensor, torch.dtype, torch.device, torch.Generator)
    return x is None or isinstance(x, plain)


def weighting_state(weighting: Any, home: torch.device) -> dict[str, Any]:
    """Return the state of the weighting in JSON's types, which every checkpoint format takes.

    Args:
        home: device of the parameters. Its tensors are loaded to the parameters' device at loading.
    """
    places = [place for place in _places(weighting) if _is_value(place[1][place[2]])]
    return {path: _encoded(table[name], home) for path, table, name in places}


def not_saved(weighting: Any) -> list[str]:
    """Return the attributes that `weighting_state` cannot save."""
    return [path for path, table, name in _places(weighting) if not _is_value(table[name])]


def load_weighting(weighting: Any, state: dict[str, Any], home: torch.device) -> None:
    """Load the `weighting_state` of another weighting of the same class."""
    for path, table, name in list(_places(weighting)):
        if path not in state:
            continue
        value = _decoded(state[path], home)
        before = table[name]
        if isinstance(before, nn.Parameter):
            before.data = value
        elif isinstance(before, torch.Generator):
            before.set_state(value)
        else:
            table[name] = value


def _encoded(x: Any, home: torch.device) -> Any:
    def place(device: torch.device) -> str:
        return "home" if device == home else str(device)

    if isinstance(x, Tensor):
        raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind, shape = _encoded(x.dtype, home)[1], list(x.shape)
        return ["tensor", kind, shape, place(x.device), raw.hex()]
    if isinstance(x, torch.dtype):
        return ["dtype", str(x).removeprefix("torch.")]
    if isinstance(x, torch.device):
        return ["device", place(x)]
    if isinstance(x, torch.Generator):
        return _encoded(x.get_state(), home)
    if isinstance(x, dict):
        return ["dict", [[_encoded(k, home), _encoded(v, home)] for k, v in x.items()]]
    if isinstance(x, (tuple, list)):
        return [type(x).__name__, [_encoded(item, home) for item in x]]
    return x


def _decoded(x: Any, home: torch.device) -> Any:
    if not isinstance(x, list):
        return x
    kind, *rest = x
    if kind == "tensor":
        dtype, shape, device, raw = rest
        flat = torch.frombuffer(bytearray.fromhex(raw) or bytearray(1), dtype=torch.uint8)
        flat = flat[: len(raw) // 2].clone().view(getattr(torch, dtype))
        return flat.reshape(shape).to(home if device == "home" else device)
    if kind == "dtype":
        return getattr(torch, rest[0])
    if kind == "device":
        return home if rest[0] == "home" else torch.device(rest[0])
    if kind == "dict":
        return {_decoded(k, home): _decoded(v, home) for k, v in rest[0]}
    items = [_decoded(item, home) for item in rest[0]]
    return items if kind == "list" else tuple(items)


def smallest_trace(weighting: Any) -> float:
    """Return the trace below which a TorchJD solver takes all gradients as zero; 0 without one."""
    names = {"norm_eps", "_norm_eps"}
    found = [table[name] for _, table, name in _places(weighting) if name in names]
    return max((float(x) for x in found if isinstance(x, (int, float))), default=0.0)
