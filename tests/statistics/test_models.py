"""Whole models: parameters shared, reused, frozen, bare, reparametrised, against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from on_device import DEVICE
from oracle import (
    DOMAINS,
    assert_close,
    assert_statistics,
    functional,
    naive_moments,
    one_by_one,
    trainable,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import fastdg

N = 6


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def classify(*inputs: Tensor, classes: int = 3) -> Callable[[nn.Module], Tensor]:
    target = torch.randint(0, classes, (N,))
    return lambda model: F.cross_entropy(model(*inputs), target, reduction="none")


def images() -> Tensor:
    return torch.randn(N, 2, 6, 6)


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class ViT(nn.Module):
    """Bare parameters beside children, attention, tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 4, 3, stride=3)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4))
        self.block = nn.TransformerEncoderLayer(
            4, 2, 6, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.block(x))[:, 0]) * 2


def test_cnn_inplace() -> None:
    assert_statistics(cnn(), classify(images()))


def test_cnn_channels_last() -> None:
    model = cnn().to(memory_format=torch.channels_last)
    assert_statistics(model, classify(images().to(memory_format=torch.channels_last)))


def test_vit() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert_statistics(ViT(), classify(images()))


def test_vit_with_fused_attention() -> None:
    assert_statistics(ViT(), classify(images()), twice=False)


def test_vit_head() -> None:
    """The model's own forward runs last, but its head is what is inside."""
    model, losses_of = ViT(), classify(images())
    with fastdg.record(model, params="head") as tape:
        losses = losses_of(model)
    got = fastdg.per_sample_gradients(tape, losses)
    assert set(got) == {"head.weight", "head.bias"}
    expected = one_by_one(losses, {name: dict(model.named_parameters())[name] for name in got})
    for name, g in expected.items():
        assert_close(got[name], g, name)


def test_agrees_with_torch_func() -> None:
    x, y = torch.randn(N, 4), torch.randint(0, 3, (N,))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    with fastdg.record(model) as tape:
        losses = F.cross_entropy(model(x), y, reduction="none")
    expected = functional(model, lambda out, y: F.cross_entropy(out, y, reduction="none"), (x, y))
    for name, g in fastdg.per_sample_gradients(tape, losses).items():
        assert_close(g, expected[name], name)


def test_the_head_of_an_attention_is_its_output_projection() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp = nn.Linear(4, 4)
            self.pool = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            return self.pool(x[:, :1], x, x)[0][:, 0]

    model, losses_of = Pool(), classify(torch.randn(N, 3, 4), classes=4)
    with fastdg.record(model, params="head") as tape:
        losses = losses_of(model)
    got = fastdg.per_sample_gradients(tape, losses)
    assert set(got) == {"pool.out_proj.weight", "pool.out_proj.bias"}
    for name, g in one_by_one(losses, {n: trainable(model)[n] for n in got}).items():
        assert_close(got[name], g, name)


def test_head_called_twice() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)) - self.head(self.body(x.flip(1)).tanh())

    model, losses_of = Siamese(), classify(torch.randn(N, 4))
    with fastdg.record(model, params="head") as tape:
        losses = losses_of(model)
    got = fastdg.per_sample_gradients(tape, losses)
    assert set(got) == {"head.weight", "head.bias"}
    for name, g in one_by_one(losses, {n: trainable(model)[n] for n in got}).items():
        assert_close(got[name], g, name)
    assert_statistics(model, losses_of)


def test_bare_parameters() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 3))
            self.scale = nn.Parameter(torch.randn(()))  # 0-dim
            self.mixing = nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.matrix).tanh() * self.scale + self.mixing.prod(0)

    assert_statistics(
        nn.Sequential(nn.Linear(4, 4), Custom(), nn.Linear(3, 3)), classify(torch.randn(N, 4))
    )


def test_a_module_that_returns_the_losses() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(0.7))

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(logits / self.temperature, target, reduction="none")

    model = nn.ModuleDict({"net": nn.Linear(4, 3), "loss": Loss()})
    x, y = torch.randn(N, 4), torch.randint(0, 3, (N,))
    assert_statistics(model, lambda m: m["loss"](m["net"](x), y))


