r"""Exchange of the domains' gradients between ranks; each rank combines one piece of them.

.. math:: g_d = \sum_r \tfrac{n_{rd}}{n_d}\, g_{rd}

Signs and inner products need the sums over the ranks. No rank holds all sums: a bucket of
parameters is cut into W pieces, one for each rank. Every rank sends its domains' gradients of a
piece to the rank of the piece, which sums and combines them and sends the result to all ranks. So a
rank sends (E + 1) P (W - 1)/W numbers for its E domains, where an all-reduce of the domains'
gradients would send 2 D P (W - 1)/W, and the ranks share the combining.

A rank sends a bucket as soon as the backward has passed its parameters, while the backward goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .ranks import Ranks
from .sharding import part_sizes, sharded


class Bucket:
    """Some parameters, and the exchange of their domains' gradients.

    Args:
        parameters: the parameters of the bucket.
        ranks: the ranks that exchange them.

    Attributes:
        places: parameter -> its spans in a row: (offset in the row, offset in the parameter,
            number of entries).
        pieces: for each rank, the number of entries of each parameter in its piece, then the
            number of zeros, which give all pieces of unsharded parameters one length.
        spans: for each rank, begin and end of its piece in a row.
        missing: the parameters without gradients so far.
        rows: this rank's gradients, one flat row for each domain in its batch, pieces in order of
            the ranks.
        received: other rank -> its gradients of this rank's piece.
        works: handles of the messages.
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
        """Store the gradients of a parameter, one for each of this rank's domains."""
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
        """Launch the exchange; each rank sends one row for each of its domains ``present``."""
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
        """Wait, and return domain -> sum of this rank's piece, weighted by the ranks' shares.

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
    """Append empty rows up to ``length``: in gloo's debug mode, all ranks must send the same number
    of messages."""
    return [*rows, *(rows[0].new_empty(0) for _ in range(length - len(rows)))]


def cut(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Cut concatenated tensors of these sizes into pieces of one length: for each piece, the number
    of entries of each tensor, then of the padding."""
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
