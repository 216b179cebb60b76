"""The wiring: the only module that imports adapters. It chooses the adapter behind each port.

What the rest of the package needs of an adapter, it imports from here (``import Server as Server``).
"""

import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final, NamedTuple

from adapters import TRANSPORT as TRANSPORT
from adapters.images.composer import PillowComposer
from adapters.images.folder import ImageFolder
from adapters.images.intake import PillowIntake
from adapters.images.threads import ImageThreads
from adapters.memory import storage as memory_storage
from adapters.offline.editor import LocalEditor
from adapters.offline.face_swap import LocalFaceSwap
from adapters.outbound.url_fetcher import UrlFetcher
from adapters.outbound.webhook_sender import WebhookSender
from adapters.providers import openai as openai_editor
from adapters.providers import replicate as replicate_face_swap
from adapters.providers.own_provider import OwnEditor, OwnFaceSwap
from adapters.realtime.connection import Answer as Answer
from adapters.realtime.connection import Connection as Connection
from adapters.realtime.connection import Handler as Handler
from adapters.realtime.peers import Peers
from adapters.realtime.send_buffer import PROGRESS_INTERVAL as PROGRESS_INTERVAL
from adapters.realtime.send_buffer import BoundedSendBuffer as BoundedSendBuffer
from adapters.realtime.socketio_server import AUTH_TIMEOUT, SocketServer
from adapters.serving.connection_table import ClientLimit as ClientLimit
from adapters.serving.connection_table import ConnectionTable
from adapters.serving.event_loop import collect_less as collect_less
from adapters.serving.event_loop import run as run
from adapters.serving.loop_lag import LoopLag
from adapters.serving.uvicorn_server import Server as Server
from adapters.sqlite import storage as sqlite_storage
from adapters.system import SystemEntropy, descriptors, now
from adapters.tokens.jwt_tokens import JwksKeys, SecretKey, Tokens
from api.setting_types import OTHER_DESCRIPTORS
from api.settings import Settings, SettingsError
from api.web import page
from domain.ports.images import Composer, ImageFetcher, ImagesRefused, ImageStore
from domain.ports.providers import FaceSwapper, ImageEditor
from domain.ports.storage import Examined, Storage, StorageOptions, StorageRefused
from domain.ports.system import Clock

if TYPE_CHECKING:
    from adapters.s3.images import S3Images
    from api.realtime.sockets import Sockets

#: Seconds within which a provider must deliver one picture, retries included.
_PROVIDER_TIMEOUT: Final = 300


class Parts:
    """What a service is built from: its settings, and the adapter behind each port. Made by `wire`."""

    #: Opened by `wire`.
    storage: Storage
    images: ImageStore

    def __init__(self, settings: Settings, clock: Clock = now) -> None:
        """Raises `SettingsError`: a setting is wrong that only its adapter understands."""
        self.settings = settings
        self.clock = clock
        self.entropy = SystemEntropy()
        self.threads = ImageThreads()
        self.intake = PillowIntake(self.threads)
        self.composer: Composer = PillowComposer(self.threads)
        samples = (page.FOLDER / "samples").iterdir()
        files = {f"{settings.public_url}/static/samples/{file.name}": file for file in samples}
        self.fetcher: ImageFetcher = UrlFetcher(self.intake, allow=settings.fetch_allow, files=files)
        self.editor = _editor(settings, self.threads, self.fetcher)
        self.face_swapper = _face_swapper(settings, self.threads)
        #: ``None``: no webhook is configured.
        self.webhook_sender = _webhook_sender(settings, clock)
        #: ``None``: open mode.
        self.tokens = _tokens(settings, clock)
        self.lag = LoopLag(None if settings.max_lag_ms is None else settings.max_lag_ms / 1000)
        #: Seconds.
        self.auth_timeout = AUTH_TIMEOUT

    def socket_server(self, sockets: "Sockets") -> SocketServer:
        """A Socket.IO server with these handlers."""
        peers = None if self.storage.nodes is None else Peers(self.storage.nodes)
        return SocketServer(sockets, self.clock, self.auth_timeout, peers)


