"""What does a penalty on all layers' variances cost, with its gradient to every parameter?"""

from typing import Any

from cases import CASES
from contenders import Case
from timing import answer, parameters


@parameters([case for case in CASES.values() if case.question == "differentiable"])
def test_differentiable(
    benchmark: Any, case: Case, name: str, smoke: bool, truths: dict[Any, Any]
) -> None:
    answer(benchmark, case, name, smoke, truths)
