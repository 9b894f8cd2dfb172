"""What autograd cannot do raises, in words that name the argument and say what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import DOMAINS, SLOW, assert_close, one_by_one, trainable
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastdg
from fastdg.gradients.rules import registry as rules

N = 6


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Model(nn.Module):
    """Two layers, and ``run``, which uses them."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)
        for name, module in more.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


STATISTICS = {
    "moments": lambda losses, model: fastdg.domain_moments(losses, DOMAINS, params=model),
    "gradients": lambda losses, model: fastdg.domain_gradients(losses, DOMAINS, params=model),
    "gram": lambda losses, model: fastdg.domain_gram(losses, DOMAINS, params=model),
    "samples": lambda losses, model: fastdg.per_sample_gradients(losses, params=model),
    "norms": lambda losses, model: fastdg.per_sample_norms(losses, params=model),
}
every_statistic = pytest.mark.parametrize("ask", STATISTICS.values(), ids=STATISTICS.keys())


@every_statistic
@pytest.mark.parametrize("seen", [True, False], ids=["plan known", "plan new"])
def test_graph_that_was_freed(ask: Callable[[Tensor, object], object], seen: bool) -> None:
    model = Model(lambda m, x: m.two(m.one(x).tanh()).sin())
    samples = N if seen else N + 1
    losses = model(torch.randn(samples, 4)).square().sum(1)
    if seen:
        ask(losses, model)
        ask(losses, model)
    losses.sum().backward()
    words = "losses: their graph was freed by an earlier backward"
    with pytest.raises(RuntimeError, match=words):
        if seen:
            ask(losses, model)
        else:
            fastdg.per_sample_norms(losses, params=model)


def test_graph_that_was_freed_below_a_head() -> None:
    model = Model(lambda m, x: m.two(m.one(x).tanh()))
    losses = model(torch.randn(N, 4)).exp().sum(1)
    losses.sum().backward()
    with (
        fastdg.record(model, "head") as tape,
        pytest.raises(RuntimeError, match=r"^losses: .*freed"),
    ):
        fastdg.per_sample_norms(tape, losses)
    with pytest.raises(RuntimeError, match=r"^losses: .*freed"):
        fastdg.check(tape, losses)


@every_statistic
@pytest.mark.parametrize("times", [1, 3], ids=["plan new", "plan known"])
def test_input_changed_in_place_where_autograd_needs_it(
    ask: Callable[[Tensor, object], object], times: int
) -> None:
    """``loss.backward()`` raises there, too, but does not say where."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

    change = False

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.one(x).tanh() + 1
        y = m.two(h * m.inner.gain)
        if change:
            h.zero_()
        return y

    model = Model(run, inner=Gain())
    for _ in range(times - 1):
        ask(model(torch.randn(N, 4)).square().sum(1), model)
    change = True
    losses = model(torch.randn(N, 4)).square().sum(1)
    named = r" of inner\.gain" if times > 1 else ""
    words = rf"losses: a tensor that the backward{named} needs was changed in place .* out of place"
    with pytest.raises(RuntimeError, match=words):
        ask(losses, model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_input_changed_in_place_is_named_in_a_wrapper() -> None:
    """Each time, and the next forward without the change is as good as any."""
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all")
    for step in range(5):
        h = model[0](torch.randn(N, 4)).exp()
        y = model[1](h)
        losses = (y if step in (1, 4) else h.add_(y)).square().sum(1)
        if step in (1, 4):
            opt.backward(losses, DOMAINS)
            opt.step()
            opt.zero_grad()
            continue
        with pytest.raises(RuntimeError, match=r"^losses: .*changed in place"):
            opt.backward(losses, DOMAINS)
        assert all(p.grad is None for p in model.parameters())


def test_reentrant_checkpoint() -> None:
    model = Model(lambda m, x: m.two(checkpoint(m.one, x, use_reentrant=True)))
    x = torch.randn(N, 4, requires_grad=True)
    losses = model(x).square().sum(1)
    words = r"params: .* hides its parameters \(one\.weight, one\.bias\) .* use_reentrant=False"
    for ask in STATISTICS.values():
        with pytest.raises(RuntimeError, match=words):
            ask(losses, model)
    with (
        fastdg.record(model, ["one.weight"]) as tape,
        pytest.raises(RuntimeError, match=r"^params: .*hides"),
    ):
        fastdg.per_sample_norms(tape, losses)
    for params in ("head", ["two.weight", "two.bias"]):
        with fastdg.record(model, params=params) as tape:
            losses = model(x).square().sum(1)
        got = fastdg.per_sample_gradients(tape, losses)
        assert_close(got["two.bias"], 2 * model(x), "two.bias")


@pytest.mark.parametrize("params", ["head", ["one.weight"]])
def test_reentrant_checkpoint_between_a_layer_and_the_losses(params: object) -> None:
    """All that can be seen lies below it, where autograd does not go."""
    model = Model(lambda m, x: checkpoint(m.two, m.one(x), use_reentrant=True))
    losses = model(torch.randn(N, 4)).square().sum(1)
    with (
        fastdg.record(model, params) as tape,
        pytest.raises(RuntimeError, match=r"^params: .*use_reentrant"),
    ):
        fastdg.per_sample_norms(tape, losses)
    whole = Model(lambda m, x: checkpoint(lambda x: m.two(m.one(x)), x, use_reentrant=True))
    losses = whole(torch.randn(N, 4, requires_grad=True)).square().sum(1)
    with (
        fastdg.record(whole, params) as tape,
        pytest.raises(RuntimeError, match=r"^params: .*use_reentrant"),
    ):
        fastdg.per_sample_norms(tape, losses)


def test_fused_attention_of_packed_tensors_has_no_second_derivative() -> None:
    model = Model(
        lambda m, x: m.two(m.inner(m.one(x))[:, 0]),
        inner=nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True),
    )
    x = torch.randn(N, 5, 4)
    losses_of = lambda: model(x).square().sum(1)  # noqa: E731
    packed = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with fastdg.record(model) as tape, sdpa_kernel(SDPBackend.FLASH_ATTENTION), packed:
        losses = losses_of()
    fastdg.domain_moments(tape, losses, DOMAINS)  # the first is fine
    with pytest.raises(RuntimeError, match=r"^create_graph: .*SDPBackend\.MATH"):
        fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)
    # The two ways out: plain attention in the forward alone, and layers after the attention
    with fastdg.record(model) as tape, sdpa_kernel(SDPBackend.MATH):
        losses = losses_of()
    moments = fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)
    torch.stack([v.sum() for v in moments.variance.values()]).sum().backward()
    with fastdg.record(model, params=["two.weight"]) as tape, packed:
        losses = losses_of()
    moments = fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)
    moments.variance["two.weight"].sum().backward()


def test_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has nothing to find, but a rule of a user's own may be wrong."""
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, gain):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, gain)
            return x * gain

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            x, gain = ctx.saved_tensors
            return grad * gain, (grad * x).sum(0)

    gain = nn.Parameter(torch.rand(4))
    model = nn.ParameterDict({"gain": gain})
    losses_of = lambda: Double.apply(torch.ones(N, 4), gain).square().sum(1)  # noqa: E731
    right = True

    @fastdg.register_rule(Double, slot=1)
    def double(node: object, delta: Tensor) -> fastdg.Dense:
        (x, _) = node.saved_tensors  # type: ignore[attr-defined]
        return fastdg.Dense(delta * x if right else 2 * delta * x)

    with fastdg.record(model) as tape:
        fastdg.check(tape, losses_of())
        right = False
        with pytest.raises(RuntimeError, match=r"^params: .*'gain'.*fastdg\.explain"):
            fastdg.check(tape, losses_of())
    opt = fastdg.Fishr(torch.optim.SGD([gain]), params="all")
    with pytest.raises(RuntimeError, match=r"^params: .*add up"):
        fastdg.check(opt.tape, losses_of())
    right = True
    fastdg.check(opt.tape, losses_of())


