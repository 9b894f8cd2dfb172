"""What DomainBed's scripts find of fastdg, and what users are told."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from beds import Bed, only

import fastdg
from fastdg import files
from fastdg.domainbed import __main__ as main_module
from fastdg.domainbed.__main__ import main
from fastdg.domainbed.algorithms import ENTRIES
from fastdg.domainbed.plug import MISSING, find, plugged_in
from fastdg.domainbed.resume import FILE, Refused

pytestmark = pytest.mark.filterwarnings("ignore")

# Made by the same lines, but for the rule
RULES = ["MGDA", "UPGrad", "DualProj", "IMTLG", "AlignedMTL", "ConFIG", "NashMTL"]
ADDED = [
    "AgrSum",
    "AgrRand",
    "PCGrad",
    "CAGrad",
    "FairGrad",
    "GENIE",
    "GGA",
    "GGAL",
    "GradVac",
    *RULES,
    "POGM",
    "PGrad",
    "SMA",
    "MIRO",
    "RISE",
]
ADDED += ["SAM", "GSAM", "SAGM", "GAM", "DISAM"]


def test_names_and_hparams(bed: Bed) -> None:
    algorithms, registry = find("algorithms"), find("hparams_registry")
    own = {name: registry.random_hparams(name, "PACS", 7) for name in algorithms.ALGORITHMS}
    classes, names = {name: vars(algorithms)[name] for name in own}, list(own)
    with plugged_in():
        assert [*names, *ADDED] == algorithms.ALGORITHMS
        for name, hparams in own.items():
            assert registry.random_hparams(name, "PACS", 7) == hparams
        for name in ENTRIES:
            found = algorithms.get_algorithm_class(name)
            assert found.__name__ == name and issubclass(found, algorithms.Algorithm)
            default = registry.default_hparams(name, "PACS")
            drawn = [registry.random_hparams(name, "PACS", seed) for seed in range(40)]
            assert all(d.keys() == default.keys() and json.dumps(d) for d in drawn)
            assert registry.random_hparams(name, "PACS", 3) == drawn[3]
        assert algorithms.get_algorithm_class("ERM") is classes["ERM"]
        drawn = [registry.random_hparams("MIRO", "PACS", seed) for seed in range(40)]
        assert {d["miro_lambda"] for d in drawn} == {1.0, 0.1, 0.01, 0.001}
        office = [registry.random_hparams("RISE", "OfficeHome", seed) for seed in range(40)]
        assert {d["rise_distillation"] for d in office} == {0.1, 0.2}
    assert names == algorithms.ALGORITHMS
    assert all(algorithms.get_algorithm_class(name) is classes[name] for name in names)


@only("stand-in")
def test_settings_are_the_hparams(bed: Bed) -> None:
    registry = find("hparams_registry")
    expected = {
        "Fishr": {"penalty_weight": "lambda", "anneal_steps": "penalty_anneal_iters", "ema": "ema"},
        "Fish": {"meta_lr": "meta_lr"},
        "IRM": {"penalty_weight": "irm_lambda", "anneal_steps": "irm_penalty_anneal_iters"},
        "VREx": {"penalty_weight": "vrex_lambda", "anneal_steps": "vrex_penalty_anneal_iters"},
        "GroupDRO": {"eta": "groupdro_eta"},
        "ANDMask": {"threshold": "tau"},
        "SANDMask": {"threshold": "tau", "steepness": "k"},
        "IGA": {"penalty_weight": "penalty"},
        "CAGrad": {"c": "cagrad_c"},
        "FairGrad": {"alpha": "fairgrad_alpha"},
        "GENIE": {"dropped": "genie_dropped"},
        "GGA": {"size": "gga_size"},
        "GGAL": {"gamma": "gga_l_gamma"},
        "GradVac": {"beta": "gradvac_beta"},
        "NashMTL": {},
        "POGM": {"meta_lr": "meta_lr", "c": "cagrad_c", "domain_steps": "cag_update"},
        "PGrad": {"meta_lr": "pgrad_meta_lr", "weight_decay": "weight_decay"},
        "SMA": {"start": "sma_start"},
        "MIRO": {"weight": "miro_lambda", "lr_multiplier": "miro_lr_mult"},
    }
    with plugged_in():
        for name, settings in expected.items():
            hparams = registry.random_hparams(name, "Debug28", 5)
            found = find("algorithms").get_algorithm_class(name)
            opt = found((3, 28, 28), 2, 3, hparams).wrapper()
            assert type(opt) is getattr(fastdg, name) and opt.num_domains == 3
            for setting, hparam in settings.items():
                assert getattr(opt, setting) == hparams[hparam], (name, setting)


@only("stand-in")
def test_checkpoints_load_into_domainbeds_own_class(bed: Bed, tmp_path: Path) -> None:
    for name in find("algorithms").ALGORITHMS[1:]:
        more = ["--steps", "2", "--data_dir", "", "--output_dir", str(tmp_path / name)]
        main(["--algorithm", name, *more])
        saved = torch.load(tmp_path / name / "model.pkl", weights_only=False)
        own = find("algorithms").get_algorithm_class(name)(
            (3, 28, 28), 2, 2, saved["model_hparams"]
        )
        own.load_state_dict(saved["model_dict"])
        if "update_count" in saved["model_dict"] and name != "SANDMask":
            assert own.update_count == 2


@pytest.mark.parametrize("algorithm", [x for x in ADDED if x not in ["RISE", *RULES[:-1]]])
def test_added_algorithms_train(bed: Bed, algorithm: str, tmp_path: Path) -> None:
    hparams = json.dumps({"batch_size": 3})
    more = ["--steps", "3", "--data_dir", "", "--output_dir", str(tmp_path), "--hparams", hparams]
    main(["--algorithm", algorithm, "--dataset", "Debug28", *more])
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["step"] for row in results] == [0, 2]
    assert all(np.isfinite(results[-1][key]) for key in ("loss", "step_time", "mem_gb"))
    assert (tmp_path / "done").exists()


@only("stand-in")
def test_random_numbers_of_surgery_leave_the_data_alone(bed: Bed, tmp_path: Path) -> None:
    def after(name: str) -> Any:
        more = ["--steps", "4", "--data_dir", "", "--output_dir", str(tmp_path / name)]
        main(["--algorithm", name, *more])
        return torch.get_rng_state()

    expected = after("AgrSum")
    assert torch.equal(after("AgrRand"), expected) and torch.equal(after("PCGrad"), expected)


def test_a_sweep_launches_fastdg(
    bed: Bed, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = ["--data_dir", "d", "--output_dir", str(tmp_path), "--command_launcher", "dummy"]
    if bed.clone:
        more += ["--datasets", "RotatedMNIST", "--n_hparams", "1", "--n_trials", "1"]
        more += ["--single_test_envs", "--steps", "3"]
    main(["sweep", "launch", "--algorithms", "Fish", "PCGrad", "--skip_confirmation", *more])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("Dummy launcher: ")]
    assert len(lines) == (12 if bed.clone else 2)
    command = f"Dummy launcher: {sys.executable} -m fastdg.domainbed --algorithm "
    assert all(line.startswith((f"{command}Fish ", f"{command}PCGrad ")) for line in lines)


def refused(**environment: str) -> str:
    """What the command says that ends at once."""
    command = [sys.executable, "-m", "fastdg.domainbed", "--algorithm", "Fishr"]
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    return run.stderr


def test_without_domainbed() -> None:
    if importlib.util.find_spec("domainbed") is not None:
        pytest.skip("DomainBed is on the path")
    said = refused()
    assert "DOMAINBED=/path/to/DomainBed python -m fastdg.domainbed" in said
    assert "pip install torchvision timm wilds tqdm" in said


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("nowhere", "nowhere, which is no folder."),
        (".", "Set it to {}/clone."),
        ("clone/domainbed", "clone/domainbed. Set it to {}/clone."),
        ("empty", "empty."),
    ],
)
def test_a_wrong_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, words: str
) -> None:
    (tmp_path / "clone" / "domainbed").mkdir(parents=True)
    (tmp_path / "clone" / "domainbed" / "algorithms.py").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("DOMAINBED", str(tmp_path / folder))
    with pytest.raises(ImportError) as caught:
        find("algorithms")
    said = str(caught.value)
    assert (
        said.startswith("DOMAINBED: expected the root of a clone of https://")
        and MISSING not in said
    )
    assert said.endswith(words.format(tmp_path))


def test_what_domainbed_imports_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "domainbed").mkdir()
    (tmp_path / "domainbed" / "algorithms.py").write_text("import no_such_package_here")
    said = refused(DOMAINBED=str(tmp_path))
    assert said.startswith(
        "DomainBed imports no_such_package_here, which is not installed. Install"
    )


def test_a_batch_larger_than_a_domain_is_refused(bed: Bed, tmp_path: Path) -> None:
    """DomainBed would wait for it for ever."""
    samples = 13 if bed.clone else 40  # of its 16, a fifth is held out

    def train(batch: int) -> None:
        more = ["--hparams", json.dumps({"batch_size": batch}), "--output_dir", str(tmp_path)]
        main(
            ["--algorithm", "VREx", "--dataset", "Debug28", "--steps", "1", "--data_dir", "", *more]
        )

    words = (
        rf"batch_size: {samples + 1} is more than the {samples} samples of a domain's .* or less"
    )
    with pytest.raises(Refused, match=words):
        train(samples + 1)
    train(samples)
    assert (tmp_path / "done").exists()


def test_weights_that_cannot_be_downloaded_are_said(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: Any, **more: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    words = rf"{tmp_path}/checkpoints/resnet50-0676ba61\.pth: there are no pre-trained weights"
    with (
        plugged_in(),
        pytest.raises(Refused, match=rf"{words}, .* Download {url} elsewhere and put"),
    ):
        torch.hub.load_state_dict_from_url(url, progress=False)
    assert torch.hub.download_url_to_file.__module__ == "torch.hub"


@only("stand-in")
def test_a_second_run_in_the_same_folder_is_refused(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_module, "locked", lambda path, patience: files.locked(path, 0))
    run = ["--algorithm", "VREx", "--steps", "1", "--output_dir", str(tmp_path / "run")]
    with files.locked(tmp_path / "run" / FILE):
        with pytest.raises(TimeoutError, match=": another run"):
            main(run)
        assert not (tmp_path / "run" / "results.jsonl").exists()
    main(run)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "done",
        "model.pkl",
        "results.jsonl",
    ]


@only("stand-in")
def test_rise_asks_for_the_names_of_the_classes(bed: Bed, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^rise_classes: .*got \[\]"):
        main(["--algorithm", "RISE", "--output_dir", str(tmp_path)])
