r"""The domains' gradients of all ranks, of which each rank combines a part.

.. math:: g_d = \sum_r \tfrac{n_{rd}}{n_d}\, g_{rd}

Signs and inner products are those of the sums over the ranks, so the sums come first. They are
never all on one rank: a bucket of parameters is cut into W pieces, every rank sends its domains'
gradients of a piece to the rank that answers for it, that rank adds them up and combines them, and
the combined pieces go back to all. So a rank sends (E + 1) P (W - 1)/W numbers for its E domains,
where an all-reduce of the domains' gradients would take 2 D P (W - 1)/W, and the combining is
shared.

Buckets of parameters go their way as soon as the backward has passed them, and while it goes on.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..core.gathering import Gathered, Gradients, Swept, moved
from ..core.global_batch import Whole
from ..statistics.factors import Agreement
from ..statistics.moments import rows
from .ranks import BUCKET, Ranks, failed_on
from .sharding import local, part_sizes, sharded

FLYING = 2  # buckets on their way at a time; more would only take memory


class Bucket:
    """Some parameters, and their domains' gradients on the way to whom they belong.

    Args:
        parameters: they.
        ranks: that exchange them.

    Attributes:
        places: the parameters -> what of them lies where in a row: (there, in the parameter, how
            many entries).
        pieces: of each rank, how many entries of each parameter it answers for; then how many
            zeros follow, so that pieces of what is not sharded are of one length.
        spans: of each rank, where its piece begins and ends in a row.
        missing: the parameters whose gradients are not there yet.
        rows: this rank's gradients, flat, one of each domain in its batch; rank after rank.
        received: of each other rank, its gradients of this rank's piece.
        works: the messages.
    """

    def __init__(self, parameters: list[Tensor], ranks: Ranks) -> None:
        self.parameters, self.missing, self.ranks = parameters, set(parameters), ranks
        self.sharded = sharded(parameters[0])
        if self.sharded:
            parts = zip(*(part_sizes(p, ranks.size) for p in parameters), strict=True)
            self.pieces = [[*sizes, 0] for sizes in parts]
        else:
            self.pieces = cut([p.numel() for p in parameters], ranks.size)
        ends = [0, *itertools.accumulate(map(sum, self.pieces))]
        self.spans = list(itertools.pairwise(ends))
        self.places: dict[Tensor, list[tuple[int, int, int]]] = {p: [] for p in parameters}
        done = dict.fromkeys(parameters, 0)
        for pieces, there in zip(self.pieces, ends, strict=False):
            for p, size in zip(parameters, pieces, strict=False):
                if size:
                    self.places[p].append((there, done[p], size))
                there, done[p] = there + size, done[p] + size
        self.rows: list[Tensor] = []
        self.received: dict[int, Tensor] = {}
        self.works: list[Any] = []

    def put(self, p: Tensor, rows: Sequence[Tensor]) -> None:
        """Take a parameter's gradient in each of this rank's domains."""
        flat = [row.reshape(-1) for row in rows]
        length = self.spans[-1][1]
        self.missing.discard(p)
        if len(self.parameters) == 1 and p.numel() == length:
            self.rows = flat
            return
        if not self.rows:
            self.rows = list(flat[0].new_zeros(len(flat), length))
        for there, start, size in self.places[p]:
            for to, row in zip(self.rows, flat, strict=True):
                to[there : there + size] = row[start : start + size]

    def send(self, present: Sequence[Sequence[int]]) -> None:
        """Let the rows go; each rank sends those of the domains ``present`` with it."""
        mine = self.ranks.rank
        length = sum(self.pieces[mine])
        others = [rank for rank in range(self.ranks.size) if rank != mine]
        self.received = {r: self.rows[0].new_empty(len(present[r]), length) for r in others}
        most = max(map(len, present))
        pieces = {r: [row[slice(*self.spans[r])] for row in self.rows] for r in others}
        self.works = self.ranks.swap(
            [(r, piece) for r in others for piece in padded(pieces[r], most)],
            [(r, row) for r in others for row in padded(self.received[r].unbind(), most)],
        )

    def sums(self, present: Sequence[Sequence[int]], shares: Tensor) -> dict[int, Tensor]:
        """Wait for the others: domain -> the sum of this rank's piece, each rank with its share.

        Args:
            present: the domains in the batch of each rank.
            shares: ``[W, D]``, on the CPU.
        """
        mine = self.ranks.rank
        self.ranks.wait(*self.works)
        found: dict[int, Tensor] = {}
        for rank, block in self.received.items():
            for d, row in zip(present[rank], block, strict=True):
                share = float(shares[rank, d])
                found[d] = found[d].add_(row, alpha=share) if d in found else row.mul_(share)
        for d, whole in zip(present[mine], self.rows, strict=True):
            row = whole[slice(*self.spans[mine])]
            share = float(shares[mine, d])
            found[d] = found[d].add_(row, alpha=share) if d in found else row * share
        self.rows, self.received, self.works = [], {}, []
        return found


class Shared(Gradients):
    """The domains' gradients of all ranks.

    Args:
        own: those of this rank.
        whole: the batch of all ranks.
        parameters: all that the optimizer has, in its order.
    """

    def __init__(self, own: Swept | Gathered, whole: Whole, parameters: Iterable[Tensor]) -> None:
        self.own, self.whole, self.ranks = own, whole, whole.ranks
        counts = whole.counts.cpu()
        self.shares = counts.double() / counts.sum(0).clamp(min=1)
        self.domains = [row.nonzero().flatten().tolist() for row in counts]
        self.ids, self.extent = sorted({d for row in self.domains for d in row}), counts.shape[1]
        index = moved(torch.tensor(self.ids, device="cpu"), whole.counts.device)
        self.count, self.samples = whole.count[index], whole.samples
        self.losses = whole.total([rows(own.spread(own.losses, 0), self.extent)])[0][index]
        self.rest, self.sparse = {}, own.sparse
        self.failure: Exception | None = None
        self.parameters = [p for p in parameters if p.requires_grad]

    def _exchange(self, finish: Callable[[Bucket, list[Tensor]], None]) -> set[Tensor]:
        """Run the backward, and hand on each bucket's sums, of every domain in `ids`.

        An error of this rank's backward is kept for `_refuse`: until then it goes on with zeros,
        since the others wait for what it sends.

        Returns:
            The parameters that this rank's forward used.
        """
        own, mine = self.own, self.domains[self.ranks.rank]
        waiting = deque(self._buckets())
        home = {p: bucket for bucket in waiting for p in bucket.parameters}
        flying: deque[Bucket] = deque()

        def settle() -> None:
            bucket = flying.popleft()
            sums = bucket.sums(self.domains, self.shares)
            finish(bucket, [sums[d] for d in self.ids])

        def go() -> None:
            """All ranks send the buckets in the same order."""
            while waiting and not waiting[0].missing:
                flying.append(waiting.popleft())
                flying[-1].send(self.domains)
                if len(flying) > FLYING:
                    settle()

        used: set[Tensor] = set()

        def take(p: Tensor, grads: Sequence[Tensor]) -> None:
            used.add(p)
            home[p].put(p, [grads[own.ids.index(d)] for d in mine])
            go()

        try:
            own.feed(take)
        except Exception as error:
            self.failure = error
        while waiting:
            for p in list(waiting[0].missing):
                zeros = torch.zeros(p.shape, dtype=_dtype(p), device=p.device)
                waiting[0].put(p, [zeros] * len(mine))
            go()
        while flying:
            settle()
        return used

    def _failed(self, like: Tensor) -> Tensor:
        """Whether this rank's backward has failed, ``[W]``, to be added up over the ranks."""
        ranks = torch.arange(self.ranks.size, device=like.device)
        return (ranks == self.ranks.rank).to(like.dtype) * (self.failure is not None)

    def _refuse(self, failed: Tensor) -> None:
        """Raise if the backward of some rank has failed; else all know that none has."""
        if self.failure is not None:
            raise self.failure
        if places := failed.nonzero().flatten().tolist():
            raise failed_on(self.ranks.name, places)
        self.rest = self.whole.rest(self.own.rest)

    def _buckets(self) -> list[Bucket]:
        """In the order of a backward, as far as it is that of the parameters, backwards."""
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
        flags = [sums[p].new_tensor([p in used]) for p in self.parameters]
        parts = [torch.cat([sums[p], flag]) for p, flag in zip(self.parameters, flags, strict=True)]
        *found, failed = ranks.all_reduce([*parts, self._failed(parts[0])])
        self._refuse(failed)
        totals = dict(zip(self.parameters, found, strict=True))
        return {
            p: Agreement(grad, totals[p][0], totals[p][1])
            for p, grad in made.all().items()
            if totals[p][2] > 0
        }

    def gram(self) -> Tensor:
        self._kept: list[tuple[Bucket, list[Tensor]]] = []
        used = self._exchange(lambda bucket, sums: self._kept.append((bucket, sums)))
        grams = [ops.gram([[row] for row in sums]).double() for _, sums in self._kept]
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
        for bucket, sums in self._kept:
            made.send(bucket, ops.combine([[row] for row in sums], weights))
        self._kept = []
        return {p: grad for p, grad in made.all().items() if p in self._used}


