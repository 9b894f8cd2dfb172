"""Each weighting against its definition, solved by somebody else, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradients import close, direction, gram, rows
from torch import Tensor

from fastdg import weightings as W

optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
np = pytest.importorskip("numpy")

SIZES = [1, 2, 3, 6, 7, 11, 17]


every_kind = pytest.mark.parametrize("kind", ["plain", "agreeing", "lengths", "twice", "flat"])
every_size = pytest.mark.parametrize("domains", SIZES)


# -- the hull: MGDA, CAGrad --


@every_kind
@every_size
def test_mgda_is_the_shortest(domains: int, kind: str) -> None:
    """Its conditions are sufficient: no gradient has a smaller product with it than itself."""
    for seed in range(3):
        g = rows(domains, seed, kind)
        matrix = gram(g) / gram(g).diagonal().max()
        w = W.MGDA()(matrix)
        square = w @ matrix @ w
        assert (w >= 0).all() and abs(float(w.sum()) - 1) < 1e-12
        assert float((matrix @ w).min() - square) > -1e-11
        found = optimize.minimize(
            lambda v, m: v @ m @ v,
            np.full(domains, 1 / domains),
            (matrix.numpy(),),
            bounds=[(0, 1)] * domains,
            constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert float(square) <= found.fun + 1e-12


def worst(g: Tensor, weights: Tensor) -> float:
    return float((gram(g) @ weights).min())


def cagrad(g: Tensor, c: float) -> float:
    """The largest progress of the worst, by the dual problem: SLSQP from several starts."""
    k, domains = gram(g).numpy(), len(g)
    mean = np.full(domains, 1 / domains)
    radius = c * math.sqrt(max(mean @ k @ mean, 0))

    def dual(w: Any) -> tuple[float, Any]:
        length = math.sqrt(max(w @ k @ w, 0) + 1e-24)
        return w @ k @ mean + radius * length, k @ mean + radius * (k @ w) / length

    return min(
        optimize.minimize(
            dual,
            start,
            jac=True,
            bounds=[(0, 1)] * domains,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-15, "maxiter": 500},
        ).fun
        for start in [mean, *(0.9 * np.eye(domains) + 0.1 / domains)[:6]]
    )


@every_kind
@every_size
def test_cagrad_is_the_best_for_the_worst(domains: int, kind: str) -> None:
    for c in (0.4, 0.9):
        g = rows(domains, 1, kind)
        g = g / g.norm(dim=1).max()
        w = W.CAGrad(c)(gram(g))
        away = (w - 1 / domains) @ g
        assert float(away.norm() - c * g.mean(0).norm()) < 1e-12
        assert worst(g, w) >= cagrad(g, c) - 1e-8  # of SLSQP; what is allowed has no more


def test_cagrad_of_two_by_the_line_between_them() -> None:
    g = rows(2, 0)
    share = torch.linspace(0, 1, 200_001, dtype=torch.float64).unsqueeze(1)
    towards = share * g[0] + (1 - share) * g[1]
    mean = g.mean(0)
    values = towards @ mean + 0.5 * mean.norm() * towards.norm(dim=1)
    best = towards[values.argmin()]
    expected = mean + 0.5 * mean.norm() / best.norm() * best
    close(W.CAGrad(0.5)(gram(g)) @ g, expected, 1e-4)


def test_scales_of_cagrad() -> None:
    k = gram(rows(3, 0))
    w = W.CAGrad(0.5)(k)
    close(W.CAGrad(0.5, rescale=1)(k), w / 1.25)
    close(W.CAGrad(0.5, rescale=2)(k), w / 1.5)
    close(W.CAGrad(0.5, rescale=1, reduction="sum")(k), 3 * w / 1.25)
    close(W.CAGrad(0.0)(k), [1 / 3] * 3)


def test_cagrad_where_no_direction_is_good_for_all() -> None:
    """Two opposed, and one aside: as in the authors' code, the mean."""
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).double()
    close(W.CAGrad()(gram(g)), [1 / 3] * 3)
    with_zeros = torch.cat([g[:1], torch.zeros(1, 2), torch.tensor([[-0.5, 1.0]])]).double()
    w = W.CAGrad()(gram(with_zeros))
    mean = with_zeros.mean(0)
    away = w @ with_zeros - mean
    close(away.norm(), 0.5 * mean.norm())  # a gradient of zeros does not hold it back


# -- the cone: UPGrad, DualProj --


def projected(g: Tensor, onto: Tensor) -> Tensor:
    """min |v G| over v >= onto, by Lawson and Hanson."""
    x, _ = optimize.nnls(g.t().numpy(), -(onto @ g).numpy(), maxiter=10_000)
    return onto + torch.from_numpy(x)


@every_kind
@every_size
def test_upgrad_and_dualproj(domains: int, kind: str) -> None:
    g = rows(domains, 2, kind)
    g = g / g.norm(dim=1).max()
    eye = torch.eye(domains, dtype=torch.float64)
    expected = torch.stack([projected(g, row) for row in eye]).mean(0)
    close(direction(W.UPGrad(), g), expected @ g)
    close(direction(W.DualProj(), g), projected(g, eye.mean(0)) @ g)
    for rule in (W.UPGrad(), W.DualProj()):
        assert float((g @ direction(rule, g)).min()) > -1e-10


