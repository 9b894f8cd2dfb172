"""Nothing is added to a model or a graph, and a graph lives as long as autograd would keep it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functions import Scale
from oracle import assert_close, one_by_one, trainable
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fastdg

DOMAINS = torch.tensor([0, 0, 1, 1])


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


def inputs_of(model: nn.Module) -> list[StorageWeakRef]:
    """Filled in every forward with the memory that the linear layers are given."""
    seen: list[StorageWeakRef] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args: seen.append(StorageWeakRef(args[0].untyped_storage()))
            )
    return seen


def alive(seen: list[StorageWeakRef]) -> list[bool]:
    return [not storage.expired() for storage in seen]


@pytest.mark.parametrize("anneal_steps", [0, 9])
@pytest.mark.parametrize("params", ["head", "all"])
def test_a_step_frees_the_inputs_while_losses_are_held(params: str, anneal_steps: int) -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = fastdg.Fishr(sgd, params=params, anneal_steps=anneal_steps, model=model)
    for _ in range(2):
        seen = inputs_of(model)
        x = torch.randn(4, 3)
        losses = F.cross_entropy(model(x), DOMAINS, reduction="none")
        assert alive(seen) == [True, True, True]
        opt.zero_grad()
        opt.backward(losses, DOMAINS)
        assert alive(seen) == [True, False, False]  # x is the test's own
        opt.step()
        assert losses.grad_fn is not None


@pytest.mark.parametrize("params", ["head", "all"])
def test_a_staged_forward_is_kept_until_the_final_one(params: str) -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = fastdg.Fishr(sgd, params=params, model=model, check=False)
    seen = inputs_of(model)
    x = torch.randn(4, 3)
    held = [model(x).square().sum(1) for _ in range(2)]
    opt.backward(held[0], DOMAINS, final=False)
    assert all(alive(seen))
    opt.backward(held[1], DOMAINS)
    assert alive(seen) == [True, False, False] * 2


@pytest.mark.parametrize("params", ["head", "all"])
@pytest.mark.parametrize("anneal_steps", [0, 9])
def test_a_backward_leaves_other_forwards_alone(params: str, anneal_steps: int) -> None:
    model = mlp()
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    batches = torch.randn(2, 4, 3)
    grads: list[list[Tensor]] = []
    for order, net in (((1, 0), model), ((0, 1), twin)):
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        opt = fastdg.Fishr(sgd, params=params, anneal_steps=anneal_steps, model=net)
        losses = [net(x).square().sum(1) for x in batches]
        for k in order:
            opt.backward(losses[k], DOMAINS)
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for one, two in zip(*grads, strict=True):
        assert_close(one, two, "grad")


def test_a_second_backward_is_still_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2))
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all", model=model)
    losses = model(torch.randn(4, 3)).square().sum(1)
    opt.backward(losses, DOMAINS)
    with pytest.raises(RuntimeError, match=r"^losses: .*already called"):
        opt.backward(losses, DOMAINS)
    with pytest.raises(RuntimeError, match=r"^losses: .*freed"):
        fastdg.per_sample_norms(opt.tape, losses)


class Shift(nn.Module):
    """Autograd saves nothing of its input."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Gated(nn.Module):
    """No rule; the same tensor twice, and one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor, pair: dict[str, Tensor], index: Tensor) -> Tensor:
        return (x * self.gate).tanh() * pair["again"] + pair["other"] + index.unsqueeze(1)


def test_derivatives_go_through_the_forward() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.gated = nn.Linear(3, 3), Gated()
            self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
            self.two = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x).tanh()
            h = self.gated(h, {"again": h, "other": x}, torch.arange(4)).unsqueeze(1)
            return self.two(h + self.attention(h, h, h)[0]).squeeze(1)

    model, x = Net(), torch.randn(4, 3)
    with fastdg.record(model) as tape:
        losses = model(x).square().sum(1)
    chosen = trainable(model)
    moments = fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)
    total = sum(v.square().sum() for v in moments.variance.values())
    got = torch.autograd.grad(total, list(chosen.values()), allow_unused=True, retain_graph=True)
    grads = one_by_one(losses, chosen, create_graph=True)
    true = sum(
        (torch.stack([g[d == DOMAINS].var(0, correction=0) for d in (0, 1)])).square().sum()
        for g in grads.values()
    )
    expected = torch.autograd.grad(true, list(chosen.values()), allow_unused=True)
    for name, one, two in zip(chosen, got, expected, strict=True):
        assert (one is None) == (two is None), name
        if one is not None and two is not None:
            assert_close(one, two, name)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # torch's own, forward AD
def test_inputs_of_every_kind() -> None:
    class Tagged(Tensor):
        pass

    linear = nn.Linear(3, 2)
    with torch.inference_mode():
        frozen = torch.randn(4, 3)
    leaf = torch.randn(4, 3, requires_grad=True)
    tagged = torch.randn(4, 3).as_subclass(Tagged)
    with fastdg.record(nn.ModuleList([linear, embedding := nn.Embedding(5, 3)])) as tape:
        for x in (leaf, tagged, tagged.clone().requires_grad_(), embedding(torch.arange(4))):
            losses = linear(x).square().sum(1).as_subclass(Tensor)
            got = fastdg.per_sample_gradients(tape, losses)
            for name in ("0.weight", "0.bias"):
                true = one_by_one(losses, {name: dict(linear.named_parameters())[name[2:]]})
                assert_close(got[name], true[name], name)
        shift = Shift(3)
        with fastdg.record(shift) as inner:
            losses = shift(frozen).sum(1)
        assert torch.equal(fastdg.per_sample_gradients(inner, losses)["shift"], torch.ones(4, 3))
        with fastdg.record(shift), forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
            assert forward_ad.unpack_dual(shift(dual)).tangent is not None
        torch.func.vmap(torch.func.grad(lambda x: linear(x).sum()))(leaf)


class Net(nn.Module):
    """A convolution, a table, a norm, a slope of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.table = nn.Embedding(5, 4)
        self.own = nn.PReLU(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = self.norm(self.conv(x.unsqueeze(1))).relu().mean(2)
        return self.head(self.own(y + self.table(tokens).sum(1)))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 6), torch.zeros(4, 2).long()


