"""The composition root: the one place that knows which adapter stands behind which port."""

import asyncio
import contextlib
import random
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from importlib import metadata
from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from pydantic.alias_generators import to_camel
from starlette.types import ASGIApp

from adapters.images.composer import PillowComposer
from adapters.images.folder import FolderRefused, ImageFolder
from adapters.images.intake import PillowIntake
from adapters.images.threads import ImageThreads
from adapters.memory.log import MemoryLog
from adapters.memory.queue import MemoryQueue
from adapters.memory.sessions import MemorySessions
from adapters.offline.editor import LocalEditor
from adapters.offline.face_swap import LocalFaceSwap
from adapters.outbound.sample_fetcher import SampleFetcher
from adapters.outbound.url_fetcher import UrlFetcher
from adapters.outbound.webhook_sender import WebhookSender
from adapters.providers import openai as openai_editor
from adapters.providers import replicate as replicate_face_swap
from adapters.providers.openai import OpenAIEditor
from adapters.providers.own_provider import OwnEditor, OwnFaceSwap, UnfitProvider
from adapters.providers.replicate import ReplicateFaceSwap
from adapters.realtime.send_buffer import PROGRESS_INTERVAL
from adapters.realtime.socketio_server import AUTH_TIMEOUT, SocketServer
from adapters.serving.connection_table import ConnectionTable
from adapters.serving.loop_lag import LoopLag
from adapters.serving.uvicorn_server import ClientLimit, Server
from adapters.sqlite.database import Database, Examined, LogRefused, examine
from adapters.sqlite.log import SqliteLog
from adapters.sqlite.sessions import SqliteSessions
from adapters.system import SystemEntropy, descriptors, now
from adapters.tokens.jwt_tokens import JwksKeys, KeySource, SecretKey, Tokens, issue
from api.auth import Authenticator
from api.cli.client import Unavailable
from api.realtime.sockets import Sockets
from api.rest import accounts, feed, generations, info, problems, transitions
from api.rest.bodies import BodyTimeout
from api.rest.head import HeadAsGet
from api.rest.origin_guard import OriginGuard
from api.rest.proxies import ForwardedHeaders, PathPrefix
from api.settings import OTHER_DESCRIPTORS, Settings, SettingsError
from api.web import page
from domain.admission import Admission, Limits
from domain.delivery import Hub
from domain.errors import Failure, LogUnavailable
from domain.external import ExternalWork
from domain.feed_sessions import FeedSessions
from domain.housekeeping import Housekeeping
from domain.ports import Clock, EventLog, FaceSwapper, ImageEditor, ImageFetcher, ImageIntake, ImageStore, SessionStore
from domain.quarantine import Quarantine
from domain.readiness import FOLLOWER, IMAGES, LOG, Readiness, why_not_ready
from domain.recorder import Recorder
from domain.runner import Runner
from domain.stored_images import StoredImages
from domain.supervisor import Supervisor
from domain.webhooks import Webhooks
from domain.workflow import Workflow

#: Seconds that sockets have, on leaving, to take what they were sent last, and the webhook.
_FLUSH: Final = 0.3
#: Seconds that a provider has for one picture, with all waits.
_PROVIDER: Final = 300
#: Seconds between two sweeps.
_SWEEP_EVERY: Final = 3600.0
#: Seconds that starts on their way into the log have, on leaving, to get there.
_CLOSE: Final = 3.0


