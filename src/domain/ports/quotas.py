"""What each user has used up of the limits, on all nodes together."""

from collections.abc import Callable
from typing import Protocol


class Quotas(Protocol):
    """Counts of each user. Every method that is awaited may raise `LogUnavailable`."""

    async def count_start(self, user_id: str, most: int) -> float | None:
        """Count a start, unless the user has had `most` within a minute: then return the seconds until the next."""

    async def forget_starts(self, user_id: str) -> None:
        """Forget the user's starts of the last minute."""

    async def admit_device(self, user_id: str, here: Callable[[], int], most: int) -> bool:
        """Whether the user may have one more device than `here` on this node: at most so many on all nodes."""

    def device_left(self, user_id: str, here: Callable[[], int]) -> None:
        """The user has one device less on this node: so many as `here` returns, soon."""

    async def add_stored(self, generation_id: str, size: int, user_id: str | None = None) -> None:
        """Count so many bytes of images more, or less. Those of an unknown generation count if its user is given."""

    async def forget_stored(self, generation_id: str) -> None:
        """Count no image of this generation any more."""

    async def owner(self, generation_id: str) -> str | None:
        """The user for whom images of this generation are counted, if any are."""

    async def stored(self, user_id: str, *, besides: str | None = None) -> int:
        """The bytes of this user's images, apart from those of one generation."""
