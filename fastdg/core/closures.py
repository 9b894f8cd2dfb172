"""Closures of `step`: run once, twice, or once for each domain; and batches of one domain."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import assert_later
from ..domains import as_ids, partition, readable
from ..dtypes import to_statistics_dtype
from ..gradients.graph import Graph
from ..gradients.release import release
from ..gradients.tape import check_losses
from ..statistics.moments import pad_rows
from . import errors
from .backward import accumulate, check_reached, hooks_at_the_end, put
from .base_optimizer import check_result
from .nesting import terms_of
from .rerun import RngAndBuffers

Gradients = dict[Tensor, Tensor | None]  # None: the parameter is not used


def asks_for_domain(closure: Callable[..., Any]) -> bool:
    """Return whether a closure has a required parameter: the domain to run."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return any(
        p.kind in kinds and p.default is inspect.Parameter.empty
        for p in inspect.signature(closure).parameters.values()
    )


def losses_of(result: Any, domain: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Complete the result of ``closure(domain)`` to losses, domain ids and further inputs.

    The result may have all three, the first two, or the losses alone.
    """
    if isinstance(result, Tensor):
        return result, torch.full(result.shape, domain), {}
    losses, domains, inputs = check_result(result)
    samples = losses.numel() if isinstance(losses, Tensor) else None
    return losses, as_ids(domains, samples), inputs


def check_same(domains: Tensor, domain: Tensor | int, problem: str, advice: str) -> None:
    """Raise ValueError with ``problem`` and ``advice`` unless all ``domains`` are ``domain``.

    On another device than the CPU it is asserted there, without a wait.
    """
    same = (domains == domain).all()
    if not readable(same):
        assert_later(same, f"{problem}. {advice}")
    elif not same:
        got = sorted(set(domains.tolist()))
        raise ValueError(f"{problem}, got domains {got[:8]}. {advice}")


class Forward:
    """The user's closure, for an algorithm to run.

    Args:
        opt: the wrapper.
        closure: returns arguments of `backward`, or calls it. With a parameter, the domain, it
            returns the losses of this domain, or ``(losses, domains)``.

    Attributes:
        by_domain: whether the closure has this parameter.
    """

    def __init__(self, opt: Any, closure: Callable[..., Any]) -> None:
        self.opt, self.closure = opt, closure
        self.by_domain = asks_for_domain(closure)

    def backward(self) -> Tensor:
        """Run a closure without a parameter, and `backward` unless the closure has called it.

        Returns:
            The mean loss, or the closure's result.
        """
        opt = self.opt
        if self.by_domain:
            raise TypeError(
                f"closure: {type(opt).__name__} calls it without an argument, got one with a "
                "required parameter. Return (losses, domains) of a batch with all domains."
            )
        before, opt._ready = opt._ready, False
        result = self.closure()
        if not opt._ready and result is not None:
            losses, domains, inputs = check_result(result, opt.takes)
            result = opt.backward(losses, domains, **inputs)
        opt._ready |= before
        return result

    # -- a step on each domain --

    def steps(self, order: Sequence[int]) -> Tensor:
        """Run `backward` and a step on one domain after the other, without the last step; return
        the mean loss."""
        opt = self.opt
        seen: list[dict[str, Tensor]] = []
        for d in order:
            if seen:
                opt._advance()
            opt.zero_grad()
            losses, ids, inputs = losses_of(self.closure(d), d)
            opt.backward(losses, ids, **inputs)
            seen.append(opt._statistics)
        opt._statistics = {**opt._statistics, **_together(seen)}
        return opt._statistics["loss"]

    # -- one domain after the other --

    def of_each(self, order: Iterable[int]) -> Forward:
        """Return a closure without a parameter, which runs this one on the next domain."""
        domains = iter(order)

        def closure() -> Tensor:
            d = next(domains)
            losses, ids, inputs = losses_of(self.closure(d), d)
            check_same(ids, d, f"closure: expected losses of domain {d}", "Draw its batch.")
            loss: Tensor = self.opt.backward(losses, ids, **inputs)
            return loss

        return Forward(self.opt, closure)

    # -- two passes over all domains --

    def two_passes(
        self, domain_penalty: Callable[[Tensor, Gradients], Tensor]
    ) -> dict[str, Tensor]:
        """Add the gradients of the domains' mean loss, and of penalties in a second pass.

        Args:
            domain_penalty: called with the losses of one domain in the second pass and the mean
                gradient; adds the gradient of the domain's penalty to ``.grad``, and returns the
                penalty, detached.

        Returns:
            The statistics, with the sum of the penalties.

        The second pass starts with the random numbers and module buffers of the first. Only one
        domain's graph is alive at a time. Hooks on parameters are called once, with the final
        gradient.
        """
        opt, name = self.opt, type(self.opt).__name__
        errors.refuse_ranks(
            f"{name}.step(closure)", "Call opt.backward(losses, domains) and opt.step()"
        )
        errors.refuse_groups(opt.param_groups, name)
        if terms := terms_of(opt):
            raise ValueError(
                f"closure: {name} runs a closure of one domain twice, which "
                f"{type(terms[0]).__name__} does not support. Call opt.backward(losses, domains) "
                "on a mixed batch."
            )
        if opt.num_domains is None:
            raise ValueError(
                "num_domains: opt.step(closure) needs it to run the closure for each domain, got "
                f"None. Pass num_domains= to {name}."
            )
        opt.zero_grad()
        try:
            with hooks_at_the_end(self._trained()):
                statistics = self._passes(opt.num_domains, domain_penalty)
        except BaseException:
            opt.zero_grad()
            raise
        check_reached(opt.param_groups, name)
        opt._mark_grad_owned()
        return statistics

    def _passes(
        self, domains: int, domain_penalty: Callable[[Tensor, Gradients], Tensor]
    ) -> dict[str, Tensor]:
        opt, trained = self.opt, self._trained()
        start = RngAndBuffers(opt.param_groups[0]["params"][0].device)
        sums, counts = [], []
        with start.recording():
            for d in range(domains):
                losses = self._ask(d)
                sums.append(to_statistics_dtype(losses.detach()).sum())
                counts.append(len(losses))
                losses.backward(torch.full_like(losses, 1 / (len(losses) * domains)))
                del losses
        means = {p: p.grad for p in trained}
        put(dict.fromkeys(trained))
        start.restore()
        penalty = sums[0].new_zeros(())
        for d in range(domains):
            losses = self._ask(d)
            if opt.check and opt.steps == 0:
                _compare(losses, sums[d], counts[d], d)
            penalty = penalty + domain_penalty(losses, means)
            assert losses.grad_fn is not None
            release(Graph(losses.grad_fn).nodes)  # parts of it may have had no backward
            del losses
        for p, mean in means.items():
            if mean is not None:
                accumulate(p, mean)
        total, count = torch.stack(sums), torch.tensor(counts)
        count = count.to(total.device, non_blocking=True)
        return {
            "loss": total.sum() / sum(counts),
            "domain_loss": total / count.to(total.dtype),
            "domain_count": count,
            "penalty": penalty,
        }

    def _trained(self) -> list[Tensor]:
        return [p for group in self.opt.param_groups for p in group["params"] if p.requires_grad]

    def _ask(self, d: int) -> Tensor:
        held = {p: p.grad for p in self._trained()}
        put(dict.fromkeys(held))  # closures usually clear gradients
        losses, domains, _ = losses_of(self.closure(d), d)
        put(held)
        check_losses(losses)
        partition(domains, losses, self.opt.num_domains)
        problem = f"closure: it must return the losses of domain {d}"
        check_same(domains, d, problem, "Use its argument, the domain, to draw the batch.")
        return losses


def _compare(losses: Tensor, total: Tensor, count: int, d: int) -> None:
    again = to_statistics_dtype(losses.detach()).sum()
    if len(losses) != count or not torch.allclose(again, total, rtol=1e-4, equal_nan=True):
        raise RuntimeError(
            f"closure: the second call for domain {d} returned other losses (mean "
            f"{float(again) / len(losses):.6g}, {len(losses)} samples) than the first call "
            f"({float(total) / count:.6g}, {count} samples). Draw the batch before opt.step, "
            "and draw random numbers from torch's default generators."
        )


def _together(seen: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge the statistics of several inner steps into one step's."""
    domains = max(len(s["domain_count"]) for s in seen)
    counts = torch.stack([pad_rows(s["domain_count"], domains) for s in seen])
    losses = torch.stack([pad_rows(s["domain_loss"], domains) for s in seen])
    count = counts.sum(0)
    total = (losses.where(counts > 0, 0) * counts).sum(0)
    return {
        "loss": torch.stack([s["loss"] for s in seen]).mean(),
        "domain_loss": total / count.to(total.dtype),
        "domain_count": count,
    }
