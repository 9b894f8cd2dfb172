r"""Samples of the rows of an output gradient, by probing.

A backward is linear in its start gradient. Scale the loss of sample i by :math:`2^{e_i}`: an entry
that depends on sample i alone is scaled by :math:`2^{e_i}` bit for bit, since only its exponent
changes. Two such backwards, read by `torch.frexp`, give the sample of every entry. An entry with a
changed mantissa depends on several samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ...carried import continued
from ..graph import Graph, output_dtypes
from ..plain import without_autocast
from .owners import UNREAD, Output, Owner, OwnerMap, Unclear, same

_SMALL = 1 << 16  # entries of a gradient whose entries are read one by one
# Powers of two that scale a loss without overflow or underflow of common gradients
_BASE = {torch.float16: 8, torch.bfloat16: 128, torch.float32: 128, torch.float64: 1024}
_TARGET = {False: 0, True: 8}  # exponent of the largest gradient, without and with float16


def probe(losses: Tensor, graph: Graph, outputs: Sequence[Output]) -> OwnerMap:
    """Find the `Owner` of each output gradient, or the reason for none.

    Runs ``1 + ceil(log_base N)`` backwards that compute no gradient below ``outputs``; base is 128
    in float32. If gradients are far from 1, a further backward finds a power of two to start with;
    if they are far from each other, faint ones are read at another power. The graph is kept.

    Args:
        losses: ``[N]``.
        graph: graph of ``losses.grad_fn``.
        outputs: outputs to probe.
    """
    samples = losses.shape[0]
    through = {dtype for node in graph.nodes for dtype in _dtypes(node)}
    half = torch.float16 in through
    dtypes = {dtype for out in outputs for dtype in _dtypes(out.node)}
    dtypes |= {losses.dtype} | through - {torch.float16}
    # No larger than needed: small powers allow to read small gradients
    most = 1 << max(1, (samples - 1).bit_length())
    base = min(most, *(_BASE.get(dtype, 8) for dtype in dtypes))
    digits = max(1, math.ceil(math.log(max(samples, 2), base) - 1e-9))
    number = torch.arange(samples, device=losses.device)
    # Below the smallest normal number of any operation above, bits are lost and reading fails
    floor = max(torch.finfo(dtype).tiny for dtype in through | dtypes) * (16 if half else 4096)
    one = torch.ones_like(losses)

    def scaled(shift: int, looked_at: Sequence[Output]) -> list[list[Tensor] | None]:
        weight = torch.ldexp(one, torch.full_like(number, shift))
        return _profiles(losses, graph, looked_at, weight)

    def read(
        shift: int, looked_at: Sequence[Output], first: Sequence[list[Tensor] | None]
    ) -> list[_Reading | None]:
        readings = [
            None if profile is None else _Reading(profile, half, floor) for profile in first
        ]
        for digit in range(digits):
            exponent = (number // base**digit) % base - base // 2 + shift
            second = _profiles(losses, graph, looked_at, torch.ldexp(one, exponent))
            for reading, profile in zip(readings, second, strict=True):
                if reading is not None and profile is not None:
                    reading.digit(profile, base, base**digit)
        return readings

    shift, unscaled = 0, scaled(0, outputs)
    first = unscaled
    for _ in range(3):
        if not (more := _shift(first, half)):
            break
        shift += more
        first = scaled(shift, outputs)
    found = {
        out: reading
        for out, reading in zip(outputs, read(shift, outputs, first), strict=True)
        if reading is not None
    }
    raw = {out: profile for out, profile in zip(outputs, unscaled, strict=True) if profile}
    for _ in range(3):
        faint = {
            out: size
            for out, reading in found.items()
            if out in raw and (size := reading.faint(raw[out], samples))
        }
        if not faint:
            break
        shift = _TARGET[half] - math.frexp(max(faint.values()))[1]
        again = read(shift, list(faint), scaled(shift, list(faint)))
        for out, reading in zip(faint, again, strict=True):
            if reading is not None:
                found[out].add(reading)
    return {
        out: found[out].result(raw.get(out), samples, partial(follows, losses, out))
        if out in found
        else None
        for out in outputs
    }


def _dtypes(node: Node) -> set[torch.dtype]:
    """Return the real dtypes of the gradients at a node."""
    found = {dtype.to_real() for dtype in output_dtypes(node) if dtype is not None}
    return found & _BASE.keys()


def follows(losses: Tensor, output: Output, ids: Tensor) -> bool:
    """Whether ``ids``, broadcastable to an output gradient, gives the sample of each entry; -1 for
    none, `UNREAD` for any. Takes ``1 + ceil(log_7 N)`` backwards."""
    number = torch.arange(len(losses), device=losses.device)
    one, known = torch.ones_like(losses), ids.clamp(min=0)
    first = _gradient(losses, output, one)
    weight = 1
    while first is not None and weight < max(len(losses), 2):
        exponent = number // weight % 7 - 3
        second = _gradient(losses, output, torch.ldexp(one, exponent))
        assert second is not None
        scale = torch.where(ids >= 0, torch.exp2(exponent[known].float()), 0).to(first.dtype)
        expected = torch.where(ids == UNREAD, second, first * scale)
        if not torch.allclose(second, expected, rtol=1e-2, atol=0, equal_nan=True):
            return False
        weight *= 7
    return True


def _gradient(losses: Tensor, output: Output, weight: Tensor) -> Tensor | None:
    grad: Any
    with without_autocast(losses):
        (grad,) = torch.autograd.grad(
            losses, [GradientEdge(*output)], weight, retain_graph=True, allow_unused=True
        )
    return None if grad is None else (grad.to_dense() if grad.is_sparse else grad).detach()


class _Reading:
    """Samples read so far from one output gradient, for each of its profiles."""

    def __init__(self, profile: list[Tensor], half: bool, floor: float) -> None:
        self.profile, self.half, self.floor = profile, half, floor
        self.there = [torch.isfinite(x) & (x != 0) for x in profile]
        self.ids: list[Tensor | None] = [torch.zeros_like(x, dtype=torch.int64) for x in profile]
        self.scaled: list[list[Tensor]] = []
        self.readable: list[int] | None = None

    def digit(self, scaled: list[Tensor], base: int, weight: int) -> None:
        """Read one digit of each entry's sample from the gradient of the scaled losses."""
        self.scaled.append(scaled)
        for k, (a, b, there) in enumerate(zip(self.profile, scaled, self.there, strict=True)):
            if (ids := self.ids[k]) is None:
                continue
            floor = max(self.floor, torch.finfo(a.dtype).tiny * 4096)
            there = self.there[k] = there & torch.isfinite(b) & (a >= floor) & (b >= floor)
            appeared = (a == 0) & (b >= floor * 2.0 ** (base // 2)) & torch.isfinite(b)
            value = None if bool(appeared.any()) else _exponents(a, b, there, base, self.half)
            self.ids[k] = None if value is None else ids + value * weight

    def add(self, other: _Reading) -> None:
        """Fill in samples from another reading, at another power of two."""
        self.readable = None
        for k, (ids, more) in enumerate(zip(self.ids, other.ids, strict=True)):
            if ids is not None and more is not None:
                self.ids[k] = torch.where(self.there[k], ids, more)
                self.there[k] = self.there[k] | other.there[k]

    def faint(self, raw: list[Tensor], samples: int) -> float:
        """Return the largest finite unread size; ``raw`` is the unscaled profile."""
        for k in self._readable(samples)[:1]:
            if not bool(self.there[k].all()):
                size = torch.where(self.there[k] | ~torch.isfinite(raw[k]), 0, raw[k])
                return float(size.max())
        return 0.0

    def _readable(self, samples: int) -> list[int]:
        """Return the profiles whose entries do not mix samples. In a sum, a large gradient hides
        small ones: if single entries were read, they decide."""
        if self.readable is not None:
            return self.readable
        found = [
            k
            for k, (ids, there) in enumerate(zip(self.ids, self.there, strict=True))
            if ids is not None and not bool(((ids >= samples) & there).any())
        ]
        if 2 in found:
            entries = self._known(2, -1)
            first = next(k for k in found if k == 2 or same(self._known(k, -1), entries))
            found = [first]
        self.readable = found
        return found

    def _known(self, k: int, unknown: Tensor | int) -> Tensor:
        ids = self.ids[k]
        assert ids is not None
        return torch.where(self.there[k], ids, unknown)

    def _owners(self, k: int, raw: list[Tensor] | None) -> Tensor:
        if bool(self.there[k].all()):
            return self._known(k, -1)
        return self._known(k, torch.where(self._seen(k, raw), UNREAD, -1))

    def _seen(self, k: int, raw: list[Tensor] | None) -> Tensor:
        """Mask of the entries that are not zero at one power of two at least."""
        seen = self.profile[k] != 0
        for profile in [*self.scaled, *([raw] if raw is not None else [])]:
            seen = seen | (profile[k] != 0)
        return seen

    def result(
        self, raw: list[Tensor] | None, samples: int, fits: Callable[[Tensor], bool]
    ) -> Owner | Unclear:
        """Return the result; ``fits`` checks owners against the gradient's entries."""
        if not bool(self._seen(0, raw).any()):
            return Unclear(mixes=False)
        found = [self._owners(k, raw) for k in self._readable(samples)]
        if len(found) == len(self.profile) == 2 and samples > 1:
            found = [ids for ids in found if fits(ids)]
        return Owner(found[0]) if found else Unclear(mixes=True)


def _profiles(
    losses: Tensor, graph: Graph, outputs: Sequence[Output], weight: Tensor
) -> list[list[Tensor] | None]:
    """Compute profiles of each output gradient: sums of absolute values over the last dimension,
    over all others, and for a small gradient its absolute values, each broadcastable to it. They
    are computed as the gradient arrives, so no more gradients are alive than in any backward."""
    found: dict[Output, list[Tensor] | None] = dict.fromkeys(outputs)
    wanted: dict[Node, list[Output]] = {}
    for out in outputs:
        wanted.setdefault(out.node, []).append(out)
    # A backward to the deepest passes all others, but does not run the deepest
    passed = graph.above(node for node in wanted if node in graph.position)
    deepest = [out for out in outputs if out.node not in passed]

    def look(of_node: list[Output], grads: Sequence[Tensor | None]) -> None:
        with torch.no_grad():
            for out in of_node:
                if (grad := grads[out.nr]) is not None:
                    found[out] = _profile(grad)

    handles = [
        node.register_prehook(continued(partial(look, of_node)))
        for node, of_node in wanted.items()
        if node in passed
    ]
    try:
        with without_autocast(losses):
            grads = torch.autograd.grad(
                losses,
                [GradientEdge(out.node, out.nr) for out in deepest],
                weight,
                retain_graph=True,
                allow_unused=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    found |= {
        out: None if grad is None else _profile(grad)
        for out, grad in zip(deepest, grads, strict=True)
    }
    return [found[out] for out in outputs]


def _profile(grad: Tensor) -> list[Tensor]:
    grad = grad.detach()
    if grad.is_sparse:
        grad = grad.to_dense()
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj()).abs().sum(-1)
    if grad.dtype in (torch.float16, torch.bfloat16):
        grad = grad.float()
    if grad.dim() < 2:
        return [grad.abs()]
    lead = tuple(range(grad.dim() - 1))
    # Norms, since absolute values would be one more tensor of this size
    profile = [torch.linalg.vector_norm(grad, 1, dims, keepdim=True) for dims in ((-1,), lead)]
    if grad.numel() <= _SMALL:
        profile.append(grad.abs())
    return profile


def _shift(profiles: Sequence[list[Tensor] | None], half: bool) -> int:
    """Return the exponent to scale the losses with, so that gradients keep their bits."""
    sizes = [
        profile[0].amax() for profile in profiles if profile is not None and profile[0].numel()
    ]
    largest = max((float(size) for size in sizes if not bool(size.isnan())), default=0.0)
    if half and largest in (0.0, math.inf):
        return 10 if largest == 0 else -10
    if largest in (0.0, math.inf):
        return 0
    exponent = math.frexp(largest)[1]
    target, window = _TARGET[half], 3 if half else 30
    return target - exponent if abs(target - exponent) > window else 0


def _exponents(a: Tensor, b: Tensor, there: Tensor, base: int, half: bool) -> Tensor | None:
    """Return the power of two between ``a`` and ``b``, from 0 to ``base - 1``; None if the scale of
    an entry that is ``there`` is no power of two."""
    ratio = torch.where(there, b / a, 1)
    exponent = torch.frexp(ratio * math.sqrt(2))[1] - 1  # of the nearest power of two
    # Kernels with atomics vary the order of sums; float16 loses bits of small numbers
    slack = 1e-2 if half else 1e-3 if a.is_cuda else 4 * torch.finfo(a.dtype).eps
    value = exponent.long() + base // 2
    bad = ((torch.ldexp(ratio, -exponent) - 1).abs() > slack) | (value < 0) | (value >= base)
    return None if bool((bad & there).any()) else torch.where(there, value, 0)
