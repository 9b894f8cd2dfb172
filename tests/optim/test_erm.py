"""ERM, and SWAD around a plain optimizer: plain training in the loop of the algorithms."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import EVERY, Network, batch, model_of, network, same
from on_device import DEVICE
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import fastdg

PLAIN: dict[str, Callable[[Optimizer], Any]] = {
    "ERM": fastdg.ERM,
    "SWAD": lambda base: fastdg.SWAD(base, model_of(base)),
    "SWAD(ERM)": lambda base: fastdg.SWAD(fastdg.ERM(base), model_of(base)),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("parts", [1, 3])
def test_steps_and_statistics_are_those_of_plain_training(name: str, parts: int) -> None:
    model = network(torch.float64)
    twin = copy.deepcopy(model)
    opt = PLAIN[name](AdamW(model.parameters(), lr=0.1))
    plain = AdamW(twin.parameters(), lr=0.1)
    for seed in range(3):
        opt.zero_grad()
        plain.zero_grad()
        chunks = []
        for part in range(parts):
            losses, domains = batch(model, parts * seed + part)
            opt.backward(losses, domains, final=part == parts - 1)
            chunks.append((batch(twin, parts * seed + part)[0], domains))
        losses, domains = (torch.cat(x) for x in zip(*chunks, strict=True))
        losses.mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
        count = torch.bincount(domains)
        assert opt.statistics.keys() == {"loss", "domain_loss", "domain_count"}
        torch.testing.assert_close(opt.statistics["loss"], losses.detach().mean())
        means = torch.stack([losses[domains == d].mean() for d in range(len(count))]).detach()
        torch.testing.assert_close(opt.statistics["domain_loss"], means)
        assert torch.equal(opt.statistics["domain_count"], count)
        opt.step()
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
    assert opt.steps == 3


@pytest.mark.parametrize("name", PLAIN)
def test_closures(name: str) -> None:
    model = network()
    twin = copy.deepcopy(model)
    opt = PLAIN[name](SGD(model.parameters(), lr=0.1))
    other = fastdg.ERM(SGD(twin.parameters(), lr=0.1))

    def closure() -> tuple[Tensor, Tensor]:
        opt.zero_grad()
        return batch(model, 3)

    loss = opt.step(closure)
    other.backward(*batch(twin, 3))
    other.step()
    assert torch.equal(loss, other.statistics["loss"])
    same(model, twin)


def test_swad_around_a_plain_optimizer_takes_either_backward() -> None:
    model = network()
    twin = copy.deepcopy(model)
    opts = [fastdg.SWAD(SGD(m.parameters(), lr=0.1), m) for m in (model, twin)]
    for seed in range(2):
        for m, opt in zip((model, twin), opts, strict=True):
            opt.zero_grad()
            losses, domains = batch(m, seed)
            if opt is opts[0]:
                opt.backward(losses, domains)
            else:
                losses.mean().backward()
            opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    opts[0].backward(*batch(model), final=False)
    with pytest.raises(RuntimeError, match=r"^SWAD\.step\(\) needs a final backward"):
        opts[0].step()
    with pytest.raises(RuntimeError, match=r"^losses: SWAD\.backward was already called"):
        losses, domains = batch(model)
        opts[0].zero_grad()
        opts[0].backward(losses, domains, final=False)
        opts[0].backward(losses, domains)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler(name: str, fused: bool) -> None:
    model = network()
    twin = copy.deepcopy(model)
    opt = PLAIN[name](Adam(model.parameters(), lr=0.1, fused=fused))
    plain = Adam(twin.parameters(), lr=0.1, fused=fused)
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=2.0**30, growth_interval=2) for _ in "ab"]
    for seed in range(4):
        opt.zero_grad()
        plain.zero_grad()
        losses, domains = batch(model, seed)
        if seed == 2:
            losses = losses * torch.inf
        opt.backward(losses, domains, scaler=scalers[0])
        if seed == 1:
            with pytest.raises(RuntimeError, match=r"\.step\(\): .*scaler"):
                opt.step()
        scalers[0].step(opt)
        scalers[0].update()
        losses = batch(twin, seed)[0]
        if seed == 2:
            losses = losses * torch.inf
        scalers[1].scale(losses.mean()).backward()
        scalers[1].step(plain)
        scalers[1].update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert opt.steps == 3


class Ops(TorchDispatchMode):
    """Counts what runs, by whether a tensor has more than so many entries."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.large, self.small = entries, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves([args, result]) if torch.is_tensor(x)]
        large = any(x.numel() > self.entries for x in tensors)
        self.large += large
        self.small += not large
        return result


