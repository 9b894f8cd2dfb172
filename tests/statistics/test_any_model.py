"""Right on all that autograd differentiates: layouts, mixed samples, weights used anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from functions import Scale
from oracle import DOMAINS, SLOW, assert_close, assert_statistics, one_by_one, trainable
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


def squares(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x).square().flatten(1).sum(1)


def warned(model: nn.Module, losses_of: Callable[[nn.Module], Tensor], *words: str) -> None:
    """One statistic warns once, in these words; all are right."""
    with fastdg.record(model) as tape:
        losses = losses_of(model)
    with pytest.warns(UserWarning, match=SLOW) as seen:
        fastdg.domain_gradients(tape, losses, DOMAINS)
    fastdg.domain_gradients(tape, losses, DOMAINS)  # not again
    assert len(seen) == 1
    for word in words:
        assert word in str(seen[0].message)
    assert_statistics(model, losses_of, slow=True)


# -- which row is whose --


@pytest.mark.parametrize("tokens", [N, 2 * N], ids=["as many as samples", "twice as many"])
def test_tokens_folded_time_major(tokens: int) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = m.one(x.transpose(0, 1).reshape(t * n, -1)).tanh()
        return m.two(y.view(t, n, -1).mean(0))

    assert_statistics(Model(run), squares(torch.randn(N, tokens, 4)))


@pytest.mark.parametrize("length", [5, N, 2 * N])
def test_sequence_first(length: int) -> None:
    model = Model(lambda m, x: m.two(m.one(x.transpose(0, 1)).tanh().mean(0)))
    assert_statistics(model, squares(torch.randn(N, length, 4)))


def test_transformer_that_is_sequence_first() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0)
    model = Model(lambda m, x: m.two(m.layer(x.transpose(0, 1)).mean(0)), layer=layer)
    with sdpa_kernel(SDPBackend.MATH):
        assert_statistics(model, squares(torch.randn(N, 5, 4)))


def test_a_batch_of_one_then_a_real_one() -> None:
    """One sample shows no mistake in the sample dimension."""
    model = Model(lambda m, x: m.two(m.one(x.transpose(0, 1)).tanh().mean(0)))
    assert_statistics(model, squares(torch.randn(1, 1, 4)), torch.tensor([0]), 1)
    assert_statistics(model, squares(torch.randn(N, N, 4)))


def test_bags_of_changing_sizes() -> None:
    """The samples' rows lie one after the other, in numbers that change from step to step."""
    sizes = [2] * N

    def run(m: nn.Module, x: Tensor) -> Tensor:
        bags = m.one(x).tanh().split(sizes)
        return m.two(torch.stack([bag.mean(0) for bag in bags]))

    model = Model(run)
    for new in ([2] * N, [2, 1, 3, 2, 3, 1], [1, 2, 3, 2, 1, 3]):
        sizes[:] = new
        assert_statistics(model, squares(torch.randn(12, 4)))


def test_rows_chosen_by_values() -> None:
    """Experts that each serve the samples sent to them: other ones in each step."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h, out = m.one(x), x.new_zeros(len(x), 3)
        left = (h[:, 0] > 0).nonzero().squeeze(1)
        right = (h[:, 0] <= 0).nonzero().squeeze(1)
        out = out.index_add(0, left, m.two(h[left]).tanh())
        return out.index_add(0, right, m.other(h[right]).tanh())

    model = Model(run, other=nn.Linear(4, 3))
    for _ in range(3):
        x = torch.randn(N, 4)
        assert_statistics(model, squares(x), slow=True)


def test_packed_sequences() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(x, torch.tensor([3, 3, 2, 2, 1, 1]), batch_first=True)
        return m.two(m.inner(packed)[1][0][0])

    model = Model(run, inner=nn.LSTM(4, 4, batch_first=True))
    assert_statistics(model, squares(torch.rand(N, 3, 4)), slow=True)


def test_a_loss_a_token() -> None:
    """Every loss is a sample's, however many an input makes."""
    model, x = Model(lambda m, x: m.two(m.one(x).tanh())), torch.randn(N, 5, 4)
    domains = torch.arange(N * 5) % 4
    assert_statistics(model, lambda m: m(x).square().sum(2).flatten(), domains, 4)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 1), torch.randn(4)),
        (nn.Conv1d(2, 1, 3), torch.randn(2, 3)),
        (nn.LayerNorm(4), torch.randn(4)),
    ],
    ids=["linear", "convolution", "norm"],
)
def test_one_sample_without_a_batch_dimension(layer: nn.Module, x: Tensor) -> None:
    layer.double()
    assert_statistics(
        layer, lambda m: m(x.double()).square().flatten()[:1], torch.tensor([0]), 1, slow=True
    )


