"""Logging: each record is one line, as text or JSON, whatever it contains, and repeated records are counted.

Values that programs read are fields of a record: ``extra={"fields": {"code": …}}``. No prompt, token, query string,
image name or file path is logged, at any level. Libraries log what clients and providers send at lower levels, so only
their warnings are.
"""

import copy
import json
import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Hashable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, TextIO

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


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    request_id = getattr(record, "request_id", "")
    return {**fields, "requestId": request_id} if request_id else fields


class OneLine(logging.Formatter):
    """Escapes control characters, so that no line can be forged, and names only the type of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage().strip()}"
        for name, value in _fields(record).items():
            line += f" {name}={value if _PLAIN.fullmatch(str(value)) else json.dumps(value)}"
        if record.exc_info and record.exc_info[0]:
            line += f" ({record.exc_info[0].__name__})"
        if repeats := getattr(record, "repeats", 0):
            line += f" (repeats in {REPEAT_INTERVAL:g} s: {repeats})"
        return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


class JsonLine(logging.Formatter):
    """One JSON object for each record, with its fields beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        content = {
            "time": timestamp(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
            **_fields(record),
        }
        if record.exc_info and record.exc_info[0]:
            content["error"] = record.exc_info[0].__name__
        if repeats := getattr(record, "repeats", 0):
            content["repeats"] = repeats
        return json.dumps(content)


@dataclass(slots=True)
class _Interval:
    """The repeats of one record."""

    ends: float = field(default_factory=lambda: time.monotonic() + REPEAT_INTERVAL)
    repeats: int = 0
    last: logging.LogRecord | None = None
    timer: threading.Timer | None = None


class RepeatHandler(logging.StreamHandler[TextIO]):
    """Writes a record that is repeated once per `REPEAT_INTERVAL`, with the number of repeats.

    Two records are the same if their attribute ``repeat_key`` (``extra={"repeat_key": …}``) or, without it, their
    loggers, levels, texts and fields are equal. The first is written at once. Those that follow within the interval are
    counted; the last of them is written when it ends, with the attribute ``repeats``, and begins the next interval.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        #: By key of the record, oldest end first.
        self._intervals: dict[Hashable, _Interval] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write or count the record. The handler's lock is held."""
        record.request_id = REQUEST_ID.get()  # Repeats are written by another thread.
        try:
            fields = tuple(getattr(record, "fields", {}).items())
            key = getattr(record, "repeat_key", (record.name, record.levelno, record.getMessage(), fields))
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
        """Write the pending counts."""
        for key in list(self._intervals):
            self._write_repeats(key)
        super().close()

    def _forget(self, key: Hashable) -> None:
        """Drop the intervals of this record and of up to two others if they have ended without repeats."""
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
    """Keep only the beginning of asyncio's messages: the rest quotes exceptions, arguments and paths."""
    beginning = record.getMessage().partition("\n")[0].partition("(")[0]
    record.msg, record.args = _FUNCTION.sub(r"\1", beginning), ()
    return True


def _unhandled(hook: "threading.ExceptHookArgs | sys.UnraisableHookArgs") -> None:
    if hook.exc_type is not SystemExit:
        logger.error("Unhandled exception: %s", hook.exc_type.__name__)


def configure(level: str = "warning", *, as_json: bool = False) -> None:
    """Log to standard error from this level on, also unhandled exceptions, without tracebacks."""
    handler = RepeatHandler(sys.stderr)
    handler.setFormatter(JsonLine() if as_json else OneLine())
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
