"""Sets damaged generations of the log aside.

They become tombstones, like deleted ones; their rows move to separate tables until retention removes the tombstone.

Checking a million events takes almost a minute. So opening the log checks only users and unfinished generations. The
others are checked before they are first read, and in batches in the background.
"""

import logging
import math
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final, cast

from adapters.sqlite.damage import (
    LAST_MOMENT,
    ORPHANS,
    Damaged,
    Event,
    Generation,
    any_text,
    check_users,
    damaged_of,
    is_int,
    is_placed,
    name_of,
    users_of,
    without_row,
)
from domain.feed import zero_id

logger = logging.getLogger(__name__)


class DamageFound(Exception):
    """The generations with these row ids must be set aside before the query can be repeated."""

    def __init__(self, keys: Sequence[int]) -> None:
        super().__init__()
        self.keys = keys


class DamageChecker:
    """Checks generations, and tracks which have been checked since the file was opened.

    `check` and `next` are called by the reader thread only.
    """

    #: Generations checked at a time. Other reads wait meanwhile.
    _BATCH: Final = 20

    def __init__(self, epoch: str) -> None:
        self._epoch = epoch
        #: All generations up to this row id have been checked, and these above it.
        self._checked = -math.inf
        self._also = set[int]()

    @property
    def done(self) -> bool:
        """Whether everything has been checked."""
        return self._checked == math.inf

    def begin(self, connection: sqlite3.Connection) -> Sequence[Damaged]:
        """Repair users, set damaged unfinished generations aside, and return these. Logs damaged users."""
        with any_text(connection):
            users = check_users(connection, self._epoch)
            for user, reason in users.damaged:
                logger.error("user (row %s) is damaged: %s", user, reason)
            for user, head, floor, floor_id in users.feeds:
                feed = (head, floor, floor_id, user)
                connection.execute("UPDATE users SET head = ?, floor = ?, floor_id = ? WHERE id = ?", feed)
            # No event may be above the head, where the next one is appended.
            ahead = "SELECT generation FROM users CROSS JOIN events ON owner = users.id AND position > head"
            unfinished = "SELECT id FROM generations WHERE end_position IS NULL"
            query = f"SELECT id FROM generations WHERE id IN ({unfinished} UNION {ahead})"
            keys = [key for (key,) in connection.execute(query)]
            found = [*damaged_of(connection, keys, users), *without_row(connection)]
            _set_aside(connection, found, self._epoch)
            self._also.update(keys)
            return found

    def check(self, connection: sqlite3.Connection, keys: Iterable[int]) -> None:
        """Raise `DamageFound` if any of the generations with these row ids is damaged."""
        unchecked = {key for key in keys if key > self._checked}.difference(self._also)
        if unchecked:
            with any_text(connection):
                damaged = [each.generation.id for each in self._find(connection, unchecked) if each.generation]
            self._also.update(unchecked)
            if damaged:
                self._also.difference_update(damaged)
                raise DamageFound(damaged)

    def set_aside(self, connection: sqlite3.Connection, keys: Collection[int]) -> Sequence[Damaged]:
        """Set the damaged ones of these generations aside, and return them."""
        with any_text(connection):
            found = list(self._find(connection, keys))
            _set_aside(connection, found, self._epoch)
            return found

    def next(self, connection: sqlite3.Connection) -> None:
        """Check the next batch. After `DamageFound`, call it again."""
        query = "SELECT id FROM generations WHERE id > ? ORDER BY id LIMIT ?"
        keys = [key for (key,) in connection.execute(query, (self._checked, self._BATCH))]
        self.check(connection, keys)
        self._checked = keys[-1] if len(keys) == self._BATCH else math.inf
        self._also.difference_update(keys)

    def _find(self, connection: sqlite3.Connection, keys: Collection[int]) -> Iterator[Damaged]:
        return damaged_of(connection, keys, users_of(connection, keys))


def log_damage(found: Sequence[Damaged]) -> None:
    """Log a line for each generation that was set aside."""
    for damaged in found:
        logger.error("generation %s counts as deleted, since it is damaged: %s", damaged.name, damaged.reason)


