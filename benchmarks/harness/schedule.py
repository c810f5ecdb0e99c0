"""How a time limit is shared out among the cases that are left."""

import math
import time
from collections.abc import Sequence

from contenders.cases import FEW_ROWS, Case

# A case is not worth beginning with less, and its rounds get no less.
CASE_SECONDS = 5.0
ROUNDS_SECONDS = 4.0
# What is set aside for them where something is compiled first.
BESIDE_COMPILING_SECONDS = 8.0
# A case that is so much over its time hangs.
PATIENCE_SECONDS = 45.0


class Schedule:
    """A deadline, and each case's share of the time until then; without a limit, all is infinite.

    What a case does not use goes to those after it. A case of few rows counts for a third.
    ``compilation`` is how many seconds the first one may well take.
    """

    def __init__(self, minutes: float | None, compilation: float = 0.0) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._case_end = math.inf
        self._longest_compilation = compilation

    def has_time(self) -> bool:
        return time.monotonic() + CASE_SECONDS < self._end

    def begin(self, case: Case, after: Sequence[Case]) -> None:
        now = time.monotonic()
        weights = [1 if each.num_rows <= FEW_ROWS else 3 for each in (case, *after)]
        self._case_end = now + (self._end - now) * weights[0] / sum(weights)

    def seconds_for_rounds(self) -> float:
        return max(self._case_end - time.monotonic(), ROUNDS_SECONDS)

    def seconds_until_hopeless(self) -> float:
        return self._case_end - time.monotonic() + PATIENCE_SECONDS

    def can_compile(self) -> bool:
        """Whether the case has time for what compiles first, as long as that took before."""
        needed = self._longest_compilation + BESIDE_COMPILING_SECONDS
        return time.monotonic() + needed < self._case_end

    def has_compiled(self, seconds: float) -> None:
        self._longest_compilation = max(self._longest_compilation, seconds)
