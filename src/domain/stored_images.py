"""The image store, and the bytes that each user has in it."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable
from functools import partial

from domain.ports.images import WIDTHS, ImageStore, Picture, thumbnail_name

logger = logging.getLogger(__name__)


class StoredImages:
    """Changes an image store and counts its bytes by user. What is only read is read from `store`."""

    def __init__(self, store: ImageStore) -> None:
        self.store = store
        #: The user and the bytes of each generation, and the bytes of each user.
        self._owners: dict[str, str] = {}
        self._sizes: defaultdict[str, int] = defaultdict(int)
        self._stored: defaultdict[str, int] = defaultdict(int)
        self._discarding: set[str] = set()
        #: The pictures that are being stored, and the generations that are being removed.
        self._saving: defaultdict[str, set[asyncio.Task[str]]] = defaultdict(set)
        self._removing: set[str] = set()

    def owner(self, generation_id: str) -> str | None:
        """The user for whom the images of this generation are counted."""
        return self._owners.get(generation_id)

    def stored(self, user_id: str) -> int:
        """The bytes of this user's images."""
        return self._stored.get(user_id, 0)

    def assign(self, generation_id: str, user_id: str) -> None:
        """Count the images of this generation for this user."""
        self._owners[generation_id] = user_id

    async def count(self, generation_id: str, user_id: str, names: Iterable[str]) -> None:
        """Count images that another process has stored, unless the generation is counted here already."""
        if generation_id not in self._owners:
            sizes = [await self.store.size(name) for name in names]
            if generation_id not in self._owners:
                self.assign(generation_id, user_id)
                self._add(generation_id, sum(sizes))

    def _add(self, generation_id: str, size: int) -> None:
        user_id = self._owners.get(generation_id)
        if user_id is not None:
            size = max(size, -self._sizes[generation_id])  # What a killed process left unnamed was never counted.
            self._sizes[generation_id] += size
            self._stored[user_id] += size
            if not self._stored[user_id]:
                del self._stored[user_id]

    async def save(self, generation_id: str, picture: Picture, name: str | None = None) -> str:
        """As `ImageStore.save`. A picture whose storing is cancelled is discarded."""
        saving = asyncio.create_task(self.store.save(generation_id, picture, name))
        self._saving[generation_id].add(saving)
        saving.add_done_callback(partial(self._saved, generation_id, len(picture.data)))
        try:
            return await asyncio.shield(saving)
        except asyncio.CancelledError:
            # A thread that writes cannot be cancelled, and nobody knows the name of its picture.
            await asyncio.wait([saving])
            if not saving.cancelled() and saving.exception() is None:
                await self._discard(saving.result())
            raise

    def _saved(self, generation_id: str, size: int, saving: asyncio.Task[str]) -> None:
        self._saving[generation_id].discard(saving)
        if not self._saving[generation_id]:
            del self._saving[generation_id]
        if not saving.cancelled() and saving.exception() is None:
            self._add(generation_id, size)

    async def copy(self, name: str, generation_id: str) -> str | None:
        """Store the picture of this name once more, for this generation. ``None`` where there is none."""
        picture = await self.store.load(name)
        return None if picture is None else await self.save(generation_id, picture)

    async def save_thumbnail(self, name: str, width: int, picture: Picture) -> None:
        """Store a thumbnail of this picture, unless the picture is removed meanwhile. Raises `Failure`."""
        generation_id, thumbnail = name.rpartition("-")[0], thumbnail_name(name, width)
        await self.save(generation_id, picture, thumbnail)
        if generation_id in self._removing or not await self.store.size(name):
            await self._discard(thumbnail)

    async def discard(self, *names: str) -> None:
        """Remove these pictures, each before its thumbnails. Logs the failure of any."""
        for name in names:
            try:
                await self._discard(name)
                for thumbnail in (thumbnail_name(name, width) for width in WIDTHS):
                    if await self.store.size(thumbnail):
                        await self._discard(thumbnail)
            except Exception as error:
                logger.error("a picture could not be discarded: %s", type(error).__name__)

    async def _discard(self, name: str) -> None:
        if name not in self._discarding:
            self._discarding.add(name)
            try:
                size = await self.store.size(name)
                await self.store.discard(name)
                self._add(name.rpartition("-")[0], -size)
            finally:
                self._discarding.discard(name)

    async def remove(self, generation_id: str) -> None:
        """Remove all pictures of one generation, also those that are being stored for work that was cancelled."""
        self._removing.add(generation_id)
        try:
            while saving := self._saving.get(generation_id):
                await asyncio.wait(saving)
            await self.store.remove(generation_id)
        finally:
            self._removing.discard(generation_id)
        self._add(generation_id, -self._sizes.get(generation_id, 0))
        self._sizes.pop(generation_id, None)
        self._owners.pop(generation_id, None)
