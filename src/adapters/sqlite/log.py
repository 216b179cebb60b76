"""The event log in a SQLite file.

An append is synced to disk before it returns (see `adapters.sqlite.database`). An append that was cancelled, or whose
process was killed, may or may not have been committed: retry it with the same event id to find out.
"""

import asyncio
import json
import sqlite3
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from functools import partial
from typing import Any, Final

from adapters.sqlite import queries
from adapters.sqlite.damage import DamageFound, log_damage, set_aside
from adapters.sqlite.database import Database, Operation, T
from adapters.sqlite.values import is_text, microseconds
from domain.append_rules import Known, decide
from domain.errors import CreditsOff, IdempotencyMismatch, NotFinished
from domain.events import failure_code
from domain.feed import Cursor, Feed, Logged, zero_id
from domain.followers import Followers
from domain.ports.ledger import Standing
from domain.ports.log import Append, Deliver, History, IdempotencyRecord, Removed, UserRemoved
from domain.ports.overview import Filter, Listing
from domain.ports.system import Clock

#: A position beyond every other.
_BEYOND: Final = 2**63 - 1


class SqliteLog:
    """The ports `EventLog`, `Ledger`, `Retention`, `Overview` and `WebhookOutbox` in a SQLite file, for one process."""

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
        self._followers = Followers()

    async def append(self, entry: Append) -> Logged:
        logged, _ = await self._database.write(lambda connection: self._append(connection, entry), self._deliver)
        return logged

    async def mark_paid(self, generation_id: str) -> None:
        await self._database.execute("UPDATE generations SET free = 0 WHERE generation_id = ?", generation_id)

    async def find_by_idempotency_key(self, user_id: str, key: str) -> IdempotencyRecord | None:
        return await self._read(
            lambda connection: _by_key(connection, user_id, key),
            f"SELECT id {queries.OF_KEY}",
            (user_id, key),
        )

    async def generation(self, generation_id: str) -> History | None:
        return await self._generation(generation_id, queries.ALL)

    async def summary(self, generation_id: str) -> History | None:
        return await self._generation(generation_id, queries.SUMMARY)

    async def _generation(self, generation_id: str, events: str) -> History | None:
        if not is_text(generation_id):
            return None
        where = "WHERE generation_id = ? AND deleted = 0"
        return next(iter(await self._histories(where, (generation_id,), queries.NAMED, events)), None)

    async def generations(
        self, user_id: str, *, active: bool | None = None, before: int | None = None, limit: int
    ) -> Sequence[History]:
        parameters = (user_id, _BEYOND if before is None else min(before, _BEYOND), limit)
        where = queries.OF_USER[active]
        return await self._histories(where, parameters, f"SELECT id FROM ({queries.GENERATIONS} {where})")

    async def unfinished(self) -> Sequence[History]:
        return await self._database.read(lambda connection: _histories(connection, queries.UNFINISHED))

    async def _histories(
        self, where: str, parameters: Sequence[object], generations: str, events: str = queries.SUMMARY
    ) -> Sequence[History]:
        return await self._read(
            lambda connection: _histories(connection, where, parameters, events), generations, parameters
        )

    async def listing(self, wanted: Filter, *, before: int | None = None, limit: int) -> Listing:
        which, parameters = queries.listing(wanted, _BEYOND if before is None else before, limit + 1)
        rows = [key for (key,) in await self._rows(which, parameters, which)]
        keys = (json.dumps(rows[:limit]),)
        found = await self._histories(queries.CHOSEN, keys, "SELECT value FROM json_each(?)")
        return Listing(found, rows[limit - 1] if len(rows) > limit else None)

    async def failures(self, since: datetime) -> Mapping[str, int]:
        query = "SELECT code, count(*) FROM generations WHERE code IS NOT NULL AND ended_at >= ? GROUP BY code"
        return dict(await self._rows(query, (microseconds(since),)))

    async def images(self, generation_id: str) -> Collection[str]:
        query = (
            "SELECT DISTINCT value FROM generations, events ON generation = generations.id, json_each(images)"
            " WHERE generation_id = ?"
        )
        return [name for (name,) in await self._rows(query, (generation_id,), queries.NAMED)]

    async def set_aside(self, generation_id: str) -> bool:
        query = (
            "SELECT 1 FROM damaged_generations JOIN generations ON generations.id = tombstone"
            " WHERE generations.generation_id = ?"
        )
        return bool(await self._rows(query, (generation_id,)))

    async def finished_before(self, moment: datetime, limit: int) -> Sequence[str]:
        which = "FROM generations WHERE ended_at < ? ORDER BY ended_at, end_event LIMIT ?"
        parameters = (microseconds(moment), limit)
        return [name for (name,) in await self._rows(f"SELECT generation_id {which}", parameters, f"SELECT id {which}")]

    async def head_cursor(self, user_id: str) -> Cursor:
        for head, floor, floor_id, head_id, oldest in await self._rows(queries.HEAD, (user_id,), queries.SINCE_OLDEST):
            return Cursor(head, floor_id if head == floor else head_id, head if oldest is None else oldest - 1)
        return Cursor(0, zero_id(self.epoch, user_id), 0)

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        def read(connection: sqlite3.Connection) -> Feed:
            row = connection.execute(queries.FEED, {"user_id": user_id, "anchor": anchor}).fetchone()
            if row is None:
                return Feed([], 0, 0, 0, zero_id(self.epoch, user_id) if anchor == 0 else None, ())
            user, head, floor, floor_id, id_there, deleted_spans = row
            where = "WHERE events.owner = ? AND events.position > ? ORDER BY events.position LIMIT ?"
            rows = connection.execute(f"{queries.ENTRIES} {where}", (user, after, limit)) if limit else ()
            entries = list(map(_logged, rows))
            upto = max(after, head) if len(entries) < limit else entries[-1].position if entries else after
            anchor_id = floor_id if anchor == floor else id_there if anchor > floor else None
            return Feed(entries, upto, head, floor, anchor_id, json.loads(deleted_spans))

        return await self._read(read, queries.IN_FEED, (user_id, min(after, anchor), limit))

    def follow(self, deliver: Deliver) -> AbstractAsyncContextManager[None]:
        return self._followers.follow(deliver)

    async def standing(self, user_id: str) -> Standing:
        for credit, unfinished in await self._rows(queries.STANDING, (user_id,)):
            return Standing(self._credits if credit is None or self._credits is None else credit, unfinished)
        return Standing(self._credits, 0)

    async def grant(self, user_id: str, amount: int, *, key: str | None, at: datetime, until: datetime) -> int:
        credits = self._credits
        if credits is None:
            raise CreditsOff

        def grant(connection: sqlite3.Connection) -> int:
            connection.execute("DELETE FROM grants WHERE until <= ?", (microseconds(at),))
            query = f"SELECT id, head, {queries.CREDIT} FROM users WHERE user_id = ?"
            user, head, kept = connection.execute(query, (user_id,)).fetchone() or (None, 0, None)
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
            user = self._save_user(connection, user, user_id, head, credit)
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
        await self._read(lambda _: None, queries.NAMED, (generation_id,))
        removed = await self._database.write(
            lambda connection: _remove(connection, generation_id, retention), self._deliver_removed
        )
        return removed is not None

    async def remove_user(self, user_id: str) -> Sequence[str]:
        generations = "SELECT generations.id FROM generations JOIN users ON users.id = owner WHERE user_id = ?"
        await self._read(lambda _: None, generations, (user_id,))
        removed, _ = await self._database.write(
            lambda connection: _remove_user(connection, user_id), lambda outcome: self._deliver_removed(outcome[1])
        )
        return removed

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        if not self._outbox:
            return []
        query = f"{queries.ENTRIES} WHERE undelivered = 1 AND events.id = end_event ORDER BY end_event LIMIT ?"
        generations = "SELECT id FROM generations WHERE undelivered = 1 ORDER BY end_event LIMIT ?"
        return list(map(_logged, await self._rows(query, (limit,), generations)))

    async def receiver_gone(self) -> None:
        pass

    async def delivered(self, generation_id: str) -> None:
        query = "UPDATE generations SET undelivered = 0 WHERE generation_id = ? AND undelivered = 1"
        await self._database.execute(query, generation_id)

    async def examine(self) -> None:
        checker = self._database.checker
        while not checker.done:
            began = time.monotonic()
            await self._read_intact(checker.next)
            # Uses at most a quarter of a core, so that other reads go first.
            await asyncio.sleep(3 * (time.monotonic() - began))

    async def probe(self) -> None:
        await self._database.write(_write_row)
        await self._database.read(lambda connection: connection.execute("SELECT epoch FROM log").fetchone())

    async def _rows(self, query: str, parameters: Sequence[object], generations: str | None = None) -> list[Any]:
        """The rows of the query. `generations` is as in `_read`; ``None``: it reads nothing that may be damaged."""
        return await self._read(lambda opened: opened.execute(query, parameters).fetchall(), generations, parameters)

    async def _read(self, query: Operation[T], rows: str | None, parameters: Sequence[object]) -> T:
        """The query's result. First checks the generations that `rows` selects, and sets damaged ones aside."""
        checker = self._database.checker

        def read(connection: sqlite3.Connection) -> T:
            if rows is not None and not checker.done:
                checker.check(connection, (key for (key,) in connection.execute(rows, parameters)))
            return query(connection)

        return await self._read_intact(read)

    async def _read_intact(self, query: Operation[T]) -> T:
        """The query's result. Whenever it raises `DamageFound`, sets those generations aside and tries again."""
        while True:
            try:
                return await self._database.read(query)
            except DamageFound as found:
                await self._database.write(partial(set_aside, keys=found.args), log_damage)

    def _append(self, connection: sqlite3.Connection, entry: Append) -> tuple[Logged, bool]:
        """The entry, and whether it is new: not a retry of an append that was committed before."""
        start = entry.start
        named = {"user_id": entry.user_id, "generation_id": entry.generation_id, "sequence": entry.sequence}
        parameters = {**named, "begins": start is not None}
        user, head, generation, first, free, *state = connection.execute(queries.KNOWN, parameters).fetchone()
        known = Known._make(state)
        if start is not None and start.key is not None:
            known = known._replace(idempotency_record=_by_key(connection, entry.user_id, start.key))
        accepted = decide(entry, known, credits=self._credits, clock=self._clock)
        if accepted is None:
            where = "WHERE events.generation = ? AND events.sequence = ?"
            row = connection.execute(f"{queries.ENTRIES} {where}", (generation, entry.sequence)).fetchone()
            return _logged(row), False
        event, credit, reserved = accepted
        position, end = (head or 0) + 1, None
        user = self._save_user(connection, user, entry.user_id, position, credit)
        if start is not None:
            first = position
            generation = connection.execute(
                "INSERT INTO generations (generation_id, owner, kind, order_json, idempotency_key, fingerprint,"
                " reserved, first_position) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (entry.generation_id, user, start.kind, start.request, start.key, start.fingerprint, reserved, first),
            ).lastrowid
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
            ended = position, microseconds(entry.at), inserted.lastrowid, self._outbox
            connection.execute(
                "UPDATE generations SET end_position = ?, ended_at = ?, end_event = ?, undelivered = ?, code = ?"
                " WHERE id = ?",
                (*ended, failure_code(entry.name, entry.event), generation),
            )
        place = entry.user_id, position, entry.event_id, entry.generation_id, entry.sequence
        return Logged(*place, entry.name, event, first, end, entry.images), True

    def _save_user(
        self, connection: sqlite3.Connection, user: int | None, user_id: str, head: int, credit: int | None
    ) -> int:
        """Save the head and the balance; `user` is the id of the row, if there is one. Return it."""
        if user is not None:
            connection.execute("UPDATE users SET head = ?, credit = ? WHERE id = ?", (head, credit, user))
            return user
        inserted = connection.execute(
            "INSERT INTO users (user_id, credit, head, floor, floor_id) VALUES (?, ?, ?, 0, ?)",
            (user_id, credit, head, zero_id(self.epoch, user_id)),
        )
        assert inserted.lastrowid is not None
        return inserted.lastrowid

    def _deliver(self, appended: tuple[Logged, bool]) -> None:
        entry, new = appended
        if new:
            self._followers.deliver(entry)

    def _deliver_removed(self, removed: Sequence[Removed | UserRemoved] | None) -> None:
        for notice in removed or ():
            self._followers.deliver(notice)


