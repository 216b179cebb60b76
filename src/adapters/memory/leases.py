"""Leases in memory, for one process: users take turns (round robin)."""

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

from domain.ports.leases import FETCHING_PER_USER, Counts


class _Place(NamedTuple):
    """The place of a generation in its line: lower turns are first, and of the same turn, those offered first."""

    user_id: str
    turn: int


class MemoryLeases:
    """`domain.ports.leases.Leases` for one process, which holds what it has claimed until it releases it."""

    shared = False

    def __init__(self) -> None:
        #: What waits in the line of work and in that of fetching, by generation, in the order in which it was offered.
        self._lines: tuple[dict[str, _Place], dict[str, _Place]] = {}, {}
        #: Set when a generation of this line may be claimed.
        self._changed = asyncio.Event(), asyncio.Event()
        #: The user of each generation that is held, and whether it is held for fetching.
        self._held: dict[str, tuple[str, bool]] = {}
        #: Set when a generation was withdrawn or released.
        self._removed = asyncio.Event()

    async def count(self) -> Counts:
        return Counts(sum(map(len, self._lines)), len(self._held))

    async def positions(self) -> Mapping[str, int]:
        lines = [self._order(fetching=fetching) for fetching in (False, True)]
        return {generation_id: rank for line in lines for rank, generation_id in enumerate(line, 1)}

    def _order(self, *, fetching: bool) -> list[str]:
        """What waits in this line, next first."""
        line, busy = self._lines[fetching], self._busy() if fetching else set[str]()
        return sorted(line, key=lambda each: (line[each].user_id in busy, line[each].turn))

    def _busy(self) -> set[str]:
        """The users who fetch for as many as allowed."""
        counts = Counter(user_id for user_id, fetching in self._held.values() if fetching)
        return {user_id for user_id, count in counts.items() if count >= FETCHING_PER_USER}

    async def offer(self, user_id: str, generation_id: str, *, fetching: bool = False) -> bool:
        held = self._held.get(generation_id)
        waits = any(generation_id in line for line in self._lines)
        if waits or (held is not None and (fetching or held != (user_id, True))):
            return False
        places = self._lines[fetching].values()
        own = max((place.turn + 1 for place in places if place.user_id == user_id), default=0)
        first = min((place.turn for place in places), default=0)
        self._lines[fetching][generation_id] = _Place(user_id, max(own, first))
        self._changed[fetching].set()
        return True

    async def withdraw(self, generation_id: str) -> bool:
        line = next((line for line in self._lines if generation_id in line), None)
        if line is None:
            return False
        user_id, turn = line.pop(generation_id)
        for each, place in line.items():  # The user's later ones move up.
            if place.user_id == user_id and place.turn > turn:
                line[each] = _Place(user_id, place.turn - 1)
        self._removed.set()
        return True

    async def claim(self, *, fetching: bool = False) -> str:
        line, changed = self._lines[fetching], self._changed[fetching]
        while not line or (fetching and self._busy().issuperset(place.user_id for place in line.values())):
            changed.clear()
            await changed.wait()
        generation_id = self._order(fetching=fetching)[0]
        user_id, _ = line.pop(generation_id)
        self._let_go(generation_id)
        self._held[generation_id] = user_id, fetching
        return generation_id

    def _let_go(self, generation_id: str) -> None:
        _, fetching = self._held.pop(generation_id, ("", False))
        if fetching:
            self._changed[True].set()

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
        while any(self._lines) or self._held:
            self._removed.clear()
            await self._removed.wait()
