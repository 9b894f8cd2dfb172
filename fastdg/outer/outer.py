"""Base of the wrappers that may go around an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler

from ..core.nesting import chain
from ..core.optimizer import DomainOptimizer
from ..gradients.tape import Tape


class OuterOptimizer(DomainOptimizer):
    """Base of wrappers that take the gradient of the wrapper inside, if there is one.

    `backward`, ``statistics`` and `tape` belong to the wrapper inside; around a plain optimizer, to
    an `ERM`.
    """

    looks_at_samples = False

    @property
    def inner(self) -> DomainOptimizer | None:
        """The wrapper inside, which makes the gradient; None: this one makes it."""
        return self.base if isinstance(self.base, DomainOptimizer) else None

    def backward(
        self,
        losses: Tensor | Sequence[Tensor],
        domains: Tensor | int | None = None,
        final: bool = True,
        *,
        scaler: GradScaler | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Call `backward` of the wrapper inside, or of `ERM`; see there."""
        if self.inner is None:
            return super().backward(losses, domains, final, scaler=scaler, **inputs)
        loss = self.inner.backward(losses, domains, final, scaler=scaler, **inputs)
        if final:
            self._mark_grad_owned()
        return loss

    def _look(self, model: nn.Module | None) -> None:
        super()._look(model)
        self._share_extent()  # not before every argument was checked

    def _share_extent(self) -> None:
        """Give the wrappers inside the number of domains that this wrapper was given."""
        for link in chain(self.base):
            own = getattr(link, "num_domains", None)
            if self.num_domains is None or own == self.num_domains:
                continue
            if own is not None:
                raise ValueError(
                    f"num_domains: expected {own}, the number of the {type(link).__name__} inside, "
                    f"got {self.num_domains}. Pass it to one of them."
                )
            link.num_domains = self.num_domains  # type: ignore[attr-defined]

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        """Whether a ``torch.amp.GradScaler`` sets its attributes for `step`: for the wrapper
        inside, or after a `backward`, which is refused if it had no scaler. A plain optimizer
        inside steps as ever on the gradient of ``loss.backward()``."""
        return self.inner is not None or self._ready

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Statistics of the wrapper inside, or of the last final `backward`."""
        return self._statistics if self.inner is None else self.inner.statistics

    @property
    def tape(self) -> Tape:
        """The tape of the wrapper inside, or its own."""
        return self.base.tape if isinstance(self.base, DomainOptimizer) else super().tape
