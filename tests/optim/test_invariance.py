"""IGA, IRM, VREx and GroupDRO against DomainBed's way of making their steps, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from definitions import (
    MAKES,
    alike,
    batches,
    close,
    group_dro,
    iga,
    irm,
    losses_of,
    net,
    parts,
    trained,
    vrex,
)
from invariances import WRAPPERS, every, grads, run, wrapped
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode

import fastdg
from fastdg.gradients import engine


@pytest.mark.parametrize("num_domains", [None, 3])
@pytest.mark.parametrize("make", MAKES)
@every
def test_definition(name: str, make: str, num_domains: int | None) -> None:
    model, data = net(), batches(7)
    twin = copy.deepcopy(model)
    objective = {"VREx": vrex, "IRM": irm, "IGA": iga, "GroupDRO": group_dro(0.5, 3)}[name]
    settings = {"penalty_weight": 1.0, **WRAPPERS[name][1]}
    settings.pop("eta", None)
    truth = trained(objective, twin, MAKES[make], data, **settings)
    opt = wrapped(name, model, make, num_domains=num_domains)
    for (x, y, d), (total, penalty) in zip(data, truth, strict=True):
        losses = losses_of(model, x, y)
        opt.zero_grad()
        close(opt.backward(losses, d), losses.mean())
        close(opt.statistics["objective"], total)
        if name != "GroupDRO":
            close(opt.statistics["penalty"], penalty)
        opt.step()
        if name == "GroupDRO":
            close(opt.state_dict()["state"][0]["groupdro_q"], penalty)
    alike(model, twin)


@pytest.mark.parametrize("cuts", [[5, 4, 3], [1, 11]])
@every
def test_accumulation_is_the_full_batch(name: str, cuts: list[int]) -> None:
    model = net()
    twin = copy.deepcopy(model)
    data = [(x[:12], y[:12], d[:12]) for x, y, d in batches(8) if len(d) == 12]
    one, two = wrapped(name, model), wrapped(name, twin)
    for x, y, d in data:
        run(one, model, [(x, y, d)])
        two.zero_grad()
        micro = list(zip(x.split(cuts), y.split(cuts), d.split(cuts), strict=True))
        for k, (mx, my, md) in enumerate(micro):
            two.backward(losses_of(twin, mx, my), md, final=k == len(micro) - 1)
        two.step()
        for key, value in one.statistics.items():
            torch.testing.assert_close(two.statistics[key], value, equal_nan=True)
    alike(model, twin)


@every
def test_gradients_add_and_others_get_theirs(name: str) -> None:
    """A second backward adds up; inputs and another optimizer's layers are not forgotten."""
    first, model = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
    x = torch.randn(9, 4).double().requires_grad_()
    y, d = torch.arange(9) % 3, torch.tensor([0, 0, 1, 2, 2, 1, 0, 2, 1])
    opt = wrapped(name, model, "momentum")
    opt.backward(losses_of(nn.Sequential(first, model), x, y), d)
    once = [x.grad.clone(), *grads(first), *grads(model)]
    assert all(g.abs().sum() > 0 for g in once)
    held = model.weight.grad
    opt.backward(losses_of(nn.Sequential(first, model), x, y), d)
    assert model.weight.grad is held
    for now, before in zip([x.grad, *grads(first), *grads(model)], once, strict=True):
        close(now, 2 * before)
    opt.step()
    assert opt.steps == 1


@pytest.mark.parametrize("after", range(5))
@every
def test_resume_is_bit_for_bit(name: str, after: int) -> None:
    model, data = net().float(), [(x.float(), y, d) for x, y, d in batches(6)]
    opt = wrapped(name, model)
    run(opt, model, data[:after])
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    whole = run(opt, model, data[after:])
    again = net().float()
    again.load_state_dict(saved[0])
    resumed = wrapped(name, again)
    resumed.load_state_dict(saved[1])
    assert resumed.steps == after
    seen = run(resumed, again, data[after:])
    for one, two in zip(whole, seen, strict=True):
        assert all(torch.equal(one[key].nan_to_num(), two[key].nan_to_num()) for key in one)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@every
def test_nan_losses_come_through_and_a_skipped_step_forgets_them(name: str) -> None:
    model, data = net(), batches(3)
    opt = wrapped(name, model)
    run(opt, model, data[:1])
    before = copy.deepcopy(opt.state_dict())
    x, y, d = data[1]
    opt.zero_grad()
    assert opt.backward(losses_of(model, x, y) * torch.nan, d).isnan()
    assert all(p.grad.isnan().any() for p in (model.conv.weight, model.head.weight))
    opt.zero_grad()
    assert str(opt.state_dict()) == str(before)
    run(opt, model, data[2:])
    assert all(p.isfinite().all() for p in model.parameters())


