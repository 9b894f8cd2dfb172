"""What Fish keeps between steps: in copies and checkpoints, and where others change it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import MAKES, alike, close, fish, losses_of, net
from fishes import inner, linear, one, rounds, run, wrapped
from torch import Tensor, nn
from torch.optim import SGD

import fastdg


@pytest.mark.parametrize("after", range(7))
@pytest.mark.parametrize("through", ["file", "deepcopy", "pickle"])
def test_resume_is_bit_for_bit(through: str, after: int) -> None:
    """A run killed within a meta-iteration goes on as if nothing had been."""
    model = net(batch_norm=True).float()
    opt = wrapped(model, inner_product=through != "file")
    batches = [
        (x, y, d) for domains in rounds(3, torch.float32) for d, (x, y) in enumerate(domains)
    ]
    for x, y, d in batches[:after]:
        inner(opt, model, x, y, d)
    if through == "deepcopy":
        again, resumed = copy.deepcopy((model, opt))
    elif through == "pickle":
        again, resumed = pickle.loads(pickle.dumps((model, opt)))
    else:
        file = io.BytesIO()
        torch.save((model.state_dict(), opt.state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        again = net(batch_norm=True).float()
        resumed = wrapped(again)
        resumed.load_state_dict(state)
        again.load_state_dict(weights)
    assert resumed.position == after % 3 and resumed.steps == after
    before = copy.deepcopy(model.state_dict())
    for x, y, d in batches[after:]:
        inner(resumed, again, x, y, d)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])  # none of them is the other's
    for x, y, d in batches[after:]:
        inner(opt, model, x, y, d)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for key, entry in opt.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, resumed.state_dict()["state"][key][name]), name


def test_one_copy_is_kept_and_no_more() -> None:
    model, data = net().float(), rounds(4, torch.float32)
    opt = wrapped(model)
    run(opt, model, data[:1])
    kept = {p: opt.state[p]["fish_kept"] for p in model.parameters()}
    for p, tensor in kept.items():
        assert torch.equal(tensor, p) and tensor.dtype == p.dtype
    places = [tensor.data_ptr() for tensor in kept.values()]
    run(opt, model, data[1:])
    assert places == [opt.state[p]["fish_kept"].data_ptr() for p in model.parameters()]


def half(p: Tensor) -> None:
    with torch.no_grad():
        p.mul_(0.5)


def other_memory(p: Tensor) -> None:
    p.data = p.data * 0.5


def moved(model: nn.Module) -> None:
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [half(p) for p in m.parameters()],
        lambda m: [other_memory(p) for p in m.parameters()],
        moved,
    ],
    ids=["in place", "other memory", "load_state_dict"],
)
@pytest.mark.parametrize("before", [0, 1])
def test_weights_changed_from_outside(change: Callable[[nn.Module], Any], before: int) -> None:
    """Where the next meta-iteration starts; the inner optimizer's state goes on."""
    model, data = net(batch_norm=True), rounds(3)
    twin = copy.deepcopy(model)
    opt, base = wrapped(model), MAKES["adam"](twin)
    run(opt, model, data[:before])
    list(fish(twin, MAKES["adam"], data[:before], 0.5))
    base.load_state_dict(copy.deepcopy(opt.state_dict()))
    change(model)
    change(twin)
    run(opt, model, data[before : before + 1])
    kept = copy.deepcopy(twin)
    for x, y in data[before]:
        base.zero_grad()
        losses_of(twin, x, y).mean().backward()
        base.step()
    for p, q, r in zip(*(m.parameters() for m in (model, twin, kept)), strict=True):
        close(p, r + 0.5 * (q - r))
    for p, q, r in zip(*(m.buffers() for m in (model, twin, kept)), strict=True):
        if p.is_floating_point():
            close(p, r + 0.5 * (q - r))
    kept.load_state_dict(model.state_dict())
    run(opt, model, data[before + 1 : before + 2])  # and all is as before


def test_buffers_begin_before_the_first_training_forward() -> None:
    """Forwards without gradients move them from outside; two views of a batch do not."""
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)).double()
    opt = wrapped(model, "momentum", num_domains=2)
    x, y = torch.randn(2, 6, 4).double() * 3, torch.arange(6) % 3
    for _ in range(3):
        with torch.no_grad():
            model(x[0] + 5)
        start = model[0].running_mean.clone()
        for d in range(2):
            views = losses_of(model, x[d], y), losses_of(model, x[d] + 1, y)
            opt.zero_grad()
            opt.backward((views[0] + views[1]) / 2, torch.full_like(y, d))
            opt.step()
        mean, expected = x.mean(1), start.clone()
        for d in range(2):
            for shift in (0, 1):
                expected = 0.9 * expected + 0.1 * (mean[d] + shift)
        close(model[0].running_mean, start + 0.5 * (expected - start))
        batches = int(model[0].num_batches_tracked)
    assert batches == 1 + 2 + 1 + 2 + 1 + 2


