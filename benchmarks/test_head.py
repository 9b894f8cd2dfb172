"""What does Fishr cost on the head alone, features given?"""

from typing import Any

from cases import CASES
from contenders import Case
from timing import answer, parameters


@parameters([case for case in CASES.values() if case.question == "head"])
def test_head(benchmark: Any, case: Case, name: str, smoke: bool, truths: dict[Any, Any]) -> None:
    answer(benchmark, case, name, smoke, truths)
