"""Finds damaged rows of the log, and sets them aside.

Generations are checked as a whole, since one unreadable row makes its generation unreadable. A damaged generation
becomes a tombstone, like a deleted one; its rows move to separate tables until retention removes the tombstone.
Messages never quote a row's data.

Checking a million events takes almost a minute. So opening the log checks only users and unfinished generations. The
others are checked before they are first read, and in batches in the background.
"""

import contextlib
import itertools
import json
import logging
import math
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

from domain.events import decode, event_name
from domain.feed import zero_id
from domain.identity import InvalidUserId, user_id
from domain.requests import GenerationRequest
from domain.stages import FLOWS, Kind

logger = logging.getLogger(__name__)

#: The tables of the rows set aside. Their columns have no type, so that every value is stored unchanged.
SCHEMA: Final = """
    CREATE TABLE damaged_generations (
        tombstone INTEGER NOT NULL REFERENCES generations ON DELETE CASCADE, reason TEXT NOT NULL,
        id, generation_id, user, kind, order_json, idempotency_key, fingerprint, reserved, first_position,
        end_position, ended_at, end_event, deleted, undelivered
    );
    CREATE TABLE damaged_events (
        tombstone INTEGER NOT NULL REFERENCES generations ON DELETE CASCADE,
        id, user, position, generation, sequence, event_id, name, event
    );
    CREATE INDEX damaged_generations_by_tombstone ON damaged_generations (tombstone);
    CREATE INDEX damaged_events_by_tombstone ON damaged_events (tombstone);
"""

#: A user's balance: NULL if none is kept, and 0 if it cannot be read.
CREDIT: Final = """
    iif(typeof(users.credit) = 'integer' AND users.credit BETWEEN 0 AND 1000000000000000000, users.credit,
        iif(users.credit IS NULL, NULL, 0))
"""

#: The largest position that a cursor can name.
_LAST_POSITION: Final = 10**15 - 1
_LAST_MOMENT: Final = 253_402_300_799_999_999  # The end of the year 9999.
_GENERATION_ID: Final = re.compile(r"[a-z0-9_]{1,128}")


class _User(NamedTuple):
    id: int
    user_id: object
    credit: object
    head: Any
    floor: Any
    floor_id: object


class _Generation(NamedTuple):
    id: Any
    generation_id: Any
    owner: Any
    kind: Any
    order_json: Any
    idempotency_key: Any
    fingerprint: Any
    reserved: Any
    first_position: Any
    end_position: Any
    ended_at: Any
    end_event: Any
    deleted: Any
    undelivered: Any

    @property
    def name(self) -> str:
        """The id, or the row's id if that cannot be read."""
        readable = isinstance(self.generation_id, str) and _GENERATION_ID.fullmatch(self.generation_id)
        return self.generation_id if readable else f"(row {self.id!r:.20})"


class _Event(NamedTuple):
    id: Any
    owner: Any
    position: Any
    generation: Any
    sequence: Any
    event_id: Any
    name: Any
    event: Any
    images: Any


class Damaged(NamedTuple):
    """A generation that cannot be read."""

    #: Its id, or the id of its row.
    name: str
    #: The id of its user's row.
    user: object
    reason: str
    #: Whether its start took a credit.
    reserved: bool
    generation: _Generation | None
    events: Sequence[_Event]


class Users(NamedTuple):
    """The users of the log, and the damage of their rows."""

    #: The head of each user's feed, corrected.
    heads: Mapping[int, int]
    #: Rows with a readable user id.
    owners: Collection[int]
    #: Rows with an unreadable balance, id or grant, and the reason.
    damaged: Sequence[tuple[int, str]] = ()
    #: Corrections: row, head, floor, event id at the floor.
    feeds: Sequence[tuple[int, int, int, int]] = ()


_GENERATIONS: Final = f"SELECT {', '.join(_Generation._fields)} FROM generations"
_EVENTS: Final = f"SELECT {', '.join(_Event._fields)} FROM events"


@contextlib.contextmanager
def _any_text(connection: sqlite3.Connection) -> Iterator[None]:
    """Decode text that is not UTF-8 instead of raising an error."""
    text_factory = connection.text_factory
    connection.text_factory = lambda data: data.decode(errors="surrogateescape")
    try:
        yield
    finally:
        connection.text_factory = text_factory


