"""Tables of all algorithms in README and in the documentation: the catalogue, with a link each.

python docs/hooks/tables.py    # writes them; a test looks whether they are up to date
"""

from __future__ import annotations

import re
from pathlib import Path

from fastdg.studies.catalogue import ALGORITHMS, COSTS, FAMILIES, Entry

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "algorithms"
NAME = re.compile(r"^::: fastdg\.(\w+)$", re.MULTILINE)
MARKED = re.compile(r"(<!-- algorithms: begin[^>]*-->\n).*?(<!-- algorithms: end -->)", re.DOTALL)
# Without a loop of domains, and so not in the catalogue
SELFSUP = "an encoder trained without labels, against a network that masks its images"


def pages() -> dict[str, Path]:
    """Return the page that renders each class."""
    return {
        name: path
        for path in sorted(PAGES.glob("*/*.md"))
        for name in NAME.findall(path.read_text(encoding="utf-8"))
    }


def rows(folder: Path, more: bool) -> list[str]:
    """Return a row for each algorithm, with links from ``folder``; ``more``: with all columns."""
    known, lines = pages(), []

    def row(name: str, sentence: str, *cells: str) -> str:
        link = known[name].relative_to(folder).as_posix()
        shown = [f"[`{name}`]({link})", sentence, *(cells if more else ())]
        return f"| {' | '.join(shown)} |"

    def entry(e: Entry) -> str:
        return row(e.wrapper.__name__, e.sentence, e.cost, e.paper)

    for family, title in FAMILIES.items():
        lines.append(f"| | **{title}** |" + " | |" * more)
        lines += [entry(e) for e in ALGORITHMS.values() if e.family == family]
    lines.append("| | **without labels** |" + " | |" * more)
    return [*lines, row("ADIOS", SELFSUP, "N + 1 encodings", "Shi et al., ICML 2022")]


def filled() -> dict[Path, str]:
    """Return the text of each document with its table."""
    texts = {}
    for path, more in {ROOT / "README.md": False, PAGES / "index.md": True}.items():
        head = "| `fastdg.` | the gradient that a step goes along |"
        head += " cost | paper |\n|---|---|---|---|" if more else "\n|---|---|"
        made = "\n".join([head, *rows(path.parent, more)])
        if more:
            legend = "; ".join(f"*{cost}*: {meaning}" for cost, meaning in COSTS.items())
            made += f"\n\nCosts of a step: {legend}."
        text = path.read_text(encoding="utf-8")
        texts[path], count = MARKED.subn(lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"{path}: expected one section algorithms, found {count}")
    return texts


if __name__ == "__main__":
    for path, text in filled().items():
        path.write_text(text, encoding="utf-8")
