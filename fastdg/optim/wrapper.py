"""What every wrapper is to PyTorch: a real ``torch.optim.Optimizer`` around another one."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..domains import Partition, partition
from ..statistics.api import Resolved, Tape, check_losses, select
from ..statistics.tape import Recorder, Selection, paused

Closure = Callable[[], tuple[Tensor, Tensor]]


@dataclass
class Batch:
    """One staged micro-batch: its losses, its domains, and what the tape knows of its forward."""

    losses: Tensor
    partition: Partition
    resolved: Resolved


class DomainOptimizer(Optimizer):
    """Base of all wrappers; an algorithm implements `_gradient`, and `_commit` if it keeps state.

    ``param_groups``, ``state`` and ``defaults`` are those of the wrapped optimizer, not copies:
    schedulers, checkpoints and ``add_param_group`` work on either.

    Args:
        base: the optimizer to wrap (also kept as ``opt.base``).
        params: which parameters' per-sample gradients the algorithm looks at: ``"head"`` (the last
            module with
            tracked parameters that ran), ``"all"``, a list of names or parameters, or a predicate.
        num_domains: number of training domains D; default: as many as have been seen.
        model: skip discovery and watch this model's layers.
        check: on the first backward compare captured with autograd's gradients (two further
            backward passes).
    """

    base: Optimizer
    _tape: Tape
    _staged: list[Batch]
    _statistics: dict[str, Tensor]
    prefix: str  # of the wrapper's own keys in ``state`` and ``param_groups``
    tensors: tuple[str, ...] = ()  # names of per-parameter tensors the algorithm keeps
    _own = ("_tape", "_staged", "_ready", "_model", "step", "_opt_called", "_statistics")

    def __init__(
        self,
        base: Optimizer,
        *,
        params: Selection = "head",
        num_domains: int | None = None,
        model: nn.Module | None = None,
        check: bool = True,
    ) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(
                f"base: expected a torch.optim.Optimizer, got {type(base).__name__}; wrap one: "
                f"fastdg.{type(self).__name__}(torch.optim.Adam(model.parameters()))"
            )
        if num_domains is not None and (not isinstance(num_domains, int) or num_domains < 1):
            raise ValueError(f"num_domains: expected an integer >= 1, got {num_domains!r}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if isinstance(params, str):
            select(params, {})
        self.base = base
        self.params = params if isinstance(params, str) or callable(params) else list(params)
        self.num_domains = num_domains
        self.check = check
        self._kept: dict[str, dict[Tensor, Tensor]] = {name: {} for name in self.tensors}
        Optimizer.__setstate__(self, {})  # every hook table torch knows, and nothing else
        self._start(model)

    # ---- the wrapped optimizer's own, by reference
    # -------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    # ---- training
    # ----------------------------------------------------------------------------------

    def backward(self, losses: Tensor, domains: Tensor, final: bool = True) -> Tensor:
        """In place of ``losses.mean().backward()``: adds the algorithm's gradient to ``.grad``.

        Args:
            losses: one loss a sample ``[N]``, from ``reduction="none"``.
            domains: domain of each sample ``[N]``, integer, on the device of ``losses`` or the CPU.
            final: False stages this micro-batch (or one domain's own forward) and leaves ``.grad``
                alone; the
                next final call merges everything staged, weighted by the number of samples. The
                graphs of staged micro-batches stay alive until then.

        Returns:
            The mean loss of everything merged (of this micro-batch if not final), 0-dim, detached.

        Raises:
            TypeError, ValueError: ``losses`` or ``domains`` are not as described; batch norm in
                training mode among the tracked layers.
            RuntimeError: no tracked layer was seen; backward was already called on this forward;
                the captured gradients are not autograd's.
        """
        check_losses(losses)
        parts = partition(domains, losses, self.num_domains)
        resolved = self._tape.resolve(losses)
        calls = resolved.found.calls
        used = [call for call in calls if call.swept]
        if used or any(losses is batch.losses for batch in self._staged):
            raise RuntimeError(
                f"{type(self).__name__}.backward was already called on this forward; run the "
                f"model again, or "
                "add the losses up first and call backward once"
            )
        for call in calls:
            call.swept = True
        self._tape.recorder.settle()
        self._staged.append(Batch(losses, parts, resolved))
        if not final:
            return losses.detach().mean()
        staged, self._staged = self._staged, []
        with paused():
            loss = self._gradient(staged)
        self._ready = True
        return loss

    @abstractmethod
    def _gradient(self, staged: Sequence[Batch]) -> Tensor:
        """Add the final gradient to ``.grad``, fill ``self._statistics``, return the mean loss,
        detached."""

    def _prepare(self) -> None:
        """Called right before the wrapped optimizer steps."""

    def _commit(self) -> None:
        """Called after the wrapped optimizer has stepped: the only place where own state moves."""

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One step of the wrapped optimizer on the gradient that `backward` left in ``.grad``.

        Args:
            closure: optional; returns ``(losses, domains)``, which are passed to `backward` first.
                It is called once, with gradients enabled.

        Returns:
            The mean loss if a closure was given, else None.

        Raises:
            RuntimeError: `backward` was not called since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                losses, domains = closure()
                loss = self.backward(losses, domains)
        elif not self._ready:
            # Checkpoint libraries call step() on a fresh optimizer with every lr at 0 to make its
            # state.
            if any(float(group.get("lr", 1.0)) != 0.0 for group in self.param_groups):
                name = type(self).__name__
                missing = "a final backward" if self._staged else "a backward"
                raise RuntimeError(
                    f"{name}.step() needs {missing} before it: call opt.backward(losses, "
                    f"domains) in place of "
                    "loss.backward(), with losses from reduction='none'"
                )
            self.base.step()
            return None
        self._prepare()
        self.base.step()
        self._commit()
        self._ready = False
        self._share()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and whatever ``backward(..., final=False)`` has staged."""
        self._staged.clear()
        self.base.zero_grad(set_to_none)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What the last final `backward` saw: detached tensors, on the device; reading them is up
        to you."""
        return self._statistics

    @property
    def tape(self) -> Tape:
        """For `fastdg.check` and the other functions on tapes: the forwards this wrapper
        watches."""
        return self._tape

    # ---- groups, state, copies
    # -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; its layers are found in the next forward."""
        self.base.add_param_group(param_group)
        self._start(self._model() if self._model is not None else None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this wrapper, or by the bare wrapped optimizer (own state then
        starts anew).

        Raises:
            ValueError: the state was saved with another number of domains, or lacks tensors it
                should have.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        keys = {f"{self.prefix}_{name}": name for name in self.tensors}
        kept: dict[str, dict[Tensor, Tensor]] = {name: {} for name in self.tensors}
        plain: dict[Any, Any] = {}
        for i, entry in state_dict["state"].items():
            plain[i] = {k: v for k, v in entry.items() if k not in keys}
            for key, name in keys.items():
                if key in entry:
                    p = parameters[ids.index(i)]
                    kept[name][p] = entry[key].detach().to(p.device, copy=True)
        self._admit(kept, state_dict["param_groups"])
        # torch would cast our fp32 tensors to the parameters' dtype, so they do not go through it
        self.base.load_state_dict({**state_dict, "state": {i: e for i, e in plain.items() if e}})
        self._kept = kept
        self._staged.clear()
        self._ready = False
        self._fill()
        self._share()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _admit(
        self, kept: dict[str, dict[Tensor, Tensor]], groups: Sequence[dict[str, Any]]
    ) -> None:
        """Refuse a state that does not fit, before anything is changed."""

    def _fill(self) -> None:
        """Give the first group the wrapper's counters where they are missing."""

    def _share(self) -> None:
        """Own tensors show in ``state``, after the wrapped optimizer has made its own there."""
        for name, tensors in self._kept.items():
            for p, tensor in tensors.items():
                if p.grad is not None or p in self.state:
                    self.state[p][f"{self.prefix}_{name}"] = tensor

    def _start(self, model: nn.Module | None) -> None:
        names: dict[Tensor, str] = {}
        for g, group in enumerate(self.param_groups):
            given = group.get("param_names") or [
                f"param_groups[{g}][{i}]" for i in range(len(group["params"]))
            ]
            names.update(zip(group["params"], given, strict=True))
        if model is not None:
            names.update({p: n for n, p in model.named_parameters() if p in names})
        self._model = weakref.ref(model) if model is not None else None
        if getattr(self, "_tape", None) is not None:
            self._tape.recorder.close()
        self._tape = Tape(Recorder(names, model), self.params, self.check)
        self._staged = []
        self._ready = False
        self._statistics = {}
        self._fill()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self._own and "hook" not in k}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.base = state["base"]  # __setstate__ of torch reads defaults, which are the base's
        Optimizer.__setstate__(self, state)
        self._tape = None  # type: ignore[assignment]
        self._start(None)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self.settings().items())
        inner = repr(self.base).replace("\n", "\n  ")
        return f"{type(self).__name__}({shown}\n  {inner}\n)"

    def settings(self) -> dict[str, Any]:
        """The wrapper's own settings, for ``repr`` and logs."""
        return {"params": self.params, "num_domains": self.num_domains}
