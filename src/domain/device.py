"""A device: a cursor in one user's feed, and what is sent to the client there.

The cursor moves in two ways. A *pull* reads pages of the log after the cursor and puts the wanted events into the
client's send buffer until it reaches the newest known position. After that, *live* delivery puts each event when the
hub delivers it. Live delivery puts only the event at the next position, and only while no pull runs. Everything else
(a gap, a full buffer, a follower that lost entries) starts a pull from the cursor. A pull puts only what it has read
contiguously, and neither awaits between the comparison and the put. So there is no gap and no duplicate, however late
the log's entries arrive.

How an event looks on the wire is up to an `Encoder`; where it waits for the client, to a `SendBuffer`.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from domain.errors import LogUnavailable
from domain.feed import Cursor, Logged, feed_name
from domain.feed_sessions import StartPosition
from domain.ports.log import EventLog
from domain.quarantine import Quarantine
from domain.readiness import FOLLOWER

logger = logging.getLogger(__name__)

#: Entries read from the log at a time.
PAGE: Final = 64

#: Replay requests that one device may have open.
MAX_REPLAYS: Final = 1_000

#: Announcements that wait while a device reads the log.
_MAX_ANNOUNCEMENTS: Final = 256

#: Seconds before a log that did not answer, or does not show an announced entry yet, is read again.
_RETRY_DELAY: Final = 0.1

#: What a client is sent: a packet, or a block of bytes.
F = TypeVar("F")
_FrameIn = TypeVar("_FrameIn", contravariant=True)
_FrameOut = TypeVar("_FrameOut", covariant=True)


class SendBuffer(Protocol[_FrameIn]):
    """Frames that wait for one client, within limits."""

    def offer(self, frame: _FrameIn) -> bool:
        """Send or queue a frame, without waiting. False: it does not fit within the limits.

        Does nothing once the connection has ended.
        """

    async def drained(self) -> bool:
        """Wait until the client has taken enough for more to be read. False: the connection has ended."""

    async def flushed(self) -> None:
        """Wait until the client has taken everything, or the connection has ended."""

    def finish(self) -> None:
        """End the connection once the client has taken what waits. Nothing is put any more."""

    def abort(self) -> None:
        """End the connection without sending what waits. Returns before anybody is notified of the end."""


class Encoder(Protocol[_FrameOut]):
    """Turns entries into frames of one form. Instances are compared by identity: share one per form."""

    def event(self, entry: Logged, cursor: str) -> _FrameOut:
        """The frame of this entry, which has an event; `cursor` is the text of the cursor after it."""

    def announcement(self, name: str, data: bytes) -> _FrameOut:
        """The frame of an event that is not in the log and has no cursor; `data` is JSON on one line."""


class EncodedEntry(dict[Encoder[Any], Any]):
    """One entry: its frame for each encoder, made when it is first asked for, once for however many devices.

    ``None``: it cannot be encoded, and its generation is ended.
    """

    __slots__ = ("_cursor", "_quarantine", "entry")

    def __init__(self, entry: Logged, cursor: str, quarantine: Quarantine) -> None:
        self.entry = entry
        self._cursor = cursor
        self._quarantine = quarantine

    def __missing__(self, encoder: Encoder[Any]) -> Any:
        frame = None
        try:
            frame = encoder.event(self.entry, self._cursor)
        except Exception as error:
            self._quarantine.put(self.entry.generation_id, FOLLOWER, error)
        self[encoder] = frame
        return frame


class _Announcement(NamedTuple):
    """See `Device.announce`."""

    name: str
    data: bytes
    waits: str | None


@dataclass(slots=True, eq=False)
class Device(Generic[F]):
    """One client of one user. Made by `domain.delivery.Hub.join`."""

    _log: EventLog
    _quarantine: Quarantine
    user_id: str
    _buffer: SendBuffer[F]
    _encoder: Encoder[F]
    _start: StartPosition
    _on_close: Callable[["Device[F]"], None]
    #: The name of the feed, in the texts of its cursors.
    feed: str = field(init=False)
    _cursor: Cursor = field(init=False)
    #: The newest known position, if it is beyond the cursor.
    _head: int = field(init=False)
    #: The log has to be read even if nothing beyond the cursor is known.
    _must_read: bool = True
    _pulling: bool = True
    #: What has been read from the log may still have to be put. Announcements are put after it.
    _reading: bool = True
    _announcements: list[_Announcement] = field(default_factory=list)
    _replays: list[tuple[str, int | None]] = field(default_factory=list)
    _replayed: set[str] = field(default_factory=set)
    _task: asyncio.Task[None] | None = None
    _closed: bool = False
    #: Events sent that the hub has not counted, less those that it has counted and that were not sent. It counts
    #: an entry for all devices at once: counting for each would cost a few percent of live delivery.
    sent: int = 0

    def __post_init__(self) -> None:
        self.feed = feed_name(self._log.epoch, self.user_id)
        self._cursor, self._head = self._start.cursor, self._start.cursor.seen

    @property
    def resumed(self) -> bool:
        """Whether the device continues from a cursor that its client had reached before."""
        return self._start.resumed

    @property
    def cursor(self) -> str:
        """The text of the present cursor."""
        return self._cursor.text(self.feed)

    def encode_with(self, encoder: Encoder[F]) -> None:
        """Send frames of this form from now on."""
        self._encoder = encoder

    def start(self) -> None:
        """Begin to send. Nothing that came since the device joined its room is missed."""
        self._task = asyncio.create_task(self._pull())

    def close(self) -> None:
        """Send nothing more, and leave the room."""
        self._closed = True
        self._on_close(self)
        if self._task is not None:
            self._task.cancel()

    def finish(self) -> None:
        """The feed has ended: send what waits, then end the connection, so that the client starts fresh."""
        self._closed = self._pulling = self._reading = True
        if self._task is not None:
            self._task.cancel()
        self._buffer.finish()

    def replay(self, generation_id: str, after: int | None) -> None:
        """Send this generation's events with a sequence above `after` again; ``None``: those never sent here."""
        if len(self._replays) >= MAX_REPLAYS:
            self._buffer.abort()
        else:
            self._replays.append((generation_id, after))
            self._start_pull()

    def offer(self, encoded: EncodedEntry, after: Cursor) -> None:
        """Take a live entry: put it if it is the next one and fits, otherwise read it from the log.

        `after` is the cursor after it.
        """
        position, seen = after.seen, self._cursor.seen
        if not self._pulling and position == seen + 1 and self._put(encoded):
            self._cursor = after
            return
        self.sent -= 1
        if position > seen:
            self._head = max(self._head, position)
            self._start_pull()

    def announce(self, name: str, data: bytes, waits: str | None) -> None:
        """Send an event that is not in the log, after the events before it. It is dropped if there is no room.

        `waits`: it is only true, and only sent, while this generation has not left its first stage. Of several such
        announcements that are held back, the last is sent.
        """
        if waits is not None:
            self._drop_announcements(waits)
        self._announcements.append(_Announcement(name, data, waits))
        del self._announcements[:-_MAX_ANNOUNCEMENTS]
        if not self._reading:
            self._put_announcements()

    def read_again(self) -> None:
        """Read the log: the follower may have missed entries."""
        self._must_read = True
        self._start_pull()

    async def flushed(self) -> None:
        """Wait until everything known has been sent and taken by the client, or the device is closed."""
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])
        await self._buffer.flushed()

    def _start_pull(self) -> None:
        if not self._pulling and not self._closed:
            self._pulling = True
            self.start()

    async def _pull(self) -> None:
        try:
            while self._must_read or self._cursor.seen < self._head or self._replays:
                if not await self._buffer.drained():
                    return
                self._reading = True
                if self._must_read or self._cursor.seen < self._head:
                    await self._read_page()
                else:
                    await self._replay(*self._replays[0])
                    del self._replays[0]
                    await asyncio.sleep(0)  # Let other clients run between two replays of this one.
                if self._closed:
                    return
                self._reading = False
                self._put_announcements()
            self._pulling = False  # No await since the loop's condition, so nothing can have come in between.
        except LogUnavailable:
            await asyncio.sleep(_RETRY_DELAY)
            self.start()
        except Exception as error:
            logger.error("a device could not be served: %s", type(error).__name__)
            self._buffer.abort()

    async def _read_page(self) -> None:
        cursor = self._cursor
        feed = await self._log.feed(self.user_id, after=cursor.seen, anchor=cursor.live, limit=PAGE)
        if self._closed:
            return
        if not cursor.usable(feed):
            self._buffer.abort()  # The history is gone. The client reconnects and learns it from its ack.
            self._closed = True
            return
        self._must_read = False
        self._head = max(self._head, feed.head)
        wanted, after_page = cursor.advance(feed)
        for entry, after in wanted:
            if not self._put_read(self._encoded(entry, after)):
                return  # Continue from here once there is room.
            self._cursor = after
        self._cursor = after_page
        if after_page.seen == cursor.seen < self._head:
            await asyncio.sleep(_RETRY_DELAY)  # Announced, but not readable yet.

    async def _replay(self, generation_id: str, after: int | None) -> None:
        history = await self._log.generation(generation_id)
        if history is None or history.user_id != self.user_id:
            return
        if after is None:
            # The feed from the start position has all generations that were unfinished there, and no others.
            end = history.events[-1].end
            if self.resumed or generation_id in self._replayed or end is None or end > self._start.cursor.live:
                return
        for entry in history.events[after or 0 :]:
            if entry.position > self._cursor.seen:
                return
            self._replayed.add(generation_id)
            # Sent out of feed order, with the newest cursor: a client's cursor must never move back.
            while not self._put_read(self._encoded(entry, self._cursor)):
                if not await self._buffer.drained():
                    self._closed = True
                    return

    def _encoded(self, entry: Logged, after: Cursor) -> EncodedEntry:
        """With the session's tag on cursors up to the head at the start; later cursors are the same for all devices."""
        tag = self._start.tag if after.live <= self._start.head else None
        return EncodedEntry(entry, after.text(self.feed, tag), self._quarantine)

    def _put(self, encoded: EncodedEntry) -> bool:
        """False: there is no room. An entry that cannot be encoded is skipped."""
        frame: F | None = encoded[self._encoder]
        if frame is not None and not self._buffer.offer(frame):
            return False
        if self._announcements and encoded.entry.sequence > 1:
            self._drop_announcements(encoded.entry.generation_id)
        return True

    def _put_read(self, encoded: EncodedEntry) -> bool:
        """The same for an entry that was read from the log."""
        taken = self._put(encoded)
        self.sent += taken
        return taken

    def _drop_announcements(self, waits: str) -> None:
        self._announcements = [each for each in self._announcements if each.waits != waits]

    def _put_announcements(self) -> None:
        for name, data, _ in self._announcements:
            self._buffer.offer(self._encoder.announcement(name, data))
        self._announcements.clear()


