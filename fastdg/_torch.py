"""All private names of torch that fastdg uses, each with the reason why no public name serves.

``tests/test_torch_private.py`` checks that each name exists and behaves as fastdg needs, and that
no other file uses one. Exception: `fastdg.gradients` reads the saved values ``_saved_*`` of graph
nodes itself; torch's notes on autograd describe these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import Context
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

# Excludes a function from torch.compile. The public torch.compiler.disable imports the compiler
# where the function is defined, which takes a second
from torch._compile import _disable_dynamo as not_compiled
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp import GradScaler
from torch.autograd import forward_ad, profiler
from torch.autograd.graph import Node

# Base classes of all batch norms and all dropouts; each public class has one number of dimensions
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.optim import Optimizer, optimizer

# Flattens nested containers as torch.func does; torch has no public module for it
from torch.utils import _pytree as pytree

# torch's documentation has users subclass it, but no public module exports it
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "BatchNorm",
    "Dropout",
    "TorchDispatchMode",
    "not_compiled",
    "pytree",
]

F = TypeVar("F", bound=Callable[..., Any])

# -- state of torch --


# Whether a transform of torch.func runs. Public functions tell only for one tensor
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def forward_ad_active() -> bool:
    """Whether a ``forward_ad.dual_level`` is open. Public functions tell only for one tensor."""
    return forward_ad._current_level >= 0


# Returns the number of active dispatch modes. The public class only enters and exits one
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def get_proxy_mode() -> Any:
    """Return the active tracing mode of `make_fx`, or None."""
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")  # absent: nothing traces
    return None if module is None else module.get_proxy_mode()


def make_fx(function: Callable[..., Any]) -> Callable[..., Any]:
    """Trace a function with its backwards. torch.compile hides the autograd graph from traced code,
    and `make_fx` has no public equivalent. The import is late because it takes a second."""
    from torch.fx.experimental import proxy_tensor

    return proxy_tensor.make_fx(function)


def unknown_size_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a branch on a size that is unknown while tracing."""
    module = sys.modules.get("torch.fx.experimental.symbolic_shapes")  # alone raises them
    return () if module is None else (module.GuardOnDataDependentSymNode,)


def jit_tracing() -> bool:
    """Whether ``torch.jit.trace`` runs. ``torch.jit.is_tracing`` is deprecated and slower."""
    return torch._C._is_tracing()


def in_backward() -> bool:
    """Whether this thread runs a node of a backward. Public hooks see only their own node."""
    return torch._C._current_graph_task_id() != -1


def context_of_backward() -> Context | None:
    """Return the context that called this thread's backward. Autograd copies it to its threads for
    PyTorch's compiler; there is no public way to carry a ContextVar there."""
    if not torch._C._is_key_in_tls("context"):
        return None
    return torch._C._get_obj_in_tls("context")


# -- nodes of the autograd graph --


def metadata_of(node: Node) -> Sequence[Any]:
    """Return shape, dtype and device of each output of an operation, or None. The public members of
    a node are its name and ``next_functions``."""
    return node._input_metadata


def sequence_number(node: Node) -> int:
    """Return a number that grows with each operation of a thread. Only the profiler makes it
    public, and not for a given node."""
    return int(node._sequence_nr())


def function_of(node: Node) -> Any:
    """Return the ``autograd.Function`` of a node, "" for an operation of torch. Only the name of
    the node is public, and two functions may share it."""
    return getattr(node, "_forward_cls", "")


def register_first_hook(node: Node, hook: Callable[..., Any]) -> Any:
    """Register ``hook`` on a node before its hooks of now; only for tensors and modules is the
    order public."""
    handle = node.register_hook(hook)
    hooks = handle.hooks_dict_ref()
    assert hooks is not None
    others = {key: other for key, other in hooks.items() if key != handle.id}
    for key in others:  # in the order of insertion: autograd does not see `move_to_end`
        hooks[key] = hooks.pop(key)
    return handle


# The ``SavedTensor`` of ``_saved_x`` is ``_raw_saved_x``, by torch's notes on autograd. The test
# whether a hook has packed it is private; the public read would unpack it
RAW_SAVED = "_raw_saved_"


