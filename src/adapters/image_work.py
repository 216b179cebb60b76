"""Where Pillow works: in a few threads beside the event loop."""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar, TypeVarTuple

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

#: How far image work stands back behind the event loop where both want the same core.
_NICENESS: Final = 10


class ImageThreads:
    """Runs image work, so much of it at once and no more; the rest waits in line.

    Pillow gives up the interpreter lock in nearly everything that takes long, so that threads do. What is
    run here has no loop over pixels of its own.
    """

    def __init__(self, max_workers: int = 2) -> None:
        """At most `max_workers` threads, and never more than this process has cores."""
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(min(max_workers, cores), "image", initializer=_stand_back)

    async def run(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        """What the function returns or raises. Cancelled while it waits in line, it is never begun."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def close(self) -> None:
        """Drop what waits, and end the threads once they are done with what they do."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _stand_back() -> None:
    # On Linux a thread has a niceness of its own; elsewhere this would be the whole process.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
