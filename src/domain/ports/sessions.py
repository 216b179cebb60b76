"""Sessions, from which reconnecting sockets are restored."""

from collections.abc import Collection
from datetime import datetime
from typing import Final, NamedTuple, Protocol

from domain.feed import Cursor
from domain.identity import Identity

#: Sessions of one user; beyond them, the least recently used are removed.
PER_USER: Final = 1_000


class Session(NamedTuple):
    """The state from which a reconnecting socket is restored."""

    identity: Identity
    #: Where the session began, and where a client continues that has received no event yet.
    base: Cursor
    #: The newest position of the feed when it began.
    head: int
    #: Marks the cursors up to `head` that this session sends, if its client may remember others.
    tag: str | None


class Sessions(Protocol):
    """Sessions by their ``pid``, kept as long as retention after they were last touched, where the log is kept."""

    async def save(self, pid: str, session: Session, *, at: datetime) -> None:
        """Store the session, in place of an earlier one with this pid."""

    async def load(self, pid: str, *, at: datetime) -> Session | None:
        """The session with this pid; ``None`` if there is none, or it has expired."""

    async def touch(self, pids: Collection[str], *, at: datetime) -> None:
        """Extend the sessions with these pids."""

    async def taken_over(self) -> Collection[str]:
        """The pids whose sessions this node saved and another node has saved since, once each."""

    async def end_all(self, user_id: str) -> None:
        """Remove all sessions of this user."""

    async def end(self, pid: str) -> None:
        """Remove the session."""
