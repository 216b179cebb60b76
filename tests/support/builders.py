"""What tests start from: requests, generations, appends, a log with events, and controlled time and randomness."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Protocol, cast

from hypothesis import HealthCheck, settings
from pydantic import JsonValue
from pydantic_core import to_json

from adapters.memory.leases import MemoryLeases
from adapters.memory.log import MemoryLog
from adapters.memory.quotas import MemoryQuotas
from adapters.memory.sessions import MemorySessions
from adapters.sqlite.database import Database
from adapters.sqlite.log import SqliteLog
from adapters.system import now
from domain.events import URL_FIELDS, Event, encode, event_name
from domain.feed import Logged
from domain.generation import Generation
from domain.ports.leases import Leases
from domain.ports.ledger import Ledger
from domain.ports.log import Append, EventLog, History, Notice, Removed, Start, UserRemoved
from domain.ports.retention import Retention
from domain.ports.storage import Log, Storage
from domain.ports.system import Clock
from domain.ports.webhook_outbox import WebhookOutbox
from domain.requests import GenerationRequest
from domain.stages import Kind

#: For every property: as thorough as CI can pay for, and never judged by how long one example took.
PROPERTY: Final = settings(
    settings.default, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)

NOON: Final = datetime(2026, 11, 22, 12, 0, 0, 123_000, tzinfo=UTC)

#: A folder that costs no disk, where there is one; ``None``: wherever temporary files go.
IN_MEMORY: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None

#: The stages of each flow when nothing fails.
EDIT: Final = (
    "started",
    "composition",
    "composition_completed",
    "openai_editing",
    "openai_editing_completed",
    "completed",
)
EDIT_WITH_SWAP: Final = (*EDIT[:-1], "face_swap", "face_swap_completed", "completed")
GENERATE: Final = ("started", "composition", "composition_completed", "ai_generation", "completed")

#: What the provider stages bring, so that a guard which asks for it is content.
STAGE_FIELDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "composition_completed": {"composition_url": "http://test/images/sheet.png"},
    "openai_editing_completed": {"edited_image_url": "http://test/images/edited.png"},
    "face_swap_completed": {"face_swap_url": "http://test/images/swapped.png"},
    "failed": {"error": "It broke.", "code": "internal", "retryable": False},
}


class SteppableClock:
    """`domain.ports.system.Clock`: stands still until a test steps it."""

    def __init__(self, present: datetime = NOON) -> None:
        self.present = present

    def __call__(self) -> datetime:
        return self.present

    def step(self, seconds: float = 1) -> datetime:
        self.present += timedelta(seconds=seconds)
        return self.present


class CountedEntropy:
    """`domain.ports.system.Entropy`: the same tokens and event ids in every run, and none twice."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._tokens = 0

    def token(self) -> str:
        self._tokens += 1
        return f"{self._tokens:016d}"

    def event_id(self) -> int:
        return self._random.getrandbits(63)


def make_request(
    *,
    prompt: str = "a red hat",
    face_swap: bool = False,
    images: tuple[str, ...] = (),
    image_urls: tuple[str, ...] = (),
    metadata: dict[str, JsonValue] | None = None,
) -> GenerationRequest:
    return GenerationRequest(
        prompt=prompt, face_swap=face_swap, images=images, image_urls=image_urls, metadata=metadata
    )


def make_generation(
    kind: Kind = "edit", *, user_id: str = "ada", generation_id: str | None = None, **request: Any
) -> Generation:
    """One that has not begun."""
    prefix = "edit" if kind == "edit" else "gen"
    return Generation(generation_id or f"{prefix}_1_0000000000000000", kind, user_id, make_request(**request))


def fold(
    generation_id: str, kind: Kind, user_id: str, request: GenerationRequest, events: Iterable[Event]
) -> Generation:
    """The fold of all these events."""
    generation = Generation(generation_id, kind, user_id, request)
    for event in events:
        generation = generation.after(event)
    return generation


def image_url(name: str) -> str:
    return f"http://test/images/{name}"


