"""The questions a user asks, and who answers them: one `Case` a row of the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import head_peers
import peers
import surgery_cases as surgery
import torch
from column_cases import COLUMNS
from compiled_cases import COMPILED
from contenders import OURS, PLAIN, TOLERANCE, Case, Contender, Run, ours
from fish_cases import FISH
from floors import work
from models import Problem
from torch import Tensor

import fastdg

# The deep network decides some ReLUs and maxima otherwise in fp32: plain training's gradient is
# 3e-3 off there.
DEEP_TOLERANCE = 1e-2
# An entry whose gradient is nearly 0 in one domain may have another sign in fp32, and goes or stays
# with all the others have there.
SIGN_TOLERANCE = 0.15


# ---- the plain step ----


def plain(on: Problem) -> Run:
    """Forward and backward of the mean loss."""

    def run() -> None:
        on.model.zero_grad(set_to_none=True)
        on.losses().mean().backward()

    return run


# ---- (a) variances of all layers ----


def variance(on: Problem) -> Run:
    def run() -> Mapping[str, Tensor]:
        with fastdg.record(on.model, check=False) as tape:
            losses = on.losses()
        return fastdg.domain_moments(tape, losses, on.domains, retain_graph=False).variance

    return run


# ---- (b) their penalty, differentiated ----


def penalty(on: Problem) -> Run:
    present = torch.ones(3, dtype=torch.bool)

    def run() -> Mapping[str, Tensor]:
        on.model.zero_grad(set_to_none=True)
        with fastdg.record(on.model, check=False) as tape:
            losses = on.losses()
        moments = fastdg.domain_moments(tape, losses, on.domains, create_graph=True)
        fastdg.ops.variance_gap(list(moments.variance.values()), [], present, 0.0).backward()
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in on.parameters.items()
        }

    return run


# ---- (c), (d) Fishr on the head ----


def fishr(base: Callable[[Problem], Any], penalised: bool = True) -> Callable[[Problem], Run]:
    """A whole step of `fastdg.Fishr` with the head's parameters, before or after the anneal."""

    def make(on: Problem) -> Run:
        opt = fastdg.Fishr(
            base(on),
            penalty_weight=head_peers.WEIGHT,
            anneal_steps=0 if penalised else 10**9,
            num_domains=3,
        )

        def run() -> None:
            opt.zero_grad()
            on.x.grad = None
            opt.backward(on.losses(), on.domains)
            opt.step()

        return run

    return make


def _gradients(on: Problem, out: Any) -> Mapping[str, Tensor]:
    return head_peers.gradients(on)


def _head_peers(base: Callable[[Problem], Any], *names: str) -> dict[str, Contender]:
    def step(variances: Callable[[Problem], head_peers.Variances]) -> Callable[[Problem], Run]:
        return lambda on: head_peers.penalised(on, base(on), variances(on))

    every = {
        "closed form in plain PyTorch": Contender(step(head_peers.by_squares)),
        "per-sample outer products": Contender(step(head_peers.by_products)),
        "per-sample outer products, torch.compile": Contender(
            step(head_peers.by_compiled_products), slow=True
        ),
        "torch.func vmap(grad)": Contender(step(head_peers.by_vmap)),
        "BackPACK BatchGrad (DomainBed, repaired)": Contender(
            lambda on: head_peers.backpack_step(on, base(on)), needs="backpack"
        ),
    }
    return {
        name: Contender(c.make, result=_gradients, needs=c.needs, slow=c.slow)
        for name, c in every.items()
        if not names or name in names
    }


def _variance_case(model: str, reach: float, chunks: tuple[int, ...]) -> Case:
    contenders = {
        PLAIN: Contender(plain, result=None),
        **ours(variance),
        "loop over samples": Contender(peers.loop_variance),
        "torch.func vmap(grad), chunked": Contender(peers.vmap_variance, chunks),
        "Opacus GradSampleModule": Contender(peers.opacus_variance, needs="opacus"),
        "BackPACK BatchGrad": Contender(peers.backpack_variance, needs="backpack"),
        "BackPACK SumGradSquared by domain": Contender(peers.backpack_squares, needs="backpack"),
    }
    left_out = {}
    if model == "mlp":
        contenders["torch.func vmap(grad), torch.compile"] = Contender(
            lambda on, chunk: peers.vmap_variance(on, chunk, compiled=True), chunks, slow=True
        )
    else:
        left_out["torch.func vmap(grad), torch.compile"] = (
            "minutes of compilation, and products of matrices remain what they are"
        )
    if model == "resnet18":
        for name in ("BackPACK BatchGrad", "BackPACK SumGradSquared by domain"):
            del contenders[name]
            left_out[name] = "a step takes a minute"
    return Case(
        "variance",
        model,
        96,
        contenders,
        lambda on: peers.loop_variance(on)(),
        lambda on: (w := work(on)).moments() / w.plain(),
        reach,
        tolerance=DEEP_TOLERANCE if model == "resnet18" else TOLERANCE,
        left_out=left_out,
    )


