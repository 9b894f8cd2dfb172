"""Never silently wrong: what cannot be right is refused, in words that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import DOMAINS, assert_close, one_by_one, trainable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint

import fastdg

N = 6


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def refused(
    model: nn.Module,
    losses_of: Callable[[], Tensor],
    error: type[Exception],
    *words: str,
    params: object = "all",
) -> None:
    """Every statistic and the check asked for raise, in these words."""
    with fastdg.record(model, params=params) as tape:
        losses = losses_of()
    for ask in (
        lambda: fastdg.domain_moments(tape, losses, DOMAINS),
        lambda: fastdg.per_sample_gradients(tape, losses),
        lambda: fastdg.check(tape, losses),
    ):
        with pytest.raises(error) as caught:
            ask()
        for word in words:
            assert word in str(caught.value), str(caught.value)


class Model(nn.Module):
    """Two layers and what is done between them."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)
        for name, module in more.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def squares(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: model(x).square().flatten(1).sum(1)


def test_weight_used_outside_its_module_too() -> None:
    model = Model(lambda m, x: m.two(F.linear(m.one(x).tanh(), m.one.weight)))
    refused(model, squares(model, torch.randn(N, 4)), RuntimeError, "'one.weight'", "F.linear")


def test_weight_used_outside_its_module_only() -> None:
    model = Model(lambda m, x: m.two(F.linear(x, m.one.weight)))
    refused(model, squares(model, torch.randn(N, 4)), RuntimeError, "'one.weight'", "F.linear")


def test_weight_penalty_inside_the_losses() -> None:
    model = Model(lambda m, x: m.two(m.one(x)))
    losses = lambda: squares(model, torch.randn(N, 4))() + model.two.weight.square().sum()  # noqa: E731
    refused(model, losses, RuntimeError, "'two.weight'")


def test_what_is_refused_can_be_left_out() -> None:
    model = Model(lambda m, x: m.two(F.linear(m.one(x).tanh(), m.one.weight)))
    x = torch.randn(N, 4)
    with fastdg.record(model, params=["two.weight", "one.bias"]) as tape:
        losses = model(x).square().sum(1)
    got = fastdg.per_sample_gradients(tape, losses)
    for name, g in one_by_one(losses, {n: trainable(model)[n] for n in got}).items():
        assert_close(got[name], g, name)


def test_check_can_be_switched_off() -> None:
    for run in (
        lambda m, x: m.two(F.linear(m.one(x).tanh(), m.one.weight)),
        lambda m, x: m.two(F.linear(x, m.one.weight)),
    ):
        model = Model(run)
        with fastdg.record(model, check=False) as tape:
            losses = squares(model, torch.randn(N, 4))()
        fastdg.domain_moments(tape, losses, DOMAINS)
        with pytest.raises(RuntimeError, match=r"one\.weight"):
            fastdg.check(tape, losses)


def test_check_passes_when_all_is_well() -> None:
    model = Model(lambda m, x: m.two(m.one(x)))
    with fastdg.record(model) as tape:
        losses = squares(model, torch.randn(N, 4))()
    fastdg.check(tape, losses)
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters()), params="all")
    losses = squares(model, torch.randn(N, 4))()
    fastdg.check(opt.tape, losses)


@pytest.mark.parametrize("tokens", [N, 2 * N], ids=["as many as samples", "twice as many"])
def test_tokens_folded_time_major(tokens: int) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = m.one(x.transpose(0, 1).reshape(t * n, -1)).tanh()
        return m.two(y.view(t, n, -1).mean(0))

    model = Model(run)
    refused(model, squares(model, torch.randn(N, tokens, 4)), RuntimeError, "'one.", "folded")


@pytest.mark.parametrize("length", [N, 2 * N])
def test_sequence_first(length: int) -> None:
    model = Model(lambda m, x: m.two(m.one(x.transpose(0, 1)).tanh().mean(0)))
    refused(model, squares(model, torch.randn(N, length, 4)), RuntimeError, "first dimension")