def images_of(event: Event) -> dict[str, str]:
    """The names in those of the event's URLs that are of stored pictures of its generation, by field."""
    names = {field: (getattr(event, field) or "").rpartition("/")[2] for field in URL_FIELDS}
    return {field: name for field, name in names.items() if name.startswith(f"{event.generation_id}-")}


def path_of(kind: Kind, *, face_swap: bool = False) -> tuple[str, ...]:
    """The statuses of a generation in which nothing fails."""
    if kind == "generate":
        return GENERATE
    return EDIT_WITH_SWAP if face_swap else EDIT


def stage_fields(kind: Kind, status: str) -> dict[str, Any]:
    """What a generation that goes well has found on entering a status."""
    if kind == "generate" and status == "completed":
        return {"generated_image_url": "http://test/images/generated.png"}
    return dict(STAGE_FIELDS.get(status, {}))


def moved_to(generation: Generation, *statuses: str, at: datetime = NOON) -> Generation:
    """The generation after these statuses, with what each of them brings. No log involved."""
    for status in statuses:
        _, generation = generation.propose(status, at, **stage_fields(generation.kind, status))
    return generation


def append_for(
    generation: Generation,
    status: str,
    *,
    at: datetime = NOON,
    event_id: int = 1,
    start: Start | None = None,
    not_after: datetime | None = None,
    free: bool = False,
    **fields: Any,
) -> tuple[Append, Generation]:
    """The append of the generation's next event, and the generation as it is once that is in the log."""
    event, after = generation.propose(status, at, **{**stage_fields(generation.kind, status), **fields})
    append = Append(
        user_id=generation.user_id,
        generation_id=generation.generation_id,
        sequence=event.sequence,
        event_id=event_id,
        event=encode(event),
        name=event_name(status),
        at=at,
        credit={"started": -1, "completed": 0, "failed": 1}.get(status),
        terminal=status in ("completed", "failed"),
        start=start,
        not_after=not_after,
        free=free,
        images=images_of(event),
    )
    return append, after


@dataclass
class EventWriter:
    """Writes generations into a log, one event at a time."""

    log: EventLog
    clock: SteppableClock = field(default_factory=SteppableClock)
    entropy: CountedEntropy = field(default_factory=CountedEntropy)
    count: int = 0

    def prepare(self, generation: Generation, status: str, **rest: Any) -> tuple[Append, Generation]:
        return append_for(generation, status, at=self.clock(), event_id=self.entropy.event_id(), **rest)

    def prepare_start(
        self,
        user_id: str = "ada",
        kind: Kind = "edit",
        *,
        generation_id: str | None = None,
        key: str | None = None,
        fingerprint: str = "same",
        max_unfinished: int = 1_000,
        not_after: datetime | None = None,
        **request: Any,
    ) -> tuple[Append, Generation]:
        self.count += 1
        prefix = "edit" if kind == "edit" else "gen"
        generation_id = generation_id or f"{prefix}_1_{self.count:016d}"
        generation = make_generation(kind, user_id=user_id, generation_id=generation_id, **request)
        start = Start(kind, to_json(make_request(**request)), key, fingerprint, max_unfinished)
        return self.prepare(generation, "started", start=start, not_after=not_after)

    async def start(self, user_id: str = "ada", kind: Kind = "edit", **rest: Any) -> Generation:
        append, after = self.prepare_start(user_id, kind, **rest)
        await self.log.append(append)
        return after

    async def move(self, generation: Generation, *statuses: str, **fields: Any) -> Generation:
        for status in statuses:
            append, generation = self.prepare(generation, status, **fields)
            await self.log.append(append)
        return generation

    async def finish(self, generation: Generation) -> Generation:
        """To its end, whichever stage it is in."""
        path = path_of(generation.kind, face_swap=generation.request.face_swap)
        return await self.move(generation, *path[path.index(generation.status) + 1 :])

    async def run_to_end(self, user_id: str = "ada", kind: Kind = "edit", **rest: Any) -> Generation:
        """One from its start to its end."""
        return await self.finish(await self.start(user_id, kind, **rest))

    async def start_and_fail(self, user_id: str = "ada", **rest: Any) -> Generation:
        """One of two events, the second of which is its end."""
        return await self.move(await self.start(user_id, **rest), "failed")


