from __future__ import annotations

import hashlib
from typing import Any

import torch


def seed_hash(*args: Any) -> int:
    return int(hashlib.md5(str(args).encode()).hexdigest(), 16) % 2**31


def accuracy(network: Any, loader: Any, weights: Any, device: Any) -> float:
    network.eval()
    with torch.no_grad():
        right = torch.cat([network.predict(x).argmax(1) == y for x, y in loader])
    network.train()
    return right.double().mean().item()
