"""Signals that come before anything is begun end ``stagecast serve`` quietly, with exit code 0."""

import os
import signal
import sys


def handle() -> None:
    """From now on, until the server has handlers of its own."""
    if sys.argv[1:2] == ["serve"]:
        for number in (signal.SIGINT, signal.SIGTERM):
            # At once: an exception could get lost in whatever is being imported.
            signal.signal(number, lambda *_: os._exit(0))
