"""The event log in a SQLite file.

An append is synced to disk before it returns (see `adapters.sqlite.database`). An append that was cancelled, or whose
process was killed, may or may not have been committed: retry it with the same event id to find out.
"""

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple

from adapters.sqlite.damage import CREDIT, DamageFound, log_damage
from adapters.sqlite.database import Database, Operation, T, is_text, microseconds
from domain.append_rules import Known, decide
from domain.errors import CreditsOff, IdempotencyMismatch, NotFinished
from domain.feed import Cursor, Feed, Logged, zero_id
from domain.ports.ledger import Standing
from domain.ports.log import Append, Deliver, History, IdempotencyRecord, Start
from domain.ports.system import Clock

logger = logging.getLogger(__name__)

#: A position beyond every other.
_BEYOND: Final = 2**63 - 1

#: For `_logged`.
_ENTRIES: Final = """
    SELECT users.user_id, events.position, events.event_id, generations.generation_id, events.sequence, events.name,
        events.event, generations.first_position, generations.end_position, events.images
    FROM events
    JOIN generations ON generations.id = events.generation
    JOIN users ON users.id = events.owner
"""

#: What an append is checked against: the user's row, the generation's row, and the fields of `Known` from them.
_KNOWN: Final = f"""
    SELECT users.id, users.head, generations.id, generations.first_position, generations.free,
        generations.id IS NOT NULL, generations.end_position IS NOT NULL,
        iif(generations.deleted, 0, (SELECT max(sequence) FROM events WHERE generation = generations.id)),
        iif(generations.deleted, NULL,
            (SELECT event_id FROM events WHERE generation = generations.id AND sequence = :sequence)),
        NULL,
        (SELECT count(*) FROM generations WHERE owner = users.id AND end_position IS NULL AND :begins),
        {CREDIT}, generations.reserved
    FROM (SELECT 1)
    LEFT JOIN users ON users.user_id = :user_id
    LEFT JOIN generations ON generations.generation_id = :generation_id
"""

#: A user's feed, with the event id and the open tombstones at an anchor.
_FEED: Final = """
    SELECT id, head, floor, floor_id,
        (SELECT event_id FROM events WHERE owner = users.id AND position = :anchor),
        (
            SELECT json_group_array(first_position) FROM generations
            WHERE owner = users.id AND deleted = 1 AND end_position > :anchor AND first_position <= :anchor
        )
    FROM users WHERE user_id = :user_id
"""

_HEAD: Final = """
    SELECT head, floor, floor_id,
        (SELECT event_id FROM events WHERE owner = users.id AND position = head),
        (SELECT min(first_position) FROM generations WHERE owner = users.id AND end_position IS NULL)
    FROM users WHERE user_id = ?
"""

#: Generations without their events.
_GENERATIONS: Final = """
    SELECT generations.id, users.user_id, generation_id, kind, order_json, free
    FROM generations JOIN users ON users.id = generations.owner
"""
_OF_USER: Final = f"""{_GENERATIONS}
    WHERE users.user_id = ? AND deleted = 0 AND first_position < ? {{}} ORDER BY first_position DESC LIMIT ?
"""
_LISTS: Final = {
    None: _OF_USER.format(""),
    True: _OF_USER.format("AND end_position IS NULL"),
    False: _OF_USER.format("AND end_position IS NOT NULL"),
}


_OF_KEY: Final = "FROM generations WHERE owner = (SELECT id FROM users WHERE user_id = ?) AND idempotency_key = ?"
_NAMED: Final = "SELECT id FROM generations WHERE generation_id = ?"
#: Generations with events at or after a position of a feed.
_IN_FEED: Final = """
    SELECT DISTINCT generations.id
    FROM (
        SELECT generation FROM events WHERE owner = (SELECT id FROM users WHERE user_id = ?) AND position >= ?
        ORDER BY position LIMIT 1 + ?
    ) JOIN generations ON generations.id = generation
"""

#: Generations with events at or after the start of the oldest active one.
_SINCE_OLDEST: Final = """
    SELECT DISTINCT generations.id
    FROM users
    JOIN events ON events.owner = users.id AND position >=
        coalesce((SELECT min(first_position) FROM generations WHERE owner = users.id AND end_position IS NULL), head)
    JOIN generations ON generations.id = generation
    WHERE user_id = ?
"""


class _Appended(NamedTuple):
    entry: Logged
    #: False: the append is a retry of one that was committed before.
    new: bool


