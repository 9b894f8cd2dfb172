"""RISE against loops over samples, in float64; its inputs; and what it goes together with."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_device import DEVICE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdg
from fastdg.text import text_tables

C, A, E, N = 3, 2, 5, 8


class Student(nn.Module):
    """A backbone, the embedding, and a classifier on it that starts as the texts."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 7), nn.Tanh())
        self.embed = nn.Linear(7, E)
        self.head = nn.Linear(E, C)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(self.backbone(x)))


def tables(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Of any length, as an encoder gives them."""
    generator = torch.Generator().manual_seed(1)
    classes = 4 * torch.randn(C, E, generator=generator, dtype=torch.float64)
    anchors = classes.unsqueeze(1) + torch.randn(C, A, E, generator=generator, dtype=torch.float64)
    return classes.to(dtype), anchors.to(dtype)


def data(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, labels, domains and the teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (n,), generator=generator)
    teacher = 5 * torch.randn(n, C, generator=generator, dtype=torch.float64)
    return x, y, torch.arange(n) % 2, teacher


def naive(
    model: Student, x: Tensor, y: Tensor, teacher: Tensor | None, weights: dict[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The term, sample by sample and anchor by anchor, and its parts."""
    classes, anchors = tables()
    tau, parts = weights["temperature"], {"absolute": 0.0, "relative": 0.0, "distillation": 0.0}
    for n in range(len(x)):
        s = model.embed(model.backbone(x[n]))
        z = model.head(s)
        parts["absolute"] += (1 - F.cosine_similarity(s, classes[y[n]], 0)) / len(x)
        ours = torch.stack([F.cosine_similarity(s, k, 0) for k in anchors[y[n]]]).softmax(0)
        theirs = torch.stack(
            [F.cosine_similarity(classes[y[n]], k, 0) for k in anchors[y[n]]]
        ).softmax(0)
        parts["relative"] += 10 * (ours - theirs).square().mean() / len(x)
        if teacher is not None:
            p, q = (teacher[n] / tau).softmax(0), (z / tau).softmax(0)
            kl = sum(p[c] * (p[c].log() - q[c].log()) for c in range(C))
            parts["distillation"] += tau**2 * kl / len(x)
    if teacher is None:
        del parts["distillation"]
    return sum(weights[key] * value for key, value in parts.items()), parts  # type: ignore[return-value]


WEIGHTS = {"absolute": 0.7, "relative": 1.3, "distillation": 0.9, "temperature": 2.5}


def made(model: Student, wrap: Callable[..., Any] = lambda opt: opt, **weights: float) -> Any:
    base = torch.optim.Adam(model.parameters(), lr=1e-2)
    return wrap(fastdg.RISE(base, model.embed, *tables(), **{**WEIGHTS, **weights}))


def step(model: Student, opt: Any, seed: int, teacher: bool = True, **more: Any) -> Tensor:
    x, y, domains, t = data(seed)
    logits = model(x)
    losses = F.cross_entropy(logits, y.to(logits.device), reduction="none")
    opt.zero_grad()
    given = {"labels": y, "logits": logits, "teacher_logits": t if teacher else None, **more}
    return opt.backward(losses, domains, **given)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-12, atol=1e-12)


# -- the algorithm --


@pytest.mark.parametrize("teacher", [True, False])
def test_training_equals_loops_over_samples(teacher: bool) -> None:
    model = Student()
    other = copy.deepcopy(model)
    opt, plain = made(model), torch.optim.Adam(other.parameters(), lr=1e-2)
    for seed in range(4):
        loss = step(model, opt, seed, teacher)
        x, y, _, t = data(seed)
        mean = F.cross_entropy(other(x), y)
        term, parts = naive(other, x, y, t if teacher else None, WEIGHTS)
        plain.zero_grad()
        (mean + term).backward()
        close(loss, mean)
        close(opt.statistics["objective"], mean + term)
        for key, value in parts.items():
            close(opt.statistics[f"rise_{key}"], value)
        assert ("rise_distillation" in opt.statistics) == teacher
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            close(p.grad, q.grad)
        opt.step()
        plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(p, q)


