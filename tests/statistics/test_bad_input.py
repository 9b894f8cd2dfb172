"""Bad input: an error that names the argument, what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg.domains import partition

N = 6
DOMAINS = torch.tensor([0, 1, 0, 1, 2, 0])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def recorded(params: object = "all") -> tuple[fastdg.Tape, Tensor]:
    model = net()
    with fastdg.record(model, params=params) as tape:
        losses = F.cross_entropy(model(torch.randn(N, 4)), torch.zeros(N).long(), reduction="none")
    return tape, losses


def cases() -> dict[str, tuple[Callable[..., object], type[Exception], str]]:
    """name -> (a change of (tape, losses, domains), the error, what its message says)."""
    return {
        "scalar losses": (
            lambda t, losses, d: (t, losses.mean(), d),
            ValueError,
            r"^losses: .*got \(\).*reduction='none'",
        ),
        "losses with two dimensions": (
            lambda t, losses, d: (t, losses.view(3, 2), d),
            ValueError,
            r"^losses: .*got \(3, 2\)",
        ),
        "no losses": (lambda t, losses, d: (t, losses[:0], d[:0]), ValueError, "^losses: .*empty"),
        "losses as numbers": (
            lambda t, losses, d: (t, losses.tolist(), d),
            TypeError,
            "^losses: .*got list",
        ),
        "integer losses": (
            lambda t, losses, d: (t, losses.detach().long(), d),
            TypeError,
            r"^losses: .*got torch\.int64",
        ),
        "detached losses": (
            lambda t, losses, d: (t, losses.detach(), d),
            ValueError,
            r"^losses: .*graph.*torch\.no_grad",
        ),
        "losses of another model": (
            lambda t, losses, d: (t, recorded()[1], d),
            RuntimeError,
            r"^losses: .*fastdg\.func",
        ),
        "domains too short": (
            lambda t, losses, d: (t, losses, d[:4]),
            ValueError,
            r"^domains: .*got shape \(4,\)",
        ),
        "domains one-hot": (
            lambda t, losses, d: (t, losses, F.one_hot(d)),
            ValueError,
            r"^domains: .*got shape \(6, 3\)",
        ),
        "domains as a list": (
            lambda t, losses, d: (t, losses, d.tolist()),
            TypeError,
            r"^domains: .*got list.*torch\.as_tensor",
        ),
        "float domains": (
            lambda t, losses, d: (t, losses, d.float()),
            TypeError,
            r"^domains: .*got dtype torch\.float32.*long\(\)",
        ),
        "bool domains": (
            lambda t, losses, d: (t, losses, d > 0),
            TypeError,
            r"^domains: .*got dtype torch\.bool",
        ),
        "negative domains": (
            lambda t, losses, d: (t, losses, d - 1),
            ValueError,
            "^domains: .*got -1",
        ),
        "domains on another device": (
            lambda t, losses, d: (t, losses, d.to("meta")),
            ValueError,
            "^domains: .*got meta",
        ),
        "no tape": (
            lambda t, losses, d: (net(), losses, d),
            TypeError,
            r"tape: .*got Sequential.*fastdg\.record\(model\)",
        ),
    }


@pytest.mark.parametrize(("change", "error", "message"), cases().values(), ids=cases().keys())
@pytest.mark.parametrize(
    "function", [fastdg.domain_moments, fastdg.domain_gradients, fastdg.domain_gram]
)
def test_by_domain(function: Callable[..., object], change, error, message) -> None:  # type: ignore[no-untyped-def]
    tape, losses = recorded()
    with pytest.raises(error, match=message):
        function(*change(tape, losses, DOMAINS))
    function(tape, losses, DOMAINS)  # nothing is left half done


@pytest.mark.parametrize(
    "function", [fastdg.per_sample_gradients, fastdg.per_sample_norms, fastdg.check]
)
def test_by_sample(function: Callable[..., object]) -> None:
    tape, losses = recorded()
    with pytest.raises(ValueError, match=r"^losses: .*reduction='none'"):
        function(tape, losses.mean())
    with pytest.raises(TypeError, match=r"^(params|tape): "):
        function(None, losses)


def test_number_of_domains() -> None:
    tape, losses = recorded()
    for num_domains, error, message in (
        (2, ValueError, "^domains: .*num_domains=2.*got 2.*num_domains="),
        (0, ValueError, "^num_domains: .*got 0"),
        (2.5, TypeError, "^num_domains: .*got float"),
    ):
        with pytest.raises(error, match=message):
            fastdg.domain_moments(tape, losses, DOMAINS, num_domains=num_domains)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    tape, losses = recorded()
    expected = fastdg.domain_gram(tape, losses, DOMAINS)
    assert torch.equal(fastdg.domain_gram(tape, losses, DOMAINS.to(dtype)), expected)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ("heads", ValueError, "^params: .*got 'heads'"),
        ("2.weight", ValueError, r"for that parameter alone \['2\.weight'\]"),
        (["2.wieght"], ValueError, r"params: .*got '2\.wieght'.*\['2\.weight'"),
        ([torch.zeros(5, 4)], ValueError, r"params: .*tensor of shape \(5, 4\)"),
        ([0], TypeError, "^params: .*got int"),
        ([], ValueError, "^params: .*got an empty list"),
        (3, TypeError, "^params: .*got int"),
    ],
)
def test_params(params: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), fastdg.record(net(), params=params):
        pytest.fail("the mistake is found before the model runs")


def test_params_that_select_nothing() -> None:
    tape, losses = recorded(lambda name, p: False)
    with pytest.raises(RuntimeError, match=r"^params: .*'0\.bias'"):
        fastdg.per_sample_gradients(tape, losses)


def test_model() -> None:
    with pytest.raises(TypeError, match=r"^model: .*got list"):
        fastdg.record(list(net().parameters())).__enter__()
    with pytest.raises(ValueError, match=r"model: .*requires a gradient"):
        fastdg.record(net().requires_grad_(False)).__enter__()


def test_forward_under_torch_func() -> None:
    """Inside the user's own transform there is nothing to record, and nothing breaks."""
    model = net()
    x = torch.randn(N, 4)
    with fastdg.record(model) as tape:
        call = torch.func.functional_call
        torch.func.grad(lambda p: call(model, p, (x,)).sum())(dict(model.named_parameters()))
        losses = model(x).square().sum(1)
    assert set(fastdg.per_sample_gradients(tape, losses)) == dict(model.named_parameters()).keys()


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"^backend: "):
        fastdg.use_backend("numpy").__enter__()


