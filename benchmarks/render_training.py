"""The tables of training results in the documentation, from committed result files."""

from __future__ import annotations

from typing import Any

UP = "../.."  # from a page to the root


def with_plan(results: dict[str, Any]) -> dict[str, Any]:
    """Return PACS's results with the algorithms and the number of seeds that they have."""
    from fastdg.studies.experiments.pacs import ALGORITHMS

    keys = [key.split("/") for key in results["runs"]]
    names = [name for name in ALGORITHMS if any(name == of for _, _, of in keys)]
    return results | {"plan": {"algorithms": names, "seeds": len({seed for _, seed, _ in keys})}}


def left_out(results: dict[str, Any]) -> str:
    """The table of PACS."""
    from fastdg.studies.data.pacs import DOMAINS
    from fastdg.studies.experiments.pacs import ALGORITHMS
    from fastdg.studies.report.pacs_figure import MEAN, accuracies, gain
    from fastdg.studies.report.summary import mean_and_error

    results, settings = with_plan(results), results["settings"]
    names = results["plan"]["algorithms"]
    lines = [
        f"Accuracy in per cent on the domain left out, of the checkpoint chosen on the training "
        f"domains; mean ± standard error of {results['plan']['seeds']} seeds, "
        f"{settings['steps']} steps of {settings['batch']} images a domain. The gain is the "
        "mean's over ERM's with the same seed, bold where its 95 % interval leaves out 0:",
        "",
        f"| | {' | '.join(d.replace('_', ' ') for d in DOMAINS)} | mean | gain | last step |",
        "|---|" + "---:|" * (len(DOMAINS) + 3),
    ]

    def shown(values: list[float]) -> str:
        mean, error = mean_and_error(values)
        return f"{mean:.1f} ± {error:.1f}"

    for name in names:
        chosen = accuracies(results, name, "chosen")
        last = accuracies(results, name, "last")[MEAN]
        more = gain(results, name, "chosen") if name != "erm" else None
        said = ""
        if more is not None:
            (mean, error), clear = more
            bold = "**" if clear else ""
            said = f"{bold}{mean:+.1f} ± {error:.1f}{bold}"
        cells = [ALGORITHMS[name][0], *map(shown, chosen.values()), said, shown(last)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Every run: [`benchmarks/results/pacs.json`]({UP}/benchmarks/results/pacs.json).",
        "",
        f"![Accuracy on each domain left out]({UP}/benchmarks/results/pacs.png)",
    ]
    return "\n".join(lines)


def reproduced(results: dict[str, Any]) -> str:
    """The table of the ColoredMNIST protocol."""
    names = {"erm": "ERM", "fishr": "Fishr"}
    restarts = {len(entry["restarts"]) for entry in results["algorithms"].values()}
    lines = [
        f"Final accuracy in per cent, mean ± standard deviation of {min(restarts)} restarts here "
        "and of 10 in the paper:",
        "",
        "| | train | test, colour misleads | grey test |",
        "|---|---:|---:|---:|",
    ]
    for algorithm, entry in sorted(results["algorithms"].items(), key=lambda of: of[0] != "erm"):
        summary = entry["summary"]
        here = (f"{summary[k]['mean']:.1f} ± {summary[k]['std']:.1f}" for k in summary)
        paper = ("{:.1f} ± {:.1f}".format(*summary[k]["paper"]) for k in summary)
        lines.append(f"| {names[algorithm]}, fastdg | {' | '.join(here)} |")
        lines.append(f"| {names[algorithm]}, paper | {' | '.join(paper)} |")
    lines += [
        "",
        "Colour is worth 85 % in training and 10 % in the test, who ignores it is right in at most "
        "75 %. Every restart's curve: "
        f"[`benchmarks/results/colored_mnist.json`]({UP}/benchmarks/results/colored_mnist.json).",
        "",
        "![Accuracy over training, and beside the paper's]"
        f"({UP}/benchmarks/results/colored_mnist.png)",
    ]
    return "\n".join(lines)
