"""For torchrun: the second rank dies without a word in its second step."""

import os
import signal
from datetime import timedelta

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fastdg


def main() -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    model = DistributedDataParallel(nn.Linear(3, 3))
    opt = fastdg.AgrSum(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        losses = F.cross_entropy(model(torch.randn(6, 3)), torch.arange(6) % 3, reduction="none")
        if step == 1 and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        opt.backward(losses, torch.arange(6) % 2)
        opt.step()
        opt.zero_grad()
        os.write(1, f"made step {step}\n".encode())  # at once: two ranks write


if __name__ == "__main__":
    main()
