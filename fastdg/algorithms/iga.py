"""IGA: the same gradient in every domain."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.closures import Forward, Gradients
from ..core.hyper import check_weight, hyper
from ..core.optimizer import DomainOptimizer
from ..core.step_batch import StepBatch
from ..dtypes import to_statistics_dtype
from ..gradients.second import differentiable_grad
from ..statistics.moments import variance_gap


class IGA(DomainOptimizer):
    r"""Inter-domain gradient alignment: ``objective = mean of the domains' losses + w * penalty``.

    .. math::
        G_d = \nabla\,\tfrac1{n_d}\sum_{i\in d}\ell_i, \qquad
        \text{penalty} = \sum_d \lVert G_d - \bar G\rVert^2

    over all of the optimizer's parameters; a domain that does not use one has gradient 0 there.
    The defaults are DomainBed's.

    With a linear kernel, the squared maximum mean discrepancy between the per-sample gradients of
    domains i and j is :math:`\lVert G_i-G_j\rVert^2`, and

    .. math:: \sum_{i<j}\lVert G_i-G_j\rVert^2 = D\sum_d\lVert G_d-\bar G\rVert^2,

    D times this penalty: IGA aligns gradients by an MMD with a linear kernel. Other kernels are not
    offered.

    There are two ways to make a step.

    ``opt.backward(losses, domains)`` on a mixed batch: all G from one differentiable backward,
    and one backward through that. Layers below a batch norm in training take a call of autograd
    for each domain, which is exact but slow.

    ``opt.step(closure)``, for large networks and batch norm by domain: ``closure(d)`` runs the
    model on domain d and returns its losses, or ``(losses, domains)``. It is called twice for each
    of the ``num_domains``: first for the mean gradient, then for

    .. math:: \nabla = \bar G + 2w \sum_d H_d\,(G_d - \bar G)

    one domain at a time, so that a single domain's graph is alive. ``.grad`` is cleared before.
    The second calls have to return the same losses: the closure takes the same data, and random
    numbers of torch (dropout) and the modules' buffers (running statistics) are put back in
    between. Hooks on parameters are called once, with the final gradient. A closure without a
    parameter returns ``(losses, domains)`` of a mixed batch, for `backward`.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        penalty_weight: w; lives in ``param_groups[0]`` as ``iga_penalty_weight``.
        num_domains: D; default: as many as have been seen. A domain without samples in a batch
            takes no part in it, and one domain alone has penalty 0.
        model: gives parameters their names in messages.
        check: on the first step see that the closure's second losses are its first.

    ``statistics`` holds ``loss``, ``penalty``, ``objective`` (0-dim), ``domain_loss`` (``[D]``, NaN
    for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Koyama, Yamaguchi: When is invariance useful in an Out-of-Distribution Generalization
        problem?, 2020.

    Example:
        >>> opt = fastdg.IGA(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "iga"
    _way_out = (
        "call opt.step(closure), with a forward for each domain, which goes with any model; or "
        "freeze these parameters"
    )
    compares = True

    penalty_weight: float = hyper(1000.0, check_weight)

    def objective(self, batch: StepBatch) -> Tensor:
        means = batch.means(differentiable=self.penalty_weight > 0)
        penalty = variance_gap(list(means.values()), [], batch.present, 0.0)
        risk = batch.domain_mean(batch.domain_losses)
        return batch.penalised(risk, self.penalty_weight, penalty)

    def evaluate_closure(self, forward: Forward) -> Tensor:
        if not forward.by_domain:
            return super().evaluate_closure(forward)
        statistics = forward.two_passes(self._align)
        risk, penalty = statistics["domain_loss"].mean(), statistics["penalty"]
        self._statistics = {**statistics, "objective": risk + self.penalty_weight * penalty}
        return statistics["loss"]

    def _align(self, losses: Tensor, means: Gradients) -> Tensor:
        """Add ``2w H (G - mean G)`` of one domain to ``.grad``; returns ``|G - mean G|^2``."""
        weight, share = self.penalty_weight, torch.full_like(losses, 1 / len(losses))
        if weight > 0:
            grads = differentiable_grad(losses, [*means], share)
        else:
            grads = list(torch.autograd.grad(losses, [*means], share, allow_unused=True))
        square, grad, gap = to_statistics_dtype(losses.detach()).new_zeros(()), None, None
        for mean in reversed(means.values()):
            grad = grads.pop()
            if mean is not None:  # a domain uses it
                gap = -mean if grad is None else grad - mean
                square = square + to_statistics_dtype(gap).square().sum()
        del grad, gap  # the graph has saved its own references
        if square.requires_grad:
            (weight * square).backward()
        return square.detach()
