"""Takes generations from ``started`` to their end.

The machine says which stage comes next; the table says which step does the work of a stage. A step returns the fields
it has found for the next event, and these choose the next stage. The runner follows the log, so it notices if another
caller ends a generation (a cancel, from any device): the work is aborted, and a late result is dropped.
"""

import asyncio
import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

from domain.errors import Conflict, Failure, IllegalTransition, LogUnavailable
from domain.feed import Logged
from domain.histogram import Histogram
from domain.identity import WORKING_FOR
from domain.ports.images import Composer, ImageFetcher, Picture
from domain.ports.leases import Leases
from domain.ports.log import EventLog, Gap, History, Notice, Removed
from domain.ports.providers import FaceSwapper, ImageEditor, Report
from domain.quarantine import Quarantine
from domain.readiness import RUNNER
from domain.recorder import Recorder
from domain.rehydrate import UNREADABLE, generation_of, is_external, seconds_worked, was_interrupted
from domain.requests import Options
from domain.stage_times import Entered, StageTimes
from domain.stages import FAILED, FLOWS, STARTED, Provider, Stage, ceiling
from domain.stored_images import StoredImages
from domain.supervisor import Supervisor, Work, being_cancelled, patiently

logger = logging.getLogger(__name__)

#: Seconds between two renewals of the leases.
_RENEW: Final = 1.0

#: How many generations may fetch image URLs at once, for each that may be worked on.
_FETCHING: Final = 4


