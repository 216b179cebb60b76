"""Whether the service can take a start: what its readiness probe answers."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from domain.errors import Failure, LogUnavailable, Refusal
from domain.ports.images import ImageStore
from domain.ports.log import EventLog
from domain.supervisor import OK, Supervisor

#: The parts without which nothing can be started.
LOG: Final = "log"
IMAGES: Final = "images"
FOLLOWER: Final = "follower"
RUNNER: Final = "runner"
NEEDED: Final = (LOG, FOLLOWER, RUNNER, IMAGES)

#: Seconds between two checks, and in which a check has to succeed.
_EVERY: Final = 1.0


class _Check:
    """A check that runs on request, at most once a second, and once for all callers that wait for it."""

    def __init__(self, check: Callable[[], Awaitable[object]], late: Refusal | Failure) -> None:
        self.check = check
        #: What it fails with where it does not return in time.
        self.late = late
        self.began = float("-inf")
        #: It goes on also when it is late: another one would only wait behind it.
        self.running: asyncio.Task[bool] | None = None


class Readiness:
    """The state of each part: of those that are tried, and of those that are supervised."""

    def __init__(self, supervisor: Supervisor, log: EventLog, images: ImageStore) -> None:
        self._supervisor = supervisor
        late = Failure("storage_failed")
        self._checks = {LOG: _Check(log.probe, LogUnavailable()), IMAGES: _Check(images.probe, late)}

    async def parts(self) -> dict[str, str]:
        """Each part by name: ``ok``, or the code of what fails."""
        await asyncio.gather(*(self._try(name, check) for name, check in self._checks.items()))
        return self._supervisor.parts

    def close(self) -> None:
        """Wait for no check any more."""
        for check in self._checks.values():
            if check.running is not None:
                check.running.cancel()

    async def _try(self, name: str, check: _Check) -> None:
        clock = asyncio.get_running_loop().time
        if (check.running is None or check.running.done()) and clock() - check.began >= _EVERY:
            check.began = clock()
            check.running = asyncio.create_task(self._supervisor.attempt(name, check.check))
        if check.running is not None and not check.running.done():
            await asyncio.wait([check.running], timeout=check.began + _EVERY - clock())
            if not check.running.done():
                self._supervisor.failed(name, check.late)


def why_not_ready(parts: Mapping[str, str]) -> str | None:
    """The code of the first part that is needed for a start and fails; ``unavailable`` where it is not an adapter."""
    failing = next((name for name in NEEDED if parts.get(name, OK) != OK), None)
    return parts[failing] if failing in (LOG, IMAGES) else failing and "unavailable"
