"""How many kernels Triton compiles for a network over several batch sizes; nothing is compiled.

Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import aot
import torch

from fastdg import kernels
from fastdg.ops.window import sizes

SAMPLES = (96, 95, 64, 48, 33, 32, 100, 128, 17, 7)
# Channels, outputs, size of the padded input, kernel, stride
Layer = tuple[int, int, int, int, int]


def resnet50() -> Iterator[Layer]:
    """The convolutions of ResNet-50 at 224 x 224, each shape once."""
    found: dict[Layer, None] = {(3, 64, 230, 7, 2): None}
    inputs, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            found[inputs, width, size, 1, 1] = None
            found[width, width, size + 2, 3, stride] = None
            if not block:
                found[inputs, 4 * width, size, 1, stride] = None
            size //= stride
            found[width, 4 * width, size, 1, 1] = None
            inputs = 4 * width
    yield from found


def step(op: str, samples: int, dtype: torch.dtype, last: bool) -> None:
    for channels, outputs, size, kernel, stride in resnet50():
        window = [kernel, kernel, stride, stride, 1, 1]
        a, delta, window = aot.conv(samples, channels, outputs, size, window, dtype, last)
        if op == "moments":
            aot.forward(a, delta, window)
        elif op == "domain":
            aot.mean_only(a, delta, window)
        elif op == "agreement":
            aot.agreement(a, delta, window)
        else:
            mean = aot.meta(3, outputs, sizes(a.shape, window)[1])
            where = aot.domains(samples)
            kernels.outer_moments_backward.outer_moments_backward(
                mean, mean, a, delta, mean, *where, True, window
            )


def main() -> None:
    """One JSON line an op: its kernels at the first batch size, and at all."""
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    seen: set[str] = set()

    def note(kernel: Any, programs: int, *args: Any, **named: Any) -> None:
        source, options = aot.specialised(kernel, args, named)
        types = (source.signature, source.constants, source.attrs, options)
        seen.add(kernel.__name__ + "; ".join(str(sorted(map(str, t.items()))) for t in types))

    with ExitStack() as stack:
        for module in vars(kernels).values():
            if callable(getattr(module, "launch", None)):
                stack.enter_context(patch.object(module, "launch", note))
        stack.enter_context(patch.object(kernels.launch, "processors", lambda device: 132))
        stack.enter_context(patch.object(kernels.launch, "hopper", lambda device: True))
        stack.enter_context(patch.object(kernels.launch, "blackwell", lambda device: False))
        for dtype, last in (
            (torch.float32, False),
            (torch.bfloat16, False),
            (torch.bfloat16, True),
        ):
            for op in ("moments", "domain", "agreement", "backward"):
                seen.clear()
                counts = []
                for samples in SAMPLES:
                    step(op, samples, dtype, last)
                    counts.append(len(seen))
                row = {"op": op, "dtype": str(dtype), "last": last, "kernels": counts}
                print(json.dumps(row))


if __name__ == "__main__":
    main()
