"""Runs background tasks: what fails is logged once, tried again with back-off, and shown in the service's readiness."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from domain.errors import Failure, LogUnavailable, Refusal

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

OK: Final = "ok"

#: Seconds before the first new attempt, twice as many before each further one, and at most.
_BACKOFF: Final = 0.1
_LONGEST: Final = 5.0
#: Seconds after which a task without rounds counts as working again: longer than a log may take to fail.
_STEADY: Final = 2.0

#: Seconds before a log that did not answer is asked again.
RETRY_DELAY: Final = 0.2

Work = Callable[[], Awaitable[object]]


class Supervisor:
    """Keeps background tasks running, and knows the state of each part of the service that they belong to."""

    def __init__(self) -> None:
        #: By part: the failures of its tasks in a row, and the code of the latest, by task.
        self._failing: dict[str, dict[object, tuple[int, str]]] = {}

    @property
    def parts(self) -> dict[str, str]:
        """Each part by name: ``ok``, or the code of what fails."""
        return {name: next((code for _, code in failing.values()), OK) for name, failing in self._failing.items()}

    async def keep(self, name: str, work: Work) -> None:
        """Run this work of a part until it returns. Whenever it fails, it is started again."""
        task, loop = object(), asyncio.get_running_loop()
        while True:
            steady = loop.call_later(_STEADY, self._recovered, name, task)
            try:
                if await self.attempt(name, work, task):
                    return
            finally:
                steady.cancel()
            await asyncio.sleep(self._pause(name, task))

    async def every(self, seconds: float, name: str, work: Work) -> None:
        """Do this work now, and again whenever so many seconds have passed, or fewer if it failed."""
        task = object()
        while True:
            failed = not await self.attempt(name, work, task)
            await asyncio.sleep(min(seconds, self._pause(name, task)) if failed else seconds)

    async def attempt(self, name: str, work: Work, task: object = None) -> bool:
        """Do this work of a part once, and return whether it succeeded. `task`: see `failed`."""
        self._failing.setdefault(name, {})
        try:
            await work()
        except (Exception, asyncio.CancelledError) as error:
            if being_cancelled():
                raise
            self.failed(name, error, task)
            return False
        self._recovered(name, task)
        return True

    def _pause(self, name: str, task: object) -> float:
        failures, _ = self._failing[name][task]
        return min(_LONGEST, _BACKOFF * 2.0 ** min(failures - 1, 10))

    def failed(self, name: str, error: BaseException, task: object = None) -> None:
        """Note that this task of a part (by default its only one) fails, until it succeeds."""
        failing, code = self._failing[name], code_of(error)
        if code not in (known for _, known in failing.values()):
            logger.error("%s fails with %s (%s) and is tried again", name, code, reason_of(error))
        failures, _ = failing.pop(task, (0, ""))
        failing[task] = failures + 1, code

    def _recovered(self, name: str, task: object) -> None:
        if self._failing[name].pop(task, None) and not self._failing[name]:
            logger.warning("%s works again", name)


async def patiently(ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
    """The log's answer, asked for again until there is one."""
    while True:
        try:
            return await ask()
        except LogUnavailable:
            await asyncio.sleep(RETRY_DELAY)


def being_cancelled() -> bool:
    """Whether the current task is asked to end, so that a `CancelledError` is not a failure of what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def code_of(error: BaseException) -> str:
    """The stable code of what a background task failed with."""
    if isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, Refusal | Failure):
        return error.code
    return "storage_failed" if isinstance(error, OSError) else "internal"


def reason_of(error: BaseException) -> str:
    """The reason for the operator: no text of an exception, which may quote what users sent."""
    text = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
