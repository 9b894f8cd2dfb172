"""Fish: steps on one domain after the other, then a part of the way."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import ops
from .._torch import not_compiled, version_of
from ..averaging.buffers import KINDS, Before, Buffers, stored
from ..core.batch import Batch
from ..core.checkpoint import Kept
from ..core.closures import asks_for_domain, check_same, losses_of, together
from ..core.configured import Configured
from ..core.hyper import NEEDED, check_steps, check_switch, check_weight, hyper, option
from ..core.optimizer import Closure, DomainOptimizer
from ..core.step_batch import StepBatch
from ..distributed.sharding import local, sharded

ONE_DOMAIN = (
    "domains: Fish takes its steps on one domain after the other, so a batch holds the samples of "
    "one: draw each batch from one domain, or split a mixed one and call backward and step for "
    "each part (domains == d)"
)


@dataclass
class Single(Batch):
    """A micro-batch of one domain, whose id is on the device that all ids were on."""

    domain: Tensor


class Fish(DomainOptimizer):
    r"""Gradient matching by an inner loop over domains, and a step towards where it ends.

    .. math::
        \tilde\theta \leftarrow \text{base step on } \nabla\ell_d(\tilde\theta)
        \quad\text{for one domain } d \text{ after the other}, \qquad
        \theta \leftarrow \theta + \epsilon\,(\tilde\theta-\theta)

    To first order this climbs the inner products between the domains' gradients. The training loop
    is an ordinary one over batches of a single domain: each ``opt.step()`` is an inner step, and
    every ``meta_steps``-th also takes the meta step, in place. One copy of the weights is kept;
    the wrapped optimizer's state goes on through all steps, as in DomainBed. An inner step that a
    ``torch.amp.GradScaler`` skips has no length; a last one still takes the meta step.

    ``opt.step(closure)`` makes a whole meta-iteration: ``closure(d)`` runs the model on domain d
    and returns its losses, or ``(losses, domains)``, for d from 0 to ``meta_steps - 1``. ``.grad``
    is cleared before each call; the result is the mean of the inner steps' mean losses, and
    ``statistics`` covers all of them. A closure without a parameter makes one inner step.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        meta_lr: :math:`\epsilon`, as in DomainBed. The paper's code divides its own by the number
            of inner steps.
        num_domains: number of training domains D.
        meta_steps: inner steps of a meta-iteration; default ``num_domains``. Which domains they
            take, and in which order, is the training loop's choice.
        inner_product: also sum up what the steps on earlier domains have done for each domain, at
            the price of reading gradients, weights and kept weights in every inner step.
        model: interpolate this model's buffers, too (running statistics), as DomainBed does: those
            of its ``state_dict()`` that are numbers; integers are truncated. A meta-iteration
            begins with the buffers before its first call with gradients enabled. Of a compiled
            model, what ``torch.compile`` returned.

    ``meta_lr`` and ``meta_steps`` live in ``param_groups[0]`` (as ``fish_meta_lr`` and so on). The
    place in the meta-iteration and the kept weights are in ``state_dict``: a run that is resumed
    in the middle of one goes on bit for bit.

    Weights that are changed from outside between two meta-iterations (by ``load_state_dict``, by
    another optimizer) are where the next one starts; autograd's version counters tell, which a
    change through ``.data`` passes by. A meta-iteration that was begun ends with a part of the way
    from the weights it began with.

    ``statistics`` holds ``loss`` (0-dim), ``domain_loss`` (``[D]``, NaN where there was no sample)
    and ``domain_count`` (``[D]``) of the inner step, and from the first meta step on those of the
    last one: ``trajectory``, :math:`|\tilde\theta-\theta|^2`, and with ``inner_product=True``
    ``inner_product``, :math:`-\sum_d\langle\nabla\ell_d(\tilde\theta_d),\tilde\theta_d-\theta
    \rangle`: how far, to first order, the inner steps before d have brought its loss down (NaN of
    a meta-iteration that was resumed). For plain SGD with rate r that is r times the sum of the
    inner products of all pairs of gradients, for which also :math:`\sum_{i<j}\langle g_i,g_j\rangle
    = (|\tilde\theta-\theta|^2/r^2-\sum_d|g_d|^2)/2`. The products of the domains' gradients at one
    point are ``fastdg.domain_gram(opt.tape, losses, domains)`` on a mixed batch.

    Raises:
        TypeError, ValueError: an argument is not as described; a batch with samples of several
            domains.

    Reference:
        Shi, Seely, Torr, Siddharth, Hannun, Usunier, Synnaeve: Gradient Matching for Domain
        Generalization, ICLR 2022.

    Example:
        >>> opt = fastdg.Fish(torch.optim.Adam(model.parameters()), num_domains=3, model=model)
        >>> for d, (x, y) in enumerate(batches):            # one of each domain
        ...     losses = F.cross_entropy(model(x), y, reduction="none")
        ...     opt.zero_grad(); opt.backward(losses, torch.full_like(y, d)); opt.step()
    """

    prefix = "fish"
    tensors = ("kept", "buffers", "counters")
    penalises = False
    looks_at_samples = False
    _fleeting = ("_buffers", "_noted", "_stamps", "_begun", "_product", "_meta")
    _transient = (*DomainOptimizer._transient, *_fleeting)

    meta_lr: float = hyper(0.5, check_weight)
    meta_steps: int = hyper(NEEDED, check_steps)
    inner_product: bool = option(False, check_switch)

    def __init__(
        self,
        base: Optimizer,
        *,
        meta_lr: float = 0.5,
        num_domains: int,
        meta_steps: int | None = None,
        inner_product: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        check_steps("num_domains", num_domains)
        self._network = model  # whose buffers go with this wrapper wherever it is copied
        self._buffers = Buffers(model)
        Configured.__init__(
            self,
            base,
            num_domains=num_domains,
            model=model,
            meta_lr=meta_lr,
            meta_steps=num_domains if meta_steps is None else meta_steps,
            inner_product=inner_product,
        )
        self._follow()
        self._begin_here()

    def _start(self) -> None:
        self._product: Tensor | None = None

    def _counters(self) -> dict[str, Any]:
        return {**super()._counters(), "position": 0}

    @property
    def position(self) -> int:
        """Inner steps taken in this meta-iteration; kept in ``param_groups``."""
        return int(self.param_groups[0].get("fish_position", 0))

    @property
    def _reads_grad(self) -> bool:  # type: ignore[override]
        return self.inner_product

    # -- inner steps --

    def _batch(self, losses: Tensor, domains: Tensor, terms: Tensor | None) -> Batch:
        batch = super()._batch(losses, domains, terms)
        ids = domains if domains.device.type == "cpu" else batch.partition.domains
        check_same(ids, ids[0], ONE_DOMAIN)
        if self._micro_batches:
            first = self._micro_batches[0].domain.to(ids.device)
            check_same(ids, first, f"{ONE_DOMAIN}, micro-batches with final=False among them")
        return Single(losses, batch.partition, batch.resolved, terms, batch.scale, ids[0])

    def objective(self, batch: StepBatch) -> Tensor:
        if self._ranks.size > 1:
            (ids,) = batch.present.cpu().nonzero(as_tuple=True)
            check_same(ids, ids[0], f"{ONE_DOMAIN}, on all ranks")
        batch.log(**self._meta)
        return batch.loss

    def _evaluate(self, closure: Closure) -> Tensor:
        if not asks_for_domain(closure):
            return super()._evaluate(closure)
        if self.position:
            raise RuntimeError(
                f"Fish.step(closure) makes a whole meta-iteration, but {self.position} of the "
                f"{self.meta_steps} inner steps of this one were already made; finish it with "
                "backward and step"
            )
        seen: list[dict[str, Tensor]] = []
        for d in range(self.meta_steps):
            if d:
                self._advance()
            self.zero_grad()
            losses, domains, inputs = losses_of(closure(d), d)
            self.backward(losses, domains, **inputs)
            seen.append(self._statistics)
        self._statistics = {**self._statistics, **together(seen)}
        return self._statistics["loss"]

    @not_compiled
    def _prepare(self) -> None:
        kept = self._own_state["kept"]
        self._keep(kept)
        if self.position and self.inner_product:
            if self._product is None:  # resumed: of the steps before nothing is known
                self._product = self._statistics["loss"].new_full((), torch.nan)
            products: dict[Tensor, Tensor] = {}
            for p, start in kept.items():
                if p.grad is not None:
                    grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
                    gram = ops.gram([[local(grad)], [local(p.detach() - start)]])
                    products[p] = gram[0, 1]
            self._product = self._product - self._ranks.sum(products)

    def _keep(self, kept: dict[Tensor, Tensor]) -> None:
        """The weights, and the buffers, that the meta-iteration begins with."""
        if self.position == 0:
            for p, start in kept.items():
                if self._stamps.get(p) != _stamp(p):  # changed since the last meta step
                    kept[p] = stored(p.detach(), start)
            for kind, value in self._noted.items():
                owner = next(iter(self._own_state[kind]), None)
                self._own_state[kind][self._owner() if owner is None else owner] = value
            self._product = self._statistics["loss"].new_zeros(()) if self.inner_product else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in kept:
                    kept[p] = p.detach().clone()

    def _skip(self) -> None:
        self._keep(self._own_state["kept"])
        self._commit()

    @not_compiled
    def _commit(self) -> None:
        position = self.position + 1
        if position >= self.meta_steps:
            self._meta_step()
            position = 0
        self.param_groups[0]["fish_position"] = position

    # -- the meta step --

    def _meta_step(self) -> None:
        kept = self._own_state["kept"]
        alike: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
        for p in kept:
            alike.setdefault((p.device, p.dtype, sharded(p)), []).append(p)
        squares = {
            tensors[0]: ops.meta_step(
                [local(p.detach()) for p in tensors],
                [local(kept[p]) for p in tensors],
                self.meta_lr,
            )
            for tensors in alike.values()
        }
        self._buffers.interpolate(self._noted, self.meta_lr)
        self._stamps = {p: _stamp(p) for p in kept}
        self._begun = False
        self._meta = {"trajectory": self._ranks.sum(squares)}
        if self._product is not None:
            self._meta["inner_product"] = self._product
        self._statistics = {**self._statistics, **self._meta}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and whatever `backward` has staged or left for `step`."""
        super().zero_grad(set_to_none)
        self._begun = False

    def _before_forward(self) -> None:
        """The model is about to run, and may change its buffers."""
        used = self._begun or self._ready or self._micro_batches
        if self.position == 0 and not used and torch.is_grad_enabled():
            self._note_buffers()
            self._begun = True

    def _note_buffers(self) -> None:
        for kind, value in self._buffers.now().items():
            self._noted[kind] = stored(value, self._noted.get(kind))

    # -- state and copies --

    def _follow(self) -> None:
        """Look at the buffers of the model, and see them before they change."""
        self._buffers = Buffers(self._network)
        if self._network is not None and self._buffers.places:
            handle = self._network.register_forward_pre_hook(Before(self))
            weakref.finalize(self, handle.remove).atexit = False

    def _clear(self) -> None:
        super()._clear()
        self._noted: dict[str, Tensor] = {}  # the buffers that this meta-iteration began with
        self._stamps, self._begun, self._product, self._meta = {}, False, None, {}

    def _initial_state(self) -> Kept:
        weights = {p: p.detach().clone() for p in self._names}
        owner = self._owner()
        return {
            "kept": weights,
            **{kind: {owner: now} for kind, now in self._buffers.now().items()},
        }

    def _finish_load(self) -> None:
        super()._finish_load()
        self._begin_here()

    def _begin_here(self) -> None:
        kept = self._own_state["kept"]
        kept.update({p: tensor.to(p.dtype) for p, tensor in kept.items()})
        if self.position == 0:
            self._note_buffers()
        else:
            now, kept_then = self._buffers.now(), _buffers_in(self._own_state)
            self._noted = {kind: kept_then[kind].to(value.dtype) for kind, value in now.items()}

    def _validate_state(self, kept: Kept, groups: Sequence[dict[str, Any]]) -> None:
        position = groups[0].get("fish_position", 0)
        if not position:
            return  # a meta-iteration begins from the weights there are
        if not kept["kept"]:
            raise ValueError(
                f"state_dict: it comes from within a meta-iteration of Fish (position {position}) "
                "but has no fish_kept tensors, the weights that it began with. "
                "torch.distributed.checkpoint fills in only what the optimizer already has: run "
                "one backward and step before loading"
            )
        for p, tensor in kept["kept"].items():
            if tensor.shape != p.shape and p.numel():  # what has no size yet gets it by loading
                raise ValueError(
                    f"state_dict: its kept weights of {self._names[p]} have shape "
                    f"{tuple(tensor.shape)}, but the parameter has shape {tuple(p.shape)}"
                )
        saved = {kind: len(value) for kind, value in _buffers_in(kept).items()}
        here = {kind: len(value) for kind, value in self._buffers.now().items()}
        if saved != here:
            raise ValueError(
                "state_dict: it comes from within a meta-iteration of Fish, with kept buffers of "
                f"sizes {saved}, but those of the model given as model= have sizes {here}"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._look(self._network)
        self._follow()
        self._begin_here()


def _stamp(p: Tensor) -> tuple[int, int]:
    """Changes when the tensor is changed in place or gets other memory."""
    return version_of(p), p.data_ptr()


def _buffers_in(kept: Kept) -> dict[str, Tensor]:
    return {kind: value for kind in KINDS for value in kept[kind].values()}
