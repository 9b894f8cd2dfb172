"""What do per-domain variances of all layers cost, in plain steps?"""

from typing import Any

from cases import CASES
from contenders import Case
from timing import answer, parameters


@parameters([case for case in CASES.values() if case.question == "variance"])
def test_variance(
    benchmark: Any, case: Case, name: str, smoke: bool, truths: dict[Any, Any]
) -> None:
    answer(benchmark, case, name, smoke, truths)
