"""The use cases: start, cancel, delete and read generations.

`_owned` alone checks the owner: an unknown generation and another user's are the same `NotFound`.
"""

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, Protocol

from pydantic_core import to_json

from domain import errors
from domain.admission import Admission, Limits
from domain.events import timestamp
from domain.external import ExternalWork
from domain.generation import Generation, Snapshot
from domain.identity import WORKING_FOR
from domain.ports.images import ImageIntake
from domain.ports.leases import Leases
from domain.ports.ledger import Ledger
from domain.ports.log import EventLog, History, Start
from domain.ports.retention import Retention
from domain.ports.sessions import Sessions
from domain.ports.system import Clock, Entropy
from domain.recorder import Recorder, log_fields
from domain.rehydrate import generation_of, readable_part_of
from domain.requests import GenerationRequest
from domain.stages import Kind
from domain.stored_images import StoredImages
from domain.supervisor import Supervisor

logger = logging.getLogger(__name__)

_ID_PREFIX: Final[dict[Kind, str]] = {"edit": "edit", "generate": "gen"}

#: How many finished generations `Workflow.recent` returns.
RECENT: Final = 20

#: Generations of a user that are read at a time to be removed.
_REMOVED_AT_ONCE: Final = 100


class Upload(Protocol):
    """A file that came with a request."""

    @property
    def size(self) -> int:
        """Its size in bytes."""

    async def read(self) -> bytes:
        """Its whole content. May be called repeatedly."""


class Page(NamedTuple):
    """Generations, newest first, and `before` of the next page; ``None`` if there is none."""

    generations: Sequence[Snapshot]
    next: int | None


