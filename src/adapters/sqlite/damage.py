"""Finds damaged generations of the log, and sets them aside.

Generations are checked as a whole, since one unreadable row makes its generation unreadable. A damaged generation
becomes a tombstone, like a deleted one; its rows are kept in separate tables until retention removes the tombstone.
Messages never quote a row's data.

Checking a million events takes almost a minute. So opening the log checks only users and unfinished generations. The
others are checked before they are first read, and in batches in the background.
"""

import json
import logging
import math
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from domain.events import decode, event_name
from domain.identity import InvalidUserId, user_id
from domain.rehydrate import UNREADABLE
from domain.requests import GenerationRequest
from domain.stages import FLOWS, STARTED

logger = logging.getLogger(__name__)

_IMAGES: Final = TypeAdapter(dict[str, str])
#: The largest position that a cursor can name.
_LAST_POSITION: Final = 10**15 - 1

#: Whether an event has a valid place in a user's feed.
_PLACED: Final = """
    events.owner = users.id AND typeof(position) = 'integer' AND position BETWEEN 1 AND head
    AND typeof(event_id) = 'integer' AND event_id >= 0
"""
_NAMED: Final = "typeof(generation_id) = 'text' AND generation_id NOT GLOB '*[^a-z0-9_]*'"
#: Whether it has ended before the year 10000.
_ENDED: Final = "typeof(ended_at) = 'integer' AND ended_at BETWEEN 0 AND 253402300799999999"


def _is_intact(connection: sqlite3.Connection, key: int) -> bool:
    """Whether the generation with this row id can be read, with all of its events. A missing row counts as readable."""
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    owned = "generations LEFT JOIN users ON users.id = generations.owner"
    user = "iif(typeof(user_id) = 'text', CAST(user_id AS BLOB), x'') AS user"  # It may be no UTF-8.
    generation = f"SELECT generations.*, {user}, {_NAMED} AS named, {_ENDED} AS ended FROM {owned}"
    events = f"SELECT events.*, {_PLACED} AS placed FROM {owned} JOIN events ON generation = generations.id"
    try:
        row = cursor.execute(f"{generation} WHERE generations.id = ?", (key,)).fetchone()
        rows = cursor.execute(f"{events} WHERE generations.id = ? ORDER BY position", (key,)).fetchall()
        return row is None or _is_readable(row, rows)
    except (*UNREADABLE, InvalidUserId):
        return False
    except sqlite3.OperationalError as error:
        if hasattr(error, "sqlite_errorcode"):
            raise
        return False  # A text is not UTF-8.


def _is_readable(row: Any, events: Sequence[Any]) -> bool:
    """Whether the rows fit together. If they do not, it may raise `UNREADABLE` or `InvalidUserId` instead."""
    if not row["named"] or row["first_position"] != events[0]["position"] or not all(each["placed"] for each in events):
        return False
    ended = row["ended"] and row["end_position"] == events[-1]["position"]
    match dict(row):
        case {"deleted": 1, "order_json": b""}:
            return ended and all(
                each["event"] is None and each["images"] is None and isinstance(each["name"], str) for each in events
            )
        case {"deleted": 0, "order_json": bytes(), "fingerprint": str(), "reserved": 0 | 1, "undelivered": 0 | 1}:
            GenerationRequest.decode(row["order_json"])
        case _:
            return False
    terminal = []
    for sequence, each in enumerate(events, 1):
        event = decode(each["event"])
        _IMAGES.validate_json(each["images"] or "{}")
        stated = event.generation_id, event.kind, event.sequence, event_name(event.status)
        if stated != (row["generation_id"], row["kind"], each["sequence"], each["name"]) or sequence != event.sequence:
            return False
        if (event.status == STARTED) != (sequence == 1) or not isinstance(each["event"], bytes):
            return False
        terminal.append(FLOWS[event.kind][event.status].terminal)
    if terminal[-1]:
        ended = ended and row["end_event"] == events[-1]["id"]
    else:
        ended = all(row[name] is None for name in ("end_position", "ended_at", "end_event"))
    return ended and not any(terminal[:-1]) and user_id(row["user"].decode()) == row["user"].decode()


class DamageFound(Exception):
    """The generations whose row ids are its arguments must be set aside before the query can be repeated."""


class DamageChecker:
    """Checks generations, and tracks which have been checked since the file was opened.

    `check` and `next` are called by the reader thread only.
    """

    #: Generations checked at a time. Other reads wait meanwhile.
    _BATCH: Final = 20

    def __init__(self) -> None:
        #: All generations up to this row id have been checked, and these above it.
        self._checked = -math.inf
        self._also = set[int]()
        #: Whether everything has been checked.
        self.done = False

    def begin(self, connection: sqlite3.Connection) -> Sequence[str]:
        """Repair users, and set damaged unfinished generations aside. Return a line for each finding."""
        lines = _damaged_users(connection)
        connection.execute(_REPAIR_FEEDS)
        connection.execute("PRAGMA defer_foreign_keys = ON")
        if connection.execute(_ADD_MISSING_GENERATIONS).rowcount:
            connection.execute("UPDATE events SET generation = -id WHERE typeof(generation) != 'integer'")
        # No event may be above the head, where the next one is appended.
        ahead = "SELECT generation FROM users CROSS JOIN events ON owner = users.id AND position > head"
        unfinished = "SELECT id FROM generations WHERE end_position IS NULL"
        query = f"SELECT id FROM generations WHERE id IN ({unfinished} UNION {ahead})"
        keys = [key for (key,) in connection.execute(query)]
        self._also.update(keys)
        return [*lines, *set_aside(connection, keys)]

    def check(self, connection: sqlite3.Connection, keys: Iterable[int]) -> None:
        """Raise `DamageFound` if any of the generations with these row ids is damaged."""
        unchecked = {key for key in keys if key > self._checked}.difference(self._also)
        damaged = [key for key in unchecked if not _is_intact(connection, key)]
        self._also.update(unchecked.difference(damaged))
        if damaged:
            raise DamageFound(*damaged)

    def next(self, connection: sqlite3.Connection) -> None:
        """Check the next batch. After `DamageFound`, call it again."""
        query = "SELECT id FROM generations WHERE id > ? ORDER BY id LIMIT ?"
        keys = [key for (key,) in connection.execute(query, (self._checked, self._BATCH))]
        self.check(connection, keys)
        self._checked, self.done = max(keys, default=math.inf), not keys
        self._also.difference_update(keys)