class SqliteLog:
    """The ports `EventLog`, `Ledger`, `Retention` and `WebhookOutbox` in a SQLite file, for one process."""

    durable = True

    def __init__(self, database: Database, *, credits: int | None, clock: Clock, outbox: bool = False) -> None:
        """`credits`: a new user's balance; ``None``: no balances. `outbox`: record ends as undelivered webhooks.

        The clock is read on the writer thread.
        """
        self.epoch = database.epoch
        self._database = database
        self._credits = credits
        self._clock = clock
        self._outbox = outbox
        self._followers: list[Deliver] = []

    async def append(self, entry: Append) -> Logged:
        appended = await self._database.write(lambda connection: self._append(connection, entry), self._deliver)
        return appended.entry

    async def mark_paid(self, generation_id: str) -> None:
        await self._database.write(
            lambda connection: connection.execute(
                "UPDATE generations SET free = 0 WHERE generation_id = ?", (generation_id,)
            )
        )

    async def find_by_idempotency_key(self, user_id: str, key: str) -> IdempotencyRecord | None:
        return await self._read(
            lambda connection: _begun(connection, user_id, key), f"SELECT id {_OF_KEY}", (user_id, key)
        )

    async def generation(self, generation_id: str) -> History | None:
        def read(connection: sqlite3.Connection) -> Sequence[History]:
            where = "WHERE generation_id = ? AND deleted = 0"
            return _histories(connection, connection.execute(f"{_GENERATIONS} {where}", (generation_id,)))

        if not is_text(generation_id):
            return None
        return next(iter(await self._read(read, _NAMED, (generation_id,))), None)

    async def generations(
        self, user_id: str, *, active: bool | None = None, before: int | None = None, limit: int
    ) -> Sequence[History]:
        parameters = (user_id, _BEYOND if before is None else min(before, _BEYOND), limit)
        return await self._read(
            lambda connection: _histories(connection, connection.execute(_LISTS[active], parameters)),
            f"SELECT id FROM ({_LISTS[active]})",
            parameters,
        )

    async def unfinished(self) -> Sequence[History]:
        # The unary plus keeps SQLite from scanning the whole table in order of ids.
        where = "WHERE end_position IS NULL ORDER BY +generations.id"
        return await self._database.read(
            lambda connection: _histories(connection, connection.execute(f"{_GENERATIONS} {where}"))
        )

    async def set_aside(self, generation_id: str) -> bool:
        query = (
            "SELECT 1 FROM damaged_generations JOIN generations ON generations.id = tombstone"
            " WHERE generations.generation_id = ?"
        )
        row = await self._database.read(lambda connection: connection.execute(query, (generation_id,)).fetchone())
        return row is not None

    async def finished_before(self, moment: datetime, limit: int) -> Sequence[str]:
        which = "FROM generations WHERE ended_at < ? ORDER BY ended_at, end_event LIMIT ?"
        parameters = (microseconds(moment), limit)
        return await self._read(
            lambda connection: [name for (name,) in connection.execute(f"SELECT generation_id {which}", parameters)],
            f"SELECT id {which}",
            parameters,
        )

    async def head_cursor(self, user_id: str) -> Cursor:
        row = await self._read(
            lambda connection: connection.execute(_HEAD, (user_id,)).fetchone(), _SINCE_OLDEST, (user_id,)
        )
        if row is None:
            return Cursor(0, zero_id(self.epoch, user_id), 0)
        head, floor, floor_id, head_id, oldest = row
        return Cursor(head, floor_id if head == floor else head_id, head if oldest is None else oldest - 1)

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        def read(connection: sqlite3.Connection) -> Feed:
            row = connection.execute(_FEED, {"user_id": user_id, "anchor": anchor}).fetchone()
            if row is None:
                return Feed([], 0, 0, 0, zero_id(self.epoch, user_id) if anchor == 0 else None, ())
            user, head, floor, floor_id, id_there, deleted_spans = row
            where = "WHERE events.owner = ? AND events.position > ? ORDER BY events.position LIMIT ?"
            rows = connection.execute(f"{_ENTRIES} {where}", (user, after, limit)) if limit else ()
            entries = list(map(_logged, rows))
            upto = max(after, head) if len(entries) < limit else entries[-1].position if entries else after
            anchor_id = floor_id if anchor == floor else id_there if anchor > floor else None
            return Feed(entries, upto, head, floor, anchor_id, json.loads(deleted_spans))

        return await self._read(read, _IN_FEED, (user_id, min(after, anchor), limit))

    @asynccontextmanager
    async def follow(self, deliver: Deliver) -> AsyncIterator[None]:
        self._followers.append(deliver)
        try:
            yield
        finally:
            self._followers.remove(deliver)

    async def credit(self, user_id: str) -> int | None:
        row = await self._database.read(
            lambda connection: connection.execute(
                f"SELECT {CREDIT} FROM users WHERE user_id = ?", (user_id,)
            ).fetchone()
        )
        kept: int | None = row and row[0]
        return self._credits if kept is None or self._credits is None else kept

    async def standing(self, user_id: str) -> Standing:
        row = await self._database.read(
            lambda connection: connection.execute(
                f"SELECT {CREDIT}, (SELECT count(*) FROM generations WHERE owner = users.id AND end_position IS NULL)"
                " FROM users WHERE user_id = ?",
                (user_id,),
            ).fetchone()
        )
        credit, unfinished = row or (None, 0)
        return Standing(self._credits if credit is None or self._credits is None else credit, unfinished)

    async def grant(self, user_id: str, amount: int, *, key: str | None, at: datetime, until: datetime) -> int:
        credits = self._credits
        if credits is None:
            raise CreditsOff

        def grant(connection: sqlite3.Connection) -> int:
            connection.execute("DELETE FROM grants WHERE until <= ?", (microseconds(at),))
            row = connection.execute(f"SELECT id, {CREDIT} FROM users WHERE user_id = ?", (user_id,)).fetchone()
            user, kept = row or (None, None)
            before = connection.execute(
                "SELECT amount, credit FROM grants WHERE owner = ? AND idempotency_key = ?"
                " AND typeof(amount) = 'integer' AND typeof(credit) = 'integer'",
                (user, key),
            ).fetchone()
            if before is not None:
                if before[0] != amount:
                    raise IdempotencyMismatch
                return int(before[1])
            credit = max(0, (credits if kept is None else kept) + amount)
            if user is None:
                user = self._insert_user(connection, user_id, 0, credit)
            else:
                connection.execute("UPDATE users SET credit = ? WHERE id = ?", (credit, user))
            if key is not None:
                connection.execute(
                    "REPLACE INTO grants (owner, idempotency_key, amount, credit, until) VALUES (?, ?, ?, ?, ?)",
                    (user, key, amount, credit, microseconds(until)),
                )
            return credit

        return await self._database.write(grant)

    async def remove(self, generation_id: str, *, retention: bool) -> bool:
        if not is_text(generation_id):
            return False
        await self._read(lambda _: None, _NAMED, (generation_id,))
        return await self._database.write(lambda connection: _remove(connection, generation_id, retention))

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        if not self._outbox:
            return []
        where = "WHERE undelivered = 1 AND events.id = end_event ORDER BY end_event LIMIT ?"
        return await self._read(
            lambda connection: list(map(_logged, connection.execute(f"{_ENTRIES} {where}", (limit,)))),
            "SELECT id FROM generations WHERE undelivered = 1 ORDER BY end_event LIMIT ?",
            (limit,),
        )

    async def delivered(self, generation_id: str) -> None:
        await self._database.write(
            lambda connection: connection.execute(
                "UPDATE generations SET undelivered = 0 WHERE generation_id = ? AND undelivered = 1", (generation_id,)
            )
        )

    async def examine(self) -> None:
        checker = self._database.checker
        while not checker.done:
            began = time.monotonic()
            await self._read_intact(checker.next)
            # Uses at most a quarter of a core, so that other reads go first.
            await asyncio.sleep(3 * (time.monotonic() - began))

    async def probe(self) -> None:
        await self._database.probe()

    async def _read(self, query: Operation[T], rows: str, parameters: Sequence[object]) -> T:
        """The query's result. First checks the generations that `rows` selects, and sets damaged ones aside."""
        checker = self._database.checker

        def read(connection: sqlite3.Connection) -> T:
            if not checker.done:
                checker.check(connection, (key for (key,) in connection.execute(rows, parameters)))
            return query(connection)

        return await self._read_intact(read)

    async def _read_intact(self, query: Operation[T]) -> T:
        """The query's result. Whenever it raises `DamageFound`, sets those generations aside and tries again."""
        while True:
            try:
                return await self._database.read(query)
            except DamageFound as found:
                await self._database.write(partial(self._database.checker.set_aside, keys=found.keys), log_damage)

    def _append(self, connection: sqlite3.Connection, entry: Append) -> _Appended:
        start = entry.start
        parameters = {
            "user_id": entry.user_id,
            "generation_id": entry.generation_id,
            "sequence": entry.sequence,
            "begins": start is not None,
        }
        user, head, generation, first, free, *state = connection.execute(_KNOWN, parameters).fetchone()
        known = Known._make(state)
        known = known._replace(sequence=known.sequence or 0)
        if start is not None and start.key is not None:
            known = known._replace(begun=_begun(connection, entry.user_id, start.key))
        accepted = decide(entry, known, credits=self._credits, now=self._clock())
        if accepted is None:
            where = "WHERE events.generation = ? AND events.sequence = ?"
            row = connection.execute(f"{_ENTRIES} {where}", (generation, entry.sequence)).fetchone()
            return _Appended(_logged(row), new=False)
        event, credit, reserved = accepted
        end = None
        position = (head or 0) + 1
        if user is None:
            user = self._insert_user(connection, entry.user_id, position, credit)
        else:
            connection.execute("UPDATE users SET head = ?, credit = ? WHERE id = ?", (position, credit, user))
        if start is not None:
            first, generation = position, _insert_generation(connection, entry, start, user, position, reserved)
        images = json.dumps(dict(entry.images)) if entry.images else None
        inserted = connection.execute(
            "INSERT INTO events (owner, position, generation, sequence, event_id, name, event, images)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (user, position, generation, entry.sequence, entry.event_id, entry.name, event, images),
        )
        if entry.free != (free == 1):
            connection.execute("UPDATE generations SET free = ? WHERE id = ?", (entry.free, generation))
        if entry.terminal:
            end = position
            connection.execute(
                "UPDATE generations SET end_position = ?, ended_at = ?, end_event = ?, undelivered = ? WHERE id = ?",
                (position, microseconds(entry.at), inserted.lastrowid, self._outbox, generation),
            )
        place = entry.user_id, position, entry.event_id, entry.generation_id, entry.sequence
        return _Appended(Logged(*place, entry.name, event, first, end, entry.images), new=True)

    def _insert_user(self, connection: sqlite3.Connection, user_id: str, head: int, credit: int | None) -> int:
        inserted = connection.execute(
            "INSERT INTO users (user_id, credit, head, floor, floor_id) VALUES (?, ?, ?, 0, ?)",
            (user_id, credit, head, zero_id(self.epoch, user_id)),
        )
        assert inserted.lastrowid is not None
        return inserted.lastrowid

    def _deliver(self, appended: _Appended) -> None:
        for deliver in self._followers if appended.new else ():
            try:
                deliver(appended.entry)
            except Exception as error:
                logger.error("a follower of the log failed: %s", type(error).__name__)


