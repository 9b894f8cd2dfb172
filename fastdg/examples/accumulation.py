"""Gradient accumulation: micro-batches of any size make the step of the whole batch."""

import torch
from torch import Tensor
from torch.nn import functional as F

import fastdg

from . import data


def gradient(size: int) -> list[Tensor]:
    """Return the gradient of a Fishr step on a batch of 96, in micro-batches of this size."""
    torch.manual_seed(0)
    model = data.network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = fastdg.Fishr(base, anneal_steps=0)  # with its penalty from the first step on
    x, y, domain = next(iter(data.mixed(batch_size=96)))
    micro_batches = list(zip(x.split(size), y.split(size), domain.split(size), strict=True))

    opt.zero_grad()
    for i, (x, y, domain) in enumerate(micro_batches):
        losses = F.cross_entropy(model(x), y, reduction="none")
        # Staged until the final call, which merges everything by the number of samples
        opt.backward(losses, domain, final=i == len(micro_batches) - 1)
    opt.step()
    return [p.grad for p in model.parameters() if p.grad is not None]


def main() -> None:
    whole = gradient(96)
    for size in (48, 32, 7):
        parts = gradient(size)
        pairs = zip(whole, parts, strict=True)
        apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
        print(f"micro-batches of {size}: {apart:.1e} from the gradient of the whole batch")
        assert apart < 1e-4


if __name__ == "__main__":
    main()
