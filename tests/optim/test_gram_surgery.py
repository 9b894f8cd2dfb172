"""Weightings: which ones fit, domains that a batch lacks, state, and thresholds."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import DEVICE
from runs import Run
from surgeries import Given, surgery
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, Adam

import fastdg
from fastdg.core.combine import combiner, weighted

A = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")


class Smoothed(nn.Module):
    """Keeps a buffer, one that is not saved by modules, plain attributes and a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)
        self.register_buffer("count", torch.zeros((), dtype=torch.int32), persistent=False)
        self.register_buffer("level", torch.ones(3, dtype=torch.bfloat16))
        self.seen: dict[int, list[float]] = {}
        self.key: tuple[Any, ...] = ()
        self.generator = torch.Generator().manual_seed(2)

    def forward(self, gram: Tensor) -> Tensor:
        norms = gram.diagonal().sqrt()
        self.mean = norms if self.mean is None else self.mean.lerp(norms, 0.25)
        self.count += 1
        self.level += 0.5 * self.level
        self.seen.setdefault(len(gram), []).append(float(norms.sum()))
        self.key = (len(gram), gram.dtype, gram.device, None)
        noise = torch.rand(len(gram), generator=self.generator, dtype=gram.dtype)
        last = self.seen[len(gram)][-2:]
        return (1 + noise) / (self.mean + 1e-3) * len(last) / self.level[0].to(gram.dtype)


def close(a: Tensor, b: Tensor, within: float) -> None:
    torch.testing.assert_close(a, b.to(a.dtype), rtol=within, atol=within)


MAKES = {
    "GradVac": lambda: A.GradVacWeighting(),
    "PCD": lambda: A.PCDWeighting(),
    "CRMOGM(PCGrad)": lambda: A.CRMOGMWeighting(A.PCGradWeighting()),
    "a module": Smoothed,
}


def step(opt: Any, model: nn.Module, g: Tensor, domains: list[int]) -> Tensor:
    """The weights that the rows of ``g`` of these domains get."""
    torch.manual_seed(7)
    opt.zero_grad()
    opt.backward(model(g[domains]), torch.tensor(domains))
    opt.step()
    return opt.statistics["weights"]


def given(places: int) -> nn.Module:
    return Given(places).double()


# -- which fit --


@pytest.mark.parametrize(
    "weighting",
    [
        lambda: A.ExcessMTLWeighting(),
        lambda: A.ExcessMTLWeighting(n_warmup_steps=5),
        lambda: A.SDMGradWeighting(),
        lambda: A.MoDoWeighting(),
        lambda: A.CRMOGMWeighting(A.ExcessMTLWeighting()),
    ],
)
def test_weightings_of_another_matrix_are_refused(weighting: Any) -> None:
    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"^weighting: .*Jacobian"):
        fastdg.GramSurgery(base, weighting())
    assert not [key for key in base.param_groups[0] if key.startswith("gram")]


def test_aggregators_that_make_no_gram_matrix_are_refused() -> None:
    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"^weighting: .*TrimmedMean"):
        fastdg.GramSurgery(base, A.TrimmedMean(1))


@pytest.mark.parametrize("name", ["MGDA", "AlignedMTL", "IMTLG", "PCD"])
@pytest.mark.parametrize("given", ["weighting", "aggregator", "its weighting"])
def test_each_way_to_give_one_of_torchjd(name: str, given: str) -> None:
    """As they are, and on the way round by the Jacobian that they are made for."""
    g = torch.randn(3, 6).double()
    aggregator = getattr(A, name)()
    weighting = {
        "weighting": getattr(A, f"{name}Weighting")(),
        "aggregator": aggregator,
        "its weighting": aggregator.weighting,
    }[given]
    grad, _ = surgery(fastdg.GramSurgery, g, weighting=weighting)
    close(grad, getattr(A, name)()(g), 1e-9)


@pytest.mark.parametrize("name", ["Mean", "Sum", "Constant"])
def test_weightings_that_read_the_number_of_rows_alone_fit(name: str) -> None:
    args = [torch.tensor([0.2, 0.5, 0.3]).double()] if name == "Constant" else []
    g = torch.randn(3, 6).double()
    grad, _ = surgery(fastdg.GramSurgery, g, weighting=getattr(A, f"{name}Weighting")(*args))
    close(grad, getattr(A, name)(*args)(g), 1e-9)
    _, opt = surgery(fastdg.GramSurgery, g, weighting=A.RandomWeighting())
    close(opt.statistics["weights"].sum(), torch.ones(()), 1e-9)


# -- domains that a batch lacks --

BATCHES = [[0, 1, 2], [0, 1], [0, 2], [1, 2], [0, 1, 2]]


