"""Follows the log of all nodes, by reading the table of events again and again.

Ids are drawn in order, but their transactions commit in another one. So ids that are skipped below the newest one read
are kept as gaps, and asked for again in every read. A gap is given up once every transaction that had begun when it was
found is over, because then its own was rolled back. Nothing waits for a slow transaction, and nothing is missed.

Of one user, ids are in the order of the feed: the lock on the user's row is held until the commit. Removals draw theirs
from the same source under the same lock, so that no entry is read after its removal.

A notification only shortens the wait for the next read. Through a pooler in transaction mode none arrives.
"""

import asyncio
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, Final

from adapters.postgres.database import FAILURES, TIMEOUT, Connection, Database, reason_of, transaction, woken
from domain.errors import LogUnavailable
from domain.feed import Logged
from domain.followers import Followers
from domain.ports.log import Gap, Removed, UserRemoved

logger = logging.getLogger(__name__)

#: Notified after appends, after an offer of work, and by a node that joins.
CHANNEL: Final = "stagecast"
WORK: Final = "stagecast_work"
JOINED: Final = "stagecast_nodes"

_PLACE: Final = itemgetter(
    "user_id", "position", "event_id", "generation_id", "sequence", "name", "event", "first_position"
)

#: Entries in one read.
_PAGE: Final = 500
#: Beyond so many unread entries, followers read the log again instead.
_MAX_BACKLOG: Final = 5_000
#: How many of the last ids may still be open when the tail begins.
_LOOK_BACK: Final = 5_000

#: Seconds between two reads: with notifications or when it is quiet; while entries come and no notifications do.
_POLL: Final = 0.25
_POLL_QUICKLY: Final = 0.02
#: Seconds for which a log is busy after an entry.
_BUSY: Final = 1.0

#: Seconds without a read beyond which everything is read again: less than the hour for which removals are kept.
_MAX_BREAK: Final = 600.0

#: Seconds between two looks for gaps that will not be filled.
_GIVE_UP_EVERY: Final = 1.0

_BACKOFF: Final = (0.05, 0.1, 0.2, 0.5, 1.0)


