"""Weightings of the Gram matrix: their input, and their state between steps."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, MutableMapping
from types import FunctionType, ModuleType
from typing import Any, get_args, get_origin

import torch
from torch import Tensor, nn

from ._torch import version_of

Weighting = Callable[[Tensor], Tensor]
_OF_MODULES = vars(nn.Module()).keys() - {"training"}


def of_gram(weighting: Any) -> Weighting:
    """Return ``weighting``, or the weighting in a TorchJD aggregator.

    Raises:
        TypeError: ``weighting`` is no function, or a function of another matrix.
    """
    if not callable(weighting) or isinstance(weighting, type):
        raise TypeError(
            "weighting: expected a function of the Gram matrix (D, D) that gives weights (D,), "
            f"got {weighting!r}."
        )
    torchjd = sys.modules.get("torchjd.aggregation")
    if torchjd is None or not isinstance(weighting, nn.Module):
        return weighting
    name = type(weighting).__name__
    if isinstance(weighting, torchjd.Aggregator):
        inner = getattr(weighting, "gramian_weighting", None)
        if inner is None:
            raise TypeError(
                f"weighting: expected a function of the Gram matrix, got the aggregator {name}, "
                "which needs the Jacobian. Pass a weighting, such as PCGradWeighting()."
            )
        return of_gram(inner)
    if getattr(getattr(weighting, "fn", None), "__name__", None) == "compute_gramian":
        return of_gram(weighting.weighting)  # of an aggregator, which computes the Gram matrix
    for module in weighting.modules():
        if isinstance(module, torchjd.Weighting) and _reads_matrix(module):
            raise TypeError(
                f"weighting: expected a function of the Gram matrix, got {type(module).__name__}, "
                "which needs the Jacobian or the product of two batches' Jacobians. Pass a "
                "weighting whose base is Weighting[PSDMatrix], such as PCGradWeighting()."
            )
    return weighting


def _reads_matrix(module: Any) -> bool:
    """Whether the module reads entries of a matrix that is not the Gram matrix."""
    aggregation, linalg = sys.modules["torchjd.aggregation"], sys.modules["torchjd.linalg"]
    wanted = {
        get_args(base)[0]
        for kind in type(module).__mro__
        for base in vars(kind).get("__orig_bases__", ())
        if get_origin(base) is aggregation.Weighting
    }
    if linalg.Matrix not in wanted:
        return False
    if isinstance(module, sys.modules["torchjd"].Stateful):
        return True
    with torch.random.fork_rng(devices=()):
        found = []
        for matrix in (torch.eye(3), torch.arange(9.0).view(3, 3)):
            torch.manual_seed(0)
            try:
                found.append(copy.deepcopy(module)(matrix))
            except Exception:  # it needs another number of domains, so it reads the size at least
                return False
    return not torch.equal(*found)


def keeps_state(weighting: Any) -> bool:
    """Whether it is a TorchJD ``Stateful``, a module with buffers, or has a ``state_dict``."""
    stateful = getattr(sys.modules.get("torchjd"), "Stateful", ())
    if not isinstance(weighting, nn.Module):
        return hasattr(weighting, "state_dict") or isinstance(weighting, stateful)
    return any(isinstance(m, stateful) or m._buffers for m in weighting.modules())


# -- state --


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