def _logged(row: Sequence[Any]) -> Logged:
    return Logged._make((*row[:-1], json.loads(row[-1]) if row[-1] else {}))


def _histories(connection: sqlite3.Connection, generations: sqlite3.Cursor) -> list[History]:
    """The generations of a `_GENERATIONS` query with their events, read in one query."""
    rows = generations.fetchall()
    events: dict[str, list[Logged]] = {generation_id: [] for _, _, generation_id, *_ in rows}
    where = "WHERE events.generation IN (SELECT value FROM json_each(?)) ORDER BY events.generation, events.sequence"
    for row in connection.execute(f"{_ENTRIES} {where}", (json.dumps([row[0] for row in rows]),)) if rows else ():
        entry = _logged(row)
        events[entry.generation_id].append(entry)
    return [
        History(user_id, generation_id, kind, order, events[generation_id], free == 1)
        for _, user_id, generation_id, kind, order, free in rows
    ]


def _begun(connection: sqlite3.Connection, user_id: str, key: str) -> IdempotencyRecord | None:
    row = connection.execute(f"SELECT generation_id, fingerprint {_OF_KEY}", (user_id, key)).fetchone()
    return row and IdempotencyRecord(*row)


def _insert_generation(
    connection: sqlite3.Connection, entry: Append, start: Start, user: int, first: int, reserved: bool
) -> int | None:
    return connection.execute(
        "INSERT INTO generations (generation_id, owner, kind, order_json, idempotency_key, fingerprint, reserved,"
        " first_position) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (entry.generation_id, user, start.kind, start.order, start.key, start.fingerprint, reserved, first),
    ).lastrowid


def _remove(connection: sqlite3.Connection, generation_id: str, retention: bool) -> bool:
    row = connection.execute(
        "SELECT generations.id, owner, end_position, deleted, floor"
        " FROM generations JOIN users ON users.id = owner WHERE generation_id = ?",
        (generation_id,),
    ).fetchone()
    if row is None:
        return False
    generation, user, end, deleted, floor = row
    if end is None:
        raise NotFinished
    if deleted and not retention:
        return False
    if retention and end > floor:
        floor = end
        connection.execute(
            "UPDATE users SET floor = ?, floor_id = (SELECT event_id FROM events WHERE owner = ? AND position = ?)"
            " WHERE id = ?",
            (end, user, end, user),
        )
    connection.execute("UPDATE events SET event = NULL, images = NULL WHERE generation = ?", (generation,))
    connection.execute(
        "UPDATE generations SET deleted = 1, order_json = x'', idempotency_key = NULL, fingerprint = '',"
        " undelivered = 0 WHERE id = ?",
        (generation,),
    )
    # Deletes their events too (ON DELETE CASCADE).
    connection.execute("DELETE FROM generations WHERE owner = ? AND deleted = 1 AND end_position <= ?", (user, floor))
    return True
