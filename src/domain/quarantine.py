"""Ends generations with which a part of the service fails in ``internal``, refunded, so that the others go on."""

import asyncio
import logging
from functools import partial
from typing import Final

from domain.errors import Failure
from domain.recorder import Recorder
from domain.supervisor import being_cancelled, patiently, reason_of

logger = logging.getLogger(__name__)

#: Seconds between two attempts to end a generation, and how many may fail before it is left to the operator.
_PAUSE: Final = 0.2
_ATTEMPTS: Final = 5


class Quarantine:
    """Ends generations as soon as the log answers."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        #: By the id of each generation that was put here.
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def put(self, generation_id: str, part: str, error: BaseException) -> None:
        """As `end`, without waiting. Repeated calls are ignored."""
        if generation_id not in self._tasks:
            self._tasks[generation_id] = asyncio.create_task(self.end(generation_id, part, error))

    async def end(self, generation_id: str, part: str, error: BaseException) -> None:
        """End the generation, as soon as the log answers."""
        logger.error("generation %s is set aside: %s in %s (internal)", generation_id, reason_of(error), part)
        for _ in range(_ATTEMPTS):
            try:
                await patiently(partial(self._recorder.end, generation_id, Failure("internal")))
                return
            except (Exception, asyncio.CancelledError):
                if being_cancelled():
                    raise
            await asyncio.sleep(_PAUSE)
        logger.error("generation %s cannot be ended (internal)", generation_id)
