"""CausIRL against DomainBed's formula written out, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import seeded, through_a_file
from test_features import batch, coral_of, forward, mmd_of, network
from torch import Tensor, nn
from torch.optim import SGD, Adam

import fastdg

DISTANCES = {"coral": coral_of, "mmd": mmd_of}


def halves(domains: Tensor, extent: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Rows of the two parts: a domain's first k, and the others."""
    draw = torch.rand(extent, generator=generator, dtype=torch.float64)
    first: list[int] = []
    second: list[int] = []
    for d in range(extent):
        rows = (domains == d).nonzero().flatten().tolist()
        k = int(draw[d] * len(rows))
        first += rows[:k]
        second += rows[k:]
    return first, second


def one(opt: Any, model: nn.Sequential, step: int, micro: bool = False) -> None:
    opt.zero_grad()
    x, y, domains = batch(step)
    cuts = [part.tensor_split(3) if micro else [part] for part in (x, y, domains)]
    calls = list(zip(*cuts, strict=True))
    for k, call in enumerate(calls):
        f = forward(model, *call)
        opt.backward(f.losses, f.domains, final=k == len(calls) - 1, features=f.features)
    opt.step()


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_steps_are_those_of_the_formula(distance: str, micro: bool) -> None:
    """Ragged domains, and one that is absent."""
    model, other = network(), network()
    opt = fastdg.CausIRL(
        Adam(model.parameters(), 1e-2),
        distance=distance,
        penalty_weight=2.0,
        generator=seeded(),
        num_domains=4,
    )
    plain, generator = Adam(other.parameters(), 1e-2), seeded()
    for step in range(6):
        f = forward(other, *batch(step))
        first, second = halves(f.domains, 4, generator)
        few = min(len(first), len(second)) < 2
        penalty = DISTANCES[distance](f.features[first], f.features[second])
        objective = f.risks.mean() + (0.0 if few else 2.0) * penalty
        plain.zero_grad()
        objective.backward()
        plain.step()
        one(opt, model, step, micro)
        torch.testing.assert_close(
            opt.statistics["objective"], objective.detach(), rtol=1e-12, atol=0
        )
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


GIVEN = [[0.5, -1.0], [0.25, 0.75], [-0.5, 0.125], [1.0, 0.5], [-0.25, -0.75], [0.0, 0.375]]


@pytest.mark.parametrize(
    ("distance", "expected"), [("coral", 0.57176759507921), ("mmd", 2.8135797450348683)]
)
def test_what_domainbed_gave(distance: str, expected: float) -> None:
    """``AbstractCausIRL.mmd`` of facebookresearch/DomainBed at b93c22a on two sets of features."""
    features = torch.tensor(GIVEN, dtype=torch.float64)
    first = torch.tensor([1.0, 0, 1, 0, 0, 0], dtype=torch.float64)
    opt = fastdg.CausIRL(SGD([nn.Parameter(features)], lr=0.1), distance=distance)
    found = opt.penalty(features, torch.stack([first, 1 - first]))
    torch.testing.assert_close(float(found), expected, rtol=1e-14, atol=0)


class Watched(fastdg.CausIRL):
    """Remembers the sizes of its first parts."""

    def penalty(self, features: Tensor, membership: Tensor) -> Tensor:
        SIZES.append(int(membership[0].sum()))
        return super().penalty(features, membership)


SIZES: list[int] = []


def test_cuts_are_as_likely_before_each_sample() -> None:
    """The last sample is always in the second part, as in DomainBed."""
    z = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    opt = Watched(SGD([z], lr=0.0), generator=seeded())
    SIZES.clear()
    for _ in range(800):
        opt.zero_grad()
        opt.backward(z.square().sum(1), 0, features=z * 1.0)
    counts = torch.tensor(SIZES).bincount()
    assert len(counts) == 4 and counts.min() > 160 and counts.max() < 240


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_parts_of_less_than_two_samples_have_no_penalty(samples: int) -> None:
    z = torch.randn(samples, 2, dtype=torch.float64, requires_grad=True)
    for distance in DISTANCES:
        opt = fastdg.CausIRL(SGD([z], lr=0.1), distance=distance, generator=seeded())
        opt.zero_grad()
        opt.backward(z.square().sum(1), 0, features=z * 1.0)
        assert opt.statistics["penalty"] == 0
        torch.testing.assert_close(z.grad, 2 * z.detach() / samples)


def test_goes_on_bit_for_bit() -> None:
    def made() -> tuple[nn.Sequential, Any]:
        model = network()
        base = Adam(model.parameters(), 1e-2)
        return model, fastdg.CausIRL(base, generator=seeded(), num_domains=4)

    model, opt = made()
    for step in range(3):
        one(opt, model, step)
    again, other = through_a_file(made, model, opt)
    for step in range(3, 6):
        one(opt, model, step)
        one(other, again, step)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_arguments() -> None:
    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"^distance: expected 'coral' or 'mmd', got 'cmd'"):
        fastdg.CausIRL(base, distance="cmd")
    with pytest.raises(TypeError, match=r"^generator: expected a torch.Generator"):
        fastdg.CausIRL(base, generator=5)