def _check_users(connection: sqlite3.Connection, epoch: str) -> Users:
    users, feeds, heads, owners = [], [], {}, set()
    for user in map(_User._make, connection.execute(f"SELECT {', '.join(_User._fields)} FROM users")):
        if _is_user_id(user.user_id):
            owners.add(user.id)
        else:
            users.append((user.id, "its user id cannot be read"))
        if user.credit is not None and not _is_int(user.credit, 0, 10**18):
            users.append((user.id, "its balance cannot be read, and counts as 0"))
        heads[user.id] = user.head
        if not _is_feed(connection, user, epoch):
            heads[user.id] = head = _last_position(connection, user.id)
            # Earlier events may be missing, so only cursors at the head stay valid.
            head_id = _event_id_at(connection, user.id, head)
            feeds.append((user.id, head, head, _zero_id(epoch, user) if head_id is None else head_id))
    unreadable = (
        "SELECT owner FROM grants WHERE typeof(amount) != 'integer' OR typeof(credit) != 'integer'"
        " OR owner NOT IN (SELECT id FROM users)"
    )
    users += [(user, "a record of a grant cannot be read") for (user,) in connection.execute(unreadable)]
    return Users(heads, owners, users, feeds)


def _users_of(connection: sqlite3.Connection, keys: Collection[int]) -> Users:
    """The users of these generations, after the corrections of `_check_users`."""
    query = "SELECT id, user_id, head FROM users WHERE id IN (SELECT owner FROM generations WHERE id IN"
    rows = connection.execute(f"{query} (SELECT value FROM json_each(?)))", (json.dumps(list(keys)),)).fetchall()
    return Users({user: head for user, _, head in rows}, {user for user, name, _ in rows if _is_user_id(name)})


def _damaged(connection: sqlite3.Connection, keys: Iterable[int], users: Users) -> Iterator[Damaged]:
    """The damaged ones of the generations with these row ids."""
    for key in keys:
        row = connection.execute(f"{_GENERATIONS} WHERE id = ?", (key,)).fetchone()
        if row is not None:
            generation = _Generation._make(row)
            rows = connection.execute(f"{_EVENTS} WHERE generation = ? ORDER BY sequence", (key,))
            events = list(map(_Event._make, rows))
            if reason := _reason(generation, events, users):
                yield Damaged(generation.name, generation.owner, reason, generation.reserved != 0, generation, events)


def _without_row(connection: sqlite3.Connection) -> Iterator[Damaged]:
    """Generations whose row is missing, by their events."""
    # Finds them in the index alone; without INDEXED BY, SQLite would scan the whole table.
    ids = "SELECT id FROM events INDEXED BY event_of_sequence WHERE generation NOT IN (SELECT id FROM generations)"
    rows = map(_Event._make, connection.execute(f"{_EVENTS} WHERE id IN ({ids}) ORDER BY generation, sequence"))
    for key, group in itertools.groupby(rows, lambda event: event.generation):
        events = list(group)
        yield Damaged(f"(row {key!r:.20})", events[0].owner, "its row is missing", False, None, events)


def _reason(generation: _Generation, events: Sequence[_Event], users: Users) -> str | None:
    """The damage of the generation; ``None`` if it is intact."""
    head = users.heads.get(generation.owner)
    if not events:
        return None if _is_emptied(generation) and head is not None else "it has no events"
    if head is None or (generation.owner not in users.owners and not generation.deleted):
        return "its user cannot be read"
    positions = [event.position for event in events]
    if not all(_is_placed(event, generation.owner, head) for event in events) or positions != sorted(positions):
        return "a position of its events is impossible"
    if [event.sequence for event in events] != list(range(1, len(events) + 1)):
        return "the sequence of its events has a gap"
    if generation.deleted not in (0, 1) or generation.name != generation.generation_id:
        return "its row cannot be read"
    if generation.first_position != positions[0]:
        return "its first position is not that of its first event"
    if generation.deleted:
        ended = generation.end_position == positions[-1] and _is_int(generation.ended_at, 0, _LAST_MOMENT)
        emptied = all(event.event is None for event in events) and all(_is_text(event.name) for event in events)
        return None if ended and emptied and generation.order_json == b"" else "its tombstone cannot be read"
    if not _is_order(generation):
        return "its order cannot be read"
    if not all(_is_event(event, generation) for event in events):
        return "an event cannot be read"
    statuses = [event.name for event in events]
    ends = [name in ("generation_completed", "generation_failed") for name in statuses]
    if statuses[0] != "generation_started" or any(ends[:-1]) or "generation_started" in statuses[1:]:
        return "its events are in an impossible order"
    end = (generation.end_position, generation.end_event) if ends[-1] else None
    if end is None:
        return (
            None
            if generation.end_position is generation.ended_at is generation.end_event is None
            else "its end is wrong"
        )
    ended = end == (positions[-1], events[-1].id) and _is_int(generation.ended_at, 0, _LAST_MOMENT)
    return None if ended else "its end is wrong"


