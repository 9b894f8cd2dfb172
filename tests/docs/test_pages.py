"""The documentation: its Python runs, its links lead somewhere, and nothing is missing."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from documents import DOCS, DOCUMENTS, FENCE, FRAGMENT, PAGES, ROOT, around, blocks

import fastdg
from fastdg.domainbed.algorithms import ENTRIES
from fastdg.studies.catalogue import ALGORITHMS

LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
SHOWN = re.compile(r"^::: fastdg\.([\w.]+)$", re.MULTILINE)


def runs(path: Path) -> bool:
    return any(kind == "python" for kind, _ in blocks(path))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if runs(p)], ids=short)
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.filterwarnings("ignore:params. .* take one call of autograd for each domain")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_python_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = [text for kind, text in blocks(path) if kind == "python"]
    for packages in re.findall(r"^# needs: (.+)$", "\n".join(code), re.MULTILINE):
        for package in packages.split():
            pytest.importorskip(package, reason=f"{package} is not installed")
    names = around()
    for block in code:
        exec(compile(block, short(path), "exec"), names)
    if path.name == "own-data.md":
        assert re.search(r"^Fishr +(\d+\.\d +){4}\d+\.\d$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if blocks(p)], ids=short)
def test_blocks_say_what_they_are(path: Path) -> None:
    known = {"python", FRAGMENT, "bash", "text", "bibtex"}
    assert {kind for kind, _ in blocks(path)} <= known
    for kind, text in blocks(path):
        if kind == FRAGMENT and path.name != "deepdg.md":  # whose lines are of three files
            ast.parse(text)


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as mkdocs makes them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_links_lead_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        to = (path.parent / name).resolve() if name else path
        assert to.exists(), target
        if anchor and to.suffix == ".md":
            assert anchor in anchors(to), target


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # where its dataclasses look for it
        patch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
    return module


def test_a_script_is_no_module_afterwards() -> None:
    assert script(DOCS / "hooks" / "tables.py").__name__ == "tables"
    assert "tables" not in sys.modules


def shown() -> set[str]:
    """Objects of the package that a page renders."""
    return {name for path in PAGES for name in SHOWN.findall(path.read_text(encoding="utf-8"))}


def test_every_public_name_is_in_the_reference() -> None:
    public = {name for name in fastdg.__all__ if not inspect.ismodule(getattr(fastdg, name))}
    public |= {f"weightings.{name}" for name in fastdg.weightings.__all__}
    public |= {f"func.{name}" for name in fastdg.func.__all__}
    ops = {
        f"{value.__module__.removeprefix('fastdg.')}.{name}"
        for name, value in vars(fastdg.ops).items()
        if inspect.isfunction(value) and not name.startswith("_") and name not in fastdg.__all__
    }
    # Each op is in a module of its name, which hides it from a reader of the source
    assert public | ops == shown()


def test_every_algorithm_has_a_page_and_a_row_in_both_tables() -> None:
    tables = script(DOCS / "hooks" / "tables.py")
    algorithms = {
        name
        for name in fastdg.__all__
        if inspect.isclass(value := getattr(fastdg, name))
        and (issubclass(value, fastdg.DomainOptimizer) or value is fastdg.ADIOS)
    }
    assert algorithms - {"DomainOptimizer"} == set(tables.pages())
    for path, text in tables.filled().items():
        assert path.read_text(encoding="utf-8") == text, "run python docs/hooks/tables.py"


def test_every_algorithm_s_page_says_the_same_things() -> None:
    tables = script(DOCS / "hooks" / "tables.py")
    titles = {entry.wrapper.__name__: entry.title for entry in ALGORITHMS.values()}
    wanted = ("Settings that are known", "Cost", "What to watch", "When it fails")
    for name, path in tables.pages().items():
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {titles.get(name, name)}\n"), path
        assert [part for part in wanted if f"\n**{part}.** " not in text] == [], path


def strings() -> str:
    """Texts of the package's source, with `{}` in place of what a formatted one fills in."""
    found = []
    for path in Path(fastdg.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_troubleshooting_are_those_of_the_package() -> None:
    text = (DOCS / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    known = strings()
    messages = re.findall(r"^\| `([^`]+)` \|", text.partition("## No message")[0], re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for piece in message.split("..."):
            whole = piece.strip(" .:")  # the argument's name may be filled in
            assert whole in known or (whole.partition(": ")[2] or "?!") in known, (message, piece)


def test_numbers_of_the_guidance_are_those_of_the_results() -> None:
    choose = (DOCS / "start" / "choose.md").read_text(encoding="utf-8")
    pages = DOCS / "about" / "results.md", ROOT / "benchmarks" / "results" / "domains.md"
    results = "".join(page.read_text(encoding="utf-8") for page in pages)
    spreads = re.findall(r"\d+\.\d ± \d+\.\d", choose)
    colours = re.findall(r"(\d+\.\d) % with (?:Fishr|plain training)", choose)
    colours += re.findall(r"and (\d+\.\d) % with plain training", choose)
    assert len(spreads) >= 1 and len(colours) >= 2
    assert [number for number in [*spreads, *colours] if number not in results] == []


def test_the_page_on_domainbed_names_every_algorithm() -> None:
    text = (DOCS / "frameworks" / "domainbed.md").read_text(encoding="utf-8")
    assert [name for name in ENTRIES if f"`{name}`" not in text] == []


def test_papers_to_cite_are_those_that_docstrings_name() -> None:
    (entries,) = (text for kind, text in blocks(DOCS / "about" / "citing.md") if kind == "bibtex")
    keys = re.findall(r"^@(?:inproceedings|article)\{(\w+),$", entries, re.MULTILINE)
    assert len(set(keys)) == len(keys) == entries.count("@") == entries.count("\n}\n")
    named = " ".join(strings().split())
    titles = re.findall(r"^  title += \{(.+)\},$", entries, re.MULTILINE)
    assert len(titles) == len(keys)
    # A docstring may have the title without what follows a colon
    short = [re.sub(r" \(\{\w+\}\)$", "", title) for title in titles]
    missing = [t for t in short if t not in named and t.partition(":")[0] + ", " not in named]
    assert missing == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 16_000
