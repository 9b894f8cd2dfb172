"""What a class declares: its arguments, and its state, which is saved, loaded and checked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bases import batch, network, steps
from torch import Tensor, nn
from torch.optim import SGD, Adam

import fastdg
from fastdg.core.declared_state import DOMAINS, PerParameter, PerRun, RunValue
from fastdg.core.hyper import argument, check_module, check_weight, hyper
from fastdg.core.step_batch import StepBatch, StepRecord


class Trace(fastdg.DomainOptimizer):
    """Keeps sums of everything that an algorithm may keep something of."""

    rate: float = hyper(0.5, check_weight)

    total = PerParameter(
        "total",
        "sums of gradients",
        rows=DOMAINS,
        begin=lambda opt: {p: p.new_zeros((3, *p.shape)) for p in opt._names},
    )
    worst = PerRun("worst", "worst losses", rows=DOMAINS)
    seen = RunValue(0)
    last = RunValue[list[float]]([])

    def objective(self, batch: StepBatch) -> Tensor:
        batch.moments(differentiable=False)
        return batch.loss

    def after_step(self, record: StepRecord) -> None:
        for name, mean in record.mean.items():
            p = self.tape.names[name]
            self.total[p] = self.total.get(p, 0) + self.rate * mean
        before = 0 * record.domain_losses if self.worst is None else self.worst
        self.worst = torch.maximum(record.domain_losses, before)
        self.seen += int(record.counts.sum())
        self.last = [*self.last, float(record.loss)][-2:]


def made(**more: Any) -> tuple[nn.Module, Trace]:
    torch.manual_seed(0)
    model = network()
    return model, Trace(Adam(model.parameters()), **{"num_domains": 3, **more})


def test_declared_state_goes_on_bit_for_bit() -> None:
    model, opt = made()
    steps(model, opt, range(3))
    again, resumed = made()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert (resumed.steps, resumed.seen, resumed.last) == (3, 27, opt.last)
    third, copied = copy.deepcopy((model, opt))
    for net, other in ((model, opt), (again, resumed), (third, copied)):
        steps(net, other, range(3, 5))
    for other in (resumed, copied):
        assert torch.equal(other.worst, opt.worst) and other.last == opt.last
        for p, q in zip(opt.total.values(), other.total.values(), strict=True):
            assert torch.equal(p, q)
    entry = opt.state_dict()["state"][0]
    assert entry["trace_total"].shape == (3, 5, 4) and entry["trace_worst"].shape == (3,)


def test_a_new_run_begins_with_what_is_declared() -> None:
    """As torch.distributed.checkpoint makes it, before it loads."""
    model, opt = made()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert {p: t.shape for p, t in opt.total.items()} == {
        p: (3, *p.shape) for p in model.parameters()
    }
    assert opt.worst is None and opt.seen == 0


@pytest.mark.parametrize("key", ["trace_total", "trace_worst"])
def test_declared_state_that_does_not_fit(key: str) -> None:
    model, opt = made()
    steps(model, opt, range(2))
    state = copy.deepcopy(opt.state_dict())
    _, other = made(num_domains=4)
    with pytest.raises(ValueError, match=r"^state_dict: trace_total .*num_domains"):
        other.load_state_dict(state)
    assert other.steps == 0 and not other.total
    lacking = copy.deepcopy(state)
    for entry in lacking["state"].values():
        entry.pop(key, None)
    with pytest.raises(ValueError, match=rf"^state_dict: .*2 steps but has no {key}"):
        made()[1].load_state_dict(lacking)
    for entry in state["state"].values():
        entry["trace_total"] = entry["trace_total"][..., :-1]
    with pytest.raises(ValueError, match=r"^state_dict: trace_total of .* got \(5, 3\)"):
        made()[1].load_state_dict(state)


# -- arguments --


def test_an_argument_by_its_place_and_one_that_is_not_there() -> None:
    class Around(fastdg.DomainOptimizer):
        model: nn.Module = argument(check_module, kw_only=False, show=None)
        check = True

    model = network()
    opt = Around(SGD(model.parameters(), lr=0.1), model)
    assert opt.model is model and "model" not in repr(opt)
    with pytest.raises(TypeError, match=r"^check: "):
        Around(SGD(model.parameters(), lr=0.1), model, check=False)
    with pytest.raises(TypeError, match=r"^model: Around needs"):
        Around(SGD(model.parameters(), lr=0.1))


def test_an_init_of_one_s_own_hands_on_what_is_declared() -> None:
    class Own(fastdg.VREx):
        def __init__(self, base: Any, strength: float, **more: Any) -> None:
            super().__init__(base, penalty_weight=strength, **more)

    base = SGD(network().parameters(), lr=0.1)
    assert Own(base, 3.0, num_domains=2).penalty_weight == 3.0
    with pytest.raises(TypeError, match=r"^strenght: Own"):
        Own(base, 3.0, strenght=2.0)


@pytest.mark.parametrize("name", ["Fishr", "MIRO", "SWAD", "RISE", "GramSurgery", "Fish"])
def test_no_optimizer(name: str) -> None:
    with pytest.raises(TypeError, match=f"^base: {name} needs"):
        getattr(fastdg, name)()


def test_the_longer_name_is_suggested() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"^penalty: .*penalty_weight="):
        fastdg.Fishr(SGD(model.parameters(), lr=0.1), penalty=1.0)
    losses, domains = batch(model)
    opt = fastdg.IRM(SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"^logit: .*logits="):
        opt.backward(losses, domains, logit=losses)
    with pytest.raises(TypeError, match=r"^labels: .*logits= \(IRM\)"):
        opt.backward(losses, domains, labels=domains)


def test_a_closure_that_asks_for_a_domain_where_none_is_given() -> None:
    opt = fastdg.VREx(SGD(network().parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"^closure: VREx"):
        opt.step(lambda d: None)


class Mean(fastdg.DomainOptimizer):
    def objective(self, batch: StepBatch) -> Tensor:
        return batch.domain_mean(batch.domain_losses)


def test_a_class_that_looks_at_no_sample_is_told_how_to_say_so() -> None:
    for kind, told in ((Mean, True), (fastdg.AgrSum, False)):
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        with pytest.warns(UserWarning, match=r"^params: ") as caught:
            kind(SGD(model.parameters(), lr=0.1)).backward(*batch(model))
        assert ("Mean.objective" in str(caught[0].message)) == told
        assert ("looks_at_samples = False" in str(caught[0].message)) == told


def step(opt: Any, model: nn.Module, seed: int = 0, domains: int = 3) -> Tensor:
    torch.manual_seed(seed)
    losses = model(torch.randn(12, 4)).square().sum(1)
    opt.zero_grad()
    loss = opt.backward(losses, torch.arange(12) % domains)
    opt.step()
    return loss


def test_state_of_a_run_is_a_copy_of_its_value() -> None:
    class Last(fastdg.ERM):
        last = PerRun("last", "last loss")

        def after_step(self, record: StepRecord) -> None:
            self.last = record.loss

    model = nn.Linear(4, 3)
    opt = Last(torch.optim.SGD(model.parameters(), lr=0.1))
    returned = [step(opt, model, seed) for seed in range(3)]
    assert len({float(loss) for loss in returned}) == 3
    assert opt.last == returned[-1]
    opt.last = returned[0].double()
    assert opt.last.dtype == torch.float64


def test_state_of_parameters_may_be_assigned() -> None:
    class Trace(fastdg.ERM):
        trace = PerParameter("trace", "trace")

        def after_step(self, record: StepRecord) -> None:
            self.trace = {p: p.detach().clone() for p in self._names}

    model = nn.Linear(4, 3)
    opt = Trace(torch.optim.SGD(model.parameters(), lr=0.1))
    step(opt, model)
    saved = opt.state_dict()["state"]
    torch.testing.assert_close(saved[0][f"{opt.prefix}_trace"], model.weight.detach())


def test_another_number_of_domains_is_refused_without_a_history_too() -> None:
    model = nn.Linear(4, 3)
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), num_domains=5)
    step(opt, model, domains=5)
    state = opt.state_dict()
    state["param_groups"][0]["fishr_ema"] = None
    other = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), num_domains=3)
    with pytest.raises(ValueError, match="num_domains"):
        other.load_state_dict(state)


def test_an_attribute_model_is_kept() -> None:
    model = nn.Linear(4, 3)
    opt = fastdg.ERM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    opt.model = model
    assert opt.model is model


def test_a_constructor_that_fails_changes_nothing_inside() -> None:
    model = nn.Linear(4, 3)
    inner = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="model"):
        fastdg.SWAD(inner, nn.Linear(2, 2), num_domains=3)
    assert inner.num_domains is None


def test_lists_of_a_run_are_its_own() -> None:
    model = nn.Linear(4, 3)
    first, second = (
        fastdg.SWAD(torch.optim.SGD(model.parameters(), lr=0.1), model) for _ in range(2)
    )
    first.state_dict()["param_groups"][0]["swad_losses"].append(99.0)
    third = fastdg.SWAD(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for opt in (second, third):
        assert opt.param_groups[0]["swad_losses"] == []
