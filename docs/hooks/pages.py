"""Hooks of mkdocs: navigation from folders, formulas without a script, files outside docs/.

Formulas become MathML, which browsers show by themselves. A link out of docs/ works where a page is
read in the repository; on the site it leads to a copy if it is a result, else its path is shown.
"""

from __future__ import annotations

import html
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import notebooks  # noqa: E402

RESULTS = "benchmarks/results"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
# Whatever a browser would fetch by itself
FETCHED = re.compile(
    r"<(?:script|img|iframe|link(?! rel=\"canonical\"))\b[^>]*(?:https?:)?//[^>]*>"
)
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace each entry ``folder/*`` of the navigation by the pages in the folder."""
    docs = Path(config.docs_dir)

    def expanded(entry: Any) -> list[Any]:
        if isinstance(entry, dict):
            ((title, inner),) = entry.items()
            if isinstance(inner, list):
                inner = [new for old in inner for new in expanded(old)]
            return [{title: inner}]
        if entry.endswith("/*"):
            files = (docs / entry[:-2]).glob("*.md")
            pages = [path.relative_to(docs).as_posix() for path in files]
            return sorted(pages, key=lambda page: (not page.endswith("index.md"), page))
        return [entry]

    config.nav = [new for old in config.nav or [] for new in expanded(old)]
    return config


def copied(path: Path) -> bool:
    """Whether a result file is on the site: a page only if its pictures have been drawn."""
    if path.suffix == ".md":
        pictures = re.findall(r"!\[[^\]]*\]\(([\w.]+)\)", path.read_text(encoding="utf-8"))
        return all((path.parent / name).exists() for name in pictures)
    return path.suffix in (".json", ".png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the results, the changelog, and a page for each notebook."""
    for path in sorted((ROOT / RESULTS).iterdir()):
        if copied(path):
            copy = File.generated(config, f"results/{path.name}", abs_src_path=str(path))
            files.append(copy)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "about/changelog.md", content=changelog))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        for name, content in notebooks.page(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links that leave docs/ to a copy on the site, or show the path in their place."""
    here = ROOT / "docs" / page.file.src_uri
    up = "../" * page.file.src_uri.count("/")

    def led(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        path = (here.parent / target).resolve()
        if path.suffix == ".ipynb" and path.exists():  # on the site it is a page
            return f"[{text}]({target.removesuffix('.ipynb')}.md{anchor or ''})"
        if (ROOT / "docs") in path.parents:
            return match[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: {target} does not exist")
        inside = path.relative_to(ROOT).as_posix()
        if path.parent == ROOT / RESULTS and copied(path):
            return f"{image}[{text}]({up}results/{path.name})"
        if inside == "CHANGELOG.md":
            return f"[{text}]({up}about/changelog.md{anchor or ''})"
        plain = text.strip("`")
        if inside.startswith("tests/") and plain.startswith("test_"):
            return f"`{plain}`"  # a name that only this test has
        return f"`{inside}`" if inside.endswith(plain) else f"{text} (`{inside}`)"

    return LINK.sub(led, markdown)


# Commands that the converter does not know -> what it knows
COMMANDS = {
    r"\arg": r"\operatorname{arg}",
    r"\big\|": "‖",
    r"\|": "‖",
    r"\langle": "⟨",
    r"\rangle": "⟩",
}


@cache
def mathml(latex: str, display: bool) -> str:
    """Return a formula as MathML; a command that is not known raises ValueError."""
    for command, known in COMMANDS.items():
        end = r"(?![a-zA-Z])" if command[-1].isalpha() else ""
        latex = re.sub(re.escape(command) + end, lambda _, known=known: known, latex)
    made = convert(latex, display="block" if display else "inline")
    if unknown := re.search(r"\\[a-zA-Z|]+", made):
        raise ValueError(f"{unknown[0]} is not known; see COMMANDS")
    return made


def on_page_content(content: str, page: Page, **_: Any) -> str:
    r"""Replace ``\(...\)`` and ``\[...\]`` by MathML."""

    def made(match: re.Match[str]) -> str:
        tag, body = match.groups()
        latex = html.unescape(body).strip()
        try:
            formula = mathml(latex[2:-2].strip(), tag == "div")
        except Exception as e:
            raise PluginError(f"{page.file.src_uri}: cannot set {latex!r}: {e}") from e
        return f'<{tag} class="formula">{formula}</{tag}>'

    return FORMULA.sub(made, content)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Refuse a page that would fetch something from elsewhere, or that shows markup."""
    text = re.sub(r"<pre\b.*?</pre>", "", output, flags=re.DOTALL)
    if found := re.search(r":(?:math|class|func):|.{0,40}``.{0,40}", text):
        raise PluginError(f"{page.file.src_uri}: shows the markup {found[0]!r}")
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: fetches {found[0]}")
    return output
