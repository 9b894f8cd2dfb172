"""The losses of several tasks from one forward: each task is a domain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

import fastdg


class Tasks(nn.Module):
    """A body that two heads share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.classes, self.number = nn.Linear(8, 3), nn.Linear(8, 1)
        self.double()

    def forward(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = samples(1) if x is None else x
        z = self.body(x)
        labels, value = torch.arange(6) % 3, self.number(z).squeeze(1)
        return F.cross_entropy(self.classes(z), labels, reduction="none"), (value - x[:, 0]) ** 2


def samples(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def rows(model: Tasks) -> Tensor:
    """The gradient of each task's mean loss, flat."""
    parameters, found = list(model.parameters()), []
    for loss in model():
        grads = torch.autograd.grad(loss.mean(), parameters, retain_graph=True, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        found.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    return torch.stack(found)


def step(opt: Any, losses: Any, model: Tasks) -> Tensor:
    opt.zero_grad()
    opt.backward(losses)  # without a warning that the tasks share layers
    zeros = ((p, torch.zeros_like(p)) for p in model.parameters())
    return torch.cat([(z if p.grad is None else p.grad).flatten() for p, z in zeros])


@pytest.mark.parametrize("mean", [False, True], ids=["of samples", "0-dim"])
@pytest.mark.parametrize("kind", [fastdg.PCGrad, fastdg.CAGrad, fastdg.AgrSum])
def test_gradients_of_tasks_are_combined(kind: Any, mean: bool) -> None:
    model = Tasks()
    expected = rows(model)
    opt = kind(SGD(model.parameters(), lr=0.1))
    losses = [loss.mean() if mean else loss for loss in model()]
    found = step(opt, losses, model)
    assert torch.equal(opt.statistics["domain_count"], torch.tensor([1, 1] if mean else [6, 6]))
    if kind is fastdg.AgrSum:
        agree = expected[0].sign() == expected[1].sign()
        torch.testing.assert_close(found, expected.mean(0) * agree, rtol=1e-10, atol=1e-12)
        return
    torch.testing.assert_close(opt.statistics["gram"], expected @ expected.t(), rtol=1e-10, atol=0)
    weights = opt.statistics["weights"]
    torch.testing.assert_close(found, weights @ expected, rtol=1e-10, atol=1e-12)


def test_plain_training_is_on_their_mean() -> None:
    model = Tasks()
    expected = rows(model).mean(0)
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1), rho=0.0, model=model)
    opt.step(lambda: opt.backward(list(model())))
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_under_no_grad_as_with_one_tensor() -> None:
    model = Tasks()
    expected, losses = rows(model).mean(0), list(model())
    with torch.no_grad():
        fastdg.ERM(SGD(model.parameters(), lr=0.1)).backward(losses)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [fastdg.ERM, fastdg.PCGrad])
@pytest.mark.filterwarnings("ignore:params. .*:UserWarning")
def test_losses_that_were_used_are_told(kind: Any) -> None:
    model = Tasks()
    opt = kind(SGD(model.parameters(), lr=0.1))
    losses = list(model())
    opt.backward(losses, final=False)
    with pytest.raises(RuntimeError, match=r"^losses: .*backward was already called on them"):
        opt.backward(losses)


def test_bad_tasks_are_told() -> None:
    model = Tasks()
    opt = fastdg.PCGrad(SGD(model.parameters(), lr=0.1))
    a, b = model()
    with pytest.raises(ValueError, match=r"^domains: expected none with the losses of several"):
        opt.backward([a, b], torch.zeros(6))
    with pytest.raises(TypeError, match=r"^losses: .*got float for task 1"):
        opt.backward([a, 1.0])
    with pytest.raises(TypeError, match=r"^losses: .*got shape \(6, 1\) for task 0"):
        opt.backward([a.unsqueeze(1), b])
    with pytest.raises(ValueError, match=r"^losses: .*empty list"):
        opt.backward([])


