"""Write what the result files hold into the tables of the documentation and README, and draw it.

python benchmarks/render.py    # after benchmarks/measure.py, or fastdg reproduce
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from figures import FLOOR, PICTURES, draw_all, peers, times
from render_training import left_out, reproduced

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
UP = "../.."  # from a page to the root
QUESTIONS = {
    "variance": "Variance per domain, all layers",
    "differentiable": "The same made differentiable, penalty's gradient to all parameters",
    "head": "Fishr on the head alone",
    "step": "Whole Fishr (head) training step",
    "Agr-Sum, D=3": "Whole Agr-Sum training step, 3 domains",
    "Agr-Sum, D=6": "The same, 6 domains",
    "AND-mask, D=3": "Whole AND-mask training step, 3 domains",
    "PCGrad, D=3": "Whole PCGrad training step, 3 domains",
    "PCGrad, D=6": "The same, 6 domains",
    "compiled Fishr, all layers": "Whole Fishr (all layers) training step in one compiled graph",
    "compiled Fishr (head)": "Whole Fishr (head) training step in one compiled graph",
    "compiled Agr-Sum, D=3": "Whole Agr-Sum training step in one compiled graph",
}
# The same for what starts from gradients that are there.
GIVEN = {
    "agreement": "`agreement`",
    "gram": "`gram`",
    "PCGrad of given gradients": "PCGrad: `gram`, the weights, `combine`",
    "meta_step": "`meta_step`",
    "Fish": "Fish's meta-iteration",
}
# README's short table: question -> what the step is
README_ROWS = {
    "step": "Fishr on the head, whole step",
    "variance": "Variances of all layers by domain, statistic alone",
    "differentiable": "The same as a penalty, with its gradient",
    "Agr-Sum, D=3": "Agr-Sum, whole step",
    "AND-mask, D=3": "AND-mask, whole step",
    "PCGrad, D=3": "PCGrad, whole step",
}


def measured(results: dict[str, Any]) -> str:
    """The table of times and memory."""
    machine, versions = results["machine"], results["versions"]
    lines = [
        "Time of one step as a multiple of plain training's (forward and backward of the same "
        "model and batch; whole training steps with Adam), fp32, three domains if not said "
        f"otherwise; {machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}. "
        "The floor is the ratio of the floating-point operations that have to be done. Medians of "
        "runs that took turns; every contender's "
        "numbers were first compared with float64 per-sample gradients.",
        "",
        *compared(results),
        *given(results),
        *terms(results),
        "",
        "Memory is the peak of the whole process beyond the libraries, over plain training's. All "
        "contenders, what was left out and why: "
        f"[`benchmarks/results/cpu.json`]({UP}/benchmarks/results/cpu.json), made by "
        "`python benchmarks/measure.py`.",
        "",
        *(
            f"![{picture.title}]({UP}/benchmarks/results/cpu_{name}.png)\n"
            for name, picture in PICTURES.items()
        ),
    ]
    return "\n".join(lines).rstrip()


def compared(results: dict[str, Any]) -> list[str]:
    """The table of questions: a row a case."""
    lines = [
        "| | plain | floor | **fastdg** | plain PyTorch backend | best other way | memory |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for question, title in QUESTIONS.items():
        rows = [case for case in results["cases"].values() if case["question"] == question]
        if not rows:
            continue
        lines.append(f"| *{title}* | | | | | | |")
        for case in rows:
            plain, ours = case["contenders"]["plain"], case["contenders"]["fastdg"]
            reference = case["contenders"].get("fastdg, reference backend", {})
            other = next(iter(peers(case).items()), None)
            memory = "–"
            if plain.get("peak_bytes") and ours.get("peak_bytes"):
                memory = times(ours["peak_bytes"] / plain["peak_bytes"])
            rival = f"{times(other[1]['ratio'])} {other[0]}" if other else "–"
            lines.append(
                f"| {case['title']} | {1e3 * plain['median']:.1f} ms | {times(case['floor'])} "
                f"| **{times(ours['ratio'])}** "
                f"| {times(reference['ratio']) if 'ratio' in reference else '–'} "
                f"| {rival} | {memory} |"
            )
    return lines


def on_avx512(results: dict[str, Any]) -> str:
    """The main questions on another processor, beside fewer other ways."""
    machine, name = results["machine"], "benchmarks/results/cpu_avx512.json"
    lines = [
        f"The same on {machine['cpu']} with AVX-512, {machine['threads']} threads, without the "
        f"slower of the other ways ([`{name}`]({UP}/{name})). Plain training gains more from "
        "AVX-512 than from AVX2:",
        "",
        *compared(results),
    ]
    return "\n".join(lines)


def given(results: dict[str, Any]) -> list[str]:
    """The table of what starts from given gradients; nothing if none of it was measured."""
    cases = [
        (title, case)
        for question, title in GIVEN.items()
        for case in results["cases"].values()
        if case["question"] == question
    ]
    if not cases:
        return []
    lines = [
        "",
        "Where the domains' gradients are there already, as multiples of a `Tensor.copy_` that "
        "reads and writes as many bytes, and Fish of its Adam steps alone. Plain training would "
        "add the gradients up; for `meta_step` it stands for two `torch._foreach` calls.",
        "",
        "| | copy | plain | **fastdg** | plain PyTorch backend | best other way | memory |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for title, case in cases:
        rows = case["contenders"]
        plain, ours = rows["plain"], rows["fastdg"]
        unit = rows.get(FLOOR, plain)["median"]
        best = next(iter(peers(case).items()), None)
        reference = rows.get("fastdg, reference backend", {})
        cells = [
            f"{title}, {case['title']}",
            f"{1e3 * unit:.1f} ms" if FLOOR in rows else "–",
            times(plain["median"] / unit) if FLOOR in rows else f"{1e3 * unit:.1f} ms",
            f"**{times(ours['median'] / unit)}**",
            times(reference["median"] / unit) if "median" in reference else "–",
            f"{times(best[1]['median'] / unit)} {best[0]}" if best else "–",
            "–",
        ]
        if plain.get("peak_bytes") and ours.get("peak_bytes"):
            cells[-1] = times(ours["peak_bytes"] / plain["peak_bytes"])
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def terms(results: dict[str, Any]) -> list[str]:
    """The table of what adds to the losses or averages the weights; nothing if not measured."""
    if not results.get("terms"):
        return []
    lines = [
        "",
        "MIRO, RISE, ADIOS and SWAD, each beside what it is judged by. Memory is that of the "
        "whole process.",
        "",
        "| | to reach | | time | | memory |",
        "|---|---|---|---:|---:|---:|",
    ]
    for term in results["terms"].values():
        title, goal = term["title"], term["goal"]
        for name, row in term["contenders"].items():
            ours = "**" if name == "fastdg" else ""
            peak = f"{row['peak_bytes'] / 1e6:.0f} MB" if row.get("peak_bytes") else "–"
            time = f"{1e3 * row['median']:.{1 if row['median'] > 0.05 else 2}f} ms"
            cells = [title, goal, f"{ours}{name}{ours}", time]
            lines.append(f"| {' | '.join(cells)} | {ours}{times(row['ratio'])}{ours} | {peak} |")
            title = goal = ""
    return lines


def loops(ranks: dict[str, Any], wrapper: dict[str, Any], long: dict[str, Any]) -> str:
    """What several ranks cost, the wrapper itself, and a long run."""
    names = {"fishr": "Fishr (head)", "agrsum": "Agr-Sum", "pcgrad": "PCGrad"}
    models = {"resnet18": "ResNet-18", "mnist_cnn": "MNIST_CNN"}
    lines = [
        "On two ranks (gloo, a thread each, 48 samples a rank), a step as a multiple of that of "
        "`DistributedDataParallel` alone, medians of the rounds' ratios "
        f"([`ranks.json`]({UP}/benchmarks/results/ranks.json)):",
        "",
        f"| | {' | '.join(models[model] for model in ranks['rows'])} |",
        "|---|" + "---:|" * len(ranks["rows"]),
    ]
    for way in next(iter(ranks["rows"].values())):
        name, _, split = way.partition(", ")
        if name in names:
            title = names[name] + (f", {split}" if split else "")
            cells = [times(rows[way]["ratio"]) for rows in ranks["rows"].values()]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    said = {
        key: f"{wrapper[key]['per_step']:.0f} µs a step and {wrapper[key]['per_module']:.0f} µs a "
        "module"
        for key in ("eager", "compiled")
    }
    grown = [run["grown_bytes"] / 1024 for run in long["runs"].values()]
    begun = [run["start_bytes"] / 2**20 for run in long["runs"].values()]
    steps = min(run["steps"] for run in long["runs"].values())
    lines += [
        "",
        f"The wrapper itself, without any statistic, costs {said['eager']} on this CPU; a "
        f"step in one graph (`fastdg.compiled`), {said['compiled']} "
        f"([`overhead.json`]({UP}/benchmarks/results/overhead.json)).",
        "",
        f"Over {steps:,} steps the memory of each of {len(grown)} wrappers and chains, "
        f"{min(begun):.0f} to {max(begun):.0f} MiB with all libraries, grew by {min(grown):.0f} to "
        f"{max(grown):.0f} KiB ([`resident.json`]({UP}/benchmarks/results/resident.json)).",
    ]
    return "\n".join(lines)


def costs(results: dict[str, Any]) -> str:
    """README's short table: a row a question, of its case on ResNet-18 if there is one."""
    machine, versions = results["machine"], results["versions"]
    lines = [
        f"A step over plain training's, on {machine['cpu']}, {machine['threads']} threads, torch "
        f"{versions['torch']}, fp32, three domains:",
        "",
        "| | fastdg | best other way |",
        "|---|---:|---:|",
    ]
    for question, title in README_ROWS.items():
        cases = [case for case in results["cases"].values() if case["question"] == question]
        case = next((case for case in cases if "ResNet-18" in case["title"]), cases[0])
        name, row = next(iter(peers(case).items()))
        lines.append(
            f"| {title}, {case['title'].partition(',')[0]} "
            f"| **{times(case['contenders']['fastdg']['ratio'])}** | {times(row['ratio'])} {name} |"
        )
    return "\n".join(lines)