@dataclass(kw_only=True, eq=False)
class Workflow:
    """What users can do."""

    log: EventLog
    ledger: Ledger
    retention: Retention
    recorder: Recorder
    leases: Leases
    external: ExternalWork
    admission: Admission
    images: StoredImages
    intake: ImageIntake
    clock: Clock
    entropy: Entropy
    limits: Limits
    supervisor: Supervisor
    sessions: Sessions

    def __post_init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        #: The starts that are being accepted, with their users, and by user and idempotency key. Done when they end.
        self._starting: dict[asyncio.Future[None], str] = {}
        self._keys: dict[tuple[str, str], asyncio.Future[None]] = {}
        #: Limits the files that are in memory for a fingerprint or a copy.
        self._in_memory = asyncio.Semaphore(2)
        #: Requests that are being received, which `drain` ends, and images being decoded, which `close` ends.
        self._arriving: set[_Interruptible] = set()
        self._admitting: set[_Interruptible] = set()
        #: Whether starts are refused.
        self.draining = False
        self._closed = False

    async def start(
        self,
        user_id: str,
        kind: Kind,
        request: GenerationRequest,
        uploads: Sequence[Upload] = (),
        key: str | None = None,
    ) -> Snapshot:
        """Start a generation: its first event is in the log once this returns.

        The request's images are copied: those of the user's own generations, finished or not. An idempotency key that
        was used before returns the generation that it started.

        Raises:
            IdempotencyMismatch, Draining, ImageRefusal, LogUnavailable, and as `Admission.reserve`.
            Failure: ``storage_failed``.
        """
        while key is not None:
            if (known := await self.log.find_by_idempotency_key(user_id, key)) is not None:
                if known.fingerprint != await self._fingerprint(kind, request, uploads):
                    raise errors.IdempotencyMismatch
                with suppress(errors.NotFound):  # Removed since, and the key with it.
                    return await self.snapshot(user_id, known.generation_id)
                continue
            if (first := self._keys.get((user_id, key))) is None:
                break
            await asyncio.wait([first])  # A request with the same key is being accepted or refused.
        if self.draining:
            raise errors.Draining
        ended = asyncio.get_running_loop().create_future()
        self._starting[ended] = user_id
        if key is not None:
            self._keys[user_id, key] = ended
        try:
            return await self._start(user_id, kind, request, uploads, key)
        except errors.AlreadyStarted as started:
            with suppress(errors.NotFound):
                return await self.snapshot(user_id, started.generation_id)
        except (errors.InsufficientCredit, errors.QueueFull, errors.StorageLimit, errors.TooManyGenerations):
            if key is None or await self.log.find_by_idempotency_key(user_id, key) is None:
                raise
        finally:
            del self._starting[ended]
            if key is not None:
                del self._keys[user_id, key]
            ended.set_result(None)
        # Another node has accepted a request with this key meanwhile, or its generation was removed.
        return await self.start(user_id, kind, request, uploads, key)

    async def arriving(self, user_id: str, key: str | None) -> AbstractContextManager[None]:
        """Count a request that starts a generation, and return the context in which it is to be received.

        With a known key it is not counted, and with any key it is received while the service drains: it may have been
        accepted before.

        Raises:
            Draining: also in the context.
            Overloaded, TooManyStarts, LogUnavailable
        """
        if self._closed or (self.draining and key is None):
            raise errors.Draining
        if key is None or (
            (user_id, key) not in self._keys and await self.log.find_by_idempotency_key(user_id, key) is None
        ):
            await self.admission.count(user_id)
        return _Interruptible(self._arriving)

    def drain(self) -> None:
        """Refuse starts, including those that are being received. What was accepted goes on."""
        self.draining = True
        _end(self._arriving)

    async def started(self, user_id: str | None = None) -> None:
        """Wait until every start, of this user if one is given, is in the log and in the queue, or was refused."""
        while starting := [task for task, user in self._starting.items() if user_id in (None, user)]:
            await asyncio.wait(starting)

    async def close(self) -> None:
        """Refuse every start that is not being appended yet, and wait for the others."""
        self.draining = self._closed = True
        _end(self._arriving | self._admitting)
        await self.started()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _start(
        self, user_id: str, kind: Kind, request: GenerationRequest, uploads: Sequence[Upload], key: str | None
    ) -> Snapshot:
        WORKING_FOR.set(user_id)
        with _Interruptible(self._arriving):
            size = sum([*(upload.size for upload in uploads), *await self._sizes(user_id, request.images)])
            reserved = await self.admission.reserve(user_id, size=size, external=request.external)
        generation_id = f"{_ID_PREFIX[kind]}_{int(self.clock().timestamp() * 1000)}_{self.entropy.token()}"
        with reserved:
            try:
                with _Interruptible(self._admitting):
                    fingerprint = "" if key is None else await self._fingerprint(kind, request, uploads)
                    names = [await self._admit(user_id, generation_id, *each) for each in enumerate(uploads)]
                    names += [await self._copy(user_id, generation_id, *each) for each in enumerate(request.images)]
                    if names:
                        await self.admission.check_stored(user_id, size, generation_id)
                if self._closed:
                    raise errors.Draining
                if names:
                    request = request.model_copy(update={"images": tuple(names)})
                start = Start(kind, to_json(request), key, fingerprint, self.limits.max_per_user, request.external)
                generation = await self.recorder.start(Generation(generation_id, kind, user_id, request), start)
            except errors.LogUnavailable:
                self._reconcile(user_id, generation_id)
                raise
            except Exception:  # If it is cancelled, which ends the process, the log may have the event.
                await self.images.remove(generation_id)
                raise
            logger.info("generation started", extra={"fields": log_fields(generation), "repeat_key": None})
            try:
                await self._offer(generation)
            except Exception:  # It is in the log, and so accepted.
                self._reconcile(user_id, generation_id)
            return await self._show_one(generation)

    async def _offer(self, generation: Generation) -> None:
        if not generation.request.external:
            await self.leases.offer(generation.user_id, generation.generation_id, fetching=generation.needs_fetching)

    def _reconcile(self, user_id: str, generation_id: str) -> None:
        """As soon as the log answers, offer the generation if the log has it, else remove its pictures."""

        async def reconcile() -> None:
            await self.recorder.settle(user_id, generation_id)
            history = await self.log.summary(generation_id)
            if history is None:
                await self.images.remove(generation_id)
            else:
                await self._offer(readable_part_of(history))

        task = asyncio.create_task(self.supervisor.keep("starts", reconcile))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _admit(self, user_id: str, generation_id: str, index: int, upload: Upload) -> str:
        try:
            picture = await self.intake.admit(upload.read)
        except errors.ImageRefusal as refusal:
            refusal.index = index
            raise
        return await self.images.save(generation_id, picture, user_id=user_id)

    async def _sizes(self, user_id: str, names: Sequence[str]) -> Sequence[int]:
        """The sizes of these images. Raises `UnknownImage`: one does not exist, or is not this user's."""
        sizes = []
        for index, name in enumerate(names):
            history = await self.log.summary(name.rpartition("-")[0])
            size = await self.images.store.size(name)
            if history is None or history.user_id != user_id or not size:
                raise errors.UnknownImage(index)
            sizes.append(size)
        return sizes

    async def _copy(self, user_id: str, generation_id: str, index: int, name: str) -> str:
        async with self._in_memory:
            picture = await self.images.store.load(name)
            if picture is None:  # Removed in the meantime.
                raise errors.UnknownImage(index)
            return await self.images.save(generation_id, picture, user_id=user_id)

    async def cancel(self, user_id: str, generation_id: str) -> Literal["cancelled", "already_finished"]:
        """End a generation unless it has ended, whoever works on it. Raises `NotFound`."""
        await self.summary(user_id, generation_id)
        if not await self.recorder.end(generation_id, errors.Failure("cancelled")):
            return "already_finished"
        with suppress(errors.LogUnavailable):  # Whoever claims it finds that it has ended.
            await self.leases.withdraw(generation_id)
        return "cancelled"

    async def delete(self, user_id: str, generation_id: str) -> None:
        """Remove a finished generation: its pictures and its history. Raises `NotFound`, `NotFinished`."""
        history = await self.summary(user_id, generation_id)
        if history.events[-1].end is None:
            raise errors.NotFinished
        await self.images.remove(generation_id)  # First: if the log then does not answer, it can be tried again.
        await self.retention.remove(generation_id, retention=False)

    async def remove_user(self, user_id: str) -> None:
        """Remove a user with everything that is stored of it; unfinished work is cancelled.

        An unknown user is removed already. A start that comes meanwhile is that of a new user.

        Raises:
            LogUnavailable: some of it may have been removed. Try again.
        """
        await self.started(user_id)
        gone = set[str]()
        removed: Sequence[str] | None = None
        while removed is None:
            before: int | None = None
            while found := await self.log.generations(user_id, before=before, limit=_REMOVED_AT_ONCE):
                for history in found:
                    if history.events[-1].end is None:
                        await self.recorder.end(history.generation_id, errors.Failure("cancelled"))
                        await self.leases.withdraw(history.generation_id)
                    else:
                        gone.add(history.generation_id)
                    await self.images.remove(history.generation_id)  # First, as in `delete`.
                before = found[-1].events[0].position
            with suppress(errors.NotFinished):  # It has started since.
                removed = await self.retention.remove_user(user_id)
        await self.sessions.end_all(user_id)
        await self.images.quotas.forget_starts(user_id)
        for generation_id in {*removed} - gone:  # Their work may have stored more since.
            await self.images.remove(generation_id)

    async def history(self, user_id: str, generation_id: str) -> History:
        """This user's generation with all its events. Raises `NotFound`."""
        return _owned(await self.log.generation(generation_id), user_id)

    async def summary(self, user_id: str, generation_id: str) -> History:
        """This user's generation as a summary. Raises `NotFound`."""
        return _owned(await self.log.summary(generation_id), user_id)

    async def snapshot(self, user_id: str, generation_id: str) -> Snapshot:
        """The generation as it is now. Raises `NotFound`."""
        return await self._show_one(generation_of(await self.summary(user_id, generation_id)))

    async def page(self, user_id: str, *, active: bool | None, before: int | None, limit: int) -> Page:
        """At most `limit` of this user's generations, newest first, that started before this feed position."""
        found = await self.log.generations(user_id, active=active, before=before, limit=limit + 1)
        shown = found[:limit]
        following = shown[-1].events[0].position if len(found) > limit else None
        return Page(await self.show([*map(readable_part_of, shown)]), following)

    async def recent(self, user_id: str) -> Sequence[Snapshot]:
        """All active generations and the last finished ones, newest first, without `input`."""
        active = await self.log.generations(user_id, active=True, limit=1_000)
        finished = await self.log.generations(user_id, active=False, limit=RECENT)
        found = {history.generation_id: history for history in (*active, *finished)}  # One may have ended in between.
        histories = sorted(found.values(), key=lambda history: -history.events[0].position)
        generations = [*map(readable_part_of, histories)]
        for generation in generations:
            generation.input = None
        return await self.show(generations)

    async def credit(self, user_id: str) -> int | None:
        """The user's balance; ``None`` if no balances are kept."""
        return (await self.ledger.standing(user_id)).credit

    async def grant(self, user_id: str, amount: int, key: str | None) -> int:
        """Add to the balance, or take from it, and return it. Raises `IdempotencyMismatch`, `CreditsOff`."""
        now = self.clock()
        return await self.ledger.grant(user_id, amount, key=key, at=now, until=now + self.limits.retention)

    async def _fingerprint(self, kind: Kind, request: GenerationRequest, uploads: Sequence[Upload]) -> str:
        """A digest of the kind, the request and the contents of the uploads.

        It is compared with stored ones, so what is digested never changes. A new optional field is appended if given.
        """
        fields = (kind, request.prompt, request.options, request.images, request.image_urls)
        optional = () if request.face is None else (request.face,)
        digest = hashlib.sha256(to_json((*fields, request.face_swap, request.metadata, request.external, *optional)))
        for upload in uploads:
            async with self._in_memory:
                data = await upload.read()
                digest.update((await asyncio.to_thread(hashlib.sha256, data)).digest())
        return digest.hexdigest()

    async def _show_one(self, generation: Generation) -> Snapshot:
        return (await self.show([generation]))[0]

    async def show(self, generations: Sequence[Generation]) -> Sequence[Snapshot]:
        """What clients get of these generations."""
        positions: Mapping[str, int] = {}
        if any(each.untouched for each in generations):
            with suppress(errors.LogUnavailable):  # All else is known.
                positions = await self.leases.positions()
        return [
            each.snapshot(self._expiry(each), positions.get(each.generation_id) if each.untouched else None)
            for each in generations
        ]

    def _expiry(self, generation: Generation) -> str | None:
        if not generation.finished:
            return None
        return timestamp(datetime.fromisoformat(generation.updated_at) + self.limits.retention)


def _owned(history: History | None, user_id: str) -> History:
    if history is None or history.user_id != user_id:
        raise errors.NotFound
    return history


class _Interruptible:
    """A context in which `Draining` is raised as soon as `_end` is called with these scopes.

    `asyncio.timeout` would do, in five times the time.
    """

    def __init__(self, scopes: "set[_Interruptible]") -> None:
        self._scopes = scopes
        self._ended = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = self._task.cancelling()
        self._scopes.add(self)

    def end(self) -> None:
        """Cancel what runs in the context, once."""
        self._ended = self._ended or self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._scopes.discard(self)
        if self._ended and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise errors.Draining from None


def _end(scopes: Iterable[_Interruptible]) -> None:
    for scope in scopes:
        scope.end()
