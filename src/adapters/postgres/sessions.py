"""Sessions in PostgreSQL."""

from collections.abc import Collection
from datetime import datetime, timedelta

from adapters.postgres.database import Database, is_text
from domain.feed import Cursor
from domain.identity import Identity
from domain.ports.sessions import PER_USER, Session


class PostgresSessions:
    """`domain.ports.sessions.Sessions` in PostgreSQL."""

    def __init__(self, database: Database, retention: timedelta) -> None:
        self._database = database
        self._retention = retention

    async def save(self, pid: str, session: Session, *, at: datetime) -> None:
        user_id, expires_at, service = session.identity
        live, event_id, seen, tombstones = session.base
        await self._database.call(
            "save_session_v1",
            *(pid, user_id, expires_at, service, live, event_id, seen, tombstones, session.head, session.tag, at),
            *(at - self._retention, PER_USER, self._database.node),
        )

    async def load(self, pid: str, *, at: datetime) -> Session | None:
        rows = await self._database.matching(
            "SELECT user_id, expires_at, service, live, event_id, seen, open_tombstones, head, tag"
            " FROM stagecast.sessions WHERE pid = $1 AND touched_at > $2",
            pid,
            at - self._retention,
        )
        if not rows:
            return None
        user_id, expires_at, service, live, event_id, seen, tombstones, head, tag = rows[0]
        identity = Identity(user_id, expires_at, service=service)
        return Session(identity, Cursor(live, event_id, seen, tuple(tombstones)), head, tag)

    async def touch(self, pids: Collection[str], *, at: datetime) -> None:
        touched = list(filter(is_text, pids))
        if touched:
            await self._database.fetch(
                "WITH quickly AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))"
                " UPDATE stagecast.sessions SET touched_at = $1 FROM quickly WHERE pid = ANY ($2) AND touched_at > $3",
                *(at, touched, at - self._retention),
            )

    async def taken_over(self) -> Collection[str]:
        query = "DELETE FROM stagecast.takeovers WHERE node = $1 RETURNING pid"
        return [row["pid"] for row in await self._database.fetch(query, self._database.node)]

    async def end(self, pid: str) -> None:
        await self._database.matching("DELETE FROM stagecast.sessions WHERE pid = $1", pid)

    async def end_all(self, user_id: str) -> None:
        await self._database.fetch("DELETE FROM stagecast.sessions WHERE user_id = $1", user_id)
