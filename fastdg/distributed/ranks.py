r"""Several processes that train one model: what they have to tell each other, and no more.

A step on W ranks is the step of one process on their batches put together. Samples stay where they
are; what travels is

- the counts: 71 integers of each rank, once a step (`Ranks.handshake`), by which a rank that has
  failed tells the others before they wait for it;
- sums over samples, in one flat bucket each (`Ranks.all_reduce`);
- the gradient: by DistributedDataParallel's or FSDP2's own hooks, in buckets and overlapped with
  the backward, where the algorithm has an objective (averaged by `Ranks.averages` for a model that
  neither wraps); by `fastdg.distributed.exchange`, likewise, where it combines the domains'
  gradients.

What a rank sends in a step beside the counts, in numbers of 4 bytes and up to the factor
(W - 1)/W, with P the parameters of the network in L tensors, K those whose gradients' variances
are compared (the head's), D domains, of which the rank's batch has E, and T statistics that terms
are told of:

=============================== ============================== =============================
algorithm                       beside the gradient            gradient
=============================== ============================== =============================
plain DDP, for comparison       0                              2P
VREx, GroupDRO, Fish            2 (D + 1)                      2P
MIRO, RISE (alone or inside)    2 (D + 1) + 2 (T + 1)          2P
IRM                             2 (5D + 1)                     2P
IGA                             2 (D + 1) + 2DP                2P
Fishr                           2 (D + 1) + 4DK                2P
Fishr(params="all"), w = 0      2 (D + 1) + 4DP                0: it is the mean of the moments
AgrSum, ANDMask, SANDMask       2D + 6L + 2W                   (E + 1) P
AgrRand                         the same, a generator's state  (E + 1) P
PCGrad, GramSurgery             2 (D + DD + L + W) of 8 bytes  (E + 1) P
=============================== ============================== =============================

With one domain on each rank E = 1, and gradient surgery sends what plain training does. SWAD adds
one number an evaluation, and nothing a step. Under FSDP2 the gradient is scattered only: P, or
E P, of these; the weights are gathered as in plain training, once more for statistics.
"""

from __future__ import annotations

import json
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from .handshake import ELSEWHERE, UNLIKE, USED, divergence
from .sharding import sharded
from .wrapped_modules import WrappedModules

BUCKET = 1 << 22  # entries that are sent at a time
INLINE = 64  # domains whose counts go along with the first message
HEADER = 7
TAG = 0xFD6  # of messages from one rank to one other, so that they do not meet the user's


