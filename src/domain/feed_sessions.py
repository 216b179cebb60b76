"""Where a reader of a feed starts: at a cursor that its client has reached, or at the head.

A client gives a cursor itself, or it reconnects with a session (Socket.IO's connection state recovery: ``pid`` and
``offset`` in the handshake, from version 4.6).

The official client keeps the last cursor it saw and sends it as the offset, even if its socket has started again at an
earlier position since. So the cursors that a session sends carry the session's tag up to the head at its start. Later
cursors are the same for all devices and cannot have been sent before. An offset that is neither tagged nor later was
not reached in this session.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from domain.feed import Cursor, Feed, Logged, feed_name, tag_of
from domain.identity import Identity
from domain.ports.log import EventLog
from domain.ports.sessions import Session, Sessions
from domain.ports.system import Clock


class StartPosition(NamedTuple):
    """Where a device starts."""

    cursor: Cursor
    #: Whether it continues from a cursor of its client; otherwise it starts at the head.
    resumed: bool
    #: As in `domain.ports.sessions.Session`.
    head: int
    tag: str | None


class FeedSlice(NamedTuple):
    """Consecutive events of a feed."""

    events: Sequence[Logged]
    #: The text of the cursor after them.
    cursor: str


class FeedSessions:
    """Finds start positions, reads on from them, and keeps sessions."""

    def __init__(self, log: EventLog, sessions: Sessions, clock: Clock, new_tag: Callable[[], str]) -> None:
        self._log = log
        self._sessions = sessions
        self._clock = clock
        self._new_tag = new_tag
        #: Pids of sessions that are being ended. Their clients may reconnect before the store has ended them.
        self._ending: set[str] = set()
        #: Clients that came back with a session or a cursor: ``recovered``, or ``lost`` if it was not usable.
        self.recoveries: Counter[str] = Counter()

    async def open(self, identity: Identity, text: object, *, fresh: bool = False) -> StartPosition:
        """The position of the cursor with this text if it is usable, else the head.

        `fresh`: the client may still send an offset from before this start, so the session gets a tag.
        """
        user_id, tag = identity.user_id, self._new_tag() if fresh else None
        cursor = self._parse(text, user_id)
        feed = None if cursor is None else await self._feed_at(user_id, cursor)
        if text is not None:
            self.recoveries["lost" if feed is None else "recovered"] += 1
        if cursor is not None and feed is not None:
            return StartPosition(cursor, True, feed.head, tag)
        cursor = await self._log.head_cursor(user_id)
        return StartPosition(cursor, False, cursor.live, tag)

    async def head_cursor(self, user_id: str) -> str:
        """The text of the cursor at the feed's head, for a client that has seen nothing."""
        return (await self._log.head_cursor(user_id)).text(feed_name(self._log.epoch, user_id))

    async def read(self, user_id: str, text: str, limit: int) -> FeedSlice | None:
        """At most `limit` events after the cursor with this text; ``None`` if it is not usable."""
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
        return cursor and FeedSlice(events, cursor.text(feed_name(self._log.epoch, user_id)))

    async def save(self, pid: str, identity: Identity, start: StartPosition) -> None:
        """Store the session under its `pid`, in place of an earlier one."""
        session = Session(identity, start.cursor, start.head, start.tag)
        await self._sessions.save(pid, session, at=self._clock())

    async def resume(
        self, pid: str, offset: object, claimed_user: str | None = None, proof: Identity | None = None
    ) -> tuple[Identity, StartPosition] | None:
        """The user and position at which a session continues, to be saved again; ``None`` if it cannot.

        `claimed_user` is the user that the client names, `proof` the identity that it has proved now, each if there is
        one: a session of another user is not resumed. An `offset` that is not of this feed, older than the session's
        base, or not reached in this session counts as the base.
        """
        session = None if pid in self._ending else await self._sessions.load(pid, at=self._clock())
        if session is None or {claimed_user, proof and proof.user_id} - {None, session.identity.user_id}:
            return None
        expiry = session.identity.expires_at
        if expiry is not None and expiry <= self._clock():
            return None
        identity = proof or session.identity
        cursor = session.base
        given = self._parse(offset, identity.user_id)
        if given is not None and (given.live, given.seen) >= (session.base.live, session.base.seen):
            if await self._feed_at(identity.user_id, given) is None:
                return None
            if given.live > session.head or tag_of(offset) == session.tag:
                cursor = given
        if await self._feed_at(identity.user_id, cursor) is None:
            return None
        self.recoveries["recovered"] += 1
        return identity, StartPosition(cursor, True, session.head, session.tag)

    async def renew(self, pid: str, identity: Identity) -> None:
        """Store the identity that the session's user has proved again, with its new expiry."""
        session = await self._sessions.load(pid, at=self._clock())
        if session is not None:
            await self._sessions.save(pid, session._replace(identity=identity), at=self._clock())

    async def close(self, pid: str, *, permanent: bool) -> None:
        """The session's connection has ended. `permanent`: its client said that it will not reconnect."""
        if permanent:
            self._ending.add(pid)
            try:
                await self._sessions.end(pid)
            finally:
                self._ending.discard(pid)
        else:
            await self._sessions.touch([pid], at=self._clock())

    def _parse(self, text: object, user_id: str) -> Cursor | None:
        return Cursor.parse(text, feed_name(self._log.epoch, user_id))

    async def _feed_at(self, user_id: str, cursor: Cursor) -> Feed | None:
        """The feed's present state without entries; ``None`` if the cursor is not usable in it."""
        feed = await self._log.feed(user_id, after=cursor.seen, anchor=cursor.live, limit=0)
        return feed if cursor.usable(feed) else None