# -- weights used in other places --


def test_weight_used_outside_its_module_too() -> None:
    model = Model(lambda m, x: m.two(F.linear(m.one(x).tanh(), m.one.weight)))
    assert_statistics(model, squares(torch.randn(N, 4)))


def test_weight_used_outside_its_module_only() -> None:
    model = Model(lambda m, x: m.two(F.linear(x, m.one.weight)))
    assert_statistics(model, squares(torch.randn(N, 4)))


def test_weight_penalty_inside_the_losses() -> None:
    model, x = Model(lambda m, x: m.two(m.one(x))), torch.randn(N, 4)
    assert_statistics(model, lambda m: squares(x)(m) + m.two.weight.square().sum())


def test_positions_shared_by_all_samples() -> None:
    table = nn.Embedding(5, 4)
    model = Model(lambda m, x: m.two((x + m.table(torch.arange(5))).tanh().sum(1)), table=table)
    assert_statistics(model, squares(torch.randn(N, 5, 4)), slow=True)


def test_embedding_scaled_by_frequency() -> None:
    table = nn.Embedding(4, 3, scale_grad_by_freq=True)
    with torch.no_grad():
        table.weight.normal_()
    assert_statistics(
        table, lambda m: m(torch.arange(N) % 4).square().sum(1), twice=False, slow=True
    )


# -- samples that see each other --


def test_losses_over_pairs() -> None:
    model, x = Model(lambda m, x: m.two(m.one(x).tanh())), torch.randn(N, 4)

    def losses(m: nn.Module) -> Tensor:
        z = F.normalize(m(x), dim=1)
        return -F.log_softmax(z @ z.t(), 1).diagonal()

    warned(model, losses, "mix the samples")


BATCH_NORMS = {
    "plain": lambda: nn.BatchNorm1d(4),
    "no affine": lambda: nn.BatchNorm1d(4, affine=False),
    "frozen affine": lambda: nn.BatchNorm1d(4).requires_grad_(False),
    "no running statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
}


@pytest.mark.parametrize("make", BATCH_NORMS.values(), ids=BATCH_NORMS.keys())
def test_batch_norm_that_mixes_samples(make: Callable[[], nn.Module]) -> None:
    model = Model(lambda m, x: m.two(m.norm(m.one(x)).tanh()), norm=make())
    warned(model, squares(torch.randn(N, 4)), "one.weight", "NativeBatchNorm", "eval()")


def test_batch_norm_that_starts_to_mix_later() -> None:
    norm = nn.BatchNorm1d(4).requires_grad_(False)
    model = Model(lambda m, x: m.two(m.norm(m.one(x)).tanh()), norm=norm).eval()
    x = torch.randn(N, 4)
    assert_statistics(model, squares(x))
    model.train()
    warned(model, squares(x), "one.weight")
    model.eval()
    assert_statistics(model, squares(x))


@pytest.mark.parametrize("params", ["head", ["two.weight", "two.bias"]])
def test_layers_after_batch_norm_are_fast(params: object) -> None:
    model = Model(lambda m, x: m.two(m.norm(m.one(x)).tanh()), norm=nn.BatchNorm1d(4))
    with fastdg.record(model, params=params) as tape:
        losses = squares(torch.randn(N, 4))(model)
    got = fastdg.per_sample_gradients(tape, losses)
    assert set(got) == {"two.weight", "two.bias"}
    for name, g in one_by_one(losses, {n: trainable(model)[n] for n in got}).items():
        assert_close(got[name], g, name)


def test_batch_norm_in_a_branch_beside() -> None:
    """A branch with batch statistics, and one without: the parameters of the latter are fast."""
    model = Model(
        lambda m, x: m.two(m.one(x).tanh()) + m.norm(m.other(x)),
        norm=nn.BatchNorm1d(3),
        other=nn.Linear(4, 3),
    )
    with fastdg.record(model, params=["one.weight", "two.weight"]) as tape:
        losses = squares(torch.randn(N, 4))(model)
    got = fastdg.per_sample_gradients(tape, losses)
    for name, g in one_by_one(losses, {n: trainable(model)[n] for n in got}).items():
        assert_close(got[name], g, name)
    assert_statistics(model, squares(torch.randn(N, 4)), tolerance=1e-11, slow=True)


