"""fastdg's algorithms in DomainBed make the steps that DomainBed's own make."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from beds import Bed, curve_of, only, repaired

from fastdg.domainbed.plug import find, plugged_in

# DomainBed's own warns of what later versions of its libraries will do
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("double")]

ANNEALED = {"penalty_anneal_iters": 20}
HPARAMS: dict[str, dict[str, Any]] = {
    "Fishr": ANNEALED,
    "IRM": {f"irm_{key}": value for key, value in ANNEALED.items()},
    "VREx": {f"vrex_{key}": value for key, value in ANNEALED.items()},
    "GroupDRO": {},
    "ANDMask": {},
    "SANDMask": {"tau": 0.5},
    "Fish": {},
    "IGA": {"penalty": 10.0},
    "EQRM": {"eqrm_burnin_iters": 20, "eqrm_lr": 1e-4},
    "SD": {},
    "CORAL": {},
    "MMD": {},
    "MLDG": {"n_meta_test": 1},
    "CausIRL_CORAL": {},
    "CausIRL_MMD": {},
    "IB_ERM": {f"ib_{key}": value for key, value in ANNEALED.items()},
    "IB_IRM": {f"{one}_{key}": 20 for key in ANNEALED for one in ("ib", "irm")},
}


class Drawing:
    """Draws for DomainBed's own class as fastdg's does for itself."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def randint(self, low: int, high: int) -> int:
        drawn = torch.rand(1, generator=self.generator, dtype=torch.float64)
        return low + int(drawn * (high - low))


def both(bed: Bed, monkeypatch: Any, dataset: str, algorithm: str, root: Path, tmp: Path) -> Any:
    """The curves of DomainBed's class and of fastdg's, by the same arguments."""
    algorithms = find("algorithms")
    if algorithm.startswith("CausIRL"):
        monkeypatch.setattr(algorithms, "np", SimpleNamespace(random=Drawing()))
    if bed.clone:
        monkeypatch.setattr(find("lib.misc"), "accuracy", lambda *args: 0.0)  # minutes, else
        if algorithm == "Fishr":
            pytest.importorskip("backpack")
    # What DomainBed's Fish draws at random besides, fastdg's draws too for small images alone
    more = {"batch_size": 2 if dataset == "RotatedMNIST" else 4, "draws": dataset == "Debug28"}
    hparams = json.dumps({**HPARAMS[algorithm], **more})

    def arguments(name: str) -> list[str]:
        output = ["--output_dir", str(tmp / name), "--data_dir", str(root), "--skip_model_save"]
        run = ["--algorithm", algorithm, "--dataset", dataset, "--hparams", hparams]
        return [*run, "--steps", "50", "--seed", "3", *output]

    def own_class(name: str, own: Any = algorithms.get_algorithm_class) -> type:
        return repaired(own(name), algorithms) if bed.clone and name == "Fishr" else own(name)

    own = curve_of(own_class, monkeypatch, *arguments("own"))
    if bed.clone and algorithm.startswith("IB_"):
        # DomainBed adds the penalties to its nll in place, and logs the sum; fastdg logs the nll
        assert all(values.pop("nll") == values["loss"] for values in own)
    with plugged_in():
        ours = curve_of(algorithms.get_algorithm_class, monkeypatch, *arguments("fastdg"))
    return own, ours


def check(own: Any, ours: Any) -> None:
    assert len(own) == len(ours) == 50
    assert own[0]["loss"] != own[-1]["loss"]
    for step, (values, expected) in enumerate(zip(ours, own, strict=True)):
        values = {name: value for name, value in values.items() if name in expected}
        assert values == pytest.approx(expected, abs=1e-5, rel=1e-5), step


@pytest.mark.parametrize("algorithm", HPARAMS)
def test_same_curve(
    bed: Bed, algorithm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check(*both(bed, monkeypatch, "Debug28", algorithm, tmp_path, tmp_path))


@only("stand-in")
@pytest.mark.parametrize("algorithm", HPARAMS)
def test_same_curve_with_batch_statistics_and_dropout(
    bed: Bed, algorithm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check(*both(bed, monkeypatch, "Debug32", algorithm, tmp_path, tmp_path))


@only("clone")
@pytest.mark.parametrize("algorithm", ["Fishr", "IRM", "VREx", "GroupDRO", "ANDMask", "Fish"])
def test_same_curve_on_rotated_mnist(
    bed: Bed,
    algorithm: str,
    small_mnist: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    check(*both(bed, monkeypatch, "RotatedMNIST", algorithm, small_mnist, tmp_path))
