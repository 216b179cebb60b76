"""Who works on which generation."""

from collections.abc import Collection
from typing import Protocol


class WorkQueue(Protocol):
    """Who works on which generation. Fair between users: nobody's many jobs delay another's first."""

    @property
    def waiting(self) -> int:
        """How many generations nobody works on yet."""

    @property
    def held(self) -> int:
        """How many generations are worked on."""

    async def offer(self, user_id: str, generation_id: str, *, fetching: bool = False) -> None:
        """Put a generation in line: in that of work, or in that of those whose image URLs are to be fetched first."""

    async def withdraw(self, generation_id: str) -> bool:
        """Take a generation out of the line. False: it does not wait there."""

    async def claim(self, *, fetching: bool = False) -> str:
        """Wait for the next generation in this line, and hold it.

        Of one user only so many are held at once from the line of those to be fetched for. One that is held from there,
        and claimed from the line of work meanwhile, is held for work.

        For ever in one process; where several share a line, for a while (a lease), unless it is renewed.
        """

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        """Hold these for another while. Return those of them that are no longer held: somebody else has them."""

    async def release(self, generation_id: str) -> None:
        """Let go of a generation that is held."""

    async def settled(self) -> None:
        """Wait until nothing waits and nothing is held."""
