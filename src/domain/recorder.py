"""Moves generations: the machine decides, the log appends, and only then the move has happened."""

import asyncio
from datetime import datetime
from typing import Any, Final

from domain.errors import Failure, LogUnavailable
from domain.events import encode, event_name
from domain.generation import Generation
from domain.ports import Append, Clock, Entropy, EventLog, Start
from domain.stages import FAILED

#: What each Socket.IO event does to its owner's balance.
_CREDIT: Final = {"generation_started": -1, "generation_completed": 0, "generation_failed": 1}

#: Seconds between two tries of one append, growing to the last.
_PAUSES: Final = (0.05, 0.1, 0.2, 0.5, 1.0)


class Recorder:
    """The one writer of events."""

    def __init__(self, log: EventLog, clock: Clock, entropy: Entropy, *, patience: float = 60) -> None:
        """`patience` is how many seconds an unavailable log is asked again, with the same event."""
        self._log = log
        self._clock = clock
        self._entropy = entropy
        self._patience = patience

    async def begin(self, generation: Generation, start: Start, not_after: datetime, **facts: Any) -> Generation:
        """Append the first event, in one attempt: whoever asked is waiting. Raises as `EventLog.append`."""
        append, after = self._prepare(generation, "started", facts, start=start, not_after=not_after)
        await self._log.append(append)
        return after

    async def move(self, generation: Generation, status: str, **facts: Any) -> Generation:
        """Append the next event, and return the generation as it then is.

        Raises:
            IllegalTransition: the machine does not allow it; nothing was appended.
            Conflict: somebody else has moved this generation.
            LogUnavailable: the log did not answer, however often asked.
        """
        append, after = self._prepare(generation, status, facts)
        waited, tries = 0.0, 0
        while True:
            try:
                await self._log.append(append)
            except LogUnavailable:
                pause = _PAUSES[min(tries, len(_PAUSES) - 1)]
                if waited + pause > self._patience:
                    raise
                await asyncio.sleep(pause)
                waited, tries = waited + pause, tries + 1
            else:
                return after

    async def fail(self, generation: Generation, failure: Failure) -> Generation:
        """End the generation in ``failed``. Raises as `move`."""
        return await self.move(
            generation, FAILED, error=failure.sentence, code=failure.code, retryable=failure.retryable
        )

    def _prepare(
        self,
        generation: Generation,
        status: str,
        facts: dict[str, Any],
        start: Start | None = None,
        not_after: datetime | None = None,
    ) -> tuple[Append, Generation]:
        at = self._clock()
        event, after = generation.propose(status, at, **facts)
        name = event_name(status)
        append = Append(
            user_id=generation.user_id,
            generation_id=generation.generation_id,
            sequence=event.sequence,
            event_id=self._entropy.event_id(),
            event=encode(event),
            name=name,
            at=at,
            credit=_CREDIT.get(name),
            terminal=after.finished,
            start=start,
            not_after=not_after,
        )
        return append, after