def replaced(text: str, name: str, content: str) -> str:
    """``text`` with what stands between the markers ``name: begin`` and ``name: end`` replaced."""
    pattern = re.compile(rf"(<!-- {name}: begin[^>]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    changed, count = pattern.subn(lambda m: f"{m[1]}{content}\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"expected one section {name}, found {count}")
    return changed


def filled() -> dict[Path, str]:
    """Return the text of each document with the tables that the result files make."""
    names = ("cpu", "cpu_avx512", "colored_mnist", "ranks", "overhead", "resident", "pacs")
    cpu, avx512, mnist, ranks, wrapper, long, pacs = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in names
    )
    performance, results = DOCS / "guides" / "performance.md", DOCS / "about" / "results.md"
    sections = {
        "costs": (ROOT / "README.md", costs(cpu)),
        "measured": (performance, measured(cpu)),
        "avx512": (performance, on_avx512(avx512)),
        "loops": (performance, loops(ranks, wrapper, long)),
        "pacs": (results, left_out(pacs)),
        "reproduced": (results, reproduced(mnist)),
    }
    texts: dict[Path, str] = {}
    for name, (path, content) in sections.items():
        text = texts.get(path) or path.read_text(encoding="utf-8")
        texts[path] = replaced(text, name, content)
    return texts


def main() -> None:
    for path, text in filled().items():
        path.write_text(text, encoding="utf-8")
    draw_all(RESULTS)


if __name__ == "__main__":
    main()
