"""What is read from the durable log, in SQL."""

from collections.abc import Mapping, Sequence
from typing import Final

from domain.ports.overview import Filter

#: A user's balance: NULL if none is kept, and 0 if it cannot be read.
CREDIT: Final = """
    iif(typeof(users.credit) = 'integer' AND users.credit BETWEEN 0 AND 1000000000000000000, users.credit,
        iif(users.credit IS NULL, NULL, 0))
"""

#: For `adapters.sqlite.log._logged`.
ENTRIES: Final = """
    SELECT users.user_id, events.position, events.event_id, generations.generation_id, events.sequence, events.name,
        events.event, generations.first_position, generations.end_position, events.images
    FROM events
    JOIN generations ON generations.id = events.generation
    JOIN users ON users.id = events.owner
"""

#: What an append is checked against: the user's row, the generation's row, and the fields of `Known` from them.
KNOWN: Final = f"""
    SELECT users.id, users.head, generations.id, generations.first_position, generations.free,
        generations.id IS NOT NULL, generations.end_position IS NOT NULL,
        iif(generations.deleted, 0,
            (SELECT coalesce(max(sequence), 0) FROM events WHERE generation = generations.id)),
        iif(generations.deleted, NULL,
            (SELECT event_id FROM events WHERE generation = generations.id AND sequence = :sequence)),
        NULL,
        iif(:begins, (SELECT count(*) FROM generations WHERE owner = users.id AND end_position IS NULL), 0),
        {CREDIT}, generations.reserved
    FROM (SELECT 1)
    LEFT JOIN users ON users.user_id = :user_id
    LEFT JOIN generations ON generations.generation_id = :generation_id
"""

#: A user's feed, with the event id and the open tombstones at an anchor.
FEED: Final = """
    SELECT id, head, floor, floor_id,
        (SELECT event_id FROM events WHERE owner = users.id AND position = :anchor),
        (
            SELECT json_group_array(first_position) FROM generations
            WHERE owner = users.id AND deleted = 1 AND end_position > :anchor AND first_position <= :anchor
        )
    FROM users WHERE user_id = :user_id
"""

HEAD: Final = """
    SELECT head, floor, floor_id,
        (SELECT event_id FROM events WHERE owner = users.id AND position = head),
        (SELECT min(first_position) FROM generations WHERE owner = users.id AND end_position IS NULL)
    FROM users WHERE user_id = ?
"""

#: Generations without their events.
GENERATIONS: Final = """
    SELECT generations.id, users.user_id, generation_id, kind, order_json, free
    FROM generations JOIN users ON users.id = generations.owner
"""

#: All events of the generations in a JSON array of row ids, and only those of a summary.
ALL: Final = "events.generation IN (SELECT value FROM json_each(?))"
SUMMARY: Final = f"""{ALL} AND (events.sequence = 1 OR events.sequence >=
    (SELECT max(sequence) FROM events AS ends WHERE ends.generation = generations.id) - 1)
"""
#: A user's, by whether they are active.
OF_USER: Final = {
    active: f"WHERE user_id = ? AND deleted = 0 AND first_position < ? {ended} ORDER BY first_position DESC LIMIT ?"
    for active, ended in {None: "", True: "AND end_position IS NULL", False: "AND end_position IS NOT NULL"}.items()
}
#: The unary plus keeps SQLite from scanning the whole table in order of ids.
UNFINISHED: Final = "WHERE end_position IS NULL ORDER BY +generations.id"

STANDING: Final = f"""
    SELECT {CREDIT}, (SELECT count(*) FROM generations WHERE owner = users.id AND end_position IS NULL)
    FROM users WHERE user_id = ?
"""

#: The generation of an idempotency key.
OF_KEY: Final = "FROM generations WHERE owner = (SELECT id FROM users WHERE user_id = ?) AND idempotency_key = ?"
#: The generation of an id.
NAMED: Final = "SELECT id FROM generations WHERE generation_id = ?"
#: Generations with events at or after a position of a feed.
IN_FEED: Final = """
    SELECT generation FROM events WHERE owner = (SELECT id FROM users WHERE user_id = ?) AND position >= ?
    ORDER BY position LIMIT 1 + ?
"""

#: Generations with events at or after the start of the oldest active one.
SINCE_OLDEST: Final = """
    SELECT generation FROM users JOIN events ON events.owner = users.id AND position >=
        coalesce((SELECT min(first_position) FROM generations WHERE owner = users.id AND end_position IS NULL), head)
    WHERE user_id = ?
"""

#: Generations with these row ids in JSON, newest first.
CHOSEN: Final = "WHERE generations.id IN (SELECT value FROM json_each(?)) ORDER BY generations.id DESC"
#: By status; any other one is that of the last event.
_WITH_STATUS: Final[Mapping[str | None, str]] = {
    None: "1",
    "active": "end_position IS NULL",
    "finished": "end_position IS NOT NULL",
    "completed": "end_position IS NOT NULL AND code IS NULL",
    "failed": "code IS NOT NULL",
}
_AT_STAGE: Final = """end_position IS NULL AND ? = (
    SELECT iif(json_valid(CAST(event AS TEXT)), json_extract(CAST(event AS TEXT), '$.status'), NULL)
    FROM events WHERE generation = generations.id ORDER BY sequence DESC LIMIT 1
)"""


def listing(wanted: Filter, before: int, limit: int) -> tuple[str, Sequence[object]]:
    """The row ids of the generations of all users that this filter applies to, newest first."""
    given = {
        "id < ?": before,
        "generation_id = ?": wanted.generation_id,
        "owner = (SELECT id FROM users WHERE user_id = ?)": wanted.user_id,
        "kind = ?": wanted.kind,
        "code = ?": wanted.code,
        _AT_STAGE: None if wanted.status in _WITH_STATUS else wanted.status,
    }
    given = {condition: value for condition, value in given.items() if value is not None}
    where = " AND ".join(["deleted = 0", _WITH_STATUS.get(wanted.status, "1"), *given])
    order, index = "id", ""
    if wanted.user_id is not None:
        order = "first_position"  # As the index of this user's generations has them.
    elif wanted.status == "active" or _AT_STAGE in given:
        index = "INDEXED BY unfinished_generations"  # SQLite would scan all generations.
    query = f"SELECT id FROM generations {index} WHERE {where} ORDER BY {order} DESC LIMIT ?"
    return query, [*given.values(), limit]
