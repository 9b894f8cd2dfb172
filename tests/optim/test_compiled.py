"""Compiled training: forward and backward in one graph, and what a compiled model may be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import WRAPS, Network, model_of, wrap
from on_device import DEVICE
from torch import Tensor, nn
from torch.optim import SGD, Adam

import fastdg

Counters = Callable[[], tuple[int, int]]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch in itself

# Those whose generator is their own are made without one
WAYS: dict[str, Callable[..., Any]] = {
    **WRAPS,
    "SWAD": lambda base, **more: fastdg.SWAD(base, model_of(base), **more),
    "Fishr": lambda base, **more: wrap(base, params="all", **more),
    "AgrRand": fastdg.AgrRand,
    "PCGrad": fastdg.PCGrad,
}


@pytest.fixture
def counters() -> Iterator[Counters]:
    """Graphs compiled so far, and how often one broke."""
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    yield lambda: (counted["stats"]["unique_graphs"], sum(counted["graph_break"].values()))
    torch._dynamo.reset()


def data(seed: int, samples: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator)
    y = torch.randint(3, (samples,), generator=generator)
    return x, y, torch.randint(3, (samples,), generator=generator)


def losses_with(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def eager_steps(model: nn.Module, opt: Any, batches: Any) -> None:
    for seed, (x, y, domains) in enumerate(batches):
        opt.zero_grad()
        torch.manual_seed(seed)
        opt.backward(losses_with(model)(x, y), domains)
        opt.step()


def same_state(model: nn.Module, other: nn.Module, opt: Any, other_opt: Any) -> None:
    """Bit for bit: weights, buffers, all of the optimizer's state, and what it says of the step."""
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    one, two = opt.state_dict(), other_opt.state_dict()
    torch.testing.assert_close(one["state"], two["state"], rtol=0, atol=0)
    torch.testing.assert_close(opt.statistics, other_opt.statistics, rtol=0, atol=0, equal_nan=True)


def twins(
    way: Callable[..., Any], make: Callable[[], nn.Module] = Network, watched: bool = False
) -> list[Any]:
    """The same model and wrapper twice; ``watched``: with ``model=``, as of compiled modules torch
    warns of hooks on all modules."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make()
        more = {"model": model} if watched else {}
        found += [model, way(Adam(model.parameters(), lr=1e-2), num_domains=3, **more)]
    return found


# -- forward and backward in one graph --


@pytest.mark.parametrize("name", WAYS)
def test_one_graph(name: str, counters: Counters) -> None:
    """As the eager wrapper, bit for bit; a graph each side of the anneal, and none after that."""
    model, opt, twin, other = twins(WAYS[name])
    backward = fastdg.compiled(other, losses_with(twin), backend="aot_eager")
    graphs = []
    for seed in range(9):
        eager_steps(model, opt, [data(seed)])
        x, y, domains = data(seed)
        other.zero_grad()
        torch.manual_seed(0)
        loss = backward(x, y, domains=domains)
        assert torch.equal(loss, opt.statistics["loss"])
        other.step()
        graphs.append(counters()[0])
    same_state(model, twin, opt, other)
    assert graphs[5] == graphs[-1] == 1
    assert counters()[1] == 0


class Counting:
    """A weighting whose state is seen when it moves."""

    calls = 0

    def __call__(self, gram: Tensor) -> Tensor:
        self.calls += 1
        return gram.new_full((len(gram),), 1 / self.calls)


def test_a_weighting_that_has_moved_is_not_traced() -> None:
    """A graph would hold what it was at the third batch."""
    model = Network()
    opt = fastdg.GramSurgery(SGD(model.parameters(), lr=0.1), Counting(), num_domains=3)
    backward = fastdg.compiled(opt, losses_with(model), backend="eager")
    x, y, domains = data(0)
    with pytest.raises(TypeError, match=r"^opt: the Counting of GramSurgery keeps state"):
        for _ in range(3):
            opt.zero_grad()
            backward(x, y, domains=domains)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.view(-1, 1, 2, 2)).mean((2, 3)))


def test_buffers_dropout_and_the_anneal(counters: Counters) -> None:
    """Running statistics move once a step; eval mode, and the anneal's end, are another graph."""
    model, opt, twin, other = twins(wrap, Convolutions)  # anneal_steps=2
    backward = fastdg.compiled(other, losses_with(twin), backend="aot_eager")
    for seed in range(8):
        if seed == 5:
            model.eval(), twin.eval()
        eager_steps(model, opt, [data(seed)])
        x, y, domains = data(seed)
        other.zero_grad()
        torch.manual_seed(0)
        backward(x, y, domains=domains)
        other.step()
    same_state(model, twin, opt, other)
    assert counters() == (2, 0)


