"""Which functions are weightings of the Gram matrix."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, get_args, get_origin

import torch
from torch import Tensor, nn

Weighting = Callable[[Tensor], Tensor]


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
                "which has none. Pass a weighting, such as PCGradWeighting(), or take fastdg's own "
                "algorithm of this name, if there is one."
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
    """Whether it says so, is a TorchJD ``Stateful`` or a module with buffers, or has a
    ``state_dict``."""
    if isinstance(own := getattr(weighting, "keeps_state", None), bool):
        return own
    stateful = getattr(sys.modules.get("torchjd"), "Stateful", ())
    if not isinstance(weighting, nn.Module):
        return hasattr(weighting, "state_dict") or isinstance(weighting, stateful)
    return any(isinstance(m, stateful) or m._buffers for m in weighting.modules())
