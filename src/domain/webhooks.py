"""Tells the webhook of every end of a generation, at least once: from the log, which keeps what is yet to be told.

What the log says counts, and is asked again and again; all that is remembered here is what has failed, and when it is
due again. So a restart loses nothing where the log is durable, and what is removed is not told any more.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from pydantic_core import to_json

from domain.errors import LogUnavailable
from domain.events import decode
from domain.feed import Logged
from domain.ports.log import EventLog, Gap
from domain.ports.webhook_outbox import WebhookOutbox
from domain.rehydrate import UNREADABLE
from domain.supervisor import being_cancelled

logger = logging.getLogger(__name__)

#: Messages posted at once, and how many of them may have failed before: what never gets through leaves room for others.
_PARALLEL: Final = 8
_AGAIN_PARALLEL: Final = 4

#: Once so many wait to be posted again, nothing new is begun: it is not this or that message that is refused.
_MOST_FAILED: Final = 10_000
#: Of these, how many are read from the log in a second.
_READ: Final = 10_000

#: Seconds that a receiver's wish to be left alone is respected, at most.
_MOST_ASKED: Final = 3600

#: Seconds before a log that did not answer is asked again.
_AGAIN: Final = 0.2


class NotDelivered(Exception):
    """The receiver has not taken a message. The text says why, for the operator."""

    def __init__(self, reason: str, *, after: float | None = None, gone: bool = False) -> None:
        super().__init__(reason)
        #: Seconds for which the receiver asks to be left alone.
        self.after = after
        #: The receiver does not want any message any more.
        self.gone = gone


class Poster(Protocol):
    """Brings messages to the receiver."""

    async def post(self, message_id: str, body: bytes) -> None:
        """Post the message, one attempt. Having returned, it has been taken.

        Raises:
            NotDelivered
        """


class _Failed(NamedTuple):
    """A message that was not taken."""

    attempts: int
    #: When it is posted again, by the event loop's clock.
    due: float


class Webhooks:
    """Posts every terminal event until it is taken: the oldest first, a few at once.

    A receiver that is gone is not called again by this process. The log keeps what it was not sent.
    """

    def __init__(
        self,
        log: EventLog,
        outbox: WebhookOutbox,
        poster: Poster,
        chance: Callable[[], float],
        *,
        backoff: float = 1,
        longest: float = 300,
    ) -> None:
        """Nobody else delivers from this outbox.

        `backoff`: seconds after the first attempt, twice as much after each further one, up to `longest`, but for a
        random part: up to a half of them is left out. `chance`: random numbers from 0 to 1.
        """
        self._log = log
        self._outbox = outbox
        self._poster = poster
        self._chance = chance
        self._backoff = backoff
        self._longest = longest
        self._gone = False
        self._failed: dict[str, _Failed] = {}
        #: By generation id: whether it has failed before.
        self._under_way: dict[str, bool] = {}
        self._woken = asyncio.Event()
        self._settled = asyncio.Event()

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with self._log.follow(self._notice), asyncio.TaskGroup() as posts:
            while True:
                self._woken.clear()
                due = await self._begin(posts)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._woken.wait()
                await asyncio.sleep(len(self._failed) / _READ)

    async def settled(self) -> None:
        """Wait until every event has been posted once, taken or not."""
        await self._settled.wait()

    def _notice(self, entry: Logged | Gap) -> None:
        if isinstance(entry, Gap) or entry.end == entry.position:
            self._settled.clear()
            self._woken.set()

    async def _begin(self, posts: asyncio.TaskGroup) -> float | None:
        """Begin to post what is due and has room. Return when the next is due."""
        if self._gone:
            self._settled.set()
            return None
        clock = asyncio.get_running_loop().time
        # What is taken while the log is read may still be told of.
        under_way = set(self._under_way)
        try:
            entries = await self._outbox.undelivered(min(len(self._failed), _MOST_FAILED) + 2 * _PARALLEL)
        except LogUnavailable:
            return clock() + _AGAIN
        known = {entry.generation_id for entry in entries}
        self._failed = {each: failed for each, failed in self._failed.items() if each in known}
        if known <= self._failed.keys() and not self._woken.is_set():
            self._settled.set()
        now, due = clock(), None
        # First what has waited longest to be posted again, as far as there is room for that, and then what is new.
        for entry in sorted(entries, key=self._due):
            failed = self._failed.get(entry.generation_id)
            if entry.generation_id in under_way:
                continue
            if failed is not None and failed.due > now:
                due = failed.due if due is None else min(due, failed.due)
            elif self._has_room(again=failed is not None):
                self._under_way[entry.generation_id] = failed is not None
                posts.create_task(self._deliver(entry, 1 if failed is None else failed.attempts + 1))
        return due

    def _due(self, entry: Logged) -> float:
        failed = self._failed.get(entry.generation_id)
        return math.inf if failed is None else failed.due

    def _has_room(self, *, again: bool) -> bool:
        if again and sum(self._under_way.values()) >= _AGAIN_PARALLEL:
            return False
        return len(self._under_way) < _PARALLEL

    async def _deliver(self, entry: Logged, attempt: int) -> None:
        try:
            if (message := self._encoded(entry)) is not None:
                await self._poster.post(*message)
            await self._mark(entry.generation_id)
        except NotDelivered as failure:
            if failure.gone:
                self._give_up(str(failure))
            else:
                self._put_off(entry, attempt, str(failure), failure.after or 0)
        except (Exception, asyncio.CancelledError) as error:
            if being_cancelled():
                raise
            self._put_off(entry, attempt, type(error).__name__, 0)
        finally:
            del self._under_way[entry.generation_id]
            self._woken.set()

    def _give_up(self, reason: str) -> None:
        if not self._gone:
            self._gone = True
            logger.error("webhooks are not sent any more until the service is restarted: the receiver %s", reason)

    def _encoded(self, entry: Logged) -> tuple[str, bytes] | None:
        """The message; ``None`` where none can be made of the event, which then does not stay in the outbox."""
        try:
            return message_of(entry)
        except UNREADABLE as error:
            what = "webhook %s:%d is set aside: %s (internal)"
            logger.error(what, entry.generation_id, entry.sequence, type(error).__name__)
            return None

    async def _mark(self, generation_id: str) -> None:
        while True:
            try:
                return await self._outbox.delivered(generation_id)
            except LogUnavailable:
                await asyncio.sleep(_AGAIN)

    def _put_off(self, entry: Logged, attempt: int, reason: str, asked: float) -> None:
        pause = min(self._longest, self._backoff * 2 ** min(attempt - 1, 30)) * (1 - self._chance() / 2)
        pause += min(asked, _MOST_ASKED)
        self._failed[entry.generation_id] = _Failed(attempt, asyncio.get_running_loop().time() + pause)
        if attempt.bit_count() == 1:  # The 1st, the 2nd, the 4th, the 8th: it may go on for long.
            what = "webhook %s:%d was not delivered, attempt %d: %s; again in %.0f s"
            logger.warning(what, entry.generation_id, entry.sequence, attempt, reason, pause)


def message_of(entry: Logged) -> tuple[str, bytes]:
    """The message that tells of this event, the same in every attempt: its id, and its body in JSON."""
    assert entry.event is not None
    body = b'{"type":%b,"timestamp":%b,"userId":%b,"data":%b}' % (
        to_json(entry.name),
        to_json(decode(entry.event).occurred_at),
        to_json(entry.user_id),
        entry.event,
    )
    return f"{entry.generation_id}:{entry.sequence}", body
