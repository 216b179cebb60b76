"""What the operator reads: one line for each record, whatever is in it."""

import logging
import re
import sys
from typing import Final

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class OneLine(logging.Formatter):
    """Control characters are escaped, so that nobody can forge a line; of an exception only its type is told."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage().strip()}"
        if record.exc_info and record.exc_info[0]:
            line += f" ({record.exc_info[0].__name__})"
        return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def configure() -> None:
    """Log warnings and worse to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # It warns of each write to a client that has gone.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    # At WARNING it repeats what clients sent.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