@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
@every_size
def test_regularised_as_in_torchjd(domains: int, name: str) -> None:
    """K / trace K + 1e-4, of which the Cholesky factor is the gradients."""
    k = gram(rows(domains, 3, "lengths"))
    factor = torch.linalg.cholesky(k / k.trace() + 1e-4 * torch.eye(domains))
    eye = torch.eye(domains, dtype=torch.float64)
    starts = eye if name == "UPGrad" else eye.mean(0, keepdim=True)
    expected = torch.stack([projected(factor, row) for row in starts]).mean(0)
    close(getattr(W, name)(reg_eps=1e-4)(k), expected, 1e-7)


@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_the_same_as_torchjd_s_solver(name: str) -> None:
    pytest.importorskip("quadprog", reason="quadprog is not installed")
    pytest.importorskip("qpsolvers", reason="qpsolvers is not installed")
    A = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    for domains in SIZES:
        k = gram(rows(domains, 4))
        close(getattr(W, name)(1e-4)(k), getattr(A, f"{name}Weighting")()(k), 1e-6)


# -- balanced: IMTL-G, Aligned-MTL, ConFIG --


@pytest.mark.parametrize("kind", ["plain", "agreeing", "lengths"])
@every_size
def test_imtl_g_has_one_projection_onto_all(domains: int, kind: str) -> None:
    g = rows(domains, 5, kind)
    w = W.IMTLG()(gram(g))
    assert abs(float(w.sum()) - 1) < 1e-9
    onto = g @ (w @ g) / g.norm(dim=1)
    close(onto, onto[0].expand(domains), 1e-8)


@pytest.mark.parametrize("kind", ["plain", "agreeing", "lengths"])
@every_size
def test_config_has_one_angle_to_all(domains: int, kind: str) -> None:
    g = rows(domains, 6, kind)
    d = W.ConFIG()(gram(g)) @ g
    cosines = g @ d / g.norm(dim=1) / d.norm()
    close(cosines, cosines[0].expand(domains), 1e-8)
    close((g @ d).sum() / d.norm(), d.norm(), 1e-9)


@every_kind
@every_size
def test_aligned_mtl_evens_out_the_singular_values(domains: int, kind: str) -> None:
    g = rows(domains, 7, kind)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    kept = s > 1e-6 * s[0]
    expected = s[kept].min() * (u[:, kept] @ v[kept])
    for reduction, scale in (("mean", 1 / domains), ("sum", 1.0)):
        w = W.AlignedMTL(reduction)(gram(g))
        close(w @ g / g.norm(), scale * expected.sum(0) / g.norm(), 1e-8)


@pytest.mark.parametrize("name", ["MGDA", "IMTLG", "AlignedMTL", "ConFIG"])
def test_torchjd_agrees(name: str) -> None:
    """MGDA's 100 iterations there end a little above the minimum."""
    A = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    for domains in (2, 3, 6, 9):
        g = rows(domains, 8, "agreeing")
        expected = getattr(A, name)()(g)
        close(getattr(W, name)()(gram(g)) @ g, expected, 0.1 if name == "MGDA" else 1e-9)
    if name == "ConFIG":
        for kind in ("twice", "flat"):
            g = rows(5, 9, kind)
            close(W.ConFIG()(gram(g)) @ g, A.ConFIG()(g))


# -- fair: Nash-MTL, FairGrad --


@pytest.mark.parametrize("kind", ["plain", "agreeing", "lengths", "twice"])
@every_size
def test_progress_of_fair_steps(domains: int, kind: str) -> None:
    k = gram(rows(domains, 10, kind))
    w = W.NashMTL()(k)
    close(k @ w * w, torch.ones(domains))
    assert abs(float((w @ k @ w).sqrt()) - math.sqrt(domains)) < 1e-8
    for alpha in (0.3, 0.5, 1.0, 2.0, 8.0):
        w = W.FairGrad(alpha)(k)
        assert (w > 0).all()
        close(k @ w * w ** (1 / alpha), torch.ones(domains))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fair_steps_are_finite_where_there_may_be_no_agreement(dtype: torch.dtype) -> None:
    """More gradients than directions, of other lengths; a step may not end at a weight of 0."""
    for domains in (3, 5, 9, 17):
        for seed in range(8):
            g = rows(domains, seed, "lengths") @ torch.eye(40, 2, dtype=torch.float64)
            for alpha in (0.1, 1.0, 10.0):
                w = W.FairGrad(alpha)(gram(g).to(dtype))
                assert w.isfinite().all() and (w > 0).all()


def test_fair_grad_of_other_sizes() -> None:
    k = gram(rows(4, 11))
    w = W.FairGrad(2.0)(k)
    close(W.FairGrad(2.0)(1e6 * k), w * 1e6 ** (-2 / 3))


