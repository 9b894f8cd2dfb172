"""The catalogue of algorithms: whole, and one naming for all."""

from __future__ import annotations

import re

import pytest

import fastdg
from fastdg.studies.catalogue import ALGORITHMS, COSTS, FAMILIES, nearest, resolved
from fastdg.studies.experiments import colored_mnist, pacs
from fastdg.studies.experiments.settings import ALGORITHMS as COMPARED

PUBLIC = {
    kind
    for name in fastdg.__all__
    if isinstance(kind := getattr(fastdg, name), type) and issubclass(kind, fastdg.DomainOptimizer)
} - {fastdg.DomainOptimizer}


def test_every_public_algorithm_is_there_once() -> None:
    listed = [entry.wrapper for entry in ALGORITHMS.values()]
    assert len(listed) == len(set(listed))
    assert set(listed) == PUBLIC


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_entry_says_what_costs_what_and_where_it_is_from(name: str) -> None:
    entry = ALGORITHMS[name]
    assert entry.family in FAMILIES and entry.cost in COSTS
    assert len(entry.sentence.split()) >= 4 and not entry.sentence.endswith(".")
    assert re.search(r" (19|20)\d\d$", entry.paper)
    assert entry.paper.split(",")[0].split(" et al")[0] in entry.papers


def test_papers_in_short() -> None:
    said = {name: ALGORITHMS[name].paper for name in ("fishr", "iga", "rise", "upgrad")}
    assert said == {
        "fishr": "Rame et al., ICML 2022",
        "iga": "Koyama, Yamaguchi, 2020",
        "rise": "Huang et al., ICCV 2023",
        "upgrad": "Quinton, Rey, 2024",
    }


def test_studies_call_algorithms_as_the_catalogue_does() -> None:
    for name, compared in COMPARED.items():
        listed = ALGORITHMS[name.removesuffix("-all")]
        assert compared.title in (listed.title, f"{listed.title} (all layers)")
        assert compared.wrapper in (listed.wrapper, None)
    parts = {part for name in pacs.ALGORITHMS for part in name.split("+")}
    assert parts | set(colored_mnist.ALGORITHMS) <= set(ALGORITHMS)
    for name, (title, _) in pacs.ALGORITHMS.items():
        assert title == " + ".join(ALGORITHMS[part].title for part in name.split("+"))


@pytest.mark.parametrize("name", ["agr-sum", "AgrSum", "AGR_SUM", "Agr-Sum", "agr sum"])
def test_spelling_does_not_count(name: str) -> None:
    assert resolved([name, "fishr"], tuple(ALGORITHMS)) == ("agr-sum", "fishr")


def test_each_name_is_kept_once_and_unknown_ones_stay() -> None:
    known = ("erm", "fishr", "miro+fishr")
    assert resolved(["Fishr", "fishr-head", "MIRO+Fishr", "mixup"], known) == (
        "fishr",
        "miro+fishr",
        "mixup",
    )
    assert resolved(["V-REx"], ("erm",)) == ("V-REx",)


def test_the_nearest_name() -> None:
    known = tuple(ALGORITHMS)
    assert nearest("AgrSumm", known) == "agr-sum"
    assert nearest("zzzz", known) is None