@pytest.mark.parametrize("name", MAKES)
def test_state_belongs_to_the_same_domains_whatever_the_batch_has(name: str) -> None:
    g = torch.randn(3, 6).double()
    model, own = given(6), MAKES[name]()
    opt = fastdg.GramSurgery(SGD(model.parameters(), lr=0.0), MAKES[name](), num_domains=3)
    for domains in BATCHES:
        weights = step(opt, model, g, domains)
        rows = torch.zeros_like(g)
        rows[domains] = g[domains]
        torch.manual_seed(7)
        expected = own(rows @ rows.t())
        for d in range(3):
            close(weights[d], expected[d] if d in domains else torch.zeros(()), 1e-9)
    if name == "GradVac":
        close(opt.weighting._phi_t, own._phi_t, 1e-9)


def test_pcd_takes_no_other_domain_for_its_first() -> None:
    g = torch.randn(3, 6).double()
    model = given(6)
    opt = fastdg.GramSurgery(SGD(model.parameters(), lr=0.0), A.PCDWeighting(), num_domains=3)
    assert step(opt, model, g, [1, 2]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("known", [True, False])
def test_solvers_without_state_see_the_domains_of_the_batch_alone(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of zeros would get all of MGDA's weight; ids on a GPU are waited for."""
    if not known:
        for module in (combiner, weighted):
            monkeypatch.setattr(module, "readable", lambda domains: False)
    g = torch.randn(4, 6).double()
    model = given(6)
    opt = fastdg.GramSurgery(SGD(model.parameters(), lr=0.0), A.MGDAWeighting(), num_domains=4)
    for domains in ([0, 2, 3], [1, 3], [2]):
        weights = step(opt, model, g, domains)
        part = g[domains]
        close(weights[domains], A.MGDAWeighting()(part @ part.t()), 1e-9)
        assert not weights[[d for d in range(4) if d not in domains]].any()
    opt.absent = "zeros"
    assert step(opt, model, g, [0, 2, 3]).abs().max() < 1e-9


def test_another_number_of_domains_is_refused() -> None:
    g = torch.randn(3, 6).double()
    model = given(6)
    opt = fastdg.GramSurgery(SGD(model.parameters(), lr=0.0), A.GradVacWeighting())
    step(opt, model, g, [0, 1, 2])
    step(opt, model, g, [0, 2])  # the first domains may be absent
    with pytest.raises(ValueError, match=r"^num_domains: .*3 domains, got .*2"):
        step(opt, model, g, [0, 1])
    again = fastdg.GramSurgery(SGD(model.parameters(), lr=0.0), A.GradVacWeighting())
    again.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match=r"^num_domains: .*3 domains"):
        step(again, model, g, [0, 1])


def test_what_absent_may_be() -> None:
    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"^absent: .*got 'no'"):
        fastdg.GramSurgery(base, A.MGDAWeighting(), absent="no")


# -- state --


def run(name: str) -> Run:
    return Run(lambda o, m: fastdg.GramSurgery(o, MAKES[name](), num_domains=3))


def ends_alike(one: Run, other: Run) -> None:
    for each in (one, other):
        torch.manual_seed(3)
        for _ in range(4):
            each.step()
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert str(one.opt.state_dict()) == str(other.opt.state_dict())


@pytest.mark.product
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("through", ["file", "json", "inside", "deepcopy", "fresh DCP"])
@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled, unavailable or uninit")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_the_state_of_a_weighting_resumes_bit_for_bit(
    name: str, through: str, tmp_path: Path
) -> None:
    first, again = run(name), run(name)
    for _ in range(5):
        first.step()
    state = first.state()
    if through == "deepcopy":
        again = copy.deepcopy(first)
    elif through == "fresh DCP":
        saved = {"opt": get_optimizer_state_dict(first.model, first.opt)}
        dcp.save(saved, checkpoint_id=tmp_path)
        found = {"opt": get_optimizer_state_dict(again.model, again.opt)}
        dcp.load(found, checkpoint_id=tmp_path)
        again.load({**state, "opt": found["opt"]})
    else:
        if through == "inside":
            state["opt"] = copy.deepcopy(first.opt.base.state_dict())
        if through == "json":
            group = state["opt"]["param_groups"][0]
            group["gramsurgery_weighting"] = json.loads(json.dumps(group["gramsurgery_weighting"]))
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        opt = again.opt.base if through == "inside" else again.opt
        again.load({**state, "opt": again.opt.state_dict()})
        opt.load_state_dict(state["opt"])
    ends_alike(first, again)


def test_a_function_adds_nothing_to_the_state() -> None:
    opt = fastdg.GramSurgery(Adam(nn.Linear(2, 2).parameters()), lambda gram: gram.diagonal())
    assert "gramsurgery_weighting" not in opt.state_dict()["param_groups"][0]


def test_the_state_of_another_weighting_is_refused() -> None:
    model = given(6)
    opt = fastdg.GramSurgery(Adam(model.parameters()), A.GradVacWeighting(), num_domains=3)
    step(opt, model, torch.randn(3, 6).double(), [0, 1, 2])
    state = copy.deepcopy(opt.state_dict())
    other = fastdg.GramSurgery(Adam(model.parameters()), A.PCDWeighting(), num_domains=3)
    with pytest.raises(ValueError, match=r"^state_dict: .*GradVacWeighting"):
        other.load_state_dict(state)
    del state["param_groups"][0]["gramsurgery_weighting"]
    with pytest.warns(UserWarning, match=r"^state_dict: .*weighting"):
        other.load_state_dict(state)