@dataclass(kw_only=True, eq=False)
class Runner:
    """Works on at most `max_running` generations at once, each for at most `deadline` seconds.

    Those that fetch image URLs do not count, so that slow sites delay no other work. They have a queue and limits of
    their own, and wait for a worker once their pictures are there.
    """

    log: EventLog
    recorder: Recorder
    leases: Leases
    images: StoredImages
    composer: Composer
    editor: ImageEditor
    face_swapper: FaceSwapper
    fetcher: ImageFetcher
    supervisor: Supervisor
    quarantine: Quarantine
    max_running: int
    #: Seconds.
    deadline: float

    def __post_init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self.stage_times = StageTimes()
        #: The seconds of each stage by kind and status, and those that generations waited until their work began.
        self.stage_seconds: defaultdict[tuple[str, str], Histogram] = defaultdict(Histogram)
        self.queue_seconds = Histogram()
        #: By ``ok`` or the code of the failure.
        self.provider_calls: Counter[tuple[Provider, str]] = Counter()
        #: Interrupted generations that were offered, until they have ended.
        self._interrupted: set[str] = set()
        self._interrupted_ended = asyncio.Event()
        #: Set while generations may have ended unnoticed.
        self._missed_entries = asyncio.Event()

    @property
    def running(self) -> int:
        """How many generations this node works on."""
        return len(self._jobs)

    async def resume(self) -> None:
        """Offer all unfinished generations to all nodes, first those that were interrupted in a paid stage."""
        for history in sorted(await self.log.unfinished(), key=was_interrupted, reverse=True):
            await self._offer(history)

    async def resumed(self) -> None:
        """Wait until the interrupted generations that were offered have ended."""
        while self._interrupted:
            self._interrupted_ended.clear()
            await self._interrupted_ended.wait()

    async def run(self) -> None:
        """Work until cancelled; then leave every generation where it stands."""
        works: list[Work] = [self._follow, self._hold]
        works += [partial(self._worker, fetching=False)] * self.max_running
        works += [partial(self._worker, fetching=True)] * (_FETCHING * self.max_running)
        async with asyncio.TaskGroup() as tasks:
            for work in works:
                tasks.create_task(self.supervisor.keep(RUNNER, work))

    async def interrupt(self) -> None:
        """End everything that is unfinished with ``interrupted``. For a log that will not outlive the process."""
        unfinished = await self.log.unfinished()
        ends = (self.recorder.end(history.generation_id, Failure("interrupted")) for history in unfinished)
        await asyncio.gather(*ends, return_exceptions=True)

    async def _offer(self, history: History) -> None:
        """Offer an unfinished generation, unless it is external."""
        if is_external(history):
            return
        fetching = interrupted = was_interrupted(history)
        with contextlib.suppress(*UNREADABLE):  # Whoever works on it sets it aside.
            fetching = interrupted or generation_of(history).needs_fetching
        if interrupted:
            self._interrupted.add(history.generation_id)
        if not await self.leases.offer(history.user_id, history.generation_id, fetching=fetching):
            self._interrupted.discard(history.generation_id)

    async def _follow(self) -> None:
        """Notice how generations end. Look up what may have been missed, also while this task did not run."""
        async with self.log.follow(self._notice):
            while True:
                self._missed_entries.clear()
                for generation_id in {*self._jobs, *self._interrupted}:
                    history = await patiently(partial(self.log.summary, generation_id))
                    if history is None or history.events[-1].end is not None:
                        self._ended(generation_id)
                await self._missed_entries.wait()

    def _notice(self, entry: Notice) -> None:
        if isinstance(entry, Gap):
            self._missed_entries.set()
        elif isinstance(entry, Removed) or (isinstance(entry, Logged) and entry.end == entry.position):
            # What another node has removed right after its end may be gone before this node reads the end.
            self._ended(entry.generation_id)

    def _ended(self, generation_id: str) -> None:
        """Stop working on a generation that has ended or was removed."""
        self._interrupted.discard(generation_id)
        self._interrupted_ended.set()
        job = self._jobs.get(generation_id)
        if job is not None and not (job.ending or job.over):
            job.over = True
            job.task.cancel()

    async def _hold(self) -> None:
        await asyncio.sleep(_RENEW)
        await self.supervisor.every(_RENEW, RUNNER, self._renew)

    async def _renew(self) -> None:
        """Renew the leases. Stop working on what this node has lost, and offer what another node has abandoned."""
        for generation_id in await self.leases.renew(list(self._jobs)):
            if generation_id in self._jobs:
                self._jobs[generation_id].abandon()
        for generation_id in await self.leases.abandoned():
            history = await self.log.summary(generation_id)
            if history is not None and history.events[-1].end is None:
                await self._offer(history)

    async def _worker(self, *, fetching: bool) -> None:
        while True:
            generation_id = await self.leases.claim(fetching=fetching)
            handed_over = False
            try:
                handed_over = await self._work(generation_id, fetching=fetching)
            except (Exception, asyncio.CancelledError) as error:
                if being_cancelled():
                    raise
                await self.quarantine.end(generation_id, RUNNER, error)
            finally:
                if not handed_over:
                    await self.leases.release(generation_id)

    async def _work(self, generation_id: str, *, fetching: bool) -> bool:
        """Work on a generation to its end, or while it fetches. Return whether a worker has taken it over then."""
        if (job := self._jobs.get(generation_id)) is None:
            history = await patiently(lambda: self.log.generation(generation_id))
            if history is None:
                return False
            self._jobs[generation_id] = job = _Job(self, history, fetching=fetching)
            # A task of its own, so that ending the generation aborts this job and not the worker.
            job.task = asyncio.create_task(self._finish(job))
        else:
            job.claimed.set_result(None)
        waits = [job.task, job.claimed] if fetching else [job.task]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if job.task.done() and not (job.task.cancelled() and (job.over or job.abandoned)):
                job.task.result()
        finally:
            if not (fetching and job.claimed.done()):
                del self._jobs[generation_id]
                job.abandon()
                await asyncio.wait([job.task])
                await job.clean_up()
        return fetching and job.claimed.done()

    async def _finish(self, job: "_Job") -> None:
        """Run the job to its end, whatever happens on the way."""
        WORKING_FOR.set(job.generation.user_id)
        try:
            failure = await self._attempt(job)
            if failure is not None:
                await job.move(*job.generation.ending(failure))
        except Conflict:
            # Another caller has moved it: that event stands, and ours was not appended.
            history = await patiently(lambda: self.log.generation(job.generation.generation_id))
            job.over = history is None or generation_of(history).finished
        except LogUnavailable:
            what = "generation %s: the log does not answer"
            logger.error(what, job.generation.generation_id, extra={"repeat_key": what})

    async def _attempt(self, job: "_Job") -> Failure | None:
        job.scope = scope = asyncio.timeout(self.deadline - seconds_worked(job.history))
        try:
            async with scope:
                await job.run()
        except Failure as failure:
            return failure
        except (Conflict, LogUnavailable):
            raise
        except (Exception, asyncio.CancelledError) as error:
            if job.over:
                return None
            if job.abandoned:
                raise
            if scope.expired():
                return Failure("deadline_exceeded")
            generation = job.generation
            logger.error("generation %s: %s in %s", generation.generation_id, type(error).__name__, generation.status)
            return Failure("internal")
        return None


