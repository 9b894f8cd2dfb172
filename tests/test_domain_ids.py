"""Numbers for the names of domains."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import fastdg
from fastdg import DomainIds

NAMES = ["photo", "art", "sketch"]


@pytest.mark.parametrize(
    ("names", "batch"),
    [
        (NAMES, ["art", "art", "sketch", "photo"]),
        (NAMES, ("art", "art", "sketch", "photo")),
        (np.array(NAMES), np.array(["art", "art", "sketch", "photo"])),
        (torch.tensor([2015, 2001, 2020]), torch.tensor([2001, 2001, 2020, 2015])),
        ([2015, 2001, 2020], np.array([2001, 2001, 2020, 2015], dtype=np.int32)),
        ([2015.5, 2001.0, 2020.25], torch.tensor([2001.0, 2001.0, 2020.25, 2015.5])),
        ([("a", 1), ("a", 2), None], [("a", 2), ("a", 2), None, ("a", 1)]),
        ([True, False, "neither"], [False, False, "neither", True]),
        (["photo", "photo", "art", "photo", "sketch"], ["art", "art", "sketch", "photo"]),
        ([2015, 2001, 2020], [torch.tensor(2001), 2001, torch.tensor(2020), 2015]),
    ],
)
def test_ids_of_a_batch(names: Any, batch: Any) -> None:
    ids = DomainIds(names)
    found = ids(batch)
    assert found.dtype == torch.int64 and found.tolist() == [1, 1, 2, 0]
    assert len(ids) == 3
    assert ids.inverse(found) == [ids.names[i] for i in found.tolist()]
    assert [ids[name] for name in ids] == [0, 1, 2]
    assert ids(batch, device="meta").device.type == "meta"
    assert ids([]).shape == (0,) and ids([]).dtype == torch.int64


def test_copies_and_checkpoints() -> None:
    ids = DomainIds([*NAMES, 2015])
    assert pickle.loads(pickle.dumps(ids)) == copy.deepcopy(ids) == ids
    assert eval(repr(ids)) == ids
    assert ids != DomainIds(NAMES) and hash(ids) == hash(DomainIds(ids.names))
    file = io.BytesIO()
    torch.save({"domains": ids.names}, file)
    file.seek(0)
    assert DomainIds(torch.load(file, weights_only=True)["domains"]) == ids


def test_what_is_refused() -> None:
    ids = DomainIds(NAMES)
    with pytest.raises(ValueError, match=r"^names: .*got 'paint'.*'art'"):
        ids(["art", "paint"])
    with pytest.raises(ValueError, match=r"^names: .*got 2015"):
        ids[2015]
    with pytest.raises(ValueError, match=r"^names: .*got \['art'\]"):
        ids[["art"]]  # type: ignore[index]
    with pytest.raises(TypeError, match=r"^names: .*got 'art'"):
        ids("art")
    with pytest.raises(TypeError, match=r"^names: .*got 3"):
        DomainIds(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^names: "):
        DomainIds([])
    for nameless in ([["art"]], [float("nan")]):
        with pytest.raises(TypeError, match=r"^names: "):
            DomainIds(nameless)
    for wrong in (torch.tensor([0, 3]), [-1]):
        with pytest.raises(ValueError, match=r"^ids: "):
            ids.inverse(wrong)


def test_in_a_training_loop() -> None:
    ids = DomainIds(NAMES)
    model = torch.nn.Linear(4, 3)
    opt = fastdg.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), num_domains=len(ids))
    losses = model(torch.randn(6, 4)).square().mean(1)
    opt.backward(losses, ids(["art", "photo", "art", "sketch", "sketch", "sketch"]))
    assert opt.statistics["domain_count"].tolist() == [1, 2, 3]
    opt.step()
    losses = model(torch.randn(6, 4)).square().mean(1)
    opt.backward(losses, ids["sketch"])
    assert opt.statistics["domain_count"].tolist() == [0, 0, 6]
