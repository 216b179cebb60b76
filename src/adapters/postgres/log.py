"""The event log in PostgreSQL."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final

from adapters.postgres.appends import Appends
from adapters.postgres.database import Database, is_text
from adapters.postgres.nodes import Nodes
from adapters.postgres.tail import CHANNEL, Tail, logged
from domain.errors import CreditsOff, IdempotencyMismatch, LogUnavailable, NotFinished
from domain.feed import Cursor, Feed, Logged, zero_id
from domain.ports.ledger import Standing
from domain.ports.log import Deliver, History, IdempotencyRecord
from domain.ports.overview import Filter, Listing
from domain.ports.system import Clock
from domain.ports.webhook_outbox import CLAIM

#: Seconds after which a tail that could not read, or the heartbeat of this node, has failed.
_STALE: Final = 5.0
#: A position beyond every other.
_BEYOND: Final = 2**63 - 1

#: The generations that a condition selects, in an order, with their events. One statement, and so one snapshot.
_HISTORIES: Final = """
    WITH chosen AS MATERIALIZED (
        SELECT generations.*, row_number() OVER (ORDER BY {order}) AS rank
        FROM stagecast.generations WHERE NOT deleted AND {condition} ORDER BY {order} LIMIT {limit}
    )
    SELECT chosen.id AS number, chosen.kind, chosen.request_json, chosen.free, chosen.end_position,
        user_id, position, event_id, generation_id, sequence, name, event, first_position, images
    FROM chosen
    JOIN stagecast.users ON users.id = chosen.owner
    JOIN stagecast.events ON events.generation = chosen.id {events}
    ORDER BY chosen.rank, events.sequence
