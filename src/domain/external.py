"""Generations whose work is done by a pipeline of the user's own, which reports each stage here.

The table and the log decide as ever; only who does the work is different. A report that is sent again, because
its answer was lost, is recognised without anything being remembered for it: its event id is made from its content.
"""

import asyncio
import contextlib
import hashlib
import heapq
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from domain.errors import Conflict, Failure, LogUnavailable, NotExternal
from domain.feed import Logged
from domain.generation import Generation
from domain.ports.log import EventLog, History
from domain.ports.system import Clock
from domain.quarantine import Quarantine
from domain.recorder import Recorder
from domain.rehydrate import UNREADABLE, generation_of, is_external, order_of
from domain.stages import FAILED

#: Seconds between two looks at who has been silent for too long, at most.
_LOOK: Final = 1.0


class ExternalWork:
    """Takes reports, and ends what has not been reported on for `deadline` seconds."""

    def __init__(
        self, log: EventLog, recorder: Recorder, quarantine: Quarantine, clock: Clock, deadline: float
    ) -> None:
        self._log = log
        self._quarantine = quarantine
        self._recorder = recorder
        self._clock = clock
        self._deadline = timedelta(seconds=deadline)
        self._pause = min(_LOOK, deadline / 10)
        #: By when each has to be looked at. What the log says then counts, so nothing is changed in between.
        self._due: list[tuple[datetime, str]] = []

    def watch(self, generation: Generation) -> None:
        """From now on it has to be reported on."""
        due = datetime.fromisoformat(generation.updated_at) + self._deadline
        heapq.heappush(self._due, (due, generation.generation_id))

    async def run(self) -> None:
        """Watch what is unfinished, and go on until cancelled."""
        for history in await self._log.unfinished():
            if is_external(history):
                self._due.append((self._clock(), history.generation_id))
        heapq.heapify(self._due)
        while True:
            await asyncio.sleep(self._pause)
            while self._due and self._due[0][0] <= self._clock():
                await self._look(heapq.heappop(self._due)[1])

    async def settled(self) -> None:
        """Wait until nothing is left to be reported on."""
        while True:
            with contextlib.suppress(LogUnavailable):
                if not any(map(is_external, await self._log.unfinished())):
                    return
            await asyncio.sleep(self._pause / 4)

    async def report(
        self, history: History, status: str, fields: Mapping[str, Any], *, content: bytes, sequence: int | None = None
    ) -> Logged:
        """Move the generation on, and return the event. `content` is all that was said, `sequence` included.

        Raises:
            NotExternal: the service does the work itself.
            IllegalTransition, InvalidEventField: the machine does not allow it.
            Conflict: the event would not get that sequence.
            LogUnavailable
        """
        if not order_of(history).external:
            raise NotExternal
        while True:
            last = history.events[-1]
            if last.event_id == _event_id(last.generation_id, last.sequence, content):
                return last
            if sequence not in (None, last.sequence + 1):
                raise Conflict(sequence or 0, last.sequence)
            generation = generation_of(history)
            generation.check_fields(status, fields)
            complete = _with_failure(generation, status, fields)
            event_id = _event_id(last.generation_id, last.sequence + 1, content)
            try:
                return await self._recorder.report(generation, status, complete, event_id)
            except Conflict:
                again = await self._log.generation(last.generation_id)
                if sequence is not None or again is None:
                    raise
                history = again  # Somebody else was faster; judge it where the generation is now.

    async def _look(self, generation_id: str) -> None:
        try:
            history = await self._log.generation(generation_id)
            if history is None:
                return
            generation = generation_of(history)
            silent_until = datetime.fromisoformat(generation.updated_at) + self._deadline
            if not generation.finished and silent_until > self._clock():
                self.watch(generation)
            elif not generation.finished:
                await self._recorder.end(generation_id, Failure("deadline_exceeded"))
        except LogUnavailable:
            heapq.heappush(self._due, (self._clock() + timedelta(seconds=_LOOK), generation_id))
        except UNREADABLE as error:
            await self._quarantine.end(generation_id, "external", error)


def _with_failure(generation: Generation, status: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields, completed by the defaults for a failure that the report does not explain."""
    code = fields.get("code")
    sentence = fields.get("error") or (None if code else "Something went wrong.")
    failure = Failure(code or "internal", sentence, retryable=None if code else False)
    if status == FAILED:
        return {**fields, **generation.failing(failure)}
    ending, defaults = generation.ending(failure)
    return {**defaults, **fields} if ending == status else fields


def _event_id(generation_id: str, sequence: int, content: bytes) -> int:
    digest = hashlib.blake2b(b"%b.%d.%b" % (generation_id.encode(), sequence, content), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
