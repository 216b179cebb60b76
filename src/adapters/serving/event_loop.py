"""How the process runs: which event loop, and how often the garbage collector."""

import asyncio
import contextlib
import gc
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final

#: Objects allocated, and not freed, between two collections of the youngest generation, and the ratios of the others.
#: Little here is cyclic garbage: Python's default of 700 would look for it during every few events.
_THRESHOLDS: Final = (10_000, 50, 100)

#: Seconds after which a thread that does not release the GIL has to pass it on. Events wait for the image threads that
#: long, and by Python's default five times as long.
_SWITCH_INTERVAL: Final = 0.001


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on uvloop where it is installed, which costs less per event and connection; else on asyncio's own loop."""
    sys.setswitchinterval(_SWITCH_INTERVAL)
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop as new_loop
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


def collect_less() -> None:
    """Call once everything is set up: what exists now is never examined again, and what comes, less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