TABLES = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks"),
    *("_load_state_dict_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
GLOBAL = [name for name in vars(torch_module) if name.startswith("_global") and "hook" in name]


def traces(model: nn.Module) -> list[object]:
    """Every attribute of every module, every hook, every global hook, every hook of parameters."""
    return [
        [(name, sorted(vars(module))) for name, module in model.named_modules()],
        [len(getattr(module, table)) for module in model.modules() for table in TABLES],
        [len(getattr(torch_module, name) or ()) for name in GLOBAL if "called" not in name],
        [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()],
        [sorted(vars(p)) for p in model.parameters()],
    ]


@pytest.mark.parametrize("wrapper", [fastdg.Fishr, fastdg.IGA, fastdg.AgrSum, fastdg.PCGrad])
def test_no_hook_and_no_trace_anywhere(wrapper: Callable[..., Any]) -> None:
    model = Net()
    before = {name: p.clone() for name, p in model.named_parameters()}
    clean = traces(model)
    with pytest.raises(KeyError), fastdg.record(model):
        assert traces(model) == clean
        raise KeyError
    with fastdg.record(model) as tape:
        losses = model(*batch()).sum(1)
    assert traces(model) == clean
    fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)
    fastdg.per_sample_norms(losses, params=model)
    fastdg.explain(losses, model)
    assert traces(model) == clean
    assert all(p.grad is None for p in model.parameters())
    losses.sum().backward()  # the graph is whole
    assert all(p.grad is not None for p in model.parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    opt = wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        opt.zero_grad()
        opt.backward(model(*batch()).square().sum(1), DOMAINS)
        opt.step()
        assert traces(model) == clean


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_model_in_use_can_be_copied(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, (x, tokens) = Net(), batch()
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all", model=model)
    opt.backward(model(x, tokens).sum(1), DOMAINS)
    twin = copied(model)
    twin(x, tokens).sum().backward()
    losses, alien = model(x, tokens).sum(1), twin(x, tokens).sum(1)
    assert len(fastdg.per_sample_gradients(losses, params=model)) == len(list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"^losses: .*tracked parameters"):
        fastdg.per_sample_gradients(alien, params=model)
    with pytest.raises(RuntimeError, match=r"^losses: .*tracked parameters"):
        opt.backward(alien, DOMAINS)


def test_a_forward_without_backward_is_freed_at_once() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.LSTM(8, 4, batch_first=True))
    alive: list[weakref.ref[Tensor]] = []
    model[0].register_forward_hook(lambda m, args, out: alive.append(weakref.ref(out)))
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all", model=model)
    opt.backward(model(torch.randn(4, 2, 4))[0].sum((1, 2)), DOMAINS)
    gc.collect()
    gc.disable()  # what only a collector could free would pile up
    try:
        alive.clear()
        with fastdg.record(model) as tape:
            for k in range(5):
                out = model(torch.randn(4, 2, 4))[0].sum((1, 2))
                if k % 2:
                    fastdg.per_sample_norms(tape, out)
                del out
            assert len(alive) == 5
            assert all(reference() is None for reference in alive)
    finally:
        gc.enable()


def test_many_forwards_without_backward_do_not_grow() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all")
    x = torch.randn(4, 4)
    opt.backward(model(x).square().sum(1), DOMAINS)
    opt.step()
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing) is Tensor for thing in gc.get_objects())
        for _ in range(1000):
            model(x).square().sum(1)
        assert sum(type(thing) is Tensor for thing in gc.get_objects()) <= before
    finally:
        gc.enable()


