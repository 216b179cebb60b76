"""Sessions: what a socket that comes back is restored to."""

from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple, Protocol

from domain.feed import Cursor
from domain.identity import Identity


class Session(NamedTuple):
    """What a socket that comes back is restored to."""

    identity: Identity
    #: Where the session began: what a client that has seen no event yet goes on from.
    base: Cursor
    #: The newest position of the feed when it began.
    head: int
    #: Marks the cursors up to there that it was sent, where its client may remember others.
    tag: str | None


class Sessions(Protocol):
    """Sessions by their ``pid``, kept as long as retention after they were last touched, where the log is kept."""

    async def save(self, pid: str, session: Session, *, at: datetime) -> None:
        """Keep the session, in place of an earlier one."""

    async def load(self, pid: str, *, at: datetime) -> Session | None:
        """The session of this pid, if it is still there."""

    async def touch(self, pids: Collection[str], *, at: datetime) -> None:
        """These are in use."""

    async def end(self, pid: str) -> None:
        """Forget the session."""
