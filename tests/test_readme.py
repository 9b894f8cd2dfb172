"""Tables and pictures of README and of the documentation hold the numbers that were measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import render

    yield render
    for name in ("render", "render_training", "figures"):  # general names, of these files alone
        sys.modules.pop(name, None)


def test_tables_are_what_the_result_files_say(render: Any) -> None:
    for document, text in render.filled().items():
        assert document.read_text(encoding="utf-8") == text, "run python benchmarks/render.py"


def test_pictures_have_the_numbers_of_the_tables(render: Any) -> None:
    import figures

    results = json.loads((RESULTS / "cpu.json").read_text())
    table = render.measured(results).splitlines()
    cases = 0
    for picture in figures.PICTURES.values():
        for group in figures.rows(results, picture).values():
            for row in group:
                numbers = (row.title, f"| **{figures.times(row.ours)}** |", f"| {row.best} |")
                assert any(all(n in line for n in numbers) for line in table), row
                cases += 1
    assert cases == len(results["cases"])


def test_pictures_are_drawn_of_the_results_that_are_there(render: Any) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    import figures

    drawn = {f"cpu_{name}": "cpu" for name in figures.PICTURES}
    drawn |= {"colored_mnist": "colored_mnist", "pacs": "pacs"}
    assert {path.stem for path in RESULTS.glob("*.png")} >= drawn.keys()
    for picture, source in drawn.items():
        with image.open(RESULTS / f"{picture}.png") as found:
            said = found.text.get(figures.SOURCE)
        assert said == figures.digest(RESULTS / f"{source}.json"), "run python benchmarks/render.py"


def test_a_picture_holds_all_its_words(render: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    import figures
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    results = json.loads((RESULTS / "cpu.json").read_text())
    kept: list[Figure] = []
    init = Figure.__init__

    def keeping(self: Figure, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        kept.append(self)

    for picture in figures.PICTURES.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "__init__", keeping)
            figures.draw(results, picture, tmp_path / "picture.png")
        figure = kept.pop()
        figure.canvas.draw()
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent()
                assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, text.get_text()
