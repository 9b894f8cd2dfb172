"""Calls every op with random arguments, right and wrong ones: ``python fuzz.py SEED CALLS``.

Reference and compiled op either both refuse, in the same words, or both give the same numbers. A
compiled op that is called by its own name refuses what the checks refuse. Run in a process of its
own, which a crash may end, within a limit of memory.
"""

from __future__ import annotations

import copy
import math
import os
import random
import resource
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from cases import arguments, cast
from torch import Tensor

import fastdg
from fastdg.ops import window as windows
from fastdg.ops.dispatch.derivatives import call
from fastdg.ops.dispatch.registry import OPS

MEMORY = 6 << 30
HUGE = (-1, 0, 2**31, 2**61, 2**62, 2**63 - 1, -(2**63))
REALS = (float("nan"), math.inf, -math.inf, 1e300, -1.0, 0.0)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


class Draw:
    """Right arguments for each op, of random sizes where it has a method here."""

    def __init__(self, random: random.Random, dtype: torch.dtype = torch.float32) -> None:
        self.random, self.dtype = random, dtype

    def size(self, least: int = 0, most: int = 6) -> int:
        return self.random.randint(least, most)

    def tensor(self, *shape: int) -> Tensor:
        """In a random layout."""
        x = torch.randn(shape, dtype=self.dtype) + 0.3
        layout = self.random.randrange(4)
        if layout == 1 and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == 2 and x.dim() > 0:
            wide = x.new_full((*shape[:-1], 2 * shape[-1] + 1), float("nan"))
            wide[..., 1::2] = x
            return wide[..., 1::2]
        return x

    def partition(self, samples: int) -> tuple[Tensor, Tensor]:
        covered = samples if self.random.random() < 0.7 else self.size(0, samples)
        domains = self.size(1, 4)
        counts = torch.bincount(torch.randint(domains, (covered,)), minlength=domains)
        order = torch.randperm(samples)[:covered]
        return order, torch.tensor([0, *accumulate(counts.tolist())])

    def outer(self) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        N, O, dims = self.size(0, 8), self.size(0, 20), self.size(0, 3)  # noqa: E741
        order, offsets = self.partition(N)
        if dims == 0:
            T, inputs = self.random.choice((0, 1, 1, 2, 5)), self.size(0, 20)
            a, window = self.tensor(N, T, inputs), []
        else:
            kernel = [self.size(1, 3) for _ in range(dims)]
            stride = [self.size(1, 3) for _ in range(dims)]
            dilation = [self.size(1, 2) for _ in range(dims)]
            spatial = [
                d * (k - 1) + 1 + self.size(0, 3) for k, d in zip(kernel, dilation, strict=True)
            ]
            window = [*kernel, *stride, *dilation]
            a = self.tensor(N, self.size(0, 3), *spatial)
            T = windows.sizes(a.shape, window)[0]
        return a, self.tensor(N, T, O), order, offsets, window

    def lists(self) -> tuple[list[Tensor], int]:
        domains = self.size(1, 9)
        shapes = [[self.size(0, 5) for _ in range(self.size(0, 2))] for _ in range(self.size(1, 3))]
        return [self.tensor(*shape) for _ in range(domains) for shape in shapes], domains

    def weights(self, domains: int) -> Tensor:
        return torch.randn(domains, dtype=self.dtype) * (torch.rand(domains) < 0.8)

    def gap(self) -> tuple[list[Tensor], list[Tensor], Tensor, float]:
        D = self.size(0, 8)
        shapes = [[self.size(0, 5) for _ in range(self.size(0, 2))] for _ in range(self.size(1, 3))]
        ema = [self.tensor(D, *shape) for shape in shapes] if self.random.random() < 0.5 else []
        return [self.tensor(D, *s) for s in shapes], ema, torch.rand(D) < 0.7, 2.0

    def mask(self) -> tuple[float, float]:
        return self.random.choice((0.3, 0.5, 1.0)), self.random.choice((math.inf, 3.0))

    def statistic(self, args: tuple[Any, ...]) -> Tensor:
        a, delta, _, offsets, window = args
        return self.tensor(len(offsets) - 1, delta.shape[2], windows.sizes(a.shape, window)[1])

    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        N, C, P = self.size(0, 4), self.size(0, 20), self.size(0, 20)
        return self.tensor(N, C, P), self.tensor(N, C, P), self.tensor(C)

    def norm(self) -> tuple[Any, ...]:
        N, T, G, S = self.size(0, 4), self.size(0, 3), self.size(1, 4), self.size(0, 20)
        shape = N, T, G * self.size(0, 10), self.random.choice((1, S))
        mean, rstd = self.tensor(N, T, G), self.tensor(N, T, G)
        given = self.random.choice(((mean, rstd), (None, rstd), (None, None)))
        own = given[1] is not None and self.random.random() < 0.5
        eps = self.random.choice((None, 0.1)) if given[1] is not None else None
        if eps is not None:
            given = given[0], rstd.abs()  # a variance
        return self.tensor(*shape), self.tensor(*shape), *given, own, eps

    def texts(self) -> tuple[Tensor, ...]:
        N, E, C, A = self.size(0, 5), self.size(0, 20), self.size(1, 4), self.size(0, 4)
        labels = torch.randint(C, (N,))
        tables = self.tensor(C, E), self.tensor(C, A, E), self.tensor(C, A)
        return (self.tensor(N, E), labels, *tables)

    def arguments(self, name: str) -> list[Any]:
        """Those of a method of the op's name, else those of one of its cases."""
        if (draw := getattr(self, f"_{name}", None)) is not None:
            return list(draw())
        every = arguments("cpu", False)
        key = self.random.choice([key for key in every if key.split(",")[0] == name])
        return [cast(arg, self.dtype) for arg in every[key]]

    def _outer_moments(self) -> Any:
        return self.outer()

    _outer_domain = _outer_gram = _outer_moments

    def _outer_norms(self) -> Any:
        a, delta, _, _, window = self.outer()
        return a, delta, window

    def _outer_agreement(self) -> Any:
        a, delta, order, offsets, window = self.outer()
        weights = self.weights(len(offsets) - 1) * (offsets[1:] > offsets[:-1])
        return a, delta, order, offsets, weights, *self.mask(), window

    def _outer_moments_backward(self) -> Any:
        args = a, delta, order, offsets, window = self.outer()
        up = [self.statistic(args) for _ in range(3)]
        return up[0], up[1], a, delta, up[2], order, offsets, bool(self.size(0, 1)), window

    def _moments(self) -> Any:
        N = self.size(0, 8)
        return self.tensor(N, self.size(0, 40)), *self.partition(N)

    def _moments_backward(self) -> Any:
        grads, order, offsets = self._moments()
        up = [self.tensor(len(offsets) - 1, grads.shape[1]) for _ in range(3)]
        return up[0], up[1], grads, up[2], order, offsets

    def _foreach_moments(self) -> Any:
        N = self.size(1, 8)
        grads = [self.tensor(N, *self.sizes()) for _ in range(self.size(0, 3))]
        pairs = [self.factors(N) for _ in range(self.size(0 if grads else 1, 3))]
        a, delta = [x for x, _ in pairs], [d for _, d in pairs]
        return *self.partition(N), grads, a, delta, self.random.random() < 0.5

    def sizes(self) -> list[int]:
        return [self.size(0, 6) for _ in range(self.size(0, 2))]

    def factors(self, N: int) -> tuple[Tensor, Tensor]:
        rows = (N, self.size(0, 4)) if self.random.random() < 0.5 else (N,)
        return self.tensor(*rows, self.size(0, 20)), self.tensor(*rows, self.size(0, 20))

    def _loss_sums(self) -> Any:
        N, D = self.size(0, 9), self.size(1, 5)
        return self.tensor(N), torch.randint(D, (N,)), D

    def _combine_rows(self) -> Any:
        D = self.size(1, 5)
        rows = [self.tensor(D, *self.sizes()) for _ in range(self.size(1, 4))]
        return rows, self.weights(D)

    def _gram(self) -> Any:
        return self.lists()

    def _combine(self) -> Any:
        flat, domains = self.lists()
        return flat, self.weights(domains)

    def _agreement(self) -> Any:
        return *self._combine(), *self.mask()

    def _meta_step(self) -> Any:
        flat, _ = self.lists()
        return flat, [self.tensor(*x.shape) for x in flat], 0.3

    def _variance_gap(self) -> Any:
        return self.gap()

    def _variance_gap_backward(self) -> Any:
        return self.tensor(), *self.gap()

    def _norm_gradients(self) -> Any:
        return self.norm()

    def _foreach_norm_gradients(self) -> Any:
        x, delta, mean, rstd, _, eps = self.norm()
        if rstd is None:
            rstd = x.new_ones((*x.shape[:2], 1))
        many = range(3)
        means, all_eps = [mean for _ in many if mean is not None], [eps for _ in many if eps]
        return [x for _ in many], [delta for _ in many], means, [rstd for _ in many], all_eps

    def _norm_gradients_backward(self) -> Any:
        x, *rest = self.norm()
        up = [self.tensor(x.shape[0], x.shape[2]) for _ in range(2)]
        gain = self.tensor(x.shape[2]) if self.random.random() < 0.5 else None
        coming = rest[0] * 2 + 1 if self.random.random() < 0.7 else None
        return *up, x, *rest, gain, coming

    def _oracle_nll(self) -> Any:
        return self.maps()

    def _oracle_nll_backward(self) -> Any:
        features, oracle, bias = self.maps()
        N, C, _ = features.shape
        return self.tensor(N), features, oracle, bias, self.tensor(N, C).square()

    def _text_distance(self) -> Any:
        return self.texts()

    def _text_distance_backward(self) -> Any:
        texts = self.texts()
        return self.tensor(len(texts[0])), self.tensor(len(texts[0])), *texts


