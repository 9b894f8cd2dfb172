"""Errors for training loops that the wrappers do not support."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, distributed
from torch.optim import Optimizer

from ..selection import LEAVE_OUT, NAMES


def explain(error: BaseException, way_out: str | None) -> None:
    """Complete the message of an error from the statistics with the wrapper's own advice.

    Args:
        error: changed in place.
        way_out: advice in place of params=, for a wrapper without this argument.
    """
    if not error.args or not isinstance(error.args[0], str):
        return
    text = error.args[0]
    if way_out is not None:
        text = text.replace(LEAVE_OUT, way_out)
    if "param_groups[" in text and "named_parameters()" not in text:
        text = f"{text.rstrip('.')}. {NAMES}."
    error.args = (text, *error.args[1:])


def refuse_ranks(name: str, advice: str) -> None:
    """Raise RuntimeError if several processes train together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    ranks = distributed.get_world_size()
    if ranks > 1:
        raise RuntimeError(
            f"{name}: it does not support several ranks, but torch.distributed is initialised with "
            f"{ranks}. {advice}."
        )


def refuse_groups(groups: Sequence[dict[str, Any]], name: str, penalises: bool = True) -> None:
    """Raise ValueError if the wrapped optimizer would maximise a penalty."""
    if penalises and any(group.get("maximize") for group in groups):
        raise ValueError(
            f"base: its param_groups have maximize=True, so {name} would maximise the penalty "
            "too. Use maximize=False and negate the losses."
        )


def is_probe(base: Optimizer) -> bool:
    """Return whether a step without a backward only creates the state of a fresh optimizer.

    Checkpoint libraries make such a step with every lr 0 and gradients of zeros.
    """
    parameters: list[Tensor] = [p for group in base.param_groups for p in group["params"]]
    return (
        not base.state
        and all(float(group.get("lr", 1)) == 0 for group in base.param_groups)
        and not any(bool(p.grad.any()) for p in parameters if p.grad is not None)
    )


def refuse_again(losses: Tensor, staged: Iterable[Any], name: str) -> None:
    """Raise RuntimeError if the same losses are staged; autograd finds other reuse of a graph."""
    if any(batch.losses is losses for batch in staged):
        raise RuntimeError(
            f"losses: {name}.backward was already called on them with final=False. Pass the losses "
            "of the next micro-batch."
        )


def used_twice(name: str) -> RuntimeError:
    """Return the error for a second backward on the same losses."""
    return RuntimeError(
        f"losses: {name}.backward was already called on them. Run the model again, or add the "
        "losses first and call backward once."
    )


def no_backward(name: str, staged: bool, closure: bool = False) -> RuntimeError:
    """Return the error for a step without a backward, or after staged micro-batches only."""
    if staged:
        return RuntimeError(
            f"{name}.step() needs a final backward before it: since the last step every backward "
            "was called with final=False. Omit final=False in the last call."
        )
    if closure:
        return RuntimeError(
            f"{name}.step(closure) needs a backward: the closure returned None and did not call "
            "opt.backward. Return (losses, domains) from it, or call opt.backward(losses, domains) "
            "in it and return the loss."
        )
    return RuntimeError(
        f"{name}.step() needs a backward before it. Call opt.backward(losses, domains) in place of "
        "loss.backward(), with losses from reduction='none'; with a GradScaler, "
        "opt.backward(losses, domains, scaler=scaler) in place of scaler.scale(loss).backward(). "
        "Call opt.zero_grad() before opt.backward or after opt.step, not between them."
    )


def stepped_inside(name: str, inner: str) -> RuntimeError:
    """Return the error for a step of the optimizer inside with the gradient of its wrapper."""
    return RuntimeError(
        f"{inner}.step() was called while .grad holds the gradient of {name}. Call opt.step(), or "
        f"scaler.step(opt), with opt the outermost wrapper; to step {inner} alone, call "
        "opt.zero_grad() and loss.backward() first."
    )
