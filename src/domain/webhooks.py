"""Posts the end of every generation to the webhook, at least once.

The outbox is in the log: it is read again and again, and one node claims an event before it posts it. Only what has
failed, and when it is due again, is in memory. So a restart loses nothing if the log is durable.
"""

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, Protocol

from pydantic_core import to_json

from domain.errors import LogUnavailable
from domain.events import decode
from domain.feed import Logged
from domain.ports.log import EventLog, Gap, Notice
from domain.ports.webhook_outbox import CLAIM, WebhookOutbox
from domain.rehydrate import UNREADABLE
from domain.supervisor import RETRY_DELAY, being_cancelled, patiently

logger = logging.getLogger(__name__)

#: Messages posted at once, and how many of these may have failed before: what always fails leaves room for the rest.
_PARALLEL: Final = 8
_AGAIN_PARALLEL: Final = 4

#: Once so many have failed, nothing new is posted: the receiver is at fault, not a message.
_MOST_FAILED: Final = 10_000
#: How many of these are read from the log in a second.
_READ: Final = 10_000

#: The longest ``Retry-After`` that is respected, in seconds.
_MOST_ASKED: Final = 3600


class NotDelivered(Exception):
    """The receiver has not accepted a message. The text says why, for the operator."""

    def __init__(self, reason: str, *, after: float | None = None, gone: bool = False) -> None:
        super().__init__(reason)
        #: Seconds for which the receiver asks not to be called.
        self.after = after
        #: The receiver does not want any message any more.
        self.gone = gone


class Poster(Protocol):
    """Posts messages to the receiver."""

    async def post(self, message_id: str, body: bytes) -> None:
        """Post the message once; returns if the receiver has accepted it.

        Raises:
            NotDelivered
        """


class _Failed(NamedTuple):
    """A message that was not accepted."""

    attempts: int
    #: When it is posted again, by the event loop's clock.
    due: float


@dataclass(eq=False)
class Webhooks:
    """Posts every terminal event until the receiver accepts it: the oldest first, a few at once.

    This process does not call a receiver again that is gone. The log keeps what it was not sent.
    """

    log: EventLog
    outbox: WebhookOutbox
    poster: Poster
    #: Random numbers from 0 to 1: a random part of a pause, up to a half, is left out.
    chance: Callable[[], float]
    #: Seconds after the first attempt, doubled after each further one up to `longest`.
    backoff: float = 1
    longest: float = 300

    def __post_init__(self) -> None:
        #: By ``delivered`` and ``failed``.
        self.attempts: Counter[str] = Counter()
        self._gone = False
        self._failed: dict[str, _Failed] = {}
        #: By generation id: whether it has failed before.
        self._under_way: dict[str, bool] = {}
        self._woken = asyncio.Event()
        self._flushed = asyncio.Event()

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with self.log.follow(self._notice), asyncio.TaskGroup() as posts:
            while True:
                self._woken.clear()
                due = await self._begin(posts)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._woken.wait()
                await asyncio.sleep(len(self._failed) / _READ)

    async def flushed(self) -> None:
        """Wait until every event that this node may post has been posted once, accepted or not."""
        await self._flushed.wait()

    def _notice(self, entry: Notice) -> None:
        if isinstance(entry, Gap) or (isinstance(entry, Logged) and entry.end == entry.position):
            self._flushed.clear()
            self._woken.set()

    async def _begin(self, posts: asyncio.TaskGroup) -> float | None:
        """Begin to post what is due and has room. Return when to look again; ``None``: never."""
        if self._gone:
            self._flushed.set()
            return None
        clock = asyncio.get_running_loop().time
        # The log may still return what is accepted while it is read.
        under_way = set(self._under_way)
        try:
            entries = await self.outbox.claim_undelivered(min(len(self._failed), _MOST_FAILED) + 2 * _PARALLEL)
        except LogUnavailable:
            return clock() + RETRY_DELAY
        known = {entry.generation_id for entry in entries}
        self._failed = {each: failed for each, failed in self._failed.items() if each in known}
        if known <= self._failed.keys() and not self._woken.is_set():
            self._flushed.set()
        now = clock()
        due = now + CLAIM / 4  # Keeps the claims, and finds those of other nodes that have ended.
        # First what was due first, as far as there is room for another attempt, and then what is new.
        for entry in sorted(entries, key=self._due):
            failed = self._failed.get(entry.generation_id)
            if entry.generation_id in under_way:
                continue
            if failed is not None and failed.due > now:
                due = min(due, failed.due)
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
                await self.poster.post(*message)
                self.attempts["delivered"] += 1
            await patiently(partial(self.outbox.delivered, entry.generation_id))
        except NotDelivered as failure:
            self.attempts["failed"] += 1
            if not failure.gone:
                self._put_off(entry, attempt, str(failure), failure.after or 0)
            elif not self._gone:
                self._gone = True
                logger.error("webhooks are not sent any more until the service is restarted: the receiver %s", failure)
                await patiently(self.outbox.receiver_gone)
        except (Exception, asyncio.CancelledError) as error:
            if being_cancelled():
                raise
            self._put_off(entry, attempt, type(error).__name__, 0)
        finally:
            del self._under_way[entry.generation_id]
            self._woken.set()

    def _encoded(self, entry: Logged) -> tuple[str, bytes] | None:
        """The message; ``None`` if the event cannot be read. It then leaves the outbox."""
        try:
            return message_of(entry)
        except UNREADABLE as error:
            what = "webhook %s:%d is set aside: %s (internal)"
            logger.error(what, entry.generation_id, entry.sequence, type(error).__name__)
            return None

    def _put_off(self, entry: Logged, attempt: int, reason: str, asked: float) -> None:
        pause = min(self.longest, self.backoff * 2 ** min(attempt - 1, 30)) * (1 - self.chance() / 2)
        pause += min(asked, _MOST_ASKED)
        self._failed[entry.generation_id] = _Failed(attempt, asyncio.get_running_loop().time() + pause)
        if attempt.bit_count() == 1:  # Attempts 1, 2, 4, 8 …: there may be many.
            what = "webhook %s:%d was not delivered, attempt %d: %s; again in %.0f s"
            logger.warning(what, entry.generation_id, entry.sequence, attempt, reason, pause)


def message_of(entry: Logged) -> tuple[str, bytes]:
    """The message about this event, the same in every attempt: its id, and its body in JSON."""
    assert entry.event is not None
    body = b'{"type":%b,"timestamp":%b,"userId":%b,"data":%b}' % (
        to_json(entry.name),
        to_json(decode(entry.event).occurred_at),
        to_json(entry.user_id),
        entry.event,
    )
    return f"{entry.generation_id}:{entry.sequence}", body
