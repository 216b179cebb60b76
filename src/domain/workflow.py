"""The use cases: start, cancel, delete, and everything that is read. All of them over ports only.

Whose generation it is, is asked in one place: `Workflow.history`. What is not there and what belongs to
somebody else are the same `NotFound`.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

from pydantic import JsonValue
from pydantic_core import to_json

from domain.admission import Admission, Limits
from domain.errors import (
    AlreadyStarted,
    Draining,
    Failure,
    IdempotencyMismatch,
    ImageRefusal,
    LogUnavailable,
    NotFound,
)
from domain.events import timestamp
from domain.external import ExternalWork
from domain.feed import Logged
from domain.generation import Generation, Snapshot
from domain.identity import WORKING_FOR
from domain.ports.images import ImageIntake
from domain.ports.leases import Leases
from domain.ports.ledger import Ledger
from domain.ports.log import EventLog, History, Start
from domain.ports.retention import Retention
from domain.ports.system import Clock, Entropy
from domain.recorder import Recorder
from domain.rehydrate import generation_of, is_external, order_of, readable_part_of
from domain.requests import Options, Order
from domain.stages import Kind
from domain.stored_images import StoredImages
from domain.supervisor import Supervisor

_Result = TypeVar("_Result")

_ID_PREFIX: Final[dict[Kind, str]] = {"edit": "edit", "generate": "gen"}

#: How many finished generations somebody who attaches is told of.
RECENT: Final = 20


class Upload(Protocol):
    """A file that came with a request."""

    @property
    def size(self) -> int:
        """How many bytes it has."""

    async def read(self) -> bytes:
        """The whole content, as often as asked."""


class Wish(NamedTuple):
    """What a user asks for; `domain.requests.Order` is what becomes of it."""

    kind: Kind
    prompt: str
    options: Options
    uploads: Sequence[Upload]
    image_urls: tuple[str, ...] = ()
    face_swap: bool = False
    metadata: dict[str, JsonValue] | None = None
    #: The user's own pipeline does the work.
    external: bool = False


class Page(NamedTuple):
    """Generations, newest first, and where the next page begins; ``None`` at the end."""

    generations: Sequence[Snapshot]
    next: int | None


class Workflow:
    """What users can do."""

    def __init__(
        self,
        *,
        log: EventLog,
        ledger: Ledger,
        retention: Retention,
        recorder: Recorder,
        leases: Leases,
        external: ExternalWork,
        admission: Admission,
        images: StoredImages,
        intake: ImageIntake,
        clock: Clock,
        entropy: Entropy,
        limits: Limits,
        supervisor: Supervisor,
    ) -> None:
        self.log = log
        self._ledger = ledger
        self._retention = retention
        self._recorder = recorder
        self._leases = leases
        self._external = external
        self._admission = admission
        self._images = images
        self._intake = intake
        self._clock = clock
        self._entropy = entropy
        self._limits = limits
        self._supervisor = supervisor
        self._starting: set[asyncio.Task[Any]] = set()
        #: Those of them that came with an idempotency key, by user and key.
        self._keys: dict[tuple[str, str], asyncio.Task[Any]] = {}
        #: Files are read for a fingerprint two at a time: what waits is not in memory.
        self._hashing = asyncio.Semaphore(2)
        self._tasks: set[asyncio.Task[Any]] = set()
        #: What `drain` and `close` put an end to: requests that are still being read, and images being decoded.
        self._arriving: set[asyncio.Timeout] = set()
        self._admitting: set[asyncio.Timeout] = set()
        #: No new work is taken.
        self.draining = False
        self._closed = False

    async def start(self, user_id: str, wish: Wish, key: str | None = None) -> Snapshot:
        """Accept a generation: once this returns, it is in the log. A key used again returns what it began.

        Raises:
            IdempotencyMismatch, Draining, ImageRefusal, LogUnavailable, and as `Admission.reserve`: and nothing has
                happened.
            Failure: ``storage_failed``, likewise.
        """
        while key is not None:
            if (begun := await self.log.find_by_idempotency_key(user_id, key)) is not None:
                if begun.fingerprint != await self._fingerprint(wish):
                    raise IdempotencyMismatch
                return await self.snapshot(user_id, begun.generation_id)
            if (first := self._keys.get((user_id, key))) is None:
                break
            # Another request with this key is being accepted, or refused.
            await asyncio.wait([first])
        if self.draining:
            raise Draining
        starting = self._spawn(self._start(user_id, wish, key))
        self._starting.add(starting)
        if key is not None:
            self._keys[user_id, key] = starting
        starting.add_done_callback(partial(self._started, user_id, key))
        try:
            return await asyncio.shield(starting)  # A caller that goes away stops nothing.
        except AlreadyStarted as started:
            return await self.snapshot(user_id, started.generation_id)

    @asynccontextmanager
    async def arriving(self, user_id: str, key: str | None) -> AsyncIterator[None]:
        """The time in which a request that starts a generation is read. Ends at once where it cannot be accepted.

        With a key it may have been accepted before, so that it is read also while the service drains. What has been
        accepted before is limited by nothing.

        Raises:
            Draining: no new work is taken, or no longer.
            Overloaded, TooManyStarts, LogUnavailable
        """
        if self._closed or (self.draining and key is None):
            raise Draining
        if key is None or (
            (user_id, key) not in self._keys and await self.log.find_by_idempotency_key(user_id, key) is None
        ):
            self._admission.count(user_id)
        async with _ends_with(self._arriving):
            yield

    def drain(self) -> None:
        """Take no new work. What has been accepted goes on; requests that are still being read are refused."""
        self.draining = True
        _end(self._arriving)

    async def started(self) -> None:
        """Wait until everything accepted is in the log and waits for its worker, or was refused."""
        while self._starting:
            await asyncio.wait(self._starting)

    async def close(self) -> None:
        """Refuse what is not on its way into the log yet, and wait for the rest."""
        self.draining = self._closed = True
        _end(self._arriving | self._admitting)
        await self.started()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _started(self, user_id: str, key: str | None, starting: asyncio.Task[Snapshot]) -> None:
        self._starting.discard(starting)
        if key is not None:
            del self._keys[user_id, key]
        if not starting.cancelled():
            starting.exception()  # Whoever asked may be gone.

    async def _start(self, user_id: str, wish: Wish, key: str | None) -> Snapshot:
        WORKING_FOR.set(user_id)
        size = sum(upload.size for upload in wish.uploads)
        async with AsyncExitStack() as reserved:
            async with _ends_with(self._arriving):
                await reserved.enter_async_context(self._admission.reserve(user_id, size=size, external=wish.external))
            return await self._accept(user_id, wish, key)

    async def _accept(self, user_id: str, wish: Wish, key: str | None) -> Snapshot:
        now = self._clock()
        generation_id = f"{_ID_PREFIX[wish.kind]}_{int(now.timestamp() * 1000)}_{self._entropy.token()}"
        self._images.assign(generation_id, user_id)
        try:
            async with _ends_with(self._admitting):
                fingerprint = "" if key is None else await self._fingerprint(wish)
                images = [await self._admit(generation_id, *upload) for upload in enumerate(wish.uploads)]
            if self._closed:
                raise Draining
            order = Order(
                prompt=wish.prompt,
                options=wish.options,
                images=tuple(images),
                image_urls=wish.image_urls,
                face_swap=wish.face_swap,
                metadata=wish.metadata,
                external=wish.external,
            )
            start = Start(wish.kind, to_json(order), key, fingerprint, self._limits.max_per_user)
            fields = {"input_image": order.image_urls[0]} if order.image_urls else {}
            generation = await self._recorder.begin(Generation(generation_id, wish.kind, user_id, order), start, fields)
        except LogUnavailable:
            self._reconcile(generation_id)
            raise
        except BaseException:
            await self._images.remove(generation_id)
            raise
        try:
            await self._offer(generation, external=order.external)
        except Exception:  # It is in the log, and so it has been accepted.
            self._reconcile(generation_id)
        return self._show(generation)

    async def _offer(self, generation: Generation, *, external: bool) -> None:
        if not external:
            await self._leases.offer(generation.user_id, generation.generation_id, fetching=generation.needs_fetching)

    def _reconcile(self, generation_id: str) -> None:
        """Once the log answers again: work on a start whose reply was lost, and forget one that never was."""

        async def reconcile() -> None:
            begun = await self.log.generation(generation_id)
            if begun is None:
                await self._images.remove(generation_id)
            else:
                await self._offer(readable_part_of(begun), external=is_external(begun))

        self._spawn(self._supervisor.keep("starts", reconcile))

    def _spawn(self, work: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _admit(self, generation_id: str, index: int, upload: Upload) -> str:
        try:
            picture = await self._intake.admit(upload.read)
        except ImageRefusal as refusal:
            refusal.index = index
            raise
        return await self._images.save(generation_id, picture)

    async def cancel(self, user_id: str, generation_id: str) -> Literal["cancelled", "already_finished"]:
        """End a generation, whoever works on it, unless it has ended. Raises `NotFound`."""
        history = await self.history(user_id, generation_id)
        if not await self._recorder.end(generation_id, Failure("cancelled")):
            return "already_finished"
        if await self._leases.withdraw(generation_id):
            for name in order_of(history).images:
                await self._images.discard(name)
        return "cancelled"

    async def report(
        self,
        user_id: str,
        generation_id: str,
        status: str,
        fields: Mapping[str, Any],
        *,
        content: bytes,
        sequence: int | None = None,
    ) -> Logged:
        """Move on what the user's own pipeline works on. Raises `NotFound`, and as `ExternalWork.report`."""
        history = await self.history(user_id, generation_id)
        return await self._external.report(history, status, fields, content=content, sequence=sequence)

    async def delete(self, user_id: str, generation_id: str) -> None:
        """Remove a finished generation, its history and its pictures. Raises `NotFound`, `NotFinished`."""
        await self.history(user_id, generation_id)
        await self._retention.remove(generation_id, retention=False)
        await self._images.remove(generation_id)

    async def history(self, user_id: str, generation_id: str) -> History:
        """All that the log has of this user's generation. Raises `NotFound`."""
        history = await self.log.generation(generation_id)
        if history is None or history.user_id != user_id:
            raise NotFound
        return history

    async def snapshot(self, user_id: str, generation_id: str) -> Snapshot:
        """The generation as it is now. Raises `NotFound`."""
        return self._show(generation_of(await self.history(user_id, generation_id)))

    async def page(self, user_id: str, *, active: bool | None, before: int | None, limit: int) -> Page:
        """This user's generations, newest first: at most `limit` of those that began before that position."""
        found = await self.log.generations(user_id, active=active, before=before, limit=limit + 1)
        shown = found[:limit]
        more = len(found) > limit
        following = shown[-1].events[0].position if more else None
        return Page([self._show(generation_of(history)) for history in shown], following)

    async def recent(self, user_id: str) -> Sequence[Snapshot]:
        """Everything active and the last finished ones, newest first: what somebody who attaches is told."""
        active = await self.log.generations(user_id, active=True, limit=1_000)
        finished = await self.log.generations(user_id, active=False, limit=RECENT)
        histories = sorted([*active, *finished], key=lambda history: -history.events[0].position)
        return [self._show(generation_of(history)) for history in histories]

    async def credit(self, user_id: str) -> int | None:
        """The user's balance; ``None`` where none are kept."""
        return await self._ledger.credit(user_id)

    async def grant(self, user_id: str, amount: int, key: str | None) -> int:
        """Give credit, or take it back. Raises `IdempotencyMismatch`, `CreditsOff`."""
        now = self._clock()
        return await self._ledger.grant(user_id, amount, key=key, at=now, until=now + self._limits.retention)

    async def _fingerprint(self, wish: Wish) -> str:
        """Tells one request from another: kind, fields, and the contents of its files."""
        digest = hashlib.sha256(to_json(wish._replace(uploads=())))
        for upload in wish.uploads:
            async with self._hashing:
                data = await upload.read()
                digest.update((await asyncio.to_thread(hashlib.sha256, data)).digest())
        return digest.hexdigest()

    def _show(self, generation: Generation) -> Snapshot:
        expires_at = None
        if generation.finished:
            ended = datetime.fromisoformat(generation.updated_at)
            expires_at = timestamp(ended + self._limits.retention)
        return generation.snapshot(expires_at)


@asynccontextmanager
async def _ends_with(scopes: set[asyncio.Timeout]) -> AsyncIterator[None]:
    """Raises `Draining` inside once somebody ends these scopes (`_end`)."""
    scope = asyncio.timeout(None)
    try:
        async with scope:
            scopes.add(scope)
            try:
                yield
            finally:
                scopes.discard(scope)
    except TimeoutError:
        if not scope.expired():
            raise
        raise Draining from None


def _end(scopes: Iterable[asyncio.Timeout]) -> None:
    for scope in scopes:
        scope.reschedule(asyncio.get_running_loop().time())
