"""Counts of a training step on fake tensors, which take the route of CUDA tensors: dispatched ops,
launches of fastdg's own kernels, bytes, floating-point operations, live storage. Nothing runs.

A process that imports this is of no other use: it attaches kernels to CPU tensors. It needs Triton,
and to be started without TRITON_INTERPRET.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastdg import kernels
from fastdg.core import one_domain
from fastdg.gradients import engine, planner
from fastdg.gradients.graph import Graph
from fastdg.gradients.ownership.owners import Output, Owner, OwnerMap, Unclear
from fastdg.gradients.ownership.structure import structure
from fastdg.kernels import launch
from fastdg.ops import window
from fastdg.ops.dispatch import registry
from fastdg.ops.outer_moments import with_positions

# Launches of each op of csrc/columns_cuda.cu: sums of blocks are added up by a second one
COLUMNS = {
    "gram": 2,
    "combine": 1,
    "combine_rows": 1,
    "agreement": 2,
    "meta_step": 1,
    "variance_gap": 2,
    "variance_gap_backward": 1,
}
PLANNING = ("__init__", "plan", "boundaries", "holds_for_other_values", "contradicts")
NEVER = SimpleNamespace(query=lambda: False)
PROCESSORS = 132  # of an H100 or H200
# Neither read nor write memory, or allocate alone
VIEWS = {
    "view", "_unsafe_view", "t", "to", "contiguous", "transpose", "permute", "expand", "select",
    "slice", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "split",
    "split_with_sizes", "_reshape_alias", "unfold", "movedim", "diagonal", "lift_fresh",
    "is_same_size", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided",
    "chunk", "flatten", "squeeze_", "is_pinned", "_pin_memory", "narrow", "detach_",
}  # fmt: skip


class Count(TorchDispatchMode):
    """What is dispatched below it."""

    current: ClassVar[Count | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()  # without views and allocations
        self.own: Counter[str] = Counter()  # ops of fastdg
        self.launches: Counter[str] = Counter()  # kernels of fastdg
        self.work: list[Work] = []  # of each op
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def _track(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.live += self._seen[key]
        self.peak = max(self.peak, self.live)

        def free() -> None:
            self.live -= self._seen.pop(key, 0)

        weakref.finalize(storage, free)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == "fastdg":
            op = registry.OPS[name]
            op.check(*args)
            with self:
                out = op.route(*args)(*args)
            self.own[name] += 1
            flops = own_flops(name, args)
            self.work.append(Work(True, moved(args, out), moved(out), flops, dtype_of(args)))
        else:
            if func.namespace == "aten":  # below autograd, composite ops arrive as they are
                with self:
                    out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
            out = func(*args, **kwargs)
            if func.namespace == "aten" and name not in VIEWS:
                self.ops[name] += 1
                flops = library_flops(func, args, kwargs, out)
                both = moved((args, kwargs), out)
                self.work.append(Work(False, both, moved(out), flops, dtype_of(args)))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._track(x)
        return out

    @property
    def dispatched(self) -> int:
        """Ops of PyTorch, and launches of fastdg's."""
        return sum(self.ops.values()) + sum(self.own.values())


class Work(NamedTuple):
    """One op's: whether it is fastdg's, bytes of its tensors and of its results, floating-point
    operations, dtype."""

    own: bool
    bytes: int
    written: int
    flops: int
    dtype: torch.dtype | None


def dtype_of(args: Any) -> torch.dtype | None:
    """The narrowest floating dtype of the operands."""
    found = {x.dtype for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point()}
    return min(found, key=lambda dtype: dtype.itemsize, default=None)


def library_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    name = func._schema.name
    if "attention" in name:  # queries times keys, and those times values; the backward makes five
        q, k = args[1:3] if "backward" in name else args[:2]
        return (10 if "backward" in name else 4) * q.numel() * k.shape[-2]
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=out)


