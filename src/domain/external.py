"""Generations whose work is done by their owner's own pipeline, which reports each stage here.

A report that is repeated because its answer was lost is recognised by its event id, a digest of its content.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from domain.errors import Conflict, Failure, LogUnavailable, NotExternal
from domain.feed import Logged
from domain.generation import Generation
from domain.ports.leases import Leases
from domain.ports.log import EventLog, Gap, History, Notice, Removed
from domain.ports.system import Clock
from domain.quarantine import Quarantine
from domain.recorder import Recorder
from domain.rehydrate import UNREADABLE, generation_of, is_external, request_of
from domain.stages import FAILED, FLOWS

#: The longest pause in seconds between two checks for missed deadlines.
_PAUSE: Final = 1.0

#: Seconds after which another node acts on the deadlines if this one does not.
_CHORE: Final = 10.0


@dataclass(eq=False)
class ExternalWork:
    """Takes reports, and ends generations without one for `deadline` seconds."""

    log: EventLog
    leases: Leases
    recorder: Recorder
    quarantine: Quarantine
    clock: Clock
    deadline: float

    def __post_init__(self) -> None:
        self._pause = min(_PAUSE, self.deadline / 10)
        #: When to check each unfinished generation, external or not: no later than its deadline, which the log has.
        self._due: dict[str, datetime] = {}
        self._missed_entries = True

    async def run(self) -> None:
        """Check the deadlines until cancelled. All nodes know what is due; one of them acts on it."""
        async with self.log.follow(self._notice):
            self._missed_entries = True
            while True:
                if self._missed_entries:
                    self._missed_entries = False
                    for history in await self.log.unfinished():
                        if is_external(history):
                            self._due.setdefault(history.generation_id, self.clock())
                await asyncio.sleep(self._pause)
                if await self.leases.claim_chore("external", _CHORE):
                    now = self.clock()
                    for generation_id in [each for each, due in self._due.items() if due <= now]:
                        await self._check(generation_id)

    def _notice(self, entry: Notice) -> None:
        if isinstance(entry, Logged) and entry.end is None:
            if entry.generation_id not in self._due:
                self._due[entry.generation_id] = self.clock() + timedelta(seconds=self.deadline)
        elif isinstance(entry, Gap):
            self._missed_entries = True
        elif isinstance(entry, Logged | Removed):
            self._due.pop(entry.generation_id, None)

    async def idle(self) -> None:
        """Wait until every external generation has finished."""
        while True:
            with contextlib.suppress(LogUnavailable):
                if not any(map(is_external, await self.log.unfinished())):
                    return
            await asyncio.sleep(self._pause / 4)

    async def report(
        self, history: History, status: str, fields: Mapping[str, Any], *, content: bytes, sequence: int | None = None
    ) -> Logged:
        """Append the next event and return it. `content` is the whole report; `sequence`, if given, must be the next.

        Raises:
            NotExternal: the service does the work itself.
            IllegalTransition, InvalidEventField: the machine does not allow it.
            Conflict: `sequence` is not the next one.
            LogUnavailable
        """
        while True:
            generation = generation_of(history)
            if not generation.request.external:
                raise NotExternal
            last = history.events[-1]
            if last.event_id == _event_id(last.generation_id, last.sequence, content):
                return last
            if sequence not in (None, last.sequence + 1):
                raise Conflict
            generation.check_fields(status, fields)
            complete = _with_failure(generation, status, fields)
            event_id = _event_id(last.generation_id, last.sequence + 1, content)
            try:
                return await self.recorder.report(generation, status, complete, event_id)
            except Conflict:
                again = await self.log.summary(last.generation_id)
                if sequence is not None or again is None:
                    raise
                history = again  # A concurrent report was faster: try again after it.

    async def _check(self, generation_id: str) -> None:
        # The next event sets it again. Without it, the generation has ended while others were checked.
        if self._due.pop(generation_id, None) is None:
            return
        try:
            history = await self.log.summary(generation_id)
            if history is None or (generation := generation_of(history)).finished or not request_of(history).external:
                return
            due = datetime.fromisoformat(generation.updated_at) + timedelta(seconds=self.deadline)
            if due > self.clock():
                self._due.setdefault(generation_id, due)
            else:
                await self.recorder.end(generation_id, Failure("deadline_exceeded"))
        except LogUnavailable:
            self._due.setdefault(generation_id, self.clock() + timedelta(seconds=_PAUSE))
        except UNREADABLE as error:
            await self.quarantine.end(generation_id, "external", error)


def _with_failure(generation: Generation, status: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields, completed by the defaults for a failure that the report does not explain."""
    if not FLOWS[generation.kind][status].terminal:
        return fields
    code = fields.get("code")
    sentence = fields.get("error") or (None if code else "Something went wrong.")
    failure = Failure(code or "internal", sentence, retryable=None if code else False)
    if status == FAILED:
        return {**fields, **failure.fields}
    ending, defaults = generation.ending(failure)
    return {**defaults, **fields} if ending == status else fields


def _event_id(generation_id: str, sequence: int, content: bytes) -> int:
    digest = hashlib.blake2b(b"%b.%d.%b" % (generation_id.encode(), sequence, content), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