class WholeLog(EventLog, Ledger, Retention, WebhookOutbox, Protocol):
    """A log together with its ledger, its retention and its outbox, as the contract suites try them."""


def memory_storage(log: WholeLog | None = None, *, leases: Leases | None = None) -> Storage:
    """A storage in memory, some of whose parts are given: for `api.wiring.wire`."""
    log = log or MemoryLog(epoch="e1", credits=100, clock=now)
    sessions = MemorySessions(timedelta(days=1))
    return Storage(
        log=cast(Log, log),
        sessions=sessions,
        leases=leases or MemoryLeases(),
        quotas=MemoryQuotas(),
    )


@dataclass
class EventRecorder(EventWriter):
    """One whose log is also asked for balances and the like."""

    log: WholeLog


class OpenLog(Protocol):
    """Opens an empty log: what a contract suite is parametrised by."""

    def __call__(
        self, *, clock: Clock, credits: int | None = 100, epoch: str = "e1", outbox: bool = False
    ) -> AbstractAsyncContextManager[WholeLog]: ...


@asynccontextmanager
async def open_memory_log(
    *, clock: Clock, credits: int | None = 100, epoch: str = "e1", outbox: bool = False
) -> AsyncIterator[WholeLog]:
    yield MemoryLog(epoch=epoch, credits=credits, clock=clock, outbox=outbox)


@asynccontextmanager
async def temporary_database(epoch: str = "e1") -> AsyncIterator[Database]:
    """A new one."""
    with TemporaryDirectory(dir=IN_MEMORY) as folder:
        database = Database(Path(folder, "log.db"), epoch=epoch)
        try:
            yield database
        finally:
            await database.close()


@asynccontextmanager
async def open_sqlite_log(
    *, clock: Clock, credits: int | None = 100, epoch: str = "e1", outbox: bool = False
) -> AsyncIterator[WholeLog]:
    async with temporary_database(epoch) as database:
        yield SqliteLog(database, credits=credits, clock=clock, outbox=outbox)


#: The adapters of the ports of `WholeLog` for one process, by name; `support.event_log` has them all.
LOGS: Final[Mapping[str, OpenLog]] = {"memory": open_memory_log, "sqlite": open_sqlite_log}


class RecordingFollower:
    """A follower that keeps the entries it received."""

    def __init__(self) -> None:
        self.entries: list[Logged] = []
        self.removed: list[Removed] = []
        self.removed_users: list[str] = []
        self._news = asyncio.Event()

    def __call__(self, entry: Notice) -> None:
        if isinstance(entry, Removed):
            self.removed.append(entry)
        elif isinstance(entry, UserRemoved):
            self.removed_users.append(entry.user_id)
        else:
            assert isinstance(entry, Logged), "the follower missed entries"
            self.entries.append(entry)
        self._news.set()

    def of(self, generation_id: str) -> list[Logged]:
        return [entry for entry in self.entries if entry.generation_id == generation_id]

    async def until(self, heard: Callable[[list[Logged]], bool]) -> list[Logged]:
        """Wait for a condition on the entries; followers may be called a little after the append returns."""
        async with asyncio.timeout(20):
            while not heard(self.entries):
                self._news.clear()
                await self._news.wait()
        return self.entries


def body(entry: Logged) -> dict[str, Any]:
    """The event's JSON, read as a client reads it."""
    assert entry.event is not None, "the place is empty"
    value = json.loads(entry.event)
    assert isinstance(value, dict)
    return value


def bodies(history: History | None) -> list[dict[str, Any]]:
    assert history is not None, "there is no such generation"
    return [body(entry) for entry in history.events]


def statuses(history: History | None) -> list[str]:
    return [str(event["status"]) for event in bodies(history)]


def from_another_writer(append: Append, event_id: int) -> Append:
    """The same append by another writer: equal bytes, another event id."""
    return append._replace(event_id=event_id)
