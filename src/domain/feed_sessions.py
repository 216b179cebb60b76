"""Where a reader of a feed begins: at the place it had reached, or at the present.

A cursor is given by the client's own code; a session is what the official client asks for by itself when it
comes back (connection state recovery: ``pid`` and ``offset`` in the handshake, Socket.IO 4.6).

The official client keeps the last cursor it saw whatever becomes of its socket, and says it as the offset although
the socket may since have begun anew, at an earlier place. Then a cursor up to where the feed ended when the session
began carries the session's tag; what lies beyond, the same for all devices, can only have been sent since. An offset
that is neither has not been reached in this session.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from domain.feed import Cursor, Feed, Logged, feed_name, tag_of
from domain.identity import Identity
from domain.ports import Clock, EventLog, Session, SessionStore


class Beginning(NamedTuple):
    """Where a socket begins."""

    cursor: Cursor
    #: Whether it goes on from where it was; otherwise it has missed what the present does not show.
    resumed: bool
    #: As in `domain.ports.Session`.
    head: int
    tag: str | None


class Stretch(NamedTuple):
    """A part of a feed."""

    events: Sequence[Logged]
    #: The text of the cursor behind them.
    cursor: str


class Attachments:
    """Finds the beginning, reads on from it, and keeps sessions."""

    def __init__(self, log: EventLog, sessions: SessionStore, clock: Clock, new_tag: Callable[[], str]) -> None:
        self._log = log
        self._sessions = sessions
        self._clock = clock
        self._new_tag = new_tag
        #: Sessions that are being ended. Their clients may be faster than the store.
        self._ending: set[str] = set()

    async def begin(self, identity: Identity, text: object, *, anew: bool = False) -> Beginning:
        """Begin at the cursor of this text, if it is usable, else at the present.

        `anew`: the client may remember a place that it reached otherwise.
        """
        user_id, tag = identity.user_id, self._new_tag() if anew else None
        cursor = self._parse(text, user_id)
        feed = None if cursor is None else await self._feed_at(user_id, cursor)
        if cursor is not None and feed is not None:
            return Beginning(cursor, True, feed.head, tag)
        cursor = await self._log.present(user_id)
        return Beginning(cursor, False, cursor.live, tag)

    async def present(self, user_id: str) -> str:
        """The text of the cursor of somebody who has seen nothing."""
        return (await self._log.present(user_id)).text(feed_name(self._log.epoch, user_id))

    async def read(self, user_id: str, text: str, limit: int) -> Stretch | None:
        """At most `limit` events after the cursor of this text; ``None`` where it is not usable."""
        cursor = self._parse(text, user_id)
        events: list[Logged] = []
        while cursor is not None and len(events) < limit:
            feed = await self._log.feed(user_id, after=cursor.seen, anchor=cursor.live, limit=limit - len(events))
            if not cursor.usable(feed):
                return None
            wanted, cursor = cursor.advance(feed)
            events.extend(entry for entry, _ in wanted)
            if feed.upto >= feed.head:
                break
        return cursor and Stretch(events, cursor.text(feed_name(self._log.epoch, user_id)))

    async def keep(self, pid: str, identity: Identity, beginning: Beginning) -> None:
        """From now on `pid` stands for this user, from this place on."""
        session = Session(identity, beginning.cursor, beginning.head, beginning.tag)
        await self._sessions.save(pid, session, at=self._clock())

    async def recover(
        self, pid: str, offset: object, named: str | None = None, proof: Identity | None = None
    ) -> tuple[Identity, Beginning] | None:
        """Take up a session again, to be kept from where it is; ``None`` where it cannot be.

        `named` is the user that the client says it is now, if it says so: a session of somebody else is not taken up.
        `proof` is who has been proved anew. An `offset` that is none of this feed's, older than the session's base, or
        not reached in this session, counts as the base.
        """
        session = None if pid in self._ending else await self._sessions.load(pid, at=self._clock())
        if session is None or not self._good(session.identity):
            return None
        if {named, proof and proof.user_id} - {None, session.identity.user_id}:
            return None
        identity = proof or session.identity
        cursor = session.base
        given = self._parse(offset, identity.user_id)
        if given is not None and not _older(given, session.base):
            if await self._feed_at(identity.user_id, given) is None:
                return None
            if given.live > session.head or tag_of(offset) == session.tag:
                cursor = given
        if await self._feed_at(identity.user_id, cursor) is None:
            return None
        return identity, Beginning(cursor, True, session.head, session.tag)

    async def renew(self, pid: str, identity: Identity) -> None:
        """The session's user has proved anew who it is."""
        session = await self._sessions.load(pid, at=self._clock())
        if session is not None:
            await self._sessions.save(pid, session._replace(identity=identity), at=self._clock())

    async def leave(self, pid: str, *, for_good: bool) -> None:
        """The session's socket is gone; `for_good`: its client said that it does not come back."""
        if for_good:
            self._ending.add(pid)
            try:
                await self._sessions.end(pid)
            finally:
                self._ending.discard(pid)
        else:
            await self._sessions.touch([pid], at=self._clock())

    def _good(self, identity: Identity) -> bool:
        return identity.expires_at is None or identity.expires_at > self._clock()

    def _parse(self, text: object, user_id: str) -> Cursor | None:
        return Cursor.parse(text, feed_name(self._log.epoch, user_id))

    async def _feed_at(self, user_id: str, cursor: Cursor) -> Feed | None:
        """The feed as it is, none of its entries; ``None`` where the cursor is not usable in it."""
        feed = await self._log.feed(user_id, after=cursor.seen, anchor=cursor.live, limit=0)
        return feed if cursor.usable(feed) else None


def _older(one: Cursor, other: Cursor) -> bool:
    return (one.live, one.seen) < (other.live, other.seen)