def test_buffers_of_parts_that_are_called_by_themselves() -> None:
    """No forward of the model as such: they begin where the last meta step left them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    whole = copy.deepcopy(model)
    opt, other = wrapped(model, "momentum"), wrapped(whole, "momentum")
    x, y = torch.randn(3, 6, 4).double(), torch.arange(6) % 3
    for _ in range(2):
        for d in range(3):
            opt.zero_grad()
            losses = F.cross_entropy(model[2](model[1](model[0](x[d]))), y, reduction="none")
            opt.backward(losses, torch.full_like(y, d))
            opt.step()
            inner(other, whole, x[d], y, d)
        alike(model, whole, 0)


def test_without_a_model_buffers_stay_where_they_got() -> None:
    model, (domains,) = net(batch_norm=True), rounds(1)
    twin = copy.deepcopy(model)
    run(fastdg.Fish(MAKES["adam"](model), num_domains=3), model, [domains])
    base = MAKES["adam"](twin)
    for x, y in domains:
        losses_of(twin, x, y).mean().backward()
        base.step()
        base.zero_grad()
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        close(p.double(), q.double())


def test_buffers_of_every_kind() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("share", torch.zeros(2, dtype=torch.bfloat16))
            self.register_buffer("seen", torch.zeros(2, dtype=torch.int32))
            self.register_buffer("flag", torch.zeros((), dtype=torch.bool))
            self.register_buffer("scratch", torch.zeros(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.share = self.share + 1
            self.seen += 3
            self.flag.fill_(True)
            self.scratch += 1
            return super().forward(x)

    model = Counting()
    opt = fastdg.Fish(SGD(model.parameters(), lr=0.1), num_domains=2, meta_lr=0.4, model=model)
    for d in (0, 1, 0, 1):
        one(model, opt, d)
    torch.testing.assert_close(model.share, torch.full((2,), 1.6).bfloat16())
    assert model.share.dtype == torch.bfloat16
    assert model.seen.tolist() == [4, 4] and model.seen.dtype == torch.int32  # 2.4 and 4.4
    assert bool(model.flag) and model.scratch.tolist() == [4, 4, 4]


def test_low_precision_weights_are_kept_as_they_are() -> None:
    model = nn.Linear(4, 3).bfloat16()
    opt = fastdg.Fish(SGD(model.parameters(), lr=0.1), num_domains=2)
    x, y = torch.randn(5, 4).bfloat16(), torch.arange(5) % 3
    inner(opt, model, x, y, 0)
    state = copy.deepcopy(opt.state_dict())
    assert state["state"][0]["fish_kept"].dtype == torch.bfloat16
    again = fastdg.Fish(SGD(model.parameters(), lr=0.1), num_domains=2)
    again.load_state_dict(state)
    inner(again, model, x, y, 1)
    assert again.state[model.weight]["fish_kept"].dtype == torch.bfloat16


def test_an_optimizer_that_was_wrapped_before_goes_on() -> None:
    model, opt = linear()
    one(model, opt)
    start = opt.state[model.weight]["fish_kept"].clone()
    again = fastdg.Fish(opt.base, num_domains=2, meta_lr=0.0)
    assert again.position == 1
    one(model, again, 1)
    assert torch.equal(model.weight, start)


def test_states_that_do_not_fit() -> None:
    model = net(batch_norm=True)
    opt = wrapped(model)
    (domains,) = rounds(1)
    inner(opt, model, *domains[0], 0)
    state = copy.deepcopy(opt.state_dict())
    bare = fastdg.Fish(MAKES["adam"](net(batch_norm=True)), num_domains=3)
    with pytest.raises(ValueError, match=r"fish_buffers must have 0 .*model=.* got 8"):
        bare.load_state_dict(state)
    for entry in state["state"].values():
        entry.pop("fish_kept")
    with pytest.raises(ValueError, match="of 1 steps but has no fish_kept"):
        wrapped(net(batch_norm=True)).load_state_dict(state)
    assert bare.position == 0 and not bare.state
    small, opt = linear()
    one(small, opt)
    wide = nn.Linear(5, 3)
    with pytest.raises(ValueError, match=r"fish_kept of .* got \(3, 4\)"):
        fastdg.Fish(SGD(wide.parameters(), lr=0.1), num_domains=2).load_state_dict(opt.state_dict())


def test_the_bare_optimizer_s_state_starts_anew() -> None:
    model, opt = linear()
    state = copy.deepcopy(SGD(model.parameters(), lr=0.1).state_dict())
    one(model, opt)
    opt.load_state_dict(state)
    assert opt.position == 0 and opt.steps == 0
    start = model.weight.detach().clone()
    opt.meta_lr = 0.0
    for d in range(2):
        one(model, opt, d)
    assert torch.equal(model.weight, start)
