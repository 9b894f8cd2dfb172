"""Compile csrc/columns_cuda.cu for the CPU: `build(version, folder)`.

The host compiler knows neither launches nor shared memory: these are rewritten, and nothing else.
"""

import os
import re
import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
HELPERS = (CSRC / "pool.cpp", CSRC / "scratch.cpp")


def rewritten(source: str, library: str) -> str:
    """The source with calls of the emulation in place of CUDA's own syntax."""
    for what, by, count in (
        # kernel<<<grid, threads, shared, stream>>>(...)
        (
            r"\b(\w+)<<<(.+?)>>>\(",
            r"emulation::launch([](const auto&... a) { \1(a...); }, \2)(",
            source.count("<<<"),
        ),
        (
            r"extern __shared__ ([^;]+?) ?(\w+)\[\];",
            r"auto* const \2 = reinterpret_cast<\1*>(emulation::dynamic.data());",
            source.count("extern __shared__"),
        ),
        (
            r"(?<!extern )__shared__ (\w+) (\w+)((?:\[\w+\])+);",
            r"static \1 \2_memory\3; auto& \2 = emulation::shared(\2_memory);",
            len(re.findall("(?<!extern )__shared__", source)),
        ),
        (r"IMPL\(fastdg_cuda, CUDA, m\)", "IMPL(fastdg_cuda, CPU, m)", 1),
        ("fastdg_cuda", library, 1),
    ):
        source, found = re.subn(what, by, source)
        assert found == count > 0, f"{what}: {found} of {count} rewritten"
    return source


def build(version: int, folder: Path) -> Path:
    """The library of the operators as for CUDA's ``version``; they are in `fastdg_emulated_...`."""
    name = f"fastdg_emulated_{version}"
    source = folder / f"{name}.cpp"
    source.write_text(rewritten((CSRC / "columns_cuda.cu").read_text(), name))
    call = [*os.environ.get("CXX", "c++").split(), "-shared", "-fPIC", "-O2", "-g0", "-std=c++20"]
    call += [
        f"-DCUDART_VERSION={version}",
        "-DUSE_CUDA",
        f"-Dfastdg={name}",
        "-Wno-unknown-pragmas",
    ]
    call += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wl,-Bsymbolic"]
    call += [f"-I{path}" for path in (HERE, CSRC, *include_paths())]
    call += [str(path) for path in (source, HERE / "torch_cuda.cpp", *HELPERS)]
    call += [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
    done = subprocess.run([*call, "-o", folder / f"{name}.so"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder / f"{name}.so"
