"""Shows each user's feed on all of that user's devices.

A device is a cursor in its user's feed. One task reads the log for it (the pull) until nothing is missing; from
then on the projection, which follows the log, puts each event as it comes (live). Live is only the short cut
at the head, and holds to one rule: it puts the event at ``seen + 1``, and nothing else, and only while no pull
runs. Anything else (a hole, a slow reader, a follower that lost entries) starts the pull, which reads on from where
the device is. Since a pull puts what it read contiguously, and neither waits between comparing and putting,
there is no gap and no duplicate, however late the log's entries come.

The projection decides nothing and stores nothing: what is lost with it is read again.
"""

import asyncio
import logging
from collections import deque
from typing import Final, Protocol

from engineio.packet import MESSAGE, Packet

from domain.errors import LogUnavailable
from domain.feed import Cursor, Logged, feed_name
from domain.feed_sessions import Beginning
from domain.ports import EventLog, Lost
from domain.quarantine import Quarantine
from domain.readiness import FOLLOWER

logger = logging.getLogger(__name__)

#: Entries read from the log at a time.
PAGE: Final = 64

#: How many wishes to replay one client may have open.
MAX_REPLAYS: Final = 1_000

#: Seconds before a log that did not answer, or does not yet show what has been announced, is read again.
_AGAIN: Final = 0.1


class Outbox(Protocol):
    """Where frames wait for a client: `adapters.realtime.engineio_server.EngineSocket`."""

    def has_room(self, frame: Packet) -> bool:
        """Whether this frame may wait here too."""

    def put(self, frame: Packet) -> None:
        """Queue a frame, without waiting."""

    async def drained(self, *, events: int = ..., size: int = ...) -> bool:
        """Wait until the client has taken most of it; False where it is gone."""

    def abort(self) -> None:
        """End the transport."""


class Frames:
    """One event, ready to be sent: each form is made once for however many devices."""

    __slots__ = ("_cursor", "_forms", "entry")

    def __init__(self, entry: Logged, cursor: str) -> None:
        self.entry = entry
        self._cursor = cursor
        self._forms: list[Packet | None] = [None, None]

    def form(self, inline: bool) -> Packet:
        """The frame with the cursor as a last argument, or `inline` as a key of the event."""
        frame = self._forms[inline]
        if frame is None:
            assert self.entry.event is not None
            name, event = self.entry.name, self.entry.event.decode()
            if inline:
                data = f'2["{name}",{event[:-1]},"cursor":"{self._cursor}"}}]'
            else:
                data = f'2["{name}",{event},"{self._cursor}"]'
            frame = self._forms[inline] = Packet(MESSAGE, data=data)
        return frame


