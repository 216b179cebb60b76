"""Quotas of one process."""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable
from itertools import islice
from typing import Final

_MINUTE: Final = 60.0


class MemoryQuotas:
    """`domain.ports.quotas.Quotas` for one process."""

    def __init__(self) -> None:
        #: The times of each user's starts in the last minute, by the loop's clock; users by their last start.
        self._starts: dict[str, deque[float]] = {}
        #: The user and the bytes of each generation, and the bytes of each user.
        self._owners: dict[str, str] = {}
        self._sizes: defaultdict[str, int] = defaultdict(int)
        self._stored: defaultdict[str, int] = defaultdict(int)

    async def count_start(self, user_id: str, most: int) -> float | None:
        now = asyncio.get_running_loop().time()
        for user in list(islice(self._starts, 2)):
            if self._starts[user][-1] <= now - _MINUTE:
                del self._starts[user]
        starts = self._starts.pop(user_id, deque())
        while starts and starts[0] <= now - _MINUTE:
            starts.popleft()
        wait = None if len(starts) < most else starts[0] + _MINUTE - now
        if wait is None:
            starts.append(now)
        self._starts[user_id] = starts
        return wait

    async def forget_starts(self, user_id: str) -> None:
        self._starts.pop(user_id, None)

    async def admit_device(self, user_id: str, here: Callable[[], int], most: int) -> bool:
        return here() < most

    def device_left(self, user_id: str, here: Callable[[], int]) -> None:
        pass

    async def add_stored(self, generation_id: str, size: int, user_id: str | None = None) -> None:
        if user_id is not None:
            self._owners.setdefault(generation_id, user_id)
        if (user_id := self._owners.get(generation_id)) is None:
            return
        size = max(size, -self._sizes[generation_id])  # What a killed process left unnamed was never counted.
        self._sizes[generation_id] += size
        self._stored[user_id] += size
        if not self._stored[user_id]:
            del self._stored[user_id]

    async def forget_stored(self, generation_id: str) -> None:
        await self.add_stored(generation_id, -self._sizes.get(generation_id, 0))
        self._sizes.pop(generation_id, None)
        self._owners.pop(generation_id, None)

    async def owner(self, generation_id: str) -> str | None:
        return self._owners.get(generation_id)

    async def stored(self, user_id: str, *, besides: str | None = None) -> int:
        return self._stored.get(user_id, 0) - (self._sizes.get(besides, 0) if besides else 0)
