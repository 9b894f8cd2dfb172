"""What the demo says and draws of its numbers."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from rich.table import Table

from fastdg.cli.demo_tables import demo_tables, legend
from fastdg.figure_style import COLOURS, PAGE, PARTS
from fastdg.studies.catalogue import ALGORITHMS as CATALOGUE
from fastdg.studies.data.digits import TASKS
from fastdg.studies.experiments.settings import ALGORITHMS, SETTINGS
from fastdg.studies.report.cosine_figure import cosine_figure
from fastdg.studies.report.demo_figure import demo_figure
from fastdg.studies.report.summary import closing_words, mean_and_error, rows
from fastdg.studies.report.variance_figure import variance_figure


def results_of(
    accuracies: dict[str, list[float]], chosen_step: int = 200, task: str = "coloured"
) -> dict[str, Any]:
    """Results with the given last accuracies of seeds 0, 1, ..., the chosen ones 1 above them."""
    runs, seeds = {}, len(next(iter(accuracies.values())))
    for k, (algorithm, values) in enumerate(accuracies.items()):
        for seed, value in enumerate(values):
            for d in TASKS[task](0).tested:
                runs[f"{task}/{d}/{seed}/{algorithm}"] = {
                    "chosen": value + d + 1,
                    "last": value + d,
                    "chosen_step": chosen_step,
                    "step_seconds": (k + 1) * (0.01 + seed),
                    "peak_bytes": 1000 * (k + 1),
                    "curve": [{"distance": 9.0}, {"distance": value + d}],
                }
    plan = {"algorithms": tuple(accuracies), "tasks": (task,), "seeds": seeds}
    return {"plan": plan, "settings": {task: {"steps": 200}}, "runs": runs}


def test_rows_sum_up_over_domains_first_and_seeds_then() -> None:
    table = rows(
        results_of({"erm": [50, 53, 56], "fishr": [60, 60, 63]}, task="rotated"), "rotated"
    )
    plain, fishr = table
    assert (plain.title, fishr.title) == ("ERM", "Fishr")
    assert plain.domains["0°"] == pytest.approx((54, math.sqrt(3)))
    assert plain.domains["75°"] == pytest.approx((59, math.sqrt(3)))
    assert plain.chosen == pytest.approx([53.5, 56.5, 59.5])
    assert fishr.last == pytest.approx([62.5, 62.5, 65.5])
    assert (plain.seconds, plain.ratio) == pytest.approx((1.01, 1))
    assert (fishr.seconds, fishr.ratio, fishr.peak_bytes) == pytest.approx((2.02, 2, 2000))
    assert fishr.distance == fishr.last
    assert plain.early == 0
    early = rows(results_of({"fishr": [1, 2]}, chosen_step=60), "coloured")[0]
    assert early.early == 1 and math.isnan(early.ratio)


def printed(width: int, *tables: Table | str) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    for table in tables:
        console.print(table, highlight=False)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 110])
@pytest.mark.parametrize("task", TASKS)
def test_tables_fit_the_terminal(task: str, width: int) -> None:
    values = {name: [70.0, 80.0, 90.0] for name in ALGORITHMS}
    tables = list(demo_tables(results_of(values, task=task), task, width))
    lines = printed(width, *tables)
    assert max(map(len, lines)) <= width
    count = sum(isinstance(table, Table) for table in tables)
    assert count == (2 if task == "coloured" else 3)
    for algorithm in ALGORITHMS.values():  # a row in each table, however many there are
        row = re.compile(rf"│ {re.escape(algorithm.title)} +│")
        assert sum(row.match(line) is not None for line in lines) == count
    text = "\n".join(lines)
    assert "± 5.8" in text and "…" not in text
    if task == "rotated":
        assert all(TASKS[task](0).domains[domain] in text for domain in TASKS[task](0).tested)


def test_the_first_table_shows_the_effect_and_its_measures() -> None:
    results = results_of({"fishr": [60, 62, 64], "erm": [30, 31, 35]})
    accuracy, levels, cost = demo_tables(results, "coloured", 80)
    lines = printed(80, accuracy, levels)
    # ERM first; last step before the checkpoint; gains seed by seed: 30, 31, 29
    rows_of = [line.split("│")[1:-1] for line in lines if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows_of] == [
        ["ERM", "34.0 ± 1.5", "", "35.0 ± 1.5", ""],
        ["Fishr", "64.0 ± 1.2", "+30.0 ± 0.6*", "65.0 ± 1.2", "+30.0 ± 0.6*"],
    ]
    assert "guessing 50, the misleading cue alone 10, at best without it 75; 3 seeds" in lines
    # Each ratio is that of the times beside it
    found = [line.split("│")[1:-1] for line in printed(80, cost) if line.startswith("│")]
    for row in found:
        _, own, ratio, _ = (cell.strip() for cell in row)
        assert float(ratio) == pytest.approx(float(own) / float(found[0][1]), abs=0.006)


def test_the_legend_names_the_test() -> None:
    words = legend(3)
    assert "two-sided t-test, 2 degrees of freedom: 4.3 standard errors; not corrected" in words
    assert "1 degree of freedom: 12.71" in legend(2)
    assert "*" not in legend(1)


@pytest.mark.parametrize("count", [1, 2, len(ALGORITHMS)])
def test_figures_are_a_page_wide_and_hold_all_their_words(count: int, tmp_path: Path) -> None:
    names = list(ALGORITHMS)[:count]
    results = results_of({name: [70.0, 80.0] for name in names}, task="rotated")
    point = {"variance": [0.1] * 5, "cosine": [0.5] * 10, "distance": 0.2}
    for run in results["runs"].values():
        run["curve"] = [{"step": step, **point} for step in (10, 20)]
    for draw in (demo_figure, variance_figure, cosine_figure):
        with drawn() as figures:
            draw(results, tmp_path / "figure.png")
        (figure,) = figures
        assert figure.get_figwidth() == PAGE
        figure.canvas.draw()
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible() and (axes := text.axes) is not None:
                box = text.get_window_extent()
                if axes.axison and box.width:
                    assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, text.get_text()


@contextmanager
def drawn() -> Iterator[list[Figure]]:
    """The figures that are made inside."""
    found: list[Figure] = []
    init = Figure.__init__

    def kept(self: Figure, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        found.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "__init__", kept)
        yield found


def test_every_algorithm_has_a_colour_of_its_own() -> None:
    colours = [*PARTS.values(), *(COLOURS[name] for name in {*CATALOGUE, *ALGORITHMS})]
    assert len(set(colours)) == len(colours)


def test_the_error_of_one_value_is_not_a_number() -> None:
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    mean, error = mean_and_error([4.0])
    assert mean == 4 and math.isnan(error)


@pytest.mark.parametrize(
    ("fishr", "words"),
    [
        ([65, 66, 64], "Fishr clearly better."),
        ([15, 16, 14], "Fishr clearly worse."),
        ([30, 31, 32], "no clear difference."),
        # 4.3 standard errors make a difference of three seeds a clear one, not 2.
        ([31, 33, 35], "no clear difference."),
    ],
)
def test_closing_words_follow_the_numbers(fishr: list[float], words: str) -> None:
    said = closing_words(results_of({"erm": [30, 32, 31], "fishr": fishr}), "coloured")
    assert said[0] == "coloured digits, against ERM:"
    assert said[1] == f"After the last step: {words}"
    assert said[2] == f"At the chosen checkpoint: {words}"
    assert not any("before the full penalty" in line for line in said)
    assert said[-1] == f"Settings: {SETTINGS['coloured'].source}."


def test_closing_words_say_what_is_no_better_than_guessing() -> None:
    # The last accuracies are these and 2, the number of the domain left out
    said = closing_words(results_of({"erm": [30, 32, 31], "fishr": [48, 45, 51]}), "coloured")
    assert "Not clearly other than guessing (50 %): Fishr." in said


def test_closing_words_admit_what_proves_nothing() -> None:
    one = closing_words(results_of({"erm": [30], "fishr-all": [70]}, chosen_step=20), "coloured")
    assert one[1] == "One seed, which proves nothing."
    assert "In 100 % of these runs" in one[2]
    for alone in ({"erm": [30, 31]}, {"fishr": [30, 31], "fishr-all": [1, 2]}):
        (said,) = closing_words(results_of(alone), "coloured")
        assert "nothing to compare" in said
