"""Networks that are as they were after a part of a step of ADIOS, or after an error in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Disable gradients of the parameters of ``module`` inside, and restore its buffers after."""
    trained = [p for p in module.parameters() if p.requires_grad]
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        _copy(before, buffers)


@contextmanager
def undone_on_error(
    modules: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    generator: torch.Generator | None,
) -> Iterator[None]:
    """Restore weights, buffers, and the states of optimizers and generator after an error inside.

    Meanwhile a copy of all of them is in memory: a step of an optimizer cannot be taken back.
    """
    own = {t for module in modules for t in (*module.parameters(), *module.buffers())}
    stepped = {p for opt in optimizers for group in opt.param_groups for p in group["params"]}
    tensors = list(own | stepped)
    before = [t.detach().clone() for t in tensors]
    states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    drawn = None if generator is None else generator.get_state()
    try:
        yield
    except BaseException:
        _copy(before, tensors)
        for opt, state in zip(optimizers, states, strict=True):
            opt.load_state_dict(state)
        if generator is not None and drawn is not None:
            generator.set_state(drawn)
        raise


@torch.no_grad()
def _copy(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
