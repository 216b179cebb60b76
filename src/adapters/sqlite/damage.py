"""Finds damaged rows of the log.

Generations are checked as a whole, since one unreadable row makes its generation unreadable. A damaged generation
is set aside (see `adapters.sqlite.set_aside`). Messages never quote a row's data.
"""

import contextlib
import itertools
import json
import re
import sqlite3
from collections import namedtuple
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from domain.events import decode, event_name
from domain.feed import zero_id
from domain.identity import InvalidUserId, user_id
from domain.requests import GenerationRequest
from domain.stages import FLOWS

#: The largest position that a cursor can name.
_LAST_POSITION: Final = 10**15 - 1
LAST_MOMENT: Final = 253_402_300_799_999_999  # The end of the year 9999.
#: The id of the user who owns generations without a readable user. No real user has it.
ORPHANS: Final = ""
_GENERATION_ID: Final = re.compile(r"[a-z0-9_]{1,128}")


# Any value may be in any column.
UserRow = namedtuple("UserRow", "id user_id credit head floor floor_id")
Event = namedtuple("Event", "id owner position generation sequence event_id name event images")
Generation = namedtuple(
    "Generation",
    "id generation_id owner kind order_json idempotency_key fingerprint reserved first_position end_position ended_at"
    " end_event deleted undelivered",
)


def name_of(generation: Generation) -> str:
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
def any_text(connection: sqlite3.Connection) -> Iterator[None]:
    """Decode text that is not UTF-8 instead of raising an error."""
    text_factory = connection.text_factory
    connection.text_factory = lambda data: data.decode(errors="surrogateescape")
    try:
        yield
    finally:
        connection.text_factory = text_factory


def check_users(connection: sqlite3.Connection, epoch: str) -> Users:
    """All users."""
    users, feeds, heads, owners = [], [], {}, set()
    for user in _select(connection, UserRow, "users"):
        if _is_user_id(user.user_id):
            owners.add(user.id)
        else:
            users.append((user.id, "its user id cannot be read"))
        if user.credit is not None and not is_int(user.credit, 0, 10**18):
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


def users_of(connection: sqlite3.Connection, keys: Collection[int]) -> Users:
    """The users of these generations, after the corrections of `check_users`."""
    query = "SELECT id, user_id, head FROM users WHERE id IN (SELECT owner FROM generations WHERE id IN"
    rows = connection.execute(f"{query} (SELECT value FROM json_each(?)))", (json.dumps(list(keys)),)).fetchall()
    return Users({user: head for user, _, head in rows}, {user for user, name, _ in rows if _is_user_id(name)})


def damaged_of(connection: sqlite3.Connection, keys: Iterable[int], users: Users) -> Iterator[Damaged]:
    """The damaged ones of the generations with these row ids."""
    for key in keys:
        for generation in _select(connection, Generation, "generations", "WHERE id = ?", key):
            events = list(_select(connection, Event, "events", "WHERE generation = ? ORDER BY sequence", key))
            if reason := _reason(generation, events, users):
                yield _damaged(generation, reason, events)


def _damaged(generation: Generation, reason: str, events: Sequence[Event]) -> Damaged:
    return Damaged(name_of(generation), generation.owner, reason, generation.reserved != 0, generation, events)


def without_row(connection: sqlite3.Connection) -> Iterator[Damaged]:
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
    if not all(is_placed(event, generation.owner, head) for event in events) or positions != sorted(positions):
        return "a position of its events is impossible"
    if [event.sequence for event in events] != list(range(1, len(events) + 1)):
        return "the sequence of its events has a gap"
    if generation.deleted not in (0, 1) or name_of(generation) != generation.generation_id:
        return "its row cannot be read"
    if generation.first_position != positions[0]:
        return "its first position is not that of its first event"
    ended = generation.end_position == positions[-1] and is_int(generation.ended_at, 0, LAST_MOMENT)
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
    ended = is_int(generation.end_position, 0, _LAST_POSITION) and is_int(generation.ended_at, 0, LAST_MOMENT)
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


def is_placed(event: Event, user: object, head: int) -> bool:
    """Whether its position in the feed is valid."""
    return event.owner == user and is_int(event.position, 1, head) and is_int(event.event_id, 0, 2**63 - 1)


def _is_feed(connection: sqlite3.Connection, user: UserRow, epoch: str) -> bool:
    return (
        is_int(user.head, 0, _LAST_POSITION)
        and is_int(user.floor, 0, user.head)
        and is_int(user.floor_id, 0, 2**63 - 1)
        and (user.floor > 0 or user.floor_id == _zero_id(epoch, user))
        and _event_id_at(connection, user.id, user.head + 1) is None
        and (user.head == user.floor or _event_id_at(connection, user.id, user.head) is not None)
    )


def _zero_id(epoch: str, user: UserRow) -> int:
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
    return row[0] if row and is_int(row[0], 0, 2**63 - 1) else None


def is_int(value: object, least: int, most: int) -> bool:
    """Whether it is an integer in this range."""
    return isinstance(value, int) and least <= value <= most


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_user_id(value: object) -> bool:
    try:
        return isinstance(value, str) and user_id(value) == value
    except InvalidUserId:
        return value == ORPHANS


# --- reporting ---


def report(connection: sqlite3.Connection, epoch: str) -> list[str]:
    """A line for each damaged thing, and for each that was set aside before, with what the operator has to decide."""
    with any_text(connection):
        users = check_users(connection, epoch)
        keys = [key for (key,) in connection.execute("SELECT id FROM generations")]
        damaged = [*damaged_of(connection, keys, users), *without_row(connection)]
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