def _write_row(connection: sqlite3.Connection) -> None:
    # Not an update to the same value, which SQLite would not write.
    connection.execute("INSERT INTO log (epoch) VALUES ('')")
    connection.execute("DELETE FROM log WHERE epoch = ''")


def _logged(row: Sequence[Any]) -> Logged:
    return Logged._make((*row[:-1], json.loads(row[-1]) if row[-1] else {}))


def _histories(
    connection: sqlite3.Connection, where: str, parameters: Sequence[object] = (), events: str = queries.SUMMARY
) -> list[History]:
    """The generations of `queries.GENERATIONS` with this condition, and these of their events."""
    rows = connection.execute(f"{queries.GENERATIONS} {where}", parameters).fetchall()
    found: dict[str, list[Logged]] = {generation_id: [] for _, _, generation_id, *_ in rows}
    query = f"{queries.ENTRIES} WHERE {events} ORDER BY events.generation, events.sequence"
    for entry in map(_logged, connection.execute(query, (json.dumps([key for key, *_ in rows]),)) if rows else ()):
        found[entry.generation_id].append(entry)
    return [
        History(user_id, generation_id, kind, request, found[generation_id], free == 1)
        for _, user_id, generation_id, kind, request, free in rows
    ]


def _by_key(connection: sqlite3.Connection, user_id: str, key: str) -> IdempotencyRecord | None:
    row = connection.execute(f"SELECT generation_id, fingerprint {queries.OF_KEY}", (user_id, key)).fetchone()
    return row and IdempotencyRecord(*row)


