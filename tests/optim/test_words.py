"""Habits of plain PyTorch: each works, or is answered by the words that lead to the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bases import WRAPS, batch, network
from on_device import DEVICE
from torch import Tensor, nn
from torch.optim import SGD

import fastdg

NAMES = ["art", "photo", "sketch"]
DOMAINS: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda d: None, TypeError, r"got none\. Call opt\.backward\(losses, domains\)"),
    "strings": (
        lambda d: [NAMES[i] for i in d],
        TypeError,
        r"got list with the name '\w+'\. .*fastdg\.DomainIds\(names\).*ids\(domains\)",
    ),
    "an array of strings": (
        lambda d: np.array([NAMES[i] for i in d]),
        TypeError,
        r"got ndarray with the name '\w+'\. .*fastdg\.DomainIds",
    ),
    "a list": (lambda d: d.tolist(), TypeError, r"got list\. Use torch\.as_tensor"),
    "an array": (lambda d: d.numpy(), TypeError, r"got ndarray\. Use torch\.as_tensor"),
    "floats": (lambda d: d.float(), TypeError, r"float32\. .*\.long\(\).*fastdg\.DomainIds"),
    "bools": (lambda d: d > 0, TypeError, r"torch\.bool\. Use domains\.long\(\)"),
    "True": (lambda d: True, TypeError, r"got bool"),
    "a column": (
        lambda d: d[:, None],
        ValueError,
        r"got shape \(9, 1\)\. Use domains\.squeeze\(1\)",
    ),
    "one-hot": (
        lambda d: F.one_hot(d, 3),
        ValueError,
        r"For one-hot rows, use domains\.argmax\(1\)",
    ),
    "years": (lambda d: d + 2015, ValueError, r"got 20\d\d among 9 .*fastdg\.DomainIds\(values\)"),
    "below 0": (lambda d: d - 1, ValueError, r"got -1\. No id stands for 'no domain'"),
    "one too few": (
        lambda d: d[1:],
        ValueError,
        r"one id per sample, shape \(9,\) .* got .* \(8,\)",
    ),
}


@pytest.mark.parametrize("kind", DOMAINS)
@pytest.mark.parametrize("name", ["Fishr", "PCGrad", "VREx", "IRM", "Fish", "SWAD(Fishr)"])
def test_domains(name: str, kind: str) -> None:
    model = network()
    more = {"num_domains": None} if name != "Fish" else {}
    opt = WRAPS[name](SGD(model.parameters(), lr=0.1), **more)
    make, error, words = DOMAINS[kind]
    losses, domains = batch(model)
    domains[:3] = torch.arange(3)
    if type(opt) is not fastdg.SWAD and name == "Fish":
        opt = fastdg.Fish(SGD(model.parameters(), lr=0.1), num_domains=3)
        if kind == "years":
            words = r"below num_domains=3, got 20.*fastdg\.DomainIds\(values\)"
    with pytest.raises(error, match=rf"^domains: expected .*{words}"):
        opt.backward(losses, make(domains))


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_an_integer_is_the_domain_of_all_samples(name: str, kind: Any) -> None:
    if name == "Fish":
        pytest.skip("its batches have one domain, which the wrapper of these tests makes 0")
    results = []
    for whole in (False, True):
        model = network()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.1)
        opt = WRAPS[name](SGD(model.parameters(), lr=0.1))
        losses, _ = batch(model)
        opt.backward(losses, torch.full((9,), 2) if whole else kind(2))
        assert opt.statistics["domain_count"].tolist() == [0, 0, 9]
        results.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_fish_and_iga_with_an_integer() -> None:
    model = network()
    fish = fastdg.Fish(SGD(model.parameters(), lr=0.1), num_domains=3)
    fish.step(lambda d: (batch(model, d)[0], d))
    assert fish.statistics["domain_count"].tolist() == [9, 9, 9]
    iga = fastdg.IGA(SGD(model.parameters(), lr=0.1), num_domains=3)
    iga.step(lambda d: (batch(model, d)[0], d))
    compiled = fastdg.compiled(
        fastdg.VREx(SGD(model.parameters(), lr=0.1), num_domains=3), lambda x: model(x).sum(1)
    )
    with pytest.raises(TypeError, match=r"^domains: .*'art'.*fastdg\.DomainIds"):
        compiled(torch.randn(3, 4), domains=NAMES)


def test_the_plain_recipes() -> None:
    model = network()
    opt = fastdg.PCGrad(SGD(model.parameters(), lr=0.1))
    batch(model)[0].mean().backward()
    words = (
        r"needs a backward before it\. .*in place of loss\.backward\(\).* with a GradScaler, opt"
    )
    with pytest.raises(RuntimeError, match=words):
        opt.step()
    scaler = torch.amp.GradScaler(DEVICE, enabled=False)
    scaler.scale(batch(model)[0].mean()).backward()
    with pytest.raises(RuntimeError, match=words):
        scaler.step(opt)
    opt.backward(*batch(model), final=False)
    with pytest.raises(RuntimeError, match="needs a final backward"):
        opt.step()


@pytest.mark.parametrize("how", ["places", "model", "named_parameters"])
@pytest.mark.parametrize("name", ["Fishr", "PCGrad", "IGA"])
def test_names_of_parameters(name: str, how: str) -> None:
    """Those of modules, or else how to get them."""
    model = network()
    given = model.named_parameters() if how == "named_parameters" else model.parameters()
    more: dict[str, Any] = {"model": model} if how == "model" else {}
    more |= {"params": "all"} if name == "Fishr" else {}
    opt = WRAPS[name](SGD(given, lr=0.1), **more)
    losses, domains = batch(model)
    losses = losses + (losses - losses.mean()).square()
    with pytest.warns(UserWarning, match=r"^params: .*autograd for each domain") as told:
        opt.backward(losses, domains)
    text = str(told[0].message)
    hint = "For names in place of param_groups[...] pass model=model, or make the optimizer of"
    assert (hint in text) == (how == "places") == ("param_groups[" in text)
    assert how == "places" or "weight" in text or "bias" in text


def test_one_domain_alone_costs_one_backward() -> None:
    """As the warning advises."""
    model, x = network(torch.float64), torch.randn(6, 4, dtype=torch.float64)
    y, domains = torch.arange(6) % 3, torch.arange(6) % 2

    def contrast(rows: Any) -> Tensor:
        z = model(x[rows])
        return F.cross_entropy(z, y[rows], reduction="none") + torch.cdist(z, z).mean(1)

    opt = fastdg.AgrSum(SGD(model.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=r"^params: .*final=False"):
        opt.backward(contrast(slice(None)), domains)
    opt = fastdg.AgrSum(SGD(model.parameters(), lr=0.1))
    gradients = []
    for d in (0, 1):
        model.zero_grad()
        contrast(domains == d).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    opt.zero_grad()
    for d in (0, 1):
        opt.backward(contrast(domains == d), d, final=d == 1)
    for p, a, b in zip(model.parameters(), *gradients, strict=True):
        torch.testing.assert_close(p.grad, torch.where(a * b > 0, (a + b) / 2, 0.0))


def test_a_head_that_was_replaced_later() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = fastdg.Fishr(SGD(model.named_parameters(), lr=0.1))
    opt.backward(*batch(model))
    model[2] = nn.Linear(5, 3)
    opt = fastdg.Fishr(opt.base)
    with pytest.warns(UserWarning, match=r"^params: .*0\.weight"):
        opt.backward(*batch(model))


class TwoLosses(nn.Module):
    """Weights of two losses (Kendall, Gal, Cipolla, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (-self.s[0]).exp() * a + (-self.s[1]).exp() * b + self.s.sum()


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits / self.t, y, reduction="none")


