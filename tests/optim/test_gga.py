"""GGA against its search written out with a backward for each domain, in float64."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import seeded, through_a_file
from definitions import MAKES, Batch, alike, batches, close, losses_of, net
from surgeries import rows_of
from torch import Tensor, nn
from torch.optim import SGD, Adam

import fastdg


def similarity(model: nn.Module, batch: Batch) -> float:
    rows = [torch.cat([g.flatten() for g in row]) for row in rows_of(model, batch)]
    pairs = itertools.combinations(rows, 2)
    return min((float(torch.cosine_similarity(a, b, 0)) for a, b in pairs), default=1.0)


def search(
    model: nn.Module, batch: Batch, searched: list[Tensor], draw: Callable[[Tensor], Tensor]
) -> tuple[int, float]:
    """Leave the best weights in the model; return how many were accepted, and their cosine."""
    first = copy.deepcopy(model.state_dict())
    best, accepted = first, 0
    seen, least = similarity(model, batch), losses_of(model, *batch[:2]).mean().item()
    for _ in range(20):
        for p in searched:
            p.data += 0.02 * (2 * draw(p) - 1)
        now, loss = similarity(model, batch), losses_of(model, *batch[:2]).mean().item()
        if now > seen and loss - least < 0.05:
            best, seen, least = copy.deepcopy(model.state_dict()), now, loss
            accepted += 1
            model.load_state_dict(first)
    model.load_state_dict(best)
    return accepted, seen


def step_of(opt: Any, model: nn.Module, batch: Batch) -> Tensor:
    opt.zero_grad()
    loss: Tensor = opt.step(lambda: (losses_of(model, *batch[:2]), batch[2]))
    return loss


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("make", MAKES)
def test_definition(make: str, part: bool) -> None:
    """Over ragged domains, some of them absent; before, in and after the window."""
    model, data = net(), batches(5)
    twin = copy.deepcopy(model)
    opt = fastdg.GGA(
        MAKES[make](model),
        start=1,
        end=3,
        size=0.02,
        candidates=20,
        tolerance=0.05,
        featurizer=model.scale if part else None,
        generator=seeded(),
    )
    base, generator = MAKES[make](twin), seeded()
    searched = [*(twin.scale if part else twin).parameters()]
    total = 0
    for step, batch in enumerate(data):
        if 1 <= step <= 3:

            def draw(p: Tensor) -> Tensor:
                return torch.rand(p.shape, generator=generator, dtype=p.dtype)

            accepted, seen = search(twin, batch, searched, draw)
            total += accepted
        losses = losses_of(twin, *batch[:2])
        base.zero_grad()
        losses.mean().backward()
        base.step()
        loss = step_of(opt, model, batch)
        close(loss, losses.mean(), 1e-12)
        if 1 <= step <= 3:
            assert int(opt.statistics["accepted"]) == accepted
            assert abs(float(opt.statistics["similarity"]) - seen) < 1e-11
        alike(model, twin, 1e-11)
    assert total > 3


def test_what_the_authors_code_gave() -> None:
    """``ERM_GGA.update_simulated_annealing`` of aristotelisballas/GGA at 5450c2b, with 40 search
    steps and neighborhoodSize 0.03; it draws the same numbers."""
    featurizer = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    model = nn.Sequential(featurizer, nn.Linear(2, 2)).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            line = torch.linspace(-0.5 + 0.1 * k, 0.7, p.numel(), dtype=torch.float64)
            p.copy_(line.view_as(p))
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.25, -2.0], [0.5, 0.5]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0])
    opt = fastdg.GGA(
        Adam(model.parameters(), lr=0.01), start=0, candidates=40, size=0.03, featurizer=featurizer
    )
    torch.manual_seed(5)
    gave = (0.8152275298209374, 1), (0.8004588987836901, 3), (0.8135569001712663, 1)
    for step, (loss, accepted) in enumerate(gave):
        inputs = torch.cat([x * (1 + step) + d for d in range(3)])
        labels = torch.cat([(y + d) % 2 for d in range(3)])
        found = step_of(opt, model, (inputs, labels, torch.arange(3).repeat_interleave(4)))
        close(found, torch.tensor(loss, dtype=torch.float64), 1e-12)
        assert int(opt.statistics["accepted"]) == accepted
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    close(weights, torch.tensor(GAVE, dtype=torch.float64), 1e-9)


GAVE = [
    *(-0.3706590921145719, -0.08130050595133789, 0.2704829566437294, 0.6221850324105791),
    *(-0.3445345675905422, 0.7246289170276499, -0.329731989670817, 0.06334232151505449),
    *(0.39639865633748367, 0.6699910118182788, -0.17015675802899355, 0.6701567580289935),
]


def test_a_search_takes_a_backward_for_each_candidate_and_one() -> None:
    model, (batch,) = net(), batches(1)
    opt = fastdg.GGA(MAKES["adam"](model), start=0, candidates=7)
    calls = [0]

    def closure() -> tuple[Tensor, Tensor]:
        calls[0] += 1
        return losses_of(model, *batch[:2]), batch[2]

    opt.step(closure)
    assert calls == [8]
    assert fastdg.GGA(MAKES["adam"](net())).candidates == 250


def test_one_domain_accepts_nothing() -> None:
    model, (batch,) = net(), batches(1)
    twin = copy.deepcopy(model)
    opt = fastdg.GGA(MAKES["adam"](model), start=0, candidates=5, size=0.1)
    base = MAKES["adam"](twin)
    losses_of(twin, *batch[:2]).mean().backward()
    base.step()
    step_of(opt, model, (*batch[:2], batch[2] * 0))
    assert opt.statistics["accepted"] == 0
    alike(model, twin)


def test_goes_on_bit_for_bit() -> None:
    data = batches(6)

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(2)
        model = net()
        settings = {"start": 1, "end": 4, "size": 0.02, "candidates": 6}
        return model, fastdg.GGA(MAKES["adam"](model), generator=seeded(), **settings)

    model, opt = made()
    for batch in data[:3]:
        step_of(opt, model, batch)
    again, other = through_a_file(made, model, opt)
    for m, o in ((model, opt), (again, other)):
        for batch in data[3:]:
            step_of(o, m, batch)
    alike(model, again, 0)


def test_an_error_in_the_search_puts_the_weights_back() -> None:
    model, (batch,) = net(), batches(1)
    before = copy.deepcopy(model)
    opt = fastdg.GGA(MAKES["adam"](model), start=0, size=0.1)
    calls = [0]

    def closure() -> tuple[Tensor, Tensor]:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyError("data")
        return losses_of(model, *batch[:2]), batch[2]

    with pytest.raises(KeyError, match="data"):
        opt.step(closure)
    alike(model, before, 0)


def test_a_step_of_the_window_needs_a_closure() -> None:
    model, data = net(), batches(2)
    opt = fastdg.GGA(MAKES["adam"](model), start=1, candidates=2)
    for step, (x, y, domains) in enumerate(data):
        opt.zero_grad()
        opt.backward(losses_of(model, x, y), domains)
        if step == 0:
            opt.step()
        else:
            with pytest.raises(RuntimeError, match=r"^GGA\.step\(\): step 1 looks for weights"):
                opt.step()


def test_a_featurizer_that_is_not_trained() -> None:
    model, (batch,) = net(), batches(1)
    with pytest.raises(ValueError, match=r"^featurizer: .*got a Linear none of whose"):
        fastdg.GGA(MAKES["adam"](model), featurizer=nn.Linear(2, 2))
    opt = fastdg.GGA(MAKES["adam"](model), start=0, candidates=1, featurizer=model.scale)
    model.scale.requires_grad_(False)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^featurizer: .*let them require gradients"):
        step_of(opt, model, batch)
    alike(model, before, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_noise_that_rounding_swallows(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3).to(dtype)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(0.5)
    opt = fastdg.GGA(SGD(model.parameters(), 0.0), start=0, candidates=2)
    x, y, domains = torch.randn(6, 4), torch.arange(6) % 3, torch.arange(6) % 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            step_of(opt, lambda x: model(x.to(dtype)).float(), (x, y, domains))
    said = ["size: noise of 1e-05 changes 0 of 15 weights in torch.bfloat16"]
    found = [str(w.message).split(";")[0] for w in told]
    assert found == (said if dtype == torch.bfloat16 else [])


@pytest.mark.parametrize(
    ("argument", "value"),
    [("start", -1), ("end", 1.5), ("size", -1), ("candidates", -1), ("tolerance", -1)],
)
def test_arguments(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: .*got "):
        fastdg.GGA(SGD(nn.Linear(2, 2).parameters(), 0.1), **{argument: value})
