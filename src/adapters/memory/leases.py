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

    def __init__(self) -> None:
        self.users: OrderedDict[str, deque[str]] = OrderedDict()
        #: Set when a generation may be claimed.
        self.changed = asyncio.Event()

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
        self._work, self._fetches = _Line(), _Line()
        #: The line and the user of each generation that waits.
        self._waiting: dict[str, tuple[_Line, str]] = {}
        #: The user of each generation that is held, and whether it is held for fetching.
        self._held: dict[str, tuple[str, bool]] = {}
        #: Set when a generation was withdrawn or released.
        self._removed = asyncio.Event()

    async def count(self) -> Counts:
        return Counts(len(self._waiting), len(self._held))

    async def positions(self) -> Mapping[str, int]:
        lines = self._work.order(Counter()), self._fetches.order(self._busy())
        return {each: rank for line in lines for rank, each in enumerate(line, 1)}

    async def offer(self, user_id: str, generation_id: str, *, fetching: bool = False) -> bool:
        held = self._held.get(generation_id)
        if generation_id in self._waiting or (held is not None and (fetching or held != (user_id, True))):
            return False
        line = self._fetches if fetching else self._work
        line.users.setdefault(user_id, deque()).append(generation_id)
        self._waiting[generation_id] = line, user_id
        line.changed.set()
        return True

    async def withdraw(self, generation_id: str) -> bool:
        self._removed.set()
        line, user_id = self._waiting.pop(generation_id, (None, ""))
        if line is not None:
            line.remove(user_id, generation_id)
        return line is not None

    async def claim(self, *, fetching: bool = False) -> str:
        line = self._fetches if fetching else self._work
        while (user_id := self._next_user(line)) is None:
            line.changed.clear()
            await line.changed.wait()
        generation_id = line.take(user_id)
        del self._waiting[generation_id]
        self._let_go(generation_id)
        self._held[generation_id] = user_id, fetching
        return generation_id

    def _busy(self) -> Counter[str]:
        """How many generations of each user are held for fetching."""
        return Counter(user_id for user_id, fetching in self._held.values() if fetching)

    def _next_user(self, line: _Line) -> str | None:
        busy = self._busy() if line is self._fetches else Counter[str]()
        return next((user_id for user_id in line.users if busy[user_id] < _FETCHING_PER_USER), None)

    def _let_go(self, generation_id: str) -> None:
        _, fetching = self._held.pop(generation_id, ("", False))
        if fetching:
            self._fetches.changed.set()

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        return [each for each in generation_ids if each not in self._held]

    async def release(self, generation_id: str) -> None:
        self._let_go(generation_id)
        self._removed.set()

    async def abandoned(self) -> Collection[str]:
        return ()

    async def claim_chore(self, name: str, seconds: float) -> bool:
        return True

    async def drain(self) -> None:
        while self._waiting or self._held:
            self._removed.clear()
            await self._removed.wait()
