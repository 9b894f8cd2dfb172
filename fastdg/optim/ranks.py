r"""Several processes that train one model: what they have to tell each other, and no more.

A step on W ranks is the step of one process on their batches put together. Samples stay where they
are; what travels is

- the counts: 70 integers of each rank, once a step (`Ranks.meet`), with which a rank that has
  failed says so before the others wait for it;
- sums over samples, in one flat bucket each (`Ranks.all_reduce`);
- the gradient, by DistributedDataParallel's or FSDP2's own hooks, overlapped with the backward,
  where the algorithm has an objective; by `fastdg.optim.exchange` where it combines the domains'
  gradients.

What a rank sends in a step, in numbers (4 bytes each) and up to the factor (W - 1)/W, with P the
parameters of the network, K those whose gradients' variances are compared (the head's), D domains
of which the rank's batch has E, and T statistics that are a mean:

=============================== ============================== =============================
algorithm                       beside the gradient            gradient
=============================== ============================== =============================
plain DDP, for comparison       0                              2P
VREx, GroupDRO, Fish            2 (D + 1)                      2P
IRM                             2 (3D + 1)                     2P
MIRO, RISE (alone or inside)    2 (D + 1) + 2 (T + 1)          2P
IGA                             2DP                            2P
Fishr                           4DK                            2P
Fishr(params="all"), w = 0      4DP                            0: it is the mean of the moments
AgrSum, ANDMask, SANDMask       6 a parameter tensor           EP + P
AgrRand                         the same, a generator's state  EP + P
PCGrad, GramSurgery             4DD                            EP + P
=============================== ============================== =============================

With one domain on each rank E = 1, and gradient surgery sends what plain training does. SWAD adds
one number an evaluation.
"""

from __future__ import annotations

import sys
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..statistics.moments import DomainMoments, rows
from .notes import Hook
from .sharding import sharded

BUCKET = 1 << 22  # entries that are sent at a time
INLINE = 64  # domains whose counts go along with the first message
HEADER = 6