def test_a_history_of_losses_keeps_no_batch() -> None:
    model, history = mlp(), []
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all")
    for _ in range(3):
        seen = inputs_of(model)
        losses = model(torch.randn(4, 3)).square().sum(1)
        opt.backward(losses, DOMAINS)
        opt.step()
        history.append(losses)
        assert not any(alive(seen)[1:])


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_statistic_keeps_nothing_alive(create_graph: bool) -> None:
    model = Net()
    losses = model(*batch()).sum(1)
    fastdg.domain_moments(losses, DOMAINS, params=model)
    moments = fastdg.domain_moments(losses, DOMAINS, params=model, create_graph=create_graph)
    root = weakref.ref(losses)
    gc.collect()
    gc.disable()
    try:
        del losses, moments
        assert root() is None
    finally:
        gc.enable()


STATISTICS = {
    "moments": lambda tape, losses, kept: fastdg.domain_moments(
        tape, losses, DOMAINS, retain_graph=kept
    ),
    "gram": lambda tape, losses, kept: fastdg.domain_gram(tape, losses, DOMAINS, retain_graph=kept),
    "norms": lambda tape, losses, kept: fastdg.per_sample_norms(tape, losses, retain_graph=kept),
}


@pytest.mark.parametrize("ask", STATISTICS.values(), ids=STATISTICS.keys())
def test_graph_is_kept_or_freed_as_asked(ask: Callable[..., object]) -> None:
    model = mlp()
    for _ in range(2):  # when the graph is planned, and from what is remembered
        for kept in (True, False):
            seen = inputs_of(model)
            with fastdg.record(model) as tape:
                losses = model(torch.randn(4, 3)).sum(1)
            ask(tape, losses, kept)
            assert alive(seen)[1:] == [kept, kept]
            if kept:
                ask(tape, losses, kept)
            else:
                with pytest.raises(RuntimeError, match=r"^losses: .*freed"):
                    ask(tape, losses, kept)


class Mixture(nn.Module):
    """A checkpoint, a function without a rule, and a weight that is made of others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(Scale.apply(self.layer(x), self.gain))
        return checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:params")
@pytest.mark.parametrize(
    "ask",
    [
        lambda model, losses: fastdg.domain_gradients(losses, DOMAINS, params=model),
        lambda model, losses: fastdg.domain_moments(
            losses, DOMAINS, params=model, create_graph=True
        ),
        lambda model, losses: fastdg.Fishr(
            torch.optim.SGD(model.parameters(), lr=0.1), params="all", anneal_steps=0
        ).backward(losses, DOMAINS),
    ],
    ids=["gradients", "moments", "Fishr"],
)
def test_no_cycle_keeps_a_graph_until_the_collector_runs(ask: Callable[..., object]) -> None:
    model = Mixture()
    losses = model(torch.randn(4, 4)).sin().sum(1)
    gc.collect()
    gc.disable()
    try:
        ask(model, losses)
        graph = weakref.ref(losses)
        del losses
        assert graph() is None
    finally:
        gc.enable()


def test_a_class_of_functions_is_not_kept() -> None:
    """Where torch.compile makes one, it has the compiled graph and its constants."""

    def use() -> weakref.ref[type]:
        class Local(Scale):
            pass

        gain = nn.Parameter(torch.ones(3))
        losses = Local.apply(torch.randn(4, 3), gain).sin().sum(1)
        with pytest.warns(UserWarning, match=r"^params: "):
            fastdg.domain_moments(losses, DOMAINS, params=[gain], retain_graph=False)
        return weakref.ref(Local)

    local = use()
    gc.collect()
    assert local() is None
