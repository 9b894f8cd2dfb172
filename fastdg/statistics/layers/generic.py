"""Any other module: ``torch.func`` on it alone, at its recorded input and output gradient."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from ..advice import LEAVE_OUT
from ..factors import Dense, Factor
from ..tape import Call, paused

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_MAKES_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)


def generic(call: Call, deltas: Sequence[Tensor], names: Sequence[str]) -> dict[str, Factor]:
    """Per-sample gradients of the parameters ``names`` (local to the module) by ``vmap(vjp)``.

    The module's forward is run again: all of it, a whole network if its root owns a parameter
    without a module of its own. Hooks on it and on what it contains are left out of this replay:
    they would be shown tensors of torch.func. What the module's ``forward`` does to Python state
    (a counter, a list of features) it does once more.
    """
    module = call.module
    dim, samples = output_samples(call)
    every = dict(module.named_parameters(remove_duplicate=False))
    chosen = {name: every[name] for name in names}
    taken = {id(p) for p in chosen.values()}
    others = {name: p for name, p in module.named_parameters() if id(p) not in taken}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}  # may be updated

    arguments = _with_state(call, samples)
    along = sample_dims(call, arguments)
    leaves, tree = pytree.tree_flatten(arguments)
    used = [slot for slot, output in enumerate(call.outputs) if output is not None]
    out_dims = [_output_dim(call, deltas[slot], slot, dim, samples) for slot in used]

    def rows(tensor: Tensor, d: int | None) -> Tensor:
        # What is left of d is one sample's own part
        return tensor if d is None else tensor.unflatten(d, (samples, -1))

    tensors = [(leaf, d) for leaf, d in zip(leaves, along, strict=True) if isinstance(leaf, Tensor)]
    tensors += [(deltas[slot], d) for slot, d in zip(used, out_dims, strict=True)]
    tensors += [(weight, None) for weight in (*chosen.values(), *others.values())]

    def one(*given: Tensor) -> tuple[Tensor, ...]:
        following = iter(given)
        full = [next(following) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(full, tree)
        delta = tuple(next(following) for _ in used)
        weights, rest = ({name: next(following) for name in some} for some in (chosen, others))

        def run(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
            output = functional_call(module, ({**weights, **rest}, buffers), args, kwargs)
            tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
            return tuple(tensors[slot] for slot in used)

        return tuple(vjp(run, weights)[1](delta)[0].values())

    device, (autocast, dtype) = deltas[used[0]].device.type, call.autocast
    differentiable = torch.is_grad_enabled()

    @contextmanager
    def replay() -> Iterator[None]:
        with (
            paused(),
            torch.autocast(device, dtype=dtype, enabled=autocast),
            _plain_kernels(differentiable),
            as_it_was(module),
        ):
            yield

    try:
        grads = PerSample.apply(
            one, replay, tuple(d for _, d in tensors), *(rows(t, d) for t, d in tensors)
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"{call.where} has no layer rule, and torch.func cannot take its per-sample gradients: "
            f"{reason} (dropout cannot be replayed: set it to 0 or to eval; for anything else "
            f"register a rule with fastdg.register_rule, or {LEAVE_OUT})"
        ) from error
    return {name: Dense(grad) for name, grad in zip(chosen, grads, strict=True)}


class PerSample(torch.autograd.Function):
    """``vmap(one)``, and as its backward one vmap over each sample's own pullback.

    Autograd through vmap would do, were it right: what vmap makes of a layer norm takes mean and
    spread for constants when it is differentiated.

    Args:
        one: a sample's tensors -> a tuple of tensors.
        replay: context to run it in.
        dims: which dimension of each tensor counts samples; None if all share it.
        tensors: of all samples.
    """

    @staticmethod
    def forward(
        ctx: Any,
        one: Callable[..., tuple[Tensor, ...]],
        replay: Callable[[], AbstractContextManager[None]],
        dims: tuple[int | None, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.one, ctx.replay, ctx.dims = one, replay, dims
        ctx.save_for_backward(*tensors)
        with replay():
            return vmap(one, in_dims=dims, randomness="error")(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors, dims = ctx.saved_tensors, ctx.dims
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]

        def pull(upstream: tuple[Tensor, ...], *sample: Tensor) -> tuple[Tensor, ...]:
            def changed(*new: Tensor) -> tuple[Tensor, ...]:
                given = list(sample)
                for i, tensor in zip(wanted, new, strict=True):
                    given[i] = tensor
                return ctx.one(*given)

            return vjp(changed, *(sample[i] for i in wanted))[1](upstream)

        with ctx.replay():
            pulled = vmap(pull, in_dims=(0, *dims))(upstream, *tensors)
        grads: list[Tensor | None] = [None] * len(tensors)
        for i, grad in zip(wanted, pulled, strict=True):
            grads[i] = grad.sum(0) if dims[i] is None else grad.movedim(0, dims[i])
        return None, None, None, *grads


def output_samples(call: Call) -> tuple[int, int]:
    """``(dimension, size)`` of the samples in what the module returned."""
    dim = 0 if getattr(call.module, "batch_first", True) else 1
    shape = next(output for output in call.outputs if output is not None)[0]
    if len(shape) <= dim:
        raise ValueError(f"{call.where}: its output {tuple(shape)} has no sample dimension")
    return dim, shape[dim]


def sample_dims(call: Call, arguments: tuple[Any, Any]) -> Sequence[int | None]:
    """Which dimension of each argument counts samples; None if all samples share it.

    Known for attention and recurrent layers. For any other module, tensors whose size along the
    sample dimension is that of the output belong to samples.
    """
    module, (dim, _) = call.module, output_samples(call)
    args, kwargs = arguments
    if isinstance(module, nn.MultiheadAttention):
        roles = {"query": dim, "key": dim, "value": dim, "key_padding_mask": 0}
        mask = kwargs.get("attn_mask")
        if isinstance(mask, Tensor) and mask.dim() == 3:  # (N * heads, L, S)
            roles["attn_mask"] = 0
        return [
            roles.get(name) if isinstance(leaf, Tensor) else None for name, leaf in kwargs.items()
        ]
    if isinstance(module, nn.RNNBase):
        first, *states = args
        if not (isinstance(first, Tensor) and first.dim() == 3):
            raise ValueError(
                f"{call.where}: expected a padded batch of sequences; per-sample gradients of "
                "packed sequences or of a single one cannot be told apart"
            )
        return [dim] + [1] * len(pytree.tree_leaves(states))  # states are (layers, N, H)
    return dims_by_size(call, arguments)


def dims_by_size(call: Call, arguments: tuple[Any, Any]) -> tuple[int | None, ...]:
    """`sample_dims` as far as nothing but sizes tells them, which may coincide by chance."""
    if isinstance(call.module, (nn.MultiheadAttention, nn.RNNBase)):
        return ()
    dim, samples = output_samples(call)

    def counts_samples(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == samples

    return tuple(dim if counts_samples(leaf) else None for leaf in pytree.tree_leaves(arguments))


def _output_dim(call: Call, delta: Tensor, slot: int, dim: int, samples: int) -> int:
    module = call.module
    if isinstance(module, nn.MultiheadAttention):
        return dim if slot == 0 else 0  # attention weights are (N, L, S) or (N, heads, L, S)
    if isinstance(module, nn.RNNBase) and delta.dim() == 3:
        layers = module.num_layers * (2 if module.bidirectional else 1)
        sizes = (module.hidden_size, module.proj_size)
        if delta.shape[:2] == (layers, samples) and delta.shape[2] in sizes:
            return 1  # a final state
    if delta.dim() <= dim or delta.shape[dim] != samples:
        raise ValueError(
            f"{call.where}: its output of shape {tuple(delta.shape)} has no sample dimension of "
            f"size {samples}"
        )
    return dim


def _with_state(call: Call, samples: int) -> tuple[Any, Any]:
    """The call as it is replayed.

    Attention by name, so that masks are told apart. Recurrent layers with their initial state
    spelled out: the cells add to it in place, so it must be per sample.
    """
    module = call.module
    if isinstance(module, nn.MultiheadAttention):
        bound = inspect.signature(nn.MultiheadAttention.forward).bind(
            module, *call.args, **call.kwargs
        )
        return (), {name: value for name, value in bound.arguments.items() if name != "self"}
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return call.args, call.kwargs
    x, state = (*call.args, *call.kwargs.values(), None)[:2]
    if state is None and isinstance(x, Tensor):
        layers: tuple[int, ...] = ()
        width = module.hidden_size
        if isinstance(module, nn.RNNBase):
            layers = (module.num_layers * (2 if module.bidirectional else 1),)
            width = module.proj_size or width
        hidden = x.new_zeros((*layers, samples, width))
        cell = x.new_zeros((*layers, samples, module.hidden_size))
        state = (hidden, cell) if isinstance(module, (nn.LSTM, nn.LSTMCell)) else hidden
    return (x, state), {}


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """A replay makes the weights the forward made, and leaves the module as it was.

    Spectral norm in training has iterated in the forward, and shall not do so again. Old-style
    weight norm sets ``weight``, which would be left a tensor of torch.func. Of the hooks those run
    that make weights.
    """
    inside = list(module.modules())
    before = [{k: v for k, v in vars(m).items() if isinstance(v, Tensor)} for m in inside]
    hooks = [(m, {name: vars(m)[name] for name in _HOOKS if name in vars(m)}) for m in inside]
    spectral = [m for m in inside if isinstance(m, _SpectralNorm) and m.training]
    for norm in spectral:
        norm.training = False
    for inner, tables in hooks:
        for name, table in tables.items():
            if table:
                made = {k: hook for k, hook in table.items() if isinstance(hook, _MAKES_WEIGHTS)}
                vars(inner)[name] = OrderedDict(made)
    try:
        yield
    finally:
        for inner, tables in hooks:
            vars(inner).update(tables)
        for norm in spectral:
            norm.training = True
        for inner, tensors in zip(inside, before, strict=True):
            vars(inner).update(tensors)


@contextmanager
def _plain_kernels(differentiable: bool) -> Iterator[None]:
    """Fused CPU kernels (oneDNN's LSTM among them) have no batching rule; the plain ones do.

    Fused attention has no second derivative. Where an operation has no batching rule at all, torch
    runs it sample by sample and says that this is slow; nobody can act on that here.
    """
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            if differentiable:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)
