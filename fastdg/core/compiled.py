"""Forward and backward of a wrapped training step as one compiled graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules import module as torch_module

from .._torch import hook_tables, make_fx, pytree
from ..domains import as_ids, check_ids
from ..gradients.scale import UNSCALED
from .annealed import Annealed
from .backward import accumulate, put
from .hyper import Hyper, declared
from .nesting import chain
from .optimizer import DomainOptimizer

MOST = 8  # graphs, torch.compile's limit: with more, something changes in every step


def compiled(opt: DomainOptimizer, forward: Callable[..., Any], **options: Any) -> CompiledBackward:
    """Compile the model's forward and ``opt.backward`` on its losses together.

    `torch.compile` makes one operation of a model, whose backward is called once for each domain or
    sample, and which has no second derivative for penalties. So torch traces one step of the eager
    model and wrapper (layers, statistics, penalty and its derivative), and compiles this trace. A
    replay runs no Python code of the layers.

    Args:
        opt: wrapper with ``num_domains``. Its ``step``, ``statistics``, ``state_dict`` and
            schedulers work as before, and eager steps may come in between.
        forward: ``forward(*batch)`` runs the model, itself not compiled, and returns the losses
            ``[N]``, or a list with those of each task, or ``(losses, inputs)`` with a dict of
            further inputs of ``opt.backward``.
        options: options of `torch.compile` (``backend``, ``mode``, ``options``).

    Returns:
        ``backward(*batch, domains=domains)``, in place of ``opt.backward(forward(*batch),
        domains)``: adds to ``.grad`` and returns the mean loss. Without ``domains=`` where
        ``forward`` returns a list, since each task is a domain.

    The first batch of each kind runs eagerly, with all checks; the second is traced; the third is
    compiled. A kind is given by the batch's shapes, the modules in training mode, the trained
    parameters, the wrapper's settings, the side of its anneal, and autocast. All other Python
    values in ``forward`` keep their value from the trace. Dropout draws from the compiler's random
    numbers.

    Raises:
        TypeError, ValueError: an argument is not as described; ``num_domains`` is missing; the
            wrapper draws from a generator of its own, or its weighting keeps state.
        RuntimeError: the step branches on values of tensors; a parameter has hooks; training runs
            on several ranks; a micro-batch is staged; ``.grad`` has the scale of a GradScaler.

    Example:
        >>> opt = fastdg.Fishr(torch.optim.Adam(model.parameters()), params="all", num_domains=3)
        >>> def forward(x, y):
        ...     return F.cross_entropy(model(x), y, reduction="none")
        >>> backward = fastdg.compiled(opt, forward)
        >>> for x, y, domains in loader:
        ...     opt.zero_grad()
        ...     loss = backward(x, y, domains=domains)
        ...     opt.step()
    """
    return CompiledBackward(opt, forward, options)


class CompiledBackward:
    """Result of `compiled`."""

    def __init__(
        self, opt: DomainOptimizer, forward: Callable[..., Any], options: dict[str, Any]
    ) -> None:
        if not isinstance(opt, DomainOptimizer):
            raise TypeError(f"opt: expected a wrapper of fastdg, got {type(opt).__name__}.")
        if not callable(forward) or isinstance(forward, nn.Module):
            raise TypeError(
                "forward: expected a function that runs the model on a batch and returns its "
                f"losses (N,), got {type(forward).__name__}."
            )
        if any(link.role == "ascent" for link in chain(opt)):
            raise TypeError(
                f"opt: a graph has one forward, and a step of {type(opt).__name__} has several. "
                "Call torch.compile on the model instead."
            )
        self.opt, self.forward, self.options = opt, forward, options
        self.links = [link for link in chain(opt) if isinstance(link, DomainOptimizer)]
        self.num_domains = next((n for link in self.links if (n := link.num_domains)), 0)
        name = type(self.links[0]).__name__
        if not self.num_domains:
            raise ValueError(
                f"num_domains: a graph needs it, got None. Pass num_domains= to {name}."
            )
        if any(getattr(link, "generator", None) is not None for link in self.links):
            raise ValueError(
                "generator: a graph draws from torch's own generator, got another one. Create "
                f"{name} without generator=."
            )
        self._refuse_state()
        self.modules: dict[nn.Module, None] = {}  # modules that ran
        self.seen: dict[Any, None] = {}  # the latest kinds of batches that ran once
        self.graphs: dict[Any, _Graph] = {}  # kind of batch -> its graph
        self.warned = False

    def __call__(self, *batch: Any, domains: Tensor | None = None) -> Tensor:
        """Add the gradient of a batch to ``.grad``; return the mean loss, 0-dim, detached."""
        check_single_rank()
        if any(link._micro_batches for link in self.links):
            raise RuntimeError(
                "compiled: it runs whole batches, but a micro-batch is staged. Call opt.backward "
                "with final=True, or opt.zero_grad(), before."
            )
        if any(link._ready and link._loss_scale is not UNSCALED for link in self.links):
            raise RuntimeError(
                "compiled: .grad has the scale of a GradScaler, but a graph adds unscaled "
                "gradients. Call scaler.step(opt) or opt.zero_grad() before."
            )
        leaves, spec = pytree.tree_flatten((batch, self._ids(domains)))
        key = self._kind(leaves, spec)
        graph = self.graphs.get(key)
        if graph is not None:
            return graph.replay([x for x in leaves if isinstance(x, Tensor)])
        if key in self.seen and len(self.graphs) < MOST:
            del self.seen[key]
            self._refuse_state()  # which a weighting may have shown by now
            graph = _Graph(self, leaves, spec)
            self.graphs[self._kind(leaves, spec)] = graph
            return graph.loss
        with self._noting():
            loss = self._eager(leaves, spec)
        # The modules that ran are a part of the kind, and known only now
        self.seen[self._kind(leaves, spec)] = None
        if len(self.seen) > MOST:
            del self.seen[next(iter(self.seen))]
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"compiled: got more than {MOST} kinds of batches, so some run eagerly. Use "
                    "one size for all (drop_last=True), and do not change a setting every step.",
                    stacklevel=2,
                )
        return loss

    def _refuse_state(self) -> None:
        for link in self.links:
            if getattr(link, "keeps_state", False):
                weighting = type(link.weighting).__name__  # type: ignore[attr-defined]
                raise TypeError(
                    f"opt: the {weighting} of {type(link).__name__} keeps state between calls, "
                    "which a graph would leave as it was traced. Call opt.backward instead."
                )

    def _eager(self, leaves: list[Any], spec: pytree.TreeSpec) -> Tensor:
        batch, ids = pytree.tree_unflatten(leaves, spec)
        made = self.forward(*batch)
        losses, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
        if isinstance(losses, tuple) or not isinstance(inputs, dict):
            got = ", ".join(type(x).__name__ for x in made)
            raise TypeError(
                "forward: expected losses (N,), a list with the losses of each task, or (losses, "
                f"inputs) with a dict of inputs, got the tuple ({got}). Return losses of several "
                "tasks as a list, [loss_a, loss_b]."
            )
        if isinstance(losses, Tensor) and ids is None:
            raise TypeError(
                "domains: expected the domain of each sample, an integer tensor (N,), got none. "
                "Call backward(*batch, domains=domains), or return a list of the losses of each "
                "task from forward."
            )
        return self.opt.backward(losses, ids, **inputs)

    def _ids(self, domains: Tensor | None) -> Tensor | None:
        """Move ``domains`` to the parameters' device, and check them if this needs no wait."""
        if domains is None:
            return None
        domains = as_ids(domains)
        if domains.device.type == "cpu":
            check_ids(domains, self.num_domains)
            domains = domains.to(self._parameters()[0].device, non_blocking=True)
        return domains

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.opt.param_groups for p in group["params"]]

    def _kind(self, leaves: list[Any], spec: pytree.TreeSpec) -> Any:
        """Return the kind of a batch: all that a graph depends on."""
        parameters = self._parameters()
        device = parameters[0].device.type
        for p in parameters:
            if any(hook_tables(p)):
                raise RuntimeError(
                    f"compiled: a graph does not call hooks, but a parameter of shape "
                    f"{tuple(p.shape)} has some. Remove them, or call opt.backward instead."
                )
        return (
            spec,
            *map(_shown, leaves),
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            *(setting for link in self.links for setting in _settings(link)),
            *map(id, parameters),
            *[p.requires_grad for p in parameters],
            *[module.training for module in self.modules],
        )

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Record the modules that run inside."""

        def note(module: nn.Module, args: Any) -> None:
            self.modules[module] = None

        handle = torch_module.register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()


class _Graph:
    """A traced step, compiled when it is first replayed."""

    def __init__(self, owner: CompiledBackward, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        self.links = owner.links
        modules = (p for module in owner.modules for p in module.parameters(recurse=False))
        self.targets = list(dict.fromkeys([*owner._parameters(), *modules]))
        constant = {id(p) for p in self.targets}
        where = [isinstance(leaf, Tensor) for leaf in leaves]

        def run(*tensors: Tensor) -> list[Tensor]:
            following = iter(tensors)
            full = [next(following) if t else x for t, x in zip(where, leaves, strict=True)]
            self.loss = owner._eager(full, spec)
            left = [(link._statistics, link._pending, link._ready) for link in self.links]
            rest, self.spec = pytree.tree_flatten((self.loss, left))
            flat = [*(p.grad for p in self.targets), *rest]
            self.outputs = [
                None if isinstance(x, Tensor) and id(x) not in constant else x for x in flat
            ]
            self.fresh = [isinstance(x, Tensor) and id(x) not in constant for x in flat]
            return [x for x, fresh in zip(flat, self.fresh, strict=True) if fresh]

        held = {p: p.grad for p in self.targets}
        put(dict.fromkeys(held))
        try:
            with owner._noting(), torch.autograd.set_multithreading_enabled(False):
                tensors = [x for x in leaves if isinstance(x, Tensor)]
                module = make_fx(run)(*tensors)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0]
            raise RuntimeError(
                f"compiled: could not trace this step ({reason}). The model, the loss or "
                f"{type(owner.opt).__name__} branches on tensor values. Call opt.backward instead."
            ) from error
        finally:
            made = [p.grad for p in self.targets]
            put(held)
        for p, new in zip(self.targets, made, strict=True):
            if new is not None:
                accumulate(p, new)
        self.run = torch.compile(module, **{"fullgraph": True, "dynamic": False, **owner.options})

    @torch.no_grad()
    def replay(self, tensors: list[Tensor]) -> Tensor:
        """Run the step on other tensors."""
        following = iter(self.run(*tensors))
        flat = [
            next(following) if fresh else x
            for fresh, x in zip(self.fresh, self.outputs, strict=True)
        ]
        loss, left = pytree.tree_unflatten(flat[len(self.targets) :], self.spec)
        for p, grad in zip(self.targets, flat, strict=False):
            if grad is not None:
                accumulate(p, grad)
        for link, (statistics, pending, ready) in zip(self.links, left, strict=True):
            again = link._grad_is_owned()
            if ready:
                link._mark_grad_owned()
            link._statistics, link._pending = statistics, pending
            link._one_domain.watch(link, again, stacklevel=5)  # one of these is no_grad
            link._loss_scale = UNSCALED  # a failed backward may have set another
        return loss


def check_single_rank() -> None:
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            raise RuntimeError(
                "compiled: a graph has no communication, but torch.distributed is initialised "
                f"with {ranks} ranks. Call opt.backward instead."
            )


def _shown(leaf: Any) -> Any:
    """Return the properties of an input that a graph depends on."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.requires_grad:
        raise ValueError(
            "batch: expected tensors that require no gradient, got one that does. Detach it."
        )
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device


def _settings(link: DomainOptimizer) -> Iterator[Any]:
    """Yield the properties of a wrapper that a graph depends on: settings and tensors of state."""
    if link.role == "average":  # it does not change a backward
        return
    for name, option in declared(type(link)).items():
        if isinstance(option, Hyper):
            yield getattr(link, name)
    if isinstance(link, Annealed):
        yield link.steps >= link.anneal_steps
    for tensors in link._own_state.values():
        yield from map(id, tensors.values())
