"""PGrad against the SVD of its points as flat vectors, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bases import seeded, through_a_file
from definitions import MAKES, alike, close, losses_of, net
from fishes import Round, rounds
from on_device import DEVICE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

import fastdg


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def direction(points: Sequence[Tensor], count: int) -> Tensor:
    """The sum of the principal directions, of all vectors of their size."""
    x = torch.stack([*points]).numpy()
    _, sizes, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    values, rows = sizes[:count] ** 2, rows[:count]
    way = x[0] - x[-1]
    signs = np.where(rows @ way > 0, 1.0, -1.0)
    coefficients = values / np.linalg.norm(values) * signs * np.linalg.norm(way)
    return torch.from_numpy(coefficients @ rows)


def drawn(domains: int, splits: int, generator: torch.Generator) -> list[int]:
    turns = [torch.randperm(domains, generator=generator).tolist() for _ in range(splits)]
    return [d for turn in turns for d in turn]


def pgrad(
    model: nn.Module,
    make: Callable[[nn.Module], Optimizer],
    data: Sequence[Round],
    splits: int = 3,
    count: int = 4,
    decay: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """The squared length of each meta step's gradient, as the definition has it."""
    generator, state, found = generator or seeded(), None, []
    for domains in data:
        inner, theta = copy.deepcopy(model), flat(model)
        opt = make(inner)
        if state is not None:
            opt.load_state_dict(state)
        points, seen = [theta], [0] * len(domains)
        for d in drawn(len(domains), splits, generator):
            x, y = (part.tensor_split(splits)[seen[d]] for part in domains[d])
            seen[d] += 1
            opt.zero_grad()
            F.cross_entropy(inner(x), y).backward()
            opt.step()
            points.append(flat(inner))
        state = copy.deepcopy(opt.state_dict())
        gradient = direction(points, count) + decay * theta
        nn.utils.vector_to_parameters(theta - 0.1 * gradient, model.parameters())
        found.append(gradient.square().sum())
    return found


def round_of(opt: Any, model: nn.Module, domains: Round, way: str) -> None:
    parts = [zip(*(x.tensor_split(opt.splits) for x in pair), strict=True) for pair in domains]
    if way == "closure":
        opt.step(lambda d: losses_of(model, *next(parts[d])))
        return
    for d in opt.order():
        x, y = next(parts[d])
        opt.zero_grad()
        if way == "micro-batches":
            opt.backward(losses_of(model, x[:1], y[:1]), d, final=False)
            x, y = x[1:], y[1:]
        if len(y):
            opt.backward(losses_of(model, x, y), d)
        opt.step()


def large(count: int, samples: int = 7) -> list[Round]:
    """Every domain with enough samples for all parts, ragged."""
    made = []
    for _ in range(count):
        sizes = [samples + d for d in range(3)]
        made.append([(torch.randn(n, 2, 6, 6).double(), torch.arange(n) % 3) for n in sizes])
    return made


@pytest.mark.parametrize("way", ["closure", "loop", "micro-batches"])
@pytest.mark.parametrize(("splits", "count"), [(3, 4), (1, 2), (2, 9)])
@pytest.mark.parametrize("make", MAKES)
def test_definition(make: str, splits: int, count: int, way: str) -> None:
    model, data = net(), large(4)
    twin = copy.deepcopy(model)
    opt = fastdg.PGrad(
        MAKES[make](model),
        num_domains=3,
        splits=splits,
        directions=count,
        weight_decay=0.02,
        generator=seeded(),
    )
    expected = pgrad(twin, MAKES[make], data, splits, count, 0.02)
    for domains, square in zip(data, expected, strict=True):
        round_of(opt, model, domains, way)
        close(opt.statistics["trajectory"], square)
        assert opt.position == 0
    alike(model, twin, 1e-11)


@pytest.mark.parametrize("way", ["closure", "loop"])
@pytest.mark.parametrize("turns", [(3, 1, 2), (1, 3, 2), (1, 1, 2)])
def test_other_splits_from_the_next_round_on(turns: tuple[int, ...], way: str) -> None:
    model, data = net(), large(3)
    twin = copy.deepcopy(model)
    opt = fastdg.PGrad(
        SGD(model.parameters(), 0.1), num_domains=3, splits=turns[0], generator=seeded()
    )
    generator = seeded()
    for splits, domains in zip(turns, data, strict=True):
        opt.splits = splits
        pgrad(twin, lambda m: SGD(m.parameters(), 0.1), [domains], splits, generator=generator)
        round_of(opt, model, domains, way)
        assert opt.position == 0 and opt.statistics["gram"].shape == (3 * splits, 3 * splits)
        alike(model, twin, 1e-11)


def test_other_splits_within_a_round_wait_for_the_next() -> None:
    models = []
    for change in (False, True):
        torch.manual_seed(3)
        model = net()
        opt = fastdg.PGrad(MAKES["adam"](model), num_domains=3, splits=2)
        for k, pair in enumerate(large(2)[0] * 2):
            if change and k == 3:
                opt.splits = 1
            opt.zero_grad()
            opt.backward(losses_of(model, *pair), k % 3)
            opt.step()
        assert opt.position == 0
        models.append(model)
    alike(models[1], models[0], 0)


