"""Compile kernels, as their launchers configure them, for GPUs that are not here.

Needs a process without TRITON_INTERPRET. Launchers are called with meta tensors of real sizes; what they
would launch is compiled instead, with the specialisation of arguments that Triton's launcher does.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdg import kernels

# Most shared memory a block can have: A100 163 KiB, H100 and H200 227 KiB.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Built:
    """One compiled kernel and what it takes of a multiprocessor."""

    kernel: str
    capability: int
    programs: int
    registers: int
    stack: int  # bytes of local memory; not zero when registers are spilled
    shared: int
    ptx: str

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.ptx))


def compile_launch(
    capability: int, kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any]
) -> Built:
    """Compile ``kernel[(programs,)](*args, **meta)``."""
    options = {k: meta[k] for k in ("num_warps", "num_stages") if k in meta}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {k: v for k, v in meta.items() if k not in options}
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif kernel.params[position].is_constexpr or value == 1:
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = resources(built.asm["cubin"])
    return Built(
        kernel.__name__.strip("_"),
        capability,
        programs,
        registers,
        stack,
        built.metadata.shared,
        built.asm["ptx"],
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, from the compiled code itself."""
    tool = triton.knobs.nvidia.cuobjdump.path
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.findall(r"REG:(\d+)", text)[0]), int(re.findall(r"STACK:(\d+)", text)[0])


@contextmanager
def compiling(capability: int, multiprocessors: int = 132) -> Iterator[list[Built]]:
    """Within, what kernels would launch is compiled and collected."""
    built: list[Built] = []

    def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        built.append(compile_launch(capability, kernel, programs, args, meta))

    modules = [m for m in vars(kernels).values() if hasattr(m, "launch")]
    original = kernels.launch.launch, kernels.launch.processors
    kernels.launch.processors = lambda device: multiprocessors
    for module in modules:
        module.launch = launch
    try:
        yield built
    finally:
        kernels.launch.processors = original[1]
        for module in modules:
            module.launch = original[0]