class Service:
    """One running service: the wired parts, their tasks, and how it leaves."""

    def __init__(self, settings: Settings, **overrides: Any) -> None:
        """`overrides` replace what is wired here, by name: ``log``, ``editor``, ``face_swapper``, …"""
        self.settings = settings
        self.clock = overrides.get("clock", now)
        entropy = overrides.get("entropy") or SystemEntropy()
        self.threads = ImageThreads()
        intake = PillowIntake(self.threads)
        web = UrlFetcher(intake, allow=settings.fetch_allow)
        # Before the log is opened: a factory of the operator's own may fail.
        editor = overrides.get("editor") or _editor(settings, self.threads, web)
        face_swapper = overrides.get("face_swapper") or _face_swapper(settings, self.threads)
        self.log, self.sessions = _log(settings, self.clock, overrides.get("log"))
        self.queue = overrides.get("queue") or MemoryQueue()
        self.images = StoredImages(overrides.get("images") or _images(settings, self.log))
        self._lag = LoopLag(None if settings.max_lag_ms is None else settings.max_lag_ms / 1000)
        limits = Limits(
            settings.max_waiting,
            settings.max_per_user,
            timedelta(seconds=settings.retention),
            settings.starts_per_minute,
            settings.max_stored_per_user,
        )
        recorder = Recorder(self.log, self.clock, entropy)
        self.supervisor = Supervisor()
        self._quarantine = Quarantine(recorder)
        self.external = ExternalWork(self.log, recorder, self._quarantine, self.clock, settings.deadline)
        self.workflow = Workflow(
            log=self.log,
            recorder=recorder,
            queue=self.queue,
            external=self.external,
            admission=Admission(self.log, self.queue, self.images, limits, lambda: self._lag.overloaded),
            images=self.images,
            intake=intake,
            clock=self.clock,
            entropy=entropy,
            limits=limits,
            supervisor=self.supervisor,
        )
        self.runner = Runner(
            supervisor=self.supervisor,
            quarantine=self._quarantine,
            log=self.log,
            recorder=recorder,
            queue=self.queue,
            images=self.images,
            image_url=lambda name: f"{settings.public_url}/images/{name}",
            composer=overrides.get("composer") or PillowComposer(self.threads),
            editor=editor,
            face_swapper=face_swapper,
            fetcher=overrides.get("fetcher") or _fetcher(settings, intake, web),
            max_running=settings.max_running,
            deadline=settings.deadline,
        )
        self.hub = Hub(self.log, self._quarantine)
        self.webhooks = _webhooks(settings, self.log, self.clock)
        self.authenticator = Authenticator(_tokens(settings, self.clock), self.clock)
        self.feed_sessions = FeedSessions(self.log, self.sessions, self.clock, new_tag=lambda: entropy.token()[:8])
        sockets = Sockets(
            self.workflow,
            self.hub,
            self.authenticator,
            self.feed_sessions,
            new_pid=lambda: entropy.token() + entropy.token(),
            max_per_user=settings.max_sockets_per_user,
        )
        self.sockets = SocketServer(
            on_connect=sockets.on_connect,
            handlers=sockets.events,
            on_disconnect=sockets.on_disconnect,
            clock=self.clock,
            auth_timeout=overrides.get("auth_timeout", AUTH_TIMEOUT),
        )
        self._housekeeping = Housekeeping(self.log, self.images)
        self._readiness = Readiness(
            self.supervisor,
            {LOG: (self.log.probe, LogUnavailable()), IMAGES: (self.images.probe, Failure("storage_failed"))},
        )
        self._starting: asyncio.Task[None] | None = None
        self._work: asyncio.Task[None] | None = None
        self._background: asyncio.Task[None] | None = None
        #: The start, until the pictures from before it, which nothing can need that is no event yet, have been swept.
        self._left_over: datetime | None = None
        self._left = False

    async def enter(self) -> None:
        """Begin to follow the log, to work and to keep house, unless asked to leave meanwhile."""
        self._starting = asyncio.create_task(self._start())
        await asyncio.wait([self._starting])
        if not (self._left and self._starting.cancelled()):
            self._starting.result()

    async def _start(self) -> None:
        await self.runner.resume()
        self._left_over = self.clock()
        # A durable log may have very many generations to look at.
        swept = not self.log.durable and await self.supervisor.attempt("sweep", self._sweep)
        self._work = asyncio.create_task(self.runner.run())
        self._background = asyncio.create_task(self._run(swept=swept))

    async def _run(self, *, swept: bool) -> None:
        """Run all background tasks but the runner, which ends before the others."""
        keep, every = self.supervisor.keep, self.supervisor.every
        pause = min(max(self.settings.retention / 10, 0.1), 60)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep(FOLLOWER, self.hub.run))
            tasks.create_task(keep("quarantine", self._quarantine.run))
            tasks.create_task(keep("external", self.external.run))
            tasks.create_task(keep("examination", self.log.examine))
            tasks.create_task(every(pause, "retention", self._purge))
            tasks.create_task(every(_SWEEP_EVERY, "sweep", self._sweep, after=_SWEEP_EVERY if swept else 0))
            tasks.create_task(every(pause, "sessions", self._touch))
            tasks.create_task(keep("lag", self._lag.run))
            tasks.create_task(every(PROGRESS_INTERVAL, "sockets", self.sockets.eio.check_progress))
            if self.webhooks is not None:
                tasks.create_task(keep("webhooks", self.webhooks.run))

    async def leave(self, hurry: asyncio.Event) -> None:
        """Take no new work, finish what there is within the drain or until `hurry`, and say what was left undone."""
        if self._left:
            return
        self._left = True
        self.workflow.drain()
        await _cancel(self._starting)
        waits = [asyncio.create_task(self._settled()), asyncio.create_task(hurry.wait())]
        await asyncio.wait(waits, timeout=self.settings.drain, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(*waits)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE):
                await self.workflow.close()
        await _cancel(self._work)
        if not self.log.durable:
            await self.runner.interrupt()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH):
                told = [self.hub.flushed()] + ([self.webhooks.settled()] if self.webhooks else [])
                await asyncio.gather(*told)
        self.sockets.close_all()
        await _cancel(self._background)
        await self._readiness.close()
        await self.images.close()
        await self.log.close()
        self.threads.close()

    async def _settled(self) -> None:
        """Wait until all work is done, whoever does it, and what is still being accepted too."""
        await self.workflow.started()
        await self.queue.settled()
        await self.external.settled()

    async def readiness(self) -> tuple[str | None, dict[str, str]]:
        """The code of the reason why no start can be taken, if there is one, and the state of each part."""
        parts = await self._readiness.parts()
        return "draining" if self.workflow.draining else why_not_ready(parts), parts

    async def _purge(self) -> None:
        await self._housekeeping.purge(ended_before=self.clock() - timedelta(seconds=self.settings.retention))

    async def _sweep(self) -> None:
        grace = timedelta(seconds=max(_SWEEP_EVERY, 2 * self.settings.deadline))
        await self._housekeeping.sweep(stored_before=self._left_over or self.clock() - grace)
        self._left_over = None

    async def _touch(self) -> None:
        await self.sessions.touch(self.sockets.pids, at=self.clock())


