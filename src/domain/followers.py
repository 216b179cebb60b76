"""Who follows a log within this process."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from domain.ports.log import Deliver, Notice

logger = logging.getLogger(__name__)


class Followers:
    """Passes entries on to everybody who follows: for implementations of `domain.ports.log.EventLog`."""

    def __init__(self) -> None:
        self._all: list[Deliver] = []

    @asynccontextmanager
    async def follow(self, deliver: Deliver) -> AsyncIterator[None]:
        """See `domain.ports.log.EventLog.follow`."""
        self._all.append(deliver)
        try:
            yield
        finally:
            self._all.remove(deliver)

    def deliver(self, notice: Notice) -> None:
        """Call every follower. What one raises is logged."""
        for deliver in self._all:
            try:
                deliver(notice)
            except Exception as error:
                logger.error("a follower of the log failed: %s", type(error).__name__)
