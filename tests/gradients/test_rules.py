"""Every rule equals the universal way, which knows no operation."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from functions import Scale
from oracle import DOMAINS, NUM_DOMAINS, SLOW, assert_close, assert_statistics, scalar_of
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg.gradients import engine, planner
from fastdg.gradients.rules import registry as rules
from fastdg.gradients.rules.registry import RULES

N = 6
BUILT_IN = frozenset(RULES)


class Uses(nn.Module):
    """Parameters ``w`` and what a forward makes of them, above a layer and below another."""

    def __init__(self, run: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.below = nn.Linear(4, 4)
        self.w = nn.ParameterList([nn.Parameter(torch.randn(s) + 0.1) for s in shapes])
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.below(x), *self.w).sin().reshape(len(x), -1)


X, TOKENS = (4,), (3, 4)  # shapes of a sample
INDEX = torch.tensor([[0, 1, 1], [2, 3, 0], [1, 1, 1], [4, 0, 2], [3, 3, 4], [0, 0, 0]])

ORDER = torch.tensor([5, 3, 17, 0, 1, 9, 16, 2, 4, 6, 8, 7, 15, 10, 14, 11, 13, 12])


def conv(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    return lambda x, w, b: function(x, w, b, **options)


def sequence_first(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *w: run(x.transpose(0, 1), *w).transpose(0, 1)


def shuffled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Rows in an order of their own."""

    def forward(x: Tensor, *w: Tensor) -> Tensor:
        rows = run(x.flatten(0, 1)[ORDER], *w)
        return torch.zeros_like(rows).index_copy(0, ORDER, rows).unflatten(0, (N, 3))

    return forward


