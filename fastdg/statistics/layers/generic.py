"""Any other module: ``torch.func`` on that module alone, at its recorded input and output gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from ..factors import Dense, Factor
from ..tape import Call, paused


def generic(call: Call, deltas: Sequence[Tensor], names: Sequence[str]) -> dict[str, Factor]:
    """Per-sample gradients of the parameters ``names`` (local to the module) by ``vmap(vjp)``.

    Tensors whose size along the module's batch dimension is that of the outputs belong to samples; all others
    are shared by every sample.
    """
    module = call.module
    dim = 0 if getattr(module, "batch_first", True) else 1
    samples = next(o for o in call.outputs if o is not None)[0][dim]
    every = dict(module.named_parameters())
    chosen = {name: every[name] for name in names}
    others = {name: p for name, p in every.items() if name not in chosen}
    buffers = dict(module.named_buffers())

    arguments = _with_state(module, call, samples) if isinstance(module, nn.RNNBase) else None
    leaves, tree = pytree.tree_flatten(arguments or (call.args, call.kwargs))
    along = [
        _sample_dim(module, leaf, dim, samples) if isinstance(leaf, Tensor) else None
        for leaf in leaves
    ]
    used = [slot for slot, output in enumerate(call.outputs) if output is not None]
    out_dims = [_sample_dim(module, deltas[slot], dim, samples) for slot in used]
    if any(d is None for d in out_dims):
        raise ValueError(f"{call.where}: its output has no sample dimension of size {samples}")
    mapped = [leaf for leaf, d in zip(leaves, along, strict=True) if d is not None]

    def one(rows: tuple[Tensor, ...], delta: tuple[Tensor, ...]) -> dict[str, Tensor]:
        rest = iter(rows)
        full = [
            next(rest).unsqueeze(d) if d is not None else leaf
            for leaf, d in zip(leaves, along, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(full, tree)

        def run(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
            output = functional_call(module, ({**weights, **others}, buffers), args, kwargs)
            tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
            return tuple(
                tensors[slot].squeeze(d) for slot, d in zip(used, out_dims, strict=True)
            )

        return vjp(run, chosen)[1](delta)[0]

    rows_in = tuple(d for d in along if d is not None)
    device, (autocast, dtype) = deltas[used[0]].device.type, call.autocast
    with paused(), torch.autocast(device, dtype=dtype, enabled=autocast), _plain_kernels():
        try:
            grads = vmap(one, in_dims=(rows_in, tuple(out_dims)), randomness="error")(
                tuple(mapped), tuple(deltas[slot] for slot in used)
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"{call.where} has no layer rule, and torch.func cannot take its per-sample gradients: "
                f"{str(error).splitlines()[0]} (dropout cannot be replayed: set it to 0 or to eval; for "
                "anything else register a rule with fastdg.register_rule, or leave these parameters "
                "out with params=)"
            ) from error
    return {name: Dense(grad) for name, grad in grads.items()}


def _sample_dim(module: nn.Module, tensor: Tensor, dim: int, samples: int) -> int | None:
    """Which dimension of ``tensor`` counts samples."""
    if isinstance(module, nn.RNNBase) and tensor.dim() == 3 and tensor.shape[1] == samples:
        # states are (layers, N, H) whatever batch_first says
        layers = module.num_layers * (2 if module.bidirectional else 1)
        if tensor.shape[0] == layers and tensor.shape[2] in (module.hidden_size, module.proj_size):
            return 1
    if tensor.dim() > dim and tensor.shape[dim] == samples:
        return dim
    if tensor.dim() > 0 and dim == 1 and tensor.shape[0] == samples:
        return 0  # masks are (N, T) even where sequences come first
    return None


def _with_state(module: nn.RNNBase, call: Call, samples: int) -> tuple[Any, Any] | None:
    """The call with its initial state spelled out: the cells add to it in place, so it must be per sample."""
    if len(call.args) > 1 or "hx" in call.kwargs:
        return None
    x = call.args[0] if call.args else call.kwargs["input"]
    layers = module.num_layers * (2 if module.bidirectional else 1)
    hidden = x.new_zeros((layers, samples, module.proj_size or module.hidden_size))
    if isinstance(module, nn.LSTM):
        return (x, (hidden, x.new_zeros((layers, samples, module.hidden_size)))), {}
    return (x, hidden), {}


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Fused CPU kernels (oneDNN's LSTM among them) have no batching rule; the plain ones do."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
