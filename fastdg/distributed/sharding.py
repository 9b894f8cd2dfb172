"""Parameters of which every rank has a part: the DTensors of FSDP2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def sharded(p: Tensor) -> bool:
    """Whether each rank has a part of it."""
    return hasattr(p, "device_mesh")


def local(p: Any) -> Tensor:
    """This rank's part of a parameter, the same memory; all of one that is not sharded."""
    return p.to_local() if sharded(p) else p


def own_part(p: Any, whole: Tensor) -> Tensor:
    """Of a tensor that is as large as ``p`` is on all ranks, what lies where this rank's part of
    ``p`` does."""
    if not sharded(p):
        return whole
    parts, rank = whole.chunk(p.device_mesh.size(), 0), p.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]


def part_sizes(p: Tensor, ranks: int) -> list[int]:
    """How many entries of a sharded parameter each rank has."""
    rows = p.shape[0]
    most = -(-rows // ranks)
    width = p.numel() // max(1, rows)
    return [max(0, min(most, rows - rank * most)) * width for rank in range(ranks)]


def like_parameter(p: Any, grad: Tensor) -> Tensor:
    """A gradient of this rank's part of ``p``, or of all of it, in the form of ``p``."""
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
    """Let FSDP2 let go of what it has gathered. After a forward without a backward it keeps that of
    the outermost module, shows it in place of this rank's part, and would not gather it anew."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "set_reshard_after_backward")]
    for module in modules:
        module.reshard()