async def wire(
    settings: Settings, *, clock: Clock = now, images: ImageStore | None = None, storage: Storage | None = None
) -> Parts:
    """The parts that the settings ask for, with these stores if they are given.

    Raises:
        SettingsError: a setting is wrong that only its adapter understands.
        StorageRefused, ImagesRefused
    """
    parts = Parts(settings, clock)  # Before the log is opened: an operator's own factory may fail.
    parts.storage = storage or await _open_storage(settings, clock)
    try:
        parts.images = images or await _open_images(settings, parts.storage)
    except BaseException:
        await parts.storage.close()
        raise
    return parts


class _Technology(NamedTuple):
    open: Callable[[str, StorageOptions], Awaitable[Storage]]
    #: Looks for damage, and only reads.
    examine: Callable[[str], Examined] = lambda url: Examined()


def _postgres() -> ModuleType:
    """The storage in PostgreSQL, imported when it is used: its driver is an extra. Raises `StorageRefused`."""
    try:
        from adapters.postgres import storage
    except ModuleNotFoundError:
        raise StorageRefused("a log in PostgreSQL needs an extra: .venv/bin/pip install -e '.[postgres]'.") from None
    return storage


#: By the scheme of ``STAGECAST_LOG``.
_TECHNOLOGIES: Final[Mapping[str, Callable[[], _Technology]]] = {
    "memory": lambda: _Technology(memory_storage.open_storage),
    "sqlite": lambda: _Technology(sqlite_storage.open_storage, sqlite_storage.examine),
    "postgresql": lambda: _Technology(_postgres().open_storage, _postgres().examine),
}


def _scheme(settings: Settings) -> str:
    return settings.log.partition(":")[0]


async def _open_storage(settings: Settings, clock: Clock) -> Storage:
    """Raises `StorageRefused`."""
    options = StorageOptions(
        epoch=secrets.token_hex(8),
        credits=settings.credits,
        clock=clock,
        retention=timedelta(seconds=settings.retention),
        outbox=settings.webhook_url is not None,
        direct=settings.log_direct,
        address=settings.announced_address,
    )
    return await _TECHNOLOGIES[_scheme(settings)]().open(settings.log, options)


def _s3_images() -> "type[S3Images]":
    """The images in S3, imported when they are used: their client is an extra. Raises `ImagesRefused`."""
    try:
        from adapters.s3.images import S3Images
    except ModuleNotFoundError:
        raise ImagesRefused("images in S3 need an extra: .venv/bin/pip install -e '.[s3]'.") from None
    return S3Images


def _in_bucket(settings: Settings) -> bool:
    return "://" in settings.images


async def _open_images(settings: Settings, storage: Storage) -> ImageStore:
    """The images, claimed for this log.

    Raises:
        SettingsError: they are in a folder that other nodes do not share.
        ImagesRefused: they belong to another log or process, or cannot be used.
        StorageRefused: it cannot be asked whether there are other nodes.
    """
    log, epoch = _scheme(settings) if storage.log.durable else "memory", storage.log.epoch
    if _in_bucket(settings):
        return await _s3_images().open(settings.images, log=log, epoch=epoch)
    if not settings.shared_images and await storage.has_other_nodes():
        raise SettingsError(
            "STAGECAST_IMAGES must be s3://bucket/prefix, or a folder that all nodes share and "
            "STAGECAST_SHARED_IMAGES=true: other nodes use this log."
        )
    return ImageFolder(Path(settings.images), log=log, epoch=epoch, shared=settings.shared_images)


@contextmanager
def _refused_as(sentence: str) -> Iterator[None]:
    """Turn an adapter's `ValueError` into a `SettingsError`; ``{}`` in the sentence stands for its message."""
    try:
        yield
    except ValueError as error:
        raise SettingsError(sentence.format(error)) from None


