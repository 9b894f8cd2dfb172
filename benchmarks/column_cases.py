"""`agreement`, `gram` and PCGrad on gradients that are given, against a copy of the same bytes."""

from __future__ import annotations

import surgery_cases as surgery
import torch
from contenders import FLOOR, PLAIN, Contender, Run, ours
from given import ColumnCase, Given, Named, case, moving, named, result, total
from torch import Tensor, nn

from fastdg import ops
from fastdg.algorithms.pcgrad import projected

# Inner products of 25 million elements by one product in fp32 are off by as much.
ONE_PRODUCT = 1e-2

# ---- agreement ----


def agreement(on: Given) -> Run:
    weights = torch.full((on.domains,), 1 / on.domains)
    return lambda: ops.agreement(on.lists, weights)[0]


def agreement_truth(on: Given) -> Named:
    columns = ([[row] for row in stack.double()] for stack in on.stacks)
    return named(surgery.agreement_each(column)[0] for column in columns)


def agreement_case(domains: int) -> ColumnCase:
    return case(
        "agreement",
        domains,
        {
            PLAIN: Contender(total, result=None),
            FLOOR: moving(lambda D: D + 1),
            **ours(agreement, result=result),
            "signs stacked, tensor by tensor": Contender(
                lambda on: lambda: surgery.agreement_each(on.lists), result=result
            ),
            "signs stacked, flat vectors": Contender(
                lambda on: lambda: surgery.agreement_flat(on.lists), result=result
            ),
        },
        agreement_truth,
        1.2,
    )


# ---- gram ----


def gram(on: Given) -> Run:
    return lambda: ops.gram(on.lists)


def torchjd_gram(on: Given, summed: bool) -> Run:
    """Summed up over the parameters, or of the whole Jacobian, as its `jac_to_grad` does either."""
    from torchjd._linalg import compute_gramian

    if summed:
        return lambda: sum(compute_gramian(stack) for stack in on.stacks)
    return lambda: compute_gramian(torch.concat([s.reshape(len(s), -1) for s in on.stacks], dim=1))


def concatenated_gram(on: Given) -> Run:
    """The vectors lie in memory that is there already."""
    rows = torch.empty(on.domains, sum(g.numel() for g in on.lists[0]))

    def run() -> Tensor:
        for row, domain in zip(rows, on.lists, strict=True):
            torch.cat([g.flatten() for g in domain], out=row)
        return rows @ rows.t()

    return run


def gram_truth(on: Given) -> Named:
    rows = (stack.flatten(1).double() for stack in on.stacks)
    return {"gram": torch.stack([r @ r.t() for r in rows]).sum(0)}


def gram_case(domains: int, reach: float) -> ColumnCase:
    def only(on: Given, out: Tensor) -> Named:
        return {"gram": out}

    return case(
        "gram",
        domains,
        {
            PLAIN: Contender(total, result=None),
            FLOOR: moving(lambda D: D),
            **ours(gram, result=only),
            "TorchJD": Contender(torchjd_gram, (False, True), only, needs="torchjd"),
            "one product of flat vectors": Contender(concatenated_gram, result=only),
        },
        gram_truth,
        reach,
        tolerance=ONE_PRODUCT,
    )


# ---- PCGrad ----


def projection(on: Given) -> Run:
    order = torch.arange(on.domains).repeat(on.domains, 1)

    def run() -> list[Tensor]:
        weights = projected(ops.gram(on.lists), order).mean(0)
        return ops.combine(on.lists, weights)

    return run


def torchjd_projection(on: Given, summed: bool) -> Run:
    from torchjd import aggregation, autojac

    combine = aggregation.PCGrad()
    parameters = [nn.Parameter(torch.empty(stack.shape[1:])) for stack in on.stacks]
    for p, stack in zip(parameters, on.stacks, strict=True):
        p.jac = stack

    def run() -> list[Tensor]:
        for p in parameters:
            p.grad = None
        autojac.jac_to_grad(
            parameters, combine, retain_jac=True, optimize_gramian_computation=summed
        )
        return [p.grad for p in parameters]

    return run


def projection_truth(on: Given) -> Named:
    weights = surgery.projection_weights(gram_truth(on)["gram"])
    return named(torch.tensordot(weights, stack.double(), 1) for stack in on.stacks)


def projection_case(domains: int) -> ColumnCase:
    contenders = {
        PLAIN: Contender(total, result=None),
        FLOOR: moving(lambda D: 2 * D + 1),
        **ours(projection, result=result),
        "TorchJD": Contender(
            torchjd_projection,
            (False, True),
            lambda on, out: named(g / on.domains for g in out),  # it adds them up
            needs="torchjd",
        ),
        "by Gram matrix, tensor by tensor": Contender(
            lambda on: lambda: surgery.projection_gram(on.lists), result=result
        ),
    }
    left_out = {}
    pairs = "pair by pair, flat vectors"
    if domains > 6:
        left_out[pairs] = "a run takes many seconds"
    else:
        contenders[pairs] = Contender(
            lambda on: lambda: surgery.projection_flat(on.lists), result=result
        )
    return case(
        "PCGrad of given gradients",
        domains,
        contenders,
        projection_truth,
        1.25,
        left_out=left_out,
        tolerance=ONE_PRODUCT,
    )


COLUMNS = (
    *(agreement_case(domains) for domains in (3, 6, 16)),
    *(gram_case(domains, reach) for domains, reach in ((3, 1.2), (6, 1.2), (16, 1.8))),
    *(projection_case(domains) for domains in (3, 6, 16)),
)
