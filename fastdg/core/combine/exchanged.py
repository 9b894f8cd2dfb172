"""Exchange the domains' gradients between ranks during the backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...distributed.exchange import Bucket
from ...distributed.global_batch import GlobalBatch
from ...distributed.ranks import BUCKET, Ranks, failed_on
from ...distributed.sharding import local, sharded
from ...domains import to_device_async
from ...factors import Agreement
from ...statistics.moments import pad_rows
from .gathering import AccumulatedGradients, Gradients, SingleBackward

FLYING = 2  # buckets in transfer at a time; more would only take memory


class DistributedGradients(Gradients):
    """The domains' gradients of all ranks.

    Args:
        own: gradients of this rank.
        whole: batch of all ranks.
        parameters: all parameters of the optimizer, in its order.
    """

    def __init__(
        self,
        own: SingleBackward | AccumulatedGradients,
        whole: GlobalBatch,
        parameters: Iterable[Tensor],
    ) -> None:
        self.own, self.whole, self.ranks = own, whole, whole.ranks
        counts = whole.counts.cpu()
        self.shares = counts.double() / counts.sum(0).clamp(min=1)
        self.domains = [row.nonzero().flatten().tolist() for row in counts]
        self.ids, self.extent = sorted({d for row in self.domains for d in row}), counts.shape[1]
        index = to_device_async(torch.tensor(self.ids, device="cpu"), whole.counts.device)
        self.count, self.samples = whole.count[index], whole.samples
        self.losses = whole.total([pad_rows(own.scatter_rows(own.losses, 0), self.extent)])[0][
            index
        ]
        self.rest, self.sparse = {}, own.sparse
        self.failure: Exception | None = None
        self.parameters = [p for p in parameters if p.requires_grad]

    def _exchange(self, finish: Callable[[Bucket, list[Tensor]], None]) -> set[Tensor]:
        """Run the backward, and call ``finish`` with each bucket's sum for every domain in `ids`.

        An error in this rank's backward is kept for `_refuse`: until then this rank sends zeros,
        since other ranks wait for its buckets.

        Returns:
            The parameters that this rank's forward used.
        """
        own, mine = self.own, self.domains[self.ranks.rank]
        waiting = deque(self._buckets())
        home = {p: bucket for bucket in waiting for p in bucket.parameters}
        flying: deque[Bucket] = deque()

        def finish_oldest() -> None:
            bucket = flying.popleft()
            sums = bucket.sums(self.domains, self.shares)
            finish(bucket, [sums[d] for d in self.ids])

        def send_complete() -> None:
            """Send the complete buckets, in the same order on all ranks."""
            while waiting and not waiting[0].missing:
                flying.append(waiting.popleft())
                flying[-1].send(self.domains)
                if len(flying) > FLYING:
                    finish_oldest()

        used: set[Tensor] = set()

        def take(p: Tensor, grads: Sequence[Tensor]) -> None:
            used.add(p)
            home[p].put(p, [grads[own.ids.index(d)] for d in mine])
            send_complete()

        try:
            own.feed(take)
        except Exception as error:
            self.failure = error
        while waiting:
            for p in list(waiting[0].missing):
                zeros = torch.zeros(p.shape, dtype=_dtype(p), device=p.device)
                waiting[0].put(p, [zeros] * len(mine))
            send_complete()
        while flying:
            finish_oldest()
        return used

    def _failed(self, like: Tensor) -> Tensor:
        """Return a one ``[W]`` at this rank if its backward has failed, to sum over the ranks."""
        ranks = torch.arange(self.ranks.size, device=like.device)
        return (ranks == self.ranks.rank).to(like.dtype) * (self.failure is not None)

    def _refuse(self, failed: Tensor) -> None:
        """Raise on all ranks if the backward of a rank has failed."""
        if self.failure is not None:
            raise self.failure
        if places := failed.nonzero().flatten().tolist():
            raise failed_on(self.ranks.name, places)
        self.rest = self.whole.sum_parameter_grads(self.own.rest)

    def _buckets(self) -> list[Bucket]:
        """Group the parameters into buckets, in reverse order, as a backward reaches them."""
        alike: dict[tuple[torch.dtype, torch.device, bool], list[list[Tensor]]] = {}
        for p in reversed(self.parameters):
            runs = alike.setdefault((_dtype(p), p.device, sharded(p)), [[]])
            if sum(q.numel() for q in runs[-1]) + p.numel() > BUCKET // 2 and runs[-1]:
                runs.append([])
            runs[-1].append(p)
        return [Bucket(run, self.ranks) for runs in alike.values() for run in runs if run]

    def agreement(
        self, weights: Tensor, threshold: float, steepness: float
    ) -> dict[Tensor, Agreement]:
        ranks, made = self.ranks, _Returned(self.ranks)
        sums: dict[Tensor, Tensor] = {}

        def combine(bucket: Bucket, of_domains: list[Tensor]) -> None:
            pieces = [list(row.split(bucket.pieces[ranks.rank])) for row in of_domains]
            combined, *found = ops.agreement(pieces, weights, threshold, steepness)
            sums.update(zip(bucket.parameters, torch.stack(found, 1)[:-1].unbind(), strict=True))
            made.send(bucket, combined)

        used = self._exchange(combine)
        like = sums[self.parameters[0]]
        # One copy to the device, and one read of it, however many parameters there are
        flags = torch.tensor([[p in used] for p in self.parameters], dtype=like.dtype, device="cpu")
        parts = torch.stack([sums[p].to(like) for p in self.parameters])
        parts = torch.cat([parts, to_device_async(flags, like.device)], 1)
        totals, failed = ranks.all_reduce([parts, self._failed(like)])
        self._refuse(failed)
        reached = totals[:, 2].tolist()
        rows = dict(zip(self.parameters, zip(totals, reached, strict=True), strict=True))
        return {
            p: Agreement(grad, rows[p][0][0], rows[p][0][1])
            for p, grad in made.all().items()
            if rows[p][1] > 0
        }

    def gram(self) -> Tensor:
        self._own_state: list[tuple[Bucket, list[Tensor]]] = []
        used = self._exchange(lambda bucket, sums: self._own_state.append((bucket, sums)))
        grams = [ops.gram([[row] for row in sums]).double() for _, sums in self._own_state]
        flags = torch.tensor([p in used for p in self.parameters], dtype=torch.float64)
        total = torch.stack(grams).sum(0)
        total, flags, failed = self.ranks.all_reduce(
            [total, flags.to(total.device), self._failed(total)]
        )
        self._refuse(failed)
        self._used = {p for p, flag in zip(self.parameters, flags.tolist(), strict=True) if flag}
        return total.to(self.losses.dtype)

    def combined(self, weights: Tensor) -> dict[Tensor, Tensor]:
        made = _Returned(self.ranks)
        for bucket, sums in self._own_state:
            made.send(bucket, ops.combine([[row] for row in sums], weights))
        self._own_state = []
        return {p: grad for p, grad in made.all().items() if p in self._used}


class _Returned:
    """Combined pieces in transfer to all ranks; pieces of sharded parameters stay."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.made = ranks, dict[Tensor, Tensor]()
        self.flying: list[tuple[Bucket, Tensor, list[Any]]] = []

    def send(self, bucket: Bucket, pieces: Sequence[Tensor]) -> None:
        """Send this rank's piece of a bucket, in several tensors, to all ranks."""
        mine = self.ranks.rank
        if bucket.sharded:
            piece = torch.cat(tuple(pieces))
            for p, part in zip(bucket.parameters, piece.split(bucket.pieces[mine]), strict=False):
                self.made[p] = part.view(local(p).shape)
            return
        received = pieces[0].new_empty(bucket.spans[-1][1])
        parts = [received[slice(*span)] for span in bucket.spans]
        torch.cat(tuple(pieces), out=parts[mine])
        others = [(rank, part) for rank, part in enumerate(parts) if rank != mine]
        works = self.ranks.send_and_receive([(rank, parts[mine]) for rank, _ in others], others)
        self.flying.append((bucket, received, works))

    def all(self) -> dict[Tensor, Tensor]:
        """Wait for all pieces; return parameter -> combined gradient, or this rank's shard."""
        for bucket, received, works in self.flying:
            self.ranks.wait(*works)
            sizes = [p.numel() for p in bucket.parameters]
            parts = received[: sum(sizes)].split(sizes)
            for p, part in zip(bucket.parameters, parts, strict=True):
                # A kept small gradient must not keep the memory of the whole bucket
                self.made[p] = (part if len(parts) == 1 else part.clone()).view(p.shape)
        return self.made


def _dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of the statistics of ``p``."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
