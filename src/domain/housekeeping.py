"""What is removed without anybody asking: finished generations past retention, and pictures that no event names."""

from datetime import datetime
from typing import Final

from domain.ports import EventLog, History, ImageStore
from domain.queries import order_of

#: Generations purged at a time, so that others get their turn.
_BATCH: Final = 100


async def purge(log: EventLog, images: ImageStore, *, ended_before: datetime) -> int:
    """Remove finished generations that ended before that moment, whole. Return how many."""
    purged = 0
    while expired := await log.finished_before(ended_before, _BATCH):
        for generation_id in expired:
            await log.remove(generation_id, retention=True)
            await images.remove(generation_id)
        purged += len(expired)
    return purged


async def sweep(log: EventLog, images: ImageStore, *, stored_before: datetime) -> int:
    """Remove pictures stored before that moment which nothing needs. Return how many.

    Needed are those that an event names, and the uploads of what still runs.
    """
    swept = 0
    for generation_id, names in (await images.names(older_than=stored_before)).items():
        history = await log.generation(generation_id)
        if history is None:
            await images.remove(generation_id)
            swept += len(names)
            continue
        for name in names:
            if not _needed(name, history):
                await images.discard(name)
                swept += 1
    return swept


def _needed(name: str, history: History) -> bool:
    if history.events[-1].end is None and name in order_of(history).images:
        return True
    return any(entry.event is not None and name.encode() in entry.event for entry in history.events)
