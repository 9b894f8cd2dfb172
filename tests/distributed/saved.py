"""A training under FSDP2 that is saved, and goes on from what was."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from parallel import BASES, WRAPS, Net, Run, shares, weights_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from fastdg.core.nesting import terms_of

BEFORE = 3  # steps


def start(run: Run) -> tuple[Net, Any, nn.Module]:
    """Model, wrapper, and what owns all parameters."""
    torch.manual_seed(0)
    model = Net()
    for part in (model.conv, model.body, model):
        fully_shard(part)
    opt = WRAPS[run.wrap](BASES[run.base](model.parameters()), model)
    terms = [module for term in terms_of(opt) for module in term.modules()]
    return model, opt, nn.ModuleList([model, *terms]) if terms else model


def step(run: Run, model: Net, opt: Any, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, d = batch
    opt.zero_grad()
    losses = F.cross_entropy(model(x), y, reduction="none")
    opt.backward(losses, d, **({"labels": y} if "RISE" in run.wrap else {}))
    opt.step()


def resumed(
    run: Run, folder: Path | None, rank: int, world: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights at the end of a run without a break, and of one that goes on from its checkpoint:
    of torch.distributed.checkpoint in ``folder``, or else of torch.save."""
    batches = [of_ranks[rank] for of_ranks in shares(run, world)]
    model, opt, owner = start(run)
    for batch in batches[:BEFORE]:
        step(run, model, opt, batch)
    file = io.BytesIO()
    if folder is None:
        torch.save((model.state_dict(), opt.state_dict()), file)
    else:
        dcp.save(dict(zip("mo", get_state_dict(owner, opt), strict=True)), checkpoint_id=folder)
    for batch in batches[BEFORE:]:
        step(run, model, opt, batch)
    weights = weights_of(model)

    model, opt, owner = start(run)
    if terms_of(opt):  # whose parameters have no size before the first forward
        step(run, model, opt, batches[0])
    if folder is None:
        file.seek(0)
        for part, state in zip((model, opt), torch.load(file, weights_only=False), strict=True):
            part.load_state_dict(state)
    else:
        state = dict(zip("mo", get_state_dict(owner, opt), strict=True))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(owner, opt, model_state_dict=state["m"], optim_state_dict=state["o"])
    for batch in batches[BEFORE:]:
        step(run, model, opt, batch)
    return weights, weights_of(model)
