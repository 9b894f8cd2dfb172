"""What is said of the benchmark's results: choices, differences to ERM, tables and the figure."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fastdg.cli import benchmark as command
from fastdg.cli import options
from fastdg.cli.app import app
from fastdg.studies.benchmark.datasets import DATASETS
from fastdg.studies.data import digits
from fastdg.studies.report import benchmark_summary as summary
from fastdg.studies.report.benchmark_figure import benchmark_figure
from fastdg.studies.report.benchmark_table import accuracies, comparison, markdown

SEEDS = 4
# Added to ERM's accuracy: a clear gain, one that depends on the seed, a clear loss, and ERM itself
GAINS: dict[str, tuple[float, ...]] = {
    "erm": (0, 0, 0, 0),
    "irm": (3.0, 3.5, 2.5, 3.0),
    "vrex": (4.0, -4.0, 3.0, -3.0),
    "fish": (-30.0, -31.0, -29.0, -30.0),
    "erm-again": (0.5, -0.5, 0.5, -0.5),
}


def trial(validation: float, test: float, peek: float, peek_test: float) -> dict[str, Any]:
    return {
        "validation": validation,
        "test": test,
        "step": 10,
        "peek": peek,
        "peek_test": peek_test,
        "cpu": 0.001,
        "hparams": {},
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """Two data sets of four domains; the second of two trials is chosen by the domain left out
    alone."""
    runs = {}
    for d in range(4):
        for name, gains in GAINS.items():
            for seed in range(SEEDS):
                right = 60.0 + d + seed / 10 + gains[seed]
                unit = [trial(80, right, 50, 0), trial(79, 0, 60, right + 5)]
                runs[f"digits/{d}/{name}/{seed}"] = {"trials": unit}
                runs[f"pacs/{d}/{name}/{seed}"] = {"trials": copy.deepcopy(unit)}
    for unit in (unit for key, unit in runs.items() if "/irm/" in key):
        for one in unit["trials"]:
            one["cpu"] = 0.003
    return {"settings": {"steps": 60, "trials": 2}, "machine": {}, "runs": runs}


def by_name(results: dict[str, Any]) -> dict[str, summary.Standing]:
    return {s.algorithm: s for s in summary.standings(summary.condensed(results))}


def test_training_domains_choose_and_the_oracle_is_apart() -> None:
    trials = [trial(70, 1, 90, 11), trial(80, 2, 95, 12), trial(80, 3, 99, 13)]
    assert summary.selected(trials) == {"trial": 1, "chosen": 2, "oracle": 13}


def test_differences_are_paired_by_seed(results: dict[str, Any]) -> None:
    found = by_name(results)
    assert list(found) == ["erm", "irm", "vrex", "erm-again", "fish"]
    (gain, error), clear = found["irm"].gain
    assert gain == pytest.approx(3.0) and clear
    assert error == pytest.approx(statistics.stdev(GAINS["irm"]) / 2)
    assert not found["vrex"].gain[1] and found["vrex"].gain[0][0] == pytest.approx(0)
    assert found["fish"].gain[1] and found["fish"].gains["pacs"][0][0] == pytest.approx(-30)
    assert found["erm"].gain == ((0, 0), False)
    mean = statistics.fmean(60 + d + seed / 10 for d in range(4) for seed in range(SEEDS))
    assert found["erm"].average[0] == pytest.approx(mean)
    assert found["erm"].oracle[0] == pytest.approx(mean + 5)
    assert found["irm"].cost == pytest.approx(3) and found["irm"].defaults == 1


def test_ranks_and_signs_count_data_sets_and_domains(results: dict[str, Any]) -> None:
    found = by_name(results)
    # vrex is first for even seeds and fourth for odd ones, irm second and first
    assert found["irm"].rank[0] == 1.5 and found["vrex"].rank[0] == 2.5
    assert found["fish"].rank == (5, 0)
    assert (found["irm"].better, found["irm"].worse) == (8, 0)
    assert found["irm"].chance == pytest.approx(2 / 2**8)
    assert found["erm"].chance == 1
    assert summary._ranks([3.0, 1.0, 3.0]) == [1.5, 3.0, 1.5]


def test_words_tell_noise_from_differences(results: dict[str, Any]) -> None:
    said = " ".join(summary.words(summary.condensed(results)))
    assert "1 of 3 algorithms are clearly better" in said and "IRM (+3.0)" in said
    assert "Clearly worse are 1: Fish (-30.0)" in said
    assert "differs from itself by +0.0" in said and "VREx" not in said.split("Clearly")[0]
    for unit in results["runs"].values():
        unit["trials"] = [trial(80, 50, 50, 50)]
    said = " ".join(summary.words(summary.condensed(results)))
    assert "0 of 3 algorithms are clearly better" in said and "Clearly worse are 0: none" in said


def test_only_whole_data_sets_are_compared(results: dict[str, Any]) -> None:
    del results["runs"]["pacs/3/fish/0"]
    found = summary.condensed(results)
    assert found["datasets"] == ["digits"] and found["seeds"] == SEEDS
    assert len(found["rows"]) == 4 * len(GAINS)
    assert found["rows"]["digits/1/erm"] == {
        "chosen": [61.0, 61.1, 61.2, 61.3],
        "oracle": [66.0, 66.1, 66.2, 66.3],
        "trial": [0] * SEEDS,
        "cpu_ms": 1.0,
    }
    both = summary.condensed(results, ("digits", "pacs"))
    assert both["algorithms"] == [name for name in found["algorithms"] if name != "fish"]
    assert both["datasets"] == ["digits", "pacs"]
    del results["runs"]["digits/0/fish/0"]
    with pytest.raises(ValueError, match=r"^results: no data set is complete"):
        summary.condensed(results)


def test_without_erm_there_is_nothing_to_compare_with(results: dict[str, Any]) -> None:
    results["runs"] = {k: unit for k, unit in results["runs"].items() if "/erm/" not in k}
    with pytest.raises(ValueError, match=r"^algorithms: expected erm"):
        summary.standings(summary.condensed(results))


def test_one_seed_is_no_proof(results: dict[str, Any]) -> None:
    results["runs"] = {k: unit for k, unit in results["runs"].items() if k.endswith("/0")}
    found = summary.condensed(results)
    assert summary.words(found) == [
        "One seed proves nothing: differences to ERM have no standard error."
    ]
    assert math.isnan(by_name(results)["irm"].gain[0][1])
    assert comparison(found)[1][1][1] == "+4.0"


def test_tables_and_figure_show_every_algorithm(results: dict[str, Any], tmp_path: Path) -> None:
    found = summary.condensed(results)
    for head, rows in (accuracies(found), comparison(found)):
        assert [row[0] for row in rows] == ["ERM", "IRM", "VREx", "ERM, drawn anew", "Fish"]
        assert {len(row) for row in rows} == {len(head)}
    assert json.loads(summary.lines(found)) == found
    text = markdown(found)
    assert "| Fish | 31.6" in text and "+3.0 ± 0.2*" in text
    benchmark_figure(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["benchmark", *arguments, "--workers", "1"])


def test_the_command_runs_tells_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTDG_DATA", raising=False)
    for module in (command, options):
        monkeypatch.setattr(module, "console", Console(width=110))
    tiny = ["--algorithms", "erm,SAM", "--seeds", "1", "--trials", "1", "--steps", "10"]
    given = [*tiny, "--datasets", "digits,wisdm", "--out", str(tmp_path)]
    result = call(*given)
    assert result.exit_code == 0, result.output
    for said in (
        "wisdm: skipped, FASTDG_DATA is not set",
        "\n8 searches\n",
        "1 of 8 searches done\n",
    ):
        assert said in result.output
    for said in (
        "rotated digits",
        "Against ERM",
        "One seed proves nothing",
        "8 of 8 searches done\n",
    ):
        assert said in result.output
    written = {"results.json", "summary.json", "table.md", "figure.png"}
    assert {file.name for file in tmp_path.iterdir()} == written
    written = json.loads((tmp_path / "summary.json").read_text())
    assert len(written["rows"]) == 8
    assert written["data"] == {"digits": digits.fingerprint()}
    assert f"data: digits {digits.fingerprint()}." in (tmp_path / "table.md").read_text()
    again = call(*given)
    assert "8 searches, 8 of them done before" in again.output

    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    stopped = call(*given)
    assert stopped.exit_code == 130 and "The same command goes on from here" in stopped.output


def test_the_command_refuses_in_words(tmp_path: Path) -> None:
    for given, said in (
        (["--algorithms", "mixup"], "algorithms: "),
        (["--trials", "0"], "trials: expected >= 1, got 0"),
        (["--datasets", "mnist"], "datasets: "),
    ):
        result = call(*given, "--out", str(tmp_path))
        assert result.exit_code == 2 and said in result.output


def test_committed_results_are_in_the_committed_table() -> None:
    folder = Path(__file__).parents[3] / "benchmarks" / "results"
    found = json.loads((folder / "domains.json").read_text())
    assert len(found["datasets"]) >= 4 and len(found["algorithms"]) >= 20 and found["seeds"] >= 5
    domains = sum(len(DATASETS[name].domains) for name in found["datasets"])
    assert len(found["rows"]) == domains * len(found["algorithms"])
    assert markdown(found) in (folder / "domains.md").read_text(encoding="utf-8")
