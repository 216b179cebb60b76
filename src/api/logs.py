"""What the operator reads: one line for each record, whatever is in it, and not the same line again and again."""

import copy
import logging
import re
import sys
import threading
import time
from collections.abc import Hashable
from itertools import islice
from typing import Final, TextIO

logger = logging.getLogger(__name__)

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
#: Seconds for which a repeated record is counted, and not written.
REPEAT_INTERVAL = 10.0


class OneLine(logging.Formatter):
    """Control characters are escaped, so that nobody can forge a line; of an exception only its type is told."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage().strip()}"
        if record.exc_info and record.exc_info[0]:
            line += f" ({record.exc_info[0].__name__})"
        if repeats := getattr(record, "repeats", 0):
            line += f" (repeats in {REPEAT_INTERVAL:g} s: {repeats})"
        return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


class _Interval:
    """What is known of one record that may be repeated."""

    __slots__ = ("ends", "last", "repeats", "timer")

    def __init__(self) -> None:
        self.ends = time.monotonic() + REPEAT_INTERVAL
        self.repeats = 0
        self.last: logging.LogRecord | None = None
        self.timer: threading.Timer | None = None


class RepeatHandler(logging.StreamHandler[TextIO]):
    """Writes a record that is repeated once per `REPEAT_INTERVAL`, with the number of repeats.

    Two records are the same if their loggers, levels and texts are or, where they have the attribute ``repeat_key``
    (``extra={"repeat_key": …}``), if that is. The first is written at once. Those that follow within the interval are
    counted; the last of them is written when it ends, with the attribute ``repeats``, and begins the next interval.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        #: By record, those that end first come first.
        self._intervals: dict[Hashable, _Interval] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Called with each record, one after the other."""
        try:
            key = getattr(record, "repeat_key", (record.name, record.levelno, record.getMessage()))
        except Exception:
            self.handleError(record)
            return
        self._forget(key)
        interval = self._intervals.get(key)
        if interval is None:
            self._intervals[key] = _Interval()
            super().emit(record)
            return
        interval.repeats += 1
        interval.last = copy.copy(record)
        if record.exc_info:
            interval.last.exc_info = (record.exc_info[0], None, None)  # type: ignore[assignment]  # no frames are kept
        if interval.timer is None:
            interval.timer = threading.Timer(interval.ends - time.monotonic(), self._write_repeats, [key])
            interval.timer.daemon = True
            interval.timer.start()

    def close(self) -> None:
        """Write what has been counted so far."""
        for key in list(self._intervals):
            self._write_repeats(key)
        super().close()

    def _forget(self, key: Hashable) -> None:
        """Drop the interval of this record, and up to two others, if they have ended without repeats."""
        now = time.monotonic()
        for each in {key, *islice(self._intervals, 2)} & self._intervals.keys():
            if self._intervals[each].timer is None and self._intervals[each].ends <= now:
                del self._intervals[each]

    def _write_repeats(self, key: Hashable) -> None:
        assert self.lock is not None
        with self.lock:
            interval = self._intervals.pop(key, None)
            if interval is None or interval.last is None or interval.timer is None:
                return
            interval.timer.cancel()
            interval.last.repeats = interval.repeats
            super().emit(interval.last)
            self._intervals[key] = _Interval()


def _without_details(record: logging.LogRecord) -> bool:
    """Keep the beginning of what asyncio says: the rest quotes exceptions, arguments and paths."""
    record.msg, record.args = record.getMessage().partition("\n")[0].partition("(")[0], ()
    return True


def _unhandled(hook: "threading.ExceptHookArgs | sys.UnraisableHookArgs") -> None:
    if hook.exc_type is not SystemExit:
        logger.error("Exception that nobody handles: %s", hook.exc_type.__name__)


def configure() -> None:
    """Log warnings and worse to standard error, also of exceptions that nobody handles, and no traceback."""
    handler = RepeatHandler(sys.stderr)
    handler.setFormatter(OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # It warns of each write to a client that has gone.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    logging.getLogger("asyncio").addFilter(_without_details)
    threading.excepthook = sys.unraisablehook = _unhandled
    # At WARNING it repeats what clients sent.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
