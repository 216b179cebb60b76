"""Tells users where their waiting generations are in line."""

import asyncio
from dataclasses import dataclass
from typing import Final

from domain.delivery import Hub
from domain.events import QUEUE_POSITION
from domain.feed import Logged
from domain.ports.leases import Leases
from domain.ports.log import EventLog, Gap, Notice, Removed

#: Seconds between two looks at the lines: devices get at most one position of a generation a second.
_PAUSE: Final = 1.1


@dataclass(eq=False)
class QueuePositions:
    """Announces the position of each generation that has only been started, whenever it has changed."""

    log: EventLog
    leases: Leases
    hub: Hub

    def __post_init__(self) -> None:
        #: By generation that has only been started: its user, and its position as the user knows it.
        self._waiting: dict[str, tuple[str, int | None]] = {}
        self._missed_entries = True

    async def run(self) -> None:
        """Announce positions until cancelled."""
        async with self.log.follow(self._notice):
            self._missed_entries = True
            while True:
                while self._missed_entries:
                    await self._read_log()
                if self._waiting and self.hub.rooms:
                    await self._announce()
                await asyncio.sleep(_PAUSE)

    def _notice(self, notice: Notice) -> None:
        if isinstance(notice, Logged):
            if notice.sequence == 1:
                self._waiting[notice.generation_id] = notice.user_id, None
            elif notice.sequence == 2 and self._waiting.pop(notice.generation_id, None) is None:
                self._missed_entries = True  # It went on while the log was read.
        elif isinstance(notice, Removed):
            self._waiting.pop(notice.generation_id, None)
        elif isinstance(notice, Gap):
            self._missed_entries = True

    async def _read_log(self) -> None:
        self._missed_entries = False
        known, self._waiting = self._waiting, {}
        for history in await self.log.unfinished():
            if len(history.events) == 1:
                self._waiting[history.generation_id] = known.get(history.generation_id, (history.user_id, None))

    async def _announce(self) -> None:
        for generation_id, position in (await self.leases.positions()).items():
            user_id, known = self._waiting.get(generation_id, ("", position))
            if position != known:
                self._waiting[generation_id] = user_id, position
                data = {"generationId": generation_id, "queuePosition": position}
                self.hub.announce(user_id, QUEUE_POSITION, data, waits=generation_id)
