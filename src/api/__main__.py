"""The command line: ``stagecast``, or ``python -m api``."""

import os
import signal
import sys

if sys.argv[1:2] == ["serve"]:
    # A signal before the server has installed its handlers, which takes half a second, ends the process silently. Not
    # by an exception: a module that is being imported could suppress it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))

from api.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