def _penalty_case(model: str, samples: int, reach: float, chunks: tuple[int, ...]) -> Case:
    return Case(
        "differentiable",
        model,
        samples,
        {
            PLAIN: Contender(plain, result=None),
            **ours(penalty),
            "loop over samples, two passes": Contender(peers.loop_penalty),
            "torch.func vmap(grad)": Contender(peers.vmap_penalty),
            "torch.func vmap(grad), chunked, two passes": Contender(
                peers.vmap_penalty_chunked, chunks
            ),
            "BackPACK BatchGrad, create_graph": Contender(peers.backpack_penalty, needs="backpack"),
        },
        lambda on: peers.loop_penalty(on)(),
        lambda on: (w := work(on)).differentiable() / w.plain(),
        reach,
        tolerance=DEEP_TOLERANCE if model == "resnet18" else TOLERANCE,
        left_out={"Opacus GradSampleModule": "its per-sample gradients are not differentiable"},
    )


def _head_case(model: str, reach: float) -> Case:
    def floor(on: Problem) -> float:
        w = work(on)
        return w.head() / w.plain()

    still = head_peers.still
    return Case(
        "head",
        model,
        96,
        {
            PLAIN: Contender(lambda on: head_peers.plain(on, still(on)), result=None),
            **ours(fishr(still), result=_gradients),
            **_head_peers(still),
        },
        head_peers.truth,
        floor,
        reach,
        features_given=True,
    )


def _step_case() -> Case:
    adam = head_peers.adam
    return Case(
        "step",
        "resnet18",
        96,
        {
            PLAIN: Contender(lambda on: head_peers.plain(on, adam(on)), result=None),
            OURS: Contender(fishr(adam), result=_gradients),
            f"{OURS}, before the anneal": Contender(fishr(adam, penalised=False), result=None),
            **_head_peers(
                adam,
                "closed form in plain PyTorch",
                "torch.func vmap(grad)",
                "BackPACK BatchGrad (DomainBed, repaired)",
            ),
        },
        head_peers.truth,
        lambda on: 1.0,
        1.03,
        tolerance=DEEP_TOLERANCE,
    )


# ---- (e) whole steps of gradient surgery ----


def _surgery_case(question: str, model: str, domains: int, reach: float) -> Case:
    """``question`` is the algorithm's name."""
    wrapper, combine, ways = {
        "Agr-Sum": (
            fastdg.AgrSum,
            surgery.agreement_each,
            {
                "a backward a domain, flat vectors": surgery.agreement_flat,
                "a backward a domain, tensor by tensor": surgery.agreement_each,
            },
        ),
        "AND-mask": (
            fastdg.ANDMask,
            surgery.mask_each,
            {"a backward a domain (DomainBed)": surgery.mask_each},
        ),
        "PCGrad": (
            fastdg.PCGrad,
            surgery.projection_gram,
            {
                "a backward a domain, pair by pair": surgery.projection_flat,
                "a backward a domain, by Gram matrix": surgery.projection_gram,
            },
        ),
    }[question]
    contenders = {
        PLAIN: Contender(lambda on: head_peers.plain(on, head_peers.adam(on)), result=None),
        **ours(surgery.ours(wrapper, domains), result=surgery.gradients),
        **{
            name: Contender(surgery.peer(way, domains), result=surgery.gradients)
            for name, way in ways.items()
        },
    }
    if question == "PCGrad":
        contenders["TorchJD"] = Contender(
            surgery.torchjd_pcgrad(domains),
            ((1, False), (1, True), (domains, True)),
            surgery.gradients,
            needs="torchjd",
        )
    return Case(
        f"{question}, D={domains}",
        model,
        96,
        contenders,
        surgery.truth(combine, domains),
        lambda on: 1.0,
        reach,
        tolerance=SIGN_TOLERANCE,
    )


CASES = {
    case.key: case
    for case in (
        _variance_case("mlp", 1.5, (2, 8, 32)),
        _variance_case("mnist_cnn", 1.0, (4, 8, 32)),
        _variance_case("vit", 1.1, (4, 8, 32)),
        _variance_case("resnet18", 1.1, (2, 8, 32)),
        _penalty_case("mlp", 96, 4.4, (2, 8, 32)),
        _penalty_case("mnist_cnn", 96, 4.0, (4, 8, 32)),
        _penalty_case("vit", 96, 3.8, (4, 8, 32)),
        _penalty_case("resnet18", 24, 4.0, (2, 8)),
        _head_case("head7", 4.0),
        _head_case("head65", 4.5),
        _head_case("head345", 4.0),
        _step_case(),
        _surgery_case("Agr-Sum", "resnet18", 3, 1.10),
        _surgery_case("Agr-Sum", "resnet18", 6, 1.10),
        _surgery_case("AND-mask", "resnet18", 3, 1.10),
        _surgery_case("PCGrad", "resnet18", 3, 1.15),
        _surgery_case("PCGrad", "resnet18", 6, 1.15),
        _surgery_case("Agr-Sum", "mnist_cnn", 3, 1.10),
        _surgery_case("PCGrad", "mnist_cnn", 3, 1.05),
        _surgery_case("Agr-Sum", "vit", 3, 1.10),
        _surgery_case("PCGrad", "vit", 3, 1.10),
        *COLUMNS,
        *FISH,
        *COMPILED,
    )
}

# What `pytest benchmarks/` times unless told otherwise: each question once or twice, in minutes
SAMPLE = (
    "variance/mlp",
    "variance/mnist_cnn",
    "differentiable/mlp",
    "head/head345",
    "step/resnet18",
    "Agr-Sum, D=3/mnist_cnn",
    "PCGrad, D=3/mnist_cnn",
    "agreement/D=3",
    "gram/D=3",
    "PCGrad of given gradients/D=3",
    "Fish/D=3",
)
assert CASES.keys() >= set(SAMPLE)