# -- changes in place, randomness, branches --


class Shift(nn.Module):
    """Its backward needs nothing of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def test_input_changed_in_place_after_the_layer() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = x.clone()
        y = m.inner(x)
        x.zero_()
        return m.two(y)

    assert_statistics(Model(run, inner=Shift()), squares(torch.randn(N, 4)))


def test_module_that_changes_its_input_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.gain)

    model = Model(lambda m, x: m.two(m.inner(m.one(x)).tanh()), inner=InPlace())
    assert_statistics(model, squares(torch.randn(N, 4)))


def test_output_written_in_parts() -> None:
    """Slices of a tensor are filled one by one, as many decoders do."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3, 2)
        out[:, :, 0] = m.two(m.one(x).tanh())
        out[:, :, 1] = m.two(x)
        return out

    assert_statistics(Model(run), squares(torch.randn(N, 4)))


def test_module_that_passes_its_input_through() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = Model(lambda m, x: m.two(m.inner(m.one(x)).tanh()), inner=Optional())
    assert_statistics(model, squares(torch.randn(N, 4)))
    losses = squares(torch.randn(N, 4))(model)
    assert "inner.gain" not in fastdg.per_sample_gradients(losses, params=model)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.gain, 0.5, self.training)


INSIDE = {
    "own": Noisy,
    "attention": lambda: nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True),
    "lstm": lambda: nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True),
}


@pytest.mark.parametrize("make", INSIDE.values(), ids=INSIDE.keys())
def test_dropout_inside_a_module(make: Callable[[], nn.Module]) -> None:
    """Nothing is run again: the mask is the one that the forward drew."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        if isinstance(m.inner, nn.MultiheadAttention):
            x = m.inner(x, x, x)[0]
        elif isinstance(m.inner, nn.LSTM):
            x = m.inner(x)[0]
        else:
            x = m.inner(x)
        return m.two(m.one(x)).sum(1)

    with sdpa_kernel(SDPBackend.MATH):
        assert_statistics(Model(run, inner=make()), squares(torch.randn(N, 3, 4)), slow=True)


def test_branches_on_values() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain if float(x.sum()) > 0 else x

    model = Model(lambda m, x: m.two(m.inner(x)), inner=Branching())
    x = torch.rand(N, 4)
    for sign in (1, -1, 1):
        assert_statistics(model, squares(sign * x))


def test_gradients_that_are_zero_at_first() -> None:
    """A head of zeros hides whose rows are whose; so does a term whose weight is zero."""
    model = Model(lambda m, x: m.two(F.linear(m.one(x).tanh().t().t(), m.one.weight)))
    nn.init.zeros_(model.two.weight)
    x, weight = torch.randn(N, 4), 0.0

    def losses(m: nn.Module) -> Tensor:
        return (m(x) - 1).square().sum(1) + weight * m.one(x).square().sum(1)

    for weight in (0.0, 0.0, 0.5, 0.0):
        assert_statistics(model, losses, slow=True)
        with torch.no_grad():
            model.two.weight.add_(weight)


def test_sizes_that_coincide_later() -> None:
    """A tensor that all samples share has as many rows as there are samples, in some batches."""

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return (x + positions.sum(0)) * self.gain

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.two(m.inner(m.one(x), torch.linspace(-1, 1, 20).view(5, 4)))

    model = Model(run, inner=Add())
    assert_statistics(model, squares(torch.randn(N, 4)))
    assert_statistics(model, squares(torch.randn(5, 4)), DOMAINS[:5], 4)


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


def test_checkpoints_inside_others() -> None:
    def inner(m: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(m.one, x.tanh(), use_reentrant=False)

    model = Model(lambda m, x: m.two(checkpoint(inner, m, x, use_reentrant=False)))
    assert_statistics(model, squares(torch.randn(N, 4)))


def test_custom_function() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

    model = Model(lambda m, x: m.two(Scale.apply(m.one(x), m.inner.gain).tanh()), inner=Gain())
    warned(model, squares(torch.randn(N, 4)), "inner.gain", "no rule supports Scale")
