"""MLDG: steps that help other domains, too."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.batch import Batch
from ...core.closures import Forward
from ...core.combine.seeded import Seeded
from ...core.hyper import argument, check_rate, check_steps, check_weight, hyper, option
from ...outer.adam_step import first_adam_step
from ...outer.ascent import Ascent, Offsets, Visit
from ...outer.pairs import check_pairs, in_pairs
from ...outer.vector import Vector


class MLDG(Seeded, Ascent):
    r"""Meta-learning for domain generalisation, of first order: the gradient of some domains, and
    of others after a step on these.

    .. math::
        \text{grad} = \frac1D\sum_{(i, j)}\bigl[\nabla\ell_i(\theta)
        + \beta\,\nabla\ell_j(\theta'_i)\bigr], \qquad
        \theta'_i = \theta - \alpha\,\frac{g_i}{|g_i| + 10^{-8}}, \qquad
        g_i = \nabla\ell_i(\theta) + \lambda\theta

    Each step divides the domains at random into ``meta_test`` domains j and the others, i; each of
    these is paired with a test domain, in turn. :math:`\theta'` is the first step of a new Adam.
    This is DomainBed's form; the paper takes a plain step on the mean loss of all i, and
    differentiates through it. DomainBed cuts both batches of a pair to the shorter one; here they
    keep all samples.

    ``opt.step(closure)`` makes a step: ``closure(d)`` runs the model on domain d and returns its
    losses: for i at :math:`\theta`, then for j at :math:`\theta'`, for each pair. ``.grad`` is
    cleared before. The same as a loop, with micro-batches or a ``GradScaler`` as in `SAM`:

        >>> for k, d in enumerate(opt.order()):
        ...     if k:
        ...         opt.ascend()
        ...     opt.backward(losses_of(d), d)
        >>> opt.step()

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a term.
        num_domains, beta: D and :math:`\beta`.
        meta_test: number of test domains of a step, less than D.
        inner_lr: :math:`\alpha`; default: the learning rate of the parameter's group, as in
            DomainBed. :math:`\lambda` is the group's ``weight_decay``, if it has one.
        generator: draws the order; its state is in ``state_dict``. Default: torch's own.
        buffers, model: as in `SAM`; the first forward is that of the first i.

    Defaults are DomainBed's. ``statistics`` holds those of the first backward, ``ascended_loss``
    (the last j's), ``gradient_norm``, and ``objective``, the losses in place of the gradients.

    Raises:
        TypeError, ValueError: an argument is not as described; a batch is of another domain.

    Reference:
        Li, Yang, Song, Hospedales: Learning to Generalize: Meta-Learning for Domain Generalization,
        AAAI 2018.
    """

    prefix = "mldg"
    around_algorithms = False
    _transient = (*Ascent._transient, "_objective", "_domains")

    beta: float = hyper(1.0, check_weight)
    inner_lr: float | None = hyper(None, check_rate)
    meta_test: int = option(2, check_steps)
    num_domains: int = argument(check_steps, kw_only=True)

    def _start(self) -> None:
        super()._start()
        _ = self.points  # checks meta_test

    @property
    def points(self) -> int:  # type: ignore[override]
        if self.meta_test >= self.num_domains:
            expected = f"expected less than num_domains={self.num_domains}"
            raise ValueError(f"meta_test: {expected}, got {self.meta_test}. Pass less.")
        return 2 * (self.num_domains - self.meta_test)  # two for each pair

    def order(self) -> list[int]:
        """Draw the domains of a step's gradients: a train domain, its test domain, and so on."""
        pairs, generator = self.points // 2, self.generator_on(torch.device("cpu"))
        drawn: list[int] = torch.randperm(self.num_domains, generator=generator).tolist()
        self._remember()
        return in_pairs(drawn[:pairs], drawn[pairs:])

    def evaluate_closure(self, forward: Forward) -> Tensor:
        if not forward.by_domain:
            raise TypeError("closure: MLDG calls it with a domain, got no parameter. Take one, d.")
        self.zero_grad()
        super().evaluate_closure(forward.of_each(self.order()))
        return self._statistics["objective"]

    def _batch(self, losses: Tensor, domains: Tensor, terms: Tensor | None, **own: Tensor) -> Batch:
        batch = super()._batch(losses, domains, terms, **own)
        if not (self._made or self._ready or self._micro_batches):
            self._domains: list[Tensor] = []  # of each gradient of this step
        ids = domains if domains.device.type == "cpu" else batch.partition.domains
        check_pairs(self._domains, self._made, ids)
        return batch

    def offsets(self, gradient: Vector) -> Offsets:
        share, total = 1 / self.num_domains, Vector({}, gradient.ranks)
        self._objective = torch.zeros_like(self._statistics["loss"])
        for k in range(self.points // 2):
            if k:
                gradient = yield Vector({}, gradient.ranks)  # at the model's own weights
            self._objective += share * self._statistics["loss"]
            test = yield first_adam_step(gradient, self.param_groups, self.inner_lr)
            self._objective += share * self.beta * self._statistics["loss"]
            total = total + share * gradient + share * self.beta * test
        return total

    def _finish(self, visit: Visit) -> None:
        super()._finish(visit)
        self._statistics["objective"] = self._objective
