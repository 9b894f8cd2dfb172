"""MLDG against copies of the network with an Adam of their own, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

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


def pairs(domains: int, tests: int, generator: torch.Generator) -> list[tuple[int, int]]:
    order = torch.randperm(domains, generator=generator).tolist()
    test = order[domains - tests :]
    return [(i, test[k % tests]) for k, i in enumerate(order[: domains - tests])]


def mldg(
    model: nn.Module,
    make: Callable[[nn.Module], Optimizer],
    data: Sequence[Round],
    tests: int,
    rate: Callable[[Optimizer], float],
    beta: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """The objective of each step, as the definition has it."""
    opt, generator, found = make(model), generator or seeded(), []
    for domains in data:
        opt.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for i, j in pairs(len(domains), tests, generator):
            inner = copy.deepcopy(model)
            inner.zero_grad()
            decay = opt.param_groups[0].get("weight_decay", 0.0)
            adam = Adam(inner.parameters(), lr=rate(opt), weight_decay=decay)
            for (x, y), weight in ((domains[i], 1.0), (domains[j], beta)):
                adam.zero_grad()
                loss = F.cross_entropy(inner(x), y)
                loss.backward()
                total += weight * loss.detach()
                for p, q in zip(model.parameters(), inner.parameters(), strict=True):
                    if q.grad is not None:
                        p.grad += weight * q.grad / len(domains)
                adam.step()
        opt.step()
        found.append(total / len(domains))
    return found


def ragged(data: Sequence[Round]) -> list[Round]:
    return [[(x[: 3 + d], y[: 3 + d]) for d, (x, y) in enumerate(domains)] for domains in data]


@pytest.mark.parametrize("way", ["closure", "loop", "micro-batches"])
@pytest.mark.parametrize("tests", [1, 2])
@pytest.mark.parametrize("make", MAKES)
def test_definition(make: str, tests: int, way: str) -> None:
    model, data = net(), ragged(rounds(5))
    twin = copy.deepcopy(model)
    opt = fastdg.MLDG(
        MAKES[make](model), num_domains=3, meta_test=tests, beta=0.7, generator=seeded()
    )
    expected = mldg(twin, MAKES[make], data, tests, lambda o: o.param_groups[0]["lr"], 0.7)
    for domains, objective in zip(data, expected, strict=True):
        if way == "closure":
            value = opt.step(lambda d, domains=domains: losses_of(model, *domains[d]))
            close(value, objective)
        else:
            opt.zero_grad()
            for k, d in enumerate(opt.order()):
                if k:
                    opt.ascend()
                x, y = domains[d]
                if way == "micro-batches":
                    opt.backward(losses_of(model, x[:1], y[:1]), d, final=False)
                    x, y = x[1:], y[1:]
                opt.backward(losses_of(model, x, y), d)
            opt.step()
        close(opt.statistics["objective"], objective)
    alike(model, twin, 1e-11)


def test_a_rate_of_its_own_for_the_inner_step() -> None:
    model, data = net(), rounds(3)
    twin = copy.deepcopy(model)
    opt = fastdg.MLDG(
        MAKES["adam"](model), num_domains=3, meta_test=1, inner_lr=0.3, generator=seeded()
    )
    mldg(twin, MAKES["adam"], data, 1, lambda _: 0.3)
    for domains in data:
        opt.step(lambda d, domains=domains: losses_of(model, *domains[d]))
    alike(model, twin, 1e-11)


def test_what_domainbed_gave() -> None:
    """``MLDG.update`` of facebookresearch/DomainBed at b93c22a, with one test domain of three."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            line = torch.linspace(-0.5 + 0.1 * k, 0.7, p.numel(), dtype=torch.float64)
            p.copy_(line.view_as(p))
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.25, -2.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1])
    base = Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    opt = fastdg.MLDG(base, num_domains=3, meta_test=1, beta=0.7)
    torch.manual_seed(5)
    for step, expected in enumerate((0.8530489563558037, 0.8338839127577291, 0.8588031600022288)):

        def closure(d: int, step: int = step) -> Tensor:
            return losses_of(model, x * (1 + step) + d, (y + d) % 2)

        opt.step(closure)
        torch.testing.assert_close(float(opt.statistics["objective"]), expected, rtol=1e-12, atol=0)
    found = torch.cat([p.detach().flatten() for p in model.parameters()])
    close(found, torch.tensor(GAVE, dtype=torch.float64), 1e-10)


GAVE = [
    *(-0.4948011226600203, -0.12964962456599094, 0.2796929304055224, 0.6699532231656746),
    *(-0.37020557292607964, 0.6706141611722296, -0.32927860458698627, 0.06335059488667803),
    *(0.3958674047349993, 0.6699789226546053, -0.1703331056851084, 0.6702218918209982),
]


def test_goes_on_bit_for_bit() -> None:
    data = rounds(6)

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(2)
        model = net(batch_norm=True)
        base = MAKES["adam"](model)
        return model, fastdg.MLDG(base, num_domains=3, model=model, generator=seeded())

    def go(model: nn.Module, opt: Any, part: Sequence[Round]) -> None:
        for domains in part:
            opt.step(lambda d, domains=domains: losses_of(model, *domains[d]))

    model, opt = made()
    go(model, opt, data[:3])
    again, other = through_a_file(made, model, opt)
    third = copy.deepcopy((model, opt))
    for pair in ((model, opt), (again, other), third):
        go(*pair, data[3:])
        alike(model, pair[0], 0)


