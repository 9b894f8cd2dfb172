"""POGM: the ways that the domains go, brought together as far as all of them gain."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...averaging.domain_ways import DomainWays
from ...core.hyper import argument, check_one_of, check_steps, check_weight, fixed, hyper
from ...weightings.cagrad import CAGrad


class POGM(DomainWays):
    r"""Pareto optimality gradient matching: Fish with a way for each domain, and CAGrad of these.

    .. math::
        \theta_d \leftarrow \theta, \quad
        \theta_d \leftarrow \text{base step}_d \text{ on } \nabla\ell_d(\theta_d)
        \ (E \text{ times}), \quad h_d = \theta_d - \theta, \qquad
        \theta \leftarrow \theta + \eta\, \frac{1}{1 + c^2} \sum_d u_d\, h_d

    where :math:`\sum_d u_d h_d` is the vector with the largest smallest product with any
    :math:`h_d`, no farther than :math:`c\,|h_0|` from the mean way :math:`h_0`: the weights are
    `fastdg.weightings.CAGrad`'s. The wrapped optimizer has a state of its own for each domain
    (moments, counters; not its ``param_groups``), which goes on through all rounds.

    The training loop is an ordinary one over batches of a single domain: E steps on domain 0, E on
    domain 1, and so on; between two domains the weights are back where the round began, and the
    last step also takes the meta step, in place. ``opt.step(closure)`` makes a whole round:
    ``closure(d)`` runs the model on domain d, E times each, as in `Fish`.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        num_domains: number of training domains D.
        domain_steps: E, steps on each domain in a round; the authors' ``cag_update``.
        meta_lr: :math:`\eta`.
        c: how far from the mean way, in its lengths; the authors' ``cagrad_c``.
        solver: ``"exact"``; or ``"official"``: the authors' 20 steps of SGD on logits, bit by bit.
            Those have thresholds of 1e-4 after scaling, and end a little above the minimum.
        model: interpolate this model's buffers, too (running statistics), as in `Fish`. The
            authors' code drops them.

    Defaults are the authors'. Weights, ways and the optimizer's states for all domains are in
    ``state_dict``, D of each: a run that is resumed in the middle of a round goes on bit for bit.
    ``meta_lr``, ``c`` and ``domain_steps`` live in ``param_groups[0]``. Not for ``fully_shard``.

    ``statistics`` holds ``loss``, ``domain_loss`` and ``domain_count`` of the inner step, and from
    the first meta step on the statistics of the last one: ``gram`` of the ways ``[D, D]``,
    ``weights`` ``[D]``, :math:`u_d / (1 + c^2)`, and ``trajectory``, the squared length of their
    sum.

    Raises:
        TypeError, ValueError: an argument is not as described; a batch has samples of another
            domain than the one whose turn it is.

    Reference:
        Domain Generalization via Pareto Optimality Gradient Matching, and its code of 2024
        (https://github.com/khanhkhanhlele/DomainBed, ``CAG1``).

    Example:
        >>> opt = fastdg.POGM(torch.optim.Adam(model.parameters()), num_domains=3, model=model)
        >>> for d, (x, y) in enumerate(batches):            # one of each domain, in order
        ...     losses = F.cross_entropy(model(x), y, reduction="none")
        ...     opt.zero_grad(); opt.backward(losses, torch.full_like(y, d)); opt.step()
    """

    prefix = "pogm"
    penalises = False
    check: bool = fixed(True, init=False)

    meta_lr: float = hyper(0.5, check_weight)
    c: float = hyper(0.5, check_weight)
    domain_steps: int = hyper(1, check_steps)
    solver: Literal["exact", "official"] = hyper("exact", check_one_of("exact", "official"))
    num_domains: int = argument(check_steps, kw_only=True)

    def combined(self, gram: Tensor) -> Tensor:
        if self.solver == "official":
            return official_weights(gram, self.c)
        return CAGrad(self.c, rescale=1)(gram)

    def meta_step(self) -> dict[str, Tensor]:
        return self.follow(self.ways, self.combined, self.meta_lr)


def official_weights(gram: Tensor, c: float) -> Tensor:
    """The weights that the authors' solver finds, in the dtype of the Gram matrix."""
    domains = len(gram)
    matrix = gram / (gram.diagonal() + 1e-4).sqrt().mean().pow(2)
    with_mean = matrix.mean(1, keepdim=True)
    radius = (with_mean.mean(0, keepdim=True) + 1e-4).sqrt() * c
    logits = gram.new_zeros((domains, 1))
    best, least = logits, gram.new_full((1, 1), torch.inf)
    velocity = None
    for _ in range(21):
        with torch.enable_grad():
            logits.requires_grad_(True)
            w = torch.softmax(logits, 0)
            value = w.t().mm(with_mean) + radius * (w.t().mm(matrix).mm(w) + 1e-4).sqrt()
            (slope,) = torch.autograd.grad(value, logits)
        logits, value = logits.detach(), value.detach()
        better = value < least
        best, least = logits.where(better, best), value.where(better, least)
        velocity = slope if velocity is None else velocity.mul(0.5).add(slope)
        logits = logits.add(velocity, alpha=-50 if domains == 50 else -25)
    w = torch.softmax(best, 0)
    share = radius.view(-1) / ((w.t().mm(matrix).mm(w) + 1e-4).sqrt() + 1e-4)
    return (1 / domains + w * share).view(-1) / (1 + c**2)