def _set_aside(connection: sqlite3.Connection, found: Sequence[Damaged], epoch: str) -> None:
    """Turn each of these generations into a tombstone."""
    # Move all rows first: an event of one may be at the position of another's tombstone.
    owners = [_owner(connection, each, epoch) for each in found]
    rows = [_move_rows(connection, *each) for each in zip(found, owners, strict=True)]
    for each in zip(found, owners, rows, strict=True):
        _write_tombstone(connection, *each)


def _owner(connection: sqlite3.Connection, damaged: Damaged, epoch: str) -> int:
    """The row id of its user, or of the orphans' user if there is no such row."""
    user = damaged.user
    if isinstance(user, int) and connection.execute("SELECT 1 FROM users WHERE id = ?", (user,)).fetchone():
        return user
    connection.execute(
        "INSERT OR IGNORE INTO users (user_id, head, floor, floor_id) VALUES (?, 0, 0, ?)",
        (ORPHANS, zero_id(epoch, ORPHANS)),
    )
    (row,) = connection.execute("SELECT id FROM users WHERE user_id = ?", (ORPHANS,)).fetchone()
    return int(row)


def _move_rows(connection: sqlite3.Connection, damaged: Damaged, owner: int) -> int:
    """Move the rows to the tables of damaged rows, and return the row id of the tombstone to be."""
    row = (
        damaged.generation.id
        if damaged.generation
        else connection.execute(
            "INSERT INTO generations (generation_id, owner, kind, order_json, fingerprint, reserved, first_position)"
            " VALUES ('damaged_0_' || lower(hex(randomblob(8))), ?, 'edit', x'', '', 0, 0)",
            (owner,),
        ).lastrowid
    )
    connection.execute(
        f"INSERT INTO damaged_generations SELECT id, ?, {', '.join(Generation._fields)} FROM generations WHERE id = ?",
        (damaged.reason, row),
    )
    ids = [(event.id,) for event in damaged.events]
    copied = f"INSERT INTO damaged_events SELECT {row:d}, {', '.join(Event._fields)} FROM events WHERE id = ?"
    connection.executemany(copied, ids)
    connection.executemany("DELETE FROM events WHERE id = ?", ids)
    return cast(int, row)


def _write_tombstone(connection: sqlite3.Connection, damaged: Damaged, owner: int, row: int) -> None:
    """Turn the row into a tombstone at the readable positions."""
    before = damaged.generation
    (head,) = connection.execute("SELECT head FROM users WHERE id = ?", (owner,)).fetchone()
    events = sorted((each for each in damaged.events if is_placed(each, owner, head)), key=lambda each: each.position)
    tombstones = [(each.position, each.event_id) for each in events]
    if tombstones and (before is None or before.end_position != tombstones[-1][0]):
        # Clients may still show it as running: append its end, so that every cursor comes to it.
        head += 1
        tombstones.append((head, connection.execute("SELECT random() & 0x7fffffffffffffff").fetchone()[0]))
        connection.execute("UPDATE users SET head = ? WHERE id = ?", (head, owner))
    end_event = None
    for sequence, tombstone in enumerate(tombstones, 1):
        end_event = connection.execute(
            "INSERT INTO events (owner, generation, sequence, position, event_id, name) VALUES (?, ?, ?, ?, ?, '')",
            (owner, row, sequence, *tombstone),
        ).lastrowid
    named = before.generation_id if before and name_of(before) == before.generation_id else f"damaged_0_{row}"
    ended_at = before.ended_at if before and is_int(before.ended_at, 0, LAST_MOMENT) else None
    span = (tombstones[0][0], tombstones[-1][0]) if tombstones else (0, 0)
    connection.execute(
        "UPDATE generations SET generation_id = ?, owner = ?, kind = 'edit', order_json = x'', idempotency_key = NULL,"
        " fingerprint = '', reserved = 0, first_position = ?, end_position = ?, end_event = ?, deleted = 1,"
        " ended_at = coalesce(?, unixepoch() * 1000000), undelivered = 0, code = NULL WHERE id = ?",
        (named, owner, *span, end_event, ended_at, row),
    )
