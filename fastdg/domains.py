"""Checks of domain ids, and the partition of a batch by domain."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._torch import assert_later, dispatch_modes, get_proxy_mode, has_graph


@dataclass(frozen=True)
class Partition:
    """Index of a batch by domain; the samples stay in place.

    Attributes:
        order: sample numbers sorted by domain, stable, ``[N]`` int64.
        offsets: ``[D + 1]`` int64; domain d is ``order[offsets[d]:offsets[d + 1]]``.
        domains: domain of each sample, ``[N]`` int64.
        count: number of samples of each domain, ``[D]`` int64.
        loss_sums: sum of each domain's losses ``[D]``, detached; None where `ops.loss_sums` has
            not made the partition.
    """

    order: Tensor
    offsets: Tensor
    domains: Tensor
    count: Tensor
    loss_sums: Tensor | None = None

    @property
    def num_domains(self) -> int:
        return self.offsets.shape[0] - 1

    def take(self, number: slice) -> Partition:
        """Partition some of the samples."""
        return _sorted(self.domains[number], self.num_domains)

    def grouped(self, groups: int) -> Partition:
        """Partition ``N * groups`` rows (sample-major) into ``D * groups`` domains."""
        if groups == 1:
            return self
        blocks = torch.arange(groups, device=self.domains.device)
        return _sorted(
            (self.domains.unsqueeze(1) * groups + blocks).flatten(), self.num_domains * groups
        )


def _sorted(domains: Tensor, num_domains: int) -> Partition:
    ascending, order = torch.sort(domains, stable=True)
    bounds = torch.arange(num_domains + 1, device=domains.device)
    offsets = torch.searchsorted(ascending, bounds)
    return Partition(order, offsets, domains, offsets.diff())


def _with_sums(losses: Tensor, ids: Tensor, num_domains: int | None) -> Partition:
    """Partition in one call, as small steps take longer to call ops than to compute."""
    D = check_ids(ids, None) if num_domains is None else num_domains
    try:
        order, offsets, count, sums = ops.loss_sums(losses, ids, D)
    except Exception:
        if readable(ids):
            check_ids(ids, num_domains)  # says more
        raise
    return Partition(order, offsets, ids, count, sums)


def group_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum ``values [N]`` by group, ``[G]``, with the same bits in each run: `index_add` adds in any
    order on a GPU."""
    numbers = torch.arange(groups, device=group.device).unsqueeze(1)
    return values.where(group == numbers, 0).sum(1)


def single(samples: int, device: torch.device) -> Partition:
    """Return the partition of all samples into one domain."""
    return Partition(
        torch.arange(samples, device=device),
        torch.tensor([0, samples], device=device),
        torch.zeros(samples, dtype=torch.int64, device=device),
        torch.tensor([samples], device=device),
    )


def tracing() -> bool:
    """Whether torch traces a graph, which must hold for other values too."""
    if torch.compiler.is_compiling():
        return True
    return dispatch_modes() > 0 and get_proxy_mode() is not None


def readable(tensor: Tensor) -> bool:
    """Whether the CPU can read the values without a host sync."""
    return tensor.device.type == "cpu" and not tracing()


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy ``tensor`` to ``device``; the CPU waits only for a copy to itself, as it reads it."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and not tracing():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")


MOST_DOMAINS = 1000  # a larger id is taken for a mistake


def check_ids(ids: Tensor, num_domains: int | None) -> int:
    """Check the ids and return the number of domains.

    Raises:
        ValueError: an id is negative, or not below ``num_domains``, or a year or a key instead of
            a row number.
    """
    low, high = (int(v) for v in torch.aminmax(ids)) if ids.numel() else (0, -1)
    if low < 0:
        raise ValueError(
            f"domains: expected ids >= 0, got {low}. No id stands for 'no domain'; leave samples "
            "without a domain out of losses and domains."
        )
    if num_domains is None:
        if high >= max(MOST_DOMAINS, ids.numel()):
            raise ValueError(
                f"domains: expected ids 0 to D - 1, got {high} among {ids.numel()} samples; "
                "results have one row for each id. Convert years or keys once, for the whole data "
                "set: ids = fastdg.DomainIds(values), or "
                "torch.unique(values, return_inverse=True)[1]. If there are so many domains, pass "
                "num_domains=."
            )
        return high + 1
    if high >= num_domains:
        raise ValueError(
            f"domains: expected ids below num_domains={num_domains}, got {high}. "
            "Pass the number of training domains as num_domains=; convert years or keys with "
            "fastdg.DomainIds(values)."
        )
    return num_domains


