"""Posts the end of every generation to the webhook, at least once.

The outbox is in the log: it is read again and again, and one node claims an event before it posts it. Only what has
failed, and when it is due again, is in memory. So a restart loses nothing if the log is durable.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from pydantic_core import to_json

from domain.events import decode
from domain.feed import Logged
from domain.ports.log import EventLog, Gap, Notice
from domain.ports.webhook_outbox import CLAIM, WebhookOutbox
from domain.rehydrate import UNREADABLE
from domain.supervisor import being_cancelled, patiently

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
        #: By generation id: the messages that are posted, or wait for that.
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        #: Those of them that have failed before.
        self._failed: set[str] = set()
        self._posts, self._repeats = asyncio.Semaphore(_PARALLEL), asyncio.Semaphore(_AGAIN_PARALLEL)
        self._woken = asyncio.Event()
        self._flushed = asyncio.Event()

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with self.log.follow(self._notice), asyncio.TaskGroup() as tasks:
            while True:
                self._woken.clear()
                await self._begin(tasks)
                # Look again in time to keep the claims, and to find those of other nodes that have ended.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLAIM / 4):
                        await self._woken.wait()
                await asyncio.sleep(len(self._failed) / _READ)

    async def flushed(self) -> None:
        """Wait until every event that this node may post has been posted once, accepted or not."""
        await self._flushed.wait()

    def _notice(self, entry: Notice) -> None:
        if isinstance(entry, Gap) or (isinstance(entry, Logged) and entry.end == entry.position):
            self._flushed.clear()
            self._woken.set()

    async def _begin(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to deliver what is new, and forget what has been removed."""
        if self._gone:
            self._flushed.set()
            return
        # The log may still return what is accepted while it is read.
        begun, failed = set(self._deliveries), set(self._failed)
        most = min(len(failed), _MOST_FAILED) + 2 * _PARALLEL
        entries = await patiently(partial(self.outbox.claim_undelivered, most))
        known = {entry.generation_id for entry in entries}
        for generation_id in failed & self._failed - known:
            self._deliveries[generation_id].cancel()
        if known <= self._failed and not self._woken.is_set():
            self._flushed.set()
        for entry in entries:
            if entry.generation_id not in begun:
                task = self._deliveries[entry.generation_id] = tasks.create_task(self._deliver(entry))
                task.add_done_callback(partial(self._end, entry.generation_id))

    def _end(self, generation_id: str, _: object) -> None:
        del self._deliveries[generation_id]
        self._failed.discard(generation_id)
        self._woken.set()

    async def _deliver(self, entry: Logged) -> None:
        for attempt in itertools.count(1):
            async with self._repeats if attempt > 1 else contextlib.nullcontext(), self._posts:
                pause = await self._attempt(entry, attempt)
            if pause is None:
                return
            self._failed.add(entry.generation_id)
            self._woken.set()
            await asyncio.sleep(pause)

    async def _attempt(self, entry: Logged, attempt: int) -> float | None:
        """Post the message once. Return the seconds until the next attempt; ``None``: there is none."""
        if self._gone:
            return None
        asked = 0.0
        try:
            try:
                message = message_of(entry)
            except UNREADABLE as error:  # It leaves the outbox.
                what = "webhook %s:%d is set aside: %s (internal)"
                logger.error(what, entry.generation_id, entry.sequence, type(error).__name__)
            else:
                await self.poster.post(*message)
                self.attempts["delivered"] += 1
            await patiently(partial(self.outbox.delivered, entry.generation_id))
            return None
        except NotDelivered as failure:
            self.attempts["failed"] += 1
            if failure.gone:
                if not self._gone:
                    self._gone = True
                    what = "webhooks are not sent any more until the service is restarted: the receiver %s"
                    logger.error(what, failure)
                    await patiently(self.outbox.receiver_gone)
                return None
            reason, asked = str(failure), min(failure.after or 0, _MOST_ASKED)
        except (Exception, asyncio.CancelledError) as error:
            if being_cancelled():
                raise
            reason = type(error).__name__
        pause = min(self.longest, self.backoff * 2.0 ** min(attempt - 1, 30)) * (1 - self.chance() / 2) + asked
        if attempt.bit_count() == 1:  # Attempts 1, 2, 4, 8 …: there may be many.
            what = "webhook %s:%d was not delivered, attempt %d: %s; again in %.0f s"
            logger.warning(what, entry.generation_id, entry.sequence, attempt, reason, pause)
        return pause


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
