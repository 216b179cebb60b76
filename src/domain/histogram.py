"""How long something takes, as plain counts that whoever wants to see them reads."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

#: The upper bounds of the buckets in seconds: of what takes a moment, and of what people wait for.
MOMENTS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WAITS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class Histogram:
    """Seconds, counted in buckets."""

    def __init__(self, bounds: Sequence[float] = WAITS) -> None:
        self.bounds = bounds
        #: How many took at most each bound and more than the one before; the last: more than all of them.
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds
