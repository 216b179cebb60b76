"""Sessions in the database of the durable log."""

import json
import sqlite3
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Final

from adapters.sqlite.database import Database
from adapters.sqlite.values import is_text, microseconds, moment
from domain.feed import Cursor
from domain.identity import Identity
from domain.ports.sessions import PER_USER, Session

#: Expired sessions that one save removes: more than it adds, and few enough to be fast.
_EXPIRED: Final = 100


class SqliteSessions:
    """`domain.ports.sessions.Sessions` in SQLite."""

    def __init__(self, database: Database, retention: timedelta) -> None:
        self._database = database
        self._retention = retention

    async def save(self, pid: str, session: Session, *, at: datetime) -> None:
        user_id, expires_at, service = session.identity
        expires = None if expires_at is None else microseconds(expires_at)
        base = (*session.base[:3], json.dumps(session.base.open_tombstones))
        row = (pid, user_id, expires, service, *base, session.head, session.tag, microseconds(at))

        def save(connection: sqlite3.Connection) -> None:
            connection.execute(
                "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE touched_at <= ? LIMIT ?)",
                (self._expired(at), _EXPIRED),
            )
            connection.execute(
                "REPLACE INTO sessions"
                " (pid, user_id, expires_at, service, live, event_id, seen, open_tombstones, head, tag, touched_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            connection.execute(
                "DELETE FROM sessions WHERE id IN"
                " (SELECT id FROM sessions WHERE user_id = ? ORDER BY touched_at DESC, id DESC LIMIT -1 OFFSET ?)",
                (user_id, PER_USER),
            )

        await self._database.write(save)

    async def load(self, pid: str, *, at: datetime) -> Session | None:
        if not is_text(pid):
            return None
        query = (
            "SELECT user_id, expires_at, service, live, event_id, seen, open_tombstones, head, tag"
            " FROM sessions WHERE pid = ? AND touched_at > ?"
        )
        parameters = pid, self._expired(at)
        row = await self._database.read(lambda connection: connection.execute(query, parameters).fetchone())
        if row is None:
            return None
        user_id, expires, service, live, event_id, seen, open_tombstones, head, tag = row
        try:
            identity = Identity(user_id, None if expires is None else moment(expires), service=bool(service))
            cursor = Cursor(live, event_id, seen, tuple(map(int, json.loads(open_tombstones))))
            readable = 0 <= cursor.seen <= cursor.live and event_id >= 0 and head >= 0 and isinstance(user_id, str)
        except (TypeError, ValueError, OverflowError):
            readable = False
        # An unreadable session counts as missing: its client authenticates, and resumes from its own cursor.
        return Session(identity, cursor, head, tag) if readable else None

    async def touch(self, pids: Collection[str], *, at: datetime) -> None:
        touched, expired = microseconds(at), self._expired(at)
        query = "UPDATE sessions SET touched_at = ? WHERE pid = ? AND touched_at > ?"
        if rows := [(touched, pid, expired) for pid in pids if is_text(pid)]:
            await self._database.write(lambda connection: connection.executemany(query, rows))

    async def taken_over(self) -> Collection[str]:
        return ()

    async def end(self, pid: str) -> None:
        if is_text(pid):
            await self._database.execute("DELETE FROM sessions WHERE pid = ?", pid)

    async def end_all(self, user_id: str) -> None:
        await self._database.execute("DELETE FROM sessions WHERE user_id = ?", user_id)

    def _expired(self, at: datetime) -> int:
        """Sessions touched at or before this time (microseconds since 1970) have expired."""
        return microseconds(at - self._retention)