class Ranks:
    """The processes that train a wrapper's parameters together.

    The process group is that of the DistributedDataParallel or FSDP2 module that runs, else the
    default one.

    Args:
        opt: the wrapper, which keeps this, and shares it with those around it.
    """

    def __init__(self, opt: Optimizer) -> None:
        self.opt, self.name = weakref.ref(opt), type(opt).__name__
        self.modules = WrappedModules(opt)
        self.compared = self.met = False
        if self.size > 1 or any(map(sharded, self.parameters)):
            self.modules.discover()

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the optimizer, in its order."""
        return self.modules.parameters

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """None: the default one."""
        return self.modules.group

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
            works.append(self.launch(distributed.all_reduce, flat))
            pieces = flat.split([tensors[i].numel() for i in places])
            for i, piece in zip(places, pieces, strict=True):
                out[i] = piece.view(tensors[i].shape)
        self.wait(*works)
        return out

    def sum(self, values: Mapping[Tensor, Tensor]) -> Tensor:
        """The sum of one number a parameter, of a sharded one that of this rank's part."""
        first = next(iter(values.values()))
        numbers = {p: value.to(first) for p, value in values.items()}
        total = torch.stack([*numbers.values()]).sum()
        parts = [value for p, value in numbers.items() if sharded(p)]
        if not parts or self.size == 1:
            return total
        own = torch.stack(parts).sum()
        return total - own + self.all_reduce([own])[0]

    def mean(self, value: float) -> float:
        """The mean of each rank's number."""
        if self.size == 1:
            return value
        number = torch.tensor([value], dtype=torch.float64, device=self.meeting_place(None))
        return float(self.all_reduce([number])[0]) / self.size

    def broadcast_from_rank0(self, tensor: Tensor) -> Tensor:
        """What rank 0 has of a tensor that lies on the CPU."""
        sent = tensor.to(self.meeting_place(None), copy=True)
        self.wait(self.launch(partial(distributed.broadcast, group_src=0), sent))
        return sent.cpu()

    def launch(self, collective: Any, *args: Any) -> Any:
        """Begin a collective operation; `wait` for what this returns."""
        try:
            return collective(*args, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error

    def send_and_receive(
        self, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]]
    ) -> list[Any]:
        """Begin to send tensors to ranks, and to fill others with what ranks send, in the order in
        which they send it; `wait` for each of what this returns.

        Gloo takes less than half the time for this of what it does for its all-to-all and
        all-gather, and nothing has to be brought together before.
        """
        messages = [
            distributed.P2POp(way, tensor, group=self.group, group_peer=rank, tag=TAG)
            for way, tensors in ((distributed.isend, outgoing), (distributed.irecv, incoming))
            for rank, tensor in tensors
            if tensor.numel() or tensor.device.type == "cpu"
        ]
        try:
            return distributed.batch_isend_irecv(messages) if messages else []
        except RuntimeError as error:
            raise self._lost(error) from error

    def wait(self, *works: Any) -> None:
        """Wait for what `launch` or `send_and_receive` began."""
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"{self.name}: rank {self.rank} could not reach the other {self.size - 1}: one of them "
            f"has died, or has not called backward within the group's timeout ({error})"
        )

    # -- meeting --

    def begin(self, opt: Optimizer, statistics: bool) -> None:
        """The outermost wrapper is asked for a backward; with passes for statistics."""
        self.opt, self.name = weakref.ref(opt), type(opt).__name__
        if self.size > 1 and not self.compared:
            self.modules.check(self.name)
        if statistics:
            self.modules.pause_sync()

    def handshake(
        self, count: Tensor, samples: int, used: object, settings: Callable[[], dict[str, str]]
    ) -> tuple[Tensor, int]:
        """Tell the others the samples of each domain ``[D]``, and learn theirs.

        Args:
            count: ``[D]``.
            samples: their sum.
            used: what the forward used; its ``repr`` has to be the same on all ranks.
            settings: gives the training's settings in words, which have to be the same, too.

        Returns:
            Samples of each rank and domain ``[W, D]``, on the device of ``count``, and their sum.

        Raises:
            RuntimeError: another rank has failed, or is at another place of its run; the weights
                are not the same.
        """
        if self.size == 1:
            return count.unsqueeze(0), samples
        self.met = True
        first = count[:INLINE].to(self.meeting_place(count.device))
        own = settings()
        sums = [zlib.crc32(repr(what).encode()) for what in (used, own)]
        told = self._tell([0, *self._place(), sums[0], len(count), samples, sums[1]], first)
        codes, extent = told[:, 0].tolist(), int(told[:, 4].max())
        if any(codes):
            raise failed_on(self.name, [rank for rank, code in enumerate(codes) if code])
        if bool((told[:, 6] != told[0, 6]).any()):
            raise divergence(self._texts(json.dumps(own)))
        self._compare(told)
        counts = told[:, HEADER : HEADER + extent]
        if extent > INLINE:
            counts = count.new_zeros(self.size, extent)
            counts[self.rank, : len(count)] = count
            counts = self.all_reduce([counts])[0]
        if not self.compared:
            self.compared = True
            self.modules.hook_owners_only()
        return counts.to(count.device), int(told[:, 5].sum())

    def end_step(self, error: BaseException | None = None) -> None:
        """End a backward. If it failed before the handshake, tell the other ranks."""
        self.modules.reshard()
        if isinstance(error, Exception) and not self.met and self.size > 1:
            self._tell(
                [1] + [0] * (HEADER - 1), torch.zeros(0, device=self.meeting_place(None)).long()
            )
        self.met = False

    def _texts(self, own: str) -> list[str]:
        """Every rank's text."""
        code = torch.tensor(list(own.encode()), device=self.meeting_place(None))
        sizes = code.new_zeros(self.size)
        sizes[self.rank] = len(code)
        lengths: list[int] = self.all_reduce([sizes])[0].tolist()
        table = code.new_zeros(self.size, max(lengths))
        table[self.rank, : len(code)] = code
        rows = self.all_reduce([table])[0].tolist()
        return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]

    def _tell(self, header: Sequence[int], count: Tensor) -> Tensor:
        """Everyone's header and counts, ``[W, HEADER + INLINE]``."""
        told = count.new_zeros(self.size, HEADER + INLINE)
        told[self.rank, :HEADER] = torch.tensor(header)
        told[self.rank, HEADER : HEADER + len(count)] = count
        return self.all_reduce([told])[0].cpu()

    def meeting_place(self, device: torch.device | None) -> torch.device:
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
        for column, what in ((1, ELSEWHERE), (2, UNLIKE), (3, USED)):
            if bool((told[:, column] != told[0, column]).any()):
                raise RuntimeError(f"{self.name}.backward: {what}")

    # -- gradients --

    def averages(self) -> dict[Tensor, Tensor]:
        """Parameter -> its gradient averaged over the ranks, but for those that another one's hooks
        have averaged, and those that no rank has.

        Averaging twice would change nothing, so whoever reduces them unseen does no harm.
        """
        left = self.modules.left() if self.size > 1 else []
        if not left:
            return {}
        used = torch.tensor([p.grad is not None for p in left], dtype=left[0].dtype)
        used = used.to(left[0].device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in left]
        *sums, used = self.all_reduce([*(g.to_dense() if g.is_sparse else g for g in grads), used])
        return {
            p: total.div_(self.size)
            for p, total, anyone in zip(left, sums, used.tolist(), strict=True)
            if anyone
        }


def failed_on(name: str, ranks: Sequence[int]) -> RuntimeError:
    """What to raise if the backward of other ranks has failed."""
    return RuntimeError(
        f"{name}.backward: it failed on rank {', '.join(map(str, ranks))}, see the error there; "
        "nothing was done on the others"
    )


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