def test_sequence_first_of_another_length() -> None:
    model = Model(lambda m, x: m.two(m.one(x.transpose(0, 1)).tanh().mean(0)))
    refused(
        model,
        squares(model, torch.randn(N, 5, 4)),
        ValueError,
        "first dimension is 5",
        "batch_first",
    )


def test_transformer_that_is_sequence_first() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0)
    model = Model(lambda m, x: m.two(m.layer(x.transpose(0, 1)).mean(0)), layer=layer)
    refused(model, squares(model, torch.randn(N, 5, 4)), ValueError, "batch_first=True")


def test_positions_shared_by_all_samples() -> None:
    table = nn.Embedding(5, 4)
    model = Model(lambda m, x: m.two((x + m.table(torch.arange(5))).tanh().sum(1)), table=table)
    x = torch.randn(N, 5, 4)
    refused(model, squares(model, x), ValueError, "table.weight", "positions.expand(N, -1)")
    model.run = lambda m, x: m.two((x + m.table(torch.arange(5).expand(N, -1))).tanh().sum(1))
    with fastdg.record(model) as tape:
        losses = squares(model, x)()
    got = fastdg.per_sample_gradients(tape, losses)
    for name, g in one_by_one(losses, {n: trainable(model)[n] for n in got}).items():
        assert_close(got[name], g, name)


def test_a_loss_a_token() -> None:
    model = Model(lambda m, x: m.two(m.one(x).tanh()))
    with fastdg.record(model) as tape:
        losses = model(torch.randn(N, 5, 4)).square().sum(2).flatten()
    with pytest.raises(ValueError, match="there are 30 losses"):
        fastdg.per_sample_gradients(tape, losses)


def test_losses_over_pairs() -> None:
    model = Model(lambda m, x: m.two(m.one(x).tanh()))

    def losses() -> Tensor:
        z = F.normalize(model(torch.randn(N, 4)), dim=1)
        return -F.log_softmax(z @ z.t(), 1).diagonal()

    refused(model, losses, RuntimeError, "samples influence each other")


BATCH_NORMS = {
    "plain": lambda: nn.BatchNorm1d(4),
    "no affine": lambda: nn.BatchNorm1d(4, affine=False),
    "frozen affine": lambda: nn.BatchNorm1d(4).requires_grad_(False),
    "no running statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
}


@pytest.mark.parametrize("make", BATCH_NORMS.values(), ids=BATCH_NORMS.keys())
def test_batch_norm_that_mixes_samples(make: Callable[[], nn.Module]) -> None:
    model = Model(lambda m, x: m.two(m.norm(m.one(x)).tanh()), norm=make())
    words = ("BatchNorm1d", "eval()", "GroupNorm", "params='head'")
    refused(model, squares(model, torch.randn(N, 4)), ValueError, *words)
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all")
    with pytest.raises(ValueError, match="normalises over the batch"):
        opt.backward(squares(model, torch.randn(N, 4))(), DOMAINS)
    assert all(p.grad is None for p in model.parameters())


def test_batch_norm_that_starts_to_mix_later() -> None:
    model = Model(
        lambda m, x: m.two(m.norm(m.one(x)).tanh()), norm=nn.BatchNorm1d(4).requires_grad_(False)
    ).eval()
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all")
    opt.backward(squares(model, torch.randn(N, 4))(), DOMAINS)
    opt.step()
    model.train()
    with pytest.raises(ValueError, match="normalises over the batch"):
        opt.backward(squares(model, torch.randn(N, 4))(), DOMAINS)


@pytest.mark.parametrize("params", ["head", ["two.weight", "two.bias"]])
def test_layers_after_batch_norm_are_fine(params: object) -> None:
    model = Model(lambda m, x: m.two(m.norm(m.one(x)).tanh()), norm=nn.BatchNorm1d(4))
    with fastdg.record(model, params=params) as tape:
        losses = squares(model, torch.randn(N, 4))()
    got = fastdg.per_sample_gradients(tape, losses)
    assert set(got) == {"two.weight", "two.bias"}
    for name, g in one_by_one(losses, {n: trainable(model)[n] for n in got}).items():
        assert_close(got[name], g, name)


