"""Find wrong labels: samples whose gradients point against that of trusted data."""

import torch
from torch.nn import functional as F

import fastdg

from . import data


def main() -> None:
    torch.manual_seed(0)
    x, y, domain = data.training_set(100).tensors
    wrong = torch.rand(len(y), generator=torch.Generator().manual_seed(5)) < 0.1
    y = y ^ wrong
    trusted, labels = data.images(0.85, 300, seed=7)

    model = data.network()
    opt = fastdg.ERM(torch.optim.Adam(model.parameters(), 3e-3))
    influence = torch.zeros(len(y))
    for batch, targets, ids in data.mixed():
        # How much a step on each sample would lower the loss of the trusted data, to first order.
        # Summed over the steps, as in TracIn: at a single point it is mostly noise
        losses = F.cross_entropy(model(trusted), labels, reduction="none")
        direction = fastdg.domain_gradients(losses, torch.zeros_like(labels), params=model)
        losses = F.cross_entropy(model(x), y, reduction="none")
        influence += fastdg.per_sample_products(losses, direction, params=model).squeeze(1)

        opt.zero_grad()
        opt.backward(F.cross_entropy(model(batch), targets, reduction="none"), ids)
        opt.step()

    suspects = influence.argsort()[: int(wrong.sum())]
    found, chance = (100 * rows.float().mean() for rows in (wrong[suspects], wrong))
    print(f"{len(suspects)} suspects: {found:.0f} % have a label that was flipped, ", end="")
    print(f"of all samples {chance:.0f} %")

    losses = F.cross_entropy(model(x), y, reduction="none")
    noise = fastdg.gradient_noise(losses, domain, params=model)
    for camera, trace, square in zip(data.CAMERAS, noise.trace, noise.square, strict=True):
        print(f"{camera}: variance of a gradient {trace:.1f}, squared mean gradient {square:.2f}")


if __name__ == "__main__":
    main()
