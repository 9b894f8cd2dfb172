"""SWAD's two rules: which steps are in the average, and how often."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import fastdg

CURVES = {
    "falls": [5.0, 4.0, 3.0, 2.0],
    "falls into a valley": [5.0, 4.0, 3.0, 1.0, 1.2, 1.1, 1.3, 1.2],
    "rises at once": [1.0, 1.1, 1.2, 1.1, 1.2, 1.25],
    "flat": [1.0] * 8,
    "a valley that ends": [5.0, 1.4, 1.35, 1.3, 1.2, 1.0, 1.2, 1.1, 1.3, 1.2, *[9.0] * 6],
    "a short one": [5.0, 4.0, 3.0, 1.0, 1.2, 1.1],
    "two valleys": [3.0, 1.0, 1.1, 1.2, *[9.0] * 3, 0.5, 0.6, *[9.0] * 6],
    "ends high": [5.0, 4.0, 3.0, 1.0, 1.2, 1.1, 1.3, 1.2, 9.0, 9.0],
    "a wall before": [1.2, 1.1, 9.0, 1.0, 1.1, 1.2, 1.1, 1.15],
}
# How often each segment is in the average: values of LossValley and AveragedModel of khanrc/swad
# at 252190e (domainbed/swad.py, domainbed/lib/swa_utils.py), run on these curves, and whether
# its valley was dead then. (n_converge, n_tolerance) -> curve -> digits.
THEIRS: dict[tuple[int, int], dict[str, str]] = {
    (3, 6): {
        "falls": "0001",
        "falls into a valley": "00011111",
        "rises at once": "322111",
        "flat": "32211111",
        "a valley that ends": "0001121111 dead",
        "a short one": "011111",
        "two valleys": "012211111 dead",
        "ends high": "00011111",
        "a wall before": "00011111",
    },
    (2, 4): {
        "falls": "0001",
        "falls into a valley": "00011111",
        "rises at once": "221111",
        "flat": "22111111",
        "a valley that ends": "0000121111 dead",
        "a short one": "000111",
        "two valleys": "012111111 dead",
        "ends high": "00011111",
        "a wall before": "01111111",
    },
    (3, 3): {
        "falls": "0001",
        "falls into a valley": "00001111",
        "rises at once": "011111",
        "flat": "01111111",
        "a valley that ends": "0000001111 dead",
        "a short one": "000011",
        "two valleys": "0011 dead",
        "ends high": "00001111",
        "a wall before": "00001111",
    },
    (4, 2): {
        "falls": "0001",
        "falls into a valley": "00001111",
        "rises at once": "011111",
        "flat": "01111111",
        "a valley that ends": "0000001111 dead",
        "a short one": "000001",
        "two valleys": "0011 dead",
        "ends high": "00001111 dead",
        "a wall before": "00001111",
    },
    (1, 1): {
        "falls": "0111",
        "falls into a valley": "01111111",
        "rises at once": "011111",
        "flat": "01111111",
        "a valley that ends": "0111111111 dead",
        "a short one": "011111",
        "two valleys": "0111 dead",
        "ends high": "01111111 dead",
        "a wall before": "01 dead",
    },
}


class Run:
    """Weights that are 1 at the place of their step and 0 elsewhere: an average of them says how
    much each step counts. Segments have one, two and three steps in turn."""

    def __init__(self, losses: list[float], **settings: Any) -> None:
        self.losses = losses
        self.lengths = [1 + k % 3 for k in range(len(losses))]
        self.model = nn.Linear(sum(self.lengths), 1, bias=False).double()
        self.opt = fastdg.SWAD(SGD(self.model.parameters(), lr=0.1), self.model, **settings)

    def step(self, place: int) -> None:
        with torch.no_grad():
            self.model.weight.zero_()[0, place] = 1
        self.model.weight.grad = torch.zeros_like(self.model.weight)
        self.opt.step()

    def evaluations(self, first: int = 0, last: int | None = None) -> None:
        for k in range(first, len(self.losses) if last is None else last):
            for place in range(sum(self.lengths[:k]), sum(self.lengths[: k + 1])):
                self.step(place)
            self.opt.evaluate(self.losses[k])

    def shares(self) -> Tensor:
        return self.opt.averaged().module.weight.detach()[0]

    def expected(self, often: str) -> Tensor:
        """The mean of segments, each counted so often."""
        shares = torch.zeros(sum(self.lengths), dtype=torch.float64)
        for k, times in enumerate(often):
            start = sum(self.lengths[:k])
            shares[start : start + self.lengths[k]] = int(times) / self.lengths[k]
        return shares / shares.sum()


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("patience", THEIRS, ids=str)
def test_the_codes_rule_is_the_authors_code(patience: tuple[int, int], curve: str) -> None:
    often, _, dead = THEIRS[patience][curve].partition(" ")
    run = Run(CURVES[curve], n_converge=patience[0], n_tolerance=patience[1], rule="code")
    run.evaluations()
    shares = run.shares()
    torch.testing.assert_close(shares, run.expected(often), rtol=0, atol=1e-12)
    assert run.opt.finished == bool(dead)
    held = [len(rows) for rows in run.opt._own_state["pending"].values()]
    assert all(n <= max(patience) for n in held)
    if run.opt.started:
        assert int(run.opt.averaged().n_averaged) == max(1, sum(map(int, often)))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("patience", [(3, 6), (3, 3), (1, 1)], ids=str)
def test_the_ends_of_finished_valleys_agree(patience: tuple[int, int], curve: str) -> None:
    ends = []
    for rule in ("paper", "code"):
        run = Run(CURVES[curve], n_converge=patience[0], n_tolerance=patience[1], rule=rule)
        run.evaluations()
        ends.append((run.opt.finished, int(run.shares().nonzero().max())))
    assert ends[0][0] == ends[1][0]
    assert ends[0] == ends[1] or not ends[0][0]


def test_by_the_paper_all_steps_count_once_and_the_default_is_that() -> None:
    run = Run(CURVES["a valley that ends"])
    run.evaluations()
    assert run.opt.rule == "paper"
    shares = run.shares()
    first, last = sum(run.lengths[:5]), sum(run.lengths[:10])
    expected = torch.zeros_like(shares)
    expected[first:last] = 1 / (last - first)
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-12)


def test_by_the_code_steps_since_the_last_evaluation_do_not_count() -> None:
    run = Run([*CURVES["rises at once"], 1.0], rule="code")
    run.evaluations(last=6)
    before = run.shares()
    run.step(11)
    assert torch.equal(run.shares(), before)
    early = Run([1.0, 1.0], rule="code")
    early.step(0)
    with pytest.warns(UserWarning, match=r"^SWAD: opt\.evaluate"):
        assert early.shares().tolist() == [1, 0, 0]


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize("patience", [(3, 6), (4, 2)], ids=str)
@pytest.mark.parametrize("at", [1, 4, 8, 11])
def test_resumes_bit_for_bit(rule: str, patience: tuple[int, int], at: int) -> None:
    losses = CURVES["two valleys"]
    settings = {"n_converge": patience[0], "n_tolerance": patience[1]}
    run = Run(losses, rule=rule, **settings)
    run.evaluations(last=at)
    file = io.BytesIO()
    torch.save(run.opt.state_dict(), file)
    file.seek(0)
    again = Run(losses, **settings)
    again.opt.load_state_dict(torch.load(file, weights_only=True))
    assert again.opt.rule == rule
    third = copy.deepcopy(run)
    for other in (run, again, third):
        other.evaluations(first=at)
        assert torch.equal(other.shares(), run.shares())
        assert other.opt.finished == run.opt.finished


def test_a_state_from_before_there_were_rules_goes_on_by_the_papers() -> None:
    losses = CURVES["two valleys"]
    run = Run(losses)
    run.evaluations(last=8)
    state = run.opt.state_dict()
    for key in ("swad_rule", "swad_early"):
        del state["param_groups"][0][key]
    again = Run(losses)
    again.opt.load_state_dict(state)
    for other in (run, again):
        other.evaluations(first=8)
    assert torch.equal(again.shares(), run.shares())


def test_what_a_rule_may_be() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"^rule: .*got 'swa'"):
        fastdg.SWAD(SGD(model.parameters()), model, rule="swa")
    run = Run(CURVES["flat"], rule="code")
    run.step(0)
    with pytest.raises(ValueError, match=r"^validation_loss: .*got nan"):
        run.opt.evaluate(float("nan"))
