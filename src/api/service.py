"""The service: its use cases, start-up, shutdown, background tasks and readiness."""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final

from api.auth import Authenticator
from api.realtime.sockets import Sockets
from api.sse.streams import EventStreams
from api.wiring import PROGRESS_INTERVAL, Parts
from domain.admission import Admission, Limits
from domain.delivery import Hub
from domain.external import ExternalWork
from domain.feed_sessions import FeedSessions
from domain.housekeeping import Housekeeping
from domain.overview import Overview
from domain.quarantine import Quarantine
from domain.queue_positions import QueuePositions
from domain.readiness import FOLLOWER, RUNNER, Readiness, why_not_ready
from domain.recorder import ATTENTION, Recorder
from domain.runner import Runner
from domain.stored_images import StoredImages
from domain.supervisor import Supervisor
from domain.thumbnails import Thumbnails
from domain.webhooks import Webhooks
from domain.workflow import Workflow

logger = logging.getLogger(__name__)

#: Seconds at shutdown for sockets and the webhook to receive the last events.
_FLUSH: Final = 0.3
#: Seconds between two sweeps.
_SWEEP_EVERY: Final = 3600.0
#: Seconds between two looks for sessions that clients have resumed on other nodes.
_TAKEN_OVER_EVERY: Final = 1.0
#: Seconds at shutdown for starts that are being appended to the log.
_CLOSE: Final = 3.0