@pytest.mark.parametrize("check", [True, False])
def test_check_has_no_effect_any_more(check: bool) -> None:
    model = Model(lambda m, x: m.two(m.one(x).transpose(0, 1)).transpose(0, 1))
    with fastdg.record(model, check=check) as tape:
        losses = model(torch.randn(4, 5, 4).transpose(1, 2).transpose(1, 2)).square().sum((1, 2))
    got = fastdg.per_sample_gradients(tape, losses)
    for name, g in one_by_one(losses, trainable(model)).items():
        assert_close(got[name], g, name)


def test_a_compiled_part_has_no_second_derivative() -> None:
    """Its gradients are right, by one call for each sample; a penalty on them is not possible."""
    torch._dynamo.reset()  # after many graphs of one module it would run eagerly
    model = Model(lambda m, x: m.two(m.body(x)), body=nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    x = torch.randn(N, 4)
    true = one_by_one(model(x).square().sum(1), trainable(model))
    model.body = torch.compile(model.body, backend="aot_eager")
    with fastdg.record(model) as tape:
        losses = model(x).square().sum(1)
    with pytest.warns(UserWarning, match=r"^params: .*CompiledFunction"):
        got = fastdg.per_sample_gradients(tape, losses)
    for name, g in got.items():
        assert_close(g, true[name.replace("._orig_mod", "")], name)
    with pytest.raises(RuntimeError, match=r"^create_graph: .*torch\.compile.*fastdg\.compiled"):
        fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)
    head = list(model.two.parameters())
    fastdg.domain_moments(losses, DOMAINS, params=head, create_graph=True)


def test_operations_without_a_second_derivative() -> None:
    """It is said in the first step of a wrapper, not when its anneal ends."""
    words = torch.arange(N)
    bag = nn.EmbeddingBag(N, 4, mode="max")
    model = Model(lambda m, x: m.two(m.bag(words, words) + m.one(x)), bag=bag)
    losses_of = lambda: model(torch.randn(N, 4)).square().sum(1)  # noqa: E731
    losses = losses_of()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    refused = r"create_graph: EmbeddingBag lies between .* no second derivative.*params='head'"
    with fastdg.record(model) as tape, warnings.catch_warnings():
        warnings.filterwarnings("ignore", SLOW, UserWarning)
        fastdg.domain_moments(tape, losses, DOMAINS)  # the first is fine
        with pytest.raises(RuntimeError, match=refused):
            fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)
        opt = fastdg.Fishr(sgd, params="all", anneal_steps=9)
        with pytest.raises(RuntimeError, match=refused):
            opt.backward(losses, DOMAINS)
    fastdg.Fishr(sgd, anneal_steps=0).backward(losses_of(), DOMAINS)
