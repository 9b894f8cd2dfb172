"""Operations of random models: each takes samples ``[N, T, C]`` and returns the same shape."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from functions import Scale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint

C = 4  # channels; batches and sequences may be as long


class Weights(nn.Module):
    """Parameters that operations share, directly and through weights that are made from them."""

    rounded = False  # whether some weight was cast to float32, in which samples are then summed
    logits: Tensor | None = None  # of the last cross-entropy, and its labels
    labels: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(C, C) / 2 for _ in range(3))
        self.vectors = nn.ParameterList(torch.randn(C) / 2 for _ in range(3))
        self.table = nn.Parameter(torch.randn(6, C) / 2)
        self.gate = nn.Parameter(torch.zeros(()))
        self.lstm, self.gru, self.rnn = nn.LSTM(C, C), nn.GRU(C, C), nn.RNN(C, C)
        self.cell = nn.GRUCell(C, C)
        self.kernel = nn.Parameter(torch.randn(C, C, 3) / 3)


class Step:
    """The weights and the random choices of one operation in one step.

    Args:
        weights: of the model.
        model: choices that stay the same in all steps.
        step: choices of this step; about half of the steps repeat those of the one before.
    """

    def __init__(self, weights: Weights, model: random.Random, step: random.Random) -> None:
        self.weights, self.model, self.step = weights, model, step
        self.derivation = model.choice(list(DERIVED))
        self.first, self.second = model.randrange(3), model.randrange(3)
        self.on = step.random() < 0.5
        self.generator = torch.Generator().manual_seed(step.randrange(1 << 30))

    @property
    def matrix(self) -> Tensor:
        w = self.weights.matrices
        self.weights.rounded |= self.derivation == "cast"
        return DERIVED[self.derivation](w[self.first], w[self.second])

    @property
    def vector(self) -> Tensor:
        return self.weights.vectors[self.first]

    def order(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def numbers(self, most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=self.generator)

    def noise(self, *shape: int) -> Tensor:
        made = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return made.to(self.weights.gate.dtype)


DERIVED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "itself": lambda a, b: a,
    "masked": lambda a, b: a * torch.ones_like(a).tril(),
    "normed": lambda a, b: a / a.norm(dim=1, keepdim=True),
    "low rank": lambda a, b: a + b[:, :2] @ (a[:2] / a[:2].norm(dim=1, keepdim=True)),
    "spectral": lambda a, b: a / (a.new_ones(C) / 2 @ a @ a.new_ones(C)).abs().add(1),
    "transposed": lambda a, b: a.t(),
    "sum of two": lambda a, b: a + b,
    "centred": lambda a, b: a - a.mean(1, keepdim=True),
    "cast": lambda a, b: a.float().to(a.dtype),
}


def _folded(s: Step, h: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """``run`` on rows ``[R, C]`` in some order of samples and positions."""
    n, t, c = h.shape
    kind = s.model.randrange(4)
    if kind == 0:
        return run(h.reshape(n * t, c)).view(n, t, c)
    if kind == 1:
        return run(h.transpose(0, 1).reshape(n * t, c)).view(t, n, c).transpose(0, 1)
    if kind == 2:
        order = s.order(n * t)
        return run(h.reshape(n * t, c)[order])[order.argsort()].view(n, t, c)
    return torch.stack([run(part) for part in h.unbind(1)], 1)


def _attention(s: Step, h: Tensor) -> Tensor:
    q, k = (h @ s.matrix).unflatten(2, (2, 2)), h.unflatten(2, (2, 2))
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2)
        )
    return out.transpose(1, 2).flatten(2)


def _packed(s: Step, h: Tensor) -> Tensor:
    lengths = 1 + s.numbers(h.shape[1], len(h))
    lengths[0] = h.shape[1]
    packed = rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
    return h + rnn.pad_packed_sequence(s.weights.rnn(packed)[0], batch_first=True)[0]


def _experts(s: Step, h: Tensor) -> Tensor:
    rows = h.flatten(0, 1)
    left = s.numbers(2, len(rows)).bool()
    out = torch.zeros_like(rows)
    for chosen, w in ((left, s.matrix), (~left, s.weights.matrices[s.second])):
        where = chosen.nonzero().squeeze(1)
        out = out.index_add(0, where, rows[where] @ w)
    return out.view(h.shape)


def _bags(s: Step, h: Tensor) -> Tensor:
    rows = (h.flatten(0, 1) @ s.matrix).tanh()
    bags = torch.cat([torch.arange(len(h)), s.numbers(len(h), len(rows) - len(h))])
    bags = bags.sort()[0]
    return h + h.new_zeros(len(h), C).index_add(0, bags, rows).unsqueeze(1)


def _shared_rows(s: Step, h: Tensor) -> Tensor:
    own = h.mean(1) @ s.matrix
    rows = torch.cat([s.weights.table, own.tanh()])
    table = s.numbers(6, len(h))
    return h + rows[table].unsqueeze(1) * rows[6 + torch.arange(len(h))].unsqueeze(1)


def _embedding_bag(s: Step, h: Tensor) -> Tensor:
    sizes = s.numbers(3, len(h))
    offsets = sizes.cumsum(0) - sizes
    words = s.numbers(6, int(sizes.sum()))
    return h + F.embedding_bag(words, s.weights.table, offsets, mode="sum").unsqueeze(1)


def _written(s: Step, h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, :1] = h[:, :1] @ s.matrix
    out[:, 1:] = h[:, 1:]
    return out


def _recurrent(s: Step, h: Tensor) -> Tensor:
    module = (s.weights.lstm, s.weights.gru, s.weights.rnn)[s.first]
    return module(h.transpose(0, 1))[0].transpose(0, 1)


def _norm(s: Step, h: Tensor) -> Tensor:
    mean, var = torch.zeros_like(s.vector), torch.ones_like(s.vector)
    return _folded(
        s, h, lambda r: F.batch_norm(r, mean, var, s.vector, None, training=s.on and len(r) > 1)
    )


def _conv2d(s: Step, h: Tensor) -> Tensor:
    kernel = s.weights.kernel.mean(1).view(C, 1, 1, 3)
    return F.conv2d(h.transpose(1, 2).unsqueeze(2), kernel, s.vector, padding=(0, 1), groups=C)[
        :, :, 0
    ].transpose(1, 2)


OPERATIONS: dict[str, Callable[[Step, Tensor], Tensor]] = {
    "linear": lambda s, h: _folded(s, h, lambda r: F.linear(r, s.matrix, s.vector)),
    "matmul": lambda s, h: h @ s.matrix,
    "left": lambda s, h: _folded(s, h, lambda r: (s.matrix @ r.t()).t()),
    "bmm": lambda s, h: h.bmm(s.matrix.expand(len(h), C, C)),
    "einsum": lambda s, h: torch.einsum("tnc,cd->ntd", h.transpose(0, 1), s.matrix),
    "sequence first": lambda s, h: F.linear(h.transpose(0, 1), s.matrix).transpose(0, 1),
    "own weights": lambda s, h: h.bmm(torch.einsum("ntc,cd->ncd", h, s.matrix)),
    "conv1d": lambda s, h: F.conv1d(h.mT, s.weights.kernel, s.vector, padding=1).mT,
    "conv_transpose": lambda s, h: F.conv_transpose1d(h.mT, s.weights.kernel, padding=1).mT,
    "conv2d": _conv2d,
    "batch norm": _norm,
    "layer norm": lambda s, h: F.layer_norm(h, (C,), s.vector, s.weights.vectors[s.second]),
    "group norm": lambda s, h: F.group_norm(h.mT, 2, s.vector).mT,
    "rms norm": lambda s, h: F.rms_norm(h, (C,), s.vector),
    "embedding": lambda s, h: h + F.embedding(s.numbers(6, *h.shape[:2]), s.weights.table),
    "embedding bag": _embedding_bag,
    "positions": lambda s, h: h + s.weights.table[: h.shape[1]] * s.vector,
    "experts": _experts,
    "gather": lambda s, h: h.gather(0, s.numbers(len(h), *h.shape)),
    "index_select": lambda s, h: (h @ s.matrix).index_select(0, s.order(len(h))),
    "split and cat": lambda s, h: torch.cat(
        [p @ s.matrix for p in h.chunk(2, s.first % 2)], s.first % 2
    ),
    "permute": lambda s, h: (h.permute(1, 2, 0).mT @ s.matrix).permute(1, 0, 2),
    "softmax": lambda s, h: h.softmax(s.first % 3) * s.vector,
    "attention": _attention,
    "recurrent": _recurrent,
    "cell": lambda s, h: torch.stack([s.weights.cell(r, r.flip(1)) for r in h.unbind(1)], 1),
    "packed": _packed,
    "function": lambda s, h: _folded(s, h, lambda r: Scale.apply(r, s.vector)),
    "cumsum": lambda s, h: (h @ s.matrix).cumsum(s.first % 2),
    "roll": lambda s, h: h + float(s.on) * (h @ s.matrix).roll(1, 0).tanh(),
    "flip": lambda s, h: h + float(s.on) * h.flip(0) * s.vector,
    "pairs": lambda s, h: h + (h.mean(1) @ h.mean(1).t() @ h.mean(1)).unsqueeze(1),
    "batch mean": lambda s, h: h - float(s.on) * h.mean(0),
    "bags": _bags,
    "shared rows": _shared_rows,
    "where": lambda s, h: torch.where(s.noise(*h.shape) > 0, h @ s.matrix, h),
    "where samples": lambda s, h: torch.where(s.noise(len(h), 1, 1) > 0, h.flip(0), h),
    "checkpoint": lambda s, h: checkpoint(
        lambda x: (x @ s.matrix).tanh() + s.vector, h, use_reentrant=False
    ),
    "gate": lambda s, h: h + s.weights.gate * (h @ s.matrix).tanh(),
    "gates of samples": lambda s, h: h + s.numbers(2, len(h), 1, 1).to(h) * (h @ s.matrix).sin(),
    "writes": _written,
    "sort": lambda s, h: h.sort(0)[0] * s.vector,
    "expand": lambda s, h: h * s.vector.expand(len(h), 1, C),
    "broadcasts": lambda s, h: torch.addcmul(h, s.vector, h.sin()) / (s.vector.square() + 1),
    "dropout": lambda s, h: h * (s.noise(*h.shape) > 0).to(h) @ s.matrix,
}


def _cross_entropy(s: Step, h: Tensor) -> Tensor:
    s.weights.logits = h.mean(1) @ s.matrix + s.vector
    s.weights.labels = s.numbers(C, len(h))
    return F.cross_entropy(s.weights.logits, s.weights.labels, reduction="none")


# What makes losses [N] of the samples
HEADS: dict[str, Callable[[Step, Tensor], Tensor]] = {
    "squares": lambda s, h: (h @ s.matrix).square().sum((1, 2)),
    "cross entropy": _cross_entropy,
    "pairs": lambda s, h: (
        -(F.normalize(h.mean(1), dim=1) @ F.normalize(h.mean(1), dim=1).t())
        .log_softmax(1)
        .diagonal()
    ),
    "decay": lambda s, h: (h @ s.matrix).sin().sum((1, 2)) + s.matrix.square().sum(),
    "later term": lambda s, h: h.square().sum((1, 2)) + float(s.on) * h.mean(0).square().sum(),
    "sequence first": lambda s, h: (h.transpose(0, 1) @ s.matrix).exp().tanh().sum((0, 2)),
}
