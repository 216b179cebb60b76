"""Signals before the server starts end ``stagecast serve`` silently, with exit code 0."""

import os
import signal
import sys


def handle() -> None:
    """Handle signals until the server installs its own handlers."""
    if sys.argv[1:2] == ["serve"]:
        for number in (signal.SIGINT, signal.SIGTERM):
            # Not by an exception: a module that is being imported could suppress it.
            signal.signal(number, lambda *_: os._exit(0))
