"""Which layer saw which input, written onto the autograd graph itself.

A forward hook leaves a `Call` on the graph node of the layer's output. A backward that computes
gradients at those nodes only, not at the weights, then meets every (input, output gradient) pair
(`graph.sweep`). Because the record lives on the graph it dies with the graph: a forward that is
never followed by a backward costs nothing.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from ..carried import Carried
from .layers import rule_of, spans_samples
from .modules import contents, own_parameters, reshard

Selection = str | Iterable[str | Tensor] | Callable[[str, Tensor], bool]

_KEY = "fastdg"
_paused: Carried[bool] = Carried("fastdg_paused", False)
_clock = itertools.count()


@contextmanager
def paused() -> Iterator[None]:
    """No forward is recorded inside: recomputation and functional re-runs are not the user's
    forward."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


def recording() -> bool:
    """Whether a forward that runs now is the user's, and will have a backward.

    Not inside the user's own torch.func transforms, for which fastdg.func is.
    """
    return (
        torch.is_grad_enabled()
        and not _paused.get()
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


class Call:
    """One call of a module that owns tracked parameters, or that mixes samples.

    Attributes:
        module: the module.
        args, kwargs: what it was called with, with an `alias` in place of each tensor.
        parameters: local name -> full name of its own tracked parameters.
        outputs: shape, dtype and device of each tensor it returned that carries a gradient, else
            None.
        versions: each alias, and the version it had.
        autocast: whether it ran under autocast, and then to which dtype.
        time: rises from call to call.
        swept: whether a wrapper's backward has begun with it.
        forgotten: whether the inputs were let go.
        wanted: how many may still want the inputs: the nodes that it has made, and sweeps.
    """

    __slots__ = (
        *("__weakref__", "args", "autocast", "forgotten", "kwargs", "module", "outputs"),
        *("parameters", "swept", "time", "versions", "wanted"),
    )

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parameters: dict[str, str],
        outputs: list[tuple[torch.Size, torch.dtype, torch.device] | None],
        versions: list[tuple[Tensor, int]],
        autocast: tuple[bool, torch.dtype | None],
    ) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        self.parameters, self.outputs, self.versions = parameters, outputs, versions
        self.autocast, self.time = autocast, next(_clock)
        self.swept, self.forgotten, self.wanted = False, False, 0

    @property
    def where(self) -> str:
        """The module in words for messages."""
        names = ", ".join(self.parameters.values()) or "no tracked parameters"
        return f"{type(self.module).__name__} ({names})"

    @property
    def criterion(self) -> bool:
        """Whether it is no layer but a criterion with parameters of its own, such as the weights of
        two losses or a temperature: no rule knows it, its parameters have one dimension at most,
        and it was given numbers of samples alone, or makes them of several tensors."""
        if self.forgotten or not self.parameters or rule_of(self.module) is not None:
            return False
        own = dict(self.module.named_parameters())
        if any(own[name].dim() > 1 for name in self.parameters if name in own):
            return False
        inputs = _tensors((self.args, self.kwargs))
        if inputs and all(x.is_floating_point() and x.dim() <= 1 for x in inputs):
            return True
        single = all(output is None or len(output[0]) <= 1 for output in self.outputs)
        return len(inputs) > 1 and single

    def forget(self) -> None:
        """Let go of the inputs, as autograd does of what it saved, so that memory is used again."""
        self.args, self.kwargs, self.versions, self.forgotten = (), {}, [], True

    def freed(self) -> None:
        """One of those who may want the inputs wants them no more."""
        self.wanted -= 1
        if not self.wanted:
            self.forget()

    def unchanged(self) -> None:
        if self.forgotten:
            raise RuntimeError(
                f"{self.where}: this forward was used up by a statistic with retain_graph=False "
                "or by an optimizer's backward; pass retain_graph=True there, ask before that "
                "backward, or run the model again"
            )
        for tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"{self.where}: its input of shape {tuple(tensor.shape)} was changed in place "
                    "after the layer had seen it; its per-sample gradients are lost. Make that "
                    "operation out of place."
                )


