"""Fishr: match the variances of per-sample gradients across domains."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..averaging.by_domain import WAY, DomainAverages
from ..core.annealed import Annealed
from ..core.hyper import check_count, check_decay, check_reduction, check_weight, hyper, option
from ..core.step_batch import StepBatch, StepRecord
from ..selection import Selection, listed
from ..statistics.moments import variance_gap


class Fishr(Annealed):
    r"""Invariant gradient variances: ``objective = mean loss + w * penalty``.

    .. math::
        g_i &= \nabla_{\text{params}}\,\ell_i, \qquad
        v_d = \tfrac1{n_d}\sum_{i\in d}(g_i-\bar g_d)^2 \\
        u_d &= v_d + \tfrac{\gamma}{1-\gamma} m_d, \qquad
        m_d \leftarrow \gamma m_d + (1-\gamma) v_d \\
        \text{penalty} &= \tfrac1D\sum_d \tfrac1P\sum_k (u_{dk}-\bar u_k)^2

    The defaults are DomainBed's. ``reduction="sum", ema=None, pre_anneal_weight=1.0,
    reset_base=False`` are the settings of the paper's ColoredMNIST script, which averages its two
    environments' mean losses equally, whatever their sizes. Here, as in DomainBed, each sample
    counts the same in the loss, so the two agree on environments of one size. The penalty counts
    each domain the same in all three.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        params: ``"head"`` (the last layer before the losses, as in the paper; a criterion with
            parameters is no layer), ``"all"``, a list of names or parameters, or a predicate
            ``(name, parameter)``.
        penalty_weight: w from step ``anneal_steps`` on.
        anneal_steps: steps before that, with ``pre_anneal_weight``.
        ema: decay :math:`\gamma` of the variances' history m in [0, 1), or None for no history.
            The history moves in `step` and is kept in ``state_dict``.
        reduction: ``"mean"`` over parameters and domains, or ``"sum"`` over both.
        pre_anneal_weight: w before ``anneal_steps``. With 0 the statistics and the history are
            computed all the same, at the price of a plain step.
        reset_base: clear the wrapped optimizer's state (moments, steps) when the anneal ends.
        num_domains: D; default: as many as have been seen. A domain without samples in a batch
            takes no part in its penalty, and its history rests. One sample alone has variance 0,
            one domain alone has penalty 0.
        model: gives parameters their names in messages and in ``params``.
        check: has no effect any more.

    The settings from ``penalty_weight`` to ``reset_base`` live in ``param_groups[0]`` (as
    ``fishr_penalty_weight`` and so on), so checkpoints and schedulers treat them like lr.

    ``statistics`` holds ``loss``, ``penalty``, ``objective`` (0-dim), ``domain_loss`` (``[D]``, NaN
    for an empty domain) and ``domain_count`` (``[D]``). NaN losses give a NaN penalty and NaN
    gradients, as without the wrapper; the history is safe if `step` is skipped.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Rame, Dancette, Cord: Fishr: Invariant Gradient Variances for Out-of-Distribution
        Generalization, ICML 2022.

    Example:
        >>> opt = fastdg.Fishr(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "fishr"
    compares = True

    params: Selection = option("head", convert=listed)
    penalty_weight: float = hyper(1000.0, check_weight)
    anneal_steps: int = hyper(1500, check_count)
    ema: float | None = hyper(0.95, check_decay)
    reduction: Literal["mean", "sum"] = hyper("mean", check_reduction)
    pre_anneal_weight: float = hyper(0.0, check_weight)

    variances = DomainAverages(
        "ema",
        "history",
        needed=lambda opt, group: group.get("fishr_ema", opt._given["ema"]) is not None,
        way=f"{WAY}; or set fishr_ema to None in its param_groups",
    )

    def objective(self, batch: StepBatch) -> Tensor:
        weight = self.weight
        moments = batch.moments(
            differentiable=weight > 0, loss_only=weight == 0, ever=self.penalty_weight > 0
        )
        history, decay = [], 0.0
        if (ema := self.ema) is not None:
            history, decay = self.variances.of(moments.variance), ema / (1 - ema)
        variances = [*moments.variance.values()]
        penalty = variance_gap(variances, history, batch.present, decay)
        if self.reduction == "mean":
            numel = sum([v.numel() for v in variances]) // variances[0].shape[0]
            penalty = penalty / (numel * moments.number_present)
        return batch.penalised(batch.loss, weight, penalty)

    def after_step(self, record: StepRecord) -> None:
        if (ema := self.ema) is not None:
            self.variances.move(record.variance, 1 - ema, record.present)
