"""What training loops do around a wrapper: micro-batches, clipping, recomputed activations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bases import BASES, WRAPS, Network, batch, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CUTS = {
    "cuts": [[0, 1, 2, 3], [4], [5, 6, 7, 8]],
    "domains": [[0, 3, 6], [1, 4, 7], [2, 5, 8]],  # a forward for each
}


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (9,), generator=generator), torch.arange(9) % 3


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", WRAPS)
def test_micro_batches_are_the_full_batch(name: str, cut: str) -> None:
    models = [network(torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [WRAPS[name](BASES["momentum"](model.parameters())) for model in models]
    for seed in range(3):
        x, y, domain = drawn(seed)
        for model, opt, rows in zip(models, opts, ([[*range(9)]], CUTS[cut]), strict=True):
            opt.zero_grad()
            for i, part in enumerate(rows):
                losses = cross_entropy(model(x[part]), y[part], reduction="none")
                more = {"labels": y[part]} if name == "RISE" else {}
                loss = opt.backward(losses, domain[part], final=i == len(rows) - 1, **more)
            opt.step()
        torch.testing.assert_close(loss, opts[0].statistics["loss"])
        bound = 1e-6 if name == "RISE" else 1e-9  # its tables are in float32
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(p, q, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", WRAPS)
def test_the_step_is_that_of_the_optimizer_inside_on_clipped_gradients(name: str) -> None:
    model = network()
    opt = WRAPS[name](BASES["adam"](model.parameters()))
    before = copy.deepcopy(model)
    opt.backward(*batch(model))
    total = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert total > 1e-3
    for p, q in zip(before.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    norm = torch.stack([p.grad.norm() for p in before.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-3))
    opt.step()
    BASES["adam"](before.parameters()).step()
    for p, q in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


class Recomputing(Network):
    def forward(self, x: Tensor) -> Tensor:
        hidden: Any = checkpoint(lambda x: self[1](self[0](x)), x, use_reentrant=False)
        return self[2](hidden)


@pytest.mark.parametrize("name", WRAPS)
def test_activations_that_are_computed_again(name: str) -> None:
    models = [Network(), Recomputing()]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        opt = WRAPS[name](BASES["momentum"](model.parameters()))
        for seed in range(3):
            opt.zero_grad()
            opt.backward(*batch(model, seed))
            opt.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)
