"""Every operator, with whatever arguments, gives results or raises one sentence."""

from __future__ import annotations

import pytest
from operator_arguments import OPERATORS, Arguments, run

CALLS = 300


def test_calls_give_results_or_one_sentence() -> None:
    kinds, faults = run(range(CALLS))
    assert faults == []
    # Odd arguments are refused, and are not all that there is.
    assert kinds["results"] > CALLS / 3 and kinds["ValueError"] > CALLS / 20


@pytest.mark.slow
def test_many_calls() -> None:
    _, faults = run(range(CALLS, 20 * CALLS))
    assert faults == []


def test_every_operator_is_called() -> None:
    assert {Arguments(seed).call()[0] for seed in range(CALLS)} == set(OPERATORS)