def test_domains_given_apart_from_a_model() -> None:
    parts = partition(torch.tensor([2, 0, 2, 5]), torch.zeros(4), 7)
    assert parts.order.tolist() == [1, 0, 2, 3]
    assert parts.offsets.tolist() == [0, 1, 1, 3, 3, 3, 4, 4]
    assert parts.count.tolist() == [1, 0, 2, 0, 0, 1, 0]
    blocks = parts.grouped(2)
    assert blocks.num_domains == 14
    assert blocks.domains.tolist() == [4, 5, 0, 1, 4, 5, 10, 11]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_complex_layers(check: bool) -> None:
    model = nn.Linear(3, 2).to(torch.complex64)
    with fastdg.record(model, check=check) as tape:
        losses = model(torch.randn(4, 3, dtype=torch.complex64)).abs().square().sum(1)
    with pytest.raises(TypeError, match=r"^params: .*view_as_complex"):
        fastdg.domain_moments(tape, losses, torch.tensor([0, 0, 1, 1]))


def test_a_default_device_is_not_asked() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 2, groups=1), nn.Flatten(), nn.Linear(4, 2))
    with fastdg.record(model) as tape:
        losses = model(torch.randn(4, 1, 2, 2)).square().sum(1)
    with torch.device("meta"):
        moments = fastdg.domain_moments(
            tape, losses, torch.zeros(4, dtype=torch.int64, device="cpu")
        )
    assert all(v.device.type == "cpu" for v in moments.variance.values())


