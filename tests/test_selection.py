"""A run without arguments still says everything, if not everywhere: what `selection` leaves out."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable

from selection import cover

import fastdg
from fastdg.ops.dispatch.registry import OPS

# Tests that are left out as a whole, and where a run looks at the same by default
ALONE = {
    "distributed/test_lost.py::test_torchrun_ends_them_all": "test_what_the_others_say",
    "func/test_memory.py::test_compiles_with_inductor": "test_other_statistics_compile",
    "gradients/fuzz/test_fuzz_dtypes.py::test_most_steps_tell_something": "of the fuzz itself",
    "optim/test_compiled.py::test_with_inductor": "test_one_graph",
    "kernels/test_counts.py::test_memory_of_the_penalty_fits_a_card": "counts for minutes",
    "kernels/test_counts.py::test_a_step_dispatches_few_ops_more_than_plain_training": "same",
    # The rehearsal of the GPU script, which takes a minute and more; CI makes it
    "test_gpu_script.py::test_every_step_of_both_networks": "same",
    "test_gpu_script.py::test_tests_run_in_shards_and_those_that_passed_are_left_out_again": "same",
    "test_gpu_script.py::test_the_sanitizer_wraps_the_tests_or_is_said_to_be_missing": "same",
    "test_gpu_script.py::test_ops_are_right_on_each_backend_and_have_a_rate": "same",
    "test_gpu_script.py::test_steps_are_timed_beside_plain_ones": "same",
    "test_gpu_script.py::test_waits_and_captures_have_rows": "same",
    "test_gpu_script.py::test_the_table_has_measured_beside_predicted": "same",
    "test_cuda_build.py::test_setup_builds_with_cuda": "ops/test_cuda_emulation.py",
    "test_failed_build.py::test_a_failed_nvcc_leaves_the_cpp_ops": "test_a_failed_compiler",
    "test_failed_build.py::test_both_compilers_may_fail": "test_a_failed_compiler",
    "test_failed_build.py::test_pip_that_prints_nothing_leaves_the_errors_on_the_terminal": "same",
    "test_packaging.py::test_cuda_sources_compile_beside_any_torch": "ops/test_cuda_emulation.py",
}


def test_few_rows_have_every_value_of_every_column() -> None:
    draw = random.Random(0)
    for _ in range(50):
        widths = [draw.randint(1, 9) for _ in range(draw.randint(1, 4))]
        rows = [tuple(draw.randrange(n) for n in widths) for _ in range(60)]
        chosen = [rows[k] for k in cover(rows)]
        for taken, every in zip(zip(*chosen, strict=True), zip(*rows, strict=True), strict=True):
            assert set(taken) == set(every)
    assert len(cover(list(itertools.product(range(5), range(3), range(2))))) == 5


def by_test(collected: dict[str, bool]) -> dict[str, dict[str, bool]]:
    """The rows of each test, and whether a run takes them by default."""
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    for name, by_default in collected.items():
        test, _, row = name.partition("[")
        found[test][row.removesuffix("]")] = by_default
    return found


def parts(rows: Iterable[str]) -> set[str]:
    """Wrappers, optimizers, ops, backends, dtypes: what the names of rows are made of."""
    return {part for row in rows for part in row.split("-")}


def test_every_test_has_a_row_by_default(collected: dict[str, bool]) -> None:
    left_out = {test for test, rows in by_test(collected).items() if not any(rows.values())}
    assert left_out == set(ALONE)


def test_every_value_of_an_argument_is_in_a_row_by_default(collected: dict[str, bool]) -> None:
    for test, rows in by_test(collected).items():
        if test not in ALONE and "test_random_models" not in test:  # whose rows are seeds
            assert parts(filter(rows.get, rows)) == parts(rows), test


def test_every_algorithm_keeps_the_contract_by_default(collected: dict[str, bool]) -> None:
    tests = by_test(collected)
    names = {name for name in fastdg.__all__ if is_algorithm(getattr(fastdg, name))}
    contract = [test for test in tests if test.startswith("optim/test_contract.py::")]
    whole = [test for test in contract if {"ERM", "Fishr(MIRO)"} <= parts(tests[test])]
    assert len(whole) >= 10
    for test in whole:
        rows = tests[test]
        assert names <= {part.partition("(")[0] for part in parts(filter(rows.get, rows))}, test


def is_algorithm(thing: object) -> bool:
    if not isinstance(thing, type) or thing is fastdg.DomainOptimizer:
        return False
    # A step of an ascent has several forwards: tests/optim/test_ascent.py
    return issubclass(thing, fastdg.DomainOptimizer) and thing.role != "ascent"


def test_every_op_is_tried_on_every_backend_by_default(collected: dict[str, bool]) -> None:
    rows = by_test(collected)["ops/test_registration.py::test_registration"]
    tried = {tuple(row.split("-")[:2]) for row in filter(rows.get, rows)}
    ops = {(backend, op.partition(",")[0]) for backend, op in tried}
    here = [name for name, (available, _) in fastdg.backends().items() if available]
    assert ops == set(itertools.product(here, OPS))