def spoil_tensor(x: Tensor, draw: random.Random) -> Any:
    """Something else in the place of a tensor; often what no op can take."""
    if x.layout is not torch.strided or x.is_meta or x.numel() > 2**20:  # spoiled already
        return x
    kind = draw.randrange(13)
    integer = not (x.is_floating_point() or x.is_complex())
    if kind == 0:
        return x.to(draw.choice(DTYPES))
    if kind == 1:
        return x.to("meta")
    if kind == 2:
        return x.transpose(0, -1) if x.dim() > 1 else x.unsqueeze(0)
    if kind == 3:
        return x[:-1] if x.dim() > 0 else x.expand(2)
    if kind == 4:
        return x.new_empty([0] * x.dim())
    if kind == 5 and x.dim() > 0:
        return torch.cat([x, x])
    if kind == 6 and x.numel() > 0:  # one element in the place of all
        return x.flatten()[0].expand(x.shape)
    if kind == 7 and x.numel() > 0:
        return x.flatten()[:1].as_strided(
            [2**40, *[1] * max(0, x.dim() - 1)], [0] * max(1, x.dim())
        )
    if kind == 8 and x.numel() > 1 and x.dim() > 0:  # elements overlap
        base = x.flatten().clone()
        return base.as_strided((*x.shape[:-1], max(1, x.shape[-1] - 1)), [0] * (x.dim() - 1) + [1])
    if kind == 9 and not integer:
        return torch.where(torch.rand(x.shape) < 0.2, draw.choice((math.nan, math.inf)), x)
    if kind == 10:
        return draw.choice((None, 3, "a", [x]))
    if kind == 11 and x.dim() > 0:
        return x.to_sparse()
    if integer and x.dtype is torch.int64 and x.numel() > 0:
        x = x.clone()
        x.flatten()[draw.randrange(x.numel())] = draw.choice((*HUGE[:-2], 5, 1, 2))
        return x
    return torch.empty(0, *x.shape[1:]) if x.dim() > 0 else x


