"""The same steps by other means, on the networks of the GPU's rows."""

from __future__ import annotations

from collections.abc import Callable

import peers
import surgery_cases as surgery
import torch
from gpu_steps import Run, Training
from torch import Tensor

from fastdg.algorithms.pcgrad import projected


def by_domain(on: Training) -> list[list[Tensor]]:
    """A forward and a backward for each domain."""
    parameters = list(on.model.parameters())
    return [
        list(torch.autograd.grad(on.losses(rows).mean(), parameters, allow_unused=True))
        for rows in on.spans()
    ]


def a_backward_each(combine: Callable[..., list[Tensor]]) -> Callable[[Training], Run]:
    def make(on: Training) -> Run:
        base, parameters = on.optimizer(), list(on.model.parameters())

        def run() -> None:
            gradients = by_domain(on)
            for p, grad in zip(parameters, combine(gradients), strict=True):
                p.grad = grad
            base.step()

        return run

    return make


def projected_by_gram(gradients: list[list[Tensor]]) -> list[Tensor]:
    """PCGrad on weights, from a Gram matrix summed up over the parameters."""
    columns = list(zip(*gradients, strict=True))
    stacks = [torch.stack(column).flatten(1) for column in columns]
    gram = torch.stack([stack @ stack.t() for stack in stacks]).sum(0)
    D = len(gram)
    weights = projected(gram, torch.arange(D, device=gram.device).expand(D, D)).mean(0)
    return [(weights.to(s.dtype) @ s).view_as(c[0]) for s, c in zip(stacks, columns, strict=True)]


def torchjd_pcgrad(on: Training) -> Run:
    """One forward of the mixed batch, the domains' backwards, its aggregator."""
    from torchjd import aggregation, autojac

    base, combine = on.optimizer(), aggregation.PCGrad()
    parameters, spans = list(on.model.parameters()), on.spans()

    def run() -> None:
        base.zero_grad()
        losses = on.losses()
        each = [losses[rows].mean() / len(spans) for rows in spans]
        autojac.backward(each, inputs=parameters, parallel_chunk_size=1)
        autojac.jac_to_grad(parameters, combine, optimize_gramian_computation=True)
        base.step()

    return run


def opacus_ghost(on: Training) -> Run:
    """Norms of samples' gradients by ghost clipping, and the clipped gradient: two backwards."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = peers.out_of_place(on.model)
    on.model = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="mean", strict=False
    )
    base = on.optimizer()

    def run() -> None:
        base.zero_grad()
        losses = on.losses()
        on.model.enable_hooks()
        losses.mean().backward(retain_graph=True)
        scale = on.model.get_clipping_coef().to(losses.device)
        base.zero_grad()
        on.model.disable_hooks()
        (scale * losses).mean().backward()
        on.model.enable_hooks()
        base.step()

    return run


# Name -> (package, maker)
PEERS: dict[str, tuple[str | None, Callable[[Training], Run]]] = {
    "AgrSum, a backward a domain": (None, a_backward_each(surgery.agreement_each)),
    "PCGrad, a backward a domain": (None, a_backward_each(projected_by_gram)),
    "PCGrad, TorchJD": ("torchjd", torchjd_pcgrad),
    "norms of samples, Opacus ghost clipping": ("opacus", opacus_ghost),
}