def test_structured_inputs_and_outputs() -> None:
    """Sample tensors in dictionaries and keywords, a tensor all samples share, several outputs."""

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

        def forward(self, batch: dict[str, Tensor], *, positions: Tensor) -> dict[str, object]:
            hidden = (batch["x"] + positions) @ self.w
            return {"hidden": hidden, "pooled": [hidden.sum(1) * self.v, None], "n": 3}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.custom, self.head = nn.Linear(4, 4), Custom(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.custom({"x": self.inp(x)}, positions=torch.ones(5, 4).cumsum(0))
            return self.head(out["hidden"].amax(1) + out["pooled"][0])

    assert_statistics(Model(), classify(torch.randn(N, 5, 4)))


def test_frozen_and_unused() -> None:
    model = cnn()
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[6].weight.requires_grad_(False)
    model.add_module("unused", nn.ParameterList([nn.Parameter(torch.ones(2))]))
    x, losses_of = images(), None
    target = torch.randint(0, 3, (N,))
    losses_of = lambda m: F.cross_entropy(m[:7](x), target, reduction="none")  # noqa: E731
    assert_statistics(model, losses_of)
    with fastdg.record(model) as tape:
        losses = losses_of(model)
    assert set(fastdg.per_sample_gradients(tape, losses)) == {
        "1.weight",
        "3.weight",
        "3.bias",
        "6.bias",
    }


def test_a_module_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
            self.conv = nn.Conv1d(1, 2, 3, padding=1)
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.lin(self.norm(self.lin(x)).tanh()))
            # different resolutions, and different numbers of positions
            return self.head(self.conv(x.unsqueeze(1)).mean(2) + self.conv(x[:, None, ::2]).sum(2))

    assert_statistics(Twice(), classify(torch.randn(N, 4)))


def test_one_layer_for_vectors_and_sequences() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.grouped = nn.Linear(4, 4), nn.Conv1d(4, 4, 2, groups=2)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.lin(x) + self.lin(x[:, 0]).unsqueeze(1)
            y = (
                self.grouped(y.transpose(1, 2)).sum(2)
                + self.grouped(x.transpose(1, 2)[..., :2])[..., 0]
            )
            return self.head(y)

    assert_statistics(Model(), classify(torch.randn(N, 5, 4)))


@pytest.mark.parametrize("padding", [None, 0])
def test_embedding_tied_to_the_output(padding: int | None) -> None:
    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4, padding_idx=padding)
            self.mix = nn.Linear(4, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.mix(self.table(tokens)).tanh()).transpose(1, 2)

    tokens = torch.randint(0, 7, (N, 5))
    target = torch.randint(0, 7, (N, 5))
    model = LanguageModel()

    def losses(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(tokens), target, reduction="none").mean(1)

    assert_statistics(model, losses)

    def grads(params: str) -> dict[str, Tensor]:
        with fastdg.record(model, params=params) as tape:
            return fastdg.per_sample_gradients(tape, losses(model))

    head = grads("head")  # the output layer, whose weight sees the table's gradients too
    assert set(head) == {"table.weight"}
    torch.testing.assert_close(head["table.weight"], grads("all")["table.weight"])


def test_one_parameter_under_two_names_of_one_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 4))
            self.down = self.up

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.up).tanh() @ self.down.t()

    assert_statistics(nn.Sequential(Tied(), nn.Linear(4, 3)), classify(torch.randn(N, 4)))


def test_two_layers_share_a_weight() -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    assert_statistics(
        nn.Sequential(one, nn.Tanh(), two, nn.Linear(4, 3)), classify(torch.randn(N, 4))
    )


def test_tokens_folded_sample_major() -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.conv = nn.Linear(4, 4), nn.Conv1d(1, 2, 3, groups=1)
            self.grouped = nn.Conv1d(2, 2, 2, groups=2)
            self.norm, self.table = nn.LayerNorm(2), nn.Embedding(5, 4)
            self.own = nn.PReLU(2)
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            n, t, _ = x.shape
            y = self.lin(x.view(n * t, -1)) + self.table(tokens.flatten())
            y = self.grouped(self.conv(y.view(n * t, 1, -1)))[..., 0]
            y = self.own(self.norm(y))
            return self.head(y.view(n, t, -1).sum(1))

    x, tokens = torch.randn(N, 3, 4), torch.randint(0, 5, (N, 3))
    assert_statistics(Folding(), classify(x, tokens))