@every
def test_one_domain_is_plain_training(name: str) -> None:
    """No other domain to differ from; of IRM the loss alone, which has a penalty in each."""
    model = net()
    plain = copy.deepcopy(model)
    x, y, _ = batches(1)[0]
    opt = wrapped(name, model, num_domains=4)
    if name == "IRM":
        opt.pre_anneal_weight = 0.0
    opt.backward(losses_of(model, x, y), torch.full_like(y, 2))
    losses_of(plain, x, y).mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad)
    assert opt.statistics["domain_count"].tolist() == [0, 0, len(y), 0]
    if name in ("IGA", "VREx"):
        assert float(opt.statistics["penalty"]) == 0


@every
def test_statistics(name: str) -> None:
    model = net()
    opt = wrapped(name, model, num_domains=4)
    x, y, _ = batches(1)[0]
    d = torch.tensor([0, 0, 3, 1, 1, 0, 3, 3, 3])
    losses = losses_of(model, x, y)
    opt.backward(losses, d)
    s = opt.statistics
    assert {"loss", "domain_loss", "domain_count", "objective"} <= s.keys()
    assert not any(value.requires_grad for value in s.values())
    assert s["domain_count"].tolist() == [3, 2, 0, 4] and s["domain_loss"][2].isnan()
    close(s["domain_loss"][3], losses.detach()[[2, 6, 7, 8]].mean())
    if name == "GroupDRO":
        assert s["weights"][2] == 0
        close(s["weights"].sum(), torch.tensor(1.0))


@every
def test_settings_live_in_the_group(name: str) -> None:
    cls, given = WRAPPERS[name]
    opt = wrapped(name, net())
    group = opt.param_groups[0]
    for key, value in given.items():
        assert group[f"{opt.prefix}_{key}"] == value == getattr(opt, key)
        assert f"{key}={value}" in repr(opt)
        with pytest.raises(ValueError, match=f"{key}: expected"):
            wrapped(name, net(), **{key: -1})
    with pytest.raises(ValueError, match=r"^base: .*maximize=True"):
        cls(SGD(net().parameters(), lr=0.1, maximize=True))


def test_group_dro_meets_new_domains() -> None:
    model = net()
    opt = wrapped("GroupDRO", model)
    x, y, d = batches(1)[0]
    run(opt, model, [(x, y, d % 2)])
    early = opt.state_dict()["state"][0]["groupdro_q"].clone()
    run(opt, model, [(x, y, torch.full_like(d, 3))])
    q = opt.state_dict()["state"][0]["groupdro_q"]
    close(q, torch.cat([early / 2, torch.full((2,), 0.25).double()]))
    assert q.dtype == torch.float64
    assert opt.statistics["weights"].tolist() == [0, 0, 0, 1]
    run(opt, model, [(x, y, d % 2)])
    assert opt.statistics["weights"].shape == opt.statistics["domain_count"].shape == (4,)


def test_group_dro_of_losses_that_are_far_apart() -> None:
    """Neither an overflow, nor a weight that can never grow again."""
    weight = nn.Parameter(torch.ones(2))
    opt = fastdg.GroupDRO(SGD([weight], lr=0.0), eta=1.0)
    for sizes, weights in (
        ([1e4, 1.0], [1.0, 0.0]),
        ([1e4, 1.0], [1.0, 0.0]),
        ([1.0, 1e4], [0.0, 1.0]),
    ):
        opt.zero_grad()
        opt.backward(weight * torch.tensor(sizes), torch.tensor([0, 1]))
        assert opt.statistics["weights"].tolist() == weights
        opt.step()
    opt.backward(weight[:1] * 3, torch.tensor([0]))  # of no weight at all, but alone
    assert opt.statistics["weights"].tolist() == [1.0, 0.0]


def test_group_dro_states_that_do_not_fit() -> None:
    model = net()
    opt = wrapped("GroupDRO", model)
    run(opt, model, batches(2))
    state = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"^state_dict: .*groupdro_q.*num_domains"):
        wrapped("GroupDRO", net(), num_domains=5).load_state_dict(state)
    del state["state"][0]["groupdro_q"]
    with pytest.raises(ValueError, match=r"^state_dict: .*groupdro_q"):
        wrapped("GroupDRO", net()).load_state_dict(state)


