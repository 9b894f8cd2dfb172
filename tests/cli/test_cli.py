"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import fastdg
from fastdg.cli import options
from fastdg.cli.app import app
from fastdg.ops.dispatch.registry import OPS
from fastdg.studies.catalogue import ALGORITHMS, COSTS
from fastdg.studies.experiments import demo as experiment

TINY = ["--seeds", "1", "--steps", "3", "--datasets", "coloured", "--workers", "1"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_info_names_versions_and_every_backend() -> None:
    result = call("info")
    assert result.exit_code == 0
    assert fastdg.__version__ in result.output
    for name in fastdg.backends():
        assert name in result.output


def test_info_says_what_computes_each_op() -> None:
    result = call("info", "--why")
    assert result.exit_code == 0
    rows = {line.split()[1]: line for line in result.output.splitlines() if "│" in line}
    assert set(OPS) <= set(rows)
    assert ("yes" in rows["outer_moments"]) == any(
        backend in OPS["outer_moments"].backends and here
        for backend, (here, _) in fastdg.backends().items()
    )
    assert "yes" not in rows["outer_gram"]
    assert 'logging.getLogger("fastdg.ops").setLevel("DEBUG")' in result.output


def test_demo_trains_prints_and_writes(tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder"
    result = call("demo", *TINY, "--out", str(output))
    assert result.exit_code == 0, result.output
    done = len(experiment.DEFAULT)
    spoken = ("Fishr (all layers)", "PCGrad", "× ERM", "peak memory", "proves nothing")
    told = f"{done} runs: less than a minute, if nothing else runs"
    for words in (*spoken, told, f"1 of {done} runs done", f"{done} of {done} runs done"):
        assert words in result.output
    results = json.loads((output / "results.json").read_text())
    assert set(results["runs"]) == {f"coloured/2/0/{name}" for name in experiment.DEFAULT}
    assert (output / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "figure.png").stat().st_size > 10_000
    assert sorted(path.name for path in output.iterdir()) == [
        "cosines.png",
        "figure.png",
        "results.json",
        "variances.png",
    ]

    before = (output / "results.json").read_bytes()
    refused = call("demo", *TINY, "--steps", "4", "--out", str(output))
    assert refused.exit_code == 2 and "steps was 3, now 4" in refused.output
    assert (output / "results.json").read_bytes() == before


def test_demo_draws_both_tasks(tmp_path: Path) -> None:
    arguments = ["--seeds", "1", "--steps", "3", "--algorithms", "erm", "--workers", "1"]
    result = call("demo", *arguments, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert sum(line.startswith("┏") for line in result.output.splitlines()) == 5
    for name in ("figure.png", "variances.png", "cosines.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--algorithms", "mixup"], "algorithms: expected some of erm, fishr"),
        (["demo", "--algorithms", "Fischr"], "got Fischr. Do you mean fishr?"),
        (["list", "--family", "loss"], "family: expected some of losses, features"),
        (["list", "nothing"], "algorithms: expected some of erm, irm"),
        (["demo", "--steps", "2"], "steps: expected >= 3, got 2"),
        (["demo", "--datasets", "coloured,svhn"], "datasets: expected some of coloured, rotated"),
        (["demo", "--seeds", "0"], "seeds: expected >= 1, got 0"),
        (["demo", "--workers", "0"], "workers: expected >= 1, got 0"),
        (["reproduce", "colored-mnist", "--algorithms", "irm", "--data", "."], "got irm"),
        (["reproduce", "colored-mnist", "--data", "nowhere"], "nowhere"),
        (["pacs", "--data", "nowhere"], "nowhere/weights. Put resnet20-12fca82f.th of github.com"),
        (["demo", "--seeds", "1", "--output", "/dev/full"], "a file is in the place of one of its"),
        (["reproduce", "colored-mnist"], "--data: expected the folder of MNIST's four idx files"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTDG_DATA", raising=False)
    result = call(*arguments)
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("fastdg: ")]
    assert words in line
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())  # no folder that holds nothing


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("demo", *TINY, "--output", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "results.json: cannot write it, a file is in the place of one of" in result.output


def test_fresh_removes_nothing_before_it_can_run(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("results.json", "erm-0.checkpoint")]
    for path in files:
        path.write_text("of hours")
    arguments = ["--fresh", "--data", str(tmp_path), "--out", str(tmp_path)]
    assert call("reproduce", "colored-mnist", *arguments).exit_code == 2
    assert all(path.read_text() == "of hours" for path in files)


def test_damaged_results_are_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"settings": {}}')
    result = call("demo", *TINY, "--out", str(tmp_path))
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "results.json: damaged, or not a result file of this program" in result.output


def test_progress_is_told_at_once_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=110)
    monkeypatch.setattr(options, "console", console)
    clock = iter(range(100, 1000, 60))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with options.training("runs", 1200.0, ", 2 side by side") as show:
        show("first", 4, 24)
        assert capsys.readouterr().out.splitlines()[0] == (
            "24 runs, 4 of them done before: about 17 minutes, if nothing else runs, 2 side by side"
        )
        said = []
        for done in range(5, 25):
            show("next", done, 24)
            said.append(capsys.readouterr().out.strip())
    # A minute of the clock between each time that it is asked for
    assert said[:4] == ["5 of 24 runs done", "", "", "8 of 24 runs done, about 5 minutes left"]
    assert said[-1] == "24 of 24 runs done"
    assert sum(map(bool, said)) == 9


