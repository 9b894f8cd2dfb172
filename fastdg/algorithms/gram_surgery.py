"""Gradient surgery by any function of the Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.checkpoint import Kept
from ..core.combine.combiner import Combined, DomainGradients, GradientCombiner
from ..core.combine.gathering import DomainBatch, scatter_rows
from ..core.hyper import check_absent, check_switch, hyper, needed
from ..domains import readable, tracing
from ..warn import warn_user
from ..weightings import (
    Weighting,
    keeps_state,
    load_weighting,
    not_saved,
    of_gram,
    smallest_trace,
    weighting_state,
)

STATE = "gramsurgery_weighting"


class GramSurgery(GradientCombiner):
    r"""Any rule that weighs the domains' gradients by their inner products.

    .. math:: \text{grad} = \sum_d w(K)_d\, g_d, \qquad K_{de} = \langle g_d, g_e \rangle

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        weighting: ``[D, D]`` Gram matrix over all parameters -> ``[D]`` weights. TorchJD's
            weightings of a Gram matrix are such functions, and its aggregators have one. Those that
            want the Jacobian or two batches (``ExcessMTL``, ``SDMGrad``, ``MoDo``) are refused. It
            is not called for one domain alone, whose gradient stays as it is.
        absent: how domains without samples in a batch look. ``"drop"``: the matrix has the rows of
            the others alone. ``"zeros"``: it is always ``[D, D]``, with rows of zeros, and the
            weights of these domains change nothing. ``"auto"``: zeros for a weighting that keeps
            state, so that no domain is taken for another one, else drop.
        normalize: divide the matrix by the power of two next to its trace, which changes no
            digit. For weightings that do not depend on the gradients' scale but compare it with a
            threshold.
        num_domains, model, check: as in `AgrSum`.

    Zeros are right for weightings that look at each domain or at pairs (PCGrad, GradVac, and PCD,
    whose step is 0 without its first domain). Those that look for a short combination (MGDA,
    CAGrad) give them all the weight, and means (UPGrad) count them: these want ``"drop"``.

    What a weighting keeps in buffers, attributes and the objects that it holds is in
    ``state_dict`` and resumes bit for bit. A function's own variables are not.

    ``PCGradWeighting``, ``MGDAWeighting`` and others work after ``pip install torchjd``,
    ``UPGradWeighting`` and ``DualProjWeighting`` after ``pip install 'fastdg[weightings]'``. These
    two and ``CAGradWeighting`` take a matrix whose trace is below ``norm_eps=1e-4`` for zeros, and
    leave conflicts of small gradients as they are; the first such step warns. ``normalize=True``
    avoids it.

    ``absent`` and ``normalize`` live in ``param_groups[0]`` as ``gramsurgery_absent`` and so on.
    ``statistics`` holds ``loss``, ``gram`` (``[D, D]``), ``cosine`` (``[D, D]``; NaN where there is
    no gradient), ``conflicts`` (pairs of domains with a negative product; 0-dim), ``weights``
    (``[D]``), ``domain_loss`` (``[D]``, NaN for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument, or what ``weighting`` returns, is not as described; a
            weighting that keeps state meets another number of domains.

    Reference:
        Quinton, Rey: Jacobian Descent for Multi-Objective Optimization, 2024.

    Example:
        >>> from torchjd.aggregation import UPGradWeighting  # pip install 'fastdg[weightings]'
        >>> opt = fastdg.GramSurgery(torch.optim.Adam(model.parameters()), UPGradWeighting())
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "gramsurgery"

    weighting: Weighting = needed(of_gram, kw_only=False)
    absent: Literal["auto", "zeros", "drop"] = hyper("auto", check_absent)
    normalize: bool = hyper(False, check_switch)

    def _start(self) -> None:
        self._extent: int | None = None  # domains that the weighting keeps state of
        self._readable = False  # which domains have samples, without a wait for the device
        self._warned = self._warned_lost = False

    # -- weights --

    def _batch(self, losses: Tensor, domains: Tensor, terms: Tensor | None) -> DomainBatch:
        self._readable = (self._readable or not self._micro_batches) and readable(domains)
        return super()._batch(losses, domains, terms)

    def combine(self, gradients: DomainGradients) -> Combined:
        return gradients.weighted_sum(self._weights(gradients, gradients.gram()))

    def _gradient(self, staged: Sequence[Any]) -> Tensor:
        if self._pending is None and self._scaler is not None and keeps_state(self.weighting):
            self._pending = weighting_state(self.weighting, self._home())
        return super()._gradient(staged)

    def _skip(self) -> None:
        if self._pending is not None:
            load_weighting(self.weighting, self._pending, self._home())

    def _weights(self, gradients: DomainGradients, gram: Tensor) -> Tensor:
        """The weights of the domains that ``gram`` has rows of."""
        ids, extent = gradients.ids, gradients.extent
        if len(gram) == 1:
            return gram.new_ones(1)
        if self.absent == "zeros" or (self.absent == "auto" and keeps_state(self.weighting)):
            if keeps_state(self.weighting):
                self._check_extent(extent)
            columns = scatter_rows(gram.t(), ids, extent, 0)
            weights = self._asked(scatter_rows(columns.t(), ids, extent, 0))
            weights = weights if len(ids) == extent else weights[ids]
            return weights.where(gradients.count > 0, 0)
        if self._readable or tracing() or bool((present := gradients.count > 0).all()):
            return self._asked(gram)
        rows = present.nonzero().squeeze(1)
        part = gram[rows][:, rows]
        weights = self._asked(part) if len(rows) > 1 else part.new_ones(len(rows))
        return weights.new_zeros(len(gram)).index_copy(0, rows.to(weights.device), weights)

    def _check_extent(self, extent: int) -> None:
        if self._extent not in (None, extent):
            raise ValueError(
                f"num_domains: the {type(self.weighting).__name__} keeps state of {self._extent} "
                f"domains, got a batch of {extent}. Pass num_domains=, the number of all training "
                "domains."
            )
        self._extent = extent

    def _asked(self, gram: Tensor) -> Tensor:
        finite = gram.isfinite().all()
        if self._scaler is not None:  # whose step is skipped then; solvers raise at what they see
            gram = gram.where(finite, torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        if self.normalize:
            trace = gram.diagonal().sum().double()
            exponent = torch.frexp(trace.where(finite, 1.0)).exponent
            gram = torch.ldexp(gram.double(), -exponent).to(gram.dtype)
        elif not self._warned and not tracing():
            self._check_trace(gram)
        weights = self.weighting(gram)
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"weighting: expected it to return floating-point weights, got {kind}")
        if weights.shape != gram.shape[:1]:
            raise ValueError(
                f"weighting: expected it to return weights of shape {tuple(gram.shape[:1])} for a "
                f"Gram matrix of shape {tuple(gram.shape)}, got {tuple(weights.shape)}"
            )
        return weights if self._scaler is None else weights.where(finite, torch.nan)

    def _check_trace(self, gram: Tensor) -> None:
        least = smallest_trace(self.weighting)
        if least and (trace := float(gram.diagonal().sum())) < least:
            self._warned = True
            warn_user(
                f"weighting: {type(self.weighting).__name__} takes gradients whose Gram matrix has "
                f"a trace below norm_eps={least:g} for zeros, got {trace:.3g}: conflicts of small "
                "gradients stay. Pass normalize=True."
            )

    # -- state --

    def _home(self) -> torch.device:
        return next(iter(self._names)).device

    def _remember(self) -> None:
        super()._remember()
        if keeps_state(self.weighting):
            lost = not_saved(self.weighting)
            if lost and not self._warned_lost:
                self._warned_lost = True
                warn_user(
                    f"state_dict: of the {type(self.weighting).__name__}, it cannot save "
                    f"{', '.join(lost)}. Keep numbers, tensors, or lists and dicts of them."
                )
            self.param_groups[0][STATE] = {
                "kind": type(self.weighting).__name__,
                "domains": self._extent,
                "values": weighting_state(self.weighting, self._home()),
            }

    def _validate_state(self, kept: Kept, groups: Sequence[dict[str, Any]]) -> None:
        super()._validate_state(kept, groups)
        state, name = groups[0].get(STATE), type(self.weighting).__name__
        if state is not None and state["kind"] != name:
            raise ValueError(
                f"state_dict: its weighting is a {state['kind']}, got a {name} here. Make "
                "GramSurgery with the weighting of the run that was saved."
            )
        if state is None and groups[0].get("gramsurgery_steps") and keeps_state(self.weighting):
            warn_user(
                f"state_dict: it has no state of the weighting, so that of this {name} stays as it "
                "is. Checkpoints of earlier versions had none."
            )

    def _finish_load(self) -> None:
        super()._finish_load()
        state = self.param_groups[0].get(STATE)
        if state is not None:
            self._extent = state["domains"]
            load_weighting(self.weighting, state["values"], self._home())
