"""What is a compiled training step worth, and what does a wrapper cost in one?"""

from typing import Any

from cases import CASES
from contenders import Case
from timing import answer, parameters


@parameters([case for case in CASES.values() if case.question.startswith("compiled")])
def test_compiled(
    benchmark: Any, case: Case, name: str, smoke: bool, truths: dict[Any, Any]
) -> None:
    answer(benchmark, case, name, smoke, truths)
