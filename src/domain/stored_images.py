"""The image store, and the bytes that each user has in it."""

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress

from domain.errors import LogUnavailable
from domain.ports.images import WIDTHS, ImageStore, Picture, thumbnail_name
from domain.ports.quotas import Quotas

logger = logging.getLogger(__name__)


class StoredImages:
    """Changes an image store and counts its bytes by user. What is only read is read from `store`."""

    def __init__(self, store: ImageStore, quotas: Quotas) -> None:
        self.store = store
        self.quotas = quotas
        #: The generation of each picture that is being stored, and the generations that are being removed.
        self._saving: dict[asyncio.Task[str], str] = {}
        self._removing: set[str] = set()

    async def count(self, generation_id: str, user_id: str, names: Iterable[str]) -> None:
        """Count images that were stored before, unless the generation is counted already."""
        if await self.quotas.owner(generation_id) is None:
            sizes = [await self.store.size(name) for name in names]
            if await self.quotas.owner(generation_id) is None:
                await self.quotas.add_stored(generation_id, sum(sizes), user_id)

    async def save(
        self, generation_id: str, picture: Picture, name: str | None = None, *, user_id: str | None = None
    ) -> str:
        """As `ImageStore.save`. A picture whose storing is cancelled is discarded.

        `user_id`: for whom it is counted; by default, for the user of the other pictures of the generation, if any.
        """
        saving = asyncio.create_task(self._save(generation_id, picture, name, user_id))
        self._saving[saving] = generation_id
        saving.add_done_callback(self._saving.pop)
        try:
            return await asyncio.shield(saving)
        except asyncio.CancelledError:
            # A thread that writes cannot be cancelled, and nobody knows the name of its picture.
            await asyncio.wait([saving])
            if not saving.cancelled() and saving.exception() is None:
                await self.discard(saving.result())
            raise

    async def _save(self, generation_id: str, picture: Picture, name: str | None, user_id: str | None) -> str:
        name = await self.store.save(generation_id, picture, name)
        with suppress(LogUnavailable):
            await self.quotas.add_stored(generation_id, len(picture.data), user_id)
        return name

    async def save_thumbnail(self, name: str, width: int, picture: Picture) -> None:
        """Store a thumbnail of this picture, unless the picture is removed meanwhile. Raises `Failure`."""
        generation_id, thumbnail = name.rpartition("-")[0], thumbnail_name(name, width)
        await self.save(generation_id, picture, thumbnail)
        if generation_id in self._removing or not await self.store.size(name):
            await self.discard(thumbnail)

    async def discard(self, *names: str) -> None:
        """Remove these pictures, each before its thumbnails. Logs the failure of any."""
        stored = [each for name in names for each in (name, *(thumbnail_name(name, width) for width in WIDTHS))]
        for each in stored:
            try:
                if size := await self.store.size(each):
                    await self.store.discard(each)
                    with suppress(LogUnavailable):
                        await self.quotas.add_stored(each.rpartition("-")[0], -size)
            except Exception as error:
                logger.error("a picture could not be discarded: %s", type(error).__name__)

    async def remove(self, generation_id: str) -> None:
        """Remove all pictures of one generation, also those that are being stored for work that was cancelled."""
        self._removing.add(generation_id)
        try:
            while saving := [task for task, owner in self._saving.items() if owner == generation_id]:
                await asyncio.wait(saving)
            await self.store.remove(generation_id)
            with suppress(LogUnavailable):
                await self.quotas.forget_stored(generation_id)
        finally:
            self._removing.discard(generation_id)
