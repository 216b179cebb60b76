"""Scheduled removal: finished generations past retention, and pictures that nothing needs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

from domain.errors import LogUnavailable
from domain.ports.images import original_name
from domain.ports.log import EventLog
from domain.ports.retention import Retention
from domain.rehydrate import readable_part_of
from domain.stored_images import StoredImages
from domain.supervisor import reason_of

logger = logging.getLogger(__name__)

#: A start stores its pictures before it is appended, on any node. They may be swept once they are older than it can
#: take to accept a start, by far: decoding, and a log that does not answer, take minutes at most.
GRACE: Final = timedelta(hours=1)

#: Generations handled at a time: the log may commit what is done to them at once, and others get their turn.
_BATCH: Final = 50


class Housekeeping:
    """Removes what has expired. One generation that cannot be removed is set aside, and the others go on."""

    def __init__(self, log: EventLog, retention: Retention, images: StoredImages) -> None:
        self._log = log
        self._retention = retention
        self._images = images
        #: Generations that could not be removed: they are logged once, and tried again in each round.
        self._stuck: set[str] = set()

    async def purge(self, *, ended_before: datetime) -> None:
        """Remove finished generations that ended before that moment, whole."""
        tried = set[str]()
        while True:
            expired = await self._retention.finished_before(ended_before, _BATCH + len(tried))
            batch = [generation_id for generation_id in expired if generation_id not in tried]
            if not batch:
                self._stuck &= tried
                return
            tried |= await self._each(self._purge, batch)

    async def sweep(self, *, now: datetime) -> None:
        """Remove the pictures that nothing needs, if they are older than `GRACE`.

        Those that an event or the request names are needed, those of unfinished generations, and those of what was set
        aside.
        """
        names = await self._images.store.names(older_than=now - GRACE)
        generation_ids = list(names)
        for start in range(0, len(generation_ids), _BATCH):
            await self._each(lambda each: self._sweep(each, names[each]), generation_ids[start : start + _BATCH])

    async def _each(self, do: Callable[[str], Awaitable[None]], generation_ids: Sequence[str]) -> set[str]:
        """Do this to all of them at once, and return those with which it failed. Raises where it failed with all."""
        outcomes = await asyncio.gather(*map(do, generation_ids), return_exceptions=True)
        failed = {each: error for each, error in zip(generation_ids, outcomes, strict=True) if error is not None}
        for error in failed.values():
            # It is not one of them that fails, but the log, or all that is done to them.
            if isinstance(error, LogUnavailable) or len(failed) == len(generation_ids):
                raise error
        for generation_id in failed.keys() - self._stuck:
            logger.error("generation %s cannot be removed: %s", generation_id, reason_of(failed[generation_id]))
        self._stuck |= failed.keys()
        return set(failed)

    async def _purge(self, generation_id: str) -> None:
        try:
            await self._images.remove(generation_id)  # First: on a full disk, only that makes room for the log.
        finally:
            await self._retention.remove(generation_id, retention=True)

    async def _sweep(self, generation_id: str, names: Sequence[str]) -> None:
        history = await self._log.summary(generation_id)
        if history is None:
            if not await self._retention.set_aside(generation_id):  # Else a person decides what becomes of it.
                await self._images.remove(generation_id)
            return
        await self._images.count(generation_id, history.user_id, names)
        if history.events[-1].end is None:
            return  # A node may be about to append an event that names them.
        named = {*await self._retention.images(generation_id), *readable_part_of(history).input_images}
        await self._images.discard(*(name for name in names if original_name(name) not in named))
