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

MOST = 8  # graphs, as of torch.compile: if there are more, something changes in every step


def compiled(opt: DomainOptimizer, forward: Callable[..., Any], **options: Any) -> CompiledBackward:
    """The model's forward and ``opt.backward`` on its losses, compiled together.

    A model that `torch.compile` has compiled is one operation, whose backward is called once for
    each domain or sample, and has no derivative of its own, which penalties need. So torch writes
    down what one step of the eager model and wrapper computes (layers, statistics, penalty and its
    derivative), and that is compiled. Replaying it, Python looks at no layer.

    Args:
        opt: a wrapper with ``num_domains``. It stays what it is: ``step``, ``statistics``,
            ``state_dict`` and schedulers as ever, and eager steps may come in between.
        forward: ``forward(*batch)`` runs the model, itself not compiled, and returns the losses
            ``[N]``, or ``(losses, inputs)`` with the further inputs of ``opt.backward``.
        options: of `torch.compile` (``backend``, ``mode``, ``options``).

    Returns:
        ``backward(*batch, domains=domains)``, in place of ``opt.backward(forward(*batch),
        domains)``: adds to ``.grad`` and returns the mean loss.

    The first batch of each kind runs eagerly, with all checks; the second is written down; the
    third is compiled. Of one kind are batches of the same shapes, with the same modules in training
    mode, parameters trained, settings of the wrapper, side of its anneal, and autocast. What else
    in Python ``forward`` looks at stays what it was in the batch that was written down. Dropout
    draws from the compiler's random numbers.

    Raises:
        TypeError, ValueError: an argument is not as described; ``num_domains`` was not given; the
            wrapper draws from a generator of its own.
        RuntimeError: the step looks at values of tensors, so that it is no graph; a parameter has
            hooks; training runs on several ranks; a micro-batch is staged; ``.grad`` has the factor
            of a GradScaler.

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
    """What `compiled` returns."""

    def __init__(
        self, opt: DomainOptimizer, forward: Callable[..., Any], options: dict[str, Any]
    ) -> None:
        if not isinstance(opt, DomainOptimizer):
            raise TypeError(f"opt: expected a wrapper of fastdg, got {type(opt).__name__}")
        if not callable(forward) or isinstance(forward, nn.Module):
            raise TypeError(
                "forward: expected a function that runs the model on a batch and returns its "
                f"losses (N,), got {type(forward).__name__}"
            )
        self.opt, self.forward, self.options = opt, forward, options
        self.links = [link for link in chain(opt) if isinstance(link, DomainOptimizer)]
        self.num_domains = next((n for link in self.links if (n := link.num_domains)), 0)
        name = type(self.links[0]).__name__
        if not self.num_domains:
            raise ValueError(f"num_domains: a graph has a number of domains; pass it to {name}")
        if any(getattr(link, "generator", None) is not None for link in self.links):
            raise ValueError(f"generator: a graph draws from torch's own; make {name} without one")
        self.modules: dict[nn.Module, None] = {}  # that ran
        self.seen: dict[Any, None] = {}  # kinds of batches that ran once, the latest
        self.graphs: dict[Any, _Graph] = {}  # kind of batch -> its graph
        self.warned = False

    def __call__(self, *batch: Any, domains: Tensor) -> Tensor:
        """Add the gradient of a batch to ``.grad``; returns the mean loss, 0-dim, detached."""
        check_single_rank()
        if any(link._micro_batches for link in self.links):
            raise RuntimeError("compiled: a batch is whole, but a micro-batch of it is staged")
        if any(link._ready and link._loss_scale is not UNSCALED for link in self.links):
            raise RuntimeError(
                "compiled: what opt.backward has left in .grad has the factor of a GradScaler, and "
                "what a graph adds has none; step, or call opt.zero_grad(), before"
            )
        leaves, spec = pytree.tree_flatten(batch)
        ids = self._ids(domains)
        key = self._kind(leaves, spec, ids)
        graph = self.graphs.get(key)
        if graph is not None:
            return graph.replay([ids, *(x for x in leaves if isinstance(x, Tensor))])
        if key in self.seen and len(self.graphs) < MOST:
            del self.seen[key]
            graph = _Graph(self, leaves, spec, ids)
            self.graphs[self._kind(leaves, spec, ids)] = graph
            return graph.loss
        with self._noting():
            loss = self._eager(batch, ids)
        # The modules that ran belong to the kind, and are known only now
        self.seen[self._kind(leaves, spec, ids)] = None
        if len(self.seen) > MOST:
            del self.seen[next(iter(self.seen))]
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"compiled: more than {MOST} kinds of batches, so that some run eagerly. Give "
                    "all one size (drop_last=True), and do not schedule a setting step by step",
                    stacklevel=2,
                )
        return loss

    def _eager(self, batch: tuple[Any, ...], ids: Tensor) -> Tensor:
        made = self.forward(*batch)
        losses, inputs = made if isinstance(made, tuple) else (made, {})
        return self.opt.backward(losses, ids, **inputs)

    def _ids(self, domains: Tensor) -> Tensor:
        """``domains`` on the device of the parameters; looked at where that needs no wait."""
        domains = as_ids(domains)
        if domains.device.type == "cpu":
            check_ids(domains, self.num_domains)
            domains = domains.to(self._parameters()[0].device, non_blocking=True)
        return domains

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.opt.param_groups for p in group["params"]]

    def _kind(self, leaves: list[Any], spec: pytree.TreeSpec, ids: Tensor) -> Any:
        """What a graph holds good for."""
        device, parameters = ids.device.type, self._parameters()
        for p in parameters:
            if any(hook_tables(p)):
                raise RuntimeError(
                    f"compiled: a parameter of shape {tuple(p.shape)} has hooks, which a graph "
                    "does not call; remove them, or call opt.backward"
                )
        return (
            spec,
            *(_shown(leaf) for leaf in (ids, *leaves)),
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            *(setting for link in self.links for setting in _settings(link)),
            *map(id, parameters),
            *[p.requires_grad for p in parameters],
            *[module.training for module in self.modules],
        )

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Modules that run inside are noted."""

        def note(module: nn.Module, args: Any) -> None:
            self.modules[module] = None

        handle = torch_module.register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()


