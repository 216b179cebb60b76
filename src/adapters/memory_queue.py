"""The line of waiting generations, in this process: users take turns."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Collection


class MemoryQueue:
    """`domain.ports.WorkQueue` for one process."""

    def __init__(self) -> None:
        #: Each user's waiting generations; the user at the front is served next, then goes to the back.
        self._lines: OrderedDict[str, deque[str]] = OrderedDict()
        self._held: set[str] = set()
        self._changed = asyncio.Condition()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._lines.values()))

    @property
    def held(self) -> int:
        return len(self._held)

    async def offer(self, user_id: str, generation_id: str) -> None:
        async with self._changed:
            self._lines.setdefault(user_id, deque()).append(generation_id)
            self._changed.notify_all()

    async def withdraw(self, generation_id: str) -> bool:
        async with self._changed:
            for user_id, line in self._lines.items():
                if generation_id in line:
                    line.remove(generation_id)
                    if not line:
                        del self._lines[user_id]
                    self._changed.notify_all()
                    return True
            return False

    async def claim(self) -> str:
        async with self._changed:
            await self._changed.wait_for(lambda: self._lines)
            user_id, line = self._lines.popitem(last=False)
            generation_id = line.popleft()
            if line:
                self._lines[user_id] = line
            self._held.add(generation_id)
            return generation_id

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        return [generation_id for generation_id in generation_ids if generation_id not in self._held]

    async def release(self, generation_id: str) -> None:
        async with self._changed:
            self._held.discard(generation_id)
            self._changed.notify_all()

    async def settled(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._lines and not self._held)