@dataclass(slots=True, eq=False)
class GenerationDevice(Device[F]):
    """A client of one generation: its cursor moves along the sequence of this generation instead of the feed.

    The connection ends after the terminal event, or when the generation is removed.
    """

    generation_id: str = field(kw_only=True)

    def offer(self, encoded: EncodedEntry, after: Cursor) -> None:
        """As `Device.offer`; entries of other generations are skipped."""
        if encoded.entry.generation_id != self.generation_id:
            self.sent -= 1
            return
        Device.offer(self, encoded, _cursor_after(encoded.entry))
        self._finish_after(encoded.entry)

    def announce(self, name: str, data: bytes, waits: str | None) -> None:
        """Nothing is announced to a client of one generation."""

    async def _read_page(self) -> None:
        history = await self._log.generation(self.generation_id)
        if self._closed:
            return
        if history is None:
            self._finish()
            return
        self._must_read = False
        last = history.events[-1]
        self._head = max(self._head, last.sequence)
        for entry in history.events[self._cursor.seen :]:
            if not self._put_read(EncodedEntry(entry, "", self._quarantine)):
                return
            self._cursor = _cursor_after(entry)
        self._finish_after(last)
        if last.sequence <= self._cursor.seen < self._head:
            await asyncio.sleep(_RETRY_DELAY)  # Announced, but not readable yet.

    def _finish_after(self, entry: Logged) -> None:
        """End the connection if this is the terminal event and nothing remains to be sent."""
        if entry.position == entry.end and entry.sequence <= self._cursor.seen:
            self._finish()

    def _finish(self) -> None:
        self._closed = True
        self._buffer.finish()


def _cursor_after(entry: Logged) -> Cursor:
    """Along the sequence of the entry's generation."""
    return Cursor(entry.sequence, entry.event_id, entry.sequence)
