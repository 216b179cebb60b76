"""Live delivery: the hub follows the log and hands each entry to the devices of its user.

The hub decides nothing and stores nothing. Whatever it loses, the devices read from the log again.
"""

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic_core import to_json

from domain.device import Device, EncodedEntry, Encoder, F, GenerationDevice, SendBuffer
from domain.events import GENERATION_REMOVED
from domain.feed import Cursor, Logged
from domain.feed_sessions import StartPosition
from domain.ports.log import EventLog, Gap, Notice, Removed
from domain.ports.quotas import Quotas
from domain.quarantine import Quarantine

logger = logging.getLogger(__name__)


class Hub:
    """The devices of all users on this node, and the one follower of the log."""

    def __init__(
        self, log: EventLog, quarantine: Quarantine, quotas: Quotas | None = None, max_per_user: int | None = None
    ) -> None:
        """`max_per_user`: the devices that a user may have, by these `quotas`; ``None``: any number."""
        self._quotas = quotas
        self._max_per_user = max_per_user
        self._log = log
        self._quarantine = quarantine
        #: Devices by user id. A room exists as long as a device is in it.
        self.rooms: dict[str, set[Device[Any]]] = {}
        #: By devices that are gone, and live by all others; see `Device.sent`.
        self._sent = 0

    @property
    def events_sent(self) -> int:
        """How many events of the log this node has sent."""
        return self._sent + sum(device.sent for device in self._devices())

    async def run(self) -> None:
        """Follow the log until cancelled."""
        async with self._log.follow(self.deliver):
            self.deliver(Gap())  # Entries from before, for example while the follower had failed, must be read.
            await asyncio.get_running_loop().create_future()

    async def admit(self, user_id: str, *, replaces: bool = False) -> bool:
        """Whether the user may have one more device: then it must join at once, or `leave`. Raises `LogUnavailable`.

        `replaces`: it takes the place of another one, which is about to leave.
        """
        if self._quotas is None or self._max_per_user is None:
            return True
        here, most = partial(self.device_count, user_id), self._max_per_user + replaces
        if not (admitted := await self._quotas.admit_device(user_id, here, most)):
            logger.warning("a connection is refused: the limit of sockets per user is reached")
        return admitted

    def leave(self, user_id: str) -> None:
        """A device of this user has left, or has not joined although it was admitted."""
        if self._quotas is not None and self._max_per_user is not None:
            self._quotas.device_left(user_id, partial(self.device_count, user_id))

    def join(self, user_id: str, buffer: SendBuffer[F], encoder: Encoder[F], start: StartPosition) -> Device[F]:
        """A device that is in its user's room from now on, and sends once it is started."""
        return self._add(Device(self._log, self._quarantine, user_id, buffer, encoder, start, self._remove))

    def join_generation(
        self, user_id: str, buffer: SendBuffer[F], encoder: Encoder[F], generation_id: str, after: int
    ) -> Device[F]:
        """As `join`, for the events of one generation of this user with a sequence above `after`."""
        start = StartPosition(Cursor(after, 0, after), True, after, None)
        every = self._log, self._quarantine, user_id, buffer, encoder, start, self._remove
        return self._add(GenerationDevice(*every, generation_id=generation_id))

    def device_count(self, user_id: str) -> int:
        """How many devices this user has."""
        return len(self.rooms.get(user_id, ()))

    def announce(self, user_id: str, name: str, data: Mapping[str, Any], *, waits: str | None = None) -> None:
        """Send an event that is not in the log to the user's devices on this node.

        It has no cursor and is not replayed. A device whose buffer is full does not get it. `waits`: see
        `Device.announce`.
        """
        if room := self.rooms.get(user_id):
            text = to_json(data)
            for device in room:
                device.announce(name, text, waits)

    def deliver(self, entry: Notice) -> None:
        """Hand one entry of the log to the devices of its user, in one pass."""
        if isinstance(entry, Logged):
            if room := self.rooms.get(entry.user_id):
                after = Cursor(entry.position, entry.event_id, entry.position)
                encoded = EncodedEntry(entry, after.text(next(iter(room)).feed), self._quarantine)
                self._sent += len(room)
                for device in room:
                    device.offer(encoded, after)
        elif isinstance(entry, Gap):
            for device in self._devices():
                device.read_again()
        elif isinstance(entry, Removed):
            self.announce(entry.user_id, GENERATION_REMOVED, {"generationId": entry.generation_id})
        else:
            for device in list(self.rooms.get(entry.user_id, ())):  # A device may leave the room at once.
                device.finish()

    async def flushed(self) -> None:
        """Wait until every device has been sent everything known, and its client has taken it."""
        await asyncio.gather(*(device.flushed() for device in self._devices()))

    def _add(self, device: Device[F]) -> Device[F]:
        self.rooms.setdefault(device.user_id, set()).add(device)
        return device

    def _remove(self, device: Device[Any]) -> None:
        room = self.rooms.get(device.user_id)
        if room is not None and device in room:
            self._sent += device.sent
            room.remove(device)
            if not room:
                del self.rooms[device.user_id]
            self.leave(device.user_id)

    def _devices(self) -> list[Device[Any]]:
        return [device for room in self.rooms.values() for device in room]