def _editor(settings: Settings, threads: ImageThreads, web: UrlFetcher) -> ImageEditor:
    match settings.editor:
        case "local":
            return LocalEditor(threads, settings.local_seconds)
        case "openai":
            assert settings.openai_api_key is not None
            with _refused_as("OPENAI_API_KEY must be a key: letters, digits and signs without spaces."):
                return openai_editor.OpenAIEditor(
                    threads,
                    web,
                    api_key=settings.openai_api_key.get_secret_value(),
                    base_url=settings.openai_base_url or openai_editor.BASE_URL,
                    model=settings.openai_model or openai_editor.DEFAULT_MODEL,
                    deadline=_provider_deadline(settings),
                )
        case factory:
            with _refused_as("STAGECAST_EDITOR must name a factory of an editor; {}."):
                return OwnEditor(factory, threads)


def _face_swapper(settings: Settings, threads: ImageThreads) -> FaceSwapper:
    match settings.face_swap:
        case "local":
            return LocalFaceSwap(threads, settings.local_seconds)
        case "replicate":
            assert settings.replicate_api_token is not None
            with _refused_as("STAGECAST_REPLICATE_MODEL must be owner/name or owner/name:version."):
                return replicate_face_swap.ReplicateFaceSwap(
                    threads,
                    settings.replicate_api_token.get_secret_value(),
                    settings.replicate_model or replicate_face_swap.DEFAULT_MODEL,
                    deadline=_provider_deadline(settings),
                )
        case factory:
            with _refused_as("STAGECAST_FACE_SWAP must name a factory of a face swap; {}."):
                return OwnFaceSwap(factory, threads)


def _webhook_sender(settings: Settings, clock: Clock) -> WebhookSender | None:
    if settings.webhook_url is None:
        return None
    secret = None if settings.webhook_secret is None else settings.webhook_secret.get_secret_value()
    with _refused_as("STAGECAST_WEBHOOK_URL must be an http or https URL."):
        return WebhookSender(settings.webhook_url, secret, clock=clock)


def _provider_deadline(settings: Settings) -> float:
    """Seconds; shorter than the generation's deadline, so that the error names the provider."""
    return min(_PROVIDER_TIMEOUT, 0.9 * settings.deadline)


def _tokens(settings: Settings, clock: Clock) -> Tokens | None:
    if settings.open_mode:
        return None
    if settings.jwks_url is not None:
        keys: JwksKeys | SecretKey = JwksKeys(settings.jwks_url, clock=clock)
    else:
        assert settings.jwt_secret is not None
        with _refused_as("STAGECAST_JWT_SECRET must be a secret, not a public key or a certificate."):
            keys = SecretKey(settings.jwt_secret.get_secret_value().encode())
    return Tokens(
        keys,
        clock=clock,
        user_claim=settings.jwt_user_claim,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
    )


def issue_token(settings: Settings, user_id: str, *, service: bool, ttl: timedelta) -> str:
    """A token that a service with these settings accepts. Raises `InvalidUserId`; ValueError: `ttl` is out of range."""
    tokens = _tokens(settings, now)
    assert tokens is not None
    return tokens.issue(user_id, service=service, ttl=ttl)


def examine_stores(settings: Settings) -> Sequence[str]:
    """List the damage in the stores of a service with these settings, a line each. The stores are only read.

    Raises:
        SettingsError: a setting is wrong that only its adapter understands.
        StorageRefused, ImagesRefused
    """
    Parts(settings).threads.close()
    examined = _TECHNOLOGIES[_scheme(settings)]().examine(settings.log)
    if examined.damage and examined.epoch is None:
        pass  # It is not known whose the images should be.
    elif _in_bucket(settings):
        _s3_images().examine(settings.images, log=_scheme(settings), epoch=examined.epoch)
    else:
        ImageFolder.examine(Path(settings.images), log=_scheme(settings), epoch=examined.epoch)
    return examined.damage


def migrate(settings: Settings, *, only_print: bool) -> str:
    """Bring the schema of the log in PostgreSQL to the present version, or only return the SQL that does.

    Raises:
        StorageRefused
    """
    return str(_postgres().migrate(settings.log, secrets.token_hex(8), only_print=only_print))


def connection_table(settings: Settings) -> ConnectionTable:
    """The connection limits: at most the descriptors of this process, less some for files."""
    room = max(descriptors() - OTHER_DESCRIPTORS, 1)
    most = min(settings.max_connections or room, room)
    return ConnectionTable(most, settings.max_connections_per_address, settings.trusted_proxies, room)
