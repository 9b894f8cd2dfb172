"""SAM around a plain optimizer and around Fishr, by a closure and by two calls."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg

from . import data


def optimizer(name: str, model: nn.Module) -> fastdg.DomainOptimizer:
    base = torch.optim.Adam(model.parameters(), 3e-3)
    if name == "ERM":
        return fastdg.ERM(base)
    if name == "SAM":
        return fastdg.SAM(base, rho=0.05, model=model)
    fishr = fastdg.Fishr(base, penalty_weight=10.0, anneal_steps=8, num_domains=3)
    return fastdg.SAM(fishr, rho=0.05, model=model)


def main() -> None:
    for name in ("ERM", "SAM", "SAM(Fishr)"):
        torch.manual_seed(0)
        model = data.network()
        opt = optimizer(name, model)
        for _ in range(4):
            for x, y, domain in data.mixed():

                def closure() -> tuple[Tensor, Tensor]:
                    return F.cross_entropy(model(x), y, reduction="none"), domain  # noqa: B023

                opt.zero_grad()
                opt.step(closure)  # SAM calls the closure twice
        print(f"{name}: {data.accuracy(model, *data.unseen()):.0f} % on a new camera", end="")
        if "ascended_loss" in opt.statistics:
            rise = opt.statistics["ascended_loss"] - opt.statistics["loss"]
            print(f", loss at the worst weights near by higher by {rise:.3f}", end="")
        print()

    # The same step by two calls, where the loop has micro-batches or a GradScaler
    sam = fastdg.SAM(torch.optim.Adam(model.parameters(), 3e-3), model=model)
    x, y, domain = next(iter(data.mixed()))
    sam.zero_grad()
    sam.backward(F.cross_entropy(model(x), y, reduction="none"), domain)
    sam.ascend()
    sam.backward(F.cross_entropy(model(x), y, reduction="none"), domain)
    sam.step()


if __name__ == "__main__":
    main()