class _Job:
    """One generation being worked on."""

    task: asyncio.Task[None]

    def __init__(self, runner: Runner, history: History, *, fetching: bool) -> None:
        self._runner = runner
        self._fetching = fetching
        #: Done once a worker has taken over what has been fetched for.
        self.claimed = asyncio.get_running_loop().create_future()
        #: Ends the work at the deadline.
        self.scope = asyncio.timeout(None)
        self.history = history
        self.generation = generation_of(history)
        #: The stages that it has entered since this node took it up; for a new one, from the first.
        self._entered = [self._entry] if self.generation.sequence == 1 else []
        self._request = self.generation.request
        self._sheet: Picture | None = None
        #: The pictures of the image URLs, stored as long as this job.
        self._fetched: list[str] = []
        self._result: Picture | None = None
        #: Stored pictures that are named by no event, neither in the log nor on its way there.
        self._unnamed: list[str] = []
        #: The terminal event is on its way into the log, from here.
        self.ending = False
        #: The generation has ended, here or elsewhere.
        self.over = self.generation.finished
        #: The work stops here, and the generation stays where it is.
        self.abandoned = False
        self._recording: asyncio.Task[None] | None = None

    @property
    def _stage(self) -> Stage:
        return FLOWS[self.generation.kind][self.generation.status]

    async def run(self) -> None:
        runner, generation_id = self._runner, self.generation.generation_id
        if was_interrupted(self.history):
            raise Failure("interrupted")
        names = [*self._request.images, *(name for entry in self.history.events for name in entry.images.values())]
        await patiently(lambda: runner.images.count(generation_id, self.generation.user_id, names))
        if self.history.free and not self._free(self._stage):
            # The stage was entered with a free provider, and is repeated with one that is not: only once.
            await patiently(lambda: runner.log.mark_paid(generation_id))
        while not self.generation.finished:
            step = self._stage.step
            fields = await getattr(self, step)() if step else {}
            await self.move(self.generation.onward(fields), fields)

    async def move(self, status: str, fields: Mapping[str, Any]) -> None:
        """Record the next event. A deadline that falls on it waits for it, to know where the generation stands."""
        stage = FLOWS[self.generation.kind][status]
        self.ending = stage.terminal
        self._recording = asyncio.create_task(self._record(status, fields, free=self._free(stage)))
        try:
            await asyncio.shield(self._recording)
        except asyncio.CancelledError:
            await asyncio.wait([self._recording])
            if not self._recording.cancelled():
                self._recording.result()
            raise

    def _free(self, stage: Stage) -> bool:
        return stage.provider is not None and bool(getattr(self._runner, stage.provider).free)

    async def _record(self, status: str, fields: Mapping[str, Any], *, free: bool) -> None:
        before = self.generation.status
        named = [name for name in self._unnamed if name in fields.values()]
        # From here on the log may have the event, even if its answer is not awaited or does not come.
        self._unnamed = [name for name in self._unnamed if name not in named]
        try:
            self.generation = await self._runner.recorder.move(self.generation, status, fields, free=free)
        except (Conflict, IllegalTransition):
            self._unnamed += named
            raise
        self.over = self.generation.finished
        if status != before:
            if self._entered:
                seconds = (self._entry.at - self._entered[-1].at).total_seconds()
                self._runner.stage_seconds[self.generation.kind, before].observe(seconds)
                if before == STARTED:
                    self._runner.queue_seconds.observe(seconds)
            self._entered.append(self._entry)
        if self.over and status != FAILED:
            self._runner.stage_times.add(self.generation.kind, self._entered)

    @property
    def _entry(self) -> Entered:
        return Entered(self.generation.status, datetime.fromisoformat(self.generation.updated_at))

    def abandon(self) -> None:
        """Stop here, and wait for nothing."""
        self.abandoned = True
        if self._recording is not None:
            self._recording.cancel()
        self.task.cancel()

    async def clean_up(self) -> None:
        """Remove what no event can name. If an event is lost on its way, the sweep removes its pictures."""
        await self._runner.images.discard(*self._unnamed, *self._fetched)

    async def compose(self) -> dict[str, Any]:
        for url in self._request.image_urls:
            await self._fetch(url)
        if self._fetching:
            await self._until_claimed()
        names = (*self._request.images, *self._fetched)
        self._sheet = await self._runner.composer.compose([partial(self._stored, name) for name in names])
        return {"composition_url": await self._keep(self._sheet, self._unnamed)}

    async def _until_claimed(self) -> None:
        """Wait in line for a worker. That is no work: the deadline moves by as much."""
        generation, leases, loop = self.generation, self._runner.leases, asyncio.get_running_loop()
        left = (self.scope.when() or 0) - loop.time()
        self.scope.reschedule(None)
        try:
            await leases.offer(generation.user_id, generation.generation_id)
            await asyncio.shield(self.claimed)
        finally:
            if not self.claimed.done():
                await leases.withdraw(generation.generation_id)
        self.scope.reschedule(loop.time() + left)

    async def edit(self) -> dict[str, Any]:
        return {"edited_image_url": await self._make(self._runner.editor.edit)}

    async def generate(self) -> dict[str, Any]:
        return {"generated_image_url": await self._make(self._runner.editor.generate)}

    async def _make(self, work: Callable[[Picture, str, Options, Report], Awaitable[Picture]]) -> str:
        request = self._request
        sheet = self._sheet or await self._stored(self.generation.images["composition_url"])
        self._result = await self._counted("editor", work(sheet, request.prompt, request.options, self._report))
        return await self._keep(self._result, self._unnamed)

    async def _counted(self, provider: Provider, call: Awaitable[Picture]) -> Picture:
        result = "ok"
        try:
            return await call
        except BaseException as error:
            otherwise = "cancelled" if isinstance(error, asyncio.CancelledError) else "internal"
            result = error.code if isinstance(error, Failure) else otherwise
            raise
        finally:
            self._runner.provider_calls[provider, result] += 1

    async def swap_face(self) -> dict[str, Any]:
        names = (*self._request.images, *self._fetched)
        index, urls = self._request.face_index, self._request.image_urls
        name = names[index] if index < len(names) else await self._fetch(urls[index - len(names)])
        face = await self._stored(name)
        picture = self._result or await self._stored(self.generation.images["edited_image_url"])
        swapped = await self._counted("face_swapper", self._runner.face_swapper.swap(picture, face, self._report))
        return {"face_swap_url": await self._keep(swapped, self._unnamed)}

    async def _report(self, fraction: float, message: str, preview: Picture | None = None) -> None:
        """Repeat the stage with the percentage that this fraction of it comes to, if that is higher."""
        generation = self.generation
        low = self._stage.progress or 0
        high = ceiling(generation.kind, generation.status)
        within = min(max(0.0, fraction), 1.0)  # In this order: what is no number becomes 0.
        progress = min(high - 1, low + int(within * (high - low)))
        if progress > generation.progress:
            fields: dict[str, Any] = {"progress": progress, "message": message}
            if preview is not None:
                with contextlib.suppress(Failure):  # A preview is not worth a paid picture.
                    fields["preview_url"] = await self._keep(preview, self._unnamed)
            await self.move(generation.status, fields)

    async def _keep(self, picture: Picture, among: list[str]) -> str:
        generation = self.generation
        name = await self._runner.images.save(generation.generation_id, picture, user_id=generation.user_id)
        among.append(name)
        return name

    async def _stored(self, name: str) -> Picture:
        picture = await self._runner.images.store.load(name)
        if picture is None:
            raise Failure("storage_failed")
        return picture

    async def _fetch(self, url: str) -> str:
        return await self._keep(await self._runner.fetcher.fetch(url), self._fetched)