class OwnHead(nn.Module):
    """A head of one dimension, which is one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.w


@pytest.mark.parametrize("kind", ["losses", "temperature", "own"])
@pytest.mark.parametrize("given", [False, True])
def test_parameters_of_a_criterion_are_no_head(kind: str, given: bool) -> None:
    body, head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)
    criterion = {"losses": TwoLosses, "temperature": Temperature, "own": OwnHead}[kind]()
    model = nn.ModuleDict({"body": body, "head": head, "criterion": criterion})
    base = SGD(model.named_parameters(), lr=0.1)
    opt = fastdg.Fishr(base, anneal_steps=0, model=model if given else None)
    x, y, domains = torch.randn(8, 4), torch.arange(8) % 3, torch.arange(8) % 2
    for _ in range(2):
        h = body(x)
        if kind == "losses":
            losses = criterion(F.cross_entropy(head(h), y, reduction="none"), h.square().mean(1))
        elif kind == "temperature":
            losses = criterion(head(h), y)
        else:
            losses = criterion(h).square()
        opt.zero_grad()
        opt.backward(losses, domains)
        opt.step()
    names = {opt._names[p] for p in opt._own_state["ema"]}
    assert names == ({"criterion.w"} if kind == "own" else {"head.weight", "head.bias"})
    assert all(p.grad is not None for p in criterion.parameters())


def test_words_for_slips_of_a_first_loop() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"^weight: .*Did you mean penalty_weight="):
        fastdg.Fishr(SGD(model.parameters(), lr=0.1), weight=10.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^steps: .*Did you mean anneal_steps="):
        fastdg.Fishr(SGD(model.parameters(), lr=0.1), steps=10)  # type: ignore[call-arg]
    opt = fastdg.PCGrad(SGD(model.parameters(), lr=0.1))
    losses, domains = batch(model)
    with pytest.raises(TypeError, match=r"^losses: .*got dict.*list\(losses\.values\(\)\)"):
        opt.backward({"a": losses, "b": losses})  # type: ignore[arg-type]
    opt.backward(losses, domains)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"needs a backward.*zero_grad\(\) before"):
        opt.step()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("SD", "logits"),
        ("IBERM", "features"),
        ("CORAL", "features"),
        ("IRM", "logits"),
        ("ERM", ""),
    ],
)
def test_a_view_made_without_gradients_is_refused(kind: str, name: str) -> None:
    """It says that it requires a gradient, but gives it to nothing."""
    model = nn.Linear(4, 3)
    z = model(torch.randn(6, 4))
    losses = F.cross_entropy(z, torch.arange(6) % 3, reduction="none")
    opt = getattr(fastdg, kind)(SGD(model.parameters(), lr=0.1))
    with torch.no_grad(), pytest.raises(ValueError, match=rf"^{name or 'losses'}: .*graph"):
        if name:
            opt.backward(losses, torch.arange(6) % 2, **{name: z.view(6, 3)})
        else:
            opt.backward([losses.view(6), losses])
    assert model.weight.grad is None
