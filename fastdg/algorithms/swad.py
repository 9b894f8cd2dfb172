"""SWAD: average the weights of every step in a valley of the validation loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import get_swa_multi_avg_fn

from .._torch import not_compiled
from ..averaging.averaged import Averaged
from ..averaging.averages import FRESH, Segments, finite
from ..averaging.valley import RULES, check_rule
from ..core import amp, errors
from ..core.base_optimizer import check_result
from ..core.base_state import is_new
from ..core.checkpoint import Kept, begin
from ..core.configured import Configured
from ..core.hyper import check_steps, check_weight, hyper
from ..core.nesting import chain, innermost
from ..core.optimizer import Closure, DomainOptimizer
from ..dtypes import to_statistics_dtype
from ..gradients.tape import Tape

_average = get_swa_multi_avg_fn()


class SWAD(Averaged):
    r"""Stochastic weight averaging, densely: the mean of the weights of every step within a valley
    of the validation loss.

    .. math::
        \bar\theta = \frac1{t_e-t_s+1}\sum_{t=t_s}^{t_e}\theta_t

    Training goes on as without it. `step` adds the new weights to the mean of a segment, and
    `evaluate`, called with the validation loss at each evaluation, ends the segment. With the
    losses :math:`E_k`, the valley begins with the segment that ends at evaluation k if
    :math:`E_k` is the least of the ``n_converge`` losses from there on. It ends before the first
    ``n_tolerance`` evaluations in a row that are all above

    .. math:: (1 + r) \cdot \operatorname{mean}(E_k, \dots, E_{k + \text{n\_converge} - 1})

    and ``finished`` then tells that further training changes nothing. It may also be stopped
    before: the average is of all there is from the valley's beginning on; without a valley it is
    that of the last segment (of all steps, with a warning, if `evaluate` was never called).

    It goes around any wrapper, or a plain optimizer, as the outermost:
    ``fastdg.SWAD(fastdg.Fishr(optimizer), model)``. `backward`, its arguments and ``statistics``
    are those of the wrapper inside, or around a plain optimizer those of `ERM`. There
    ``loss.backward()`` may be called as ever, too.

    The averages are not the model's weights until they are put there: inside ``with
    opt.applied():`` to look at them, by ``opt.apply()`` for good; ``opt.averaged()`` is a copy of
    the model with them. Buffers are the model's own, as they are then: batch norm in training has
    to see the training data again: ``opt.apply()`` and ``torch.optim.swa_utils.update_bn(loader,
    model)``, or that of a copy that is kept.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a wrapper.
        model: those of its parameters that the optimizer has are averaged.
        n_converge: evaluations among which the first has to be the best for a valley to begin.
        n_tolerance: evaluations above the threshold, in a row, that end it.
        tolerance_ratio: r.
        rule: ``"paper"``, as above, or ``"code"``, as the authors' code has it.
        num_domains: D, for the wrapper inside or, around a plain optimizer, for ``statistics``;
            default: as many as the batch has.

    With ``rule="code"`` the valley is found and ends as above (so does its threshold, for losses
    above 0), but the average is another one:

    * Segments weigh the same, however many steps they have.
    * With ``n_tolerance > n_converge`` it begins up to ``n_tolerance - n_converge`` segments
      earlier, after the last of them whose loss is above the threshold; the first of those left is
      left out.
    * In a valley found at one of the first evaluations the segments that come first join again at
      each evaluation until ``n_tolerance`` have been made; later, the valley's first joins twice if
      older ones joined. With ``n_tolerance <= n_converge`` it does not join at all.
    * If training stops in a valley, segments at its end whose losses are all above the threshold do
      not join, nor do steps since the last evaluation.

    A loss that is NaN is refused; their code begins a valley there that never ends.

    The settings live in ``param_groups[0]`` (as ``swad_n_converge`` and so on), losses and counts
    beside them, the averages in ``state_dict``: a run that is resumed goes on bit for bit. At most
    ``max(n_converge, n_tolerance - 1) + 2`` averages are held (one more with ``rule="code"``), in
    float32 for weights in half precision. One fused update a step.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Cha, Chun, Lee, Cho, Park, Lee, Park: SWAD: Domain Generalization by Seeking Flat Minima,
        NeurIPS 2021. The threshold is the paper's with :math:`1 + r` for its r; the defaults are
        those of its code, khanrc/swad, whose ``LossValley`` is ``rule="code"``.

    Example:
        >>> opt = fastdg.SWAD(torch.optim.Adam(model.parameters()), model)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()  # each step
        >>> opt.evaluate(validation_loss)                               # each evaluation
        >>> opt.apply()                                                 # at the end
    """

    prefix = "swad"
    tensors = ("segment", "pending", "average")
    penalises = False

    n_converge: int = hyper(3, check_steps)
    n_tolerance: int = hyper(6, check_steps)
    tolerance_ratio: float = hyper(0.3, check_weight)
    rule: Literal["paper", "code"] = hyper("paper", check_rule)

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        *,
        n_converge: int = 3,
        n_tolerance: int = 6,
        tolerance_ratio: float = 0.3,
        rule: Literal["paper", "code"] = "paper",
        num_domains: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self._network = model
        Configured.__init__(
            self,
            base,
            num_domains=num_domains,
            model=model,
            n_converge=n_converge,
            n_tolerance=n_tolerance,
            tolerance_ratio=tolerance_ratio,
            rule=rule,
        )
        self._share_extent()

    def _counters(self) -> dict[str, Any]:
        return {**super()._counters(), **FRESH}

    def _share_extent(self) -> None:
        """Tell the wrappers inside the number of domains that was given here."""
        for link in chain(self.base):
            own = getattr(link, "num_domains", None)
            if self.num_domains is None or own == self.num_domains:
                continue
            if own is not None:
                raise ValueError(
                    f"num_domains: expected {own}, as the {type(link).__name__} inside has, got "
                    f"{self.num_domains}; give it to one of them"
                )
            link.num_domains = self.num_domains  # type: ignore[attr-defined]

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        """Whether a ``torch.amp.GradScaler`` shows itself to `step`: for the wrapper inside, or
        since `backward` was given it."""
        return isinstance(self.base, DomainOptimizer) or self._scaler is not None

    # -- training --

    def backward(
        self,
        losses: Tensor,
        domains: Tensor | int | None = None,
        final: bool = True,
        *,
        scaler: GradScaler | None = None,
        **inputs: Any,
    ) -> Tensor:
        """That of the wrapper inside, or of `ERM`; see there."""
        if not isinstance(self.base, DomainOptimizer):
            return super().backward(losses, domains, final, scaler=scaler, **inputs)
        loss = self.base.backward(losses, domains, final, scaler=scaler, **inputs)
        if final:
            self._mark_grad_owned()
        return loss

    def _evaluate(self, closure: Closure) -> Tensor:
        """Run a closure for a plain optimizer, and backward on the losses if it returned them."""
        result = closure()
        if not isinstance(result, tuple):
            return result
        losses, domains, inputs = check_result(result)
        return self.backward(losses, domains, **inputs)

    def _step(self, closure: Closure | None) -> Tensor | None:
        """A step of the optimizer inside; its new weights join the average."""
        if self._shown:
            raise RuntimeError("SWAD.step: the model has its averaged weights inside `applied`")
        probe = closure is None and errors.is_probe(self.base)
        if not isinstance(self.base, DomainOptimizer):
            if self._micro_batches:
                raise errors.no_backward(type(self).__name__, staged=True)
            amp.refuse_scaled(self)
            closure = None if closure is None else partial(self._evaluate, closure)
        moves = not probe or is_new(innermost(self.base))
        loss = self._step_base(closure) if moves else None
        self._release_grad()
        if probe:
            begin(self, [p for p in self._names if p.grad is not None])
        else:
            self._commit()
        return loss

    def _initial_state(self) -> Kept:
        zeros = {
            p: torch.zeros_like(to_statistics_dtype(p.detach())) for ps in self._alike() for p in ps
        }
        none = {p: zero.new_zeros((0, *zero.shape)) for p, zero in zeros.items()}
        return {
            "segment": zeros,
            "pending": none,
            "average": {p: z.clone() for p, z in zeros.items()},
        }

    @not_compiled
    def _commit(self) -> None:
        self._count()
        group = self.param_groups[0]
        group["swad_steps"] = self.steps + 1
        if not self.finished:
            count, kept = group["swad_segment_steps"], self._own_state["segment"]
            for alike in self._alike():
                kept.update(
                    {p: to_statistics_dtype(p.detach()).clone() for p in alike if p not in kept}
                )
                averages = [kept[p] for p in alike]
                now = [p.detach().to(a.dtype) for p, a in zip(alike, averages, strict=True)]
                _average(averages, now, count)  # of which the first is a copy
            group["swad_segment_steps"] = count + 1
        for name, tensors in self._own_state.items():
            for p, tensor in tensors.items():
                if p.grad is not None:  # the wrapped optimizer has made its own state by now
                    self.state[p][f"swad_{name}"] = tensor

    def _alike(self) -> list[list[Tensor]]:
        """The parameters that are averaged, by device and dtype."""
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in self._network.parameters():
            if p in self._names:
                groups.setdefault((p.device, p.dtype), []).append(p)
        return list(groups.values())

    # -- the valley --

    @torch.no_grad()
    def evaluate(self, validation_loss: float | Tensor) -> None:
        """End a segment with the validation loss of the model as it is; of several ranks, all of
        which call this, with the mean of theirs.

        Raises:
            TypeError, ValueError: the loss is not a finite number, or that of another rank is not.
            RuntimeError: no step was made since the last evaluation.
        """
        try:
            own = finite("validation_loss", validation_loss)
        except (TypeError, ValueError):
            self._ranks.mean(math.nan)  # the others wait for this rank
            raise
        loss = finite("validation_loss: on some rank", self._ranks.mean(own))
        if self.finished:
            return
        group = self.param_groups[0]
        if not group["swad_segment_steps"]:
            raise RuntimeError("SWAD.evaluate: no step was made since the last evaluation")
        segments = self._segments()
        segments.push(loss)
        segments.settle(self.n_converge, self.n_tolerance, self.tolerance_ratio)

    def _segments(self) -> Segments:
        return Segments(self.param_groups[0], self._own_state, RULES[self.rule])

    @property
    def started(self) -> bool:
        """Whether a valley was found."""
        return self.param_groups[0].get("swad_threshold") is not None

    @property
    def finished(self) -> bool:
        """Whether the valley has ended, so that the average will not change any more."""
        return bool(self.param_groups[0].get("swad_finished"))

    # -- what is the wrapper's inside --

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Those of the wrapper inside; around a plain optimizer, of the last final `backward`."""
        inner = isinstance(self.base, DomainOptimizer)
        return self.base.statistics if inner else self._statistics  # type: ignore[attr-defined]

    @property
    def tape(self) -> Tape:
        """That of the wrapper inside, or its own."""
        return self.base.tape if isinstance(self.base, DomainOptimizer) else super().tape

    def _validate_state(self, kept: Kept, groups: Sequence[dict[str, Any]]) -> None:
        losses, held = groups[0].get("swad_losses", []), kept["pending"].values()
        steps = groups[0].get("swad_segment_steps", 0) or groups[0].get("swad_average_steps", 0)
        lacking = (steps and not kept["segment"]) or (losses and not held)
        if lacking or any(len(pending) != len(losses) for pending in held):
            raise ValueError(
                "state_dict: it comes from a SWAD run but lacks averages that it should have. "
                "torch.distributed.checkpoint fills in only what the optimizer already has: save "
                "with torch.save, or turn its files into one, which is loaded as a whole, with "
                "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
            )
        for name, tensors in kept.items():
            for p, tensor in tensors.items():
                shape = tensor.shape[1:] if name == "pending" else tensor.shape
                if shape != p.shape:
                    raise ValueError(
                        f"state_dict: its average of {self._names[p]} has shape {tuple(shape)}, "
                        f"but the parameter has shape {tuple(p.shape)}"
                    )