def test_a_closure_returns_the_losses_of_tasks() -> None:
    model, twin = Tasks(), Tasks()
    opt = fastdg.PCGrad(SGD(model.parameters(), lr=0.1), generator=torch.Generator())
    other = fastdg.PCGrad(SGD(twin.parameters(), lr=0.1), generator=torch.Generator())

    def closure() -> list[Tensor]:
        opt.zero_grad()
        return list(model())

    opt.step(closure)
    other.backward(list(twin()))
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"^closure: .*two tensors with a graph.*as a list"):
        opt.step(lambda: tuple(loss.mean() for loss in model()))


def test_what_is_no_list_of_losses_is_said() -> None:
    model = Tasks()
    opt = fastdg.PCGrad(SGD(model.parameters(), lr=0.1))
    a, b = model()
    for losses, kind, words in (
        ([a.detach(), b], ValueError, r"^losses: expected losses with their graph.* task 0"),
        ([a, b.unsqueeze(1)], TypeError, r"^losses: .*task 1\. Reduce to one loss per sample"),
        (torch.stack([a.mean(), b.mean()]), TypeError, r"^domains: .*pass a list"),
    ):
        with pytest.raises(kind, match=words):
            opt.backward(losses)
    with pytest.raises(TypeError, match=r"^losses: .*got float for task 0"):
        opt.backward(a.tolist(), torch.zeros(6).long())


def test_a_wrapped_body_has_the_gradient_of_torchjd_s_mtl_backward() -> None:
    autojac = pytest.importorskip("torchjd.autojac", reason="torchjd is not installed")
    from torchjd.aggregation import IMTLG

    model = Tasks()
    heads = [*model.classes.parameters(), *model.number.parameters()]
    x = torch.randn(6, 4, dtype=torch.float64)
    grads = []
    for ours in (True, False):
        model.zero_grad()
        z = model.body(x)
        tasks = [F.cross_entropy(model.classes(z), torch.arange(6) % 3), model.number(z).mean()]
        if ours:
            fastdg.IMTLG(SGD(model.body.parameters(), lr=0.1)).backward(tasks)
        else:
            autojac.mtl_backward(tasks, features=z)
            autojac.jac_to_grad(model.body.parameters(), IMTLG())
        grads.append([[p.grad.clone() for p in of] for of in (model.body.parameters(), heads)])
    (body, head), (expected, alone) = grads
    torch.testing.assert_close(body, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close([len(tasks) * g for g in head], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mean", [False, True], ids=["of samples", "0-dim"])
@pytest.mark.parametrize("kind", [fastdg.ERM, fastdg.PCGrad, fastdg.Fishr])
def test_a_graph_is_the_eager_step(kind: Any, mean: bool) -> None:
    model, twin = Tasks(), Tasks()
    opt, other = (kind(SGD(m.parameters(), lr=0.1), num_domains=2) for m in (model, twin))

    def losses(m: Tasks, x: Tensor) -> list[Tensor]:
        return [loss.mean() if mean else loss for loss in m(x)]

    backward = fastdg.compiled(opt, lambda x: losses(model, x), backend="aot_eager")
    for seed in range(4):
        torch.manual_seed(seed)
        opt.zero_grad()
        loss = backward(samples(seed))
        opt.step()
        torch.manual_seed(seed)
        other.zero_grad()
        assert torch.equal(loss, other.backward(losses(twin, samples(seed))))
        other.step()
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert len(backward.graphs) == 1


def test_a_graph_says_what_its_forward_has_to_return() -> None:
    model = Tasks()
    opt = fastdg.PCGrad(SGD(model.parameters(), lr=0.1), num_domains=2)
    with pytest.raises(ValueError, match=r"^domains: expected none with the losses of several"):
        fastdg.compiled(opt, lambda: list(model()))(domains=torch.zeros(6).long())
    for result in (model, lambda: (list(model()), model()[0]), lambda: (*model(), model()[0])):
        with pytest.raises(TypeError, match=r"^forward: .*got the tuple \(.*as a list"):
            fastdg.compiled(opt, lambda result=result: result())()
    with pytest.raises(TypeError, match=r"^domains: .*got none.*domains=domains"):
        fastdg.compiled(opt, lambda: model()[0])()
