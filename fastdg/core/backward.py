"""The one place that writes ``.grad``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._torch import hook_tables
from ..distributed.global_batch import GlobalBatch
from ..distributed.sharding import like_parameter, sharded
from ..gradients.plain import resting
from .batch import Batch


def backward(objective: Tensor, batches: Sequence[Batch], whole: GlobalBatch) -> None:
    """Add the gradient of the objective (0-dim) and of the terms' mean to ``.grad``.

    Args:
        objective: with its graph, in which sums over the ranks are `GlobalBatch.total`; it is the
            one root, so that all threads add gradients in the same order.
        batches: micro-batches, with their terms.
        whole: batch of all ranks.
    """
    terms = [batch.terms for batch in batches if batch.terms is not None]
    seeds = [torch.ones_like(objective)]
    seeds += [torch.full_like(values, 1 / whole.samples) for values in terms]
    roots = [objective, *terms]
    grads = [scaled(w, batches).to(x.dtype) for x, w in zip(roots, seeds, strict=True)]
    if not whole.alone:
        # DistributedDataParallel and FSDP2 average the gradients of the ranks
        grads = [grad * whole.ranks.size for grad in grads]
    whole.ranks.modules.resume_sync()
    retain_graph = any(batch.retain_graph for batch in batches)
    torch.autograd.backward(roots, grads, retain_graph=retain_graph)
    for p, mean in whole.ranks.averages().items():
        overwrite(p, mean)


def scaled(grad: Tensor, batches: Sequence[Batch]) -> Tensor:
    """Multiply ``grad`` by the loss scale of ``.grad``: the final call's."""
    scale = batches[-1].scale
    return grad if scale is None else grad * scale.to(grad.device, non_blocking=True)


def accumulate(p: Tensor, grad: Tensor) -> None:
    """Add ``grad``, of which there is no other reference, to ``p.grad``; in autograd's layout."""
    grad = grad if grad.dtype is p.dtype else grad.to(p.dtype)
    if sharded(p):
        grad = like_parameter(p, grad)
    if p.grad is None:
        if grad.layout == torch.strided and grad.stride() != p.stride():
            grad = torch.empty_like(p).copy_(grad)
        p.grad = grad
    elif p.grad.is_sparse:
        p.grad = p.grad + grad
    else:
        with torch.no_grad():
            p.grad.add_(grad)


def accumulate_with_hooks(p: Tensor, grad: Tensor) -> None:
    """`accumulate`, and call the hooks of ``p`` as autograd does."""
    of_gradient, of_accumulated = hook_tables(p)
    for hook in list(of_gradient.values()):
        changed = hook(grad)
        grad = grad if changed is None else changed
    accumulate(p, grad)
    for hook in list(of_accumulated.values()):
        hook(p)


def overwrite(p: Tensor, grad: Tensor) -> None:
    """Replace ``p.grad`` by ``grad``, of which there is no other reference; reuse its memory."""
    if p.grad is None:
        p.grad = grad
    elif p.grad.is_sparse:
        p.grad = grad.to_sparse(1)
    else:
        p.grad.copy_(grad)


def put(grads: Mapping[Tensor, Tensor | None]) -> None:
    """Set ``.grad`` of each parameter."""
    for p, grad in grads.items():
        p.grad = grad


class rollback_on_error:
    """Add the ``.grad`` written inside to the earlier one; restore the earlier one on an error.

    ``copied``: copy the earlier one first, since code inside may write to its memory, as
    DistributedDataParallel does.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], copied: bool) -> None:
        self.parameters = [p for group in groups for p in group["params"]]
        self.copied = copied

    def __enter__(self) -> None:
        before = [(p, p.grad) for p in self.parameters if p.grad is not None]
        self.before = [(p, grad.clone()) for p, grad in before] if self.copied else before
        for p, _ in before:
            p.grad = None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            for p in self.parameters:
                p.grad = None
        for p, grad in self.before:
            added, p.grad = p.grad, grad
            if added is not None:
                accumulate(p, added)


@contextmanager
def hooks_at_the_end(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Suspend the parameters' hooks inside, and call each with the final gradient at the end."""
    hooked = {p: tables for p in parameters if any(tables := hook_tables(p))}
    with resting(table for tables in hooked.values() for table in tables):
        yield
    grads = {p: p.grad for p in hooked if p.grad is not None}
    for p in grads:
        p.grad = None
    if grads:
        torch.autograd.backward(list(grads), list(grads.values()))


def check_reached(groups: Iterable[dict[str, Any]], name: str) -> None:
    """Raise RuntimeError if a backward has given no parameter a gradient."""
    parameters = [p for group in groups for p in group["params"]]
    if all(p.grad is None for p in parameters):
        if any(hook_tables(p)[1] for p in parameters):
            return  # a hook may have used and cleared it
        raise RuntimeError(
            f"losses: {name}.backward reached none of the optimizer's parameters. Compute the "
            "losses with the model that the optimizer was created for."
        )


def poison_if_nonfinite(groups: Iterable[dict[str, Any]], values: Sequence[Tensor]) -> None:
    """Set ``.grad``, which a GradScaler checks, to NaN if one of ``values`` (0-dim) is not finite.

    A variance can overflow where no gradient does.
    """
    if not values:
        return
    finite = torch.stack([x.to(values[0]) for x in values]).isfinite().all()
    grads = (p.grad for group in groups for p in group["params"])
    grad = next((g._values() if g.is_sparse else g for g in grads if g is not None), None)
    if grad is not None:
        grad.mul_(torch.where(finite, 1.0, torch.nan).to(grad))