def moved(*trees: Any) -> int:
    """Bytes of the tensors, each once."""
    tensors = {id(x): x for tree in trees for x in tree_leaves(tree) if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def own_flops(name: str, args: Sequence[Any]) -> int:
    """Operations of a sum of outer products, two for each entry of each product; for its backward
    three times as many (the two products of a matrix product's backward, for two sums), of which
    the squares' are made again; twice as many where nobody asks for the gradient of a."""
    if name == "foreach_moments":
        return sum(own_flops("outer_moments", (a, d, ())) for a, d in zip(*args[3:5], strict=True))
    if not name.startswith("outer_"):
        return 0
    a, delta = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()][
        slice(2, 4) if name.endswith("backward") else slice(2)
    ]
    a, delta = with_positions(a, delta)
    inputs = window.sizes(a.shape, args[-1] if isinstance(args[-1], (list, tuple)) else ())[1]
    once = 2 * prod(delta.shape) * inputs
    return (2 + args[-2]) * once if name.endswith("backward") else once


def _like_cuda(supports: Callable[..., Any]) -> Callable[..., Any]:
    """``supports`` of a kernel's module, for CPU tensors."""

    def run(*args: Any) -> Any:
        with patch.object(Tensor, "is_cuda", True):
            return supports(*args)

    return run


def _by_operations(losses: Tensor, graph: Graph, outputs: Sequence[Output]) -> OwnerMap:
    """In place of a probe, which reads values: the samples of rows by the operations alone."""
    found: OwnerMap = {}
    together = structure(losses, graph, {out.node for out in outputs})
    for out in outputs:
        owners = structure(losses, graph, {out.node}) if together is None else together
        if owners is None:
            found[out] = Unclear(mixes=True)
        elif (ids := owners.get(out, found)) is not found:
            found[out] = Unclear(mixes=True) if ids is None else Owner(ids)
        else:
            found[out] = None  # no gradient arrives
    return found


def _not_fake(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **named: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **named)

    return run


@contextmanager
def routed() -> Iterator[None]:
    """Tensors are fake meanwhile, and ops take the route of CUDA tensors."""

    def note(kernel: Any, programs: int, *args: Any, **named: Any) -> None:
        if programs and (count := Count.current) is not None:
            count.launches[kernel.__name__] += 1

    def column(name: str, launches: int) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if (count := Count.current) is not None:
                count.launches[name] += launches
            return registry.OPS[name].fake(*args)

        return run

    backends: dict[str, dict[str, Any]] = {name: {} for name in registry.OPS}
    for name, implementation, supports in kernels.implementations(registry.OPS):
        backends[name]["triton"] = implementation, _like_cuda(supports)
    for name, launches in COLUMNS.items():
        backends[name]["cuda"] = column(name, launches), lambda *args: None
    window.offsets.cache_clear()  # of tensors of another mode
    window.masked_offsets.cache_clear()
    with ExitStack() as stack:
        enter = stack.enter_context
        for name, here in backends.items():
            enter(patch.object(registry.OPS[name], "backends", here))
        for module in [launch, *vars(kernels).values()]:
            if callable(getattr(module, "launch", None)):
                enter(patch.object(module, "launch", note))
        for name, module in list(sys.modules.items()):
            if name.startswith("fastdg.") and hasattr(module, "readable"):
                enter(patch.object(module, "readable", lambda x: False))
        enter(patch.dict(registry.PREFERENCE, cpu=registry.PREFERENCE["cuda"]))
        enter(patch.object(launch, "processors", lambda device: PROCESSORS))
        enter(patch.object(launch, "hopper", lambda device: True))
        enter(patch.object(Tensor, "is_cpu", False))
        enter(patch.object(planner, "probe", _by_operations))
        # The copy of a step's counts, which nothing waits for, needs an event
        enter(patch.object(one_domain, "_copied", lambda count: (count, NEVER)))
        for name in PLANNING:
            enter(patch.object(planner.Planner, name, _not_fake(getattr(planner.Planner, name))))
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def counted(step: Callable[[], Any], held: Callable[[], Iterable[Tensor]] = list) -> Count:
    """Count the third step: it looks at nothing anew. ``held`` gives the tensors that live before
    it, as parameters do."""
    engine._plans.clear()
    for _ in range(3):
        gc.collect()
        Count.current = count = Count()
        for x in held():
            count._track(x)
        with count:
            step()
        Count.current = None
    return count
