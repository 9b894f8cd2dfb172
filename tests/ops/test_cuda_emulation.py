"""The compiled CUDA ops, run on the CPU by an emulation of the CUDA runtime.

Some tests of test_columns.py run on them as on every backend; here are besides the sizes at which
blocks, warps, tiles and tables end, and what only threads can get wrong.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from op_cases import assert_close
from test_columns import (  # noqa: F401 - the tests are collected here too, on the ops below
    lists,
    naive_gram,
    some_weights,
    test_agreement_of_equal_gradients,
    test_few_domains_present,
    test_layouts,
    test_the_threshold_is_met_exactly,
)
from torch import Tensor

from fastdg import ops
from fastdg.ops.dispatch.backends import attach_compiled
from fastdg.ops.dispatch.registry import OPS, force

ROOT = Path(__file__).resolve().parents[2]
INF = math.inf
BLOCK = 8192  # columns of a block
LIBRARIES: dict[int, Path] = {}  # loaded, by the version of CUDA; each only once in a process


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[int], None]]:
    """Attaches the ops as for a CUDA version as the backend "cuda"; sets the order of threads."""
    version = getattr(request, "param", 13000)
    if fault := load(ROOT / "setup.py").compiler_fault():
        pytest.skip(fault)
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer does not follow the emulation's fibers")
    if version not in LIBRARIES:
        builder = load(Path(__file__).parent / "cuda_emulation" / "build.py")
        LIBRARIES[version] = builder.build(version, tmp_path_factory.mktemp("emulation"))
        torch.ops.load_library(str(LIBRARIES[version]))
    library = LIBRARIES[version]
    before = {name: op.backends.get("cuda") for name, op in OPS.items()}
    attach_compiled("cuda", "cpu", library.stem)
    yield ctypes.CDLL(str(library)).emulation_schedule
    for name, entry in before.items():
        if entry is None:
            OPS[name].backends.pop("cuda", None)
        else:
            OPS[name].backends["cuda"] = entry


@pytest.fixture
def device(emulated: Callable[[int], None]) -> Iterator[str]:
    """In place of the fixture of all backends: the tests of test_columns.py run on this one."""
    emulated(0)
    with force("cuda"):
        yield "cpu"


def every_op(
    shapes: list[tuple[int, ...]], D: int
) -> Iterator[tuple[str, Callable[[bool], list[Tensor]]]]:
    """Each op as a call that takes whether to compute in float64, on the same numbers."""
    grads, weights = lists(shapes, D), some_weights(D)
    variance = [torch.rand(D, *shape) for shape in shapes]
    ema = [torch.rand(D, *shape) for shape in shapes]
    present = torch.arange(D) % 3 != 1

    def cast(x: Any, double: bool) -> Any:
        if isinstance(x, list):
            return [cast(y, double) for y in x]
        return x.double() if double else x.clone()

    yield "gram", lambda double: [ops.gram(cast(grads, double))]
    yield "combine", lambda double: ops.combine(cast(grads, double), cast(weights, double))
    yield "rows", lambda double: ops.combine_rows(cast(variance, double), cast(weights, double))
    for threshold, steepness in ((0.4, INF), (0.3, 5.0)):

        def agreement(double: bool, t: float = threshold, s: float = steepness) -> list[Tensor]:
            combined, *sums = ops.agreement(cast(grads, double), cast(weights, double), t, s)
            return [*combined, *sums]

        yield f"agreement {steepness}", agreement

    for rate in (0.0, 0.3, 0.7, 1.0):

        def meta_step(double: bool, rate: float = rate) -> list[Tensor]:
            parameters, kept = cast(grads[0], double), cast(variance, double)
            kept = [x[0] for x in kept]
            return [ops.meta_step(parameters, kept, rate), *parameters, *kept]

        yield f"meta_step {rate}", meta_step
    for history in ([], ema):

        def gap(double: bool, history: list[Tensor] = history) -> list[Tensor]:
            leaves = [x.requires_grad_() for x in cast(variance, double)]
            found = ops.variance_gap(leaves, cast(history, double), present, 3.0)
            return [found.detach(), *torch.autograd.grad(found, leaves)]

        yield f"variance_gap and its gradient, {len(history)} kept", gap


SIZES = {
    "around a warp": [(), (31,), (32,), (33,), (127,), (129,), (255,), (513,), (2, 3, 4)],
    "around a block": [(BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (1,), (0,)],
    "several blocks": [(3 * BLOCK + 129,), (7, 5)],
    "around a table": [(3,)] * 41 + [(2, 2)] * 160,
}


# CUDA 12 has room for 40 tensors and 400 rows in a launch, CUDA 13 for 192 and 3600.
@pytest.mark.product
@pytest.mark.parametrize("emulated", [13000, 12080], indirect=True)
@pytest.mark.parametrize("D", [1, 3, 9])
@pytest.mark.parametrize("shapes", SIZES.values(), ids=SIZES.keys())
def test_where_blocks_and_tables_end(device: str, shapes: list[tuple[int, ...]], D: int) -> None:
    for name, call in every_op(shapes, D):
        got = call(False)
        with ops.use_backend("reference"):
            expected = call(True)
        for one, two in zip(got, expected, strict=True):
            assert one.dtype == torch.float32, name
            # Sums of D numbers of about 1, which may cancel
            assert_close(one, two, float(two.norm()) + 3 * two.numel() ** 0.5)


@pytest.mark.parametrize("D", [70, 90])
def test_more_tiles_than_warps(device: str, D: int) -> None:
    """171 and 276 tiles of products, in rounds of 16; rows of many tiles."""
    grads = lists([(301,), (7,)], D)
    expected = naive_gram(grads)
    assert_close(ops.gram(grads), expected, float(expected.diagonal().sum()) / D)


def test_any_order_of_the_threads_gives_the_same_bits(
    device: str, emulated: Callable[[int], None]
) -> None:
    shapes = [(BLOCK + 77,), (33,), (5, 3)]
    for name, call in every_op(shapes, 6):
        expected = call(False)
        for seed in (1, 2, 3):
            emulated(seed)
            for one, two in zip(call(False), expected, strict=True):
                assert torch.equal(one, two), (name, seed)
        emulated(0)


def test_four_columns_in_one_access(device: str) -> None:
    """Where all rows of a tensor begin at a multiple of 16 bytes; else one by one."""
    count = ctypes.CDLL(str(LIBRARIES[13000])).emulation_wide_accesses
    weights, present = torch.ones(3), torch.ones(1, dtype=torch.bool)
    for shift in (0, 1):
        memory = torch.randn(4, 3, 132)[..., shift : shift + 128]
        rows, one = list(memory[0].unbind()), memory[3, :1]
        for name, args in {
            "gram": (rows, 3),
            "combine": (rows, weights),
            "agreement": (rows, weights, 0.5, INF),
            "agreement, soft": (rows, weights, 0.5, 3.0),
            "meta_step": ([memory[1, 0]], [memory[2, 0]], 0.5),
            "variance_gap": ([one], [], present, 0.0),
            "variance_gap_backward": (torch.ones(()), [one], [], present, 0.0),
        }.items():
            before = count()
            OPS[name.split(",")[0]](*args)
            assert (count() > before) == (shift == 0), (name, shift)


def test_more_rows_than_a_launch_takes_are_refused(device: str) -> None:
    row = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"gradients: .*5000"):
        ops.gram([[row]] * 5000)


def test_the_ops_run_on_the_emulation(device: str) -> None:
    for name, arguments in (
        ("gram", ([torch.ones(2)], 1)),
        ("combine", ([torch.ones(2)], torch.ones(1))),
    ):
        assert "emulated" in str(OPS[name].route(*arguments))
