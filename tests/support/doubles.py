"""Small real implementations of the ports, which do what a test says, and a backend where all work together.

And the time of the event loop, which passes when a test says so: `advance_time`.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

from adapters.memory.leases import MemoryLeases
from adapters.memory.log import MemoryLog
from adapters.memory.quotas import MemoryQuotas
from adapters.memory.sessions import MemorySessions
from adapters.system import SystemEntropy, now
from domain.admission import Admission, Limits
from domain.errors import Failure, FailureCode, InvalidImage, LogUnavailable
from domain.external import ExternalWork
from domain.feed import Cursor, Feed, Logged
from domain.generation import Snapshot
from domain.ports.images import Content, Load, Picture, read
from domain.ports.leases import Leases
from domain.ports.ledger import Standing
from domain.ports.log import Append, Deliver, EventLog, History, IdempotencyRecord
from domain.ports.providers import Report
from domain.quarantine import Quarantine
from domain.recorder import Recorder
from domain.rehydrate import generation_of
from domain.requests import GenerationRequest, Options
from domain.runner import Runner
from domain.stages import Kind
from domain.stored_images import StoredImages
from domain.supervisor import OK, Supervisor
from domain.workflow import Workflow
from support.builders import NOON, CountedEntropy, RecordingFollower, SteppableClock, WholeLog, bodies, image_url

BASE = "http://test/images/"
FACE_URL = "http://pictures.test/face.png"

#: One thing that a provider does while it works.
Act = Callable[[Report], Awaitable[None]]


async def advance_time(seconds: float) -> None:
    """Let so much time pass on the event loop's clock, in next to none of the world's.

    So a test need not be short of time for something to come too late. It passes in steps, in each of which what is
    on its way arrives, and waits for the next part of something begin again.
    """
    for _ in range(4):
        _advance_clock(seconds / 4)
        await asyncio.sleep(0.01)


def _advance_clock(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    time = loop.time
    loop.time = lambda: time() + seconds  # type: ignore[method-assign]


def png(text: str) -> Picture:
    return Picture(text.encode(), "image/png")


def reports(fraction: float, message: str = "Working...", preview: Picture | None = None) -> Act:
    async def act(report: Report) -> None:
        await report(fraction, message, preview)

    return act


def raises(error: BaseException) -> Act:
    async def act(report: Report) -> None:
        raise error

    return act


def fails(code: FailureCode) -> Act:
    return raises(Failure(code))


class Pause:
    """An act that lasts until it is let go. Tells when it was reached, and whether it was aborted."""

    def __init__(self, *, stubborn: bool = False) -> None:
        """A stubborn one does not let itself be aborted: it goes on as soon as that is tried."""
        self._stubborn = stubborn
        self.reached = asyncio.Event()
        self.released = asyncio.Event()
        self.aborted = asyncio.Event()

    async def __call__(self, report: Report) -> None:
        self.reached.set()
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.aborted.set()
            if not self._stubborn:
                raise


class ScriptedEditor:
    """`domain.ports.providers.ImageEditor`: acts, and then gives its picture. Counts what would have been paid for."""

    def __init__(self, *acts: Act, free: bool = False) -> None:
        self.free = free
        self.acts: Sequence[Act] = acts
        self.result = png("edited")
        self.calls: list[tuple[str, Picture, str, Options]] = []

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self._work("edit", sheet, prompt, options, report)

    async def generate(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self._work("generate", sheet, prompt, options, report)

    async def _work(self, kind: str, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        self.calls.append((kind, sheet, prompt, options))
        for act in self.acts:
            await act(report)
        return self.result


class ScriptedFaceSwapper:
    """`domain.ports.providers.FaceSwapper`, likewise."""

    def __init__(self, *acts: Act, free: bool = False) -> None:
        self.free = free
        self.acts: Sequence[Act] = acts
        self.result = png("swapped")
        self.calls: list[tuple[Picture, Picture]] = []

    async def swap(self, picture: Picture, face: Picture, report: Report) -> Picture:
        self.calls.append((picture, face))
        for act in self.acts:
            await act(report)
        return self.result


async def nothing(fraction: float, message: str, preview: Picture | None = None) -> None:
    """A progress report that is ignored."""


class ScriptedComposer:
    """`domain.ports.images.Composer`: joins the pictures' bytes."""

    def __init__(self, *acts: Act) -> None:
        self.acts: Sequence[Act] = acts
        self.calls: list[list[Picture]] = []

    async def compose(self, loads: Sequence[Load]) -> Picture:
        pictures = [await load() for load in loads]
        self.calls.append(pictures)
        for act in self.acts:
            await act(nothing)
        return Picture(b"+".join(picture.data for picture in pictures), "image/png")