USES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], list[tuple[int, ...]]]] = {
    "linear": (F.linear, X, [(3, 4), (3,)]),
    "linear, tokens": (F.linear, TOKENS, [(3, 4), (3,)]),
    "linear, sequence first": (sequence_first(F.linear), TOKENS, [(3, 4), (3,)]),
    "linear, any order": (shuffled(F.linear), TOKENS, [(3, 4), (3,)]),
    "linear, no bias": (F.linear, TOKENS, [(3, 4)]),
    "product": (lambda x, w: x @ w, X, [(4, 3)]),
    "product, tokens": (lambda x, w: x @ w, TOKENS, [(4, 3)]),
    "product from the left": (lambda x, w: (w @ x.t()).t(), X, [(3, 4)]),
    "product, not contiguous": (lambda x, w: x.transpose(1, 2) @ w, TOKENS, [(3, 2)]),
    "product, weight seen otherwise": (lambda x, w: F.linear(x, w[:, :, 0]), X, [(3, 4, 1)]),
    "vector": (lambda x, w: (x @ w).unsqueeze(1), X, [(4,)]),
    "addmm, vector": (lambda x, w, b: torch.addmm(b, x, w), X, [(4, 3), (1, 3)]),
    "batched": (lambda x, w: torch.bmm(x, w.expand(N, 4, 3)), TOKENS, [(4, 3)]),
    "batched, sequence first": (
        sequence_first(lambda x, w: torch.bmm(x, w.expand(3, 4, 3))),
        TOKENS,
        [(4, 3)],
    ),
    "batched, transposed, sequence first": (
        sequence_first(lambda x, w: torch.bmm(x, w.t().expand(3, 4, 3))),
        TOKENS,
        [(3, 4)],
    ),
    "batched, transposed": (lambda x, w: torch.bmm(x, w.t().expand(N, 4, 3)), TOKENS, [(3, 4)]),
    "einsum": (lambda x, w: torch.einsum("nti,iho->ntho", x, w), TOKENS, [(4, 2, 3)]),
    "einsum, weight first": (lambda x, w: torch.einsum("oi,nti->not", w, x), TOKENS, [(3, 4)]),
    "blocks": (
        lambda x, w: torch.einsum("ntki,kio->ntko", x.unflatten(2, (2, 2)), w),
        TOKENS,
        [(2, 2, 3)],
    ),
    "blocks, any order": (
        shuffled(lambda x, w: torch.bmm(x.unflatten(1, (2, 2)).transpose(0, 1), w)[0]),
        TOKENS,
        [(2, 2, 3)],
    ),
    "blocks from the left": (
        lambda x, w: (
            torch.bmm(w, x.flatten(0, 1).unflatten(1, (2, 2)).permute(1, 2, 0))
            .permute(2, 0, 1)
            .unflatten(0, (N, 3))
        ),
        TOKENS,
        [(2, 3, 2)],
    ),
    "convolution": (conv(F.conv1d, padding=1), TOKENS, [(2, 3, 3), (2,)]),
    "convolution, groups": (conv(F.conv1d, groups=3, stride=2), TOKENS, [(6, 1, 2), (6,)]),
    "convolution, transposed": (
        conv(F.conv_transpose1d, stride=2, output_padding=1),
        TOKENS,
        [(3, 2, 3), (2,)],
    ),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), TOKENS, [(4,), (4,)]),
    "layer norm, sequence first": (
        sequence_first(lambda x, w, b: F.layer_norm(x, (4,), w, b)),
        TOKENS,
        [(4,), (4,)],
    ),
    "layer norm, two dimensions": (
        lambda x, w, b: F.layer_norm(x, (3, 4), w, b),
        TOKENS,
        [(3, 4), (3, 4)],
    ),
    "rms norm": (lambda x, w: F.rms_norm(x, (4,), w), TOKENS, [(4,)]),
    "group norm": (
        lambda x, w, b: F.group_norm(x.transpose(1, 2), 2, w, b),
        TOKENS,
        [(4,), (4,)],
    ),
    "batch norm": (
        lambda x, w, b: F.batch_norm(x, torch.ones(4) / 3, torch.ones(4) * 2, w, b),
        X,
        [(4,), (4,)],
    ),
    "batch norm, images": (
        lambda x, w, b: F.batch_norm(x, torch.ones(3) / 3, torch.ones(3) * 2, w, b),
        TOKENS,
        [(3,), (3,)],
    ),
    "table": (lambda x, w: x + F.embedding(INDEX, w), TOKENS, [(5, 4)]),
    "table, padding": (lambda x, w: x + F.embedding(INDEX, w, padding_idx=1), TOKENS, [(5, 4)]),
    "table, tokens first": (
        lambda x, w: x + F.embedding(INDEX.t(), w).transpose(0, 1),
        TOKENS,
        [(5, 4)],
    ),
    "sum": (lambda x, a, b: (x + a) + (b + x), TOKENS, [(4,), (3, 1)]),
    "sum, times a number": (lambda x, a: torch.add(x, a, alpha=0.3), TOKENS, [(1, 3, 4)]),
    "difference": (lambda x, a, b: (x - a) * (b - x), TOKENS, [(4,), (3, 1)]),
    "scale": (lambda x, a, b: (x * a) + (b * x), TOKENS, [(4,), ()]),
    "scale, sequence first": (sequence_first(lambda x, a: x * a), TOKENS, [(4,)]),
    "quotient": (lambda x, a, b: x / (a.square() + 1) + b / (x.square() + 1), TOKENS, [(4,), (4,)]),
    "quotient of parameters": (lambda x, a, b: x / a + b / x.exp(), TOKENS, [(4,), (4,)]),
    "addcmul": (
        lambda x, a, b, c: torch.addcmul(a, b, x, value=0.5) + torch.addcmul(x, x, c),
        TOKENS,
        [(4,), (4,), (4,)],
    ),
    "addcmul, second": (lambda x, a: torch.addcmul(x, a, x, value=2.0), TOKENS, [(4,)]),
    "where": (
        lambda x, a, b: torch.where(x > 0, a, x) + torch.where(x > 0.1, x, b),
        TOKENS,
        [(4,), (3, 1)],
    ),
    "slopes": (lambda x, a: F.prelu(x, a), TOKENS, [(3,)]),
    "one slope": (lambda x, a: F.prelu(x, a), TOKENS, [(1,)]),
    "expanded": (
        lambda x, a: torch.cat([a.expand(len(x), -1, -1), x], 1),
        TOKENS,
        [(1, 1, 4)],
    ),
    "repeated": (lambda x, a: x.flatten() + a.repeat(N), X, [(4,)]),
    "repeated, tokens": (lambda x, a: x + a.repeat(N, 1, 1), TOKENS, [(1, 3, 4)]),
    "repeated along several": (lambda x, a: x + a.repeat(N, 3, 2), TOKENS, [(2,)]),
    "repeated, sequence first": (
        sequence_first(lambda x, a: x + a.repeat(1, N, 2)),
        TOKENS,
        [(3, 1, 2)],
    ),
    "used twice": (lambda x, a: F.linear(F.linear(x, a).tanh(), a), TOKENS, [(4, 4)]),
    "a part of it": (lambda x, a: F.linear(x, a[:3]), TOKENS, [(5, 4)]),
    "shared by two rules": (lambda x, a: F.linear(x, a) * a[0], X, [(4, 4)]),
}
# Of layouts that have no rule of their own but share one
SERVED = ("einsum", "blocks", "repeated", "batched")