def test_batch_norm_beside_the_tracked_layers_is_fine() -> None:
    """A branch with batch statistics, and one without: only the first is out of reach."""
    model = Model(
        lambda m, x: m.two(m.one(x).tanh()) + m.norm(m.other(x)),
        norm=nn.BatchNorm1d(3),
        other=nn.Linear(4, 3),
    )
    with fastdg.record(model, params=["one.weight", "two.weight"]) as tape:
        losses = squares(model, torch.randn(N, 4))()
    # the other branch enters every loss, but not through the layers that are tracked
    got = fastdg.per_sample_gradients(tape, losses)
    for name, g in one_by_one(losses, {n: trainable(model)[n] for n in got}).items():
        assert_close(got[name], g, name)


def test_input_changed_in_place_after_the_layer() -> None:
    class Shift(nn.Module):
        """Its own backward does not need its input, so autograd would not notice."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = x.clone()
        y = m.inner(x)
        x.zero_()
        return m.two(y)

    model = Model(run, inner=Shift())
    words = ("inner.shift", "in place", "out of place")
    refused(model, squares(model, torch.randn(N, 4)), RuntimeError, *words)


def test_module_that_changes_its_input_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.gain)

    model = Model(lambda m, x: m.two(m.inner(m.one(x)).tanh()), inner=InPlace())
    refused(model, squares(model, torch.randn(N, 4)), RuntimeError, "'inner.gain'", "in place")


def test_module_that_passes_its_input_through() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = Model(lambda m, x: m.two(m.inner(m.one(x)).tanh()), inner=Optional())
    with fastdg.record(model) as tape:
        losses = squares(model, torch.randn(N, 4))()
    got = fastdg.per_sample_gradients(tape, losses)
    assert "inner.gain" not in got
    for name, g in one_by_one(losses, {n: trainable(model)[n] for n in got}).items():
        assert_close(got[name], g, name)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.gain, 0.5, self.training)


@pytest.mark.parametrize(
    "make",
    [
        Noisy,
        lambda: nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True),
        lambda: nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True),
    ],
    ids=["own", "attention", "lstm"],
)
def test_dropout_inside_a_module_without_a_rule(make: Callable[[], nn.Module]) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        if isinstance(m.inner, nn.MultiheadAttention):
            x = m.inner(x, x, x)[0]
        elif isinstance(m.inner, nn.LSTM):
            x = m.inner(x)[0]
        else:
            x = m.inner(x)
        return m.two(m.one(x)).sum(1)

    model = Model(run, inner=make())
    x = torch.randn(N, 3, 4)
    refused(model, squares(model, x), RuntimeError, "inner.", "dropout", "eval")
    with fastdg.record(model, params=["one.weight", "two.bias"]) as tape:  # the advice holds
        losses = squares(model, x)()
    got = fastdg.per_sample_gradients(tape, losses)
    for name, g in one_by_one(losses, {n: trainable(model)[n] for n in got}).items():
        assert_close(got[name], g, name)


def test_module_torch_func_cannot_follow() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain if float(x.sum()) > 0 else x

    model = Model(lambda m, x: m.two(m.inner(x)), inner=Branching())
    refused(
        model,
        squares(model, torch.rand(N, 4)),
        RuntimeError,
        "inner.gain",
        "register_rule",
        "params=",
    )


def test_packed_sequences() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(x, torch.tensor([3, 3, 2, 2, 1, 1]), batch_first=True)
        return m.two(m.inner(packed)[1][0][0])

    model = Model(run, inner=nn.LSTM(4, 4, batch_first=True))
    refused(model, squares(model, torch.rand(N, 3, 4)), ValueError, "inner.", "padded")


def test_one_sample_without_a_batch_dimension() -> None:
    for layer, x in (
        (nn.Linear(4, 1), torch.randn(4)),
        (nn.Conv1d(2, 1, 3), torch.randn(2, 3)),
        (nn.LayerNorm(4), torch.randn(4)),
    ):
        with fastdg.record(layer) as tape:
            losses = layer(x).flatten()[:1]
        with pytest.raises(ValueError, match="expected a batch"):
            fastdg.per_sample_gradients(tape, losses)


def test_embedding_scaled_by_frequency() -> None:
    table = nn.Embedding(4, 3, scale_grad_by_freq=True)
    with fastdg.record(table) as tape:
        losses = table(torch.arange(N) % 4).square().sum(1)
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        fastdg.per_sample_gradients(tape, losses)


def test_reentrant_checkpoint() -> None:
    model = Model(lambda m, x: m.two(checkpoint(m.one, x, use_reentrant=True)))
    x = torch.randn(N, 4, requires_grad=True)
    with fastdg.record(model) as tape:
        losses = model(x).square().sum(1)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fastdg.per_sample_gradients(tape, losses)
    with fastdg.record(model, params="head") as tape:
        losses = model(x).square().sum(1)
    got = fastdg.per_sample_gradients(tape, losses)
    assert_close(got["two.bias"], 2 * model(x), "two.bias")


def test_fused_attention_has_no_second_derivative() -> None:
    model = Model(
        lambda m, x: m.two(m.inner(m.one(x))[:, 0]),
        inner=nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True),
    )
    x = torch.randn(N, 5, 4)
    with fastdg.record(model) as tape, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        losses = squares(model, x)()
    fastdg.domain_moments(tape, losses, DOMAINS)  # the first is fine
    with pytest.raises(RuntimeError, match=r"SDPBackend\.MATH"):
        fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)
    # The two ways out: plain attention in the forward alone, and layers after the attention
    with fastdg.record(model) as tape, sdpa_kernel(SDPBackend.MATH):
        losses = squares(model, x)()
    moments = fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)
    torch.stack([v.sum() for v in moments.variance.values()]).sum().backward()
    with fastdg.record(model, params=["two.weight"]) as tape:
        losses = squares(model, x)()
    moments = fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)
    moments.variance["two.weight"].sum().backward()


def test_gradients_that_are_zero_at_first_are_checked_later() -> None:
    """A head that starts at zero hides every mistake below it on the first backward."""
    model = Model(lambda m, x: m.two(F.linear(m.one(x).tanh(), m.one.weight)))
    nn.init.zeros_(model.two.weight)
    x = torch.randn(N, 4)
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all")
    opt.backward((model(x) - 1).square().sum(1), DOMAINS)
    opt.step()
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\[0\]"):
        opt.backward((model(x) - 1).square().sum(1), DOMAINS)


def test_sizes_that_coincide_later_are_checked_then() -> None:
    """A tensor all samples share that happens to have as many rows as there are samples."""

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return (x + positions.sum(0)) * self.gain

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.two(m.inner(m.one(x), torch.arange(20.0).view(5, 4)))

    model = Model(run, inner=Add())
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=1e-3), params="all")
    opt.backward(squares(model, torch.randn(N, 4))(), DOMAINS)
    opt.step()
    with pytest.raises(RuntimeError, match="do not add up"):
        opt.backward(squares(model, torch.randn(5, 4))(), DOMAINS[:5])


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(8, 8)])
def test_a_bias_whose_gradient_cancels_is_no_false_alarm(norm: nn.Module) -> None:
    """A bias before a norm has no effect, and its gradient is nothing but rounding."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), norm, nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 44 * 44, 3),
    ).float()  # fmt: skip
    x, y = torch.randn(N, 3, 48, 48, dtype=torch.float32), torch.randint(0, 3, (N,))
    with fastdg.record(model) as tape:
        losses = F.cross_entropy(model(x), y, reduction="none")
    fastdg.check(tape, losses)
