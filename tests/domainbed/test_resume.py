"""A run that was killed goes on as if it had not been."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from beds import Bed, only

from fastdg.domainbed.__main__ import main
from fastdg.domainbed.adapter import Adapter
from fastdg.domainbed.algorithms import ENTRIES
from fastdg.domainbed.resume import FILE, Refused

# DomainBed's own warns of what later versions of its libraries will do; SANDMask of its default
pytestmark = pytest.mark.filterwarnings("ignore")


# Of the rules of the Gram matrix one with a generator goes on for all
OTHERS = ("RISE", "CAGrad", "FairGrad", "MGDA", "UPGrad", "DualProj", "IMTLG", "AlignedMTL")
OTHERS += ("ConFIG", "NashMTL")


class Killed(BaseException):
    """As a signal, it is caught by nobody."""


def rows(folder: Path) -> list[dict[str, Any]]:
    """The results without what depends on the clock and on where they were written."""
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for row in found:
        del row["step_time"], row["args"]
    return found


def assert_same_run(folder: Path, other: Path) -> None:
    assert rows(folder) == rows(other)
    weights, expected = (
        torch.load(f / "model.pkl", weights_only=False)["model_dict"] for f in (folder, other)
    )
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert (folder / "done").exists() and not (folder / FILE).exists()


def arguments(algorithm: str, folder: Path, *more: str, dataset: str = "Debug32") -> list[str]:
    own = {"Fishr": {"penalty_anneal_iters": 4}, "POGM": {"cag_update": 2}}
    hparams = json.dumps(own.get(algorithm, {}))
    run = ["--algorithm", algorithm, "--dataset", dataset, "--hparams", hparams, *more]
    return [*run, "--data_dir", str(folder), "--output_dir", str(folder)]


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch, kind: type[Adapter] = Adapter) -> None:
    made, train_step = [], kind.train_step

    def killing(self: Adapter, minibatches: Any) -> Any:
        made.append(1)
        if len(made) > step:
            raise Killed
        return train_step(self, minibatches)

    monkeypatch.setattr(kind, "train_step", killing)


@only("stand-in")
@pytest.mark.parametrize("algorithm", [name for name in ENTRIES if name not in OTHERS])
def test_every_algorithm_goes_on_bit_for_bit(
    bed: Bed, algorithm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dataset = "Debug28" if algorithm == "MIRO" else "Debug32"  # MIRO knows no layers there
    more = ["--steps", "13", "--checkpoint_freq", "4"]
    main(arguments(algorithm, tmp_path / "whole", *more, dataset=dataset))
    again = arguments(algorithm, tmp_path / "killed", *more, dataset=dataset)
    for step in (7, 4):  # then, counted from the last checkpoint, once more
        with monkeypatch.context() as patch:
            kill_at(step, patch, ENTRIES[algorithm].adapter)
            with pytest.raises(Killed):
                main(again)
        assert (tmp_path / "killed" / FILE).exists()
    main(again)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_kill_9(bed: Bed, tmp_path: Path) -> None:
    more = ["--steps", "60", "--checkpoint_freq", "10"]
    if bed.clone:
        more += ["--hparams", json.dumps({"batch_size": 2})]
    dataset = "Debug28" if bed.clone else "Debug32"
    command = [sys.executable, "-m", "fastdg.domainbed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder: Path) -> subprocess.Popen[str]:
        run = [*command, *arguments("AgrRand", folder, *more, dataset=dataset)]
        return subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, text=True)

    assert start(tmp_path / "whole").wait() == 0
    first = start(tmp_path / "killed")
    results = tmp_path / "killed" / "results.jsonl"
    while not results.exists() or results.read_text().count("\n") < 3:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    second = start(tmp_path / "killed")
    printed = second.communicate()[0]
    assert second.returncode == 0
    assert "fastdg: goes on at step" in printed
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@only("stand-in")
def test_another_run_is_refused_and_its_results_are_kept(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(algorithm: str, *more: str) -> None:
        main(arguments(algorithm, tmp_path, *more, dataset="Debug28"))

    with monkeypatch.context() as patch:
        kill_at(7, patch)
        with pytest.raises(Killed):
            run("AgrSum", "--checkpoint_freq", "4")
    kept = (tmp_path / "results.jsonl").read_text()
    with pytest.raises(RuntimeError, match="algorithm at step 0 was AgrSum, got PCG"):
        run("PCGrad", "--checkpoint_freq", "4")
    with pytest.raises(RuntimeError, match="another run, whose batch at step 0"):
        run("AgrSum", "--checkpoint_freq", "4", "--seed", "1")
    assert (tmp_path / "results.jsonl").read_text() == kept
    with pytest.raises(RuntimeError, match="another run, whose batch at step 5 was"):
        run("AgrSum", "--checkpoint_freq", "2")
    assert (tmp_path / "results.jsonl").read_text() == kept
    run("ERM", "--steps", "1")  # DomainBed's own, which is never resumed
    assert (tmp_path / "results.jsonl").read_text().startswith(kept)


@only("stand-in")
def test_resume_gives_the_commands_of_a_sweep_again(
    bed: Bed,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = arguments("VREx", tmp_path / "a b", "--checkpoint_freq", "4", dataset="Debug28")
    with monkeypatch.context() as patch:
        kill_at(7, patch)
        with pytest.raises(Killed):
            main(run)
    main(arguments("VREx", tmp_path / "whole", "--steps", "2", dataset="Debug28"))
    capsys.readouterr()
    main(["resume", str(tmp_path), "--command_launcher", "dummy"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Dummy launcher: {sys.executable} -m fastdg.domainbed --algorithm VREx")
    assert line.endswith(f"--output_dir '{tmp_path / 'a b'}'")


@only("stand-in")
def test_a_damaged_checkpoint_is_said(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = arguments("VREx", tmp_path / "run", "--checkpoint_freq", "4", dataset="Debug28")
    with monkeypatch.context() as patch:
        kill_at(7, patch)
        with pytest.raises(Killed):
            main(run)
    path = tmp_path / "run" / FILE
    whole, results = path.read_bytes(), (tmp_path / "run" / "results.jsonl").read_bytes()
    flipped = bytearray(whole)
    weight = next(iter(torch.load(path)["model"].values())).numpy().tobytes()
    flipped[whole.index(weight)] ^= 1
    other = io.BytesIO()
    torch.save({"arguments": []}, other)
    for content in (b"", whole[:-9], bytes(flipped), other.getvalue()):
        path.write_bytes(content)
        with pytest.raises(Refused, match=rf"{path}: .* Remove it to start its run anew\."):
            main(run)
        if content != bytes(flipped):  # only its tensors are
            with pytest.raises(Refused, match="Remove it to start its run anew"):
                main(["resume", str(tmp_path), "--command_launcher", "dummy"])
        assert (tmp_path / "run" / "results.jsonl").read_bytes() == results
    path.write_bytes(whole)
    main(run)
    assert (tmp_path / "run" / "done").exists()