def test_what_the_authors_of_nash_mtl_do_on_top() -> None:
    k = gram(rows(4, 12))
    w = W.NashMTL()(k)
    norm = k.norm()
    close(W.NashMTL(frobenius=True)(k), w * norm.sqrt())
    inner = k / norm
    scaled = W.NashMTL(frobenius=True)(k)
    close(inner @ scaled * scaled, torch.ones(4))
    short = W.NashMTL(frobenius=True, max_norm=1.0)(k)
    close((short @ k @ short).sqrt(), 1.0)
    close(short / short.norm(), w / w.norm())
    close(W.NashMTL(max_norm=100.0)(k), w)


def test_nash_weights_in_between() -> None:
    rule, one = W.NashMTL(update_every=3), W.NashMTL()
    ks = [gram(rows(3, seed)) for seed in range(7)]
    found = [rule(k) for k in ks]
    for i, w in enumerate(found):
        close(w, one(ks[i - i % 3]), 0)
    again = W.NashMTL(update_every=3)
    for k in ks[:2]:
        again(k)
    state, again = again.state_dict(), W.NashMTL(update_every=3)
    again.load_state_dict(state)
    assert torch.equal(again(ks[2]), found[2]) and torch.equal(again(ks[3]), found[3])
    close(rule(gram(rows(4, 0))), one(gram(rows(4, 0))), 0)  # of another number: solved anew


# -- GradVac --


def vaccine(g: Tensor, order: list[list[int]], phi: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The paper's loop on the gradients themselves."""
    phi, total = phi.clone(), torch.zeros_like(g[0])
    for i, others in enumerate(order):
        p = g[i].clone()
        for j in others:
            if j == i:
                continue
            cosine, usual = p @ g[j] / p.norm() / g[j].norm(), phi[i, j].clone()
            if cosine < usual:
                turn = p.norm() * (usual * (1 - cosine**2).sqrt() - cosine * (1 - usual**2).sqrt())
                p = p + turn / (g[j].norm() * (1 - usual**2).sqrt()) * g[j]
            phi[i, j] = (1 - beta) * usual + beta * cosine
        total = total + p
    return total, phi


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("domains", [1, 2, 3, 6])
def test_grad_vac_is_the_paper_s_loop(domains: int, beta: float) -> None:
    rule = W.GradVac(beta, generator=torch.Generator().manual_seed(3))
    twin = W.GradVac(beta, generator=torch.Generator().manual_seed(3))
    mean = W.GradVac(beta, "mean", torch.Generator().manual_seed(3))
    phi = torch.zeros(domains, domains, dtype=torch.float64)
    for seed in range(5):
        g = rows(domains, seed, "agreeing" if seed % 2 else "plain")
        order = twin.order(W.gram.Gram.of(gram(g), torch.tensor(True))).tolist()
        expected, phi = vaccine(g, order, phi, beta)
        w = rule(gram(g))
        close(w @ g, expected)
        close(rule.phi, phi)
        close(mean(gram(g)), w / domains)


def test_grad_vac_of_torchjd(monkeypatch: pytest.MonkeyPatch) -> None:
    A = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    rule, other = W.GradVac(), A.GradVacWeighting()
    monkeypatch.setattr(torch, "randperm", torch.arange)
    monkeypatch.setattr(rule, "order", lambda k: torch.arange(len(k)).repeat(len(k), 1))
    for seed in range(5):
        k = gram(rows(4, seed, "agreeing"))
        close(rule(k), other(k), 1e-6)


def test_grad_vac_goes_on_as_it_was() -> None:
    def made() -> W.GradVac:
        return W.GradVac(generator=torch.Generator().manual_seed(1))

    rule, again = made(), made()
    for seed in range(3):
        rule(gram(rows(4, seed)))
    again.load_state_dict(rule.state_dict())
    for seed in range(3, 6):
        assert torch.equal(rule(gram(rows(4, seed))), again(gram(rows(4, seed))))
    before = rule.phi.clone()
    k = gram(rows(4, 7))
    k[2] = k[:, 2] = 0
    rule(k)
    assert torch.equal(rule.phi[2], before[2]) and torch.equal(rule.phi[:, 2], before[:, 2])
    torch.manual_seed(0)
    free = W.GradVac()(k)
    torch.manual_seed(0)
    assert torch.equal(W.GradVac()(k), free)


@pytest.mark.parametrize("kind", [W.MGDA, W.UPGrad])
def test_a_square_jacobian_is_no_gram_matrix(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"^gram: expected a symmetric matrix"):
        kind()(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))


@pytest.mark.parametrize("kind", [lambda: W.NashMTL(update_every=3), lambda: W.GradVac(beta=0.5)])
def test_a_matrix_that_is_not_finite_moves_no_state(kind: Any) -> None:
    torch.manual_seed(0)
    matrix, weighting, other = gram(rows(3, 0, "plain")), kind(), kind()
    assert weighting(matrix * torch.nan).isnan().all()
    state = torch.get_rng_state()
    expected = [other(matrix) for _ in range(4)]
    torch.set_rng_state(state)
    for value in expected:
        assert torch.equal(weighting(matrix), value)