@pytest.mark.parametrize("steps", [4, 6])
def test_a_state_with_other_splits_goes_on(steps: int) -> None:
    """In a round, and between two: with those that it has."""
    made, models = [], []
    for splits in (2, 3):
        torch.manual_seed(2)
        model = net()
        made.append(fastdg.PGrad(MAKES["adam"](model), num_domains=3, splits=splits))
        models.append(model)
    data = [pair for domains in large(5) for pair in domains]

    def go(of: int, first: int, last: int) -> None:
        for k in range(first, last):
            made[of].zero_grad()
            made[of].backward(losses_of(models[of], *data[k]), k % 3)
            made[of].step()

    go(0, 0, steps)
    models[1].load_state_dict(models[0].state_dict())
    made[1].load_state_dict(copy.deepcopy(made[0].state_dict()))
    assert made[1].splits == 2
    go(0, steps, 14)
    go(1, steps, 14)
    alike(models[0], models[1], 0)


def test_a_state_of_other_domains_is_refused() -> None:
    made = []
    for domains in (2, 3):
        model = net()
        opt = fastdg.PGrad(SGD(model.parameters(), 0.1), num_domains=domains)
        opt.backward(losses_of(model, *large(1)[0][0]), 0)
        opt.step()
        made.append(opt)
    with pytest.raises(ValueError, match=r"^state_dict: pgrad_changes must have 9 inner steps"):
        made[1].load_state_dict(made[0].state_dict())


def test_one_domain_has_as_many_points_as_parts() -> None:
    """With four points there are three directions, and the fourth is rounding."""
    model, data = net(), [[pairs[0]] for pairs in large(3)]
    twin = copy.deepcopy(model)
    opt = fastdg.PGrad(MAKES["adam"](model), num_domains=1, generator=seeded())
    pgrad(twin, MAKES["adam"], data)
    for domains in data:
        round_of(opt, model, domains, "loop")
    alike(model, twin, 1e-11)


def test_what_the_authors_code_gave() -> None:
    """``PGrad.update`` of QData/PGrad at c075c0a, its random orders written down."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            line = torch.linspace(-0.5 + 0.1 * k, 0.7, p.numel(), dtype=torch.float64)
            p.copy_(line.view_as(p))
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.25, -2.0], [0.5, 0.5]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0])
    opt = fastdg.PGrad(Adam(model.parameters(), lr=0.01), num_domains=3, weight_decay=0.05)
    orders = [[0, 2, 1], [2, 1, 0], [1, 0, 2]], [[2, 1, 0], [2, 1, 0], [1, 2, 0]]
    for step, turns in enumerate(orders):
        for part, turn in zip((slice(0, 1), slice(1, 2), slice(2, 4)), turns, strict=True):
            for d in turn:
                opt.zero_grad()
                opt.backward(losses_of(model, (x * (1 + step) + d)[part], ((y + d) % 2)[part]), d)
                opt.step()
    close(flat(model), torch.tensor(GAVE, dtype=torch.float64), 1e-9)


GAVE = [
    *(-0.5008355151279146, -0.10608589825848046, 0.2902703566704606, 0.6888484145325089),
    *(-0.4023459614603016, 0.6884466169226743, -0.30559265450032813, 0.04164110834539429),
    *(0.37159432116699476, 0.684377224987939, -0.18947075472075545, 0.6844832547207554),
]


def test_nothing_moved_is_no_direction() -> None:
    opt = fastdg.PGrad(SGD(nn.Linear(2, 2).parameters(), lr=0.1), num_domains=2)
    assert opt.principal(torch.zeros(6, 6)).eq(0).all()
    assert opt.principal(torch.full((6, 6), torch.inf)).isnan().all()


@pytest.mark.parametrize("steps", [4, 9, 13])
@pytest.mark.parametrize("way", ["file", "deepcopy"])
def test_goes_on_bit_for_bit(way: str, steps: int) -> None:
    """From the middle of a round, and between two."""
    data = [pair for domains in rounds(9) for pair in domains]

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(2)
        model = net(batch_norm=True)
        return model, fastdg.PGrad(MAKES["adam"](model), num_domains=3, model=model)

    def go(model: nn.Module, opt: Any, first: int, last: int) -> None:
        for k in range(first, last):
            opt.zero_grad()
            opt.backward(losses_of(model, *data[k]), k % 3)
            opt.step()

    model, opt = made()
    go(model, opt, 0, steps)
    if way == "file":
        again, other = through_a_file(made, model, opt)
    else:
        again, other = copy.deepcopy((model, opt))
    go(model, opt, steps, 20)
    go(again, other, steps, 20)
    alike(model, again, 0)


def test_the_order_goes_on_after_a_load() -> None:
    def made() -> Any:
        base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        return fastdg.PGrad(base, num_domains=5, generator=seeded())

    opt, other = made(), made()
    first = opt.order()
    assert [sorted(first[k : k + 5]) for k in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    other.load_state_dict(opt.state_dict())
    assert opt.order() == other.order() != first


def test_a_step_that_a_scaler_skips_is_a_point_again() -> None:
    model = nn.Linear(4, 3)
    opt = fastdg.PGrad(Adam(model.parameters(), lr=1e-2), num_domains=2, splits=1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    for d, factor in ((0, 1.0), (1, float("inf"))):
        opt.zero_grad()
        losses = (model(torch.randn(5, 4)) * factor).square().sum(1)
        opt.backward(losses, d, scaler=scaler)
        scaler.step(opt)
        scaler.update()
    gram = opt.statistics["gram"]
    close(gram, gram[0, 0].expand(2, 2), 1e-6)
    assert opt.steps == 1 and opt.position == 0
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("meta_lr", -1),
        ("splits", 0),
        ("directions", 0),
        ("weight_decay", -1),
        ("num_domains", 0),
    ],
)
def test_arguments(argument: str, value: Any) -> None:
    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"^{argument}: .*got "):
        fastdg.PGrad(base, **{"num_domains": 3, argument: value})
