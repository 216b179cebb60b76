"""Logging: each record is one line, as text or JSON, whatever it contains, and repeated records are counted.

Values that programs read are fields of a record: ``extra={"fields": {"code": …}}``. No prompt, token, query string,
image name or file path is logged, at any level. Libraries log what clients and providers send at lower levels, so only
their warnings are.
"""

import copy
import json
import logging
import math
import re
import sys
import threading
import time
import warnings
from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TextIO

from domain.events import timestamp

logger = logging.getLogger(__name__)

#: The id of the HTTP request that the current task answers.
REQUEST_ID: Final = ContextVar("REQUEST_ID", default="")

#: The packages whose records are logged from the configured level on.
_OWN: Final = ("api", "adapters", "domain")

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
#: A value that needs no quotes in text.
_PLAIN: Final = re.compile(r"[\w.@:/{}+-]+")
#: A function in asyncio's messages on uvloop, with its address in memory.
_FUNCTION: Final = re.compile(r"<(?:function|bound method|built-in \w+) (\S+) .*")
#: Seconds for which repeats of a record are counted instead of written.
REPEAT_INTERVAL = 10.0


class OneLine(logging.Formatter):
    """A record as one line. Of an exception only the type is named."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """As JSON, or as text with control characters escaped, so that no line can be forged."""
        message, fields = record.getMessage().strip(), dict(getattr(record, "fields", {}))
        if request_id := getattr(record, "request_id", ""):
            fields["requestId"] = request_id
        if record.exc_info and record.exc_info[0]:
            fields["error"] = record.exc_info[0].__name__
        if repeats := getattr(record, "repeats", 0):
            fields["repeats"] = repeats
        if self._as_json:
            time = timestamp(datetime.fromtimestamp(record.created, UTC))
            level = record.levelname.lower()
            return json.dumps({"time": time, "level": level, "logger": record.name, "message": message, **fields})
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {message}"
        for name, value in fields.items():
            line += f" {name}={value if _PLAIN.fullmatch(str(value)) else json.dumps(value)}"
        return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


@dataclass(slots=True)
class _Interval:
    """The repeats of one record, until a moment of the monotonic clock."""

    end: float
    repeats: int = 0
    last: logging.LogRecord | None = None


class RepeatHandler(logging.StreamHandler[TextIO]):
    """Writes a record that is repeated once per `REPEAT_INTERVAL`, with the number of repeats.

    Two records are the same if their attribute ``repeat_key`` (``extra={"repeat_key": …}``) or, without it, their
    loggers, levels, texts and fields are equal; with the key ``None``, never. The first is written at once. Those that
    follow within the interval are counted; the last is written when it ends, with the attribute ``repeats``, and begins
    the next interval.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._intervals: dict[Hashable, _Interval] = {}
        self._stopped = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Write or count the record. The handler's lock is held."""
        record.request_id = REQUEST_ID.get()  # Repeats are written by another thread.
        same = (record.name, record.levelno, record.msg, record.args, getattr(record, "fields", None))
        key = record.repeat_key if hasattr(record, "repeat_key") else repr(same)
        if key is None:
            super().emit(record)
            return
        interval = self._intervals.get(key)
        if interval is None:
            super().emit(record)
            self._intervals[key] = _Interval(time.monotonic() + REPEAT_INTERVAL)
            return
        interval.last = copy.copy(record)
        interval.repeats += 1
        interval.last.repeats = interval.repeats
        if record.exc_info:
            interval.last.exc_info = (record.exc_info[0], None, None)  # type: ignore[assignment]  # no frames are kept

    def close(self) -> None:
        """Write the pending counts."""
        self._stopped.set()
        self._end_intervals(math.inf)
        super().close()

    def _run(self) -> None:
        while not self._stopped.wait(REPEAT_INTERVAL / 10):
            self._end_intervals(time.monotonic())

    def _end_intervals(self, now: float) -> None:
        """Write the counts of the intervals that have ended, and forget those without a repeat."""
        assert self.lock is not None
        with self.lock:
            for key in [key for key, interval in self._intervals.items() if interval.end <= now]:
                last = self._intervals.pop(key).last
                if last is not None:
                    super().emit(last)
                    self._intervals[key] = _Interval(time.monotonic() + REPEAT_INTERVAL)


def _without_details(record: logging.LogRecord) -> bool:
    """Keep only the beginning of asyncio's messages: the rest quotes exceptions, arguments and paths."""
    beginning = record.getMessage().partition("\n")[0].partition("(")[0]
    record.msg, record.args = _FUNCTION.sub(r"\1", beginning), ()
    return True


def _unhandled(hook: "threading.ExceptHookArgs | sys.UnraisableHookArgs") -> None:
    if hook.exc_type is not SystemExit:
        logger.error("Unhandled exception: %s", hook.exc_type.__name__)


def configure(level: str = "warning", *, as_json: bool = False) -> None:
    """Log to standard error from this level on, also unhandled exceptions, without tracebacks."""
    # No line shows these, nor the place in the source.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # As its documentation advises.
    handler = RepeatHandler(sys.stderr)
    handler.setFormatter(OneLine(as_json=as_json))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in _OWN:
        logging.getLogger(package).setLevel(level.upper())
    # It warns about each write to a closed connection.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    logging.getLogger("asyncio").addFilter(_without_details)
    threading.excepthook = sys.unraisablehook = _unhandled
    # Its warnings quote what clients sent.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    # Python's own line has a path and source code.
    warnings.showwarning = lambda _, category, *rest, **more: logger.warning("Python warning: %s", category.__name__)
