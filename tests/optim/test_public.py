"""What users and checkpoints rely on: names, constructors, keys of states, statistics.

`public.json` is a snapshot. A difference is a change for users: it goes into the changelog, and

    python tests/optim/test_public.py

writes the file anew.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import BASES, EVERY, network, steps

import fastdg

FILE = Path(__file__).with_name("public.json")


def constructor(kind: Any) -> list[str]:
    """Each argument with its default; those that may be given by their place come first."""
    found = inspect.signature(kind).parameters.values()
    return [
        f"{'' if p.kind is p.POSITIONAL_OR_KEYWORD else '*'}{p.name}"
        + ("" if p.default is p.empty else f"={p.default!r}")
        for p in sorted(found, key=lambda p: (p.kind is not p.POSITIONAL_OR_KEYWORD, p.name))
    ]


def names() -> dict[str, Any]:
    public = {name: getattr(fastdg, name) for name in sorted(fastdg.__all__)}
    return {
        name: constructor(thing) if isinstance(thing, type) and thing.__init__ else None
        for name, thing in public.items()
        if not inspect.ismodule(thing)
    }


def kept(wrapper: str) -> dict[str, Any]:
    """Keys of the state after two steps, and of the statistics."""
    torch.manual_seed(0)
    model = network()
    opt = EVERY[wrapper](BASES["momentum"](model.parameters()), num_domains=3)
    steps(model, opt, [0, 1])
    state = opt.state_dict()
    entries = {
        key: list(value.shape) if isinstance(value, torch.Tensor) else None
        for _, entry in sorted(state["state"].items())
        for key, value in entry.items()
    }
    return {
        "groups": sorted(key for group in state["param_groups"] for key in group if "_" in key),
        "state": dict(sorted(entries.items())),
        "statistics": sorted(opt.statistics),
    }


def found() -> dict[str, Any]:
    return {"names": names(), "wrappers": {name: kept(name) for name in EVERY}}


def test_names_and_constructors() -> None:
    assert names() == json.loads(FILE.read_text())["names"]


@pytest.mark.parametrize("wrapper", EVERY)
def test_keys_of_states_and_statistics(wrapper: str) -> None:
    assert kept(wrapper) == json.loads(FILE.read_text())["wrappers"][wrapper]


if __name__ == "__main__":
    FILE.write_text(json.dumps(found(), indent=1) + "\n")
