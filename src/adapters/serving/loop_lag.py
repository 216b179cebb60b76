"""How late the event loop is: the sign that the service has more to do than it can."""

import asyncio
import statistics
from collections import deque
from typing import Final

#: Seconds between two looks at the clock, and of how many looks the median counts: one pause of the whole process, such
#: as a garbage collection or a suspension, is no overload.
_PAUSE: Final = 0.05
_LOOKS: Final = 5


class LoopLag:
    """Tells overload: the event loop has been later than `limit` seconds, and not been under half of that since."""

    def __init__(self, limit: float | None) -> None:
        """``None``: never."""
        self._limit = limit
        self._lags = deque([0.0] * _LOOKS, _LOOKS)
        self.overloaded = False

    async def run(self) -> None:
        """Measure, until cancelled."""
        loop = asyncio.get_running_loop()
        while self._limit is not None:
            due = loop.time() + _PAUSE
            await asyncio.sleep(_PAUSE)
            self._lags.append(loop.time() - due)
            self.overloaded = statistics.median(self._lags) > (self._limit / 2 if self.overloaded else self._limit)
