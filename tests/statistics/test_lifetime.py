"""What a forward leaves behind lives no longer than what autograd saved of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import assert_close, one_by_one, trainable
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

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
    with pytest.raises(RuntimeError, match="backward was already called on this forward"):
        opt.backward(losses, DOMAINS)
    with pytest.raises(RuntimeError, match=r"second time|used up"):
        fastdg.per_sample_norms(opt.tape, losses)


@pytest.mark.parametrize(
    "ask",
    [
        lambda tape, losses: fastdg.domain_moments(tape, losses, DOMAINS, retain_graph=False),
        lambda tape, losses: fastdg.domain_gram(tape, losses, DOMAINS, retain_graph=False),
        lambda tape, losses: fastdg.per_sample_norms(tape, losses, retain_graph=False),
    ],
)
def test_a_statistic_frees_what_was_not_asked_for_too(
    ask: Callable[[fastdg.Tape, Tensor], object],
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Shift(4), nn.Tanh(), nn.Linear(4, 2))
    with fastdg.record(model, params=["4.weight"]) as tape:
        losses = model(torch.randn(4, 3)).square().sum(1)
    calls = list(tape.recorder.alive)
    assert len(calls) == 3
    ask(tape, losses)
    assert all(call.forgotten and not call.args for call in calls)


class Shift(nn.Module):
    """Autograd saves nothing of its input."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize("change", [lambda out: out, torch.tanh], ids=["linear", "nonlinear"])
@pytest.mark.parametrize("graphless", [False, True], ids=["hidden", "graphless"])
def test_an_input_changed_in_place_later_ties_no_knot(
    change: Callable[[Tensor], Tensor], graphless: bool
) -> None:
    before, layer = nn.Linear(3, 3), Shift(3)
    with fastdg.record(nn.ModuleList([before, layer])) as tape:
        for _ in range(3):
            h = torch.zeros(4, 3) if graphless else before(torch.randn(4, 3))
            h += change(layer(h))
        assert len(tape.recorder.alive) in (1, 2)  # the last one
        del h
        gc.collect()
        assert not tape.recorder.alive


def test_an_input_changed_in_place_later_after_a_step() -> None:
    before, layer = nn.Linear(3, 3), nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    model = nn.ModuleList([before, layer])
    parameters = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(parameters, lr=0.1)
    opt = fastdg.Fishr(sgd, params=[layer.bias], model=model, check=False)
    for _ in range(3):
        h = before(torch.randn(4, 3))
        h += layer(h).tanh()
        with pytest.raises(RuntimeError, match="changed in place"):
            opt.backward(h.square().sum(1), DOMAINS)
    del h
    gc.collect()
    assert not opt.tape.recorder.alive


class Gated(nn.Module):
    """No rule; the same tensor twice, and one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor, pair: dict[str, Tensor], index: Tensor) -> Tensor:
        return (x * self.gate).tanh() * pair["again"] + pair["other"] + index.unsqueeze(1)


def test_derivatives_go_through_what_was_recorded() -> None:
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
    for call in tape.recorder.alive:
        if isinstance(call.module, nn.MultiheadAttention):
            assert len({id(arg) for arg in call.args}) == 1
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
def test_inputs_of_every_kind_can_be_recorded() -> None:
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
