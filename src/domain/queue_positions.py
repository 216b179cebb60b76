"""Tells users where their waiting generations are in line."""

import asyncio
from dataclasses import dataclass
from typing import Final

from domain.delivery import Hub
from domain.events import QUEUE_POSITION
from domain.feed import Logged
from domain.ports.leases import Leases
from domain.ports.log import EventLog, Gap, Notice

#: Seconds between two looks at the lines: devices get at most one position of a generation a second.
_PAUSE: Final = 1.1


@dataclass(slots=True)
class _Waiting:
    """A generation that has only been started."""

    user_id: str
    #: As its user knows it.
    position: int | None = None


@dataclass(eq=False)
class QueuePositions:
    """Announces the position of each generation that has only been started, whenever it has changed."""

    log: EventLog
    leases: Leases
    hub: Hub

    def __post_init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        #: Of those that are not in `_waiting`: they went on while the log was read.
        self._begun: set[str] = set()
        self._missed_entries = True

    async def run(self) -> None:
        """Announce positions until cancelled."""
        async with self.log.follow(self._notice):
            self._missed_entries = True
            while True:
                if self._missed_entries:
                    await self._read_log()
                if self._waiting and self.hub.rooms:
                    await self._announce()
                await asyncio.sleep(_PAUSE)

    def _notice(self, notice: Notice) -> None:
        match notice:
            case Gap():
                self._missed_entries = True
            case Logged(user_id=user_id, generation_id=generation_id, sequence=1):
                self._waiting[generation_id] = _Waiting(user_id)
            case Logged(generation_id=generation_id, sequence=2) if generation_id not in self._waiting:
                self._begun.add(generation_id)
            case Logged(generation_id=generation_id):
                self._waiting.pop(generation_id, None)

    async def _read_log(self) -> None:
        self._missed_entries = False
        known, self._waiting, self._begun = self._waiting, {}, set()
        for history in await self.log.unfinished():
            generation_id = history.generation_id
            if len(history.events) == 1 and generation_id not in self._begun:
                self._waiting[generation_id] = known.get(generation_id) or _Waiting(history.user_id)
        self._begun.clear()

    async def _announce(self) -> None:
        positions = await self.leases.positions()
        for generation_id, waiting in self._waiting.items():
            position = positions.get(generation_id)
            if position is not None and position != waiting.position:
                waiting.position = position
                data = {"generationId": generation_id, "queuePosition": position}
                self.hub.announce(waiting.user_id, QUEUE_POSITION, data, waits=generation_id)