@dataclass(frozen=True)
class Whole:
    """The batch of all ranks together.

    Attributes:
        ranks: they.
        counts: samples of each rank and domain, ``[W, D]``, on the device of the losses.
        samples: number of all samples, N.
    """

    ranks: Ranks
    counts: Tensor
    samples: int

    @property
    def count(self) -> Tensor:
        """Samples of each domain, ``[D]``."""
        return self.counts.sum(0)

    @property
    def before(self) -> Tensor:
        """Samples of each domain that the ranks before this one have, ``[D]``."""
        return self.counts[: self.ranks.rank].sum(0)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each summed over the ranks; differentiable.

        Every rank makes the same objective of the sums, so the gradient that arrives at one is that
        of the objective by it, on all ranks, and this rank's part of it takes it as it is.
        """
        if self.ranks.size == 1:
            return list(tensors)
        return list(_Total.apply(self.ranks, *tensors))

    def moments(self, own: DomainMoments) -> DomainMoments:
        r"""Those of all ranks, from each one's; differentiable.

        .. math:: m = \sum_r \tfrac{n_r}{n} m_r, \qquad v = \sum_r \tfrac{n_r}{n}\left(v_r + (m_r -
                  m)^2\right)
        """
        if self.ranks.size == 1:
            return own
        means = self.means(own)
        # Of v the derivatives by m add up to 0
        apart = [
            v + (rows(own.mean[name], len(v)) - means[name].detach()[: len(v)]).square()
            for name, v in own.variance.items()
        ]
        variance = self.total([self._shared(v, own.count) for v in apart])
        return DomainMoments(means, dict(zip(means, variance, strict=True)), self.count)

    def means(self, own: DomainMoments) -> dict[str, Tensor]:
        """The means of `moments` alone."""
        if self.ranks.size == 1:
            return own.mean
        shared = self.total([self._shared(mean, own.count) for mean in own.mean.values()])
        return dict(zip(own.mean, shared, strict=True))

    def _shared(self, values: Tensor, count: Tensor) -> Tensor:
        """This rank's part of a mean by domain ``[D, *]``."""
        share = rows(count, self.counts.shape[1]).to(values.dtype) / self.count.clamp(min=1)
        return rows(values, len(share)) * share.view(-1, *[1] * (values.dim() - 1))

    def rest(self, sums: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Summed gradients of tensors that the optimizer does not have: of the parameters among
        them, those of all ranks."""
        shared = [p for p in sums if isinstance(p, nn.Parameter)]
        if self.ranks.size == 1 or not shared:
            return sums
        totals = self.ranks.all_reduce([sums[p] for p in shared])
        return {**sums, **dict(zip(shared, totals, strict=True))}

    def backward(self, roots: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Run backward from this rank's roots, and add up what all ranks' backwards give.

        Gradients are averaged over ranks by DistributedDataParallel and FSDP2, so that the weights
        are multiplied by their number.
        """
        if self.ranks.size > 1:
            weights = [weight * self.ranks.size for weight in weights]
        self.ranks.release()
        torch.autograd.backward(list(roots), list(weights))
        self.ranks.average()


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(ranks.all_reduce(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads


class Ranks:
    """The processes that train a wrapper's parameters together.

    The process group is that of the DistributedDataParallel or FSDP2 module that runs, else the
    default one.

    Args:
        opt: the wrapper, which keeps this.
    """

    def __init__(self, opt: Optimizer) -> None:
        self.opt, self.name = weakref.ref(opt), type(opt).__name__
        # Modules that reduce gradients -> whether they will those of the forwards since the last
        # backward
        self.engines: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self.handles: list[Any] = []
        self.compared = self.met = False
        self._mesh: Any = None  # of FSDP2; False: there is none
        weakref.finalize(self, _remove, self.handles).atexit = False
        if self.size > 1:
            self._look()

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the optimizer, in its order."""
        opt = self.opt()
        assert opt is not None
        return [p for group in opt.param_groups for p in group["params"]]

    def _look(self) -> None:
        """Until the ranks have met, look at every module that runs for one that reduces."""
        if not self.handles:
            self.handles.append(register_module_forward_pre_hook(Hook(self, "_see")))

    def _see(self, module: nn.Module, args: Any) -> None:
        module = getattr(module, "_orig_mod", module)  # of a compiled one
        engine = isinstance(module, (DistributedDataParallel, *_fsdp()))
        if not engine or not torch.is_grad_enabled():
            return
        if module not in self.engines and not isinstance(module, _fsdp()):
            trained = {id(p) for p in self.parameters}
            if all(id(p) not in trained for p in module.parameters()):
                return
        syncs = getattr(module, "require_backward_grad_sync", False)
        self.engines[module] = self.engines.get(module, False) or syncs

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """None: the default one."""
        for module in self.engines:
            if isinstance(module, DistributedDataParallel):
                return module.process_group
        if self._mesh is None:
            parts: list[Any] = [p for p in self.parameters if sharded(p)]
            self._mesh = parts[0].device_mesh if parts else False
        return self._mesh.get_group() if self._mesh else None

    @property
    def size(self) -> int:
        """Number of ranks W."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return distributed.get_rank(self.group) if self.size > 1 else 0

    # -- what is sent --

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """New tensors, each summed over the ranks; in flat buckets of one dtype and device."""
        out: list[Tensor] = [torch.empty(0)] * len(tensors)
        works = []
        for places in _buckets(tensors):
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
            works.append(self.start(distributed.all_reduce, flat))
            pieces = flat.split([tensors[i].numel() for i in places])
            for i, piece in zip(places, pieces, strict=True):
                out[i] = piece.view(tensors[i].shape)
        for work in works:
            self.wait(work)
        return out

    def mean(self, value: float) -> float:
        """The mean of each rank's number."""
        if self.size == 1:
            return value
        number = torch.tensor([value], dtype=torch.float64, device=self._meeting_place(None))
        return float(self.all_reduce([number])[0]) / self.size

    def of_first(self, tensor: Tensor) -> Tensor:
        """What rank 0 has of a tensor that lies on the CPU."""
        sent = tensor.to(self._meeting_place(None), copy=True)
        self.wait(self.start(partial(distributed.broadcast, group_src=0), sent))
        return sent.cpu()

    def start(self, collective: Any, *args: Any) -> Any:
        """Begin a collective operation; `wait` for what this returns."""
        try:
            return collective(*args, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error

    def wait(self, work: Any) -> None:
        """Wait for what `start` began."""
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"{self.name}: rank {self.rank} could not reach the other {self.size - 1}: one of them "
            f"has died, or has not called backward within the group's timeout ({error})"
        )

    # -- meeting --

    def meet(self, name: str, count: Tensor, samples: int, used: object) -> Whole:
        """Tell the others the samples of each domain ``[D]``, and learn theirs.

        Args:
            name: of the wrapper that asks.
            count: ``[D]``.
            samples: their sum.
            used: what the forward used; its ``repr`` has to be the same on all ranks.

        Raises:
            RuntimeError: another rank has failed, or is at another place of its run; the weights
                are not the same.
        """
        if self.size == 1:
            return Whole(self, count.unsqueeze(0), samples)
        self.name, self.met = name, True
        self._check_engines()
        first = count[:INLINE].to(self._meeting_place(count.device))
        seen = zlib.crc32(repr(used).encode())
        told = self._tell([0, *self._place(), seen, len(count), samples], first)
        codes, extent = told[:, 0].tolist(), int(told[:, 4].max())
        if any(codes):
            failed = [rank for rank, code in enumerate(codes) if code]
            raise RuntimeError(
                f"{self.name}.backward: it failed on rank {', '.join(map(str, failed))}, see the "
                "error there; nothing was done on the others"
            )
        self._compare(told)
        counts = told[:, HEADER : HEADER + extent]
        if extent > INLINE:
            counts = count.new_zeros(self.size, extent)
            counts[self.rank, : len(count)] = count
            counts = self.all_reduce([counts])[0]
        if not self.compared:
            self.compared = True
            _remove(self.handles)
            watched = [m.register_forward_pre_hook(Hook(self, "_see")) for m in self.engines]
            self.handles.extend(watched)
        return Whole(self, counts.to(count.device), int(told[:, 5].sum()))

    def part(self, error: BaseException | None = None) -> None:
        """What began with `meet` has come to its end; or to an error before that, of which the
        others are told."""
        if isinstance(error, Exception) and not self.met and self.size > 1:
            self._tell([1, 0, 0, 0, 0, 0], torch.zeros(0, device=self._meeting_place(None)).long())
        self.met = False

    def _tell(self, header: Sequence[int], count: Tensor) -> Tensor:
        """Everyone's header and counts, ``[W, HEADER + INLINE]``."""
        told = count.new_zeros(self.size, HEADER + INLINE)
        told[self.rank, :HEADER] = torch.tensor(header)
        told[self.rank, HEADER : HEADER + len(count)] = count
        return self.all_reduce([told])[0].cpu()

    def _meeting_place(self, device: torch.device | None) -> torch.device:
        """A device that the group can send from, the CPU if it can: then nothing waits."""
        group = self.group or distributed.group.WORLD
        devices: list[torch.device] = group._device_types  # type: ignore[union-attr]
        cpu = torch.device("cpu")
        if cpu in devices:
            return cpu
        if device is not None and device.type != "cpu":
            return device
        return self.parameters[0].device

    def _place(self) -> tuple[int, int]:
        """Where in its run a rank is, and, the first time, its weights, each as one integer."""
        opt, trained = self.opt(), self.parameters
        assert opt is not None
        steps = [value for key, value in opt.param_groups[0].items() if key.endswith("_steps")]
        place = zlib.crc32(repr((self.name, steps, len(trained))).encode())
        weights = 0
        if not self.compared:
            for p in trained:
                if not sharded(p):
                    flat = p.detach().cpu().flatten().view(torch.uint8)
                    weights = zlib.crc32(flat.numpy().tobytes(), weights)
        return place, weights

    def _compare(self, told: Tensor) -> None:
        for column, what in ((1, _ELSEWHERE), (2, _UNLIKE), (3, _USED)):
            if bool((told[:, column] != told[0, column]).any()):
                raise RuntimeError(f"{self.name}.backward: {what}")

    # -- gradients --

    def average(self) -> None:
        """Average the gradients over the ranks, but those that another one's hooks have averaged.

        Averaging twice would change nothing, so whoever reduces them unseen does no harm.
        """
        if self.size == 1:
            return
        done = {id(p) for m, reduces in self.engines.items() if reduces for p in m.parameters()}
        self.engines.update(dict.fromkeys(list(self.engines), False))
        left = [
            p for p in self.parameters if p.requires_grad and not sharded(p) and id(p) not in done
        ]
        if not left:
            return
        used = torch.tensor([p.grad is not None for p in left], dtype=left[0].dtype)
        used = used.to(left[0].device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in left]
        *sums, used = self.all_reduce([*(g.to_dense() if g.is_sparse else g for g in grads), used])
        for p, total, anyone in zip(left, sums, used.tolist(), strict=True):
            if not anyone:
                continue
            mean = total.div_(self.size)
            if p.grad is None:
                p.grad = mean
            elif p.grad.is_sparse:
                p.grad = mean.to_sparse(1)
            else:
                p.grad.copy_(mean)

    def _check_engines(self) -> None:
        """Raise if the gradients are reduced in a way that this does not go along with."""
        for module in self.engines:
            if getattr(module, "static_graph", False):
                raise RuntimeError(
                    f"{self.name}: DistributedDataParallel(static_graph=True) takes the first "
                    "backward pass of any kind for that of the training step; leave it out"
                )
            if type(module).__name__ == "FullyShardedDataParallel":
                raise RuntimeError(
                    f"{self.name}: FullyShardedDataParallel makes one flat parameter of many, "
                    "whose statistics are not known; use torch.distributed.fsdp.fully_shard"
                )
        parts: list[Any] = [p for p in self.parameters if sharded(p)]
        if parts and not any(isinstance(module, _fsdp()) for module in self.engines):
            raise RuntimeError(
                f"{self.name}: its parameters are DTensors, but no module under fully_shard has "
                "run; tensor parallelism is not supported"
            )
        for p in parts:
            if p.device_mesh.ndim > 1 or not p.placements[0].is_shard(0):
                raise RuntimeError(
                    f"{self.name}: a parameter lies as {p.placements} on a mesh of "
                    f"{p.device_mesh.ndim} dimensions; only fully_shard on a mesh of one "
                    "dimension, along the first dimension of the parameters, is supported"
                )

    # -- FSDP2 --

    def hold(self) -> None:
        """Backward passes from now on are for statistics: FSDP2 is to reduce nothing, and to keep
        its parameters, which a second derivative needs again."""
        self._set(False)

    def release(self) -> None:
        """The next backward is that of the training step."""
        self._set(True)

    def free(self) -> None:
        """Parameters that were kept are needed no more."""
        for module in self._set(True):
            module.reshard()

    def _set(self, training: bool) -> list[Any]:
        modules: list[Any] = [m for m in self.engines if hasattr(m, "set_reshard_after_backward")]
        for module in modules:
            module.set_requires_gradient_sync(training, recurse=False)
            module.set_reshard_after_backward(training, recurse=False)
        return modules


_ELSEWHERE = (
    "the ranks are at different steps of their runs, or run different algorithms; give each rank "
    "the same number of batches"
)
_UNLIKE = (
    "the ranks have different weights; wrap the model in DistributedDataParallel, which gives all "
    "those of rank 0, or load the same state on all"
)


_USED = (
    "the forwards of the ranks used different parameters, so what there is to add up differs; "
    "choose with params= those that every forward uses"
)


def _fsdp() -> tuple[type, ...]:
    """What FSDP makes of modules, if it was imported."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None:
        return ()
    return loaded.FSDPModule, loaded.FullyShardedDataParallel


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Which tensors go together: of one dtype and device, and not too many."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.device), []).append(i)
    for places in groups.values():
        bucket: list[int] = []
        size = 0
        for i in places:
            bucket.append(i)
            size += tensors[i].numel()
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