@pytest.mark.parametrize("only", ["absolute", "relative", "distillation", None])
def test_each_part_has_a_weight_of_its_own(only: str | None) -> None:
    model = Student()
    parts = ("absolute", "relative", "distillation")
    weights = {**WEIGHTS, **{key: 2.0 * (key == only) for key in parts}}
    opt = made(model, **weights)
    step(model, opt, 0)
    x, y, _, t = data(0)
    term, _ = naive(model, x, y, t, weights)
    expected = torch.autograd.grad(F.cross_entropy(model(x), y) + term, list(model.parameters()))
    for p, grad in zip(model.parameters(), expected, strict=True):
        close(p.grad, grad)


def test_weights_are_settings() -> None:
    model = Student()
    opt = made(model)
    assert opt.param_groups[0]["rise_absolute"] == 0.7
    opt.temperature, opt.relative = 5.0, 0.0
    step(model, opt, 0)
    x, y, _, t = data(0)
    weights = {**WEIGHTS, "temperature": 5.0, "relative": 0.0}
    term, parts = naive(model, x, y, t, weights)
    close(opt.statistics["objective"], F.cross_entropy(model(x), y) + term)
    close(opt.statistics["rise_relative"], parts["relative"])
    with pytest.raises(ValueError, match=r"^temperature: .*got 0"):
        opt.temperature = 0.0


def test_the_defaults_are_the_papers() -> None:
    model = Student()
    opt = fastdg.RISE(torch.optim.SGD(model.parameters(), lr=0.1), model.embed, *tables())
    assert (opt.absolute, opt.relative, opt.distillation, opt.temperature) == (1, 1, 0.9, 3)


def test_without_anchors() -> None:
    model = Student()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = fastdg.RISE(base, model.embed, tables()[0], **WEIGHTS)
    step(model, opt, 0)
    x, y, _, t = data(0)
    term, _ = naive(model, x, y, t, {**WEIGHTS, "relative": 0.0})
    close(opt.statistics["objective"], F.cross_entropy(model(x), y) + term)
    assert "rise_relative" not in opt.statistics


