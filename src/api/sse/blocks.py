"""The blocks of an event stream, by the specification of Server-Sent Events, and the encoders that make them."""

from collections.abc import Callable
from typing import Final

from domain.feed import Logged

#: The first block: how many milliseconds an EventSource waits before it reconnects.
RETRY: Final = b"retry: 1000\n\n"
#: Sent while nothing else is, so that proxies keep the connection and the kernel notices a client that is gone.
COMMENT: Final = b":\n\n"


def block(name: str, data: bytes, event_id: str | None = None) -> bytes:
    """One event; `data` is JSON on one line. Without an id, the client keeps the last one."""
    lines = b"" if event_id is None else b"id: %b\n" % event_id.encode()
    return b"event: %b\n%bdata: %b\n\n" % (name.encode(), lines, data)


class _Encoder:
    """`domain.device.Encoder`."""

    def __init__(self, event_id: Callable[[Logged, str], str]) -> None:
        self._event_id = event_id

    def event(self, entry: Logged, cursor: str) -> bytes:
        assert entry.event is not None
        return block(entry.name, entry.event, self._event_id(entry, cursor))

    def announcement(self, name: str, data: bytes) -> bytes:
        return block(name, data)


#: A client that reconnects sends the id as ``Last-Event-ID``: for the feed the cursor, for one generation the sequence.
CURSOR_AS_ID: Final = _Encoder(lambda _, cursor: cursor)
SEQUENCE_AS_ID: Final = _Encoder(lambda entry, _: str(entry.sequence))
