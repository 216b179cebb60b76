"""Finds damaged generations of the log, and sets them aside.

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
from collections import namedtuple
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

from domain.events import decode, event_name
from domain.feed import zero_id
from domain.identity import InvalidUserId, user_id
from domain.requests import GenerationRequest
from domain.stages import FLOWS

logger = logging.getLogger(__name__)

#: The largest position that a cursor can name.
_LAST_POSITION: Final = 10**15 - 1
_LAST: Final = (
    "SELECT coalesce(max(position), 0) FROM events"
    " WHERE owner = ? AND position BETWEEN 1 AND ? AND typeof(position) = 'integer'"
)
_LAST_MOMENT: Final = 253_402_300_799_999_999  # The end of the year 9999.
#: The id of the user who owns generations without a readable user. No real user has it.
_ORPHANS: Final = ""
_GENERATION_ID: Final = re.compile(r"[a-z0-9_]{1,128}")


# Any value may be in any column.
UserRow = namedtuple("UserRow", "id user_id credit head floor floor_id")
Event = namedtuple("Event", "id owner position generation sequence event_id name event images")
Generation = namedtuple(
    "Generation",
    "id generation_id owner kind order_json idempotency_key fingerprint reserved first_position end_position ended_at"
    " end_event deleted undelivered",
)


def _name_of(generation: Generation) -> str:
    """The id of the generation, or the id of its row if that cannot be read."""
    readable = isinstance(generation.generation_id, str) and _GENERATION_ID.fullmatch(generation.generation_id)
    return generation.generation_id if readable else f"(row {generation.id!r:.20})"


class Damaged(NamedTuple):
    """A generation that cannot be read."""

    #: Its id, or the id of its row.
    name: str
    #: The id of its user's row.
    user: object
    reason: str
    #: Whether its start took a credit.
    reserved: bool
    generation: Generation | None
    events: Sequence[Event]


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


def _select(
    connection: sqlite3.Connection, row: Any, table: str, where: str = "", *parameters: object
) -> Iterator[Any]:
    query = f"SELECT {', '.join(row._fields)} FROM {table} {where}"
    return map(row._make, connection.execute(query, parameters))


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
    """All users."""
    users, feeds, heads, owners = [], [], {}, set()
    for user in _select(connection, UserRow, "users"):
        if _is_user_id(user.user_id):
            owners.add(user.id)
        else:
            users.append((user.id, "its user id cannot be read"))
        if user.credit is not None and not _is_int(user.credit, 0, 10**18):
            users.append((user.id, "its balance cannot be read, and counts as 0"))
        heads[user.id] = user.head
        if not _is_feed(connection, user, epoch):
            # The highest valid position; 0 if there is none.
            (head,) = connection.execute(_LAST, (user.id, _LAST_POSITION)).fetchone()
            heads[user.id] = head
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


def _damaged_of(connection: sqlite3.Connection, keys: Iterable[int], users: Users) -> Iterator[Damaged]:
    """The damaged ones of the generations with these row ids."""
    for key in keys:
        for generation in _select(connection, Generation, "generations", "WHERE id = ?", key):
            events = list(_select(connection, Event, "events", "WHERE generation = ? ORDER BY sequence", key))
            if reason := _reason(generation, events, users):
                yield _damaged(generation, reason, events)


def _damaged(generation: Generation, reason: str, events: Sequence[Event]) -> Damaged:
    return Damaged(_name_of(generation), generation.owner, reason, generation.reserved != 0, generation, events)


def _without_row(connection: sqlite3.Connection) -> Iterator[Damaged]:
    """Generations whose row is missing, by their events."""
    # Finds them in the index alone; without INDEXED BY, SQLite would scan the whole table.
    ids = "SELECT id FROM events INDEXED BY event_of_sequence WHERE generation NOT IN (SELECT id FROM generations)"
    rows = _select(connection, Event, "events", f"WHERE id IN ({ids}) ORDER BY generation, sequence")
    for key, group in itertools.groupby(rows, lambda event: event.generation):
        events = list(group)
        yield Damaged(f"(row {key!r:.20})", events[0].owner, "its row is missing", False, None, events)


def _reason(generation: Generation, events: Sequence[Event], users: Users) -> str | None:
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
    if generation.deleted not in (0, 1) or _name_of(generation) != generation.generation_id:
        return "its row cannot be read"
    if generation.first_position != positions[0]:
        return "its first position is not that of its first event"
    ended = generation.end_position == positions[-1] and _is_int(generation.ended_at, 0, _LAST_MOMENT)
    if generation.deleted:
        emptied = all(event.event is None and _is_text(event.name) for event in events)
        return None if ended and emptied and generation.order_json == b"" else "its tombstone cannot be read"
    if not _is_request(generation):
        return "its request cannot be read"
    if not all(_is_event(event, generation) for event in events):
        return "an event cannot be read"
    names = [event.name for event in events]
    ends = [name in ("generation_completed", "generation_failed") for name in names]
    if names[0] != "generation_started" or any(ends[:-1]) or "generation_started" in names[1:]:
        return "its events are in an impossible order"
    if ends[-1]:
        right = ended and generation.end_event == events[-1].id
    else:
        right = generation.end_position is generation.ended_at is generation.end_event is None
    return None if right else "its end is wrong"


def _is_emptied(generation: Generation) -> bool:
    """Whether it is the tombstone of a generation none of whose positions could be read."""
    ended = _is_int(generation.end_position, 0, _LAST_POSITION) and _is_int(generation.ended_at, 0, _LAST_MOMENT)
    return generation.deleted == 1 and ended


def _is_request(generation: Generation) -> bool:
    flags = generation.reserved in (0, 1) and generation.undelivered in (0, 1)
    texts = _is_text(generation.fingerprint) and (
        generation.idempotency_key is None or _is_text(generation.idempotency_key)
    )
    if not (flags and texts and generation.kind in FLOWS and isinstance(generation.order_json, bytes)):
        return False
    try:
        return bool(GenerationRequest.decode(generation.order_json))
    except ValueError:
        return False


def _is_event(row: Event, generation: Generation) -> bool:
    try:
        event = decode(row.event)
        images = json.loads(row.images or "{}")
    except (TypeError, ValueError):
        return False
    stated = (event.generation_id, event.kind, event.sequence, event_name(event.status))
    expected = (generation.generation_id, generation.kind, row.sequence, row.name)
    named = isinstance(images, dict) and all(isinstance(name, str) for name in images.values())
    return isinstance(row.event, bytes) and stated == expected and event.status in FLOWS[event.kind] and named


def _is_placed(event: Event, user: object, head: int) -> bool:
    """Whether its position in the feed is valid."""
    return event.owner == user and _is_int(event.position, 1, head) and _is_int(event.event_id, 0, 2**63 - 1)


def _is_feed(connection: sqlite3.Connection, user: UserRow, epoch: str) -> bool:
    return (
        _is_int(user.head, 0, _LAST_POSITION)
        and _is_int(user.floor, 0, user.head)
        and _is_int(user.floor_id, 0, 2**63 - 1)
        and (user.floor > 0 or user.floor_id == _zero_id(epoch, user))
        and _event_id_at(connection, user.id, user.head + 1) is None
        and (user.head == user.floor or _event_id_at(connection, user.id, user.head) is not None)
    )


def _zero_id(epoch: str, user: UserRow) -> int:
    return zero_id(epoch, str(user.user_id).encode(errors="replace").decode())


def _event_id_at(connection: sqlite3.Connection, user: int, position: int) -> int | None:
    query = "SELECT event_id FROM events WHERE owner = ? AND position = ?"
    row = connection.execute(query, (user, position)).fetchone()
    return row[0] if row and _is_int(row[0], 0, 2**63 - 1) else None


def _is_int(value: object, least: int, most: int) -> bool:
    """Whether it is an integer in this range."""
    return isinstance(value, int) and least <= value <= most


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_user_id(value: object) -> bool:
    try:
        return isinstance(value, str) and user_id(value) == value
    except InvalidUserId:
        return value == _ORPHANS


# --- setting aside ---


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
            found = [*_damaged_of(connection, keys, users), *_without_row(connection)]
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
        return _damaged_of(connection, keys, _users_of(connection, keys))


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
        (_ORPHANS, zero_id(epoch, _ORPHANS)),
    )
    (row,) = connection.execute("SELECT id FROM users WHERE user_id = ?", (_ORPHANS,)).fetchone()
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
    named = before.generation_id if before and _name_of(before) == before.generation_id else f"damaged_0_{row}"
    ended_at = before.ended_at if before and _is_int(before.ended_at, 0, _LAST_MOMENT) else None
    span = (tombstones[0][0], tombstones[-1][0]) if tombstones else (0, 0)
    connection.execute(
        "UPDATE generations SET generation_id = ?, owner = ?, kind = 'edit', order_json = x'', idempotency_key = NULL,"
        " fingerprint = '', reserved = 0, first_position = ?, end_position = ?, end_event = ?, deleted = 1,"
        " ended_at = coalesce(?, unixepoch() * 1000000), undelivered = 0, code = NULL WHERE id = ?",
        (named, owner, *span, end_event, ended_at, row),
    )


# --- reporting ---


def report(connection: sqlite3.Connection, epoch: str) -> list[str]:
    """A line for each damaged thing, and for each that was set aside before, with what the operator has to decide."""
    with _any_text(connection):
        users = _check_users(connection, epoch)
        keys = [key for (key,) in connection.execute("SELECT id FROM generations")]
        damaged = [*_damaged_of(connection, keys, users), *_without_row(connection)]
        columns = f"reason, {', '.join(Generation._fields)}"
        for reason, *row in connection.execute(f"SELECT {columns} FROM damaged_generations ORDER BY tombstone"):
            damaged.append(_damaged(Generation._make(row), f"{reason} (set aside)", ()))
        lines = [
            f"generation {each.name} of user {_user_name(connection, each.user)}: {each.reason}; "
            + ("a person has to decide whether to refund its 1 credit" if each.reserved else "it took no credit")
            for each in damaged
        ]
        lines += [f"user {_user_name(connection, user)}: {reason}" for user, reason in users.damaged]
        return lines + [
            f"user {_user_name(connection, user)}: the bounds of its feed are wrong" for user, *_ in users.feeds
        ]


def _user_name(connection: sqlite3.Connection, row: object) -> str:
    """The user id in this row, or the row's id if that cannot be read."""
    found = isinstance(row, int) and connection.execute("SELECT user_id FROM users WHERE id = ?", (row,)).fetchone()
    return str(found[0]) if found and _is_user_id(found[0]) and found[0] else f"(row {row!r:.20})"