def test_what_cannot_be_saved_says_so() -> None:
    weighting = Smoothed()
    weighting.last = deque([1.0])
    opt = fastdg.GramSurgery(Adam(nn.Linear(2, 2).parameters()), weighting, num_domains=3)
    with pytest.warns(UserWarning, match=r"^state_dict: .*last.*Smoothed"):
        opt.state_dict()


def test_a_step_that_a_scaler_skips_leaves_the_state() -> None:
    model = given(6)
    g = torch.randn(3, 6).double()
    opt = fastdg.GramSurgery(SGD(model.parameters(), lr=0.1), A.GradVacWeighting(), num_domains=3)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)

    def scaled(factor: float) -> None:
        opt.zero_grad()
        opt.backward(model(g * factor), torch.arange(3), scaler=scaler)
        scaler.step(opt)
        scaler.update()

    scaled(1.0)
    before = opt.weighting._phi_t.clone()
    scaled(float("inf"))
    assert opt.steps == 1 and torch.equal(opt.weighting._phi_t, before)
    scaled(1.0)
    assert opt.steps == 2 and not torch.equal(opt.weighting._phi_t, before)


# -- thresholds --


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3, 1e-9])
def test_upgrad_on_small_gradients(scale: float) -> None:
    pytest.importorskip("quadprog", reason="quadprog is not installed")
    pytest.importorskip("qpsolvers", reason="qpsolvers is not installed")
    g = torch.tensor([[1.0, 0.0], [-2.0, 0.5]]).double()
    expected = A.UPGrad()(g)
    grad, _ = surgery(fastdg.GramSurgery, scale * g, weighting=A.UPGradWeighting(), normalize=True)
    close(grad / scale, expected, 1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grad, _ = surgery(fastdg.GramSurgery, scale * g, weighting=A.UPGradWeighting())
    if scale < 1e-2:
        message = str(caught[0].message)
        assert message.startswith("weighting: UPGradWeighting treats gradients as zeros")
        assert message.endswith("Pass normalize=True.")
        close(grad, scale * g.mean(0), 1e-6)  # TorchJD's answer: the conflict stays
    else:
        assert not caught
        close(grad / scale, expected, 1e-6)


def test_normalising_changes_no_digit() -> None:
    g = torch.randn(3, 6).double()
    for weighting in (A.PCGradWeighting, A.MGDAWeighting, A.IMTLGWeighting):
        found = []
        for scale, normalize in ((1.0, False), (1.0, True), (2.0**-40, True)):
            torch.manual_seed(1)
            more = {"weighting": weighting(), "normalize": normalize}
            _, opt = surgery(fastdg.GramSurgery, scale * g, **more)
            found.append(opt.statistics["weights"])
        assert torch.equal(found[1], found[2])
        close(found[0], found[1], 1e-9)


class Attribute:
    """Keeps its state in a plain attribute and says so nowhere."""

    def __init__(self) -> None:
        self.mean = torch.zeros(3)

    def __call__(self, gram: Tensor) -> Tensor:
        self.mean = self.mean[: len(gram)] + gram.diagonal()
        return torch.softmax(-self.mean, 0)


def test_state_in_attributes_is_seen_and_saved() -> None:
    def made() -> tuple[nn.Module, Attribute, fastdg.GramSurgery]:
        torch.manual_seed(0)
        model, weighting = nn.Linear(4, 3), Attribute()
        return model, weighting, fastdg.GramSurgery(SGD(model.parameters(), 0.1), weighting)

    def step(model: nn.Module, opt: fastdg.GramSurgery, domains: Tensor, seed: int) -> None:
        x = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))
        opt.zero_grad()
        opt.backward(model(x).square().sum(1), domains)
        opt.step()

    model, weighting, opt = made()
    domains = torch.arange(12) % 3
    step(model, opt, domains, 0)
    again, other, resumed = made()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(weighting.mean, other.mean)
    for seed in (1, 2):
        step(model, opt, domains, seed)
        step(again, resumed, domains, seed)
    assert torch.equal(model.weight, again.weight)
    with pytest.warns(UserWarning, match="absent: the Attribute changes"):
        step(model, opt, torch.where(domains == 1, 2, domains), 3)


def test_a_weighting_that_only_computes_has_no_state() -> None:
    model = nn.Linear(4, 3)
    opt = fastdg.GramSurgery(SGD(model.parameters(), 0.1), Scaled())
    opt.backward(model(torch.randn(12, 4)).square().sum(1), torch.arange(12) % 3)
    opt.step()
    assert "gramsurgery_weighting" not in opt.state_dict()["param_groups"][0]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.table = 2.0, {"ones": [torch.ones(3)]}

    def forward(self, gram: Tensor) -> Tensor:
        return self.scale * self.table["ones"][0][: len(gram)]