@every
def test_no_module_has_a_hook(name: str) -> None:
    """The tape knows of any forward, one before the wrapper was made among them."""
    model, (batch,) = net(), batches(1, absent=False)
    x, y, d = batch
    losses = losses_of(model, x, y)
    opt = wrapped(name, model)
    tape = opt.tape if name != "IRM" else fastdg.AgrSum(SGD(model.parameters())).tape
    gram = fastdg.domain_gram(tape, losses, d)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        for loss in (losses_of(model, px, py).mean() for _, px, py in parts(batch))
    ]
    close(gram, torch.stack(rows) @ torch.stack(rows).t())
    opt.backward(losses, d)
    opt.step()
    assert not torch_module._has_any_global_hook()
    for module in model.modules():
        tables = [value for key, value in vars(module).items() if key.endswith("_hooks")]
        assert len(tables) > 5 and not any(tables)
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("name", ["VREx", "GroupDRO", "IRM"])
def test_batch_norm_in_training(name: str) -> None:
    """Its statistics are those of the mixed batch, as in DomainBed."""
    model, (batch,) = net(batch_norm=True), batches(1, absent=False)
    twin = copy.deepcopy(model)
    x, y, d = batch
    opt = wrapped(name, model, **({} if name == "GroupDRO" else {"anneal_steps": 0}))
    opt.backward(losses_of(model, x, y), d)
    logits = twin(x)

    class Slices(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return logits[rows]

    objective = {"VREx": vrex, "IRM": irm, "GroupDRO": group_dro(0.5, 3)}[name]
    objective(Slices(), (torch.arange(len(y)), y, d), 7.0)[0].backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad)
    alike(model, twin)


def test_compiled_models() -> None:
    model, (batch,) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), batches(1)
    twin = copy.deepcopy(model)
    x, y, d = batch[0][:, 0, 0, :4].float(), *batch[1:]
    opt, other = wrapped("VREx", model), wrapped("VREx", twin)
    opt.backward(losses_of(model, x, y), d)
    other.backward(losses_of(torch.compile(twin, backend="aot_eager"), x, y), d)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch._dynamo.reset()


READING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Reads(TorchDispatchMode):
    """Counts what would wait for a device: numbers that Python reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*WRAPPERS, "Fish"])
def test_nothing_is_read_but_the_ids(name: str) -> None:
    """Which are on the CPU: an op looks at their range, and Fish whether they are one."""
    engine._plans.clear()
    model = nn.Linear(4, 3)
    base = SGD(model.parameters(), lr=0.1)
    if name == "Fish":
        opt = fastdg.Fish(base, num_domains=2, inner_product=True)
    else:
        opt = WRAPPERS[name][0](base, num_domains=2)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    d = torch.zeros_like(y) if name == "Fish" else y % 2
    for step in range(3):
        opt.zero_grad()
        losses = losses_of(model, x, y)
        with Reads() as reads:
            opt.backward(losses, d)
            opt.step()
        # The first two times a graph is seen, its rows' samples are looked for
        assert step < 2 or reads.count == (1 if name == "Fish" else 0)


@every
def test_the_same_losses_twice(name: str) -> None:
    model, (batch,) = net(), batches(1)
    opt = wrapped(name, model)
    losses = losses_of(model, *batch[:2])
    opt.backward(losses, batch[2], final=False)
    with pytest.raises(RuntimeError, match="backward was already called on th"):
        opt.backward(losses, batch[2])


@every
def test_losses_of_another_model(name: str) -> None:
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    opt = wrapped(name, model)
    losses = losses_of(other, torch.randn(6, 4), torch.arange(6) % 3)
    with pytest.raises(RuntimeError, match=r"^losses: "):
        opt.backward(losses, torch.arange(6) % 2)


@pytest.mark.filterwarnings("ignore:.*IRM takes the output of the last layer")
def test_zero_weight_keeps_an_infinite_penalty_out() -> None:
    for cls in (fastdg.VREx, fastdg.IRM, fastdg.IGA):
        model = nn.Linear(2, 1)
        opt = cls(Adam(model.parameters()), penalty_weight=0.0)
        if cls is not fastdg.IGA:
            opt.pre_anneal_weight = 0.0
        x = torch.tensor([[1e30, 0.0], [-1e30, 0.0], [1e30, 0.0], [0.0, 2.0]])
        opt.backward(model(x)[:, 0], torch.tensor([0, 1, 0, 1]))
        assert not opt.statistics["penalty"].isfinite()
        assert model.weight.grad.isfinite().all(), cls
