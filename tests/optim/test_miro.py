"""MIRO and what goes around it, against a few lines of plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import MAKES, Batch, Net, alike, batches, close, net, parts
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

import fastdg

LAYERS = ["conv", "down", "scale"]
WEIGHT, RATE = 0.3, 10.0


class Plain:
    """The network, its frozen copy and the variances, with hooks that only append."""

    def __init__(self, model: nn.Module, layers: Sequence[str] = LAYERS) -> None:
        self.model, self.oracle, self.layers = model, copy.deepcopy(model), layers
        self.oracle.eval().requires_grad_(False)
        start = torch.tensor(0.1 - 1e-5, dtype=torch.float64)
        self.start = (start.exp() - 1).log()
        self.biases: list[Tensor] = []

    def term(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the regulariser of each sample ``[N]``."""
        seen: list[list[Tensor]] = []
        for network in (self.oracle, self.model):
            maps: list[Tensor] = []
            handles = [
                dict(network.named_modules())[name].register_forward_hook(
                    lambda m, i, o, maps=maps: maps.append(o)
                )
                for name in self.layers
            ]
            logits = network(x)
            for handle in handles:
                handle.remove()
            seen.append(maps)
        if not self.biases:
            self.biases = [nn.Parameter(self.start.repeat(f.shape[1])) for f in seen[0]]
        reg = torch.zeros(len(x), dtype=torch.float64)
        for f0, f, b in zip(*seen, self.biases, strict=True):
            s = F.softplus(b) + 1e-5
            s = s.view(1, -1, *[1] * (f.dim() - 2))
            nll = 0.5 * ((f - f0) ** 2 / s + s.log())
            reg = reg + nll.flatten(1).mean(1)
        return logits, reg

    def optimizer(self, make: str) -> Any:
        self.term(torch.randn(2, 2, 6, 6).double())
        inner = MAKES[make](self.model)
        lr = inner.param_groups[0]["lr"]
        settings = {k: v for k, v in inner.param_groups[0].items() if k in inner.defaults}
        inner.add_param_group({**settings, "params": self.biases, "lr": lr * RATE})
        return inner

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.biases]


def miro(model: nn.Module, make: str = "adam", **more: Any) -> fastdg.MIRO:
    return fastdg.MIRO(MAKES[make](model), model, **{"layers": LAYERS, "weight": WEIGHT, **more})


def run(opt: Any, model: nn.Module, data: Sequence[Batch]) -> list[dict[str, Tensor]]:
    seen = []
    for x, y, d in data:
        losses = F.cross_entropy(model(x), y, reduction="none")
        opt.zero_grad()
        opt.backward(losses, d)
        opt.step()
        seen.append(opt.statistics)
    return seen


