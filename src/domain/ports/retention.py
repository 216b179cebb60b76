"""What is removed from the log."""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol


class Retention(Protocol):
    """Removal of finished generations. Every method may raise `LogUnavailable`."""

    async def finished_before(self, moment: datetime, limit: int) -> Sequence[str]:
        """Ids of generations that ended before `moment`, those that ended first first.

        Deleted ones too, of which the places are left.
        """

    async def remove(self, generation_id: str, *, retention: bool) -> bool:
        """Remove a finished generation whole: history, order, idempotency key. Return whether it was there.

        `retention` raises the feed's floor to its last position, which forgets its places too. Without
        it they stay known, as empty places, until the floor passes them.

        Raises:
            NotFinished: it still runs.
        """
