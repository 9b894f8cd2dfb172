"""Plain training against Fishr: which one trusts a cue of the training cameras alone?"""

import torch
from torch.nn import functional as F

import fastdg

from . import data


def train(penalty_weight: float) -> torch.nn.Module:
    torch.manual_seed(0)
    model = data.network()
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    opt = fastdg.Fishr(base, penalty_weight=penalty_weight, anneal_steps=60)
    dataset = data.training_set(count=2048)
    for _ in range(200):
        x, y, domain = dataset[torch.randint(len(dataset), (96,))]
        losses = F.cross_entropy(model(x), y, reduction="none")  # one loss a sample
        opt.zero_grad()
        opt.backward(losses, domain)  # in place of losses.mean().backward()
        opt.step()
    return model


def main() -> None:
    for name, penalty_weight in [("plain training", 0.0), ("Fishr", 1000.0)]:
        model = train(penalty_weight)
        seen = data.accuracy(model, *data.training_set(2048).tensors[:2])
        unseen = data.accuracy(model, *data.unseen())
        print(f"{name}: {seen:.0f} % on the cameras seen, {unseen:.0f} % on a new one")


if __name__ == "__main__":
    main()
