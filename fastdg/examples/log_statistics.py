"""Statistics of every tenth step in TensorBoard, in one line; a run of W&B goes in its place."""

import tempfile

import torch
from torch.nn import functional as F

import fastdg

from . import data, needs

with needs("tensorboard"):
    from torch.utils.tensorboard import SummaryWriter


def main() -> None:
    torch.manual_seed(0)
    model = data.network()
    base = torch.optim.Adam(model.named_parameters(), lr=1e-3)
    opt = fastdg.PCGrad(base, num_domains=len(data.CAMERAS))
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        for step, (x, y, domain) in enumerate(data.mixed(count=320)):
            losses = F.cross_entropy(model(x), y, reduction="none")
            opt.zero_grad()
            opt.backward(losses, domain)
            opt.step()
            if step % 10 == 0:  # reading statistics waits for the device
                fastdg.log(opt, writer, step, domains=data.CAMERAS)
    print(f"in TensorBoard are now {', '.join(opt.statistics)}")


if __name__ == "__main__":
    main()