def model_of(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(3)
    run, sample, shapes = USES[name]
    x = torch.randn(N, *sample)
    return Uses(run, *shapes), lambda model: model(x).square().sum(1)


def universal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "RULES", {})
    monkeypatch.setattr(engine, "_plans", OrderedDict())


@pytest.mark.parametrize("name", USES)
def test_a_rule_and_the_universal_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, losses_of = model_of(name)

    def statistics() -> dict[str, Tensor]:
        losses, found = losses_of(model), {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", SLOW, UserWarning)
            samples = fastdg.per_sample_gradients(losses, params=model)
            moments = fastdg.domain_moments(
                losses, DOMAINS, params=model, num_domains=NUM_DOMAINS, create_graph=True
            )
            means = fastdg.domain_gradients(losses, DOMAINS, params=model, num_domains=NUM_DOMAINS)
            found["norms"] = fastdg.per_sample_norms(losses, params=model)
        parameters = list(model.parameters())
        second = torch.autograd.grad(scalar_of(moments.variance), parameters, allow_unused=True)
        for k, (p, g) in enumerate(zip(parameters, second, strict=True)):
            found[f"second {k}"] = torch.zeros_like(p) if g is None else g
        for kind, table in (
            ("samples", samples),
            ("variance", moments.variance),
            ("mean", moments.mean),
            ("domains", means),
        ):
            found.update({f"{kind} {key}": value for key, value in table.items()})
        return found

    by_rule = statistics()
    universal(monkeypatch)
    plainly = statistics()
    assert by_rule.keys() == plainly.keys()
    for key, value in by_rule.items():
        assert_close(value, plainly[key], key)


@pytest.mark.parametrize(
    "name", ["linear, any order", "layer norm", "table", "used twice", "where"]
)
def test_the_universal_way_and_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, losses_of = model_of(name)
    universal(monkeypatch)
    assert_statistics(model, losses_of, slow=True)


def test_every_rule_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule serves in some of the cases above, but those that a CPU never needs."""
    used: set[tuple[str, int]] = set()
    rule_for = planner.rule_for

    def seen(use: rules.Use) -> rules.BoundRule | None:
        rule = rule_for(use)
        if rule is not None:
            used.add((use.node.name(), use.slot))
        return rule

    monkeypatch.setattr(planner, "rule_for", seen)
    monkeypatch.setattr(engine, "_plans", OrderedDict())
    for name in USES:
        model, losses_of = model_of(name)
        fastdg.explain(losses_of(model), model)
    # Of bags of words: test_bags.py
    names = ("Cudnn", "EmbeddingBag", "FusedRmsNorm", "fastdg")
    elsewhere = {key for key in BUILT_IN if any(name in key[0] for name in names)}
    assert BUILT_IN - used - elsewhere == set()


@pytest.mark.parametrize("name", [name for name in USES if name.startswith(SERVED)])
def test_no_operation_is_called_for_each_domain(name: str) -> None:
    model, losses_of = model_of(name)
    losses = losses_of(model)
    plan = engine.plan_gradients(losses, dict(model.named_parameters())).plan
    assert not plan.slow


@pytest.mark.parametrize("batches", [True, False], ids=["one after the other", "each alone"])
def test_rules_hold_no_graph(batches: bool) -> None:
    """A plan that is remembered serves the next graph, whose tensors are others."""
    model, losses_of = model_of("linear, tokens")
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        if batches:
            assert_statistics(model, losses_of)
        else:
            assert_statistics(*model_of("linear, tokens"))


# -- rules of users --


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], rules.Rule]:
    """A registry that is put back, and no plan made before."""
    own = dict(RULES)
    monkeypatch.setattr(rules, "RULES", own)
    monkeypatch.setattr(engine, "_plans", OrderedDict())
    return own


@pytest.mark.parametrize("retain", [True, False])
def test_a_rule_of_the_users_own(registry: object, retain: bool) -> None:
    calls: list[str] = []

    @fastdg.register_rule(Scale, slot=1)
    def scale(node: object, delta: Tensor) -> fastdg.Dense:
        (x, _) = node.saved_tensors  # type: ignore[attr-defined]
        calls.append(node.name())  # type: ignore[attr-defined]
        return fastdg.Dense(delta * x)

    model = Uses(lambda x, a: Scale.apply(x, a), (4,))
    x = torch.randn(N, 4)
    assert_statistics(model, lambda m: m(x).square().sum(1))  # no warning
    assert calls
    assert set(calls) == {"ScaleBackward"}
    losses = model(x).square().sum(1)
    assert "ScaleBackward" not in str(fastdg.explain(losses, model))
    assert {r.parameter: r.way for r in fastdg.explain(losses, model).rows}["w.0"] == "rule"
    norms = fastdg.per_sample_norms(losses, params=model, retain_graph=retain)
    assert norms.shape == (N,)


def test_a_rule_for_an_operation_by_name(registry: object) -> None:
    @fastdg.register_rule("TrilinearBackward0", slot=1)
    def bilinear(node: object, delta: Tensor) -> fastdg.Dense:
        one, two = (node._saved_i1, node._saved_i3)  # type: ignore[attr-defined]
        one, two = (t.reshape(len(delta), -1) for t in (one, two))
        return fastdg.Dense(torch.einsum("no,ni,nj->noij", delta, one, two))

    model = Uses(lambda x, w: F.bilinear(x, x.flip(1), w), (2, 4, 4))
    x = torch.randn(N, 4)
    assert_statistics(model, lambda m: m(x).square().sum(1))


def test_a_rule_serves_what_is_made_of_a_parameter(registry: object) -> None:
    """Autograd continues from its gradients to the parameter."""
    calls: list[Tensor] = []

    @fastdg.register_rule(Scale, slot=1)
    def scale(node: object, delta: Tensor) -> fastdg.Dense:
        calls.append(delta)
        return fastdg.Dense(delta * node.saved_tensors[0])  # type: ignore[attr-defined]

    model, x = Uses(lambda x, a: Scale.apply(x, a[0].exp()), (2, 4)), torch.randn(N, 4)
    assert_statistics(model, lambda m: m(x).square().sum(1))
    assert calls


def test_a_rule_is_not_asked_where_rows_are_not_samples(registry: object) -> None:
    @fastdg.register_rule(Scale, slot=1)
    def never(node: object, delta: Tensor) -> fastdg.Dense:
        raise AssertionError

    def folded(x: Tensor, a: Tensor) -> Tensor:
        rows = Scale.apply(x.transpose(0, 1).flatten(0, 1), a)
        return rows.view(3, N, 4).transpose(0, 1)

    model, x = Uses(folded, (4,)), torch.randn(N, 3, 4)
    assert_statistics(model, lambda m: m(x).square().flatten(1).sum(1), slow=True)


@pytest.mark.parametrize("operation", [F.linear, nn.Linear, 3, Scale.apply])
def test_what_a_rule_cannot_be_for(operation: object) -> None:
    with pytest.raises(TypeError, match=r"^operation: "):
        fastdg.register_rule(operation, slot=1)  # type: ignore[arg-type]


def test_a_rule_for_another_function_of_the_same_name(registry: object) -> None:
    """Two packages may give their functions one name."""

    def another() -> type[torch.autograd.Function]:
        class Scale(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, gain):  # type: ignore[no-untyped-def]
                ctx.save_for_backward(x, gain)
                return x * gain.exp()

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                x, gain = ctx.saved_tensors
                return grad * gain.exp(), (grad * x * gain.exp()).sum(0)

        return Scale

    @fastdg.register_rule(Scale, slot=1)
    def scale(node: object, delta: Tensor) -> fastdg.Dense:
        return fastdg.Dense(delta * node.saved_tensors[0])  # type: ignore[attr-defined]

    other, x = another(), torch.randn(N, 4)
    assert_statistics(Uses(other.apply, (4,)), lambda m: m(x).square().sum(1), slow=True)

    @fastdg.register_rule(other, slot=1)
    def exponential(node: object, delta: Tensor) -> fastdg.Dense:
        x, gain = node.saved_tensors  # type: ignore[attr-defined]
        return fastdg.Dense(delta * x * gain.exp())

    for apply in (other.apply, Scale.apply):  # known at once, whatever was planned without it
        assert_statistics(Uses(apply, (4,)), lambda m: m(x).square().sum(1))
