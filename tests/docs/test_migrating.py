"""The page on migrating: other packages' code runs, and ours beside it computes the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from documents import DOCS, FRAGMENT, around, blocks

pytestmark = [
    pytest.mark.cpu("other packages' code"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed"),
]


def both(package: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Run the fragment of a package, and the block of ours after it."""
    found = blocks(DOCS / "start" / "migrating.md")
    (place,) = (k for k, (_, text) in enumerate(found) if text.startswith(f"# {package}\n"))
    (theirs, one), (ours, other) = found[place : place + 2]
    assert (theirs, ours) == (FRAGMENT, "python") and other.startswith("# fastdg\n")
    exec(compile(one, package, "exec"), there)
    exec(compile(other, "fastdg", "exec"), here)


@pytest.fixture
def names() -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for each of the two."""
    torch.manual_seed(0)
    one = around()
    return one, {**one, "model": copy.deepcopy(one["model"])}


def test_from_backpack(names: tuple[dict[str, Any], dict[str, Any]]) -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    there, here = names
    there |= {name: getattr(backpack, name) for name in ("backpack", "extend")}
    there |= {name: getattr(extensions, name) for name in ("BatchGrad", "BatchL2Grad", "Variance")}
    here["domains"] = torch.zeros(len(here["y"]), dtype=torch.long)
    both("BackPACK", there, here)
    squares = 0
    for name, p in there["model"].named_parameters():
        torch.testing.assert_close(here["samples"][name], p.grad_batch)
        torch.testing.assert_close(here["moments"].variance[name][0], p.variance)
        squares = squares + p.batch_l2
    torch.testing.assert_close(here["norms"].square(), squares)


def test_from_opacus(names: tuple[dict[str, Any], dict[str, Any]]) -> None:
    opacus = pytest.importorskip("opacus")
    there, here = names
    there["GradSampleModule"] = opacus.GradSampleModule
    both("Opacus", there, here)
    torch.testing.assert_close(here["norms"], there["norms"])
    rows = [p.grad_sample.flatten(1) for p in there["model"].parameters()]
    factor = (1 / there["norms"]).clamp(max=1).unsqueeze(1)
    for p, row in zip(here["model"].parameters(), rows, strict=True):
        torch.testing.assert_close(p.grad.flatten(), (factor * row).mean(0))


def test_from_torchjd(names: tuple[dict[str, Any], dict[str, Any]]) -> None:
    pytest.importorskip("torchjd")
    pytest.importorskip("quadprog")
    there, here = names
    there |= {"D": 2, "optimizer": torch.optim.SGD(there["model"].parameters(), lr=0.1)}
    before = [p.detach().clone() for p in there["model"].parameters()]
    both("TorchJD", there, here)

    ways = [
        torch.cat(
            [(p - q).detach().flatten() for p, q in zip(model.parameters(), before, strict=True)]
        )
        for model in (there["model"], here["model"])
    ]
    largest = float(ways[0].abs().max())
    assert largest > 0
    torch.testing.assert_close(ways[1], ways[0], rtol=1e-3, atol=1e-3 * largest)
