"""Stored pictures as they are served: whole, or as thumbnails, which are made when they are first asked for."""

import asyncio
import contextlib
from weakref import WeakValueDictionary

from domain.errors import Failure, ImageRefusal, LogUnavailable, NotFound
from domain.identity import WORKING_FOR
from domain.ports.images import ImageIntake, Picture, thumbnail_name
from domain.stored_images import StoredImages


class Thumbnails:
    """Loads pictures. Makes each thumbnail once, however many ask for it at the same time, and stores it."""

    def __init__(self, images: StoredImages, intake: ImageIntake) -> None:
        self._images = images
        self._intake = intake
        self._locks = WeakValueDictionary[str, asyncio.Lock]()

    async def load(self, name: str, width: int | None = None) -> Picture | None:
        """The stored picture with this name, at most so many pixels wide; ``None`` if there is none.

        Raises:
            Failure: ``storage_failed``: the stored picture is damaged, so that it has no thumbnail.
        """
        if width is None:
            return await self._images.store.load(name)
        thumbnail = thumbnail_name(name, width)
        async with self._locks.setdefault(thumbnail, asyncio.Lock()):
            return await self._images.store.load(thumbnail) or await self._make(name, width)

    async def _make(self, name: str, width: int) -> Picture | None:
        async def read() -> bytes:
            if (picture := await self._images.store.load(name)) is None:
                raise NotFound
            return picture.data

        generation_id = name.rpartition("-")[0]
        # The owner's share of the image threads is used, whoever asks.
        with contextlib.suppress(LogUnavailable):
            WORKING_FOR.set(await self._images.quotas.owner(generation_id) or generation_id)
        try:
            picture = await self._intake.thumbnail(read, width)
        except NotFound:
            return None
        except ImageRefusal as refusal:
            raise Failure("storage_failed") from refusal
        with contextlib.suppress(Failure):  # It can be shown, although it cannot be stored.
            await self._images.save_thumbnail(name, width, picture)
        return picture
