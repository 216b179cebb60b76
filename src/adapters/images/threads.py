"""Where Pillow works: in a few threads beside the event loop, for which the work of all users waits in one line."""

import asyncio
import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar, TypeVarTuple

from domain.identity import WORKING_FOR

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

#: How far image work stands back behind the event loop where both want the same core.
_NICENESS: Final = 10

#: The cost of work is in pixels times passes over them. This is what a look at a header costs, and what work costs that
#: does not say so.
GLANCE: Final = 100_000
_USUAL: Final = 2_000_000
#: What costs more than this is large. Of two threads only one does large work, so that the other serves small work
#: soon, and no two of the largest pictures are in memory at once.
_LARGE: Final = 16_000_000


#: Of glibc only.
_TRIM: Final = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@dataclass(eq=False)
class _Turn:
    """One piece of work, in line or under way."""

    user: str
    cost: int
    #: Where it stands in line: smaller ones come first.
    tag: float
    granted: Future[None] = field(default_factory=Future)
    #: What its thread does.
    job: Future[Any] | None = None


class ImageThreads:
    """Runs image work, so much of it at once and no more; the rest waits in line.

    The line is a weighted fair queue: each user who waits gets the same share of the work, in pixels. So small work
    comes before large work of others, and large work is not put off for ever. Several event loops may use it.

    Pillow gives up the interpreter lock in nearly everything that takes long, so that threads do. What is
    run here has no loop over pixels of its own.
    """

    def __init__(self, max_workers: int = 2) -> None:
        """At most `max_workers` threads, and never more than this process has cores."""
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        #: How many threads there are.
        self.size = min(max_workers, cores)
        self._pool = ThreadPoolExecutor(self.size, "image", initializer=_stand_back)
        self._lock = threading.Lock()
        self._line: list[_Turn] = []
        self._running: list[_Turn] = []
        #: The work of each user's share done so far, and the tag of each user's last turn.
        self._now = 0.0
        self._tags: dict[str, float] = {}

    async def run(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        """What the function returns or raises. Cancelled while it waits in line, it is never begun."""
        async with self.turn() as run:
            result: Result = await run(function, *args)
            return result

    @asynccontextmanager
    async def turn(self, cost: int = _USUAL) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
        """Wait in line for a thread, and yield what runs one function in it. What it needs can be read meanwhile.

        `cost`: pixels times passes over them, known beforehand.
        """
        turn = self._enter(WORKING_FOR.get(), cost)
        try:
            await asyncio.wrap_future(turn.granted)

            async def run(function: Callable[[*Args], Result], *args: *Args) -> Result:
                call: Callable[..., Result] = partial(_tidily, function) if cost >= _USUAL else function
                turn.job = job = self._pool.submit(call, *args)
                return await asyncio.wrap_future(job)

            yield run
        finally:
            if turn.job is None:
                self._leave(turn)
            else:  # A thread does not stop because nobody waits for it any more.
                turn.job.add_done_callback(lambda _: self._leave(turn))

    def close(self) -> None:
        """Drop what waits, and end the threads once they are done with what they do."""
        with self._lock:
            for turn in self._line:
                turn.granted.cancel()
            self._line.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _enter(self, user: str, cost: int) -> _Turn:
        with self._lock:
            turn = _Turn(user, cost, max(self._now, self._tags.get(user, 0.0)) + cost)
            self._tags[user] = turn.tag
            self._line.append(turn)
            self._grant()
        return turn

    def _leave(self, turn: _Turn) -> None:
        with self._lock:
            for place in (self._running, self._line):
                if turn in place:
                    place.remove(turn)
            busy = self._line or self._running
            self._tags = {user: tag for user, tag in self._tags.items() if busy and tag > self._now}
            self._now = self._now if busy else 0.0
            self._grant()

    def _grant(self) -> None:
        """Let those in line begin for whom there is room."""
        while len(self._running) < self.size and (turn := self._next()) is not None:
            self._line.remove(turn)
            self._running.append(turn)
            self._now += turn.cost / len({each.user for each in (*self._line, *self._running)})
            with contextlib.suppress(Exception):  # It was cancelled, and leaves at once.
                turn.granted.set_result(None)

    def _next(self) -> _Turn | None:
        full = sum(turn.cost > _LARGE for turn in self._running) >= max(1, self.size - 1)
        fitting = [turn for turn in self._line if turn.cost <= _LARGE or not full]
        return min(fitting, key=lambda turn: turn.tag, default=None)


def _tidily(function: Callable[[*Args], Result], *args: *Args) -> Result:
    """Give back the memory that the function has let go of: glibc keeps some hundred MB of it for later."""
    try:
        return function(*args)
    finally:
        if _TRIM is not None:
            _TRIM(0)


def _stand_back() -> None:
    # On Linux a thread has a niceness of its own; elsewhere this would be the whole process.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