# -- tensors --


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is of no subclass. A fake one, of which only shape, dtype and device
    are known, stands for a plain one; its class has no public name."""
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor)


def has_graph(tensor: Tensor) -> bool:
    """Return whether gradients reach the tensors from which this one was computed, if any. A view
    made under ``torch.no_grad`` requires a gradient, but is cut off; nothing public tells it."""
    cut_off = tensor.grad_fn is None and tensor._base is not None
    return tensor.requires_grad and not cut_off


def version_of(tensor: Tensor) -> int:
    """Return the number of in-place changes. torch compares it only in its own backward."""
    return tensor._version


def hook_tables(p: Tensor) -> list[dict[int, Callable[..., Any]]]:
    """Return the hook tables of a leaf: gradient hooks, then post-accumulate hooks; {} for none.
    The public functions add and remove hooks, but do not list them."""
    post = getattr(p, "_post_accumulate_grad_hooks", None)
    return [p._backward_hooks or {}, post or {}]


def hooked(parameters: Iterable[Tensor]) -> bool:
    """Whether a leaf has a hook in its `hook_tables`; a step asks this of every parameter."""
    for p in parameters:
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return True
    return False


def assert_later(condition: Tensor, message: str = "") -> None:
    """Raise on the device if ``condition`` is false. ``torch._check`` would wait for the value."""
    torch._assert_async(condition, message)


# One kernel for a list of tensors. The public optimizers use them; there are no public names
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_lerp_ = torch._foreach_lerp_


# -- modules, optimizers and scalers --


def original(module: Any) -> Any:
    """Return the module that ``torch.compile`` got. Its result has it under a private name only."""
    return getattr(module, "_orig_mod", module)


def fsdp_parameters(module: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield each sharded parameter of an FSDP2 module with the unsharded tensor of the forward
    (None before the first). There is no public way from one to the other; FSDP2's own
    ``unshard`` takes this one."""
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
    """Return the hooks in an optimizer's table ``"state_dict_pre"``, ``"load_state_dict_post"``...;
    None if it never called ``Optimizer.__init__``. Registering is public, but only methods that a
    wrapper replaces call them."""
    return getattr(opt, f"_optimizer_{table}_hooks", None)


def quickly_stepped(step: F) -> F:
    """Return a wrapper's method ``step`` so that torch, which sees the mark, does not put it into a
    range of the profiler and calls of hooks: it is there only if a profiler runs or there are
    hooks, as it takes longer than a small wrapper. The public decorator marks nothing."""
    watched = Optimizer.profile_hook_step(step)

    @wraps(step)
    def run(self: Any, *args: Any, **keywords: Any) -> Any:
        hooks = (
            profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
        )
        # A derived class's own step, which calls this one, has a range and calls of its own
        inner = type(self).step is not run
        return (watched if hooks and not inner else step)(self, *args, **keywords)

    run.hooked = True  # type: ignore[attr-defined]
    return cast("F", run)


def scale_of(scaler: GradScaler) -> Tensor | None:
    """Return the loss scale as a tensor. The public ``get_scale`` waits for its value."""
    return scaler._scale


def scaler_state(scaler: GradScaler, opt: Optimizer) -> Mapping[str, Any]:
    """Return the scaler's record of an optimizer since its last update: whether ``unscale_`` was
    called, and its infs. Reading it has no side effect; a second ``unscale_`` would raise."""
    return scaler._per_optimizer_states.get(id(opt), {})


def takes_scale(opt: Optimizer) -> bool:
    """Whether ``step`` divides by ``grad_scale``, as fused steps do; the scaler reads this flag."""
    return getattr(opt, "_step_supports_amp_scaling", False) is True


# -- ops --


def has_kernel(op: Any, key: str) -> bool:
    """Whether an op has a kernel for the dispatch key "CPU" or "CUDA". The method's name is public,
    but it has no documentation and no public class."""
    return op.has_kernel_for_dispatch_key(key)


# Softmax with zeros for a row of -inf alone, where the public one has NaN
safe_softmax: Callable[[Tensor, int], Tensor] = torch._safe_softmax
