"""What do the ops on given gradients cost, in copies of the same bytes, and Fish in plain steps?"""

from typing import Any

from cases import CASES
from contenders import Case
from given import ColumnCase
from timing import answer, parameters


@parameters([case for case in CASES.values() if isinstance(case, ColumnCase)])
def test_columns(
    benchmark: Any, case: Case, name: str, smoke: bool, truths: dict[Any, Any]
) -> None:
    answer(benchmark, case, name, smoke, truths)
