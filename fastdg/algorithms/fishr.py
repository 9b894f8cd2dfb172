"""Fishr: match the variances of per-sample gradients across domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._torch import foreach_lerp_
from ..core import checkpoint
from ..core.annealed import Annealed
from ..core.hyper import check_count, check_decay, check_reduction, check_weight, hyper, option
from ..core.nesting import terms_of
from ..core.step_batch import StepBatch, StepRecord
from ..distributed.sharding import local
from ..dtypes import to_statistics_dtype
from ..selection import Selection, listed, select
from ..statistics.moments import rows, variance_gap
from ..warn import warn_user


class Fishr(Annealed):
    r"""Invariant gradient variances: ``objective = mean loss + w * penalty``.

    .. math::
        g_i &= \nabla_{\text{params}}\,\ell_i, \qquad
        v_d = \tfrac1{n_d}\sum_{i\in d}(g_i-\bar g_d)^2 \\
        u_d &= v_d + \tfrac{\gamma}{1-\gamma} m_d, \qquad
        m_d \leftarrow \gamma m_d + (1-\gamma) v_d \\
        \text{penalty} &= \tfrac1D\sum_d \tfrac1P\sum_k (u_{dk}-\bar u_k)^2

    The defaults are DomainBed's. ``reduction="sum", ema=None, pre_anneal_weight=1.0,
    reset_base=False`` are those of the paper's ColoredMNIST script, which averages its two
    environments' mean losses equally, whatever their sizes. Here, as in DomainBed, each sample
    counts the same in the loss, so the two agree on environments of one size. The penalty counts
    each domain the same in all three.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        params: ``"head"`` (those of the last layer before the losses, as in the paper; a criterion
            with parameters of its own is none), ``"all"``, a list of names or parameters,
            or a predicate ``(name, parameter)``.
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
        model: its parameters' names are those of messages, and of ``params``.
        check: has no effect any more.

    The settings from ``penalty_weight`` to ``reset_base`` live in ``param_groups[0]`` (as
    ``fishr_penalty_weight`` and so on): like lr they are saved, restored by loading, and scheduled.

    ``statistics`` holds ``loss``, ``penalty``, ``objective`` (0-dim), ``domain_loss`` (``[D]``, NaN
    for an empty domain) and ``domain_count`` (``[D]``). NaN losses give a NaN penalty and NaN
    gradients, as they do without the wrapper; the history is safe if `step` is skipped.

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
    tensors = ("ema",)
    compares = True

    params: Selection = option("head", convert=listed)
    penalty_weight: float = hyper(1000.0, check_weight)
    anneal_steps: int = hyper(1500, check_count)
    ema: float | None = hyper(0.95, check_decay)
    reduction: Literal["mean", "sum"] = hyper("mean", check_reduction)
    pre_anneal_weight: float = hyper(0.0, check_weight)

    def _start(self) -> None:
        self._resumed = False  # with a history that was loaded and has not moved yet

    def objective(self, batch: StepBatch) -> Tensor:
        weight = self.weight
        moments = batch.moments(
            differentiable=weight > 0, loss_only=weight == 0, ever=self.penalty_weight > 0
        )
        variances, decay = moments.variance, 0.0
        history: list[Tensor] = []
        if self.ema is not None:
            decay = self.ema / (1 - self.ema)
            history = [self._history(name, v) for name, v in variances.items()]
        penalty = variance_gap([*variances.values()], history, moments.present, decay)
        if self.reduction == "mean":
            numel = sum(v.shape[1:].numel() for v in variances.values())
            penalty = penalty / (numel * moments.present.sum().clamp(min=1))
        return batch.penalised(batch.loss, weight, penalty)

    def after_step(self, record: StepRecord) -> None:
        if self.ema is None:
            return
        kept, named = self._own_state["ema"], self._tape.names
        variance = {named[name]: v for name, v in record.variance.items()}
        if self._resumed and (new := [p for p in variance if p not in kept]):
            more = f" and of {len(new) - 1} more" if new[1:] else ""
            warn_user(
                f"the loaded state has no Fishr history of {self._names[new[0]]}{more}, which "
                f"starts from 0 now: was it saved with other params than {self.params!r}?",
            )
        self._resumed = False
        if self.steps == 1:  # which parameters it is about was guessed before the first forward
            for p in kept.keys() - variance.keys():
                del kept[p]
                self.state[p].pop("fishr_ema", None)
        moved: list[Tensor] = []
        weights: list[Tensor] = []
        rates: dict[tuple[torch.dtype, int], Tensor] = {}  # of each row, by dtype and dimensions
        for p, v in variance.items():
            D, kind = v.shape[0], (v.dtype, v.dim())
            own = kept.get(p)
            if own is None:
                own = kept[p] = torch.zeros_like(v)
            elif own.shape[0] < D:  # domains not seen before
                own = kept[p] = rows(own, D)
            moved.append(own if own.shape[0] == D else own[:D])
            if (rate := rates.get(kind)) is None:
                rate = (1 - self.ema) * record.present[:D].to(v.dtype)
                rate = rates[kind] = rate.view(-1, *[1] * (v.dim() - 1))
            weights.append(rate)
        if moved:
            foreach_lerp_(moved, [*variance.values()], weights)

    # -- the history --

    def _history(self, name: str, v: Tensor) -> Tensor:
        """That of a parameter, for the domains of ``v``, ``[D, *]``: those beyond take no part, and
        those not seen before have none."""
        ema, D = self._own_state["ema"].get(self._tape.names[name]), v.shape[0]
        if ema is None:
            return torch.zeros_like(v, requires_grad=False)
        return ema if ema.shape[0] == D else rows(ema[:D], D)

    def _known_domains(self) -> int:
        return max(map(len, self._own_state["ema"].values()), default=0)

    def _initial_state(self) -> checkpoint.Kept:
        if self.ema is None or self.num_domains is None:
            return {}
        terms = {p for term in terms_of(self) for m in term.modules() for p in m.parameters()}
        named = {name: p for p, name in self._names.items() if p not in terms}
        chosen = select(self.params, named)
        found = [p for name, p in named.items() if chosen(name, p)]
        if self.params == "head":  # as far as it can be told: the last weight, and its bias
            alone = len(found) < 2 or found[-1].dim() != 1 or found[-2].shape[:1] != found[-1].shape
            found = found[-1:] if alone else found[-2:]
        D = self.num_domains
        made = {p: to_statistics_dtype(local(p.detach())).new_zeros((D, *p.shape)) for p in found}
        return {"ema": made}

    def _finish_load(self) -> None:
        super()._finish_load()
        self._resumed = bool(self._own_state["ema"])

    def _validate_state(self, kept: checkpoint.Kept, groups: Sequence[dict[str, Any]]) -> None:
        if groups[0].get("fishr_ema", self._given["ema"]) is not None:
            way = (
                "give num_domains= (and params=, unless the head is the optimizer's last layer), "
                "or run one backward and step before loading; or set fishr_ema to None in its "
                "param_groups"
            )
            self._require_kept(kept, groups, "ema", "the history", way)
        self._check_domains(kept, "ema", "history")
        for p, ema in kept["ema"].items():
            if ema.shape[1:] != p.shape:
                raise ValueError(
                    f"state_dict: its history of {self._names[p]} has shape {tuple(ema.shape[1:])} "
                    f"a domain, but the parameter has shape {tuple(p.shape)}"
                )
