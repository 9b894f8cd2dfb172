"""Compile kernels, as their launchers configure them, for GPUs that are not here.

Needs a process without TRITON_INTERPRET. Launchers are called with meta tensors of real sizes; what
they would launch is compiled instead, with the arguments specialised as Triton's launcher does.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdg import kernels
from fastdg.ops.window import sizes

list(kernels.implementations(()))  # imports all modules
CAPABILITIES = (80, 90, 100)
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
    shared: int  # bytes
    wgmma: int  # matrix instructions of Hopper and Blackwell, of earlier GPUs, asynchronous copies
    mma: int
    async_copies: int
    under_way: int  # copies that the loop of products does not wait for; 0 also without such a loop
    buffers: int  # tiles of operands in shared memory


def specialised(
    kernel: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for ``kernel[...](*args, **named)``, and with which options."""
    options = {k: named[k] for k in ("num_warps", "num_stages", "maxnreg") if k in named}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {k: v for k, v in named.items() if k not in options}
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value, parameter = values[name], kernel.params[position]
        by_value = isinstance(value, int) and not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (value == 1 and by_value):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and by_value:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def compile_launch(
    capability: int, kernel: Any, programs: int, args: tuple[Any, ...], named: dict[str, Any]
) -> Built:
    """Compile ``kernel[(programs,)](*args, **named)``."""
    source, options = specialised(kernel, args, named)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = resources(built.asm["cubin"])
    found = [
        len(re.findall(instruction, built.asm["ptx"]))
        for instruction in (r"wgmma\.mma_async|tcgen05\.mma", r"mma\.sync", r"cp\.async\.c[ag]")
    ]
    name, shared = kernel.__name__.strip("_"), built.metadata.shared
    pipeline = pipelined(built.asm["ttgir"])
    return Built(name, capability, programs, registers, stack, shared, *found, *pipeline)