class ScriptedFetcher:
    """`domain.ports.images.ImageFetcher`: a web of as many pictures as there are URLs."""

    def __init__(self, *acts: Act) -> None:
        self.acts: Sequence[Act] = acts
        self.calls: list[str] = []

    async def fetch(self, url: str) -> Picture:
        self.calls.append(url)
        for act in self.acts:
            await act(nothing)
        return png(f"<{url}>")


class TrustingIntake:
    """`domain.ports.images.ImageIntake`: admits everything but ``b"bad"``."""

    async def admit(self, content: Content) -> Picture:
        data = await read(content)
        if data == b"bad":
            raise InvalidImage
        return Picture(data, "image/png")

    async def thumbnail(self, content: Content, width: int) -> Picture:
        return Picture((await self.admit(content)).data, "image/webp")


class InMemoryImages:
    """`domain.ports.images.ImageStore` without a disk. Pictures whose bytes are in `refused` cannot be stored."""

    def __init__(self) -> None:
        self.kept: dict[str, Picture] = {}
        self.refused: set[bytes] = set()
        self.saved: list[str] = []
        #: Raised, once each, by the next calls of `discard`.
        self.discard_errors: list[Exception] = []

    async def save(self, generation_id: str, picture: Picture, name: str | None = None) -> str:
        if picture.data in self.refused:
            raise Failure("storage_failed")
        name = name or f"{generation_id}-{len(self.saved):032x}.png"
        self.kept[name] = picture
        self.saved.append(name)
        return name

    async def load(self, name: str) -> Picture | None:
        return self.kept.get(name)

    async def size(self, name: str) -> int:
        return len(self.kept[name].data) if name in self.kept else 0

    async def discard(self, name: str) -> None:
        if self.discard_errors:
            raise self.discard_errors.pop(0)
        self.kept.pop(name, None)

    async def remove(self, generation_id: str) -> None:
        for name in [name for name in self.kept if name.startswith(f"{generation_id}-")]:
            del self.kept[name]

    async def names(self, *, older_than: datetime) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.kept:
            found.setdefault(name.rpartition("-")[0], []).append(name)
        return found

    async def probe(self) -> None:
        """There is always room."""

    async def close(self) -> None:
        pass


def plain_recorder(log: EventLog, **rest: float) -> Recorder:
    """A recorder of events that bring no pictures."""
    return Recorder(log, now, SystemEntropy(), StoredImages(InMemoryImages(), MemoryQuotas()), image_url, **rest)


class InMemoryUpload:
    """`domain.workflow.Upload` of these bytes; where there is a gate, not before it opens."""

    def __init__(self, data: bytes, gate: asyncio.Event | None = None) -> None:
        self._data = data
        self.size = len(data)
        self._gate = gate
        #: Set while a caller waits for the gate.
        self.awaited = asyncio.Event()

    async def read(self) -> bytes:
        if self._gate is not None:
            self.awaited.set()
            await self._gate.wait()
        return self._data