def _log(settings: Settings, clock: Clock, log: EventLog | None) -> tuple[EventLog, SessionStore]:
    """The log, if it is not given, and beside it the sessions.

    Raises:
        Unavailable: the file cannot be the log.
    """
    retention, epoch = timedelta(seconds=settings.retention), secrets.token_hex(8)
    outbox = settings.webhook_url is not None
    if log is not None or settings.log_file is None:
        memory = MemoryLog(epoch=epoch, credits=settings.credits, clock=clock, outbox=outbox)
        return log or memory, MemorySessions(retention)
    try:
        database = Database(settings.log_file, epoch=epoch)
    except LogRefused as refused:
        raise Unavailable(str(refused)) from None
    durable = SqliteLog(database, credits=settings.credits, clock=clock, outbox=outbox)
    return durable, SqliteSessions(database, retention)


def _images(settings: Settings, log: EventLog) -> ImageStore:
    """The image folder, taken for this log.

    Raises:
        Unavailable: it belongs to another log or process, or cannot be used.
    """
    try:
        return ImageFolder(settings.images, log=_kind(settings) if log.durable else "memory", epoch=log.epoch)
    except FolderRefused as refused:
        raise Unavailable(str(refused)) from None


def _kind(settings: Settings) -> str:
    """The kind of log, as the mark of an image folder names it."""
    return settings.log.partition(":")[0]