"""
_SUMMARY: Final = "AND events.sequence IN (1, chosen.last - 1, chosen.last)"
_WHOLE_ONE, _SUMMARY_OF_ONE = (
    _HISTORIES.format(condition="generation_id = $1", order="id", limit=1, events=events) for events in ("", _SUMMARY)
)
_UNFINISHED: Final = _HISTORIES.format(condition="end_position IS NULL", order="id", limit="ALL", events=_SUMMARY)
_OF_USER: Final = "owner = (SELECT id FROM stagecast.users WHERE user_id = ${})"

#: By status; any other one is that of the last event.
_WITH_STATUS: Final[Mapping[str | None, str]] = {
    None: "true",
    "active": "end_position IS NULL",
    "finished": "end_position IS NOT NULL",
    "completed": "end_position IS NOT NULL AND code IS NULL",
    "failed": "code IS NOT NULL",
}
_AT_STAGE: Final = """end_position IS NULL AND ${} = (
    -- The first one: what users sent comes after it, and may be no JSON to PostgreSQL.
    SELECT substring(convert_from(event, 'UTF8') FROM '"status":"([a-z_]+)"') FROM stagecast.events
    WHERE generation = generations.id AND sequence = generations.last
)"""


class PostgresLog:
    """The ports `EventLog`, `Ledger`, `Retention`, `Overview` and `WebhookOutbox` in PostgreSQL."""

    durable = True

    def __init__(
        self, database: Database, tail: Tail, nodes: Nodes, *, credits: int | None, clock: Clock, outbox: bool = False
    ) -> None:
        """`credits`: a new user's balance; ``None``: no balances. `outbox`: record ends as undelivered webhooks."""
        self.epoch = database.epoch
        self._database = database
        self._tail = tail
        self._nodes = nodes
        self._credits = credits
        self._outbox = outbox
        self.append = Appends(database, credits=credits, clock=clock, outbox=outbox, appended=self._appended).append

    def _appended(self) -> None:
        self._tail.wake()
        if not self._nodes.alone:
            self._database.notify(CHANNEL)

    async def mark_paid(self, generation_id: str) -> None:
        await self._database.fetch(
            "UPDATE stagecast.generations SET free = false WHERE generation_id = $1", generation_id
        )

    async def find_by_idempotency_key(self, user_id: str, key: str) -> IdempotencyRecord | None:
        rows = await self._database.fetch(
            "SELECT generation_id, fingerprint FROM stagecast.generations"
            f" WHERE {_OF_USER.format(1)} AND idempotency_key = $2",
            *(user_id, key),
        )
        return IdempotencyRecord(*rows[0]) if rows else None

    async def generation(self, generation_id: str) -> History | None:
        return await self._generation(_WHOLE_ONE, generation_id)

    async def summary(self, generation_id: str) -> History | None:
        return await self._generation(_SUMMARY_OF_ONE, generation_id)

    async def _generation(self, query: str, generation_id: str) -> History | None:
        return next(iter(_histories(await self._database.matching(query, generation_id))), None)

    async def generations(
        self, user_id: str, *, active: bool | None = None, before: int | None = None, limit: int
    ) -> Sequence[History]:
        before = _BEYOND if before is None else min(before, _BEYOND)
        status = _WITH_STATUS[{None: None, True: "active", False: "finished"}[active]]
        condition = f"{_OF_USER.format(1)} AND first_position < $2 AND {status}"
        query = _HISTORIES.format(condition=condition, order="first_position DESC", limit="$3", events=_SUMMARY)
        return _histories(await self._database.fetch(query, user_id, before, limit))

    async def listing(self, wanted: Filter, *, before: int | None = None, limit: int) -> Listing:
        given = {
            "id < ${}": _BEYOND if before is None else before,
            "generation_id = ${}": wanted.generation_id,
            _OF_USER: wanted.user_id,
            "kind = ${}": wanted.kind,
            "code = ${}": wanted.code,
            _AT_STAGE: None if wanted.status in _WITH_STATUS else wanted.status,
        }
        given = {condition: value for condition, value in given.items() if value is not None}
        numbered = (condition.format(number) for number, condition in enumerate(given, 1))
        query = _HISTORIES.format(
            condition=" AND ".join([_WITH_STATUS.get(wanted.status, "true"), *numbered]),
            order="id DESC" if wanted.user_id is None else "first_position DESC",
            limit=limit + 1,
            events=_SUMMARY,
        )
        rows = await self._database.matching(query, *given.values())
        numbers = list(dict.fromkeys(row["number"] for row in rows))
        return Listing(_histories(rows)[:limit], numbers[limit - 1] if len(numbers) > limit else None)

    async def failures(self, since: datetime) -> Mapping[str, int]:
        query = (
            "SELECT code, count(*) FROM stagecast.generations WHERE code IS NOT NULL AND ended_at >= $1 GROUP BY code"
        )
        return dict(await self._database.fetch(query, since))

    async def unfinished(self) -> Sequence[History]:
        return _histories(await self._database.fetch(_UNFINISHED))

    async def head_cursor(self, user_id: str) -> Cursor:
        rows = await self._database.rows("head_v1", user_id)
        if not rows:
            return Cursor(0, zero_id(self.epoch, user_id), 0)
        head, floor, floor_id, head_id, oldest = rows[0]
        return Cursor(head, floor_id if head == floor else head_id, head if oldest is None else oldest - 1)

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        rows = await self._database.rows("feed_v1", user_id, after, anchor, limit)
        if not rows:
            return Feed([], 0, 0, 0, zero_id(self.epoch, user_id) if anchor == 0 else None, ())
        head, floor, floor_id, id_there, deleted_spans, *_ = rows[0]
        entries = [logged(row, end=row["end_position"]) for row in rows if row["position"] is not None]
        upto = max(after, head) if len(entries) < limit else entries[-1].position if entries else after
        anchor_id = floor_id if anchor == floor else id_there if anchor > floor else None
        return Feed(entries, upto, head, floor, anchor_id, tuple(deleted_spans))

    @asynccontextmanager
    async def follow(self, deliver: Deliver) -> AsyncIterator[None]:
        await self._tail.caught_up()
        async with self._tail.followers.follow(deliver):
            yield

    async def probe(self) -> None:
        if max(self._nodes.age(), self._tail.age()) > _STALE:
            raise LogUnavailable

    async def standing(self, user_id: str) -> Standing:
        rows = await self._database.fetch("SELECT credit, active FROM stagecast.users WHERE user_id = $1", user_id)
        credit, active = rows[0] if rows else (None, 0)
        return Standing(self._credits if credit is None or self._credits is None else credit, active)

    async def grant(self, user_id: str, amount: int, *, key: str | None, at: datetime, until: datetime) -> int:
        if self._credits is None:
            raise CreditsOff
        zero = zero_id(self.epoch, user_id)
        [(outcome, credit)] = await self._database.rows(
            "grant_v1", *(user_id, zero, amount, key, at, until, self._credits)
        )
        if outcome == "mismatch":
            raise IdempotencyMismatch
        return int(credit)

    async def finished_before(self, moment: datetime, limit: int) -> Sequence[str]:
        rows = await self._database.fetch(
            "SELECT generation_id FROM stagecast.generations WHERE ended_at < $1 ORDER BY ended_at, end_event LIMIT $2",
            moment,
            limit,
        )
        return [row["generation_id"] for row in rows]

    async def remove(self, generation_id: str, *, retention: bool) -> bool:
        outcome = is_text(generation_id) and await self._database.call("remove_v1", generation_id, retention)
        if outcome == "unfinished":
            raise NotFinished
        self._tail.wake()
        return bool(outcome == "removed")

    async def images(self, generation_id: str) -> Collection[str]:
        rows = await self._database.fetch(
            "SELECT DISTINCT named.value FROM stagecast.generations"
            " JOIN stagecast.events ON events.generation = generations.id, jsonb_each_text(events.images) AS named"
            " WHERE generation_id = $1",
            generation_id,
        )
        return [row["value"] for row in rows]

    async def remove_user(self, user_id: str) -> Sequence[str]:
        removed: Sequence[str] | None = await self._database.call("remove_user_v1", user_id)
        if removed is None:
            raise NotFinished
        self._tail.wake()
        return removed

    async def set_aside(self, generation_id: str) -> bool:
        return False

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        if not self._outbox:
            return []
        rows = await self._database.rows("claim_undelivered_v1", self._nodes.id, CLAIM, limit)
        return [logged(row, end=row["end_position"]) for row in rows]

    async def receiver_gone(self) -> None:
        await self._database.fetch("UPDATE stagecast.nodes SET webhook_gone = true WHERE id = $1", self._nodes.id)

    async def delivered(self, generation_id: str) -> None:
        await self._database.fetch(
            "UPDATE stagecast.generations SET undelivered = false WHERE generation_id = $1 AND undelivered",
            generation_id,
        )


def _histories(rows: Sequence[Any]) -> list[History]:
    """The generations of a `_HISTORIES` query, whose events are next to each other."""
    histories: list[History] = []
    events: list[Logged] = []
    for row in rows:
        entry = logged(row, end=row["end_position"])
        if not histories or histories[-1].generation_id != entry.generation_id:
            events = []
            place = entry.user_id, entry.generation_id
            histories.append(History(*place, row["kind"], row["request_json"], events, row["free"]))
        events.append(entry)
    return histories