class ForwardingLog:
    """`support.builders.WholeLog` that passes everything on to another, over a line with a delay."""

    def __init__(self, log: WholeLog) -> None:
        self.inner = log
        #: Done once, just before the next append arrives.
        self.overtake: Callable[[], Awaitable[object]] | None = None

    @property
    def epoch(self) -> str:
        return self.inner.epoch

    @property
    def durable(self) -> bool:
        return self.inner.durable

    async def forward(self) -> None:
        await asyncio.sleep(0)

    async def append(self, entry: Append) -> Logged:
        await self.forward()
        overtake, self.overtake = self.overtake, None
        if overtake is not None:
            await overtake()
        logged = await self.inner.append(entry)
        await self.forward()
        return logged

    async def mark_paid(self, generation_id: str) -> None:
        await self.forward()
        await self.inner.mark_paid(generation_id)

    async def find_by_idempotency_key(self, user_id: str, key: str) -> IdempotencyRecord | None:
        await self.forward()
        return await self.inner.find_by_idempotency_key(user_id, key)

    async def generation(self, generation_id: str) -> History | None:
        await self.forward()
        return await self.inner.generation(generation_id)

    async def summary(self, generation_id: str) -> History | None:
        await self.forward()
        return await self.inner.summary(generation_id)

    async def generations(
        self, user_id: str, *, active: bool | None = None, before: int | None = None, limit: int
    ) -> Sequence[History]:
        await self.forward()
        return await self.inner.generations(user_id, active=active, before=before, limit=limit)

    async def unfinished(self) -> Sequence[History]:
        await self.forward()
        return await self.inner.unfinished()

    async def images(self, generation_id: str) -> Collection[str]:
        await self.forward()
        return await self.inner.images(generation_id)

    async def set_aside(self, generation_id: str) -> bool:
        await self.forward()
        return await self.inner.set_aside(generation_id)

    async def finished_before(self, moment: datetime, limit: int) -> Sequence[str]:
        await self.forward()
        return await self.inner.finished_before(moment, limit)

    async def head_cursor(self, user_id: str) -> Cursor:
        await self.forward()
        return await self.inner.head_cursor(user_id)

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        await self.forward()
        return await self.inner.feed(user_id, after=after, anchor=anchor, limit=limit)

    def follow(self, deliver: Deliver) -> AbstractAsyncContextManager[None]:
        return self.inner.follow(deliver)

    async def standing(self, user_id: str) -> Standing:
        await self.forward()
        return await self.inner.standing(user_id)

    async def grant(self, user_id: str, amount: int, *, key: str | None, at: datetime, until: datetime) -> int:
        await self.forward()
        return await self.inner.grant(user_id, amount, key=key, at=at, until=until)

    async def remove_user(self, user_id: str) -> Sequence[str]:
        await self.forward()
        return await self.inner.remove_user(user_id)

    async def remove(self, generation_id: str, *, retention: bool) -> bool:
        await self.forward()
        return await self.inner.remove(generation_id, retention=retention)

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        await self.forward()
        return await self.inner.claim_undelivered(limit)

    async def receiver_gone(self) -> None:
        await self.forward()
        await self.inner.receiver_gone()

    async def delivered(self, generation_id: str) -> None:
        await self.forward()
        await self.inner.delivered(generation_id)

    async def probe(self) -> None:
        await self.forward()
        await self.inner.probe()


class FlakyLog(ForwardingLog):
    """A log that is not available now and then.

    `appends` says for the next appends what goes wrong: ``"before"`` it is made, ``"after"`` (it is made, and
    the reply is lost), ``"slow"`` (it is made, and the reply never comes), ``"-"``: nothing. `reads` is how many
    of the next reads fail.
    """

    def __init__(self, log: WholeLog, appends: Sequence[str] = (), reads: int = 0) -> None:
        super().__init__(log)
        self.appends = list(appends)
        self.reads = reads
        self.tries = 0
        #: A slow one has been made.
        self.stuck = asyncio.Event()

    async def append(self, entry: Append) -> Logged:
        self.tries += 1
        trouble = self.appends.pop(0) if self.appends else "-"
        if trouble == "before":
            raise LogUnavailable
        logged = await self.inner.append(entry)
        if trouble == "after":
            raise LogUnavailable
        if trouble == "slow":
            self.stuck.set()
            await asyncio.Event().wait()
        return logged

    async def generation(self, generation_id: str) -> History | None:
        if self.reads:
            self.reads -= 1
            raise LogUnavailable
        return await self.inner.generation(generation_id)

    async def summary(self, generation_id: str) -> History | None:
        if self.reads:
            self.reads -= 1
            raise LogUnavailable
        return await self.inner.summary(generation_id)