@pytest.mark.parametrize("layers", [2, 12])
def test_it_costs_what_plain_training_costs(layers: int) -> None:
    """The same operations on what is large, a fixed number on losses and ids, no hook."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(20, 20) for _ in range(layers)])
    x, y = torch.randn(16, 20), torch.randint(20, (16,))
    domains = torch.arange(16) % 3
    opt = fastdg.ERM(SGD(model.parameters(), lr=0.1), num_domains=3)
    hooks = modules._global_forward_hooks, modules._global_forward_pre_hooks
    assert not any(hooks) and not any(m._forward_hooks for m in model)
    counts = []
    for optimizer in (opt, opt.base):
        optimizer.zero_grad()
        with Ops(entries=16 * 3) as ops:  # a mask of samples and domains is small
            losses = F.cross_entropy(model(x), y, reduction="none")
            if optimizer is opt:
                opt.backward(losses, domains)
            else:
                losses.mean().backward()
            optimizer.step()
        counts.append((ops.large, ops.small))
        opt.zero_grad()
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] - counts[1][1] <= 60


WRAPPERS = [
    kind
    for name in fastdg.__all__
    if isinstance(kind := getattr(fastdg, name), type)
    and issubclass(kind, fastdg.DomainOptimizer)
    and kind is not fastdg.DomainOptimizer
]


@pytest.mark.parametrize("kind", WRAPPERS, ids=lambda kind: kind.__name__)
def test_every_wrapper_takes_num_domains_and_model(kind: type) -> None:
    parameters = inspect.signature(kind).parameters
    assert {"base", "num_domains", "model"} <= parameters.keys()
    tried = {name.split("(")[0] for name in (*EVERY, *PLAIN)}
    assert kind.__name__ in tried or kind.role == "ascent"  # these are in test_ascent.py


@pytest.mark.parametrize("name", [n for n in EVERY if "(" not in n and n not in ("MIRO",)])
def test_names_are_those_of_the_model(name: str) -> None:
    model = network()
    opt = EVERY[name](SGD(model.parameters(), lr=0.1), num_domains=3, model=model)
    assert opt.num_domains == 3
    assert list(opt._names.values()) == [n for n, _ in model.named_parameters()]
    losses, domains = batch(model)
    opt.backward(losses, domains)
    opt.step()
    assert len(opt.statistics["domain_count"]) == 3
    with pytest.raises(ValueError, match=r"^model: "):
        EVERY[name](SGD(model.parameters(), lr=0.1), model=nn.Linear(2, 2))


def test_swad_shares_num_domains_with_what_is_inside() -> None:
    model = Network()
    inner = fastdg.Fishr(SGD(model.parameters(), lr=0.1))
    assert fastdg.SWAD(inner, model, num_domains=4).num_domains == inner.num_domains == 4
    with pytest.raises(ValueError, match=r"^num_domains: .*got 3"):
        fastdg.SWAD(inner, model, num_domains=3)
    plain = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model, num_domains=4)
    plain.backward(*batch(model))
    assert len(plain.statistics["domain_count"]) == 4


@pytest.mark.parametrize("kind", WRAPPERS, ids=lambda kind: kind.__name__)
def test_keywords_of_the_optimizer_are_told_from_the_wrappers(kind: Any) -> None:
    name, model = kind.__name__, network()
    with pytest.raises(
        TypeError, match=rf"^lr: {name} has no .*fastdg\.{name}\(torch\.optim\.Adam"
    ):
        kind(model.parameters(), lr=1e-3)
    with pytest.raises(TypeError, match=r"^num_domain: .*num_domains="):
        kind(SGD(model.parameters()), num_domain=3)
    if name != "Fishr":
        with pytest.raises(TypeError, match=r"^params: .*requires_grad_\(False\)"):
            kind(SGD(model.parameters()), params=["0.weight"])


def test_classes_that_users_derive_take_what_they_take() -> None:
    class Mine(fastdg.Fishr):
        def __init__(self, base: Optimizer, **more: Any) -> None:
            self.mine = more.pop("mine", None)
            super().__init__(base, **more)

    opt = Mine(SGD(network().parameters()), mine=3, num_domains=2)
    assert opt.mine == 3 and opt.num_domains == 2
    assert "more" in inspect.signature(Mine).parameters