class Tail:
    """Reads the log on a connection of its own, and delivers every entry to all followers."""

    def __init__(self, listener: Database, node: str) -> None:
        """`listener`: the database, past a pooler if there is one. `node`: this one, which wakes itself."""
        self.followers = Followers()
        self._listener = listener
        self._node = node
        self._wake = asyncio.Event()
        #: What is done when another node notifies a channel.
        self.channels: dict[str, Callable[[], object]] = {CHANNEL: self._wake.set}
        self._waiters: list[asyncio.Future[None]] = []
        self._last: int | None = None
        #: The event id there: another one, or none, shows that the log has lost its end.
        self._last_event: int | None = None
        #: Ids below the last one, each with the transaction id that all that might fill it are below, once known.
        self._gaps: dict[int, int | None] = {}
        self._next_barrier = 0.0
        self._busy_until = 0.0
        self._read_at = asyncio.get_running_loop().time()
        #: Connections in a row that did not read anything.
        self._failures = 0

    def wake(self) -> None:
        """Read now."""
        self._wake.set()

    def age(self) -> float:
        """Seconds since the log was last read."""
        return asyncio.get_running_loop().time() - self._read_at

    async def caught_up(self) -> None:
        """Wait until everything that has been committed by now was delivered. Raises `LogUnavailable`."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._wake.set()
        try:
            async with asyncio.timeout(TIMEOUT):
                await waiter
        except TimeoutError:
            raise LogUnavailable from None

    async def run(self) -> None:
        """Read until cancelled."""
        reason = ""
        while True:
            try:
                connection = await self._listener.connect()
                session = asyncio.create_task(self._follow(connection))
                try:
                    # Not cancelled: asyncpg would have the server cancel its statement, on another connection.
                    await asyncio.shield(session)
                finally:
                    connection.terminate()
                    self._wake.set()
                    await asyncio.wait([session])
                    session.exception()
            except FAILURES as error:
                if (new := reason_of(error)) != reason or not self._failures:
                    reason = new
                    logger.error("the follower of the log has no connection: %s", reason)
            pause = _BACKOFF[min(self._failures, len(_BACKOFF) - 1)]
            self._failures += 1
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311

    async def _begin(self, connection: Connection) -> None:
        if not self._listener.pooled:
            for channel in self.channels:
                with _limited(connection):
                    await connection.add_listener(channel, self._on_notification)
        if self._last is None:
            await self._restart(connection)
            return
        query = (
            "SELECT event_id FROM stagecast.events WHERE id = $1"
            " UNION ALL SELECT event_id FROM stagecast.removals WHERE id = $1"
        )
        row = await self._ask(connection, query, self._last)
        if not row or row[0]["event_id"] != self._last_event:
            await self._restart(connection)
            self.followers.deliver(Gap())

    async def _restart(self, connection: Connection) -> None:
        """Begin at the newest entry."""
        query = "SELECT * FROM stagecast.newest_v1($1)"
        [(self._last, missing)] = await self._ask(connection, query, _LOOK_BACK)
        self._last_event = None
        self._gaps = dict.fromkeys(missing)

    def _on_notification(self, connection: Any, pid: int, channel: str, sender: object) -> None:
        if sender != self._node:
            self.channels[channel]()

    async def _follow(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        await self._begin(connection)
        self._failures = 0
        while True:
            self._wake.clear()
            waiters, self._waiters = self._waiters, []
            try:
                full = await self._read(connection)
            except BaseException:
                self._waiters += waiters
                raise
            self._read_at = loop.time()
            if full:
                self._waiters += waiters
                continue
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
            quick = self._listener.pooled and loop.time() < self._busy_until
            await woken(self._wake, _POLL_QUICKLY if quick else _POLL)

    async def _read(self, connection: Connection) -> bool:
        """Read and deliver once. Return whether there may be more already."""
        assert self._last is not None
        query = "SELECT * FROM stagecast.read_v1($1, $2, $3)"
        rows = await self._ask(connection, query, self._last, list(self._gaps), _PAGE)
        oldest = rows[0]["oldest"]
        entries = [row for row in rows if row["id"] is not None]
        new = [row["id"] for row in entries if row["id"] > self._last]
        # `most` limits events and removals separately: beyond a page, some of one or the other may be missing.
        del entries[len(entries) - len(new) + _PAGE :], new[_PAGE:]
        newest = new[-1] if new else self._last
        if len(new) == _PAGE:
            query = "SELECT greatest($1, max(id)) FROM stagecast.events"
            [(newest,)] = await self._ask(connection, query, newest)
        if newest - self._last > _MAX_BACKLOG or self.age() > _MAX_BREAK:
            await self._restart(connection)
            self.followers.deliver(Gap())
            return True
        if new:
            self._gaps |= dict.fromkeys(sorted({*range(self._last + 1, new[-1])}.difference(new)))
            self._last, self._last_event = new[-1], entries[-1]["event_id"]
        for row in entries:
            self._gaps.pop(row["id"], None)
        # This read has seen all that was committed before `oldest`.
        over = [gap for gap, barrier in self._gaps.items() if barrier is not None and barrier <= oldest]
        for gap in over:
            del self._gaps[gap]
        for row in entries:
            self._deliver_row(row)
        await self._set_barrier(connection)
        return len(new) == _PAGE

    async def _set_barrier(self, connection: Connection) -> None:
        """Note for new gaps which transactions may fill them: those that have begun by now."""
        now = asyncio.get_running_loop().time()
        if now < self._next_barrier or None not in self._gaps.values():
            return
        self._next_barrier = now + _GIVE_UP_EVERY
        [(barrier,)] = await self._ask(connection, "SELECT pg_current_xact_id()::text::bigint")
        self._gaps = {gap: barrier if known is None else known for gap, known in self._gaps.items()}

    async def _ask(self, connection: Connection, query: str, *arguments: object) -> Sequence[Any]:
        with _limited(connection):
            async with transaction(connection, needed=self._listener.pooled):
                return await connection.fetch(query, *arguments)  # type: ignore[no-any-return]

    def _deliver_row(self, row: Any) -> None:
        self._busy_until = asyncio.get_running_loop().time() + _BUSY
        if row["removed"]:
            user_id = row["user_id"]
            for generation_id in row["removed"]:
                self.followers.deliver(
                    UserRemoved(user_id) if generation_id is None else Removed(user_id, generation_id)
                )
        elif row["event"] is None:
            self.followers.deliver(Gap())
        else:
            # As it was when it was appended.
            ended = row["end_position"] == row["position"]
            self.followers.deliver(logged(row, end=row["position"] if ended else None))


@contextmanager
def _limited(connection: Connection) -> Iterator[None]:
    """End the connection if what is done with it here takes too long."""
    watchdog = asyncio.get_running_loop().call_later(TIMEOUT, connection.terminate)
    try:
        yield
    finally:
        watchdog.cancel()


def logged(row: Any, *, end: int | None) -> Logged:
    """The entry of a row."""
    return Logged._make((*_PLACE(row), end, json.loads(row["images"]) if row["images"] else {}))