class StartArguments(NamedTuple):
    """What `Workflow.start` gets."""

    kind: Kind
    request: GenerationRequest
    uploads: Sequence[InMemoryUpload]


def start_arguments(
    kind: Kind = "edit",
    *,
    prompt: str = "a red hat",
    uploads: Sequence[InMemoryUpload] | None = None,
    image_urls: tuple[str, ...] = (),
    face_swap: bool = False,
    external: bool = False,
    **rest: str,
) -> StartArguments:
    files = [InMemoryUpload(b"one"), InMemoryUpload(b"two")] if uploads is None else uploads
    request = GenerationRequest(
        prompt=prompt,
        image_urls=image_urls,
        face_swap=face_swap,
        metadata={**rest} if rest else None,
        external=external,
    )
    return StartArguments(kind, request, files)


def swap_arguments() -> StartArguments:
    """An edit that asks for a face swap."""
    return start_arguments(uploads=[InMemoryUpload(b"one")], image_urls=(FACE_URL,), face_swap=True)


@dataclass
class InMemoryBackend:
    """The whole domain over adapters in memory, with providers that do what a test says."""

    credits: int | None = 10
    max_running: int = 2
    max_waiting: int = 100
    max_per_user: int = 20
    deadline: float = 60
    patience: float = math.inf
    #: What stands between the domain and the log.
    line: Callable[[WholeLog], WholeLog] = lambda log: log
    clock: SteppableClock = field(default_factory=lambda: SteppableClock(NOON))
    entropy: CountedEntropy = field(default_factory=CountedEntropy)
    images: InMemoryImages = field(default_factory=InMemoryImages)
    composer: ScriptedComposer = field(default_factory=ScriptedComposer)
    editor: ScriptedEditor = field(default_factory=ScriptedEditor)
    face_swapper: ScriptedFaceSwapper = field(default_factory=ScriptedFaceSwapper)
    fetcher: ScriptedFetcher = field(default_factory=ScriptedFetcher)
    #: Those of several backends, if there are several.
    shared_log: WholeLog | None = None
    shared_leases: Leases | None = None

    def __post_init__(self) -> None:
        self.memory = self.shared_log or MemoryLog(epoch="e1", credits=self.credits, clock=self.clock)
        self.log = self.line(self.memory)
        self.leases = self.shared_leases or MemoryLeases()
        self.stored = stored = StoredImages(self.images, MemoryQuotas())
        self.recorder = Recorder(self.log, self.clock, self.entropy, stored, image_url, patience=self.patience)
        self.supervisor = Supervisor()
        self.quarantine = Quarantine(self.recorder)
        self.external = ExternalWork(self.log, self.leases, self.recorder, self.quarantine, self.clock, self.deadline)
        limits = Limits(self.max_waiting, self.max_per_user, timedelta(days=1))
        self.workflow = Workflow(
            log=self.log,
            ledger=self.log,
            retention=self.log,
            recorder=self.recorder,
            leases=self.leases,
            external=self.external,
            admission=Admission(self.log, self.leases, stored.quotas, limits),
            images=stored,
            intake=TrustingIntake(),
            clock=self.clock,
            entropy=self.entropy,
            limits=limits,
            supervisor=self.supervisor,
            sessions=MemorySessions(timedelta(days=1)),
        )
        self.runner = Runner(
            supervisor=self.supervisor,
            quarantine=self.quarantine,
            log=self.log,
            recorder=self.recorder,
            leases=self.leases,
            images=stored,
            composer=self.composer,
            editor=self.editor,
            face_swapper=self.face_swapper,
            fetcher=self.fetcher,
            max_running=self.max_running,
            deadline=self.deadline,
        )
        self.follower = RecordingFollower()
        self._running: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator["InMemoryBackend"]:
        """The runner works. If it dies of itself, so does the test."""
        async with self.memory.follow(self.follower):
            self._running = asyncio.create_task(self.runner.run())
            try:
                yield self
            finally:
                self._running.cancel()
                await asyncio.wait([self._running])
                if not self._running.cancelled():
                    self._running.result()
                assert set(self.supervisor.parts.values()) <= {OK}, "the runner has failed"

    async def start(
        self, wanted: StartArguments | None = None, user_id: str = "ada", key: str | None = None
    ) -> Snapshot:
        return await self.workflow.start(user_id, *(wanted or start_arguments()), key)

    async def make(self, wanted: StartArguments | None = None, user_id: str = "ada") -> Snapshot:
        """Start one, and wait until nothing is left to do."""
        begun = await self.start(wanted, user_id)
        await self.settled()
        return await self.workflow.snapshot(user_id, begun.generation_id)

    async def settled(self) -> None:
        """Wait until nothing is left to do, or the runner has died over it."""
        assert self._running is not None
        settled = asyncio.create_task(self.leases.drain())
        try:
            async with asyncio.timeout(60):
                await asyncio.wait([settled, self._running], return_when=asyncio.FIRST_COMPLETED)
            assert not self._running.done(), "the runner has died"
        finally:
            settled.cancel()

    async def cancel(self, snapshot: Snapshot) -> str:
        return await self.workflow.cancel(snapshot.user_id, snapshot.generation_id)

    async def reached(self, generation_id: str, status: str) -> None:
        """Wait until the log holds an event of this status."""
        text = f'"status":"{status}"'.encode()
        await self.follower.until(
            lambda entries: any(
                entry.generation_id == generation_id and text in (entry.event or b"") for entry in entries
            )
        )

    async def events(self, snapshot: Snapshot) -> list[dict[str, object]]:
        return bodies(await self.memory.generation(snapshot.generation_id))

    async def statuses(self, snapshot: Snapshot) -> list[str]:
        return [str(event["status"]) for event in await self.events(snapshot)]

    async def check(self, *users: str) -> None:
        """What holds whenever nothing runs: I1, I2, I3, I6, and that the input images are kept, and no other picture
        is left that no event names.
        """
        named, inputs = set[str](), set[str]()
        for user_id in users or ("ada",):
            credit = self.credits
            for summary in await self.memory.generations(user_id, limit=1_000):
                history = await self.memory.generation(summary.generation_id)
                assert history is not None
                told = bodies(history)
                assert [event["sequence"] for event in told] == list(range(1, len(told) + 1))
                ends = [event["status"] in ("completed", "failed") for event in told]
                assert ends == [False] * (len(told) - 1) + [True], f"not ended once: {told}"
                progress = [event["progress"] for event in told]
                assert progress == sorted(progress)
                shown = await self.workflow.snapshot(user_id, history.generation_id)
                assert generation_of(history).snapshot(shown.expires_at) == shown
                inputs |= {url.removeprefix(BASE) for url in (shown.input.images if shown.input else ())}
                if credit is not None:
                    credit -= told[-1]["status"] == "completed"
                for event in told:
                    named |= {str(url).removeprefix(BASE) for key, url in event.items() if key.endswith("Url")}
            assert (await self.memory.standing(user_id)).credit == credit
        assert inputs <= set(self.images.kept), "input images are lost"
        assert set(self.images.kept) <= named | inputs, "pictures are left that no event names"
        assert await self.leases.count() == (0, 0)


def wanted(kind: Kind, face_swap: bool) -> StartArguments:
    return swap_arguments() if face_swap else start_arguments(kind)


def picture_of(backend: InMemoryBackend, url: object) -> bytes:
    """The bytes of the picture that an event's URL names."""
    assert isinstance(url, str)
    assert url.startswith(BASE)
    return backend.images.kept[url.removeprefix(BASE)].data


async def assert_failed_and_refunded(backend: InMemoryBackend, done: Snapshot, stage: str, code: str) -> None:
    told = (await backend.events(done))[-1]
    assert (told["status"], told["failedStage"], told["code"]) == ("failed", stage, code)
    assert told["credit"] == 10
    assert isinstance(told["error"], str)
    assert isinstance(told["retryable"], bool)
    assert (done.status, done.failed_stage, done.code) == ("failed", stage, code)
    await backend.check()