_WRONG_FEED: Final = f"""
    typeof(head) != 'integer' OR typeof(floor) != 'integer' OR typeof(floor_id) != 'integer'
    OR head NOT BETWEEN 0 AND {_LAST_POSITION} OR floor NOT BETWEEN 0 AND head OR floor_id < 0
    OR EXISTS (SELECT 1 FROM events WHERE owner = users.id AND position = head + 1)
    OR head != floor AND NOT EXISTS (SELECT 1 FROM events WHERE position = head AND {_PLACED})
"""
#: The head becomes the highest valid position. Earlier events may be missing, so only cursors there stay valid.
_REPAIR_FEEDS: Final = f"""
    UPDATE users SET (head, floor, floor_id) = (
        SELECT coalesce(max(position), 0), coalesce(max(position), 0),
            iif(typeof(event_id) = 'integer' AND event_id >= 0, event_id, random() & 0x7fffffffffffffff)
        FROM events WHERE owner = users.id AND typeof(position) = 'integer' AND position BETWEEN 1 AND {_LAST_POSITION}
    ) WHERE {_WRONG_FEED}
"""
#: What may be wrong with a row of a user.
_DAMAGED_USERS: Final = {
    "its balance cannot be read, and counts as 0": (
        "typeof(credit) NOT IN ('null', 'integer') OR credit NOT BETWEEN 0 AND 1000000000000000000"
    ),
    "the bounds of its feed are wrong": _WRONG_FEED,
}
#: Rows for events whose generation has none. INDEXED BY, or SQLite would scan the whole table.
_ADD_MISSING_GENERATIONS: Final = """
    INSERT OR IGNORE INTO generations
        (id, generation_id, owner, kind, order_json, fingerprint, reserved, first_position)
    SELECT iif(typeof(generation) = 'integer', generation, -id), '(row ' || id || ')', owner, 'edit', x'', '', 0, 0
    FROM events INDEXED BY event_of_sequence WHERE generation NOT IN (SELECT id FROM generations)
"""

#: Turns generations into tombstones, and keeps copies of their rows.
_SET_ASIDE: Final = Path(__file__).with_name("set_aside.sql").read_text("utf-8").split(";")


def set_aside(connection: sqlite3.Connection, keys: Collection[int]) -> Sequence[str]:
    """Turn the damaged ones of these generations into tombstones. Return a line for each."""
    damaged = {"keys": json.dumps([key for key in keys if not _is_intact(connection, key)])}
    for statement in _SET_ASIDE:
        connection.execute(statement, damaged)
    names = connection.execute(
        "SELECT generation_id FROM generations WHERE id IN (SELECT value FROM json_each(:keys))", damaged
    )
    return [f"generation {name} counts as deleted, since it is damaged" for (name,) in names]


def log_damage(lines: Iterable[str]) -> None:
    """Log what was found."""
    for line in lines:
        logger.error("%s", line)


def report(connection: sqlite3.Connection) -> list[str]:
    """A line for each damaged thing, and for each that was set aside before, with what the operator has to decide.

    The connection is to a copy of the log, in which everything damaged is set aside.
    """
    lines = _damaged_users(connection)
    DamageChecker().begin(connection)
    set_aside(connection, [key for (key,) in connection.execute("SELECT id FROM generations")])
    query = """
        SELECT generations.generation_id, CAST(user_id AS BLOB), users.id, damaged_generations.reserved IS NOT 0
        FROM damaged_generations JOIN generations ON generations.id = tombstone
        JOIN users ON users.id = generations.owner ORDER BY tombstone
    """
    for name, *user, reserved in connection.execute(query):
        credit = "a person has to decide whether to refund its 1 credit" if reserved else "it took no credit"
        lines.append(f"generation {name} of user {_user_name(*user)} is damaged; {credit}")
    return lines


def _damaged_users(connection: sqlite3.Connection) -> list[str]:
    return [
        f"user {_user_name(*user)}: {reason}"
        for reason, condition in _DAMAGED_USERS.items()
        for user in connection.execute(f"SELECT CAST(user_id AS BLOB), id FROM users WHERE {condition}")
    ]


def _user_name(stored: bytes, row: int) -> str:
    """The stored user id, or the id of its row if it cannot be read."""
    try:
        return user_id(stored.decode(errors="replace"))
    except InvalidUserId:
        return f"(row {row})"
