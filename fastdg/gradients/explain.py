"""Table of how each parameter's gradients are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .engine import Forward
from .plan import Boundary


class Row(NamedTuple):
    """How one parameter's gradients are computed.

    Attributes:
        parameter: its name.
        way: ``"rule"`` or ``"autograd"``.
        operations: operations where the parameter meets the samples.
        cost: cost of a statistic, as text.
    """

    parameter: str
    way: str
    operations: str
    cost: str


@dataclass(frozen=True)
class Explanation:
    """Table of how gradients of the losses' parameters are computed; ``print`` shows it.

    Attributes:
        rows: one for each parameter.
        probed: whether every step searches for the samples of rows, with two further backwards
            without weight gradients.
    """

    rows: list[Row]
    probed: bool

    def __str__(self) -> str:
        table = [Row("parameter", "computed by", "operations", "cost"), *self.rows]
        widths = [max(len(row[k]) for row in table) for k in range(3)]
        lines = [
            "  ".join([*(row[k].ljust(widths[k]) for k in range(3)), row.cost]).rstrip()
            for row in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        if self.probed:
            lines.append(
                "Values choose or mix rows above these parameters (indexing, masks, an operation "
                "without a rule), so each step searches for the samples of rows with 2 further "
                "backwards without weight gradients."
            )
        return "\n".join(lines)

    __repr__ = __str__


def explanation(forward: Forward) -> Explanation:
    """Describe the plan of a forward."""
    plan = forward.plan
    rows: dict[int, Row] = {}
    for i, uses in plan.rule_uses.items():
        names = ", ".join(dict.fromkeys(_short(use.operation) for use in uses))
        rows[i] = Row(
            forward.names[i], "rule", names, "one product of tensors saved by the forward"
        )
    for i in plan.by_autograd:
        names = ", ".join(dict.fromkeys(_short(b.operation) for b in plan.boundaries))
        rows[i] = Row(forward.names[i], "autograd", names, _price(plan.boundaries))
    return Explanation([rows[i] for i in sorted(rows)], plan.dynamic)


def _price(boundaries: list[Boundary]) -> str:
    if all(None not in b.rules and not b.mixed for b in boundaries):
        return "as by a rule, then one backward to the parameter, for all domains"
    if any(boundary.mixed for boundary in boundaries):
        return "one backward of all operations below per domain (for variances: per sample)"
    return "one call of the operation per domain (for variances: per sample)"


def _short(operation: str) -> str:
    name, _, _ = operation.partition("Backward")
    return name
