"""GENIE: every weight's step scaled by how sure its gradient is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..averaging.gradient_history import Estimate, GradientHistory
from ..core.hyper import check_part, check_weight, hyper
from ..core.step_batch import StepBatch

TINY = 1e-8


class GENIE(GradientHistory):
    r"""Equalised one-step generalisation ratios: steps along

    .. math::
        \Bigl(m\,\frac{\tau}{1 + v_m / (m^2 + 10^{-8})} + (1-\tau)\,\sigma\,\xi\Bigr)
        \frac{\beta}{1 - p}, \qquad
        \tau = \tanh\min(1/v,\, 10), \quad \xi \sim \mathcal N(0, 1), \quad
        \beta \sim \text{Bernoulli}(1 - p)

    entry by entry, with a gradient m, its variance v, and the variance :math:`v_m` of m;
    :math:`\sigma` is the mean of :math:`|m| / (1 + v_m/(m^2+10^{-8}))` in the parameter, weighted
    by :math:`\tau`. A variance that is not above 0 is :math:`10^{-8}`. It needs no domains.

    With ``variance="history"``, the paper's, m and v are those of the batches' gradients over time:

    .. math::
        m = \frac{1}{s_1}\operatorname{EMA}(g), \quad
        v = \frac{1}{1-\rho}\Bigl(\frac{1}{s_1}\operatorname{EMA}(g^2) - m^2\Bigr), \quad
        v_m = \rho v, \quad \rho = \frac{(1-b)(2-s_1)}{(1+b)\,s_1}, \quad s_1 = 1 - b^t

    ``variance="batch"`` is not in the paper: m is the batch's gradient, v the unbiased variance of
    its samples' gradients, and :math:`v_m = v/N`. Nothing is averaged over time.

    Args:
        base: the optimizer, whose learning rate is the authors' ``convergence_rate``, 0.015:
            ``torch.optim.SGD(model.parameters(), lr=0.015)``. Others step along the same vector.
        variance: ``"history"`` or ``"batch"``.
        decay: b, in [0, 1).
        dropped: p, the share of the entries that stay where they are in a step, in [0, 1).
        weight_decay: w; :math:`w\theta` is added to each gradient, before it enters m.
        generator: where :math:`\xi` and :math:`\beta` come from; on the device of the parameters,
            or it costs a copy. Its state is kept in ``state_dict`` and restored by loading.
            Default: torch's own.
        num_domains, model: as in `ERM`.

    Defaults are the authors'. In a parameter's first step v is :math:`10^{-8}`; the authors divide
    0 by 0 there, and rounding decides. They keep a copy of the weights, and undo what others change
    (``load_state_dict``, clipped weights); this steps from the weights. With ``"batch"``, a weight
    that only a term reaches has plain steps. ``.grad`` is the gradient again after the step. Not
    for ``fully_shard``.

    ``statistics`` holds ``loss``, ``domain_loss`` and ``domain_count``. The averages are in
    ``state_dict``, two of the parameter's size.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Cho, Kim, Kim: One-Step Generalization Ratio Guided Optimization for Domain Generalization,
        ICML 2025.
    """

    prefix = "genie"

    decay: float = hyper(0.95, check_part)
    dropped: float = hyper(0.4, check_part)
    weight_decay: float = hyper(0.0, check_weight)

    def objective(self, batch: StepBatch) -> Tensor:
        if self.variance == "batch":
            batch.moments(differentiable=False, loss_only=True, ever=False)
        return batch.loss

    def estimate(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Estimate | None:
        if self.weight_decay:
            decay = -self.weight_decay if group.get("maximize") else self.weight_decay
            gradient = gradient + decay * p
        if self.variance == "batch":
            return self.of_batch(p, gradient)
        return self.over_time(p, gradient)

    def direction(self, found: Estimate, normal: Tensor, uniform: Tensor) -> Tensor:
        mean = found.mean
        # Squares of finite gradients may overflow: nothing is then sure
        variance = found.variance.nan_to_num(nan=torch.inf, posinf=torch.inf)
        variance = variance.where(variance > 0, TINY)
        sure = (1 / variance).clamp(max=10.0).tanh()
        spread = found.share * variance
        fit = (1 / (1 + spread / (mean.square() + TINY))).where(spread < torch.inf, 0.0)
        size = (sure * mean.abs() * fit).sum() / sure.sum().clamp(min=torch.finfo(sure.dtype).tiny)
        noise = normal * size * (1 - sure)
        kept = (uniform > self.dropped).to(mean.dtype) / (1 - self.dropped)
        return (mean * fit * sure + noise) * kept
