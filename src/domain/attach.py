"""Where a socket begins: at the place it had reached, or at the present.

A cursor is given by the client's own code; a session is what the official client asks for by itself when it
comes back (connection state recovery: ``pid`` and ``offset`` in the handshake, Socket.IO 4.6).
"""

from typing import NamedTuple

from domain.feed import Cursor, feed_name
from domain.identity import Identity
from domain.ports import Clock, EventLog, Session, SessionStore


class Beginning(NamedTuple):
    """Where a socket begins."""

    cursor: Cursor
    #: Whether it goes on from where it was; otherwise it has missed what the present does not show.
    resumed: bool


class Attachments:
    """Finds the beginning, and keeps sessions."""

    def __init__(self, log: EventLog, sessions: SessionStore, clock: Clock) -> None:
        self._log = log
        self._sessions = sessions
        self._clock = clock

    async def begin(self, identity: Identity, text: object) -> Beginning:
        """Begin at the cursor of this text, if it is usable, else at the present."""
        cursor = self._parse(text, identity)
        if cursor is not None and await self._usable(identity.user_id, cursor):
            return Beginning(cursor, True)
        return Beginning(await self._log.present(identity.user_id), False)

    async def keep(self, pid: str, identity: Identity, base: Cursor) -> None:
        """From now on `pid` stands for this user, from this place on."""
        await self._sessions.save(pid, Session(identity, base), at=self._clock())

    async def recover(self, pid: str, offset: object, named: Identity | None) -> tuple[Identity, Beginning] | None:
        """Take up a session again, to be kept from where it is; ``None`` where it cannot be.

        `named` is whom the client says it is now: a session of somebody else is not taken up. An `offset` that is
        none of this feed's, or older than the session's base, counts as the base.
        """
        session = await self._sessions.load(pid, at=self._clock())
        if session is None or not self._good(session.identity):
            return None
        identity = session.identity
        if named is not None:
            if named.user_id != identity.user_id:
                return None
            identity = named
        given = self._parse(offset, identity)
        cursor = session.base if given is None or _older(given, session.base) else given
        if not await self._usable(identity.user_id, cursor):
            return None
        return identity, Beginning(cursor, True)

    async def renew(self, pid: str, identity: Identity) -> None:
        """The session's user has proved anew who it is."""
        session = await self._sessions.load(pid, at=self._clock())
        if session is not None:
            await self._sessions.save(pid, session._replace(identity=identity), at=self._clock())

    async def leave(self, pid: str, *, for_good: bool) -> None:
        """The session's socket is gone; `for_good`: its client said that it does not come back."""
        if for_good:
            await self._sessions.end(pid)
        else:
            await self._sessions.touch([pid], at=self._clock())

    def _good(self, identity: Identity) -> bool:
        return identity.expires_at is None or identity.expires_at > self._clock()

    def _parse(self, text: object, identity: Identity) -> Cursor | None:
        return Cursor.parse(text, feed_name(self._log.epoch, identity.user_id))

    async def _usable(self, user_id: str, cursor: Cursor) -> bool:
        return cursor.usable(await self._log.feed(user_id, after=cursor.seen, anchor=cursor.live, limit=0))


def _older(one: Cursor, other: Cursor) -> bool:
    return (one.live, one.seen) < (other.live, other.seen)
