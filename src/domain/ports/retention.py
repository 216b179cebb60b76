"""Removal of what has expired, or was deleted."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Protocol


class Retention(Protocol):
    """Removal of finished generations. Every method may raise `LogUnavailable`."""

    async def finished_before(self, moment: datetime, limit: int) -> Sequence[str]:
        """Ids of generations that ended before `moment`, oldest end first. Includes tombstones."""

    async def remove(self, generation_id: str, *, retention: bool) -> bool:
        """Remove a finished generation whole: history, request, idempotency key. Return whether it was there.

        `retention` raises the feed's floor to its last position, and removes its tombstones too. Otherwise its
        tombstones are kept until the floor passes them.

        Raises:
            NotFinished: it still runs.
        """

    async def remove_user(self, user_id: str) -> Sequence[str]:
        """Remove all that is stored of a user: generations, tombstones, feed, balance, and what `grant` has recorded.

        Return the ids of the removed generations, deleted ones included. The user's next start is that of a new user,
        and every cursor except one before the first event is unusable.

        Raises:
            NotFinished: a generation still runs; nothing was removed.
        """

    async def images(self, generation_id: str) -> Collection[str]:
        """The names of all stored pictures that events of this generation bring."""

    async def set_aside(self, generation_id: str) -> bool:
        """Whether it counts as deleted because it cannot be read. Its pictures are kept until retention ends."""