class Recorder:
    """Leaves a `Call` on the graph for every module that owns one of ``names``' parameters.

    Args:
        names: parameter -> its name.
        modules: where to look; default: every module that runs, until `settle`.
    """

    def __init__(self, names: Mapping[Tensor, str], modules: nn.Module | None = None) -> None:
        self.names = {id(p): (p, name) for p, name in names.items()}
        self.last = -1
        self.seen: dict[int, weakref.ref[nn.Module]] = {}
        self.alive: weakref.WeakSet[Call] = weakref.WeakSet()
        self.handles: list[Any] = []
        # FSDP2 lets its modules have other tensors in their forwards than the optimizer has, each
        # of them a part on every rank: whose they are is told by module and name
        self.sharded = any(hasattr(p, "device_mesh") for p in names)
        self.places: weakref.WeakKeyDictionary[nn.Module, dict[str, int]]
        self.places = weakref.WeakKeyDictionary()
        self.leaves: dict[int, Tensor] = {}
        weakref.finalize(self, _remove, self.handles).atexit = False
        if modules is None:
            self.discover()
        else:
            self.learn(modules)
            for module in modules.modules():
                if self._concerns(module):
                    self._watch(module)

    def discover(self) -> None:
        """Look at every module that runs, until `settle`."""
        self.close()
        self.seen.clear()
        self.handles.append(
            torch_module.register_module_forward_hook(_Hook(self), with_kwargs=True)
        )
        if self.sharded:
            hook = torch_module.register_module_forward_pre_hook(_Learning(self))
            self.handles.append(hook)
        self.discovering, self.looked_at = True, 0

    discovering = False

    def settle(self) -> None:
        """Watch only the modules that own the parameters, once all owners are known.

        Until then every module is looked at: a branch that this forward did not take may run in the
        next.
        """
        if not self.discovering or len(self.seen) == self.looked_at:
            return
        self.looked_at = len(self.seen)
        seen = [module for reference in self.seen.values() if (module := reference()) is not None]
        inside = dict.fromkeys(m for module in seen for m in module.modules())
        owned = {
            self._key(module, local, p)
            for module in inside
            for local, p in module._parameters.items()
        }
        if self.names.keys() <= owned:
            self.close()
            for module in inside:
                if self._concerns(module):
                    self._watch(module)

    def close(self) -> None:
        _remove(self.handles)
        self.discovering = False

    def learn(self, modules: nn.Module) -> None:
        """See whose the parameters are, before FSDP2 puts others in their place."""
        if not self.sharded or modules in self.places:
            return
        reshard(modules)
        for module in modules.modules():
            here = {local: id(p) for local, p in own_parameters(module) if id(p) in self.names}
            self.places.setdefault(module, here)

    def leaf(self, p: Tensor) -> Tensor:
        """The tensor that a forward uses as the optimizer's parameter ``p``."""
        return self.leaves.get(id(p), p)

    def used(self) -> Mapping[int, tuple[Tensor, str]]:
        """`names`, of what a forward uses as these parameters."""
        if not self.sharded:
            return self.names
        used = [(self.leaf(p), name) for p, name in self.names.values()]
        return {id(p): (p, name) for p, name in used}

    def _key(self, module: nn.Module, local: str, p: Tensor | None) -> int:
        """The id of the optimizer's parameter that is ``p`` in a forward, if there is one."""
        if self.sharded and id(p) not in self.names and module in self.places:
            return self.places[module].get(local, 0)
        return id(p)

    def _watch(self, module: nn.Module) -> None:
        # FSDP2's hook after the forward takes away the tensors that were used in it
        hook = module.register_forward_hook(_Hook(self), with_kwargs=True, prepend=self.sharded)
        self.handles.append(hook)

    def _own(self, module: nn.Module) -> dict[str, str]:
        """Local and full names of the module's own parameters, each parameter once."""
        own: dict[str, str] = {}
        for local, p in own_parameters(module):
            key = self._key(module, local, p)
            if (known := self.names.get(key)) is not None and p.requires_grad:
                if self.sharded:
                    self.leaves[key] = p
                if known[1] not in own.values():
                    own[local] = known[1]
        return own

    def _ran(self, module: nn.Module) -> bool:
        seen = self.seen.get(id(module))
        return seen is not None and seen() is module

    def _concerns(self, module: nn.Module) -> bool:
        return isinstance(module, nn.modules.batchnorm._BatchNorm) or any(
            self._key(module, local, p) in self.names for local, p in own_parameters(module)
        )

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Record a call; returns what the module shall return in place of ``output``, or None."""
        if not recording():
            return None
        own = self._own(module)
        if not own and not spans_samples(module):
            return None
        replaced = output if isinstance(output, Tensor) else _apart(module, output)
        if id(module) not in self.seen:
            self.seen[id(module)] = weakref.ref(module)
        tensors = _tensors(replaced)
        inputs = _tensors(args) + (_tensors(kwargs) if kwargs else [])
        aliases = {id(t): alias(t) for t in inputs}  # one for query, key and value that are one
        device = inputs[0].device.type if inputs else "cpu"
        autocast = torch.is_autocast_enabled(device)
        call = Call(
            module,
            _aliased(args, aliases),
            _aliased(kwargs, aliases) if kwargs else {},
            own,
            [(t.shape, t.dtype, t.device) if t.requires_grad else None for t in tensors],
            [(t, t._version) for t in aliases.values() if not t.is_inference()],
            (autocast, torch.get_autocast_dtype(device) if autocast else None),
        )
        self.alive.add(call)
        inside = bool(module._modules) and any(map(self._ran, contents(module)))
        if own and not inside and not call.criterion:
            self.last = call.time
        for slot, tensor in enumerate(tensors):
            # A tensor passed through as it is is not this module's; noting the call on its node
            # would also tie the graph into a cycle that nothing frees.
            if tensor.requires_grad and id(tensor) not in aliases:
                node = tensor.grad_fn or get_gradient_edge(tensor).node
                _notes(node).setdefault(_KEY, []).append((self, call, slot, tensor.output_nr))
                node.register_hook(_Freed(call))
        return replaced


def _remove(handles: list[Any]) -> None:
    while handles:
        handle = handles.pop()
        handle.remove()
        # torch leaves this entry of a global hook behind, by which it still believes in the hook
        torch_module._global_forward_hooks_with_kwargs.pop(handle.id, None)


Note = tuple["Recorder", Call, int, int]


def _notes(node: Node) -> dict[str, list[Note]]:
    """The dictionary that lives and dies with a graph node (torch types it as a method)."""
    return node.metadata  # type: ignore[return-value]


def notes_on(node: Node) -> Sequence[Note]:
    """What any recorder left there: (recorder, call, which of its outputs, which of the node's)."""
    return node.metadata.get(_KEY, ())  # type: ignore[attr-defined]


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in ``tree``; pytree takes its time over what nearly always is one, or a tuple."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) is tuple and all(isinstance(leaf, Tensor) for leaf in tree):
        return list(tree)
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _aliased(tree: Any, aliases: Mapping[int, Tensor]) -> Any:
    """``tree`` with its alias in place of each tensor."""
    if type(tree) is tuple and len(tree) == 1 and isinstance(tree[0], Tensor):
        return (aliases[id(tree[0])],)
    return pytree.tree_map_only(Tensor, lambda tensor: aliases[id(tensor)], tree)


class _Alias(torch.autograd.Function):
    """The same memory and version counter, behind the graph node that the tensor has now."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


# What Function.apply itself calls where no torch.func transform is active, in half the time
_behind_node = super(torch.autograd.Function, _Alias).apply


def alias(tensor: Tensor) -> Tensor:
    """What to keep of a module's input, as autograd keeps what it saves.

    A tensor that is changed in place later on gets a new graph node, one below which the module's
    own may lie. Kept by that node it would keep itself alive, in a cycle that no collector sees.
    """
    return _behind_node(tensor) if tensor.requires_grad else tensor.detach()


def _apart(module: nn.Module, output: Any) -> Any:
    """``output`` with each of several tensors on a graph node of its own.

    An LSTM cell makes h from c: the gradient at c would count what came through h a second time.
    """
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return output
    leaves, tree = pytree.tree_flatten(output)
    if sum(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves) < 2:
        return output
    copies = [t.clone() if isinstance(t, Tensor) and t.requires_grad else t for t in leaves]
    return pytree.tree_unflatten(copies, tree)


class _Freed:
    """A hook of a node that a call has made: once a backward, whoever runs it, has freed all of
    these nodes, or none is left, the call lets go of its inputs, as autograd does."""

    def __init__(self, call: Call) -> None:
        self.call: Call | None = call
        call.wanted += 1

    def __call__(self, grad_inputs: Any, grad_outputs: Any) -> None:
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.__del__()

    def __del__(self) -> None:
        call, self.call = self.call, None
        if call is not None:
            call.freed()


class _Learning:
    """A forward pre-hook of all modules that does not keep its recorder alive."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = weakref.ref(recorder)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if (recorder := self.recorder()) is not None:
            recorder.learn(module)


class _Hook:
    """A forward hook that neither keeps its recorder alive nor follows a copied or pickled
    module."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = weakref.ref(recorder) if recorder is not None else lambda: None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None  # what a compiled module computes has no layers; `Tape.resolve` says so
        recorder = self.recorder()
        return None if recorder is None else recorder(module, args, kwargs, output)

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # asked for by who would compile it
            raise AttributeError(
                "torch.jit.script cannot compile a module that fastdg watches: script it before "
                "the wrapper is made or the forward is recorded"
            )
        raise AttributeError(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
