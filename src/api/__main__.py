"""The command line: ``stagecast``, or ``python -m api``."""

import sys

from api.cli import early_signals

early_signals.handle()  # Before the import below, which takes half a second.

from api.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
