"""The lines of waiting generations, in this process: users take turns."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Collection
from typing import Final

#: Of one user so many fetch at once.
_FETCHING_PER_USER: Final = 2


class _Line:
    """Each user's waiting generations; the user at the front is served next, then goes to the back."""

    def __init__(self) -> None:
        self._users: OrderedDict[str, deque[str]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._users.values()))

    def add(self, user_id: str, generation_id: str) -> None:
        self._users.setdefault(user_id, deque()).append(generation_id)

    def remove(self, generation_id: str) -> bool:
        for user_id, line in self._users.items():
            if generation_id in line:
                line.remove(generation_id)
                if not line:
                    del self._users[user_id]
                return True
        return False

    def next_user(self, busy: Collection[str] = ()) -> str | None:
        """The user whose turn it is, of those who are not busy."""
        return next((user_id for user_id in self._users if user_id not in busy), None)

    def take(self, user_id: str) -> str:
        line = self._users.pop(user_id)
        generation_id = line.popleft()
        if line:
            self._users[user_id] = line
        return generation_id


class MemoryQueue:
    """`domain.ports.WorkQueue` for one process."""

    def __init__(self) -> None:
        self._work, self._fetches = _Line(), _Line()
        self._held: set[str] = set()
        #: Those that are held to be fetched for, and whose they are.
        self._fetching: dict[str, str] = {}
        self._lock = asyncio.Lock()
        #: Something may be claimed from the line of work, or from that of fetches; or something was taken or let go of.
        self._work_changed = asyncio.Condition(self._lock)
        self._fetches_changed = asyncio.Condition(self._lock)
        self._taken = asyncio.Condition(self._lock)

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
            self._taken.notify_all()
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
                self._let_go_of_fetching(generation_id)
                self._held.add(generation_id)
            return generation_id

    def _next_user(self, fetching: bool) -> str | None:
        if not fetching:
            return self._work.next_user()
        counts = Counter(self._fetching.values())
        return self._fetches.next_user([user_id for user_id, count in counts.items() if count >= _FETCHING_PER_USER])

    def _let_go_of_fetching(self, generation_id: str) -> None:
        if self._fetching.pop(generation_id, None) is not None:
            self._fetches_changed.notify_all()

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        return [each for each in generation_ids if each not in self._held and each not in self._fetching]

    async def release(self, generation_id: str) -> None:
        async with self._lock:
            self._held.discard(generation_id)
            self._let_go_of_fetching(generation_id)
            self._taken.notify_all()

    async def settled(self) -> None:
        async with self._lock:
            await self._taken.wait_for(lambda: not self.waiting and not self.held)
