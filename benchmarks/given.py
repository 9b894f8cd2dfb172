"""Gradients that are given, in ResNet-50's shapes, and rows of the tables on them.

Every contender gets the gradients as it likes them best: lists of tensors, or ``[D, *shape]``
stacks of which those are rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from contenders import FLOOR, Case, Contender, Run
from torch import Tensor, nn

Named = Mapping[str, Tensor]


def resnet50_shapes(classes: int = 1000) -> Iterator[tuple[int, ...]]:
    """The shapes of its 161 parameters, in order."""

    def conv(inputs: int, outputs: int, kernel: int) -> Iterator[tuple[int, ...]]:
        yield outputs, inputs, kernel, kernel
        yield (outputs,)  # the norm after it
        yield (outputs,)

    yield from conv(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from conv(inputs, width, 1)
            yield from conv(width, width, 3)
            yield from conv(width, 4 * width, 1)
            if block == 0:
                yield from conv(inputs, 4 * width, 1)
            inputs = 4 * width
    yield classes, inputs
    yield (classes,)


SHAPES = tuple(resnet50_shapes())
assert len(SHAPES) == 161 and sum(map(torch.Size.numel, map(torch.Size, SHAPES))) == 25_557_032


@lru_cache(maxsize=1)
def stacks(domains: int, tensors: int) -> tuple[Tensor, ...]:
    """Gradients ``[D, *shape]`` with something in common; only the first two are in conflict, so
    that PCGrad comes to the same in any order."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES[:tensors]:
        stack = torch.randn(domains, *shape, generator=generator)
        stack[1] -= 0.5 * stack[0]
        stack += 0.3 * torch.randn(shape, generator=generator)
        found.append(stack)
    return tuple(found)


class Given:
    """The gradients of D domains; nobody changes them."""

    def __init__(self, domains: int, tensors: int) -> None:
        self.domains, self.stacks = domains, stacks(domains, tensors)
        self.lists = [[stack[d] for stack in self.stacks] for d in range(domains)]


class Trained(Given):
    """The same with the weights that are trained."""

    def __init__(self, domains: int, tensors: int) -> None:
        super().__init__(domains, tensors)
        self.weights = [nn.Parameter(w) for w in self.start()]

    def start(self) -> list[Tensor]:
        """Where the weights begin; made anew, so that only contenders that keep it hold it."""
        generator = torch.Generator().manual_seed(1)
        shapes = [p.shape for p in self.lists[0]]
        return [0.05 * torch.randn(shape, generator=generator) for shape in shapes]

    def gone(self) -> list[Tensor]:
        """How far the weights have moved."""
        pairs = zip(self.weights, self.start(), strict=True)
        return [p.detach() - start for p, start in pairs]


@dataclass(frozen=True)
class ColumnCase(Case):
    """A row on given gradients; ``samples`` is how many of the tensors there are."""

    domains: int = 3
    made: type[Given] = Given

    @property
    def title(self) -> str:
        return f"ResNet-50's {self.samples} tensors, D={self.domains}"

    def problem(self, samples: int | None = None, name: str | None = None) -> Given:
        return self.made(self.domains, samples or self.samples)

    exact = problem  # the truth is computed from the same numbers, tensor by tensor


def named(tensors: Any) -> Named:
    return {str(k): tensor for k, tensor in enumerate(tensors)}


def result(on: Given, out: Sequence[Tensor]) -> Named:
    return named(out)


def total(on: Given) -> Run:
    """The sum of the domains' gradients: what training without an algorithm would do with them."""

    def run() -> list[Tensor]:
        sums = torch._foreach_add(on.lists[0], on.lists[1])
        for domain in on.lists[2:]:
            torch._foreach_add_(sums, domain)
        return sums

    return run


def moving(passes: Callable[[int], int]) -> Contender:
    """Copies that read and write as much as ``passes(D)`` passes over one domain's gradients, each
    of one buffer of that size to another: 100 MB, too much for caches."""

    def make(on: Given) -> Run:
        elements = sum(g.numel() for g in on.lists[0])
        source, target = torch.ones(elements), torch.ones(elements)
        whole, rest = divmod(passes(on.domains), 2)
        part = rest * elements // 2

        def run() -> None:
            for _ in range(whole):
                target.copy_(source)
            target[:part].copy_(source[:part])

        return run

    return Contender(make, result=None)


def case(
    question: str,
    domains: int,
    contenders: dict[str, Contender],
    truth: Callable[[Any], Named],
    reach: float,
    **more: Any,
) -> ColumnCase:
    """A row whose floor is a copy, if there is one among the contenders, else the plain steps."""
    floor = None if FLOOR in contenders else lambda on: 1.0
    size = len(SHAPES)
    return ColumnCase(
        question, f"D={domains}", size, contenders, truth, floor, reach, domains=domains, **more
    )
