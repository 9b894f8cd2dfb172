"""``text_distance`` on every backend that is here, against one sample and one anchor at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from op_cases import assert_close
from torch import Tensor
from torch.nn import functional as F

import fastdg
from fastdg import native, ops


def naive(
    embeddings: Tensor, labels: Tensor, classes: Tensor, anchors: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """As the reference code computes it, in float64."""
    absolute, relative = [], []
    for s, y in zip(embeddings, labels.tolist(), strict=True):
        absolute.append(1 - F.cosine_similarity(s, classes[y], 0))
        around = [F.cosine_similarity(s, k, 0) for k in anchors[y]]
        total = sum(around[a].exp() for a in range(len(around)))
        errors = [(x.exp() / total - q) ** 2 for x, q in zip(around, teacher[y], strict=True)]
        relative.append(10 * sum(errors, s.sum() * 0) / max(1, len(errors)))
    empty = embeddings.sum(1)
    return (torch.stack(absolute), torch.stack(relative)) if absolute else (empty, empty)


BACKENDS = fastdg.backends()
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def texts(
    N: int, C: int, A: int, E: int, dtype: torch.dtype = torch.float64, layout: str = "plain"
) -> Arguments:
    """Embeddings near their class's text, which lies near its anchors, as CLIP's do."""
    classes = F.normalize(torch.randn(C, E, dtype=dtype), dim=1)
    noise = torch.randn(C, A, E, dtype=dtype) / math.sqrt(E)
    anchors = F.normalize(classes.unsqueeze(1) + noise, dim=2)
    teacher = (anchors * classes.unsqueeze(1)).sum(2).softmax(1)
    labels = torch.randint(C, (N,))
    embeddings = 3 * classes[labels] + torch.randn(N, E, dtype=dtype)
    if layout == "transposed":
        embeddings, anchors = embeddings.t().contiguous().t(), anchors.mT.contiguous().mT
    elif layout == "sliced":
        embeddings = torch.cat([embeddings, embeddings], 1)[:, E:]
        labels, classes = labels.repeat_interleave(2)[::2], torch.cat([classes] * 2, 1)[:, :E]
    return embeddings, labels, classes, anchors, teacher


SHAPES = [
    (6, 3, 2, 5),
    (1, 1, 1, 1),
    (5, 2, 0, 7),  # no anchors
    (0, 3, 2, 5),
    (9, 4, 17, 33),
    (3, 2, 70, 64),
    (12, 65, 3, 512),
    (40, 2, 1, 700),
]


def results(args: Arguments, function, up: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    leaf = args[0].detach().requires_grad_()
    absolute, relative = function(leaf, *args[1:])
    loss = (absolute * up[0]).sum() + (relative * up[1]).sum()
    return absolute.detach(), relative.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(device: str, shape: tuple[int, ...], layout: str) -> None:
    for dtype in (torch.float32, torch.float64):
        args = texts(*shape, dtype, layout)
        up = torch.randn(2, shape[0], dtype=dtype)
        there = [x.to(device) for x in (*args, up)]
        got = results(tuple(there[:5]), ops.text_distance, there[5])
        exact = tuple(x.double() if x.is_floating_point() else x for x in args)
        wanted = results(exact, naive, up.double())
        # What is rounded is the cosine, and its derivative, up to 1 over the length
        turn = (exact[0].norm(dim=1).reciprocal() * up.double().abs().sum(0)).norm()
        sizes = (math.sqrt(shape[0]), math.sqrt(shape[0]), float(turn))
        for one, two, size in zip(got, wanted, sizes, strict=True):
            assert_close(one, two, size)


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpp") if BACKENDS[name][0]])
def test_an_embedding_of_one_number_cannot_turn(backend: str) -> None:
    """Where rounding leaves something, a short embedding makes much of it."""
    args = texts(2000, 3, 5, 1, torch.float32)
    args = (args[0] * 10 ** (4 * torch.rand(2000, 1) - 3), *args[1:])
    with fastdg.use_backend(backend):
        grad = results(args, ops.text_distance, torch.randn(2, 2000))[2]
    assert not grad.any()


def test_derivatives_in_double() -> None:
    for shape in SHAPES[:3]:
        embeddings, *rest = texts(*shape)
        assert torch.autograd.gradcheck(
            lambda s, r=rest: ops.text_distance(s, *r), embeddings.requires_grad_()
        )


def test_one_of_two_gradients_is_enough(device: str) -> None:
    args = tuple(x.to(device) for x in texts(6, 3, 2, 5, torch.float32))
    one, zero = torch.ones(6, device=device), torch.zeros(6, device=device)
    leaf = args[0].requires_grad_()
    for k, up in enumerate(((one, zero), (zero, one))):
        expected = results(args, ops.text_distance, up)[2]
        (got,) = torch.autograd.grad(ops.text_distance(leaf, *args[1:])[k].sum(), leaf)
        torch.testing.assert_close(got, expected)


def test_it_is_differentiable_once(device: str) -> None:
    args = tuple(x.to(device) for x in texts(6, 3, 2, 5, torch.float32))
    leaf = args[0].requires_grad_()
    loss = ops.text_distance(leaf, *args[1:])[1].sum()
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^fastdg::text_distance_backward "):
        first.sum().backward()


def test_length_changes_nothing_but_the_gradient(device: str) -> None:
    args = tuple(x.to(device) for x in texts(6, 3, 4, 40, torch.float32))
    up = torch.randn(2, 6, device=device)
    small, large = (
        results((args[0] * factor, *args[1:]), ops.text_distance, up) for factor in (1e-3, 1e3)
    )
    for k in (0, 1):
        torch.testing.assert_close(small[k], large[k])
    rounding = 1e-5 * float(small[2].abs().max())
    torch.testing.assert_close(small[2], large[2] * 1e6, rtol=1e-5, atol=rounding)


def test_an_embedding_of_zeros_has_no_direction(device: str) -> None:
    args = tuple(x.to(device) for x in texts(4, 3, 4, 9, torch.float32))
    args[0][1] = 0
    absolute, relative, grad = results(args, ops.text_distance, torch.ones(2, 4, device=device))
    assert absolute[1] == 1 and relative.isfinite().all()
    assert not grad[1].any() and grad[0].any() and grad.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_through(device: str, value: float) -> None:
    for place in (3, 36):
        args = tuple(x.to(device) for x in texts(4, 3, 4, 37, torch.float32))
        args[0][2, place] = value
        hit = torch.tensor([False, False, True, False], device=device)
        absolute, relative, grad = results(args, ops.text_distance, torch.ones(2, 4, device=device))
        for out in (absolute, relative, grad.sum(1)):
            assert torch.equal(~out.isfinite(), hit)


def test_transforms_go_through(device: str) -> None:
    embeddings, *rest = (x.to(device) for x in texts(5, 3, 2, 8, torch.float32))

    def total(s: Tensor) -> Tensor:
        return sum(x.sum() for x in ops.text_distance(s, *rest))  # type: ignore[return-value]

    several = torch.stack([embeddings, -embeddings])
    got = torch.func.vmap(torch.func.grad(total))(several)
    for row, one in zip(several, got, strict=True):
        leaf = row.clone().requires_grad_()
        torch.testing.assert_close(one, torch.autograd.grad(total(leaf), leaf)[0])


@pytest.mark.skipif(not native.status()[0], reason="no compiled ops")
class TestCompiled:
    @pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
    def test_every_instruction_set(self, isa: str) -> None:
        try:
            before = torch.ops.fastdg_cpp.set_instruction_set(isa)
        except RuntimeError:
            pytest.skip(f"this machine or this build has no {isa}")
        try:
            for shape, layout in itertools.product(SHAPES, ("plain", "transposed")):
                with fastdg.use_backend("cpp"):
                    test_values_and_gradients("cpu", shape, layout)
        finally:
            torch.ops.fastdg_cpp.set_instruction_set(before)

    def test_the_router_takes_them(self) -> None:
        args = texts(6, 3, 2, 5, torch.float32)
        op = ops.dispatch.registry.OPS["text_distance"]
        assert op.route(*args) is torch.ops.fastdg_cpp.text_distance.default
        assert op.route(*texts(6, 3, 2, 5)) is op.reference

    def test_results_do_not_depend_on_the_threads(self) -> None:
        args, threads = texts(300, 5, 3, 257, torch.float32), torch.get_num_threads()
        up = torch.randn(2, 300)
        found = []
        try:
            for count in (1, 4):
                torch.set_num_threads(count)
                found.append(results(args, ops.text_distance, up))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))

    @pytest.mark.parametrize(
        ("k", "value", "message"),
        [
            (0, torch.randn(4), "embeddings: .*dimensions"),
            (0, torch.randn(4, 5).double(), "embeddings: .*float32"),
            (1, torch.tensor([0, 1, 3, 0]), "labels: .*3 of 3"),
            (1, torch.tensor([0, -1, 2, 0]), "labels: .*-1 of 3"),
            (1, torch.tensor([0, 1]), "labels: .*int64"),
            (1, torch.zeros(4), "labels: .*int64"),
            (2, torch.randn(3, 6), "classes: "),
            (3, torch.randn(2, 2, 5), "anchors: "),
            (4, torch.randn(3, 3), "teacher: "),
        ],
    )
    def test_bad_arguments_are_named(self, k: int, value: Tensor, message: str) -> None:
        args = list(texts(4, 3, 2, 5, torch.float32))
        args[k] = value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastdg_cpp.text_distance(*args)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastdg_cpp.text_distance_backward(torch.ones(4), torch.ones(4), *args)
