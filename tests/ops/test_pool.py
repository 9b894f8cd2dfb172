"""The memory that the compiled CPU ops keep: given back when unused, whole after a fork."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdg import native

if not native.status()[0]:
    pytest.skip(f"no compiled ops: {native.status()[1]}", allow_module_level=True)
if not sys.platform.startswith("linux"):
    pytest.skip("the pool serves Linux only", allow_module_level=True)

cpp = torch.ops.fastdg_cpp
ORDER, OFFSETS = torch.tensor([2, 0, 1]), torch.tensor([0, 3])

FORK = """
import os, threading, torch, fastdg
torch.set_num_threads(1)
grads, order, offsets = torch.randn(2, 1 << 19), torch.arange(2), torch.tensor([0, 2])
moments = torch.ops.fastdg_cpp.moments
before = moments(grads, order, offsets)  # of a size that the pool keeps
stop = threading.Event()
small = torch.zeros(2, 1)
def work():
    while not stop.is_set():
        moments(small, order, offsets)
# No daemons: one that the exit cuts off inside an op takes the process with it.
workers = [threading.Thread(target=work) for _ in range(2)]
for worker in workers: worker.start()
try:
    for _ in range(20):
        child = os.fork()
        if child == 0:
            mean, variance = moments(grads, order, offsets)
            os._exit(0 if mean.equal(before[0]) and variance.equal(before[1]) else 1)
        assert os.waitpid(child, 0)[1] == 0
finally:
    stop.set()
"""

# A heap with a hole that is large enough for the blocks, and that the allocator would keep
HOLE = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
hole = libc.malloc(400 << 20)
pins = [libc.malloc(200) for _ in range(2000)]
libc.free(hole)
from test_pool import test_what_was_large_once_is_given_back as given_back
given_back(8)
given_back(600)
"""

not_sanitized = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps what is freed"
)


def resident() -> int:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 >> 20


def outer(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked moments of ``[size, size]``."""
    a, delta = torch.rand(3, 1, size), torch.rand(3, 1, size)
    mean, variance = cpp.outer_moments(a, delta, ORDER, OFFSETS, [])
    g = delta[:, 0, -1, None] * a[:, 0]  # of the last row
    torch.testing.assert_close(mean[0, -1], g.mean(0))
    torch.testing.assert_close(variance[0, -1], g.var(0, correction=0), rtol=1e-4, atol=1e-6)
    return mean, variance


@not_sanitized
@pytest.mark.parametrize("size", [8, 600])  # what comes after lies outside of the pool, and in it
def test_what_was_large_once_is_given_back(size: int) -> None:
    for _ in range(1100):
        cpp.moments(torch.zeros(3, 1), ORDER, OFFSETS)  # forgets earlier tests
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what earlier tests have freed may serve this one
    before = resident()
    kept = outer(4096)
    assert resident() > before + 100
    del kept
    for _ in range(3):
        outer(size)
    for _ in range(1100):
        cpp.moments(torch.zeros(3, 1), ORDER, OFFSETS)
    outer(size)
    assert resident() < before + 64


@not_sanitized
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="steers glibc's malloc")
def test_what_lay_in_the_heap_is_given_back() -> None:
    """And not only what the system allocator had mapped for itself."""
    given = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "ignore", "-c", HOLE]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=os.environ | given
    )
    assert done.returncode == 0, done.stderr


def test_what_a_step_uses_is_kept() -> None:
    for _ in range(3):
        first = {x.data_ptr() for x in outer(600)}
    for _ in range(5):
        for _ in range(100):
            cpp.moments(torch.zeros(3, 1), ORDER, OFFSETS)
        assert {x.data_ptr() for x in outer(600)} == first


@not_sanitized
def test_a_small_block_drives_out_no_large_one() -> None:
    """Of a step in which the two are not in use together."""
    for _ in range(2100):
        cpp.moments(torch.zeros(3, 1), ORDER, OFFSETS)  # forgets earlier tests
    outer(4096)
    before = resident()
    outer(600)
    assert resident() > before - 32


def test_a_forked_child_allocates() -> None:
    """While other threads of its parent do."""
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
