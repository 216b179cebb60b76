"""Sessions in memory."""

from collections.abc import Collection
from datetime import datetime, timedelta

from domain.ports.sessions import PER_USER, Session


class MemorySessions:
    """`domain.ports.sessions.Sessions` in memory."""

    def __init__(self, retention: timedelta) -> None:
        self._retention = retention
        #: In order of their last touch.
        self._sessions: dict[str, tuple[Session, datetime]] = {}
        self._pids: dict[str, dict[str, None]] = {}

    async def save(self, pid: str, session: Session, *, at: datetime) -> None:
        self._forget(pid)
        self._expire(at)
        self._sessions[pid] = session, at
        pids = self._pids.setdefault(session.identity.user_id, {})
        pids[pid] = None
        if len(pids) > PER_USER:
            self._forget(next(iter(pids)))

    async def load(self, pid: str, *, at: datetime) -> Session | None:
        self._expire(at)
        session, _ = self._sessions.get(pid, (None, None))
        return session

    async def touch(self, pids: Collection[str], *, at: datetime) -> None:
        for pid in pids:
            if (session := await self.load(pid, at=at)) is not None:
                await self.save(pid, session, at=at)

    async def taken_over(self) -> Collection[str]:
        return ()

    async def end(self, pid: str) -> None:
        self._forget(pid)

    async def end_all(self, user_id: str) -> None:
        for pid in list(self._pids.get(user_id, ())):
            self._forget(pid)

    def _expire(self, at: datetime) -> None:
        while self._sessions:
            pid, (_, touched) = next(iter(self._sessions.items()))
            if touched > at - self._retention:
                return
            self._forget(pid)

    def _forget(self, pid: str) -> None:
        session, _ = self._sessions.pop(pid, (None, None))
        if session is not None:
            pids = self._pids[session.identity.user_id]
            del pids[pid]
            if not pids:
                del self._pids[session.identity.user_id]