class _Graph:
    """What one step computes, written down from running it, and compiled when it is replayed."""

    def __init__(
        self, owner: CompiledBackward, leaves: list[Any], spec: pytree.TreeSpec, ids: Tensor
    ) -> None:
        self.links = owner.links
        modules = (p for module in owner.modules for p in module.parameters(recurse=False))
        self.targets = list(dict.fromkeys([*owner._parameters(), *modules]))
        constant = {id(p) for p in self.targets}
        where = [isinstance(leaf, Tensor) for leaf in leaves]

        def run(ids: Tensor, *tensors: Tensor) -> list[Tensor]:
            following = iter(tensors)
            full = [next(following) if t else x for t, x in zip(where, leaves, strict=True)]
            self.loss = owner._eager(pytree.tree_unflatten(full, spec), ids)
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
                module = make_fx(run)(ids, *tensors)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0]
            raise RuntimeError(
                f"compiled: this step is no graph ({reason}); what the model, the losses or "
                f"{type(owner.opt).__name__} look at of a tensor's values cannot be compiled. Call "
                "opt.backward"
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
        """The same step on other tensors."""
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
            link._one_domain.watch(link, again, stacklevel=5)  # no_grad is one
            link._loss_scale = UNSCALED  # of a backward that has failed
        return loss


def check_single_rank() -> None:
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            raise RuntimeError(
                f"compiled: torch.distributed is initialised with {ranks} ranks, and what they "
                "tell each other is not part of a graph; call opt.backward"
            )


def _shown(leaf: Any) -> Any:
    """What a graph has burnt in of an input."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.requires_grad:
        raise ValueError("batch: expected tensors that require no gradient, and got one that does")
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device


def _settings(link: DomainOptimizer) -> Iterator[Any]:
    """What a graph has burnt in of a wrapper: its settings, and which tensors it keeps."""
    if link.role == "average":  # which a backward passes through
        return
    for name, option in declared(type(link)).items():
        if isinstance(option, Hyper):
            yield getattr(link, name)
    if isinstance(link, Annealed):
        yield link.steps >= link.anneal_steps
    for tensors in link._own_state.values():
        yield from map(id, tensors.values())
