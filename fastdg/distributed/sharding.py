"""Sharded parameters: the DTensors of FSDP2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def sharded(p: Tensor) -> bool:
    """Whether a parameter is sharded over the ranks."""
    return hasattr(p, "device_mesh")


def refuse_sharded(p: Tensor, name: str, reason: str) -> None:
    """Raise RuntimeError if a parameter is sharded, in a wrapper's step that needs it whole."""
    if sharded(p):
        raise RuntimeError(
            f"{name}.step: fully_shard has split the parameters, {reason}; use "
            "DistributedDataParallel"
        )


def local(p: Any) -> Tensor:
    """Return this rank's shard of a parameter, in the same memory; an unsharded one as it is."""
    return p.to_local() if sharded(p) else p


def own_part(p: Any, whole: Tensor) -> Tensor:
    """Return the part of ``whole`` (of the unsharded shape of ``p``) that matches this rank's shard
    of ``p``."""
    if not sharded(p):
        return whole
    parts, rank = whole.chunk(p.device_mesh.size(), 0), p.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]


def part_sizes(p: Tensor, ranks: int) -> list[int]:
    """Return the number of entries of a sharded parameter on each rank."""
    rows = p.shape[0]
    most = -(-rows // ranks)
    width = p.numel() // max(1, rows)
    return [max(0, min(most, rows - rank * most)) * width for rank in range(ranks)]


def like_parameter(p: Any, grad: Tensor) -> Tensor:
    """Convert a gradient of this rank's shard, or of all of ``p``, to the form of ``p``."""
    if not sharded(p) or sharded(grad):
        return grad
    from torch.distributed.tensor import DTensor

    part = grad if grad.shape == p.to_local().shape else own_part(p, grad)
    return DTensor.from_local(
        part.contiguous(),
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 has gathered. After a forward without a backward, FSDP2 keeps
    the gathered parameters of the outermost module in place of the shards, and would not gather
    them again."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "set_reshard_after_backward")]
    for module in modules:
        module.reshard()