def of_tasks(losses: Any, domains: Any) -> tuple[Any, Any]:
    """Concatenate the losses of several tasks; the domain of a loss is the place of its task.

    Args:
        losses: a list of losses ``[N_k]``, or 0-dim, one for each task; anything else is returned
            as it is.

    Raises:
        TypeError, ValueError: an entry is no tensor of losses; ``domains`` are given, too.
    """
    if not isinstance(losses, (list, tuple)):
        return losses, domains
    if domains is not None and all(isinstance(x, Tensor) for x in losses):
        raise ValueError(
            "domains: expected none with the losses of several tasks, as each task is a domain. "
            "Pass one tensor of losses to give domains."
        )
    for k, x in enumerate(losses):
        if not isinstance(x, Tensor) or x.dim() > 1:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"losses: expected tensors (N,) or 0-dim, got {got} for task {k}. Reduce to one "
                "loss per sample, such as losses.flatten(1).mean(1), or to their mean."
            )
        if not has_graph(x):
            raise ValueError(
                f"losses: expected losses with their graph, got those of task {k} without. Compute "
                "them outside torch.no_grad and without detach, or leave them out."
            )
    if not losses:
        raise ValueError("losses: expected the losses of at least one task, got an empty list.")
    with torch.enable_grad():
        rows = [x.reshape(-1) for x in losses]
        together = torch.cat(rows)
    home = rows[0].device if tracing() else "cpu"  # on the CPU a check of them waits for no device
    return together, torch.cat([torch.full(x.shape, k, device=home) for k, x in enumerate(rows)])


def as_ids(domains: Any, samples: int | None = None) -> Tensor:
    """Return ``domains`` as an integer tensor; a single integer is the domain of all ``samples``.

    Raises:
        TypeError: ``domains`` is no integer or integer tensor.
    """
    number = not isinstance(domains, (Tensor, bool)) and isinstance(domains, Integral)
    if number and samples is not None:
        return torch.full((samples,), int(domains), device="cpu")
    if domains is None:
        raise TypeError(
            "domains: expected the domain of each sample, an integer tensor (N,), got none. Call "
            "opt.backward(losses, domains); for the losses of several tasks pass a list, "
            "opt.backward([loss_a, loss_b])."
        )
    if not isinstance(domains, Tensor):
        kind = type(domains).__name__
        values = domains.tolist() if hasattr(domains, "tolist") else domains
        first = next(iter(values), None) if isinstance(values, (list, tuple)) else values
        if isinstance(first, (str, bytes)):
            raise TypeError(
                f"domains: expected an integer tensor of shape (N,), got {kind} with the name "
                f"{first!r}. Call ids = fastdg.DomainIds(names) once, and "
                "opt.backward(losses, ids(domains)) in each step."
            )
        raise TypeError(
            f"domains: expected an integer tensor of shape (N,), got {kind}. Use "
            "torch.as_tensor(domains)."
        )
    if domains.dtype == torch.bool:
        raise TypeError(
            "domains: expected integer domain ids, got dtype torch.bool. Use domains.long() for "
            "ids 0 and 1."
        )
    if domains.is_floating_point() or domains.is_complex():
        raise TypeError(
            f"domains: expected integer domain ids, got dtype {domains.dtype}. Use domains.long() "
            "for whole numbers 0 to D - 1, or fastdg.DomainIds(values) for other values."
        )
    return domains.expand(samples) if domains.dim() == 0 and samples is not None else domains


def partition(domains: Tensor | int, losses: Tensor, num_domains: int | None = None) -> Partition:
    """Check domain ids against the losses and sort the samples by domain.

    There is no host sync if ``domains`` is on the CPU or ``num_domains`` is given.

    Args:
        domains: domain of each sample, ``[N]``, any integer dtype, >= 0, on the device of
            ``losses`` or the CPU. A single integer is the domain of all samples.
        losses: ``[N]`` per-sample losses.
        num_domains: number of domains D. Default: the largest id plus one.

    Raises:
        TypeError: ``domains`` is not an integer tensor, ``num_domains`` not an integer.
        ValueError: wrong length, wrong device, a negative id, an id >= ``num_domains``, an id that
            is a year or a key instead of a row number, or ``num_domains`` < 1.
    """
    domains = as_ids(domains, losses.shape[0])
    if domains.shape != losses.shape:
        rows = domains.dim() == 2 and domains.shape[0] == losses.shape[0]
        advice = " Pass the id of each sample of this batch."
        if rows and domains.shape[1] == 1:
            advice = " Use domains.squeeze(1)."
        if rows and domains.shape[1] > 1:
            advice = " For one-hot rows, use domains.argmax(1)."
        raise ValueError(
            f"domains: expected one id per sample, shape {tuple(losses.shape)} as losses, "
            f"got shape {tuple(domains.shape)}.{advice}"
        )
    if num_domains is not None:
        if not isinstance(num_domains, int) or isinstance(num_domains, bool):
            raise TypeError(
                f"num_domains: expected an integer or None, got {type(num_domains).__name__}."
            )
        if num_domains < 1:
            raise ValueError(f"num_domains: expected at least 1, got {num_domains}.")
    if domains.device != losses.device and domains.device.type != "cpu":
        raise ValueError(
            f"domains: expected the device of losses ({losses.device}) or the CPU, "
            f"got {domains.device}. Use domains.cpu()."
        )
    ids = domains if domains.dtype is torch.int64 else domains.to(torch.int64)
    known = num_domains is not None or readable(ids)
    if losses.is_cpu and losses.is_floating_point() and known:
        return _with_sums(losses.detach(), ids, num_domains)
    if num_domains is None or readable(ids):
        result = _sorted(ids, check_ids(ids, num_domains))
    else:
        result = _sorted(ids, num_domains)
        there = result.count.sum() == ids.shape[0]
        assert_later(there, f"domains: expected ids from 0 to {num_domains - 1}")
    if ids.device != losses.device:
        parts = (result.order, result.offsets, result.domains, result.count)
        result = Partition(*(to_device_async(part, losses.device) for part in parts))
    return result
