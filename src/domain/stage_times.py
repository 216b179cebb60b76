"""How long the stages take on this node."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from domain.stages import Kind

#: Fewer runs of a stage say nothing about the next one.
_MIN_RUNS: Final = 5
_MILLISECOND: Final = timedelta(milliseconds=1)


class Entered(NamedTuple):
    """A generation has entered a stage."""

    status: str
    at: datetime


class StageTimes:
    """The times of all stages of generations that were completed on this node since its start."""

    def __init__(self) -> None:
        #: By kind and status: how often a stage took so many milliseconds.
        self._runs: defaultdict[tuple[Kind, str], Counter[int]] = defaultdict(Counter)

    def add(self, kind: Kind, stages: Sequence[Entered]) -> None:
        """Count a completed generation, by the consecutive stages that it has entered here, up to the terminal one."""
        for stage, following in pairwise(stages):
            self._runs[kind, stage.status][(following.at - stage.at) // _MILLISECOND] += 1

    def typical(self, kind: Kind, status: str) -> float | None:
        """The median of a stage in seconds, with one decimal; ``None`` if it has run less than five times."""
        runs = sorted(self._runs.get((kind, status), {}).items())
        passed = list(accumulate(count for _, count in runs))
        if not passed or (total := passed[-1]) < _MIN_RUNS:
            return None
        lower, upper = (runs[bisect_right(passed, rank)][0] for rank in ((total - 1) // 2, total // 2))
        return round((lower + upper) / 2000, 1)