def _remove(connection: sqlite3.Connection, generation_id: str, retention: bool) -> Sequence[Removed] | None:
    """The generation, unless it had been deleted before. ``None``: nothing was removed."""
    row = connection.execute(
        "SELECT generations.id, owner, user_id, end_position, deleted, floor"
        " FROM generations JOIN users ON users.id = owner WHERE generation_id = ?",
        (generation_id,),
    ).fetchone()
    if row is None:
        return None
    generation, user, user_id, end, deleted, floor = row
    if end is None:
        raise NotFinished
    if deleted and not retention:
        return None
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
        " undelivered = 0, code = NULL WHERE id = ?",
        (generation,),
    )
    # Deletes their events too (ON DELETE CASCADE).
    connection.execute("DELETE FROM generations WHERE owner = ? AND deleted = 1 AND end_position <= ?", (user, floor))
    return () if deleted else (Removed(user_id, generation_id),)


def _remove_user(connection: sqlite3.Connection, user_id: str) -> tuple[Sequence[str], Sequence[Removed | UserRemoved]]:
    """The ids of the removed generations, and what followers are notified of."""
    row = connection.execute("SELECT id FROM users WHERE user_id = ?", (user_id,)).fetchone()
    if row is None:
        return (), ()
    query = "SELECT generation_id, deleted, end_position FROM generations WHERE owner = ?"
    generations = connection.execute(query, row).fetchall()
    if any(end is None for _, _, end in generations):
        raise NotFinished
    # Deletes their events too, and what was set aside of them (ON DELETE CASCADE).
    connection.execute("DELETE FROM generations WHERE owner = ?", row)
    connection.execute("DELETE FROM grants WHERE owner = ?", row)
    connection.execute("DELETE FROM users WHERE id = ?", row)
    notices = [Removed(user_id, generation_id) for generation_id, deleted, _ in generations if not deleted]
    return [generation_id for generation_id, _, _ in generations], [*notices, UserRemoved(user_id)]
