"""IGA: the same gradient in every domain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.backward import accumulate, check_reached, hooks_at_the_end, put
from ..core.closures import asks_for_domain, check_same, losses_of
from ..core.errors import refuse_groups, refuse_ranks
from ..core.hyper import check_weight, hyper
from ..core.nesting import terms_of
from ..core.optimizer import Closure, DomainOptimizer
from ..core.rerun import Start
from ..core.step_batch import StepBatch
from ..domains import partition
from ..dtypes import to_statistics_dtype
from ..gradients.graph import Graph
from ..gradients.release import release
from ..gradients.tape import check_losses
from ..statistics.moments import variance_gap


class IGA(DomainOptimizer):
    r"""Inter-domain gradient alignment: ``objective = mean of the domains' losses + w * penalty``.

    .. math::
        G_d = \nabla\,\tfrac1{n_d}\sum_{i\in d}\ell_i, \qquad
        \text{penalty} = \sum_d \lVert G_d - \bar G\rVert^2

    over all of the optimizer's parameters; a domain that does not use one has gradient 0 there.
    The defaults are DomainBed's. There are two ways to make a step.

    ``opt.backward(losses, domains)`` on a mixed batch: all G from one differentiable backward,
    and one backward through that. Batch norm in training and fused attention are refused.

    ``opt.step(closure)``, for large networks and for batch norm: ``closure(d)`` runs the model on
    domain d and returns its losses, or ``(losses, domains)``. It is called twice for each of the
    ``num_domains``: first for the mean gradient, then for

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
        model: its parameters' names are those of messages.
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

    def _evaluate(self, closure: Closure) -> Tensor:
        if not asks_for_domain(closure):
            return super()._evaluate(closure)
        name = type(self).__name__
        refuse_ranks(f"{name}.step(closure)", "call opt.backward(losses, domains) and opt.step()")
        refuse_groups(self.param_groups, name)
        if terms := terms_of(self):
            raise ValueError(
                f"closure: IGA runs a closure that asks for a domain twice, which "
                f"{type(terms[0]).__name__} cannot follow; call opt.backward(losses, domains) on a "
                "mixed batch"
            )
        if self.num_domains is None:
            raise ValueError(
                "num_domains: opt.step(closure) asks for the losses of each domain in turn; pass "
                f"num_domains= to {name}"
            )
        self.zero_grad()
        try:
            with hooks_at_the_end(self._trained()):
                loss = self._two_passes(closure, self.num_domains)
        except BaseException:
            self.zero_grad()
            raise
        check_reached(self.param_groups, name)
        self._mark_grad_owned()
        return loss

    def _trained(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _two_passes(self, closure: Closure, domains: int) -> Tensor:
        trained, weight = self._trained(), self.penalty_weight
        start = Start(self.param_groups[0]["params"][0].device)
        sums, counts = [], []
        with start.watched():
            for d in range(domains):
                losses = self._ask(closure, d)
                sums.append(to_statistics_dtype(losses.detach()).sum())
                counts.append(len(losses))
                losses.backward(torch.full_like(losses, 1 / (len(losses) * domains)))
                del losses
        means = [p.grad for p in trained]
        put(dict.fromkeys(trained))
        start.again()
        squares = sums[0].new_zeros(())
        for d in range(domains):
            losses = self._ask(closure, d)
            if self.check and self.steps == 0:
                self._compare(losses, sums[d], counts[d], d)
            squares = squares + self._align(losses, trained, means, weight)
            del losses
        for p, mean in zip(trained, means, strict=True):
            if mean is not None:
                accumulate(p, mean)
        total, count = torch.stack(sums), torch.tensor(counts)
        count = count.to(total.device, non_blocking=True)
        domain_loss = total / count.to(total.dtype)
        self._statistics = {
            "loss": total.sum() / sum(counts),
            "domain_loss": domain_loss,
            "domain_count": count,
            "penalty": squares,
            "objective": domain_loss.mean() + weight * squares,
        }
        return self._statistics["loss"]

    def _ask(self, closure: Closure, d: int) -> Tensor:
        held = {p: p.grad for p in self._trained()}
        put(dict.fromkeys(held))  # closures clear gradients, by custom
        losses, domains, _ = losses_of(closure(d), d)
        put(held)
        check_losses(losses)
        partition(domains, losses, self.num_domains)
        check_same(domains, d, f"closure: it was asked for the losses of domain {d}")
        return losses

    def _align(
        self,
        losses: Tensor,
        trained: Sequence[Tensor],
        means: Sequence[Tensor | None],
        weight: float,
    ) -> Tensor:
        """Add ``2w H (G - mean G)`` of one domain to ``.grad``; returns ``|G - mean G|^2``."""
        grads = list(
            torch.autograd.grad(
                losses,
                trained,
                torch.full_like(losses, 1 / len(losses)),
                create_graph=weight > 0,
                allow_unused=True,
            )
        )
        square, grad, gap = to_statistics_dtype(losses.detach()).new_zeros(()), None, None
        for mean in reversed(means):
            grad = grads.pop()
            if mean is not None:  # a domain uses it
                gap = -mean if grad is None else grad - mean
                square = square + to_statistics_dtype(gap).square().sum()
        del grad, gap  # the graph has what it needs
        if square.requires_grad:
            (weight * square).backward()
        assert losses.grad_fn is not None
        release(Graph(losses.grad_fn).nodes)  # neither backward may have passed all of it
        return square.detach()

    def _compare(self, losses: Tensor, total: Tensor, count: int, d: int) -> None:
        again = to_statistics_dtype(losses.detach()).sum()
        if len(losses) != count or not torch.allclose(again, total, rtol=1e-4, equal_nan=True):
            raise RuntimeError(
                f"closure: called a second time for domain {d} it returned other losses (mean "
                f"{float(again) / len(losses):.6g}, {len(losses)} samples) than the first time "
                f"({float(total) / count:.6g}, {count} samples). Draw the batch before opt.step, "
                "and take random numbers from torch's default generators"
            )