def _is_emptied(generation: _Generation) -> bool:
    """Whether it is the tombstone of a generation none of whose positions could be read."""
    ended = _is_int(generation.end_position, 0, _LAST_POSITION) and _is_int(generation.ended_at, 0, _LAST_MOMENT)
    return generation.deleted == 1 and ended


def _is_order(generation: _Generation) -> bool:
    flags = generation.reserved in (0, 1) and generation.undelivered in (0, 1)
    key = generation.idempotency_key
    if not flags or generation.kind not in FLOWS or not _is_text(generation.fingerprint):
        return False
    if key is not None and not _is_text(key):
        return False
    try:
        return isinstance(generation.order_json, bytes) and bool(GenerationRequest.decode(generation.order_json))
    except ValueError:
        return False


def _is_event(row: _Event, generation: _Generation) -> bool:
    if not isinstance(row.event, bytes):
        return False
    try:
        event = decode(row.event)
    except ValueError:
        return False
    stated = (event.generation_id, event.kind, event.sequence, event_name(event.status))
    expected = (generation.generation_id, generation.kind, row.sequence, row.name)
    return stated == expected and event.status in FLOWS[cast(Kind, generation.kind)] and _is_images(row.images)


def _is_images(value: object) -> bool:
    try:
        images = {} if value is None else json.loads(cast(str, value))
    except (TypeError, ValueError):
        return False
    return isinstance(images, dict) and all(isinstance(name, str) for name in images.values())


def _is_placed(event: _Event, user: object, head: int) -> bool:
    """Whether its position in the feed is valid."""
    return event.owner == user and _is_int(event.position, 1, head) and _is_int(event.event_id, 0, 2**63 - 1)


def _is_feed(connection: sqlite3.Connection, user: _User, epoch: str) -> bool:
    if not (_is_int(user.head, 0, _LAST_POSITION) and _is_int(user.floor, 0, user.head)):
        return False
    if not _is_int(user.floor_id, 0, 2**63 - 1):
        return False
    if user.floor == 0 and user.floor_id != _zero_id(epoch, user):
        return False
    if _event_id_at(connection, user.id, user.head + 1) is not None:
        return False
    return user.head == user.floor or _event_id_at(connection, user.id, user.head) is not None


def _zero_id(epoch: str, user: _User) -> int:
    return zero_id(epoch, str(user.user_id).encode(errors="replace").decode())


def _last_position(connection: sqlite3.Connection, user: int) -> int:
    """The highest valid position; 0 if there is none."""
    query = (
        "SELECT max(position) FROM events WHERE owner = ? AND position BETWEEN 1 AND ? AND typeof(position) = 'integer'"
    )
    (position,) = connection.execute(query, (user, _LAST_POSITION)).fetchone()
    return position or 0


def _event_id_at(connection: sqlite3.Connection, user: int, position: int) -> int | None:
    query = "SELECT event_id FROM events WHERE owner = ? AND position = ?"
    row = connection.execute(query, (user, position)).fetchone()
    return row[0] if row and _is_int(row[0], 0, 2**63 - 1) else None


