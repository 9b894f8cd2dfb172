r"""Communication of the processes that train one model.

A step on W ranks equals the step of one process on the concatenated batches. Samples stay on their
ranks. The ranks exchange

- the counts: 71 integers of each rank, once a step (`Ranks.handshake`). A rank that has failed
  reports it here, before the others wait for it;
- sums over samples, in flat buckets (`Ranks.all_reduce`);
- the gradient, in buckets and overlapped with the backward. For an algorithm with an objective:
  by the hooks of DistributedDataParallel or FSDP2 (by `Ranks.averages` for a model that neither
  wraps). For an algorithm that combines the domains' gradients: by `fastdg.distributed.exchange`.

Numbers of 4 bytes that a rank sends in a step beside the counts, up to the factor (W - 1)/W. The
network has P parameters in L tensors; the variances of K of them (the head's) are compared; there
are D domains, E of them in the rank's batch, N samples on all ranks with F features, and T
statistics of penalties; g.s. is a generator's state:

=============================== ============================== =============================
algorithm                       beside the gradient            gradient
=============================== ============================== =============================
plain DDP, for comparison       0                              2P
VREx, GroupDRO, Fish, POGM      2 (D + 1)                      2P
PGrad, GENIE                    the same, a g.s.               2P
CORAL, MMD                      2 (D + 1) + 2N (F + D)         2P
CausIRL                         2 (D + 1) + 2N (F + 1), a g.s. 2P
MIRO, RISE (alone or inside)    2 (D + 1) + 2 (T + 1)          2P
IRM                             2 (5D + 1)                     2P
IGA                             2 (D + 1) + 2DP                2P
Fishr                           2 (D + 1) + 4DK                2P
Fishr(params="all"), w = 0      2 (D + 1) + 4DP                0: it is the mean of the moments
GENIE(variance="batch")         2 (D + 1) + 4DP, a g.s.        0, for the same reason
AgrSum, ANDMask, SANDMask       2D + 6L + 2W                   (E + 1) P
AgrRand                         the same, a g.s.               (E + 1) P
PCGrad, GramSurgery, its rules  2 (D + DD + L + W) of 8 bytes  (E + 1) P
=============================== ============================== =============================

SAM and its relatives, MLDG and GGA send this, and the counts, in each backward of a step; GGA, for
each candidate, what PCGrad sends.

With one domain on each rank, E = 1, and gradient surgery sends as much as plain training. SWAD
adds one number per evaluation and none per step. FSDP2 only scatters the gradient: it sends P, or
E P, of these numbers. It gathers the weights as in plain training, and once more for statistics.
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

BUCKET = 1 << 22  # entries of a bucket
INLINE = 64  # domains whose counts the first message holds
HEADER = 7
TAG = 0xFD6  # of point-to-point messages, to separate them from the user's messages


class Ranks:
    """The processes that train a wrapper's parameters together.

    The process group is the group of the DistributedDataParallel or FSDP2 module that runs, else
    the default group.

    Args:
        opt: the wrapper, which holds this object and shares it with the wrappers around it.
    """

    def __init__(self, opt: Optimizer) -> None:
        self.opt, self.name = weakref.ref(opt), type(opt).__name__
        self.modules = WrappedModules(opt)
        self.compared = self.met = False
        self.alone = self.size == 1  # as the last backward has found it
        if not self.alone or any(map(sharded, self.parameters)):
            self.modules.discover()

    @property
    def parameters(self) -> list[Tensor]:
        """The optimizer's parameters, in its order."""
        return self.modules.parameters

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The process group; None: the default group."""
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

    # -- messages --

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum each tensor over the ranks, in flat buckets of one dtype and device; new tensors."""
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
        """Sum one number per parameter; for a sharded one, the number is of this rank's shard."""
        first = next(iter(values.values()))
        numbers = {p: value.to(first) for p, value in values.items()}
        total = torch.stack([*numbers.values()]).sum()
        parts = [value for p, value in numbers.items() if sharded(p)]
        if not parts or self.size == 1:
            return total
        own = torch.stack(parts).sum()
        return total - own + self.all_reduce([own])[0]

    def mean(self, value: float) -> float:
        """Average a number over the ranks."""
        if self.size == 1:
            return value
        number = torch.tensor([value], dtype=torch.float64, device=self.meeting_place(None))
        return float(self.all_reduce([number])[0]) / self.size

    def broadcast_from_rank0(self, tensor: Tensor) -> Tensor:
        """Return rank 0's values of a CPU tensor."""
        sent = tensor.to(self.meeting_place(None), copy=True)
        self.wait(self.launch(partial(distributed.broadcast, group_src=0), sent))
        return sent.cpu()

    def launch(self, collective: Any, *args: Any) -> Any:
        """Launch a collective operation and return its handle, for `wait`."""
        try:
            return collective(*args, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error

    def send_and_receive(
        self, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]]
    ) -> list[Any]:
        """Launch sends and receives of (rank, tensor), in the order in which ranks send, and return
        the handles, for `wait`.

        With gloo this takes less than half the time of all-to-all and all-gather, and the tensors
        need no concatenation.
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
        """Wait for handles of `launch` or `send_and_receive`."""
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"{self.name}: rank {self.rank} could not reach the other {self.size - 1} ranks. One "
            f"of them died, or did not call backward within the group's timeout ({error})."
        )

    # -- handshake --

    def begin(self, opt: Optimizer, statistics: bool) -> None:
        """Begin a backward of the outermost wrapper, with or without statistics backwards."""
        self.opt, self.name = weakref.ref(opt), type(opt).__name__
        self.alone = self.size == 1
        if not (self.alone or self.compared):
            self.modules.check(self.name)
        if statistics:
            self.modules.pause_sync()

    def handshake(
        self,
        count: Tensor,
        samples: int,
        used: Callable[[], object],
        settings: Callable[[], dict[str, str]],
    ) -> tuple[Tensor | None, int]:
        """Exchange the number of samples of each domain, and compare the ranks' runs.

        Args:
            count: samples of each domain, ``[D]``.
            samples: their sum.
            used: returns the parameters of the forward; the ``repr`` must be the same on all ranks.
            settings: returns the training's settings as text, which must be the same on all ranks.

        Returns:
            Samples of each rank and domain ``[W, D]``, on the device of ``count`` (None where one
            rank trains), and their sum.

        Raises:
            RuntimeError: another rank has failed or is at another step, or the weights, settings or
                parameters of the ranks differ.
        """
        if self.alone:
            return None, samples
        self.met = True
        first = count[:INLINE].to(self.meeting_place(count.device))
        own = settings()
        sums = [zlib.crc32(repr(value).encode()) for value in (used(), own)]
        headers = self._tell([0, *self._place(), sums[0], len(count), samples, sums[1]], first)
        codes, extent = headers[:, 0].tolist(), int(headers[:, 4].max())
        if any(codes):
            raise failed_on(self.name, [rank for rank, code in enumerate(codes) if code])
        if bool((headers[:, 6] != headers[0, 6]).any()):
            raise divergence(self._texts(json.dumps(own)))
        self._compare(headers)
        counts = headers[:, HEADER : HEADER + extent]
        if extent > INLINE:
            counts = count.new_zeros(self.size, extent)
            counts[self.rank, : len(count)] = count
            counts = self.all_reduce([counts])[0]
        if not self.compared:
            self.compared = True
            self.modules.hook_owners_only()
        return counts.to(count.device), int(headers[:, 5].sum())

    def end_step(self, error: BaseException | None = None) -> None:
        """End a backward. If it failed before the handshake, tell the other ranks."""
        self.modules.reshard()
        if isinstance(error, Exception) and not self.met and self.size > 1:
            self._tell(
                [1] + [0] * (HEADER - 1), torch.zeros(0, device=self.meeting_place(None)).long()
            )
        self.met = False

    def _texts(self, own: str) -> list[str]:
        """Return every rank's text."""
        code = torch.tensor(list(own.encode()), device=self.meeting_place(None))
        sizes = code.new_zeros(self.size)
        sizes[self.rank] = len(code)
        lengths: list[int] = self.all_reduce([sizes])[0].tolist()
        table = code.new_zeros(self.size, max(lengths))
        table[self.rank, : len(code)] = code
        rows = self.all_reduce([table])[0].tolist()
        return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]

    def _tell(self, header: Sequence[int], count: Tensor) -> Tensor:
        """Return the header and counts of every rank, ``[W, HEADER + INLINE]``."""
        headers = count.new_zeros(self.size, HEADER + INLINE)
        headers[self.rank, :HEADER] = torch.tensor(header)
        headers[self.rank, HEADER : HEADER + len(count)] = count
        return self.all_reduce([headers])[0].cpu()

    def meeting_place(self, device: torch.device | None) -> torch.device:
        """Return a device that the group can send from; the CPU if possible, without a sync."""
        group = self.group or distributed.group.WORLD
        devices: list[torch.device] = group._device_types  # type: ignore[union-attr]
        cpu = torch.device("cpu")
        if cpu in devices:
            return cpu
        if device is not None and device.type != "cpu":
            return device
        return self.parameters[0].device

    def _place(self) -> tuple[int, int]:
        """Return checksums of this rank's step and, the first time, of its weights."""
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

    def _compare(self, headers: Tensor) -> None:
        for column, problem in ((1, ELSEWHERE), (2, UNLIKE), (3, USED)):
            if bool((headers[:, column] != headers[0, column]).any()):
                raise RuntimeError(f"{self.name}.backward: {problem}")

    # -- gradients --

    def averages(self) -> dict[Tensor, Tensor]:
        """Average over the ranks the gradients that no module's hooks have averaged.

        The result maps parameter to gradient; parameters without a gradient on any rank are
        omitted. If an unseen module has averaged them already, a second average changes nothing.
        """
        unreduced = self.modules.unreduced() if self.size > 1 else []
        if not unreduced:
            return {}
        used = torch.tensor([p.grad is not None for p in unreduced], dtype=unreduced[0].dtype)
        used = used.to(unreduced[0].device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in unreduced]
        *sums, used = self.all_reduce([*(g.to_dense() if g.is_sparse else g for g in grads), used])
        return {
            p: total.div_(self.size)
            for p, total, anyone in zip(unreduced, sums, used.tolist(), strict=True)
            if anyone
        }


def failed_on(name: str, ranks: Sequence[int]) -> RuntimeError:
    """Return the error for a backward that failed on other ranks."""
    return RuntimeError(
        f"{name}.backward: it failed on rank {', '.join(map(str, ranks))}, and the other ranks did "
        "nothing. See the error of that rank."
    )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Group tensors by dtype and device, into buckets of limited size."""
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