def pipelined(ttgir: str) -> tuple[int, int]:
    """`Built.under_way` and `Built.buffers` of a kernel whose operands are copied by cp.async."""
    products = re.finditer(r"ttng\.warp_group_dot |ttng\.tc_gen5_mma |= tt\.dot ", ttgir)
    inside = [p for p in products if ttgir.rfind("scf.for", 0, p.start()) >= 0]
    if not inside:
        return 0, 0
    end = inside[0].start()  # there may be one before the loop
    waits = re.search(r"ttg\.async_wait .*num = (\d+)", ttgir[ttgir.rfind("scf.for", 0, end) : end])
    buffers = re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x", ttgir)
    return int(waits[1]) if waits else 0, max(map(int, buffers), default=0)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, from the compiled code itself."""
    tool = triton.knobs.nvidia.cuobjdump.path
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

    def compile_only(kernel: Any, programs: int, *args: Any, **named: Any) -> None:
        built.append(compile_launch(capability, kernel, programs, args, named))

    with ExitStack() as stack:
        for module in vars(kernels).values():
            if callable(getattr(module, "launch", None)):
                stack.enter_context(patch.object(module, "launch", compile_only))
        for name, value in (
            ("processors", multiprocessors),
            ("hopper", capability == 90),
            ("blackwell", capability == 100),
        ):
            answer = partial(lambda value, device: value, value)
            stack.enter_context(patch.object(kernels.launch, name, answer))
        yield built


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def domains(N: int, D: int = 3) -> tuple[Tensor, Tensor]:
    return meta(N, dtype=torch.int64), meta(D + 1, dtype=torch.int64)


def rows(
    N: int, T: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, list[int]]:
    return meta(N, T, inputs, dtype=dtype), meta(N, T, outputs, dtype=dtype), []


def conv(
    N: int,
    C: int,
    outputs: int,
    size: int,
    window: list[int],
    dtype: torch.dtype = torch.float32,
    last: bool = False,
) -> tuple[Tensor, Tensor, list[int]]:
    """``last``: in torch.channels_last."""
    a = meta(N, C, size, size, dtype=dtype)
    delta = meta(N, outputs, sizes(a.shape, window)[0], dtype=dtype).transpose(1, 2)
    if last:
        a, delta = a.contiguous(memory_format=torch.channels_last), delta.contiguous()
    return a, delta, window


def moments_of(grads: Tensor) -> None:
    kernels.moments.moments(grads, *domains(len(grads)))


def moments_backward_of(grads: Tensor) -> None:
    mean = meta(3, grads.shape[1])
    kernels.moments.moments_backward(mean, mean, grads, mean, *domains(len(grads)))


def forward(a: Tensor, delta: Tensor, window: list[int], D: int = 3) -> None:
    kernels.outer_moments.outer_moments(a, delta, *domains(len(a), D), window)


def mean_only(a: Tensor, delta: Tensor, window: list[int]) -> None:
    kernels.outer_domain.outer_domain(a, delta, *domains(len(a)), window)


def agreement(
    a: Tensor, delta: Tensor, window: list[int], steepness: float = math.inf, D: int = 3
) -> None:
    kernels.outer_agreement.outer_agreement(
        a, delta, *domains(len(a), D), meta(D), 1.0, steepness, window
    )


def backward(a: Tensor, delta: Tensor, window: list[int]) -> None:
    mean = meta(3, delta.shape[2], sizes(a.shape, window)[1])
    kernels.outer_moments_backward.outer_moments_backward(
        mean, mean, a, delta, mean, *domains(len(a)), True, window
    )


def distances(N: int, C: int, A: int, E: int, dtype: torch.dtype = torch.float32) -> None:
    labels, teacher = meta(N, dtype=torch.int64), meta(C, A, dtype=dtype)
    tables = meta(C, E, dtype=dtype), meta(C, A, E, dtype=dtype), teacher
    embeddings, up = meta(N, E, dtype=dtype), meta(N, dtype=dtype)
    kernels.text_distance.text_distance(embeddings, labels, *tables)
    kernels.text_distance.text_distance_backward(up, up, embeddings, labels, *tables)


def oracles(N: int, C: int, P: int, rows: bool = False, oracle: torch.dtype | None = None) -> None:
    features = meta(N, P, C).transpose(1, 2) if rows else meta(N, C, P)
    args = features, features.to(oracle), meta(C)
    kernels.oracle_nll.oracle_nll(*args)
    kernels.oracle_nll.oracle_nll_backward(meta(N), *args, meta(N, C))


def norms(N: int, T: int, C: int, S: int, G: int, last: bool = False, half: bool = False) -> None:
    x = meta(N, T, C, S, dtype=torch.bfloat16 if half else torch.float32)
    x = x.mT.contiguous().mT if last else x
    args = x, x, meta(N, T, G), meta(N, T, G), True, None
    kernels.norm_gradients.norm_gradients(*args)
    lists = [[tensor] * 2 for tensor in args[:4]]
    kernels.norm_gradients.foreach_norm_gradients(*lists, [])
    kernels.norm_gradients.norm_gradients_backward(meta(N, C), meta(N, C), *args, None, None)
    kernels.norm_gradients.norm_gradients_backward(meta(N, C), meta(N, C), *args, meta(C), x)


def activations(size: int, half: bool = False) -> None:
    x = meta(size, dtype=torch.bfloat16 if half else torch.float32)
    for kind in range(3):
        kernels.activation_derivative.activation_derivative(x, x, x, kind)


def attention(B: int, T: int, dtype: torch.dtype) -> None:
    maps = [meta(B, T, T)] * 4
    kernels.attention_maps.attention_maps(*maps, dtype)


def many(N: int) -> None:
    """A small linear layer with a bias, and one of several positions."""
    a, delta = [meta(N, 16), meta(N, 4, 64)], [meta(N, 16), meta(N, 4, 64)]
    kernels.foreach_moments.foreach_moments(*domains(N), [delta[0]], a, delta, True)


THREE = [3, 3, 1, 1, 1, 1]
PADDED = [*THREE, 1, 1]
TF32, FP32 = True, False
BF16 = torch.bfloat16
# What ViT-B/16 and ResNet-50 meet at 224 x 224, and arguments that are 1 and so become constants.
WORK: list[tuple[str, bool, Callable[[], None]]] = [
    ("moments", FP32, lambda: moments_of(meta(96, 1 << 20))),
    ("moments", FP32, lambda: moments_backward_of(meta(96, 1 << 20))),
    ("small layers", FP32, lambda: many(96)),
    ("head", FP32, lambda: forward(*rows(96, 1, 2048, 345))),
    ("head", FP32, lambda: backward(*rows(96, 1, 2048, 345))),
    ("head", FP32, lambda: kernels.outer_norms.outer_norms(*rows(96, 1, 2048, 345))),
    ("head", FP32, lambda: agreement(*rows(96, 1, 4096, 4096), D=1)),
    ("head", FP32, lambda: agreement(*rows(96, 1, 4096, 4096), steepness=10.0)),
    ("T=4", FP32, lambda: forward(*rows(96, 4, 768, 3072))),
    ("ViT MLP", TF32, lambda: forward(*rows(96, 197, 768, 3072))),
    ("ViT MLP", FP32, lambda: forward(*rows(96, 197, 768, 3072))),
    ("ViT MLP", TF32, lambda: backward(*rows(14, 197, 768, 3072))),
    ("ViT MLP", TF32, lambda: mean_only(*rows(96, 197, 768, 3072))),
    ("ViT MLP", TF32, lambda: agreement(*rows(96, 197, 768, 3072))),
    ("ViT MLP", FP32, lambda: agreement(*rows(96, 197, 768, 3072))),
    ("ViT MLP", TF32, lambda: agreement(*rows(96, 197, 768, 3072), steepness=10.0)),
    ("ViT MLP", FP32, lambda: agreement(*rows(96, 197, 768, 3072), steepness=10.0)),
    ("ViT MLP", TF32, lambda: kernels.outer_norms.outer_norms(*rows(96, 197, 768, 3072))),
    ("conv 3x3", TF32, lambda: forward(*conv(96, 256, 256, 14, PADDED))),
    ("conv 3x3", FP32, lambda: forward(*conv(96, 256, 256, 14, PADDED))),
    ("conv 3x3", TF32, lambda: mean_only(*conv(96, 64, 64, 56, PADDED))),
    ("conv 3x3", FP32, lambda: mean_only(*conv(96, 128, 128, 56, [3, 3, 2, 2, 1, 1, 1, 1]))),
    ("conv 3x3", TF32, lambda: agreement(*conv(96, 512, 512, 7, PADDED))),
    ("conv 3x3", TF32, lambda: agreement(*conv(96, 512, 512, 9, THREE))),
    ("conv 3x3", TF32, lambda: agreement(*conv(96, 512, 512, 7, PADDED), steepness=10.0)),
    ("conv 3x3", TF32, lambda: backward(*conv(56, 256, 256, 16, THREE))),
    ("conv 3x3", TF32, lambda: kernels.outer_norms.outer_norms(*conv(96, 64, 64, 56, PADDED))),
    ("bf16 MLP", TF32, lambda: forward(*rows(96, 197, 768, 3072, BF16))),
    ("bf16 MLP", TF32, lambda: mean_only(*rows(96, 197, 768, 3072, BF16))),
    ("bf16 MLP", TF32, lambda: agreement(*rows(96, 197, 768, 3072, BF16))),
    ("bf16 MLP", TF32, lambda: backward(*rows(14, 197, 768, 3072, BF16))),
    ("bf16 3x3", TF32, lambda: forward(*conv(96, 256, 256, 16, THREE, BF16))),
    ("bf16 3x3", TF32, lambda: forward(*conv(96, 256, 256, 16, THREE, BF16, last=True))),
    ("bf16 3x3", TF32, lambda: mean_only(*conv(96, 64, 64, 58, THREE, BF16, last=True))),
    ("bf16 3x3", TF32, lambda: agreement(*conv(96, 512, 512, 9, THREE, BF16))),
    ("bf16 3x3", TF32, lambda: agreement(*conv(96, 512, 512, 9, THREE, BF16), 10.0)),
    ("bf16 3x3", TF32, lambda: backward(*conv(56, 256, 256, 16, THREE, BF16))),
    ("bf16 1x1", TF32, lambda: forward(*conv(96, 1024, 256, 14, [1] * 6, BF16))),
    ("bf16 1x1", TF32, lambda: forward(*conv(96, 64, 256, 56, [1] * 6, BF16))),
    ("bf16 1x1", TF32, lambda: forward(*conv(96, 2048, 512, 7, [1] * 6, BF16, last=True))),
    ("bf16 1x1", TF32, lambda: mean_only(*conv(96, 1024, 256, 14, [1] * 6, BF16))),
    ("bf16 1x1", TF32, lambda: mean_only(*conv(96, 512, 1024, 28, [1, 1, 2, 2, 1, 1], BF16))),
    (
        "bf16 1x1",
        TF32,
        lambda: kernels.outer_norms.outer_norms(*conv(9, 1024, 256, 14, [1] * 6, BF16)),
    ),
    ("bf16 stem", TF32, lambda: forward(*conv(96, 3, 64, 230, [7, 7, 2, 2, 1, 1], BF16))),
    ("conv 1x1", TF32, lambda: forward(*conv(96, 256, 64, 56, [1] * 6))),
    ("conv 1x1", TF32, lambda: agreement(*conv(96, 256, 64, 56, [1] * 6))),
    ("conv 1x1", TF32, lambda: agreement(*conv(96, 256, 64, 56, [1] * 6), steepness=10.0)),
    ("stem", TF32, lambda: forward(*conv(96, 3, 64, 230, [7, 7, 2, 2, 1, 1]))),
    ("ViT GELU", FP32, lambda: activations(96 * 197 * 3072)),
    ("ViT GELU", FP32, lambda: activations(96 * 197 * 3072, half=True)),
    ("ViT attention", FP32, lambda: attention(96 * 12, 197, BF16)),
    ("long rows", FP32, lambda: attention(8, 4096, torch.float32)),
    ("CLIP text", FP32, lambda: distances(128, 65, 3, 512)),
    ("CLIP text", FP32, lambda: distances(128, 65, 3, 512, torch.bfloat16)),
    ("many anchors", FP32, lambda: distances(128, 65, 100, 768)),
    ("ResNet map", FP32, lambda: oracles(96, 256, 3136)),
    ("ResNet map", FP32, lambda: oracles(96, 2048, 49, oracle=torch.bfloat16)),
    ("ViT tokens", FP32, lambda: oracles(96, 768, 197, rows=True)),
    ("layer norm", FP32, lambda: norms(96, 197, 768, 1, 1)),
    ("layer norm", FP32, lambda: norms(96, 197, 768, 1, 1, half=True)),
    ("group norm", FP32, lambda: norms(96, 1, 256, 3136, 32)),
    ("group norm", FP32, lambda: norms(96, 1, 256, 3136, 32, last=True)),
    ("batch norm", FP32, lambda: norms(96, 1, 2048, 49, 2048)),
    ("ones", FP32, lambda: norms(1, 1, 1, 1, 1)),
    ("ones", FP32, lambda: oracles(1, 1, 1)),
    ("ones", TF32, lambda: distances(1, 1, 1, 1)),
    ("ones", TF32, lambda: forward(*conv(1, 1, 1, 3, THREE), D=1)),
    ("ones", TF32, lambda: agreement(*conv(1, 1, 1, 3, THREE), D=1)),
    ("ones", TF32, lambda: backward(*conv(1, 1, 1, 4, THREE))),
]


def main() -> None:
    """Compile everything; one JSON line a kernel."""
    for capability in CAPABILITIES:
        for work, tf32, run in WORK:
            for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
                backend.fp32_precision = "tf32" if tf32 else "ieee"
            with compiling(capability) as built:
                run()
            for one in built:
                print(json.dumps({"work": work, "tf32": tf32, **asdict(one)}))


if __name__ == "__main__":
    main()