def _is_int(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and least <= value <= most


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_user_id(value: object) -> bool:
    try:
        return isinstance(value, str) and user_id(value) == value
    except InvalidUserId:
        return value == _ORPHANS


# --- setting aside -----------------------------------------------------------------------------------------

#: The id of the user who owns generations without a readable user. No real user has it.
_ORPHANS: Final = ""


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
        with _any_text(connection):
            users = _check_users(connection, self._epoch)
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
            found = [*_damaged(connection, keys, users), *_without_row(connection)]
            _set_aside(connection, found, self._epoch)
            self._also.update(keys)
            return found

    def check(self, connection: sqlite3.Connection, keys: Iterable[int]) -> None:
        """Raise `DamageFound` if any of the generations with these row ids is damaged."""
        unchecked = {key for key in keys if key > self._checked}.difference(self._also)
        if unchecked:
            with _any_text(connection):
                damaged = [each.generation.id for each in self._find(connection, unchecked) if each.generation]
            self._also.update(unchecked)
            if damaged:
                self._also.difference_update(damaged)
                raise DamageFound(damaged)

    def set_aside(self, connection: sqlite3.Connection, keys: Collection[int]) -> Sequence[Damaged]:
        """Set the damaged ones of these generations aside, and return them."""
        with _any_text(connection):
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
        return _damaged(connection, keys, _users_of(connection, keys))


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
    return _orphans_user(connection, epoch)


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
        f"INSERT INTO damaged_generations SELECT id, ?, {', '.join(_Generation._fields)} FROM generations WHERE id = ?",
        (damaged.reason, row),
    )
    ids = [(event.id,) for event in damaged.events]
    copied = f"INSERT INTO damaged_events SELECT {row:d}, {', '.join(_Event._fields)} FROM events WHERE id = ?"
    connection.executemany(copied, ids)
    connection.executemany("DELETE FROM events WHERE id = ?", ids)
    return cast(int, row)


def _write_tombstone(connection: sqlite3.Connection, damaged: Damaged, owner: int, row: int) -> None:
    """Turn the row into a tombstone at the readable positions."""
    before = damaged.generation
    (head,) = connection.execute("SELECT head FROM users WHERE id = ?", (owner,)).fetchone()
    events = sorted((each for each in damaged.events if _is_placed(each, owner, head)), key=lambda each: each.position)
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
    named = before.generation_id if before and before.name == before.generation_id else f"damaged_0_{row}"
    ended_at = before.ended_at if before and _is_int(before.ended_at, 0, _LAST_MOMENT) else None
    span = (tombstones[0][0], tombstones[-1][0]) if tombstones else (0, 0)
    connection.execute(
        "UPDATE generations SET generation_id = ?, owner = ?, kind = 'edit', order_json = x'', idempotency_key = NULL,"
        " fingerprint = '', reserved = 0, first_position = ?, end_position = ?, end_event = ?, deleted = 1,"
        " ended_at = coalesce(?, unixepoch() * 1000000), undelivered = 0 WHERE id = ?",
        (named, owner, *span, end_event, ended_at, row),
    )


def _orphans_user(connection: sqlite3.Connection, epoch: str) -> int:
    connection.execute(
        "INSERT OR IGNORE INTO users (user_id, head, floor, floor_id) VALUES (?, 0, 0, ?)",
        (_ORPHANS, zero_id(epoch, _ORPHANS)),
    )
    (user,) = connection.execute("SELECT id FROM users WHERE user_id = ?", (_ORPHANS,)).fetchone()
    return int(user)


# --- reporting ---------------------------------------------------------------------------------------------


def report(connection: sqlite3.Connection, epoch: str) -> list[str]:
    """A line for each damaged thing, and for each that was set aside before, with what the operator has to decide."""
    with _any_text(connection):
        users = _check_users(connection, epoch)
        keys = [key for (key,) in connection.execute("SELECT id FROM generations")]
        found = [*_damaged(connection, keys, users), *_without_row(connection)]
        return _report(connection, found, users)


def _report(connection: sqlite3.Connection, found: Sequence[Damaged], users: Users) -> list[str]:
    damaged = [(each.name, each.user, each.reason, each.reserved) for each in found]
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'damaged_generations'").fetchone():
        columns = ", ".join(_Generation._fields)
        for reason, *row in connection.execute(f"SELECT reason, {columns} FROM damaged_generations ORDER BY tombstone"):
            generation = _Generation._make(row)
            damaged.append((generation.name, generation.owner, f"{reason} (set aside)", generation.reserved != 0))
    lines = [
        f"generation {name} of user {_user_name(connection, user)}: {reason}; "
        + ("a person has to decide whether to refund its 1 credit" if reserved else "it took no credit")
        for name, user, reason, reserved in damaged
    ]
    lines += [f"user {_user_name(connection, user)}: {reason}" for user, reason in users.damaged]
    lines += [f"user {_user_name(connection, user)}: the bounds of its feed are wrong" for user, *_ in users.feeds]
    return lines


def _user_name(connection: sqlite3.Connection, row: object) -> str:
    """The user id in this row, or the row's id if that cannot be read."""
    found = isinstance(row, int) and connection.execute("SELECT user_id FROM users WHERE id = ?", (row,)).fetchone()
    return str(found[0]) if found and _is_user_id(found[0]) and found[0] else f"(row {row!r:.20})"
