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
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .ranks import Ranks
from .sharding import part_sizes, sharded


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
        self.works = self.ranks.send_and_receive(
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