class Device:
    """One socket of one user. Made by `Projection.attach`."""

    def __init__(
        self, projection: "Projection", user_id: str, outbox: Outbox, beginning: Beginning, *, inline: bool
    ) -> None:
        self.user_id = user_id
        #: Whether the device goes on from a place it had reached before.
        self.resumed = beginning.resumed
        #: The name of its feed, in the texts of its cursors.
        self.feed = feed_name(projection.log.epoch, user_id)
        self._projection = projection
        self._outbox = outbox
        self._inline = inline
        self._beginning = beginning
        self._cursor = beginning.cursor
        #: The newest position that is known of.
        self._head = beginning.cursor.seen
        #: The log has to be read, whatever is known of the head.
        self._unread = True
        self._pulling = True
        self._replays: deque[tuple[str, int | None]] = deque()
        self._replayed: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def cursor(self) -> str:
        """Where the device is."""
        return self._cursor.text(self.feed)

    def start(self) -> None:
        """Begin to send. What came since the device joined has not been missed."""
        self._task = asyncio.create_task(self._run())

    def close(self) -> None:
        """Send nothing more."""
        self._closed = True
        self._projection.detach(self)
        if self._task is not None:
            self._task.cancel()

    def replay(self, generation_id: str, after: int | None) -> None:
        """Send this generation's events over `after` again, or, without it, those that were never sent here."""
        if len(self._replays) >= MAX_REPLAYS:
            self._outbox.abort()
        else:
            self._replays.append((generation_id, after))
            self._pull()

    def offer(self, entry: Logged, frames: Frames) -> None:
        """Take a live event: put it, or have it read."""
        self._head = max(self._head, entry.position)
        if self._pulling or entry.position <= self._cursor.seen:
            return
        frame = self._projection.frame(frames, inline=self._inline)
        if entry.position == self._cursor.seen + 1 and (frame is None or self._outbox.has_room(frame)):
            if frame is not None:
                self._outbox.put(frame)
            self._cursor = Cursor(entry.position, entry.event_id, entry.position)
        else:
            self._pull()

    def read_again(self) -> None:
        """Something may have been missed."""
        self._unread = True
        self._pull()

    async def settled(self) -> None:
        """Wait until everything known has been sent and taken, or the device is closed."""
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])
        await self._outbox.drained(events=0, size=0)

    def _pull(self) -> None:
        if not self._pulling and not self._closed:
            self._pulling = True
            self.start()

    async def _run(self) -> None:
        try:
            while self._unread or self._cursor.seen < self._head or self._replays:
                if not await self._outbox.drained():
                    return
                if self._unread or self._cursor.seen < self._head:
                    await self._read()
                else:
                    await self._replay(*self._replays[0])
                    self._replays.popleft()
                    await asyncio.sleep(0)  # Others have their turn between one client's wishes.
                if self._closed:
                    return
            self._pulling = False  # No await since the loop's condition: nothing can have come in between.
        except LogUnavailable:
            await asyncio.sleep(_AGAIN)
            self.start()
        except Exception as error:
            logger.error("a device could not be served: %s", type(error).__name__)
            self._outbox.abort()

    async def _read(self) -> None:
        log, cursor = self._projection.log, self._cursor
        feed = await log.feed(self.user_id, after=cursor.seen, anchor=cursor.live, limit=PAGE)
        if self._closed:
            return
        if not cursor.usable(feed):
            self._outbox.abort()  # The past is gone; the client comes back and is told so.
            self._closed = True
            return
        self._unread = False
        self._head = max(self._head, feed.head)
        wanted, after = cursor.advance(feed)
        for entry, behind in wanted:
            if not self._put(entry, behind):
                return  # Read on from here once there is room.
            self._cursor = behind
        self._cursor = after
        if after.seen == cursor.seen < self._head:
            await asyncio.sleep(_AGAIN)  # Announced, and not to be read yet.

    async def _replay(self, generation_id: str, after: int | None) -> None:
        history = await self._projection.log.generation(generation_id)
        if history is None or history.user_id != self.user_id:
            return
        if after is None:
            # What came by itself began with what still ran at the base; what had ended by then was left out.
            end = history.events[-1].end
            if self.resumed or generation_id in self._replayed or end is None or end > self._beginning.cursor.live:
                return
        for entry in history.events[after or 0 :]:
            if entry.position > self._cursor.seen:
                return
            self._replayed.add(generation_id)
            # Out of feed order, so with the newest cursor: what a client remembers never goes back.
            while not self._put(entry, self._cursor):
                if not await self._outbox.drained():
                    self._closed = True
                    return

    def _text(self, cursor: Cursor) -> str:
        """What the client is told: tagged up to where the feed ended when it began, and beyond that as live."""
        return cursor.text(self.feed, self._beginning.tag if cursor.live <= self._beginning.head else None)

    def _put(self, entry: Logged, behind: Cursor) -> bool:
        frame = self._projection.frame(Frames(entry, self._text(behind)), inline=self._inline)
        if frame is None:
            return True
        if not self._outbox.has_room(frame):
            return False
        self._outbox.put(frame)
        return True


class Projection:
    """The devices of all users, and the one follower of the log."""

    def __init__(self, log: EventLog, quarantine: Quarantine) -> None:
        self.log = log
        self._quarantine = quarantine
        #: ``user:<id>`` rooms, by user id. A room is there as long as somebody is in it.
        self.rooms: dict[str, set[Device]] = {}

    async def run(self) -> None:
        """Follow the log until cancelled."""
        async with self.log.follow(self.deliver):
            self.deliver(Lost())  # What came before, also where the following had failed, has to be read.
            await asyncio.get_running_loop().create_future()

    def attach(self, user_id: str, outbox: Outbox, beginning: Beginning, *, inline: bool) -> Device:
        """A device that joins its user's room now, and sends once it is started.

        Where it is resumed, all up to its cursor counts as sent. `inline`: each event carries its cursor as a
        key instead of as a further argument.
        """
        device = Device(self, user_id, outbox, beginning, inline=inline)
        self.rooms.setdefault(user_id, set()).add(device)
        return device

    def devices(self, user_id: str) -> int:
        """How many devices this user has."""
        return len(self.rooms.get(user_id, ()))

    def detach(self, device: Device) -> None:
        """Take the device out of its room."""
        room = self.rooms.get(device.user_id)
        if room is not None:
            room.discard(device)
            if not room:
                del self.rooms[device.user_id]

    def deliver(self, entry: Logged | Lost) -> None:
        """Hand one entry of the log to the devices of its user, in one pass."""
        if isinstance(entry, Lost):
            for device in self._devices():
                device.read_again()
        elif room := self.rooms.get(entry.user_id):
            feed = next(iter(room)).feed
            frames = Frames(entry, Cursor(entry.position, entry.event_id, entry.position).text(feed))
            for device in room:
                device.offer(entry, frames)

    def frame(self, frames: Frames, *, inline: bool) -> Packet | None:
        """The frame of this form; ``None`` where the event cannot be sent. Then it ends its generation."""
        try:
            return frames.form(inline)
        except Exception as error:
            self._quarantine.put(frames.entry.generation_id, FOLLOWER, error)
            return None

    async def settled(self) -> None:
        """Wait until every device has been sent, and has taken, everything known."""
        await asyncio.gather(*(device.settled() for device in self._devices()))

    def _devices(self) -> list[Device]:
        return [device for room in self.rooms.values() for device in room]
