"""Leases in memory, for one process: users take turns (round robin)."""

import asyncio
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Mapping
from typing import Final

from domain.ports.leases import Counts

#: How many generations of a user may fetch images at once.
_FETCHING_PER_USER: Final = 2


class _Line:
    """A FIFO per user. The user at the front is served next and then goes to the back."""

    def __init__(self, lock: asyncio.Lock) -> None:
        self.users: OrderedDict[str, deque[str]] = OrderedDict()
        #: Notified when a generation may be claimed.
        self.changed = asyncio.Condition(lock)

    def remove(self, user_id: str, generation_id: str) -> None:
        self.users[user_id].remove(generation_id)
        if not self.users[user_id]:
            del self.users[user_id]

    def order(self, busy: Mapping[str, int]) -> list[str]:
        """Everything that waits, next first, if nothing joins; `busy`: how many of each user are fetched for now."""
        rounds = defaultdict[int, list[str]](list)
        for user_id, waiting in self.users.items():
            ahead = busy.get(user_id, 0)
            for turn, generation_id in enumerate(waiting):
                rounds[turn if turn + ahead < _FETCHING_PER_USER else turn + ahead].append(generation_id)
        return [each for turn in sorted(rounds) for each in rounds[turn]]

    def take(self, user_id: str) -> str:
        waiting = self.users.pop(user_id)
        generation_id = waiting.popleft()
        if waiting:
            self.users[user_id] = waiting
        return generation_id


class MemoryLeases:
    """`domain.ports.leases.Leases` for one process, which holds what it has claimed until it releases it."""

    shared = False

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._work, self._fetches = _Line(self._lock), _Line(self._lock)
        #: The line and the user of each generation that waits.
        self._waiting: dict[str, tuple[_Line, str]] = {}
        self._held: set[str] = set()
        #: The user of each generation that is held for fetching.
        self._fetching: dict[str, str] = {}
        #: See `positions`, until something changes.
        self._positions: Mapping[str, int] | None = None
        #: Notified when a generation was withdrawn or released.
        self._removed = asyncio.Condition(self._lock)

    async def count(self) -> Counts:
        return Counts(len(self._waiting), len(self._held) + len(self._fetching))

    async def positions(self) -> Mapping[str, int]:
        if self._positions is None:
            busy = Counter(self._fetching.values())
            lines = self._work.order(Counter()), self._fetches.order(busy)
            self._positions = {each: rank for line in lines for rank, each in enumerate(line, 1)}
        return self._positions

    async def offer(self, user_id: str, generation_id: str, *, fetching: bool = False) -> bool:
        async with self._lock:
            known = generation_id in self._waiting or generation_id in self._held
            if known or (fetching and generation_id in self._fetching):
                return False
            self._positions = None
            line = self._fetches if fetching else self._work
            line.users.setdefault(user_id, deque()).append(generation_id)
            self._waiting[generation_id] = line, user_id
            line.changed.notify_all()
            return True

    async def withdraw(self, generation_id: str) -> bool:
        async with self._lock:
            self._positions = None
            self._removed.notify_all()
            line, user_id = self._waiting.pop(generation_id, (None, ""))
            if line is not None:
                line.remove(user_id, generation_id)
            return line is not None

    async def claim(self, *, fetching: bool = False) -> str:
        async with self._lock:
            line = self._fetches if fetching else self._work
            while (user_id := self._next_user(fetching)) is None:
                await line.changed.wait()
            self._positions = None
            generation_id = line.take(user_id)
            del self._waiting[generation_id]
            if fetching:
                self._fetching[generation_id] = user_id
            else:
                self._release_fetch(generation_id)
                self._held.add(generation_id)
            return generation_id

    def _next_user(self, fetching: bool) -> str | None:
        if not fetching:
            return next(iter(self._work.users), None)
        counts = Counter(self._fetching.values())
        return next((user for user in self._fetches.users if counts[user] < _FETCHING_PER_USER), None)

    def _release_fetch(self, generation_id: str) -> None:
        if self._fetching.pop(generation_id, None) is not None:
            self._fetches.changed.notify_all()

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        return [each for each in generation_ids if each not in self._held and each not in self._fetching]

    async def release(self, generation_id: str) -> None:
        async with self._lock:
            self._positions = None
            self._held.discard(generation_id)
            self._release_fetch(generation_id)
            self._removed.notify_all()

    async def abandoned(self) -> Collection[str]:
        return ()

    async def claim_chore(self, name: str, seconds: float) -> bool:
        return True

    async def drain(self) -> None:
        async with self._lock:
            await self._removed.wait_for(lambda: not (self._waiting or self._held or self._fetching))