class _Returned:
    """Combined pieces on their way to all ranks; those of sharded parameters stay."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.made = ranks, dict[Tensor, Tensor]()
        self.flying: list[tuple[Bucket, Tensor, list[Any]]] = []

    def send(self, bucket: Bucket, pieces: Sequence[Tensor]) -> None:
        """Give all ranks this one's piece of a bucket, which comes in several."""
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
        works = self.ranks.swap([(rank, parts[mine]) for rank, _ in others], others)
        self.flying.append((bucket, received, works))

    def all(self) -> dict[Tensor, Tensor]:
        """Wait for them: parameter -> the combined gradient, or this rank's part of it."""
        for bucket, received, works in self.flying:
            self.ranks.wait(*works)
            sizes = [p.numel() for p in bucket.parameters]
            parts = received[: sum(sizes)].split(sizes)
            for p, part in zip(bucket.parameters, parts, strict=True):
                # A small gradient that is kept shall not keep those of the whole bucket
                self.made[p] = (part if len(parts) == 1 else part.clone()).view(p.shape)
        return self.made


def padded(rows: Sequence[Tensor], length: int) -> list[Tensor]:
    """``rows``, and as many empty ones as make them ``length``: gloo counts messages where it is
    asked to look for mistakes, and all ranks have to have sent the same number."""
    return [*rows, *(rows[0].new_empty(0) for _ in range(length - len(rows)))]


def cut(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Tensors of these sizes, one after the other, cut into pieces of one length: what each piece
    has of each tensor, and of what comes after the last."""
    total = sum(sizes)
    length = -(-total // ranks)
    ends = [*itertools.accumulate([*sizes, ranks * length - total])]
    return [
        [
            max(0, min(end, (r + 1) * length) - max(begin, r * length))
            for begin, end in itertools.pairwise([0, *ends])
        ]
        for r in range(ranks)
    ]


def _dtype(p: Tensor) -> torch.dtype:
    """What its statistics are computed in."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