def test_micro_batches_are_merged_by_count() -> None:
    model = Student()
    opt = made(model)
    step(model, opt, 0)
    expected = [p.grad.clone() for p in model.parameters()], opt.statistics
    x, y, domains, t = data(0)
    opt.zero_grad()
    for rows in (slice(0, 3), slice(3, N)):
        logits = model(x[rows])
        losses = F.cross_entropy(logits, y[rows], reduction="none")
        given = {"labels": y[rows], "logits": logits, "teacher_logits": t[rows]}
        opt.backward(losses, domains[rows], final=rows.stop == N, **given)
    for p, grad in zip(model.parameters(), expected[0], strict=True):
        close(p.grad, grad)
    for key, value in expected[1].items():
        close(opt.statistics[key].double(), value.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_precisions(dtype: torch.dtype) -> None:
    """Computed in fp32; tables of any precision."""
    model = Student(torch.float32)
    classes, anchors = tables(dtype)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = fastdg.RISE(base, model.embed, classes, anchors, **WEIGHTS)
    x, y, domains, t = data(0)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(x.float())
        losses = F.cross_entropy(logits, y, reduction="none")
    opt.backward(losses, domains, labels=y.int(), logits=logits, teacher_logits=t.to(dtype))
    term, _ = naive(model.double(), x, y, t, WEIGHTS)
    got = opt.statistics["objective"] - opt.statistics["loss"]
    assert got.dtype == torch.float32
    assert abs(float((got - term).detach())) < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_from_text_to_training() -> None:
    """Tables unpack into the constructor; the classifier may start as the texts."""
    found = text_tables(
        ["cat", "dog", "cow"],
        ["photo", "sketch"],
        lambda texts: torch.tensor([[float(ord(c)) for c in t[-5:]] for t in texts]),
    )
    model = Student(torch.float32)
    model.head.weight.data.copy_(F.normalize(found.classes, dim=1))
    opt = fastdg.RISE(torch.optim.SGD(model.parameters(), lr=0.1), model.embed, *found)
    x, y, domains, _ = data(0)
    for _ in range(2):
        opt.zero_grad()
        losses = F.cross_entropy(model(x.float()), y, reduction="none")
        opt.backward(losses, domains, labels=y)
        opt.step()
    assert opt.steps == 2


# -- what it goes together with --


def test_inside_surgery_every_sample_has_its_share() -> None:
    """Agr-Sum on the losses with the term, domain by domain."""
    model = Student()
    opt = made(model, fastdg.AgrSum)
    step(model, opt, 0)
    x, y, domains, t = data(0)
    grads = []
    for d in (0, 1):
        own = domains == d
        term, _ = naive(model, x[own], y[own], t[own], WEIGHTS)
        total = F.cross_entropy(model(x[own]), y[own]) + term
        grads.append(torch.autograd.grad(total, list(model.parameters())))
    for p, first, second in zip(model.parameters(), *grads, strict=True):
        agree = (first.sign() == second.sign()).double()
        close(p.grad, agree * (first + second) / 2)


def test_inside_fishr_the_penalty_is_of_the_losses() -> None:
    model = Student()
    opt = made(model, lambda term: fastdg.Fishr(term, penalty_weight=3.0, anneal_steps=0))
    other = copy.deepcopy(model)
    plain = fastdg.Fishr(
        torch.optim.Adam(other.parameters(), lr=1e-2), penalty_weight=3.0, anneal_steps=0
    )
    step(model, opt, 0)
    x, y, domains, t = data(0)
    plain.zero_grad()
    plain.backward(F.cross_entropy(other(x), y, reduction="none"), domains)
    naive(other, x, y, t, WEIGHTS)[0].backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(p.grad, q.grad)
    close(opt.statistics["penalty"], plain.statistics["penalty"])


def nested(model: Student) -> Any:
    """Two terms, and an algorithm around them."""
    inner = fastdg.MIRO(torch.optim.Adam(model.parameters()), model, layers=["backbone"])
    return fastdg.Fishr(
        fastdg.RISE(inner, model.embed, *tables(), **WEIGHTS), penalty_weight=3.0, anneal_steps=1
    )


def test_with_another_term_and_an_algorithm() -> None:
    model = Student()
    opt = nested(model)
    step(model, opt, 0)
    opt.step()
    step(model, opt, 1)
    found = opt.statistics
    x, y, _, t = data(1)
    term, parts = naive(model, x, y, t, WEIGHTS)
    whole = found["loss"] + 3.0 * found["penalty"] + term + 0.1 * found["miro"]
    close(found["objective"], whole)
    close(found["rise_absolute"], parts["absolute"])


def test_a_chain_resumes_bit_for_bit() -> None:
    def fresh() -> tuple[Student, Any]:
        torch.manual_seed(1)
        model = Student()
        return model, nested(model)

    model, opt = fresh()
    for seed in range(2):
        step(model, opt, seed)
        opt.step()
    other, again = fresh()
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for seed in range(2, 4):
        for one, wrapper in ((model, opt), (other, again)):
            step(one, wrapper, seed)
            wrapper.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_logits_serve_irm_too() -> None:
    model = Student()
    opt = made(model, lambda term: fastdg.IRM(term, penalty_weight=2.0, anneal_steps=0))
    step(model, opt, 0)
    x, y, _, t = data(0)
    term, _ = naive(model, x, y, t, WEIGHTS)
    found = opt.statistics
    mean = found["domain_loss"].mean()
    close(found["objective"], mean + 2.0 * found["penalty"] + term)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    model = Student(torch.float32).cuda()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = fastdg.RISE(base, model.embed, *tables(torch.float32), num_domains=2)
    x, y, domains, t = (part.cuda() for part in data(0))

    def once() -> None:
        logits = model(x.float())
        losses = F.cross_entropy(logits, y, reduction="none")
        opt.backward(losses, domains, labels=y, logits=logits, teacher_logits=t)
        opt.step()

    once()  # compiles, and moves the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_algorithm_inside_is_refused() -> None:
    model = Student()
    inner = fastdg.VREx(torch.optim.Adam(model.parameters()))
    with pytest.raises(TypeError, match=r"^base: .*fastdg\.VREx\(fastdg\.RISE\(optimizer"):
        fastdg.RISE(inner, model.embed, *tables())


# -- its module --


def test_forwards_without_gradients_are_not_looked_at() -> None:
    model = Student()
    opt = made(model)
    x, y, domains, t = data(0)
    logits = model(x)
    with torch.no_grad():
        model(data(1, 50)[0])
    losses = F.cross_entropy(logits, y, reduction="none")
    opt.backward(losses, domains, labels=y, logits=logits, teacher_logits=t)
    term, _ = naive(model, x, y, t, WEIGHTS)
    close(opt.statistics["objective"], losses.mean() + term)


def test_what_is_frozen_is_only_told() -> None:
    """Distances of an embedding that does not learn."""
    model = Student()
    model.backbone.requires_grad_(False)
    model.embed.requires_grad_(False)
    opt = made(model, distillation=0.0)
    step(model, opt, 0)
    x, y, _, _ = data(0)
    term, parts = naive(model, x, y, None, WEIGHTS)
    close(opt.statistics["rise_absolute"], parts["absolute"])
    close(opt.statistics["objective"], opt.statistics["loss"] + term)
    assert model.embed.weight.grad is None and model.head.weight.grad is not None


def test_one_forward_for_one_backward() -> None:
    model = Student()
    opt = made(model)
    step(model, opt, 0)
    _, y, domains, _ = data(0)
    losses = model.head(torch.ones(N, E).double()).sum(1)
    with pytest.raises(RuntimeError, match=r"^embedding: .*not run"):
        opt.backward(losses, domains, labels=y)


def test_losses_of_an_earlier_forward_and_embeddings_changed_in_place_are_refused() -> None:
    model = Student()
    opt = made(model)
    (x, y, domains, _), (other, _, _, _) = data(0), data(1)
    losses = F.cross_entropy(model(x), y, reduction="none")
    again = F.cross_entropy(model(other), y, reduction="none")
    with pytest.raises(RuntimeError, match=r"^losses: .*earlier"):
        opt.backward(losses, domains, labels=y)
    del again
    logits = model.head(model.embed(model.backbone(x)).relu_())
    with pytest.raises(RuntimeError, match=r"^embedding: .*changed"):
        opt.backward(F.cross_entropy(logits, y, reduction="none"), domains, labels=y)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_follow_their_own_model(way: str) -> None:
    model = Student()
    opt = made(model)
    step(model, opt, 0)
    opt.step()
    both = (model, opt)
    other, copied = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    for one, wrapper in ((model, opt), (other, copied)):
        step(one, wrapper, 1)
        wrapper.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert "anchors=2" in repr(copied)


def test_it_ends_with_its_user() -> None:
    model = Student()
    opt = made(model)
    gone = weakref.ref(opt)
    assert len(model.embed._forward_hooks) == 1
    del opt
    gc.collect()
    assert gone() is None and not model.embed._forward_hooks
    step_without = model(data(0)[0])
    assert step_without.shape == (N, C)


# -- mixing --


def test_teachers_are_mixed_by_their_logits() -> None:
    one, two = torch.randn(2, 4, C).unbind()
    torch.testing.assert_close(fastdg.mix_teachers(one, two), (one + two) / 2)
    assert torch.equal(fastdg.mix_teachers(one), one)


def test_students_are_mixed_by_their_probabilities() -> None:
    one, two = torch.randn(2, 4, C).unbind()
    got = fastdg.mix_students(one, two)
    torch.testing.assert_close(got, F.softmax(one, 1) + F.softmax(two, 1))
    torch.testing.assert_close(got.sum(1), torch.full((4,), 2.0))
    # which is not what the paper says: they may choose different classes
    one, two = torch.tensor([[9.0, 0, 0]]), torch.tensor([[0, 3.0, 2.9]])
    assert fastdg.mix_students(one, two).argmax() == fastdg.mix_teachers(one, two).argmax() == 0


@pytest.mark.parametrize("mix", [fastdg.mix_teachers, fastdg.mix_students])
def test_what_cannot_be_mixed(mix: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^logits: .*got \(2, 3\), \(4"):
        mix(torch.zeros(4, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^logits: .*got none"):
        mix()


# -- bad input --


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"embedding": torch.zeros(3)}, TypeError, "^embedding: "),
        ({"classes": [1.0]}, TypeError, "^classes: .*got list"),
        ({"classes": torch.zeros(3, 5).long()}, TypeError, "^classes: .*got torch.int64"),
        ({"classes": torch.zeros(5)}, ValueError, r"^classes: .*got \[5"),
        ({"anchors": torch.ones(3, 5)}, ValueError, "^anchors: "),
        ({"anchors": torch.ones(4, 2, 5)}, ValueError, "^anchors: "),
        ({"classes": torch.eye(3, 5) * torch.tensor([[1], [0], [1]])}, ValueError,
         "^classes: "),
        ({"anchors": torch.ones(3, 2, 5).index_fill(0, torch.tensor(2), float("nan"))}, ValueError,
         "^anchors: "),
        ({"absolute": -1.0}, ValueError, "^absolute: .*got -1"),
        ({"temperature": 0.0}, ValueError, "^temperature: "),
    ],
)  # fmt: skip
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Student()
    classes, anchors = tables()
    arguments = {"embedding": model.embed, "classes": classes, "anchors": anchors, **given}
    with pytest.raises(error, match=message):
        fastdg.RISE(torch.optim.Adam(model.parameters()), **arguments)
    assert not model.embed._forward_hooks


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"labels": None}, TypeError, "^labels: RISE needs"),
        ({"labels": torch.zeros(N)}, TypeError, "^labels: .*got torch.float32"),
        ({"labels": torch.zeros(N, 1).long()}, ValueError, "^labels: "),
        ({"labels": torch.full((N,), C)}, ValueError,
         "^labels: .*got 3 to 3"),
        ({"labels": torch.full((N,), -100)}, ValueError, "^labels: .*got -100 to -100"),
        ({"labels": torch.zeros(N, device="meta").long()}, ValueError,
         "^labels: .*got meta"),
        ({"logits": None}, TypeError, "^logits: teacher_logits"),
        ({"logits": torch.zeros(N, 4)}, ValueError, r"^logits: .*got \[8"),
        ({"teacher_logits": torch.zeros(N, 4)}, ValueError,
         r"^teacher_logits: .*got \[8, 4"),
        ({"teacher_logits": torch.zeros(N, C, device="meta")}, ValueError,
         "^teacher_logits: .*got meta"),
        ({"image": 1}, TypeError, "^image: .* has no such input"),
    ],
)  # fmt: skip
def test_bad_inputs(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Student()
    opt = made(model)
    with pytest.raises(error, match=message):
        step(model, opt, 0, **given)
    assert all(p.grad is None for p in model.parameters())
    step(model, opt, 0)
    opt.step()


def test_an_embedding_of_another_width_or_kind() -> None:
    model = Student()
    base = torch.optim.Adam(model.parameters())
    for module, message in (
        (model.backbone, r"^embedding: .*got \[8, 7"),
        (model.head, r"^embedding: .*got \[8, 3\]"),
    ):
        opt = fastdg.RISE(base, module, *tables())
        with pytest.raises(ValueError, match=message):
            step(model, opt, 0)
    opt = made(model)
    logits = model(data(0, 5)[0])
    with pytest.raises(ValueError, match=r"^losses: .*5 embeddings"):
        _, y, domains, _ = data(0)
        opt.backward(logits.sum() * torch.ones(N), domains, labels=y)


def test_several_forwards_of_one_backward_are_refused() -> None:
    model = Student()
    opt = made(model)
    (x, y, domains, _), (other, _, _, _) = data(0), data(1)
    one, two = (F.cross_entropy(model(view), y, reduction="none") for view in (x, other))
    with pytest.raises(RuntimeError, match=r"^losses: .* 2 forwards"):
        opt.backward((one + two) / 2, domains, labels=y)


def test_reentrant_checkpointing_is_told_of() -> None:
    model = Student()
    opt = made(model)
    x, y, domains, _ = data(0)
    logits = checkpoint(model, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"^embedding: .*use_reentrant=False"):
        opt.backward(F.cross_entropy(logits, y, reduction="none"), domains, labels=y)


@pytest.mark.parametrize("mix", [fastdg.mix_teachers, fastdg.mix_students])
def test_mixes_take_tensors_one_after_the_other(mix: Any) -> None:
    with pytest.raises(TypeError, match=r"^logits: .*got list"):
        mix([torch.ones(2, 3), torch.ones(2, 3)])