class Service:
    """One service: the use cases on top of its parts, its background tasks, start-up and shutdown."""

    def __init__(self, parts: Parts) -> None:
        settings, entropy = parts.settings, parts.entropy
        self.settings = settings
        self.clock = parts.clock
        self.storage = storage = parts.storage
        self.log, self.sessions, self.leases = storage.log, storage.sessions, storage.leases
        self.images = StoredImages(parts.images, storage.quotas)
        self.thumbnails = Thumbnails(self.images, parts.intake)
        sender = parts.webhook_sender
        self.webhooks = None if sender is None else Webhooks(self.log, self.log, sender, random.random)
        self._threads = parts.threads
        self.lag = parts.lag
        limits = Limits(
            settings.max_waiting,
            settings.max_per_user,
            timedelta(seconds=settings.retention),
            settings.starts_per_minute,
            settings.max_stored_per_user,
        )
        self.recorder = recorder = Recorder(
            self.log, self.clock, entropy, self.images, lambda name: f"{settings.public_url}/images/{name}"
        )
        self.supervisor = Supervisor()
        self._quarantine = Quarantine(recorder)
        self.external = ExternalWork(self.log, self.leases, recorder, self._quarantine, self.clock, settings.deadline)
        self.workflow = Workflow(
            log=self.log,
            ledger=storage.log,
            retention=storage.log,
            recorder=recorder,
            leases=self.leases,
            external=self.external,
            admission=Admission(storage.log, self.leases, storage.quotas, limits, lambda: self.lag.overloaded),
            images=self.images,
            intake=parts.intake,
            clock=self.clock,
            entropy=entropy,
            limits=limits,
            supervisor=self.supervisor,
            sessions=self.sessions,
        )
        self.runner = Runner(
            supervisor=self.supervisor,
            quarantine=self._quarantine,
            log=self.log,
            recorder=recorder,
            leases=self.leases,
            images=self.images,
            composer=parts.composer,
            editor=parts.editor,
            face_swapper=parts.face_swapper,
            fetcher=parts.fetcher,
            max_running=settings.max_running,
            deadline=settings.deadline,
        )
        self.stage_times = self.runner.stage_times
        self.hub = Hub(self.log, self._quarantine, storage.quotas, settings.max_sockets_per_user)
        self._queue_positions = QueuePositions(self.log, self.leases, self.hub)
        self.authenticator = Authenticator(parts.tokens, self.clock)
        self.feed_sessions = FeedSessions(self.log, self.sessions, self.clock, new_tag=lambda: entropy.token()[:8])
        sockets = Sockets(
            self.workflow,
            self.hub,
            self.authenticator,
            self.feed_sessions,
            new_pid=lambda: entropy.token() + entropy.token(),
        )
        self.sockets = parts.socket_server(sockets)
        self.streams = EventStreams(self.hub, self.clock)
        self.overview = Overview(
            storage.log, self.leases, storage.nodes, self.workflow, self.clock, self._count_clients
        )
        self._housekeeping = Housekeeping(self.log, storage.log, self.images)
        self._readiness = Readiness(self.supervisor, self.log, self.images.store)
        #: Refused HTTP requests by code.
        self.refused: Counter[str] = Counter()
        self._work: asyncio.Task[None] | None = None
        self._background: asyncio.Task[None] | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._shutting_down = False

    async def startup(self) -> None:
        """Start the background tasks, unless `shutdown` is called meanwhile, and end what was interrupted."""
        if not self.log.durable:  # Nothing needs the pictures that are there.
            await self.supervisor.attempt("sweep", self._sweep)
        if not self._shutting_down:
            self._work = asyncio.create_task(self.runner.run())
            self._background = asyncio.create_task(self._run())
            self._resuming = asyncio.create_task(self._resume())
            await asyncio.wait([self._resuming], timeout=ATTENTION)

    async def _resume(self) -> None:
        await self.supervisor.keep(RUNNER, self.runner.resume)
        await self.runner.resumed()

    async def _run(self) -> None:
        """Run all background tasks except the runner, which ends before the others."""
        keep, every = self.supervisor.keep, self.supervisor.every
        pause = min(max(self.settings.retention / 10, 0.1), 60)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep(FOLLOWER, self.hub.run))
            tasks.create_task(keep("positions", self._queue_positions.run))
            tasks.create_task(keep("external", self.external.run))
            tasks.create_task(keep("examination", self.storage.examine))
            for name, work in self.storage.background.items():
                tasks.create_task(keep(name, work))
            tasks.create_task(self._chore(pause, "retention", self._purge))
            tasks.create_task(self._chore(_SWEEP_EVERY, "sweep", self._sweep))
            tasks.create_task(every(pause, "sessions", lambda: self.sessions.touch(self.sockets.pids, at=self.clock())))
            tasks.create_task(every(_TAKEN_OVER_EVERY, "sessions", self._close_taken_over))
            tasks.create_task(keep("lag", self.lag.run))
            tasks.create_task(every(PROGRESS_INTERVAL, "sockets", self.sockets.eio.check_progress))
            tasks.create_task(every(PROGRESS_INTERVAL, "streams", self.streams.check_progress))
            if self.webhooks is not None:
                tasks.create_task(keep("webhooks", self.webhooks.run))

    async def _chore(self, seconds: float, name: str, work: Callable[[], Awaitable[object]]) -> None:
        """Do this work every so many seconds, on one node."""

        async def on_one_node() -> None:
            if await self.leases.claim_chore(name, 2 * seconds):
                await work()

        await self.supervisor.every(seconds, name, on_one_node)

    async def shutdown(self, force: asyncio.Event) -> None:
        """Refuse starts, finish work until the drain ends or `force` is set, notify clients, and close the parts."""
        if self._shutting_down:
            return
        self._shutting_down = True
        logger.info("shutdown: starts are refused, and running work is finished")
        self.workflow.drain()
        await _cancel(self._resuming)
        waits = [asyncio.create_task(self._drained()), asyncio.create_task(force.wait())]
        await asyncio.wait(waits, timeout=self.settings.drain, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(*waits)
        logger.info("shutdown: %d generations are left", self.runner.running)
        await _at_most(_CLOSE, self.workflow.close())
        await _cancel(self._work)
        if not self.log.durable:
            await self.runner.interrupt()
        await _at_most(_FLUSH, self.hub.flushed(), *([self.webhooks.flushed()] if self.webhooks else []))
        logger.info("shutdown: sockets and streams are closed")
        self.sockets.close_all()
        self.streams.close_all()
        await _cancel(self._background)
        self._readiness.close()
        await self.images.store.close()
        await self.storage.close()
        self._threads.close()
        logger.info("shutdown: the stores are closed")

    async def _drained(self) -> None:
        """Wait until this node's work is done, and starts that are being accepted. Other nodes do the rest, if any."""
        await self.workflow.started()
        await self.leases.drain()
        if not self.leases.shared:
            await self.external.idle()

    def _count_clients(self) -> tuple[int, int]:
        return len(self.sockets.eio.sockets), len(self.streams.open)

    async def readiness(self) -> tuple[str | None, dict[str, str]]:
        """The code of the reason why no start is accepted, if there is one, and the state of each part."""
        parts = await self._readiness.parts()
        return "draining" if self.workflow.draining else why_not_ready(parts), parts

    async def _purge(self) -> None:
        await self._housekeeping.purge(ended_before=self.clock() - timedelta(seconds=self.settings.retention))

    async def _sweep(self) -> None:
        await self._housekeeping.sweep(now=self.clock())

    async def _close_taken_over(self) -> None:
        for pid in await self.sessions.taken_over():
            self.sockets.close(pid)


async def _at_most(seconds: float, *waits: Awaitable[object]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*waits)


async def _cancel(*tasks: asyncio.Task[Any] | None) -> None:
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
