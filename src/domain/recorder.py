"""Moves generations: the machine decides, the log appends, and only then the move has happened."""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from domain.errors import Conflict, Failure, LogUnavailable
from domain.events import encode, event_name, images_of
from domain.feed import Logged
from domain.generation import Generation
from domain.ports.log import Append, EventLog, Start
from domain.ports.system import Clock, Entropy
from domain.rehydrate import UNREADABLE, generation_of, readable_part_of
from domain.stages import FLOWS

#: Seconds for which one append may go unanswered, and between two tries of it, growing to the last.
_UNANSWERED: Final = 2.0
_PAUSES: Final = (0.05, 0.1, 0.2, 0.5, 1.0)

#: Seconds for which a log that does not answer is asked again while somebody waits for the answer.
ATTENTION: Final = 2.0

_NONE: Final[Mapping[str, Any]] = MappingProxyType({})


class Recorder:
    """The one writer of events. An append whose reply was lost is tried again as the same event."""

    def __init__(self, log: EventLog, clock: Clock, entropy: Entropy, *, patience: float = math.inf) -> None:
        """`patience`: seconds for which a log that does not answer is asked again where nobody waits."""
        self._log = log
        self._clock = clock
        self._entropy = entropy
        self._patience = patience

    async def begin(self, generation: Generation, start: Start, fields: Mapping[str, Any] = _NONE) -> Generation:
        """Append the first event. Raises as `EventLog.append`.

        After `LogUnavailable` it may be in the log, but does not come into it later than that.
        """
        at = self._clock()
        append, after = self._prepare(generation, "started", fields, at, start, at + timedelta(seconds=ATTENTION))
        await self._append(append, ATTENTION)
        return after

    async def move(
        self, generation: Generation, status: str, fields: Mapping[str, Any] = _NONE, *, free: bool = False
    ) -> Generation:
        """Append the next event, and return the generation as it then is. `free`: see `domain.ports.log.Append`.

        Raises:
            IllegalTransition: the machine does not allow it; nothing was appended.
            Conflict: somebody else has moved this generation.
            LogUnavailable: the log did not answer, however often asked.
        """
        append, after = self._prepare(generation, status, fields, self._clock())
        await self._append(replace(append, free=free), self._patience)
        return after

    async def report(self, generation: Generation, status: str, fields: Mapping[str, Any], event_id: int) -> Logged:
        """Append the next event as `event_id`, for somebody who waits for the answer. Raises as `move`."""
        append, _ = self._prepare(generation, status, fields, self._clock())
        return await self._append(replace(append, event_id=event_id), ATTENTION)

    async def end(self, generation_id: str, failure: Failure) -> bool:
        """End a generation with this failure, whoever works on it. False: it had ended, or is not there.

        Raises:
            LogUnavailable: the log did not answer in time.
        """
        while history := await self._log.generation(generation_id):
            try:
                generation = generation_of(history)
            except UNREADABLE:  # Stored data that cannot be read. What can be is enough to end it.
                generation = readable_part_of(history)
            if generation.finished:
                return False
            append, _ = self._prepare(generation, *generation.ending(failure), self._clock())
            try:
                await self._append(append, ATTENTION)
            except Conflict:
                continue  # It has just moved on; end it where it is now.
            return True
        return False

    def _prepare(
        self,
        generation: Generation,
        status: str,
        fields: Mapping[str, Any],
        at: datetime,
        start: Start | None = None,
        not_after: datetime | None = None,
    ) -> tuple[Append, Generation]:
        event, after = generation.propose(status, at, **fields)
        append = Append(
            user_id=generation.user_id,
            generation_id=generation.generation_id,
            sequence=event.sequence,
            event_id=self._entropy.event_id(),
            event=encode(event),
            name=event_name(status),
            at=at,
            credit=FLOWS[generation.kind][status].credit,
            terminal=after.finished,
            start=start,
            not_after=not_after,
            images=images_of(event),
        )
        return append, after

    async def _append(self, append: Append, patience: float) -> Logged:
        loop = asyncio.get_running_loop()
        given_up, tries = loop.time() + patience, 0
        while True:
            try:
                async with asyncio.timeout(_UNANSWERED):
                    return await self._log.append(append)
            except (LogUnavailable, TimeoutError):
                pause = _PAUSES[min(tries, len(_PAUSES) - 1)]
                if loop.time() + pause > given_up:
                    raise LogUnavailable from None
            await asyncio.sleep(pause)
            tries += 1
