"""Common base of the wrappers that add something to every sample's loss."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .batch import PenaltyOutput
from .optimizer import DomainOptimizer


class Term(DomainOptimizer):
    r"""Base of wrappers that add a term :math:`r_i` to each sample's loss:
    ``objective = mean of the losses + mean of the terms``.

    Alone it makes one plain backward of that. Any algorithm, and any other term, may go around it
    (``fastdg.Fishr(fastdg.MIRO(optimizer, model))``). Still there is one backward: the outermost
    wrapper asks every term in the chain for its :math:`r_i`. Algorithms that combine the domains'
    gradients see losses with their terms; those that penalise something of the losses see the
    losses alone, and the terms' mean joins the objective.

    A term implements `_term`. What that takes by keyword the user passes to `backward` of the
    outermost wrapper, by that name; an argument without a default is needed.
    """

    role = "term"
    looks_at_samples = False

    @abstractmethod
    def _term(self, losses: Tensor, *args: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """What is added to each of ``losses`` ``[N]``, times the weight and with its graph, and
        statistics that are means over the samples, detached."""

    def modules(self) -> Sequence[nn.Module]:
        """What owns the term's own parameters, if it has any."""
        return ()

    def inputs(self) -> dict[str, bool]:
        """Name of each further input of `backward` that this term takes -> whether it needs it."""
        kinds = inspect.Parameter.KEYWORD_ONLY
        parameters = inspect.signature(self._term).parameters.values()
        return {p.name: p.default is p.empty for p in parameters if p.kind is kinds}

    def added(self, losses: Tensor, inputs: Mapping[str, Any]) -> PenaltyOutput:
        """What this term adds to ``losses``; every check on that."""
        takes, name = self.inputs(), type(self).__name__
        missing = [key for key, needed in takes.items() if needed and inputs.get(key) is None]
        if missing:
            more = ", ".join(f"{key}={key}" for key in missing)
            raise TypeError(
                f"{name} needs {' and '.join(missing)}: opt.backward(losses, domains, {more})"
            )
        own = {key: value for key, value in inputs.items() if key in takes}
        values, statistics = self._term(losses, **own)
        if values.shape != losses.shape:
            raise ValueError(
                f"losses: there are {len(losses)}, but the forward that they come from had "
                f"{len(values)} samples for {name}; pass one loss for each sample of the forward"
            )
        return PenaltyOutput(values, statistics)
