"""Tables of all algorithms in README and in the documentation, made from the algorithms' pages.

python docs/hooks/tables.py    # writes them; a test looks whether they are up to date
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "algorithms"
FAMILIES = {
    "baseline": "Baseline",
    "penalties": "Penalties on losses and gradients",
    "features": "Penalties on features",
    "surgery": "Surgery and masks",
    "gram": "Rules of the Gram matrix",
    "inner": "Steps on one domain after the other",
    "flat": "Flat minima",
    "pretrained": "Pre-trained networks",
    "averages": "Averages of weights",
    "selfsup": "Without labels",
}
HEAD = re.compile(r"# .+\n\n\*\*(.+)\.\*\* \*(.+)\*\n")
NAME = re.compile(r"^::: fastdg\.(\w+)$", re.MULTILINE)
MARKED = re.compile(r"(<!-- algorithms: begin[^>]*-->\n).*?(<!-- algorithms: end -->)", re.DOTALL)


def pages() -> dict[str, Path]:
    """Return the page of each algorithm, family by family."""
    found = {}
    for family in FAMILIES:
        for path in sorted((PAGES / family).glob("*.md")):
            for name in NAME.findall(path.read_text(encoding="utf-8")):
                found[name] = path
    return found


def table(folder: Path, papers: bool) -> str:
    """Return the table with links from ``folder``; ``papers``: with a column of these."""
    lines = ["| `fastdg.` | | paper |", "|---|---|---|"] if papers else ["| | |", "|---|---|"]
    family = None
    for name, path in pages().items():
        if path.parent != family:
            family = path.parent
            lines.append(f"| **{FAMILIES[family.name]}** | |" + " |" * papers)
        head = HEAD.match(path.read_text(encoding="utf-8"))
        if head is None:
            raise ValueError(f"{path}: begins with a title, then **A sentence.** *Its paper*")
        link = path.relative_to(folder).as_posix()
        cells = [f"[`{name}`]({link})", head[1], *([head[2]] if papers else [])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled() -> dict[Path, str]:
    """Return the text of each document with its table."""
    texts = {}
    for path, papers in {ROOT / "README.md": False, PAGES / "index.md": True}.items():
        made = table(path.parent, papers)
        text = path.read_text(encoding="utf-8")
        texts[path], count = MARKED.subn(lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"{path}: expected one section algorithms, found {count}")
    return texts


if __name__ == "__main__":
    for path, text in filled().items():
        path.write_text(text, encoding="utf-8")
