"""The work queue in memory: users take turns (round robin)."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Collection
from typing import Final

#: How many generations of a user may download images at once.
_FETCHING_PER_USER: Final = 2


class _RoundRobin:
    """A FIFO per user; the user at the front is served next, then goes to the back."""

    def __init__(self) -> None:
        self._users: OrderedDict[str, deque[str]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._users.values()))

    def add(self, user_id: str, generation_id: str) -> None:
        self._users.setdefault(user_id, deque()).append(generation_id)

    def remove(self, generation_id: str) -> bool:
        for user_id, waiting in self._users.items():
            if generation_id in waiting:
                waiting.remove(generation_id)
                if not waiting:
                    del self._users[user_id]
                return True
        return False

    def next_user(self, busy: Collection[str] = ()) -> str | None:
        """The first user who is not busy; ``None`` if there is none."""
        return next((user_id for user_id in self._users if user_id not in busy), None)

    def take(self, user_id: str) -> str:
        waiting = self._users.pop(user_id)
        generation_id = waiting.popleft()
        if waiting:
            self._users[user_id] = waiting
        return generation_id


class MemoryQueue:
    """`domain.ports.leases.WorkQueue` for one process."""

    def __init__(self) -> None:
        self._work, self._fetches = _RoundRobin(), _RoundRobin()
        self._held: set[str] = set()
        #: The user of each generation that is claimed for fetching.
        self._fetching: dict[str, str] = {}
        self._lock = asyncio.Lock()
        #: Notified when work, or a fetch, may be claimed; and when a generation was withdrawn or released.
        self._work_changed = asyncio.Condition(self._lock)
        self._fetches_changed = asyncio.Condition(self._lock)
        self._removed = asyncio.Condition(self._lock)

    @property
    def waiting(self) -> int:
        return len(self._work) + len(self._fetches)

    @property
    def held(self) -> int:
        return len(self._held) + len(self._fetching)

    async def offer(self, user_id: str, generation_id: str, *, fetching: bool = False) -> None:
        async with self._lock:
            (self._fetches if fetching else self._work).add(user_id, generation_id)
            (self._fetches_changed if fetching else self._work_changed).notify_all()

    async def withdraw(self, generation_id: str) -> bool:
        async with self._lock:
            self._removed.notify_all()
            return self._work.remove(generation_id) or self._fetches.remove(generation_id)

    async def claim(self, *, fetching: bool = False) -> str:
        async with self._lock:
            changed = self._fetches_changed if fetching else self._work_changed
            while (user_id := self._next_user(fetching)) is None:
                await changed.wait()
            if fetching:
                generation_id = self._fetches.take(user_id)
                self._fetching[generation_id] = user_id
            else:
                generation_id = self._work.take(user_id)
                self._release_fetch(generation_id)
                self._held.add(generation_id)
            return generation_id

    def _next_user(self, fetching: bool) -> str | None:
        if not fetching:
            return self._work.next_user()
        counts = Counter(self._fetching.values())
        return self._fetches.next_user([user_id for user_id, count in counts.items() if count >= _FETCHING_PER_USER])

    def _release_fetch(self, generation_id: str) -> None:
        if self._fetching.pop(generation_id, None) is not None:
            self._fetches_changed.notify_all()

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        return [each for each in generation_ids if each not in self._held and each not in self._fetching]

    async def release(self, generation_id: str) -> None:
        async with self._lock:
            self._held.discard(generation_id)
            self._release_fetch(generation_id)
            self._removed.notify_all()

    async def settled(self) -> None:
        async with self._lock:
            await self._removed.wait_for(lambda: not self.waiting and not self.held)