def test_call_forms() -> None:
    """A tape, or losses and params=: a model, an optimizer, parameters, by place or by keyword."""
    model = net()
    losses = model(torch.randn(N, 4)).square().sum(1)
    with fastdg.record(model) as tape:
        expected = fastdg.domain_gram(tape, losses, DOMAINS)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for params in (
        model,
        sgd,
        fastdg.Fishr(torch.optim.SGD(model.named_parameters(), lr=0.1), params="all"),
        list(model.parameters()),
        model.parameters(),
        dict(model.named_parameters()),
        tape,
    ):
        got = fastdg.domain_gram(losses, DOMAINS, params=params)
        torch.testing.assert_close(got, expected)
    got = fastdg.domain_gram(losses=losses, domains=DOMAINS, params=model)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(fastdg.domain_gram(tape=tape, losses=losses, domains=DOMAINS), got)
    one = fastdg.per_sample_gradients(losses, params=model[2].bias)
    assert {name: g.shape for name, g in one.items()} == {"params[0]": (N, 3)}
    named = fastdg.domain_moments(losses, DOMAINS, params={"bias": model[2].bias})
    assert set(named.variance) == {"bias"}
    assert set(fastdg.per_sample_gradients(losses, params=sgd)) == {
        f"param_groups[0][{k}]" for k in range(4)
    }


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda t, ls: fastdg.domain_gram(ls, DOMAINS), TypeError, "^params: .*params=model"),
        (
            lambda t, ls: fastdg.domain_gram(t, ls, DOMAINS, params=net()),
            TypeError,
            "^params: .*got both",
        ),
        (lambda t, ls: fastdg.domain_gram(ls, params=net()), TypeError, "^domains: "),
        (lambda t, ls: fastdg.domain_gram(t, ls), TypeError, "^domains: "),
        (lambda t, ls: fastdg.per_sample_norms(ls, params=3), TypeError, "^params: .*got int"),
        (lambda t, ls: fastdg.per_sample_norms(ls, params="all"), TypeError, "^params: .*got str"),
        (lambda t, ls: fastdg.per_sample_norms(ls, params=[net()]), TypeError, "^params: "),
        (
            lambda t, ls: fastdg.per_sample_norms(ls, params=[]),
            ValueError,
            r"params: .*requires a gradient",
        ),
        (
            lambda t, ls: fastdg.per_sample_norms(ls, params=net().requires_grad_(False)),
            ValueError,
            "params: .*requires a gradient",
        ),
        (lambda t, ls: fastdg.explain(ls.sum(), net()), ValueError, "^losses: .*reduction='none'"),
        (lambda t, ls: fastdg.explain(ls, net()), RuntimeError, "^losses: .*tracked parameters"),
    ],
)
def test_call_forms_that_are_none(
    ask: Callable[[fastdg.Tape, Tensor], object], error: type[Exception], message: str
) -> None:
    tape, losses = recorded()
    with pytest.raises(error, match=message):
        ask(tape, losses)


def test_a_forward_is_known_wherever_it_ran() -> None:
    """Before `record`, after it, and beside a forward without a graph."""
    model, x = net(), torch.randn(N, 4)
    before = model(x).square().sum(1)
    with fastdg.record(model) as tape, torch.no_grad():
        model(x)
    after = model(x).square().sum(1)
    one, two = (fastdg.per_sample_norms(tape, losses) for losses in (before, after))
    assert torch.equal(one, two)


def test_a_call_without_params_or_domains_shows_the_right_call() -> None:
    model = net()
    losses = F.cross_entropy(model(torch.randn(N, 4)), torch.zeros(N).long(), reduction="none")
    alone = r".*Call it with losses, params=model\."
    with pytest.raises(TypeError, match=r"^params: .*got a Sequential without the name" + alone):
        fastdg.per_sample_norms(losses, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^domains: expected none" + alone):
        fastdg.per_sample_norms(losses, DOMAINS, params=model)
    for given in ((), (model,)):
        with pytest.raises(TypeError, match=r"^params: .*losses, domains, params=model\."):
            fastdg.domain_gram(losses, DOMAINS, *given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^domains: .*got none.*losses, domains, params=model\."):
        fastdg.domain_gram(losses, params=model)


def test_moments_print_shapes_in_place_of_all_entries() -> None:
    model = net()
    losses = F.cross_entropy(model(torch.randn(N, 4)), torch.zeros(N).long(), reduction="none")
    shown = repr(fastdg.domain_moments(losses, DOMAINS, params=model))
    assert "'0.weight': (3, 5, 4)" in shown and "count=tensor([3, 2, 1])" in shown
    assert shown.count("tensor") == 1
