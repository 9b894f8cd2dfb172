"""All private names of torch that fastdg uses, each with the reason why no public one serves.

``tests/test_torch_private.py`` checks that each is there and does what is relied on, and that no
other file uses one. What a node of the graph has saved for its backward, ``_saved_*``, is described
in torch's notes on autograd and is read by `fastdg.gradients` itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import Context
from typing import Any

import torch
from torch import Tensor

# Leave a function to Python while torch.compile traces its caller, as torch.compiler.disable does;
# but that imports the compiler where the function is defined, which takes a second
from torch._compile import _disable_dynamo as not_compiled
from torch.amp import GradScaler
from torch.autograd import forward_ad
from torch.autograd.graph import Node

# Any batch norm and any dropout; the public classes are those of one number of dimensions each
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.optim import Optimizer

# Nested containers of tensors as torch.func takes them apart; torch has no public module for that
from torch.utils import _pytree as pytree

# What torch's documentation has users subclass, and no public module has
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "BatchNorm",
    "Dropout",
    "TorchDispatchMode",
    "not_compiled",
    "pytree",
]

# -- what runs now --


def functorch_active() -> bool:
    """Whether a transform of torch.func runs. Public is only the wrapping of single tensors."""
    return torch._C._are_functorch_transforms_active()


def forward_ad_active() -> bool:
    """Whether a ``forward_ad.dual_level`` is open; torch shows this for single tensors alone."""
    return forward_ad._current_level >= 0


def dispatch_modes() -> int:
    """How many dispatch modes watch; the public class only enters and leaves one."""
    return torch._C._len_torch_dispatch_stack()


def get_proxy_mode() -> Any:
    """The mode of `make_fx` that traces now, or None."""
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")  # without it nothing traces
    return None if module is None else module.get_proxy_mode()


def make_fx(function: Callable[..., Any]) -> Callable[..., Any]:
    """Trace what runs, backwards too: torch.compile does not show a graph of autograd to what it
    traces. Called experimental; there is no public equal. Imported late, as it takes a second."""
    from torch.fx.experimental import proxy_tensor

    return proxy_tensor.make_fx(function)


def unknown_size_errors() -> tuple[type[Exception], ...]:
    """The errors of a branch on a size that is known only when a traced graph runs."""
    module = sys.modules.get("torch.fx.experimental.symbolic_shapes")  # which alone raises them
    return () if module is None else (module.GuardOnDataDependentSymNode,)


def jit_tracing() -> bool:
    """As ``torch.jit.is_tracing``, which is deprecated and slower."""
    return torch._C._is_tracing()


def in_backward() -> bool:
    """Whether this thread runs a node of a backward; public hooks tell of their own node alone."""
    return torch._C._current_graph_task_id() != -1


def context_of_backward() -> Context | None:
    """The context that called the backward which this thread works for. Autograd hands it to its
    threads for PyTorch's compiler; a public way to carry a ContextVar there does not exist."""
    if not torch._C._is_key_in_tls("context"):
        return None
    return torch._C._get_obj_in_tls("context")


# -- nodes of the autograd graph --


def metadata_of(node: Node) -> Sequence[Any]:
    """Shape, dtype and device of each output of an operation, None where it has none. Public are
    the node's name and its ``next_functions``."""
    return node._input_metadata


def sequence_number(node: Node) -> int:
    """Grows with the time at which the operation ran, in its thread. The profiler shows it, but
    not of a node at hand."""
    return int(node._sequence_nr())


def function_of(node: Node) -> Any:
    """The ``autograd.Function`` that a node runs, "" for an operation of torch. Public is the name
    of the node alone, which two functions may share."""
    return getattr(node, "_forward_cls", "")


# The ``SavedTensor`` of ``_saved_x`` is ``_raw_saved_x``, by torch's notes on autograd; to look
# whether a hook has packed it is private, and public reading would unpack it
RAW_SAVED = "_raw_saved_"


# -- tensors --


def version_of(tensor: Tensor) -> int:
    """How often the tensor was changed in place; torch only compares it in its own backward."""
    return tensor._version


def hook_tables(p: Tensor) -> list[dict[int, Callable[..., Any]]]:
    """The tables of a leaf's hooks: of its gradient, then of ``.grad`` once it is accumulated; an
    empty one where there are none. Torch lets hooks be added and removed, but not listed."""
    post = getattr(p, "_post_accumulate_grad_hooks", None)
    return [p._backward_hooks or {}, post or {}]


def assert_later(condition: Tensor, message: str = "") -> None:
    """Raise on the device where ``condition`` is false. ``torch._check`` would wait for it."""
    torch._assert_async(condition, message)


# One kernel for a list of tensors; the public optimizers use these, and no others are public
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_lerp_ = torch._foreach_lerp_


# -- modules, optimizers and scalers --


def original(module: Any) -> Any:
    """The module that ``torch.compile`` was called with; its result names it only so."""
    return getattr(module, "_orig_mod", module)


def fsdp_parameters(module: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The sharded parameters of a module under FSDP2, and what its forward uses in their place,
    None before the first. There is no public way from one to the other; this is the way that
    FSDP2's own ``unshard`` takes."""
    if not hasattr(module, "_get_fsdp_state"):
        return
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    for group in groups:
        for held in group.fsdp_params:
            yield held.sharded_param, getattr(held, "_unsharded_param", None)


def optimizer_hooks(opt: Optimizer, table: str) -> Mapping[int, Callable[..., Any]] | None:
    """Hooks of an optimizer, of the table ``"state_dict_pre"``, ``"load_state_dict_post"`` and so
    on; None if it never called ``Optimizer.__init__``. They may be registered in public, and called
    only by methods that a wrapper replaces."""
    return getattr(opt, f"_optimizer_{table}_hooks", None)


def scale_of(scaler: GradScaler) -> Tensor | None:
    """The tensor that losses are multiplied with; ``get_scale`` waits for its value."""
    return scaler._scale


def scaler_state(scaler: GradScaler, opt: Optimizer) -> Mapping[str, Any]:
    """What the scaler has noted of an optimizer since its last update: whether ``unscale_`` was
    called, and what it found. Asking leaves no trace; ``unscale_`` called again would raise."""
    return scaler._per_optimizer_states.get(id(opt), {})


def takes_scale(opt: Optimizer) -> bool:
    """Whether its step divides by ``grad_scale``, as fused ones do; the scaler asks in this way."""
    return getattr(opt, "_step_supports_amp_scaling", False) is True


# -- ops --


def has_kernel(op: Any, key: str) -> bool:
    """Whether an op is implemented for the dispatch key "CPU" or "CUDA". The method has a public
    name, but neither documentation nor a public class."""
    return op.has_kernel_for_dispatch_key(key)