def test_options_of_earlier_versions_work(tmp_path: Path) -> None:
    result = call("demo", *TINY, "--algorithms", "ERM", "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == {
        "coloured/2/0/erm"
    }
    refused = call("reproduce", "colored-mnist", "--restarts", "0", "--data", str(tmp_path))
    assert "seeds: expected >= 1, got 0" in refused.output


@pytest.mark.parametrize("command", [["demo"], ["pacs"], ["reproduce", "colored-mnist"]])
def test_commands_share_their_options(command: list[str]) -> None:
    said = call(*command, "--help").output
    for option in ("--algorithms", "--seeds", "--out ", "--fresh"):
        assert option in said
    assert "or more" in said
    assert "--output" not in said and "--restarts" not in said


def test_list_has_every_algorithm() -> None:
    result = call("list")
    assert result.exit_code == 0
    for name, entry in ALGORITHMS.items():
        assert re.search(rf"│ {name} +│ {entry.wrapper.__name__} +│ {entry.cost} +│", result.output)
        assert entry.paper.rsplit(", ", 1)[-1] in result.output
    assert all(cost in result.output for cost in COSTS.values())


def test_list_of_a_family_and_of_names() -> None:
    said = call("list", "--family", "Surgery").output
    assert "pcgrad" in said and "vrex" not in said
    said = call("list", "agr_sum", "SAM").output
    assert "fastdg.AgrSum(base, " in said and "two forwards" in said
    assert "Domain Generalization via Gradient Surgery, ICCV 2021" in said
    assert "fastdg demo --algorithms erm,agr-sum" in said


def test_unknown_commands_and_options_are_refused() -> None:
    assert call("train").exit_code == 2
    assert call("demo", "--epochs", "3").exit_code == 2


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train", interrupted)
    result = call("demo", *TINY, "--out", str(tmp_path))
    assert result.exit_code == 130
    assert "Stopped. The same command goes on from here." in result.output
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == {}


def test_it_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastdg", "--help"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for command in ("list", "demo", "reproduce", "pacs", "info"):
        assert command in result.stdout


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdg import cli

    monkeypatch.setattr(cli, "NEEDED", ("typer", "no_such_package_here"))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert "needs no_such_package_here: pip install 'fastdg[demo]'" in str(stop.value)
