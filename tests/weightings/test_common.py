"""What all weightings promise: any matrix, any scale, any order; errors; saved state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import close, direction, gram, rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdg
from fastdg import weightings as W

NAMES = [name for name in W.__all__ if name != "GramWeighting"]


def made(name: str, seed: int = 0) -> Any:
    generator = {"generator": torch.Generator().manual_seed(seed)} if name == "GradVac" else {}
    return getattr(W, name)(**generator)


entries = st.sampled_from([-2.0, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0])


@st.composite
def tables(draw: Callable[..., Any]) -> Tensor:
    domains, places = draw(st.integers(1, 8)), draw(st.integers(1, 7))
    row = st.lists(entries, min_size=places, max_size=places)
    return torch.tensor(draw(st.lists(row, min_size=domains, max_size=domains))).double()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60, deadline=None)
@given(g=tables(), exponent=st.sampled_from([-12, -5, 5, 12]))
def test_any_matrix_has_weights_whatever_its_scale(
    name: str, dtype: torch.dtype, g: Tensor, exponent: int
) -> None:
    k = gram(g).to(dtype)
    w = made(name)(k)
    assert w.dtype == dtype and w.shape == (len(g),) and w.isfinite().all()
    scaled = made(name)(k * 10.0**exponent)
    assert scaled.isfinite().all()
    if dtype == torch.float64 and not torch.linalg.matrix_rank(g) < len(g):
        one, other = (v / v.norm().clamp(min=1e-300) for v in (w, scaled))
        close(one, other, 1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "GradVac"])
@settings(max_examples=60, deadline=None)
@given(g=tables(), data=st.data())
def test_the_order_of_the_domains_does_not_matter(name: str, g: Tensor, data: Any) -> None:
    assume(torch.linalg.matrix_rank(g) == len(g))
    order = data.draw(st.permutations(range(len(g))))
    rule = made(name)
    close(rule(gram(g[order])), rule(gram(g))[order], 1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("domains", [2, 3, 9])
def test_the_same_gradient_from_all_is_kept(name: str, domains: int) -> None:
    g = rows(1, 0).repeat(domains, 1)
    w = made(name)(gram(g))
    total = {"ConFIG": domains, "GradVac": domains, "CAGrad": 1.5}.get(name, 1.0)
    if name in ("NashMTL", "FairGrad"):  # the length is their own
        close(gram(g) @ w * w, torch.ones(domains), 1e-6)
        close(w, w[:1].expand(domains), 1e-6)
        return
    close(w.sum(), total, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_zeros(name: str) -> None:
    g = rows(3, 0, "agreeing")
    g[1] = 0
    w = made(name)(gram(g))
    rest = made(name)(gram(g[[0, 2]]))
    if name == "MGDA":  # the shortest
        close(w, [0.0, 1.0, 0.0])
    elif name in ("AlignedMTL", "UPGrad", "DualProj", "CAGrad"):  # of a mean over all
        close(w[[0, 2]], rest * 2 / 3)
    elif name == "GradVac":
        close(w, [rest[0], 1.0, rest[1]])
    else:
        close(w, [rest[0], 0.0, rest[1]])
    assert made(name)(torch.zeros(3, 3)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_comes_through(name: str) -> None:
    k = gram(rows(3, 0)).float()
    k[0, 1] = k[1, 0] = torch.nan
    assert made(name)(k).isnan().all()
    k[0, 1] = k[1, 0] = torch.inf
    assert made(name)(k).isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_float32_to_its_own_rounding(name: str) -> None:
    for kind in ("plain", "lengths"):
        g = rows(4, 13, kind)
        if (name, kind) == ("AlignedMTL", "lengths"):
            continue  # its smallest eigenvalue is below what a float32 matrix holds
        exact, rough = direction(made(name), g), gram(g / g.norm(dim=1).max()).float()
        found = made(name)(rough).double() @ (g / g.norm(dim=1).max())
        close(found / exact.norm(), exact / exact.norm(), 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_gram_matrix(name: str) -> None:
    rule = made(name)
    with pytest.raises(TypeError, match=r"^gram: .*got torch.int64"):
        rule(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"^gram: .*got list"):
        rule([[1.0]])
    for shape in ((3, 2), (3,), (0, 0)):
        with pytest.raises(ValueError, match=r"^gram: .*J @ J.T"):
            rule(torch.ones(shape))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: W.CAGrad(-1.0), "c"),
        (lambda: W.CAGrad(float("nan")), "c"),
        (lambda: W.CAGrad(rescale=3), "rescale"),
        (lambda: W.CAGrad(reduction="max"), "reduction"),
        (lambda: W.UPGrad(-1e-4), "reg_eps"),
        (lambda: W.AlignedMTL("max"), "reduction"),
        (lambda: W.NashMTL(0), "update_every"),
        (lambda: W.NashMTL(frobenius=1), "frobenius"),
        (lambda: W.NashMTL(max_norm=0.0), "max_norm"),
        (lambda: W.FairGrad(0.0), "alpha"),
        (lambda: W.GradVac(1.5), "beta"),
        (lambda: W.GradVac(reduction="none"), "reduction"),
    ],
)
def test_arguments(make: Callable[[], Any], argument: str) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: .*got "):
        make()


def test_how_they_look() -> None:
    assert repr(W.CAGrad(0.4, 1)) == "CAGrad(c=0.4, rescale=1, reduction='mean')"
    assert repr(W.GradVac()) == "GradVac(beta=0.5, reduction='sum')"
    assert repr(W.MGDA()) == "MGDA()"


def test_on_the_gram_matrix_of_a_model() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    losses = model(torch.randn(12, 4)).square().sum(1)
    k = fastdg.domain_gram(losses, torch.arange(12) % 3, params=model)
    for name in NAMES:
        assert made(name)(k).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("domains", [3, 9])
def test_no_value_is_asked_for_on_another_device(
    name: str, domains: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor without values raises where one is read, or where it meets one that has them."""
    rule = made(name)
    if name == "GradVac":  # drawn on the CPU, and copied
        order = torch.empty(domains, domains, dtype=torch.int64, device="meta")
        monkeypatch.setattr(rule, "order", lambda k: order)
    weights = rule(torch.empty(domains, domains, device="meta"))
    assert weights.shape == (domains,) and weights.device.type == "meta"