def frozen(model: Net) -> Net:
    """In training mode, its batch norm not."""
    model.train()
    model.norm.eval()
    return model


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_alone(make: str, batch_norm: bool) -> None:
    model, data = frozen(net(batch_norm)), batches(5)
    plain = Plain(copy.deepcopy(model))
    base = plain.optimizer(make)
    opt = miro(model, make)
    for (x, y, _), seen in zip(data, run(opt, model, data), strict=True):
        logits, reg = plain.term(x)
        loss = F.cross_entropy(logits, y)
        objective = loss + WEIGHT * reg.mean()
        base.zero_grad()
        objective.backward()
        base.step()
        close(seen["loss"], loss)
        close(seen["miro"], reg.mean())
        close(seen["objective"], objective)
    alike(model, plain.model)
    for got, expected in zip(opt.biases.values(), plain.biases, strict=True):
        close(got, expected)
        assert (got != plain.start).any()


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("params", ["head", "all"])
def test_inside_fishr(make: str, params: str) -> None:
    """The penalty is of the losses alone."""
    model, data = net(), batches(4, absent=False)
    plain, weight, gamma = Plain(copy.deepcopy(model)), 20.0, 0.9
    base = plain.optimizer(make)
    opt: Any = fastdg.Fishr(
        miro(model, make),
        params=params,
        penalty_weight=weight,
        anneal_steps=2,
        ema=gamma,
        reset_base=False,
        num_domains=3,
    )
    history: list[Tensor] = []
    of = list(plain.model.head.parameters() if params == "head" else plain.model.parameters())
    for step, (batch, seen) in enumerate(zip(data, run(opt, model, data), strict=True)):
        x, y, d = batch
        logits, reg = plain.term(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        rows = [torch.autograd.grad(one, of, create_graph=True) for one in losses]
        grads = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        v = torch.stack([grads[d == k].var(0, unbiased=False) for k in range(3)])
        m = history[0] if history else torch.zeros_like(v)
        u = v + gamma / (1 - gamma) * m
        penalty = (u - u.mean(0)).square().mean()
        objective = losses.mean() + WEIGHT * reg.mean()
        if step >= 2:
            objective = objective + weight * penalty
        history = [gamma * m + (1 - gamma) * v.detach()]
        base.zero_grad()
        objective.backward()
        base.step()
        close(seen["penalty"], penalty)
        close(seen["miro"], reg.mean())
        close(seen["objective"], objective)
    alike(model, plain.model)
    for got, expected in zip(opt.base.biases.values(), plain.biases, strict=True):
        close(got, expected)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("given", [False, True])
def test_inside_agr_sum(make: str, given: bool) -> None:
    """Domains agree on losses and terms together, on the variances too."""
    model, data = net(), batches(5)
    plain = Plain(copy.deepcopy(model))
    base = plain.optimizer(make)
    opt = fastdg.AgrSum(miro(model, make), num_domains=3, model=model if given else None)
    for batch, seen in zip(data, run(opt, model, data), strict=True):
        x, y, _ = batch
        every = []
        for _, part, labels in parts(batch):
            logits, reg = plain.term(part)
            loss = F.cross_entropy(logits, labels) + WEIGHT * reg.mean()
            every.append(
                torch.autograd.grad(
                    loss, plain.parameters, allow_unused=True, materialize_grads=True
                )
            )
        for p, grads in zip(plain.parameters, zip(*every, strict=True), strict=True):
            stack = torch.stack(grads)
            agree = stack.sign().sum(0).abs() == len(stack)
            p.grad = stack.mean(0) * agree
        with torch.no_grad():
            logits, reg = plain.term(x)
        loss = F.cross_entropy(logits, y)
        base.step()
        close(seen["loss"], loss)
        close(seen["miro"], reg.mean())
        close(seen["objective"], loss + WEIGHT * reg.mean())
    alike(model, plain.model)


def test_inside_vrex() -> None:
    model, data = net(), batches(5)
    plain = Plain(copy.deepcopy(model))
    base = plain.optimizer("momentum")
    settings = {"penalty_weight": 3.0, "anneal_steps": 0}
    opt = fastdg.VREx(miro(model, "momentum"), **settings)
    for batch, seen in zip(data, run(opt, model, data), strict=True):
        _, reg = plain.term(batch[0])
        losses = torch.stack([F.cross_entropy(plain.model(x), y) for _, x, y in parts(batch)])
        penalty = losses.var(unbiased=False)
        objective = losses.mean() + 3 * penalty + WEIGHT * reg.mean()
        base.zero_grad()
        objective.backward()
        base.step()
        close(seen["objective"], objective)
    alike(model, plain.model)


ALGORITHMS: dict[str, Callable[[Any], Any]] = {
    "Fishr": lambda base: fastdg.Fishr(base, anneal_steps=1),
    "IRM": lambda base: fastdg.IRM(base, anneal_steps=1),
    "IGA": lambda base: fastdg.IGA(base, penalty_weight=0.1),
    "GroupDRO": fastdg.GroupDRO,
    "PCGrad": lambda base: fastdg.PCGrad(base, generator=torch.Generator().manual_seed(3)),
    "ANDMask": lambda base: fastdg.ANDMask(base, threshold=0.3),
    "MIRO": lambda base: base,
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_are_one_batch(name: str) -> None:
    """Staged or not: the same step, and the same statistics."""
    model, (first, second) = net(), batches(2, absent=False)
    twin = copy.deepcopy(model)
    whole = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    opt, other = ALGORITHMS[name](miro(model)), ALGORITHMS[name](miro(twin))
    for _ in range(3):
        run(opt, model, [tuple(whole)])
        other.zero_grad()
        if name == "IRM":  # which splits each domain by its samples' places
            break
        for (x, y, d), final in ((first, False), (second, True)):
            other.backward(F.cross_entropy(twin(x), y, reduction="none"), d, final)
        other.step()
        for key in ("loss", "miro", "objective"):
            close(other.statistics[key], opt.statistics[key], 1e-11)
        alike(twin, model, 1e-9)


def test_an_oracle_copied_from_what_a_resumed_run_has_trained_is_warned_of() -> None:
    model, data = net(), batches(3)
    opt = miro(model)
    run(opt, model, data[:2])
    resumed = net()
    resumed.load_state_dict(model.state_dict())
    late = fastdg.VREx(miro(resumed))
    late.load_state_dict(fastdg.VREx(opt).state_dict())
    with pytest.warns(UserWarning, match=r"^oracle: .*another oracle") as caught:
        run(late, resumed, data[2:])
    assert [w.filename for w in caught] == [__file__]
    run(late, resumed, data[2:])  # once is enough


def test_an_oracle_of_another_seed_is_warned_of() -> None:
    model, data = net(), batches(3)
    opt = miro(model)
    run(opt, model, data[:2])
    torch.manual_seed(99)
    other = net()
    for p in other.parameters():
        torch.nn.init.normal_(p)
    late = miro(other)
    other.load_state_dict(model.state_dict())
    late.load_state_dict(opt.state_dict())
    with pytest.warns(UserWarning, match=r"^oracle: .*another oracle"):
        run(late, other, data[2:])


def test_an_oracle_is_known_again_whatever_its_buffers() -> None:
    """No warning of it (all warnings are errors here): sparse, or filled when it runs."""
    model, data = net(), batches(3)
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    opt = miro(model)
    run(opt, model, data[:2])
    state = copy.deepcopy(opt.state_dict())
    opt.oracle.get_buffer("cache").add_(1)
    opt.load_state_dict(state)
    run(opt, model, data[2:])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_resumes_bit_for_bit(name: str) -> None:
    model, data = net(), batches(4)
    opt = ALGORITHMS[name](miro(model))
    run(opt, model, data[:2])
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    oracle = copy.deepcopy((opt if name == "MIRO" else opt.base).oracle)
    run(opt, model, data[2:])

    resumed = net()
    fresh = ALGORITHMS[name](miro(resumed, oracle=oracle))
    resumed.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    again = copy.deepcopy((resumed, fresh))
    for network, optimizer in ((resumed, fresh), again):
        run(optimizer, network, data[2:])
        alike(network, model, 0)
        assert optimizer.steps == 4
    inner = opt if name == "MIRO" else opt.base
    copied = fresh if name == "MIRO" else fresh.base
    for got, expected in zip(copied.biases.values(), inner.biases.values(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:state_dict. ignored the state of VREx")
def test_a_state_without_miro_starts_it_anew() -> None:
    model, (batch,) = net(), batches(1)
    bare = MAKES["adam"](model)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    bare.step()
    for way in ("wrapper", "inside", "around"):
        opt = miro(copy.deepcopy(model))
        {"wrapper": opt, "inside": opt.base, "around": fastdg.VREx(opt)}[way].load_state_dict(
            copy.deepcopy(bare.state_dict())
        )
        assert opt.param_groups[1]["lr"] == RATE * opt.param_groups[0]["lr"]
        assert opt.state[opt.param_groups[0]["params"][0]]["step"] == 1
        run(opt, opt.model, [batch])
        assert all(bias.numel() for bias in opt.biases.values())
    state = opt.state_dict()
    for entry in state["state"].values():
        entry.pop("miro_bias", None)
    with pytest.raises(ValueError, match=r"^state_dict: .*miro_bias"):
        miro(copy.deepcopy(model)).load_state_dict(state)


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints(flatten: bool) -> None:
    """They want a module that owns every parameter of the optimizer."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, data = net(), batches(3)
    opt = miro(model)
    run(opt, model, data[:2])
    whole = nn.ModuleList([model, *opt.modules()])
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(whole, opt, options=options))
    weights = copy.deepcopy(model.state_dict())

    again = net()
    resumed = miro(again, oracle=copy.deepcopy(opt.oracle))
    run(resumed, again, data[:1])
    again.load_state_dict(weights)
    resumed.zero_grad()
    whole = nn.ModuleList([again, *resumed.modules()])
    dcp.set_optimizer_state_dict(whole, resumed, saved, options=options)
    assert resumed.steps == 2
    run(opt, model, data[2:])
    run(resumed, again, data[2:])
    alike(again, model, 0)


def test_the_group_of_the_variances() -> None:
    model = net()
    opt = fastdg.MIRO(
        Adam(model.named_parameters(), lr=0.5, weight_decay=0.1), model, layers=LAYERS
    )
    assert opt.param_groups[1]["lr"] == 5.0
    assert opt.param_groups[1]["weight_decay"] == 0.1
    assert opt.param_groups[1]["param_names"] == [f"miro.{name}" for name in LAYERS]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    run(opt, model, batches(1))
    scheduler.step()
    assert opt.param_groups[1]["lr"] == 2.5
    assert [len(bias) for bias in opt.biases.values()] == [4, 6, 5]
    again = fastdg.MIRO(opt.base, model, layers=LAYERS)
    assert again.biases["down"] is opt.biases["down"]
    with pytest.raises(ValueError, match=r"^base: .*scheduler"):
        fastdg.MIRO(opt.base, model, layers=["conv"])


def test_the_oracle_stays_and_runs_on_what_the_model_saw() -> None:
    model, data = net(), batches(3)
    calls: list[Tensor] = []
    model.conv.register_forward_hook(lambda m, inputs, out: None)
    opt = miro(model)
    before = copy.deepcopy(opt.oracle.state_dict())
    opt.oracle.conv.register_forward_hook(lambda m, inputs, out: calls.append(inputs[0]))
    heads: list[Any] = []
    opt.oracle.head.register_forward_hook(lambda *args: heads.append(args))
    run(opt, model, data)
    assert len(calls) == 3 and all(a is x for a, (x, _, _) in zip(calls, data, strict=True))
    assert not heads  # nothing after the last layer asked for
    with torch.no_grad():
        model(data[0][0])
    model.eval()(data[0][0])
    assert len(calls) == 3
    assert not opt.oracle.training and not any(p.requires_grad for p in opt.oracle.parameters())
    for name, tensor in opt.oracle.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_oracle_in_half_precision() -> None:
    model = net().float()
    opt = miro(model, dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    exact = miro(twin)
    for x, y, d in batches(3):
        for network, optimizer in ((model, opt), (twin, exact)):
            run(optimizer, network, [(x.float(), y, d)])
        assert next(opt.oracle.parameters()).dtype == torch.bfloat16
        torch.testing.assert_close(
            opt.statistics["miro"], exact.statistics["miro"], rtol=0.05, atol=0.05
        )


def test_coinciding_features_are_bounded() -> None:
    """Nothing moves: only the variances do, as far down as their floor."""
    model = net()
    opt = fastdg.MIRO(SGD(model.parameters(), lr=0.0), model, layers=LAYERS, weight=1.0)
    opt.param_groups[1]["lr"] = 100.0
    for seen in run(opt, model, batches(40)):
        assert seen["miro"] >= 3 * 0.5 * torch.tensor(1e-5).log() - 1e-9
        assert seen["miro"].isfinite()
    assert (opt.biases["conv"] < -2).all()


class Checkpointed(nn.Module):
    """Its layers lie inside a checkpoint, or not."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))
        self.head, self.inside = nn.Linear(6, 3), inside

    def forward(self, x: Tensor) -> Tensor:
        if self.inside:
            return self.head(checkpoint(self.body, x, use_reentrant=False))
        return self.head(self.body(x))


@pytest.mark.parametrize("around", [lambda opt: opt, fastdg.AgrSum, fastdg.Fishr])
def test_layers_inside_a_checkpoint(around: Callable[[Any], Any]) -> None:
    models = [Checkpointed(inside).double() for inside in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    x, y, d = torch.randn(6, 4).double(), torch.arange(6) % 3, torch.arange(6) % 2
    for model in models:
        base = Adam(model.parameters(), lr=0.1, eps=1e-3)
        run(around(fastdg.MIRO(base, model, layers=["body.0", "body.2"])), model, [(x, y, d)] * 3)
    alike(models[1], models[0])


class Tokens(nn.Module):
    """A transformer with its tokens where it is told."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
        self.head = nn.Linear(8, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:  # [N, L, 3]
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(self.block(self.embed(x)).mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("tokens", [5, 6, 8])
def test_tokens_in_either_layout(told: bool, tokens: int) -> None:
    """As many tokens as samples or channels, too."""
    models = {"NLC": Tokens(batch_first=True).double(), "LNC": Tokens(batch_first=False).double()}
    models["LNC"].load_state_dict(models["NLC"].state_dict())
    x, y, d = torch.randn(6, tokens, 3).double(), torch.arange(6) % 3, torch.arange(6) % 2
    seen = {}
    for layout, model in models.items():
        base = Adam(model.parameters(), lr=0.1, eps=1e-3)
        settings = {"layers": ["embed", "block"], "layouts": layout if told else None}
        opt = fastdg.MIRO(base, model, **settings)
        seen[layout] = run(opt, model, [(x, y, d)] * 3)[-1]["miro"]
        assert [len(bias) for bias in opt.biases.values()] == [8, 8]
    close(seen["LNC"], seen["NLC"])
    alike(models["LNC"], models["NLC"])


def test_each_tokens_and_domains_gradient() -> None:
    """Per-sample gradients go through tokens, too: the check on the first backward sees to it."""
    model = Tokens(batch_first=True).double()
    opt = fastdg.AgrSum(fastdg.MIRO(Adam(model.parameters()), model, layers=["embed", "block"]))
    x, y, d = torch.randn(6, 5, 3).double(), torch.arange(6) % 3, torch.arange(6) % 2
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run(opt, model, [(x, y, d)] * 2)
    assert opt.steps == 2


@pytest.mark.parametrize("around", [lambda o: o, fastdg.AgrSum, fastdg.Fishr])
def test_without_a_weight_it_stays_out(around: Callable[[Any], Any]) -> None:
    """Whatever its value: 0 * inf is NaN."""
    model, ((x, y, d),) = net(), batches(1, absent=False)
    opt = around(fastdg.MIRO(MAKES["adam"](model), model, layers=LAYERS, weight=0.0))
    model(x)  # the variances have a size now
    term = opt if isinstance(opt, fastdg.MIRO) else opt.base
    term.biases[LAYERS[0]].data.fill_(torch.inf)
    for _ in range(2):
        opt.zero_grad()
        opt.backward(F.cross_entropy(model(x), y, reduction="none"), d)
        opt.step()
    assert not opt.statistics["miro"].isfinite()
    assert all(p.isfinite().all() for p in model.parameters())