@pytest.mark.parametrize("way", ["closure", "loop"])
def test_other_test_domains_from_a_step_on(way: str) -> None:
    model, data = net(), rounds(2)
    twin = copy.deepcopy(model)
    opt = fastdg.MLDG(SGD(model.parameters(), 0.1), num_domains=3, generator=seeded())
    generator = seeded()
    for tests, domains in zip((2, 1), data, strict=True):
        opt.meta_test = tests
        expected = mldg(
            twin,
            lambda m: SGD(m.parameters(), 0.1),
            [domains],
            tests,
            lambda _: 0.1,
            generator=generator,
        )
        if way == "closure":
            close(opt.step(lambda d, domains=domains: losses_of(model, *domains[d])), expected[0])
            continue
        opt.zero_grad()
        for k, d in enumerate(opt.order()):
            if k:
                opt.ascend()
            opt.backward(losses_of(model, *domains[d]), d)
        opt.step()
    alike(model, twin, 1e-11)
    opt.meta_test = 3
    with pytest.raises(ValueError, match=r"^meta_test: expected less than num_domains=3, got 3"):
        opt.order()


def test_a_copy_holds_no_tensor_of_a_step() -> None:
    model, (domains,) = net(), rounds(1)
    opt = fastdg.MLDG(MAKES["adam"](model), num_domains=3)
    opt.step(lambda d: losses_of(model, *domains[d]))
    assert not [k for k, x in opt.__getstate__().items() if isinstance(x, Tensor)]
    copied, other = copy.deepcopy((model, opt))
    other.step(lambda d: losses_of(copied, *domains[d]))
    assert other.statistics["objective"].isfinite()


def test_a_scaler_leaves_no_trace() -> None:
    (domains,) = rounds(1)
    grads = []
    for scaler in (None, torch.amp.GradScaler(DEVICE, init_scale=1024.0)):
        torch.manual_seed(3)
        model = net()
        opt = fastdg.MLDG(SGD(model.parameters(), lr=0.1), num_domains=3, generator=seeded())
        for k, d in enumerate(opt.order()):
            if k:
                opt.ascend()
            opt.backward(losses_of(model, *domains[d]), d, scaler=scaler)
        if scaler is not None:
            scaler.unscale_(opt)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(grads[1], grads[0])


def test_only_the_first_forward_moves_running_statistics() -> None:
    model, (domains,) = net(batch_norm=True), rounds(1)
    twin = copy.deepcopy(model)
    opt = fastdg.MLDG(MAKES["adam"](model), num_domains=3, model=model, generator=seeded())
    opt.step(lambda d: losses_of(model, *domains[d]))
    ((i, _),) = pairs(3, 2, seeded())
    twin(domains[i][0])
    close(model.norm.running_mean, twin.norm.running_mean, 0)


def test_another_domain_than_the_next_is_refused() -> None:
    model, (domains,) = net(), rounds(1)
    start = copy.deepcopy(model)
    opt = fastdg.MLDG(MAKES["adam"](model), num_domains=3, meta_test=1)
    with pytest.raises(ValueError, match=r"^closure: expected losses of domain \d, got domains"):
        opt.step(lambda d: (losses_of(model, *domains[0]), torch.zeros(len(domains[0][1])).long()))
    alike(model, start, 0)


def loop(opt: Any, model: nn.Module, domains: Round, order: Sequence[Any]) -> None:
    for k, d in enumerate(order):
        if k:
            opt.ascend()
        x, y = domains[d if isinstance(d, int) else int(d[0])]
        opt.backward(losses_of(model, x, y), d if isinstance(d, int) else d[: len(y)])
    opt.step()


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ([0, 0], "gradient 1 of MLDG's step needs a test domain, not a train domain, got domain 0"),
        ([0, 2, 0, 2], "gradient 2 .* that no earlier one has had, got domain 0"),
        ([0, 2, 2, 1], "gradient 2 .* that no earlier one has had, got domain 2"),
        ([torch.tensor([0, 1] * 9)], r"MLDG takes batches of one domain, got domains \[0, 1\]"),
    ],
)
def test_domains_that_are_no_pairs_are_refused_in_a_loop(order: Any, problem: str) -> None:
    model, (domains,) = net(), rounds(1)
    opt = fastdg.MLDG(MAKES["adam"](model), num_domains=3, meta_test=1)
    with pytest.raises(ValueError, match=rf"^domains: {problem}\. Take the domains in the order"):
        loop(opt, model, domains, order)
    opt.restore()
    opt.zero_grad()
    for own in (opt.order(), [2, 1, 0, 1]):  # any order of pairs
        opt.zero_grad()
        loop(opt, model, domains, own)


def test_micro_batches_of_a_gradient_are_of_one_domain() -> None:
    model, (domains,) = net(), rounds(1)
    opt = fastdg.MLDG(MAKES["adam"](model), num_domains=3, meta_test=1)
    opt.backward(losses_of(model, *domains[0]), 0, final=False)
    with pytest.raises(ValueError, match=r"^domains: MLDG takes the micro-batches .*domains \[1\]"):
        opt.backward(losses_of(model, *domains[1]), 1)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("beta", -1), ("inner_lr", -1), ("meta_test", 0), ("meta_test", 3), ("num_domains", 0)],
)
def test_arguments(argument: str, value: Any) -> None:
    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"^{argument}: .*got "):
        fastdg.MLDG(base, **{"num_domains": 3, argument: value})


def test_a_closure_takes_a_domain() -> None:
    model = nn.Linear(2, 2)
    opt = fastdg.MLDG(torch.optim.SGD(model.parameters(), lr=0.1), num_domains=3)
    with pytest.raises(TypeError, match=r"^closure: MLDG calls it with a domain"):
        opt.step(lambda: (model(torch.ones(3, 2)).sum(1), torch.arange(3)))