def test_gradients_are_added(counters: Counters) -> None:
    """To what ``.grad`` holds, at every stage; those of other trained parameters too."""
    model = Network()
    opt = fastdg.AgrSum(SGD(model[2].parameters(), lr=0.1), num_domains=3)
    backward = fastdg.compiled(opt, losses_with(model), backend="aot_eager")
    x, y, domains = data(0)
    opt.backward(losses_with(model)(x, y), domains)
    once = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for times in range(1, 6):
        backward(x, y, domains=domains)
        for p, grad in zip(model.parameters(), once, strict=True):
            torch.testing.assert_close(p.grad, times * grad)


def test_kinds_of_batches(counters: Counters) -> None:
    """A ragged batch runs eagerly when it comes first, and frozen parameters have no gradient."""
    model = Network()
    opt = fastdg.AgrSum(SGD(model.parameters(), lr=0.1), num_domains=3)
    backward = fastdg.compiled(opt, losses_with(model), backend="aot_eager")
    for samples in (9, 9, 9, 5, 9):
        x, y, domains = data(samples, samples)
        opt.zero_grad()
        backward(x, y, domains=domains)
    assert counters()[0] == 1
    model[0].requires_grad_(False)
    for _ in range(3):
        opt.zero_grad()
        backward(x, y, domains=domains)
        assert model[0].weight.grad is None
        assert model[2].weight.grad is not None
    assert counters()[0] == 2


def test_a_setting_that_never_rests() -> None:
    model = Network()
    opt = fastdg.Fishr(SGD(model.parameters(), lr=0.1), num_domains=3, ema=None, anneal_steps=0)
    backward = fastdg.compiled(opt, losses_with(model), backend="eager")
    x, y, domains = data(0)
    for step in range(8):
        opt.penalty_weight = 1.0 + step
        backward(x, y, domains=domains)
    opt.penalty_weight = 100.0
    with pytest.warns(UserWarning, match=r"^compiled: .*eagerly"):
        backward(x, y, domains=domains)
    backward(x, y, domains=domains)  # is known, and traced
    backward(x, y, domains=domains)
    assert len(backward.graphs) == 1


def test_the_whole_step(counters: Counters) -> None:
    """``step`` compiled too: as the eager one, up to the rounding of a compiled Adam."""
    model, opt, twin, other = twins(WAYS["AgrSum"])
    backward = fastdg.compiled(other, losses_with(twin), backend="aot_eager")
    step = torch.compile(other.step, backend="aot_eager")
    graphs = []
    for seed in range(7):
        eager_steps(model, opt, [data(seed)])
        x, y, domains = data(seed)
        other.zero_grad()
        backward(x, y, domains=domains)
        step()
        graphs.append(counters()[0])
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=4e-6)
    assert graphs[4] == graphs[-1]
    assert opt.steps == other.steps


@pytest.mark.matrix
def test_with_inductor(counters: Counters) -> None:
    model, opt, twin, other = twins(WAYS["Fishr"])
    backward = fastdg.compiled(other, losses_with(twin))
    for seed in range(6):
        eager_steps(model, opt, [data(seed)])
        x, y, domains = data(seed)
        other.zero_grad()
        backward(x, y, domains=domains)
        other.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert counters() == (1, 0)


def test_refusals() -> None:
    model = Network()
    losses = losses_with(model)
    x, y, domains = data(0)

    def sgd() -> SGD:
        return SGD(model.parameters(), lr=0.1)

    with pytest.raises(TypeError, match=r"^opt: .*got SGD"):
        fastdg.compiled(sgd(), losses)
    with pytest.raises(ValueError, match=r"^num_domains: .*AgrSum"):
        fastdg.compiled(fastdg.AgrSum(sgd()), losses)
    with pytest.raises(ValueError, match=r"^generator: .*PCGrad"):
        fastdg.compiled(WRAPS["PCGrad"](sgd(), num_domains=3), losses)
    for keeping in (fastdg.GradVac, partial(fastdg.NashMTL, update_every=2)):
        with pytest.raises(TypeError, match=r"^opt: .*keeps state"):
            fastdg.compiled(keeping(sgd(), num_domains=3), losses)
    fastdg.compiled(fastdg.NashMTL(sgd(), num_domains=3), losses)
    opt = fastdg.AgrSum(sgd(), num_domains=3)
    with pytest.raises(TypeError, match=r"^forward: .*got Network"):
        fastdg.compiled(opt, model)
    backward = fastdg.compiled(opt, losses)
    with pytest.raises(ValueError, match=r"^domains: .*num_domains=3.*got 5"):
        backward(x, y, domains=domains + 3)
    with pytest.raises(ValueError, match=r"^batch: .*gradient"):
        backward(x.requires_grad_(), y, domains=domains)
    x = x.detach()
    opt.backward(losses(x, y), domains, final=False)
    with pytest.raises(RuntimeError, match=r"^compiled: .*micro-batch"):
        backward(x, y, domains=domains)
    opt.zero_grad()
    opt.backward(losses(x, y), domains, scaler=torch.amp.GradScaler(DEVICE))
    with pytest.raises(RuntimeError, match=r"^compiled: .*GradScaler"):
        backward(x, y, domains=domains)
    opt.zero_grad()

    def looks(x: Tensor, y: Tensor) -> Tensor:
        return losses(x, y) if x.sum() > -1e9 else losses(-x, y)

    backward = fastdg.compiled(opt, looks)
    backward(x, y, domains=domains)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"^compiled: .*AgrSum"):
        backward(x, y, domains=domains)
    for p, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)
    model[0].weight.register_hook(lambda grad: grad)
    backward = fastdg.compiled(opt, losses)
    with pytest.raises(RuntimeError, match=r"^compiled: .*hooks"):
        backward(x, y, domains=domains)


