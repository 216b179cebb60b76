"""Threads for image work, shared fairly between users."""

import asyncio
import contextlib
import ctypes
import os
import struct
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar, TypeVarTuple

from domain.errors import Draining
from domain.identity import WORKING_FOR

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

#: The niceness of image threads, so that the event loop goes first on a shared core.
_NICENESS: Final = 10
#: Nanoseconds for which an image thread asks to compute at a time. Since version 6.12, Linux lets a waking thread that
#: asks for less go first at once; otherwise that may wait for milliseconds. Shares of the core stay the same.
_SLICE: Final = 100_000_000
#: The number of Linux' ``sched_setattr(2)``, for which Python has no function, in 64-bit processes by machine.
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}

#: Costs of work, in pixels times passes over them: of reading a header, and by default.
GLANCE: Final = 100_000
_USUAL: Final = 2_000_000
#: The cost above which work is large. One thread is kept free of large work, so that small work is served soon, and
#: fewer large pictures are in memory at once.
_LARGE: Final = 16_000_000

#: Returns free memory to the system, of which glibc would keep hundreds of MB. After a turn, whose steps use it again.
_TRIM: Final = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Run(Protocol):
    """Runs a call on the thread of a turn."""

    def __call__(self, function: Callable[[*Args], Result], *args: *Args) -> Awaitable[Result]: ...


@dataclass(eq=False)
class _Turn:
    """A piece of work, waiting or running."""

    user: str
    cost: int
    #: Its virtual finish time: the smallest is served first.
    tag: float
    granted: Future[None] = field(default_factory=Future)
    #: The call running on its thread.
    job: Future[Any] | None = None


class ImageThreads:
    """Runs image work on a limited number of threads; other work waits in a weighted fair queue.

    Each waiting user gets the same share of the work, in pixels. So small work overtakes the large work of others, and
    large work is not starved. Several event loops may use it.

    Threads suffice, as Pillow releases the GIL in almost all slow operations. Work must not loop over pixels in Python.
    """

    def __init__(self, max_workers: int = 2) -> None:
        """Starts at most `max_workers` threads, and not more than the process has cores."""
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        #: The number of threads.
        self.size = min(max_workers, cores)
        self._pool = ThreadPoolExecutor(self.size, "image", initializer=_lower_priority)
        self._lock = threading.Lock()
        self._waiting: list[_Turn] = []
        self._running: list[_Turn] = []
        #: The virtual time: the work done per waiting user.
        self._now = 0.0
        self._closed = False

    async def run(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        """Run the function on a thread. If cancelled while it waits, it is never started."""
        async with self.turn() as run:
            return await run(function, *args)

    @asynccontextmanager
    async def turn(self, cost: int = _USUAL) -> AsyncIterator[Run]:
        """Wait for a thread, and yield a function that runs calls on it. Load data inside, not while waiting.

        `cost`: pixels times passes over them. Raises `Draining` once the threads are closed.
        """
        turn = self._enter(WORKING_FOR.get(), cost)
        try:
            await asyncio.wrap_future(turn.granted)

            async def run(function: Callable[[*Args], Result], *args: *Args) -> Result:
                if self._closed:
                    raise Draining
                turn.job = job = self._pool.submit(function, *args)
                return await asyncio.wrap_future(job)

            yield run
        finally:
            if turn.job is None:
                self._leave(turn)
            else:  # After a cancellation, the thread still runs.
                turn.job.add_done_callback(lambda _: self._end(turn))

    def close(self) -> None:
        """End the threads after their current calls. Work that waits or comes is refused when it gets its turn."""
        self._closed = True
        self._pool.shutdown(wait=False)

    def _enter(self, user: str, cost: int) -> _Turn:
        with self._lock:
            tags = [turn.tag for turn in (*self._waiting, *self._running) if turn.user == user]
            turn = _Turn(user, cost, max([self._now, *tags]) + cost)
            self._waiting.append(turn)
            self._grant()
        return turn

    def _end(self, turn: _Turn) -> None:
        """Leave, on a thread and after the memory is returned if the work was not small."""
        if _TRIM is not None and turn.cost >= _USUAL:
            with contextlib.suppress(RuntimeError):  # The threads are closed.
                self._pool.submit(_TRIM, 0).add_done_callback(lambda _: self._leave(turn))
                return
        self._leave(turn)

    def _leave(self, turn: _Turn) -> None:
        with self._lock:
            for turns in (self._running, self._waiting):
                if turn in turns:
                    turns.remove(turn)
            self._grant()

    def _grant(self) -> None:
        """Start waiting turns while threads are free."""
        while len(self._running) < self.size:
            full = sum(turn.cost > _LARGE for turn in self._running) >= max(1, self.size - 1)
            fitting = [turn for turn in self._waiting if turn.cost <= _LARGE or not full]
            if not fitting:
                return
            turn = min(fitting, key=lambda turn: turn.tag)
            self._waiting.remove(turn)
            self._running.append(turn)
            self._now += turn.cost / len({each.user for each in (*self._waiting, *self._running)})
            with contextlib.suppress(Exception):  # It was cancelled, and will leave at once.
                turn.granted.set_result(None)


def _lower_priority() -> None:
    # Only on Linux each thread has its own niceness.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        number = _SCHED_SETATTR.get(os.uname().machine)
        if number is not None and sys.maxsize > 1 << 32:
            # Its size, policy, flags, niceness, priority, slice, deadline and period. Older kernels ignore the slice.
            attributes = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, _NICENESS, 0, _SLICE, 0, 0)
            ctypes.CDLL(None).syscall(number, 0, attributes, 0)
