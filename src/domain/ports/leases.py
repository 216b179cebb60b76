"""Leases: which node works on which generation, and which node does which chore."""

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple, Protocol

#: How many generations of a user may fetch images at once.
FETCHING_PER_USER: Final = 2


class Counts(NamedTuple):
    """Generations on all nodes; a moment old where several nodes share the leases."""

    #: Not claimed yet.
    waiting: int
    held: int


class Leases(Protocol):
    """Who works on what. Fair between users: one user's many generations do not delay another user's first.

    A generation waits in one of two lines: of work, or of what needs no worker yet (`fetching`: its image URLs are
    fetched first, or it was interrupted and has to be ended). A node that claims it holds it until it releases it.
    Where nodes share the leases, a node that does not renew them loses them.
    """

    @property
    def shared(self) -> bool:
        """Whether other nodes take over what this one leaves."""

    async def count(self) -> Counts:
        """How many generations wait, and how many are held."""

    async def positions(self) -> Mapping[str, int]:
        """The rank of each waiting generation in its line: 1 is claimed next, by whichever node.

        While a user fetches for as many as allowed, those that this user has waiting to be fetched for rank after
        everybody else's. Where nodes share the leases, ranks may be off by what a node claims at once.
        """

    async def offer(self, user_id: str, generation_id: str, *, fetching: bool = False) -> bool:
        """Put a generation in a line. False: it waits or is held already, and nothing has changed.

        One that is held for fetching may be offered for work. Claimed there, it is held for work. The node that has
        fetched for it should get it: another one has to fetch again.
        """

    async def withdraw(self, generation_id: str) -> bool:
        """Take a generation out of its line, in which its user's later ones move up. False: it does not wait."""

    async def claim(self, *, fetching: bool = False) -> str:
        """Wait for the next generation in this line, and hold it.

        Of one user only a few are held for fetching at once.
        """

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        """Go on holding these. Return those that this node no longer holds."""

    async def release(self, generation_id: str) -> None:
        """Stop holding a generation, if this node does. A shared lease of an unfinished one is then abandoned."""

    async def abandoned(self) -> Collection[str]:
        """Unfinished generations whose node has released them or died. They can be offered again."""

    async def claim_chore(self, name: str, seconds: float) -> bool:
        """Whether this node does this chore: for so many seconds no other node does, unless this one dies.

        The node that does it can claim it again before they are over. Two nodes may still overlap, for example if one
        was paused, so a chore must bear that.
        """

    async def drain(self) -> None:
        """Wait until this node has nothing left to do, for shutdown.

        Where nodes share the leases, it claims nothing new from now on, only what it has fetched for; otherwise it does
        all that waits.
        """