# -- a model that is compiled itself --


def test_a_compiled_model_below_the_head(counters: Counters) -> None:
    """Fishr on the head of a compiled network is the eager one."""
    model, opt, twin, other = twins(wrap, watched=True)
    below = torch.compile(nn.Sequential(twin[0], twin[1]), backend="aot_eager")
    compiled = nn.Sequential(below, twin[2])
    eager_steps(model, opt, map(data, range(5)))
    eager_steps(compiled, other, map(data, range(5)))
    same_state(model, twin, opt, other)
    assert counters() == (1, 0)


def test_a_model_compiled_as_a_whole(counters: Counters) -> None:
    """It is one operation: its head is not known, and its domains' gradients are autograd's."""
    model, opt, twin, other = twins(fastdg.AgrSum, watched=True)
    compiled = torch.compile(twin, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"^params: .*'head'.*fastdg\.compiled"):
        eager_steps(compiled, wrap(SGD(twin.parameters(), lr=0.1), model=twin), [data(0)])
    eager_steps(model, opt, map(data, range(3)))
    with pytest.warns(UserWarning, match=r"^params: .*CompiledFunction"):
        eager_steps(compiled, other, map(data, range(3)))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert counters() == (1, 0)


@pytest.mark.parametrize("name", ["AgrSum", "PCGrad"])
def test_a_compiled_model_domain_by_domain(name: str, counters: Counters) -> None:
    """A forward for each domain needs no hooks."""
    model, opt, twin, other = twins(WAYS[name], watched=True)
    compiled = torch.compile(twin, backend="aot_eager")
    for seed in range(4):
        x, y, _ = data(seed)
        for net, wrapper in ((model, opt), (compiled, other)):
            wrapper.zero_grad()
            torch.manual_seed(seed)
            for d in range(3):
                part = slice(3 * d, 3 * d + 3)
                losses = losses_with(net)(x[part], y[part])
                wrapper.backward(losses, torch.full((3,), d), final=d == 2)
            wrapper.step()
    same_state(model, twin, opt, other)
    assert counters() == (1, 0)


SCRIPTED: dict[str, Callable[..., Any]] = {
    "AgrSum": fastdg.AgrSum,
    "Fishr": partial(fastdg.Fishr, anneal_steps=0, penalty_weight=3.0),
    "Fishr, before the anneal": partial(fastdg.Fishr, penalty_weight=3.0),
}


def scripted_twins(name: str) -> list[Any]:
    """A model of a class of its own: the first forwards of a scripted class are not compiled."""

    class Fresh(nn.Sequential):
        pass

    layers = lambda: Fresh(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
    return twins(SCRIPTED[name], make=layers)


@pytest.mark.filterwarnings("ignore:params.*DifferentiableGraph")
@pytest.mark.parametrize("name", SCRIPTED)
def test_a_scripted_model(name: str) -> None:
    """After two steps it is one operation, and its head that of the steps before."""
    model, opt, twin, other = scripted_twins(name)
    scripted = torch.jit.script(twin)
    eager_steps(model, opt, map(data, range(4)))
    eager_steps(scripted, other, map(data, range(4)))
    assert "DifferentiableGraph" in scripted(data(0)[0]).grad_fn.name()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    copy.deepcopy(twin)


def test_the_head_of_a_scripted_model_that_has_run() -> None:
    """The first step says what to do."""
    _, _, model, opt = scripted_twins("Fishr")
    scripted = torch.jit.script(model)
    for _ in range(3):
        scripted(data(0)[0]).sum().backward()
    with pytest.raises(RuntimeError, match=r"^params: 'head' is unknown.*optimized_execution"):
        eager_steps(scripted, opt, map(data, range(1)))
    model, opt, twin, other = scripted_twins("Fishr")
    scripted = torch.jit.script(twin)
    eager_steps(model, opt, map(data, range(4)))
    with torch.jit.optimized_execution(False):
        eager_steps(scripted, other, map(data, range(4)))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
