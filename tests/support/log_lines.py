"""What a service logs at the level `debug`, and what may be in no line of it."""

import contextlib
import io
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from api.logs import OneLine, RepeatHandler
from support.node import ROOT

#: A stored picture's name, a token, a query string, a traceback, and the prompts and texts of the tests' requests.
_PRIVATE: Final = (
    r"-[A-Za-z0-9_-]{20,}\.(png|jpg|jpeg|webp)",
    r"\beyJ[\w-]+\.",
    r"\?\w+=",
    r"Traceback|File \\?\"",
    r"(?i)a red hat|stolen|evil\.example|SECRET\b",
    r"correct-horse-battery",
    rf"/tmp/|{re.escape(str(ROOT))}|{re.escape(str(Path.home()))}/|\.py\b",
)


def assert_nothing_private(lines: Iterable[str], *private: str) -> None:
    """No line has what `_PRIVATE` matches, or one of these texts."""
    for line in lines:
        for pattern in (*_PRIVATE, *map(re.escape, private)):
            assert re.search(pattern, line) is None, (pattern, line)


@contextlib.contextmanager
def debug_log(*private: str) -> Iterator[io.StringIO]:
    """Everything that is logged meanwhile. In the end nothing private may be in it."""
    lines = io.StringIO()
    handler = RepeatHandler(lines)
    handler.setFormatter(OneLine(as_json=True))
    root, own = logging.getLogger(), [logging.getLogger(name) for name in ("api", "adapters", "domain")]
    before = [logger.level for logger in own]
    root.addHandler(handler)
    for logger in own:
        logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        for logger, level in zip(own, before, strict=True):
            logger.setLevel(level)
        root.removeHandler(handler)
        handler.close()
    assert_nothing_private(lines.getvalue().splitlines(), *private)
