"""What does Fishr on the head cost in a whole training step?"""

from typing import Any

from cases import CASES
from contenders import Case
from timing import answer, parameters


@parameters([case for case in CASES.values() if case.question == "step"])
def test_step(benchmark: Any, case: Case, name: str, smoke: bool, truths: dict[Any, Any]) -> None:
    answer(benchmark, case, name, smoke, truths)