def spoil(args: list[Any], draw: random.Random) -> list[Any]:
    args = list(args)
    for _ in range(draw.choice((1, 1, 2))):
        k = draw.randrange(len(args))
        value = args[k]
        if isinstance(value, Tensor):
            args[k] = spoil_tensor(value, draw)
        elif isinstance(value, list):
            value = args[k] = list(value)
            if value and draw.random() < 0.8:
                j = draw.randrange(len(value))
                of_tensors = isinstance(value[j], Tensor)
                value[j] = (
                    spoil_tensor(value[j], draw) if of_tensors else draw.choice((*HUGE, 1, 2))
                )
            elif draw.random() < 0.5:
                value.append(draw.choice([*value, *value, *(() if value else HUGE)]))
            else:
                del value[draw.randrange(2) :]
        elif isinstance(value, float):
            args[k] = draw.choice((*REALS, None))
        elif isinstance(value, int):
            args[k] = draw.choice((*HUGE, 1, 2, 3))
    return args


def leaves(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [leaf for part in x for leaf in leaves(part)] if isinstance(x, (list, tuple)) else []


def outcome(run: Callable[..., Any], args: list[Any], writes: bool) -> tuple[str, Any]:
    args = copy.deepcopy(args) if writes else args  # layouts stay, and what shares memory
    try:
        with torch.no_grad():
            out = run(*args)
    except MemoryError:
        return "memory", None
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        text = str(error)
        if any(word in text for word in ("allocate", "bad_alloc", "Storage size", "overflow")):
            return "memory", text
        return "error", f"{type(error).__name__}: {text.splitlines()[0]}"
    return "value", leaves(out) + (leaves(args) if writes else [])


def same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return False
    if x.device.type == "meta":
        return True
    x, y = x.double(), y.double()
    if not torch.equal(x.isfinite(), y.isfinite()):
        return False
    x, y = (torch.where(z.isfinite(), z, 0) for z in (x, y))
    return bool((x - y).norm() <= 2e-3 * (1 + y.norm()))


def main(seed: int, calls: int) -> None:
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    counts = {"value": 0, "error": 0, "memory": 0}
    compiled = fastdg.backends()["cpp"][0]
    for number in range(calls):
        name = draw.choice(sorted(OPS))
        args = Draw(draw).arguments(name)
        if draw.random() < 0.75:
            args = spoil(args, draw)
        shown = f"seed {seed}, call {number}: {name}({described(args)})"
        print(shown, file=sys.stderr, flush=True)  # the last one is that which crashed
        writes = name == "meta_step"
        with fastdg.use_backend("reference"):
            expected = outcome(lambda *a, n=name: call(n, *a), args, writes)
        counts[expected[0]] += 1
        registered = getattr(torch.ops.fastdg, name)
        runs = {"torch.ops": registered}
        if compiled:
            runs["cpp"] = lambda *a, n=name: call(n, *a)
            if "cpp" in OPS[name].backends:
                runs["own name"] = getattr(torch.ops.fastdg_cpp, name)
        for way, run in runs.items():
            if way == "torch.ops":
                with fastdg.use_backend("reference"):
                    got = outcome(run, args, writes)
            else:
                with fastdg.use_backend("cpp" if compiled else "reference"):
                    got = outcome(run, args, writes)
            if "memory" in (got[0], expected[0]):
                continue
            if way == "own name" and got[0] == "error":
                continue  # it takes less: float32 alone
            assert got[0] == expected[0], f"{shown}\n{way}: {got}\nreference: {expected}"
            if got[0] == "value":
                for x, y in zip(got[1], expected[1], strict=True):
                    assert same(x, y), f"{shown}\n{way}: {got}\nreference: {expected}"
            elif "schema" not in got[1] and "Expected a value of type" not in got[1]:
                assert got == expected, f"{shown}\n{way}: {got}\nreference: {expected}"
                assert ": expected" in got[1], f"{shown}\n{way}: no advice in {got}"
    print(counts)


def described(x: Any) -> str:
    if isinstance(x, Tensor):
        small = x.numel() <= 8 and x.layout is torch.strided and x.device.type == "cpu"
        values = f" = {x.tolist()}" if small and not x.is_floating_point() else ""
        return f"{x.dtype}{list(x.shape)} {x.device} {x.layout}{values}".replace("torch.", "")
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(map(described, x)) + "]"
    return repr(x)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
