"""Domain ids as a partition of the batch; every check on them."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ._torch import assert_later, dispatch_modes, get_proxy_mode


@dataclass(frozen=True)
class Partition:
    """The samples of a batch, sorted by domain without moving them.

    Attributes:
        order: sample numbers sorted by domain, stable, ``[N]`` int64.
        offsets: ``[D + 1]`` int64; domain d is ``order[offsets[d]:offsets[d + 1]]``.
        domains: the domain of each sample, ``[N]`` int64.
    """

    order: Tensor
    offsets: Tensor
    domains: Tensor

    @property
    def num_domains(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def count(self) -> Tensor:
        """Samples of each domain, ``[D]`` int64."""
        return self.offsets[1:] - self.offsets[:-1]

    def grouped(self, groups: int) -> Partition:
        """The partition of ``N * groups`` rows (sample-major) into ``D * groups`` domains."""
        if groups == 1:
            return self
        blocks = torch.arange(groups, device=self.domains.device)
        return _sorted(
            (self.domains.unsqueeze(1) * groups + blocks).flatten(), self.num_domains * groups
        )


def _sorted(domains: Tensor, num_domains: int) -> Partition:
    order = torch.argsort(domains, stable=True)
    bounds = torch.arange(num_domains + 1, device=domains.device)
    return Partition(order, torch.searchsorted(domains[order], bounds), domains)


def single(samples: int, device: torch.device) -> Partition:
    """Every sample in one domain."""
    return Partition(
        torch.arange(samples, device=device),
        torch.tensor([0, samples], device=device),
        torch.zeros(samples, dtype=torch.int64, device=device),
    )


def tracing() -> bool:
    """Whether torch writes down what runs, for a graph that is to hold good for other values."""
    if torch.compiler.is_compiling():
        return True
    return dispatch_modes() > 0 and get_proxy_mode() is not None


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at without a wait."""
    return tensor.device.type == "cpu" and not tracing()


MOST_DOMAINS = 1000  # that are not taken for a mistake


def check_ids(ids: Tensor, num_domains: int | None) -> int:
    """Look at the ids; returns the number of domains.

    Raises:
        ValueError: an id is negative, or not below ``num_domains``, or a year or a key rather than
            a row number.
    """
    low, high = (int(v) for v in torch.aminmax(ids)) if ids.numel() else (0, -1)
    if low < 0:
        raise ValueError(
            f"domains: expected ids >= 0, got {low}; no id marks samples without a domain: leave "
            "those out of losses and domains"
        )
    if num_domains is None:
        if high >= max(MOST_DOMAINS, ids.numel()):
            raise ValueError(
                f"domains: expected ids 0 to D - 1, got {high} among {ids.numel()} samples, "
                "and results have a row for each. Of years or keys make ids once, of the whole "
                "data set: ids = fastdg.DomainIds(values), or "
                "torch.unique(values, return_inverse=True)[1]; if there are so many domains, pass "
                "num_domains="
            )
        return high + 1
    if high >= num_domains:
        raise ValueError(
            f"domains: expected ids below num_domains={num_domains}, got {high}; "
            "pass num_domains= the number of training domains; of years or keys make ids with "
            "fastdg.DomainIds(values)"
        )
    return num_domains


def as_ids(domains: Any, samples: int | None = None) -> Tensor:
    """``domains`` as a tensor of integers; a single one is that of all ``samples``.

    Raises:
        TypeError: it is none, in words for strings, lists, arrays and other dtypes.
    """
    if not isinstance(domains, bool) and isinstance(domains, Integral) and samples is not None:
        return torch.full((samples,), int(domains))
    if domains is None:
        raise TypeError(
            "domains: expected the domain of each sample, an integer tensor (N,), got none. Call "
            "opt.backward(losses, domains)"
        )
    if not isinstance(domains, Tensor):
        kind = type(domains).__name__
        values = domains.tolist() if hasattr(domains, "tolist") else domains
        first = next(iter(values), None) if isinstance(values, (list, tuple)) else values
        if isinstance(first, (str, bytes)):
            raise TypeError(
                f"domains: expected an integer tensor of shape (N,), got {kind} with the name "
                f"{first!r}. Make numbers of names: ids = fastdg.DomainIds(names), once, and "
                "opt.backward(losses, ids(domains))"
            )
        raise TypeError(
            f"domains: expected an integer tensor of shape (N,), got {kind}; use "
            "torch.as_tensor(domains)"
        )
    if domains.dtype == torch.bool:
        raise TypeError(
            "domains: expected integer domain ids, got dtype torch.bool; domains.long() makes ids "
            "0 and 1 of them"
        )
    if domains.is_floating_point() or domains.is_complex():
        raise TypeError(
            f"domains: expected integer domain ids, got dtype {domains.dtype}; use domains.long() "
            "if they are whole numbers from 0 on, or fastdg.DomainIds(values) for others"
        )
    return domains.expand(samples) if domains.dim() == 0 and samples is not None else domains


def partition(domains: Tensor | int, losses: Tensor, num_domains: int | None = None) -> Partition:
    """Check domain ids against the losses they belong to and sort the samples by domain.

    No host sync when ``domains`` is on the CPU or ``num_domains`` is given.

    Args:
        domains: domain of each sample, ``[N]``, any integer dtype, >= 0; on the device of
            ``losses`` or the CPU. A single integer is that of all samples.
        losses: ``[N]`` per-sample losses.
        num_domains: number of domains D; default: one more than the largest id.

    Raises:
        TypeError: ``domains`` is not an integer tensor, ``num_domains`` not an integer.
        ValueError: wrong length, wrong device, a negative id, an id >= ``num_domains``, an id that
            is a year or a key rather than a row number, or ``num_domains`` < 1.
    """
    domains = as_ids(domains, losses.shape[0])
    if domains.shape != losses.shape:
        rows = domains.dim() == 2 and domains.shape[0] == losses.shape[0]
        advice = "; use domains.squeeze(1)" if rows and domains.shape[1] == 1 else ""
        if rows and domains.shape[1] > 1:
            advice = "; of one-hot rows, domains.argmax(1) are the ids"
        raise ValueError(
            f"domains: expected one id a sample, shape {tuple(losses.shape)} as losses, "
            f"got shape {tuple(domains.shape)}{advice}"
        )
    if num_domains is not None:
        if not isinstance(num_domains, int) or isinstance(num_domains, bool):
            raise TypeError(
                f"num_domains: expected an integer or None, got {type(num_domains).__name__}"
            )
        if num_domains < 1:
            raise ValueError(f"num_domains: expected at least 1, got {num_domains}")
    if domains.device != losses.device and domains.device.type != "cpu":
        raise ValueError(
            f"domains: expected them on {losses.device} (where losses are) or on the CPU, "
            f"got {domains.device}"
        )
    ids = domains.detach().to(torch.int64)
    if num_domains is None or readable(ids):
        num_domains = check_ids(ids, num_domains)
    else:
        there = ((ids >= 0) & (ids < num_domains)).all()
        assert_later(there, f"domains: expected ids from 0 to {num_domains - 1}")
    result = _sorted(ids, num_domains)
    if ids.device != losses.device:
        result = Partition(
            *(
                t.pin_memory().to(losses.device, non_blocking=True)
                for t in (result.order, result.offsets, result.domains)
            )
        )
    return result
