"""Measures the lag of the event loop, the sign of overload."""

import asyncio
import statistics
from collections import deque
from typing import Final

#: Seconds between two measurements, and how many of them the median is taken of: a single pause of the process, such as
#: a garbage collection or a suspension, is no overload.
_INTERVAL: Final = 0.05
_SAMPLES: Final = 5


class LoopLag:
    """Sets `overloaded` when the median lag exceeds `limit` seconds, and clears it below half of that."""

    def __init__(self, limit: float | None) -> None:
        """``None``: never overloaded."""
        self._limit = limit
        self._lags = deque([0.0] * _SAMPLES, _SAMPLES)
        self.overloaded = False

    @property
    def seconds(self) -> float:
        """The median lag of the last measurements."""
        return statistics.median(self._lags)

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _INTERVAL
            await asyncio.sleep(_INTERVAL)
            self._lags.append(loop.time() - due)
            if self._limit is not None:
                self.overloaded = self.seconds > (self._limit / 2 if self.overloaded else self._limit)