def _fetcher(settings: Settings, intake: ImageIntake, web: UrlFetcher) -> ImageFetcher:
    return SampleFetcher(intake, web, base=f"{settings.public_url}/static/samples", folder=page.FOLDER / "samples")


def _editor(settings: Settings, threads: ImageThreads, web: UrlFetcher) -> ImageEditor:
    if settings.editor == "local":
        return LocalEditor(threads, settings.local_seconds)
    if settings.editor != "openai":
        try:
            return OwnEditor(settings.editor, threads)
        except UnfitProvider as unfit:
            raise SettingsError(f"STAGECAST_EDITOR must name a factory of an editor; {unfit}.") from None
    assert settings.openai_api_key is not None
    try:
        return OpenAIEditor(
            threads,
            web,
            api_key=settings.openai_api_key.get_secret_value(),
            base_url=settings.openai_base_url,
            model=settings.openai_model or openai_editor.DEFAULT_MODEL,
            deadline=_provider_deadline(settings),
        )
    except ValueError:
        raise SettingsError("OPENAI_API_KEY must be a key: letters, digits and signs without spaces.") from None


def _face_swapper(settings: Settings, threads: ImageThreads) -> FaceSwapper:
    if settings.face_swap == "local":
        return LocalFaceSwap(threads, settings.local_seconds)
    if settings.face_swap != "replicate":
        try:
            return OwnFaceSwap(settings.face_swap, threads)
        except UnfitProvider as unfit:
            raise SettingsError(f"STAGECAST_FACE_SWAP must name a factory of a face swap; {unfit}.") from None
    assert settings.replicate_api_token is not None
    try:
        return ReplicateFaceSwap(
            threads,
            settings.replicate_api_token.get_secret_value(),
            settings.replicate_model or replicate_face_swap.DEFAULT_MODEL,
            deadline=_provider_deadline(settings),
        )
    except ValueError:
        raise SettingsError("STAGECAST_REPLICATE_MODEL must be owner/name or owner/name:version.") from None


def _webhooks(settings: Settings, log: EventLog, clock: Clock) -> Webhooks | None:
    if settings.webhook_url is None:
        return None
    secret = None if settings.webhook_secret is None else settings.webhook_secret.get_secret_value()
    try:
        sender = WebhookSender(settings.webhook_url, secret, clock=clock)
    except ValueError:
        raise SettingsError("STAGECAST_WEBHOOK_URL must be an http or https URL.") from None
    return Webhooks(log, sender, random.random)


def _provider_deadline(settings: Settings) -> float:
    """Sooner than the generation's, so that a provider that takes too long is named as the reason."""
    return min(_PROVIDER, 0.9 * settings.deadline)


def _tokens(settings: Settings, clock: Clock) -> Tokens | None:
    if settings.open_mode:
        return None
    if settings.jwks_url is not None:
        keys: KeySource = JwksKeys(settings.jwks_url, clock=clock)
    else:
        keys = SecretKey(_secret(settings))
    return Tokens(
        keys,
        clock=clock,
        user_claim=settings.jwt_user_claim,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
    )


def issue_token(settings: Settings, user_id: str, *, service: bool, ttl: timedelta) -> str:
    """A token that a service with these settings takes. Raises `InvalidUserId`; ValueError: the ttl is none."""
    return issue(
        _secret(settings),
        user_id,
        service=service,
        ttl=ttl,
        now=now(),
        user_claim=settings.jwt_user_claim,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
    )


