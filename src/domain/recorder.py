"""Appends events: the machine decides, the log appends, and only then has the generation moved."""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from domain.errors import Conflict, Failure, LogUnavailable
from domain.events import CONTINUE, URL_FIELDS, Input, encode, event_name
from domain.feed import Logged
from domain.generation import NONE, Generation
from domain.histogram import MOMENTS, Histogram
from domain.ports.log import Append, EventLog, Start
from domain.ports.system import Clock, Entropy
from domain.rehydrate import UNREADABLE, generation_of, readable_part_of
from domain.stages import FLOWS, STARTED
from domain.stored_images import StoredImages
from domain.timeouts import within

logger = logging.getLogger(__name__)

#: Seconds after which one append counts as unanswered.
_TIMEOUT: Final = 2.0
#: Seconds between two attempts; the last one repeats.
_PAUSES: Final = (0.05, 0.1, 0.2, 0.5, 1.0)

#: Seconds for which an append is tried again while a caller waits for it.
ATTENTION: Final = 2.0


@dataclass(eq=False)
class Recorder:
    """The only writer of events. It tries an unanswered append again as the same event.

    A generation that ends as `started` loses its input images.
    """

    log: EventLog
    clock: Clock
    entropy: Entropy
    images: StoredImages
    #: The URL of a stored picture, by its name. This is the only place where URLs are made.
    image_url: Callable[[str], str]
    #: The seconds for which an append is tried again if no caller waits for it.
    patience: float = math.inf

    def __post_init__(self) -> None:
        #: The generations that have ended here by kind and code, ``completed`` or that of the failure.
        self.ends: Counter[tuple[str, str]] = Counter()
        #: The seconds that the log took for an append.
        self.append_seconds = Histogram(MOMENTS)

    async def start(self, generation: Generation, start: Start) -> Generation:
        """Append the first event. Raises as `EventLog.append`.

        After `LogUnavailable` the log may have the event, but it does not take it any more.
        """
        urls = generation.request.image_urls
        fields = {"input": self._input(generation), **({"input_image": urls[0]} if urls else {})}
        not_after = self.clock() + timedelta(seconds=ATTENTION)
        _, after = await self._append(generation, STARTED, fields, ATTENTION, start=start, not_after=not_after)
        return after

    async def move(
        self, generation: Generation, status: str, fields: Mapping[str, Any] = NONE, *, free: bool = False
    ) -> Generation:
        """Append the next event and return the generation after it. `free`: see `domain.ports.log.Append`.

        Pictures among the `fields` are the names of stored ones.

        Raises:
            IllegalTransition: the machine does not allow it; nothing was appended.
            Conflict: another writer has moved this generation.
            LogUnavailable: the log did not answer, however often it was asked.
        """
        images = {field: name for field, name in fields.items() if field in URL_FIELDS}
        _, after = await self._append(generation, status, fields, self.patience, images, free=free)
        return after

    async def report(self, generation: Generation, status: str, fields: Mapping[str, Any], event_id: int) -> Logged:
        """Append the next event as `event_id`, for a caller who waits for it. Raises as `move`.

        Pictures among the `fields` are URLs of the caller's own.
        """
        logged, _ = await self._append(generation, status, fields, ATTENTION, event_id=event_id)
        return logged

    async def end(self, generation_id: str, failure: Failure) -> bool:
        """End a generation with this failure, whoever works on it. False: it has ended, or does not exist.

        Raises:
            LogUnavailable: the log did not answer in time.
        """
        while history := await self.log.summary(generation_id):
            try:
                generation = generation_of(history)
            except UNREADABLE:
                generation = readable_part_of(history)
            if generation.finished:
                await self._drop_lost_images(generation)  # The append may have been made without an answer.
                return False
            try:
                await self._append(generation, *generation.ending(failure), ATTENTION)
            except Conflict:
                continue  # It has just moved on: end it where it is now.
            return True
        return False

    async def settle(self, user_id: str, generation_id: str) -> None:
        """Return once each append of this user that was not answered is in the log, or never will be.

        Raises:
            LogUnavailable: the log did not answer.
        """
        # No event has this number, so the log refuses it, after what it was asked to append for the user before.
        with suppress(Conflict):
            await self.log.append(
                Append(user_id, generation_id, 0, self.entropy.event_id(), b"", CONTINUE, self.clock())
            )

    def _input(self, generation: Generation) -> Input:
        request = generation.request
        return Input(
            prompt=request.prompt,
            images=[self.image_url(name) for name in request.images],
            image_urls=list(request.image_urls),
            face_swap=request.face_swap if generation.kind == "edit" else None,
            face=request.face_index if request.face_swap else None,
            **vars(request.options),
        )

    async def _append(
        self,
        generation: Generation,
        status: str,
        fields: Mapping[str, Any],
        patience: float,
        images: Mapping[str, str] = NONE,
        event_id: int | None = None,
        **rest: Any,
    ) -> tuple[Logged, Generation]:
        """Append the next event; `rest` are further fields of `Append`. Return it, and the generation after it."""
        at = self.clock()
        if images:
            fields = {**fields, **{field: self.image_url(name) for field, name in images.items()}}
        event, after = generation.propose(status, at, images, **fields)
        stage = FLOWS[generation.kind][status]
        append = Append(
            generation.user_id,
            generation.generation_id,
            event.sequence,
            self.entropy.event_id() if event_id is None else event_id,
            encode(event),
            event_name(status),
            at,
            stage.credit,
            stage.terminal,
            images={name: after.images[name] for name in after.images if getattr(event, name) is not None},
            **rest,
        )
        loop = asyncio.get_running_loop()
        began, attempts = loop.time(), 0
        give_up = began + patience
        while True:
            try:
                logged = await within(_TIMEOUT, self.log.append(append))
                self.append_seconds.observe(loop.time() - began)
                break
            except (LogUnavailable, TimeoutError):
                pause = _PAUSES[min(attempts, len(_PAUSES) - 1)]
                if loop.time() + pause > give_up:
                    raise LogUnavailable from None
            await asyncio.sleep(pause)
            began, attempts = loop.time(), attempts + 1
        if append.terminal:
            self._log_end(after)
            await self._drop_lost_images(after)
        return logged, after

    def _log_end(self, generation: Generation) -> None:
        code = generation.outcome.get("code", generation.status)
        self.ends[generation.kind, code] += 1
        took = datetime.fromisoformat(generation.updated_at) - datetime.fromisoformat(generation.created_at)
        fields = {**log_fields(generation), "code": code, "seconds": took.total_seconds()}
        logger.info("generation ended", extra={"fields": fields, "repeat_key": None})

    async def _drop_lost_images(self, generation: Generation) -> None:
        if not generation.input_images:
            await self.images.discard(*generation.request.images)


def log_fields(generation: Generation) -> dict[str, Any]:
    """What a line of the log says of a generation."""
    return {"generationId": generation.generation_id, "kind": generation.kind, "user": generation.user_id}
