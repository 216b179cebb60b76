"""Quotas over all nodes."""

import asyncio
from collections.abc import Callable
from typing import Final

from adapters.postgres.database import Database
from domain.errors import LogUnavailable

#: Seconds before a database that did not answer is notified again.
_AGAIN: Final = 0.2


class PostgresQuotas:
    """`domain.ports.quotas.Quotas` in PostgreSQL."""

    def __init__(self, database: Database) -> None:
        self._database = database
        #: Users who have fewer devices here than the database knows, and how many they have.
        self._left: dict[str, Callable[[], int]] = {}
        self._woken = asyncio.Event()
        #: Held while devices are counted and the database is notified.
        self._counting = asyncio.Lock()

    async def run(self) -> None:
        """Notify the database of devices that have left, until cancelled."""
        while True:
            await self._woken.wait()
            async with self._counting:
                left, self._left = self._left, {}
                self._woken.clear()
                counts = [here() for here in left.values()]
                try:
                    await self._database.call("note_devices_v1", self._database.node, list(left), counts)
                    continue
                except LogUnavailable:
                    self._left = left | self._left
                    self._woken.set()
            await asyncio.sleep(_AGAIN)

    async def count_start(self, user_id: str, most: int) -> float | None:
        wait: float | None = await self._database.call("count_start_v1", user_id, most)
        return wait

    async def forget_starts(self, user_id: str) -> None:
        await self._database.fetch("DELETE FROM stagecast.starts WHERE user_id = $1", user_id)

    async def admit_device(self, user_id: str, here: Callable[[], int], most: int) -> bool:
        async with self._counting:
            counted = self._database.node, user_id, here() + 1, most
            try:
                return bool(await self._database.call("admit_device_v1", *counted))
            except BaseException:
                self.device_left(user_id, here)  # It may have been admitted.
                raise

    def device_left(self, user_id: str, here: Callable[[], int]) -> None:
        self._left[user_id] = here
        self._woken.set()

    async def add_stored(self, generation_id: str, size: int, user_id: str | None = None) -> None:
        await self._database.call("add_stored_v1", generation_id, user_id, size)

    async def forget_stored(self, generation_id: str) -> None:
        await self._database.fetch("DELETE FROM stagecast.stored_images WHERE generation_id = $1", generation_id)

    async def owner(self, generation_id: str) -> str | None:
        query = "SELECT user_id FROM stagecast.stored_images WHERE generation_id = $1"
        owner: str | None = await self._database.fetchval(query, generation_id)
        return owner

    async def stored(self, user_id: str, *, besides: str | None = None) -> int:
        query = (
            "SELECT coalesce(sum(size), 0)::bigint FROM stagecast.stored_images"
            " WHERE user_id = $1 AND generation_id IS DISTINCT FROM $2"
        )
        return int(await self._database.fetchval(query, user_id, besides))
