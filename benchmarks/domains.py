"""Do the algorithms do better than plain training on domains they have not seen? Keep the results
of ``fastdg benchmark``: ``python benchmarks/domains.py FOLDER [--commit HASH]``.

FOLDER is the command's ``--out``; the run may be under way, whole data sets are kept. The numbers
and the figure go to ``results/domains.json`` and ``.png``, and the table into
``results/domains.md`` between its two marks; the text around it is written by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastdg.files import replace
from fastdg.studies.report.benchmark_figure import benchmark_figure
from fastdg.studies.report.benchmark_summary import condensed, lines
from fastdg.studies.report.benchmark_table import markdown

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- made by benchmarks/domains.py -->\n", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--datasets", nargs="*", default=(), help="and what is complete on them")
    parser.add_argument("--commit", default="", help="of the package that made the results")
    given = parser.parse_args()
    results = json.loads((given.folder / "results.json").read_text())
    found = condensed(results, given.datasets)
    found["machine"] |= {"commit": given.commit} if given.commit else {}
    replace(RESULTS / "domains.json", lambda file: file.write(lines(found).encode()))
    benchmark_figure(found, RESULTS / "domains.png")
    page = RESULTS / "domains.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{before}{BEGIN}\n{markdown(found)}\n{END}{after}"
    replace(page, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