def _secret(settings: Settings) -> bytes:
    assert settings.jwt_secret is not None
    secret = settings.jwt_secret.get_secret_value().encode()
    try:
        SecretKey(secret)
    except ValueError:
        raise SettingsError("STAGECAST_JWT_SECRET must be a secret, not a public key or a certificate.") from None
    return secret


async def _cancel(*tasks: asyncio.Task[Any] | None) -> None:
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def examine_stores(settings: Settings) -> Sequence[str]:
    """What is damaged in the stores of a service with these settings, a line each. They are only read.

    Raises:
        SettingsError: a setting is wrong that only its adapter understands.
        Unavailable: a store cannot be opened.
    """
    threads = ImageThreads()
    try:
        _tokens(settings, now)
        _editor(settings, threads, UrlFetcher(PillowIntake(threads), allow=settings.fetch_allow))
        _face_swapper(settings, threads)
        _webhooks(settings, MemoryLog(epoch="", credits=None, clock=now), now)
    finally:
        threads.close()
    try:
        examined = Examined([]) if settings.log_file is None else examine(settings.log_file)
        if not examined.damage or examined.epoch is not None:
            ImageFolder.examine(settings.images, log=_kind(settings), epoch=examined.epoch)
    except (FolderRefused, LogRefused) as refused:
        raise Unavailable(str(refused)) from None
    return examined.damage


def create_service(settings: Settings, **overrides: Any) -> tuple[Service, ASGIApp]:
    """The service, and the ASGI application that is its outside."""
    service = Service(settings, **overrides)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.enter()
        try:
            yield
        finally:
            await service.leave(_at_once())

    http = FastAPI(
        title="Stagecast",
        version=metadata.version("stagecast"),
        summary=metadata.metadata("stagecast")["Summary"],
        lifespan=lifespan,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: to_camel(route.name),
    )
    http.state.workflow = service.workflow
    http.state.feed_sessions = service.feed_sessions
    http.state.images = service.images
    http.state.readiness = service.readiness
    http.state.authenticator = service.authenticator
    problems.install(http)
    for router in (generations.router, transitions.router, feed.router, accounts.router, info.router):
        http.include_router(router)
    page.install(http, settings.public_url)
    hosts = None if settings.allow_open else settings.allowed_hosts
    prefix = settings.path_prefix
    paths = ["/socket.io", *(str(route.path) for route in iter_route_contexts(http.routes))]
    if prefix and prefix.split("/")[1] in {path.split("/")[1] for path in paths}:
        raise SettingsError(
            "STAGECAST_PUBLIC_URL must not have a path that begins like one of the service, such as /images."
        )
    everything = service.sockets.app(HeadAsGet(http), f"{prefix}/socket.io")
    guard = OriginGuard(
        PathPrefix(BodyTimeout(everything), prefix),
        open_mode=settings.open_mode,
        origins=settings.origins,
        hosts=hosts,
    )
    return service, ForwardedHeaders(ClientLimit(guard), settings.trusted_proxies)


def create_app(settings: Settings, **overrides: Any) -> ASGIApp:
    """The ASGI application, for any server. `create_server` also leaves by the contract."""
    return create_service(settings, **overrides)[1]


def create_server(settings: Settings, ready: Callable[[], None] = lambda: None, **overrides: Any) -> Server:
    """The service on uvicorn, with SIGTERM and SIGINT handled. `ready` is called once it takes connections."""
    service, app = create_service(settings, **overrides)
    return Server(app, service.leave, ready, settings.keep_alive, connection_table(settings))


def connection_table(settings: Settings) -> ConnectionTable:
    """The limits of connections: never more than there are descriptors for, less some for files."""
    most = min(settings.max_connections, max(descriptors() - OTHER_DESCRIPTORS, 1))
    return ConnectionTable(most, settings.max_connections_per_address, settings.trusted_proxies)


def _at_once() -> asyncio.Event:
    hurry = asyncio.Event()
    hurry.set()
    return hurry