@pytest.mark.parametrize("preserve", [True, False])
def test_checkpoint(preserve: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
            self.two = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(
                checkpoint(self.one, x, use_reentrant=False, preserve_rng_state=preserve)
            )

    assert_statistics(Checkpointed(), classify(torch.randn(N, 4)))


def test_low_rank_adapter_by_subclass() -> None:
    class LoRA(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.weight.requires_grad_(False)
            self.a = nn.Parameter(torch.randn(2, sizes[0]))
            self.b = nn.Parameter(torch.zeros(sizes[1], 2))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + F.linear(F.linear(x, self.a), self.b)

    model = nn.Sequential(LoRA(4, 5), nn.Tanh(), LoRA(5, 3))
    losses_of = classify(torch.randn(N, 4))
    assert_statistics(model, losses_of)  # b starts at zero, and so does a's gradient
    for p in model.parameters():
        nn.init.normal_(p)
    assert_statistics(model, losses_of)


def test_low_rank_adapter_around_a_layer() -> None:
    class Around(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.a = nn.Parameter(torch.randn(2, base.in_features))
            self.b = nn.Parameter(torch.randn(base.out_features, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.a.t() @ self.b.t()

    assert_statistics(
        nn.Sequential(Around(nn.Linear(4, 5)), nn.Tanh(), Around(nn.Linear(5, 3))),
        classify(torch.randn(N, 2, 4).sum(1)),
    )


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).t()


class LowRank(nn.Module):
    """A parametrization with parameters of its own."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rows, 2)), nn.Linear(columns, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a @ self.b.weight


PARAMETRIZED = {
    "symmetric": lambda: parametrize.register_parametrization(
        nn.Linear(4, 4), "weight", Symmetric()
    ),
    "no bias": lambda: parametrize.register_parametrization(
        nn.Linear(4, 4, bias=False), "weight", Symmetric()
    ),
    "low rank": lambda: parametrize.register_parametrization(
        nn.Linear(4, 4), "weight", LowRank(4, 4)
    ),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "spectral norm, eval": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp"),
}


@pytest.mark.parametrize("make", PARAMETRIZED.values(), ids=PARAMETRIZED.keys())
def test_parametrized(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), make(), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(N, 4)
    assert_statistics(model, classify(x))
    assert_statistics(nn.Sequential(model[0], make()), classify(x, classes=4))


def test_statistics_leave_buffers_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 3)))
    with fastdg.record(model) as tape:
        losses = classify(torch.randn(N, 4))(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fastdg.domain_moments(tape, losses, DOMAINS)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weight_norm_old_style() -> None:
    layer = torch.nn.utils.weight_norm(nn.Linear(4, 4), dim=0)
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Tanh(), nn.Linear(4, 3))
    assert_statistics(model, classify(torch.randn(N, 4)))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(layer.weight)


def test_losses_that_see_two_heads_and_a_penalty_on_activations() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.body(x).relu_()
            return self.one(h), self.two(h).squeeze(1), h

    x, y = torch.randn(N, 4), torch.randint(0, 3, (N,))

    def losses_of(model: nn.Module) -> Tensor:
        logits, value, h = model(x)
        return F.cross_entropy(logits, y, reduction="none") + value.square() + h.square().sum(1)

    assert_statistics(Heads(), losses_of)


def test_some_losses_do_not_depend_on_a_layer() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.where(x[:, :1] > 0, self.one(x), self.two(x)))

    assert_statistics(Routed(), classify(torch.randn(N, 4)))


def test_autocast() -> None:
    model, x = cnn().float(), images().float()
    target = torch.randint(0, 3, (N,))
    with torch.autocast(DEVICE, torch.bfloat16):
        with fastdg.record(model) as tape:
            losses = F.cross_entropy(model(x), target, reduction="none")
        inside = fastdg.domain_moments(tape, losses, DOMAINS)
        exact = one_by_one(losses, trainable(model))
    outside = fastdg.domain_moments(tape, losses, DOMAINS)
    _, variance = naive_moments(exact, DOMAINS, 4)
    for name, v in outside.variance.items():
        assert v.dtype == torch.float32
        torch.testing.assert_close(v, inside.variance[name], rtol=0, atol=0)  # not in bf16
        assert float((v - variance[name]).norm()) <= 0.05 * float(variance[name].norm()) + 1e-6


def test_bfloat16_model() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.LayerNorm(8), nn.Linear(8, 3))
    x, target = torch.randn(N, 4), torch.randint(0, 3, (N,))
    got = {}
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        with fastdg.record(model) as tape:
            losses = F.cross_entropy(model(x.to(dtype)), target, reduction="none")
        got[dtype] = fastdg.domain_moments(tape, losses, DOMAINS).variance
    for name, v in got[torch.bfloat16].items():
        exact = got[torch.float64][name]
        assert v.dtype == torch.float32
        assert float((v - exact).norm()) <= 0.1 * float(exact.norm())


def test_dropout_between_layers() -> None:
    """The δ's saw the mask that the forward drew; nothing is drawn again."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, target = torch.randn(N, 4), torch.randint(0, 3, (N,))
    with fastdg.record(model) as tape:
        losses = F.cross_entropy(model(x), target, reduction="none")
    state = torch.get_rng_state()
    got = fastdg.per_sample_gradients(tape, losses)
    assert torch.equal(state, torch.get_rng_state())
    for name, g in one_by_one(losses, trainable(model)).items():
        assert_close(got[name], g, name)


def test_parts_of_a_model() -> None:
    model, losses_of = cnn(), classify(images())
    for params, names in {
        "predicate": (lambda name, p: p.dim() == 4, {"0.weight", "3.weight"}),
        "names": (["1.weight", "6.bias"], {"1.weight", "6.bias"}),
        "parameters": (list(model[3].parameters()), {"3.weight", "3.bias"}),
        "generator": (model[0].parameters(), {"0.weight", "0.bias"}),
        "mixed": (["0.bias", model[6].weight], {"0.bias", "6.weight"}),
        "one tensor": (model[6].weight, {"6.weight"}),
    }.values():
        with fastdg.record(model, params) as tape:
            losses = losses_of(model)
        for _ in range(2):
            got = fastdg.per_sample_gradients(tape, losses)
            assert set(got) == names
        for name, g in one_by_one(losses, {n: trainable(model)[n] for n in names}).items():
            assert_close(got[name], g, name)


def test_running_statistics_in_bfloat16() -> None:
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(12, 2)).bfloat16().eval()
    with fastdg.record(model) as tape:
        losses = model(torch.randn(4, 3, 2, 2, dtype=torch.bfloat16)).square().sum(1)
    got = fastdg.per_sample_gradients(tape, losses)["0.weight"]
    true = one_by_one(losses, {"": norm.weight})[""].to(got.dtype)
    assert float((got - true).norm() / true.norm()) < 0.02


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_watched_model_can_be_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    with fastdg.record(model):
        traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), model(x))


def test_a_statistic_shows_modules_nothing() -> None:
    """No module runs again, so none of their forward hooks does; pruning goes on as it was."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(5))
            self.inner = prune.random_unstructured(nn.Linear(5, 5), "weight", 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * self.gain)

    block, lstm = Block(), nn.LSTM(5, 5, batch_first=True)
    model = nn.ModuleList([lstm, block])
    seen: list[int] = []
    for module in (block, block.inner, lstm):
        module.register_forward_hook(lambda m, args, out: seen.append(0))
        module.register_forward_pre_hook(lambda m, args: seen.append(1))
        module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(2))
    tables = [dict(m._forward_pre_hooks) for m in model.modules()]

    def losses_of(model: nn.Module) -> Tensor:
        hidden, _ = lstm(torch.ones(6, 2, 5).cumsum(0).requires_grad_())
        return block(hidden[:, -1]).square().sum(1)

    losses = losses_of(model)
    seen.clear()
    fastdg.domain_moments(losses, DOMAINS, params=model)
    assert set(seen) <= {2}  # a backward
    assert_statistics(model, losses_of, slow=True)
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == tables
