"""The runner under deadlines, cancellation, many users, a failing log and shutdown."""

import asyncio
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain import recorder
from domain.errors import LogUnavailable
from domain.generation import Snapshot
from domain.ports.images import Picture
from domain.ports.providers import Report
from domain.rehydrate import generation_of
from domain.stages import Kind
from support.builders import EDIT, EDIT_WITH_SWAP, GENERATE, PROPERTY, EventRecorder, RecordingFollower, WholeLog
from support.doubles import (
    Act,
    FlakyLog,
    ForwardingLog,
    InMemoryBackend,
    InMemoryUpload,
    Pause,
    ScriptedComposer,
    ScriptedEditor,
    ScriptedFaceSwapper,
    advance_time,
    assert_failed_and_refunded,
    fails,
    picture_of,
    png,
    reports,
    start_arguments,
    swap_arguments,
    wanted,
)

# --- the deadline ----------------------------------------------------------------------------------------


async def overdue(backend: InMemoryBackend, pause: Pause) -> Snapshot:
    """Start one that asks for a face swap, let its time be over where it is held, and wait for its end."""
    begun = await backend.start(swap_arguments())
    await pause.reached.wait()
    await advance_time(backend.deadline)
    await backend.settled()
    assert pause.aborted.is_set()
    return await backend.workflow.snapshot("ada", begun.generation_id)


@pytest.mark.parametrize(
    ("held", "stage"), [("fetcher", "composition"), ("composer", "composition"), ("editor", "openai_editing")]
)
async def test_work_past_the_deadline_is_aborted_and_refunded(held: str, stage: str) -> None:
    pause = Pause()
    backend = InMemoryBackend()
    getattr(backend, held).acts = [pause]
    async with backend.open():
        done = await overdue(backend, pause)
    await assert_failed_and_refunded(backend, done, stage, "deadline_exceeded")


async def test_a_face_swap_that_takes_too_long_keeps_the_edit() -> None:
    pause = Pause()
    backend = InMemoryBackend(face_swapper=ScriptedFaceSwapper(pause))
    async with backend.open():
        done = await overdue(backend, pause)
    assert done.face_swap_error is not None
    assert (done.status, done.face_swap_error.code) == ("completed", "deadline_exceeded")
    await backend.check()


async def test_waiting_in_the_queue_does_not_count_against_the_deadline() -> None:
    pause = Pause()
    backend = InMemoryBackend(max_running=1, editor=ScriptedEditor(pause))
    async with backend.open():
        first = await backend.start()
        second = await backend.start()
        await pause.reached.wait()
        pause.reached.clear()
        await advance_time(backend.deadline)
        await pause.reached.wait()
        assert (await backend.statuses(first))[-1] == "failed"
        pause.released.set()
        await backend.settled()
        assert tuple(await backend.statuses(second)) == EDIT


@pytest.mark.parametrize("event", [2, 3, 4, 5, 6])
async def test_a_deadline_that_falls_on_an_append_in_flight_ends_it_once(
    event: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The append is in the log, and its reply is on the way when the deadline comes."""
    monkeypatch.setattr(recorder, "_TIMEOUT", 90)
    backend = InMemoryBackend(deadline=60, line=lambda log: FlakyLog(log, ["-"] * (event - 1) + ["slow"]))
    assert isinstance(backend.log, FlakyLog)
    async with backend.open():
        begun = await backend.start()
        await backend.log.stuck.wait()
        await advance_time(60)
        await advance_time(60)
        await backend.settled()
    sent = await backend.events(begun)
    end = ["failed"] if event < len(EDIT) else []
    assert [each["status"] for each in sent] == [*EDIT[:event], *end]
    await backend.check()
    for each in sent:
        for key, url in each.items():
            if key.endswith("Url"):
                assert picture_of(backend, url)


# --- cancel ----------------------------------------------------------------------------------------------


def backend_held_in(stage: str, pause: Pause) -> InMemoryBackend:
    backend = InMemoryBackend()
    double: Any = {
        "composition": backend.composer,
        "openai_editing": backend.editor,
        "face_swap": backend.face_swapper,
    }[stage]
    double.acts = [pause]
    return backend


@pytest.mark.parametrize("stubborn", [False, True], ids=["aborted", "late result"])
@pytest.mark.parametrize("stage", ["composition", "openai_editing", "face_swap"])
async def test_a_cancel_aborts_the_work_and_a_late_result_is_dropped(stage: str, stubborn: bool) -> None:
    pause = Pause(stubborn=stubborn)
    backend = backend_held_in(stage, pause)
    async with backend.open():
        begun = await backend.start(swap_arguments())
        await pause.reached.wait()
        assert await backend.cancel(begun) == "cancelled"
        assert await backend.cancel(begun) == "already_finished"
        await pause.aborted.wait()
        await backend.settled()
    sent = (await backend.events(begun))[-1]
    assert (sent["status"], sent["code"], sent["failedStage"]) == ("failed", "cancelled", stage)
    assert sent["credit"] == 10
    assert await backend.cancel(begun) == "already_finished"
    await backend.check()


@pytest.mark.parametrize("face_swap", [False, True])
@pytest.mark.parametrize("boundary", range(1, 9))
@pytest.mark.parametrize("log", [None, ForwardingLog], ids=["at once", "over a line"])
async def test_a_cancel_at_any_event_leaves_one_end_and_one_refund(
    boundary: int, face_swap: bool, log: Callable[[WholeLog], WholeLog] | None
) -> None:
    path = EDIT_WITH_SWAP if face_swap else EDIT
    if boundary > len(path):
        return
    backend = InMemoryBackend() if log is None else InMemoryBackend(line=log)
    async with backend.open():
        begun = await backend.start(wanted("edit", face_swap))
        neighbour = await backend.start(start_arguments("generate"), "bob")
        await backend.reached(begun.generation_id, path[boundary - 1])
        outcomes = await asyncio.gather(backend.cancel(begun), backend.cancel(begun))
        await backend.settled()
        final = (await backend.statuses(begun))[-1]
        assert sorted(outcomes) in (["already_finished", "cancelled"], ["already_finished"] * 2)
        assert ("cancelled" in outcomes) is (final == "failed")
        assert tuple(await backend.statuses(neighbour)) == GENERATE
    await backend.check("ada", "bob")


@pytest.mark.parametrize("turns", range(12))
async def test_a_racing_cancel_and_completion_are_one_end(turns: int) -> None:
    pause = Pause()
    backend = InMemoryBackend(editor=ScriptedEditor(pause), line=ForwardingLog)
    follower = RecordingFollower()
    async with backend.open(), backend.memory.follow(follower):
        begun = await backend.start()
        await pause.reached.wait()
        pause.released.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        outcome = await backend.cancel(begun)
        await backend.settled()
        final = (await backend.statuses(begun))[-1]
        assert (outcome, final) in (("cancelled", "failed"), ("already_finished", "completed"))
    ends = [entry for entry in follower.of(begun.generation_id) if entry.end == entry.position]
    assert len(ends) == 1
    assert follower.of(begun.generation_id)[-1] == ends[0]
    await backend.check()


async def test_a_cancel_frees_the_place_for_the_next() -> None:
    pause = Pause()
    backend = InMemoryBackend(max_running=1, editor=ScriptedEditor(pause))
    async with backend.open():
        first = await backend.start()
        await pause.reached.wait()
        second = await backend.start()
        backend.editor.acts = []
        await backend.cancel(first)
        await backend.reached(second.generation_id, "completed")
        await backend.settled()
    await backend.check()


async def test_a_generation_moved_on_by_another_writer_is_left_to_it() -> None:
    """A holder that lost its lease is fenced by the expected sequence: one provider's picture too many is dropped."""
    pause = Pause()
    backend = InMemoryBackend(editor=ScriptedEditor(pause))
    async with backend.open():
        begun = await backend.start()
        await pause.reached.wait()
        taken_over = await backend.memory.generation(begun.generation_id)
        assert taken_over is not None
        recorder = EventRecorder(backend.memory, backend.clock)
        await recorder.move(generation_of(taken_over), "openai_editing", progress=70)
        pause.released.set()
        await backend.settled()
    assert (await backend.statuses(begun))[-1] == "openai_editing"
    assert len(await backend.events(begun)) == 5
    assert b"edited" not in {picture.data for picture in backend.images.kept.values()}


async def test_a_fenced_worker_leaves_the_uploads_to_its_successor() -> None:
    pause = Pause()
    backend = InMemoryBackend(composer=ScriptedComposer(pause))
    async with backend.open():
        begun = await backend.start()
        await pause.reached.wait()
        taken_over = await backend.memory.generation(begun.generation_id)
        assert taken_over is not None
        recorder = EventRecorder(backend.memory, backend.clock)
        await recorder.move(generation_of(taken_over), "composition_completed")
        pause.released.set()
        await backend.settled()
    assert {picture.data for picture in backend.images.kept.values()} >= {b"one", b"two"}


# --- limits ----------------------------------------------------------------------------------------------


class Busy(ScriptedEditor):
    """Works until it is let go, and counts how many do so at once."""

    def __init__(self) -> None:
        super().__init__(self.work)
        self.released = asyncio.Event()
        self.news = asyncio.Event()
        self.now = self.most = 0
        self.order: list[str] = []

    async def work(self, report: Report) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        self.news.set()
        await self.released.wait()
        self.now -= 1

    async def reached(self, count: int) -> None:
        while self.now < count:
            self.news.clear()
            await self.news.wait()

    async def edit(self, sheet: Picture, prompt: str, *rest: Any) -> Picture:
        self.order.append(prompt)
        return await super().edit(sheet, prompt, *rest)


@pytest.mark.parametrize("max_running", [1, 2, 5])
async def test_exactly_max_running_generations_run_at_once(max_running: int) -> None:
    busy = Busy()
    backend = InMemoryBackend(max_running=max_running, editor=busy, credits=None)
    async with backend.open():
        for _ in range(12):
            await backend.start()
        await busy.reached(max_running)
        for _ in range(20):
            await asyncio.sleep(0)
        assert await backend.leases.count() == (12 - max_running, max_running)
        busy.released.set()
        await backend.settled()
    assert busy.most == max_running
    assert len(busy.calls) == 12
    await backend.check()


async def test_many_generations_of_one_user_do_not_delay_the_first_of_another() -> None:
    busy = Busy()
    busy.released.set()
    backend = InMemoryBackend(max_running=1, editor=busy)
    for number in range(4):
        await backend.start(start_arguments(prompt=f"ada {number}"))
    await backend.start(start_arguments(prompt="bob 0"), "bob")
    async with backend.open():
        await backend.settled()
    assert busy.order == ["ada 0", "bob 0", "ada 1", "ada 2", "ada 3"]
    await backend.check("ada", "bob")


async def test_waiting_generations_stay_at_started_until_a_worker_is_free() -> None:
    pause = Pause()
    backend = InMemoryBackend(max_running=1, editor=ScriptedEditor(pause))
    async with backend.open():
        await backend.start()
        await pause.reached.wait()
        second = await backend.start()
        assert await backend.leases.count() == (1, 1)
        assert await backend.statuses(second) == ["started"]
        pause.released.set()
        await backend.settled()
    await backend.check()


# --- a log that does not answer ----------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["before", "after"])
@pytest.mark.parametrize("event", [2, 3, 4, 5, 6])
async def test_a_failing_append_is_retried_and_made_once(event: int, trouble: str) -> None:
    flaky: list[FlakyLog] = []

    def line(log: WholeLog) -> WholeLog:
        flaky.append(FlakyLog(log, ["-"] * (event - 1) + [trouble] * 2))
        return flaky[0]

    backend = InMemoryBackend(line=line)
    async with backend.open():
        done = await backend.make()
    assert flaky[0].tries == 6 + 2
    assert tuple(await backend.statuses(done)) == EDIT
    assert len(backend.editor.calls) == 1
    await backend.check()


@pytest.mark.parametrize("trouble", ["before", "after"])
async def test_a_failure_whose_reply_was_lost_refunds_once(trouble: str) -> None:
    backend = InMemoryBackend(
        line=lambda log: FlakyLog(log, ["-"] * 4 + [trouble] * 2), editor=ScriptedEditor(fails("provider_rejected"))
    )
    async with backend.open():
        done = await backend.make()
    await assert_failed_and_refunded(backend, done, "openai_editing", "provider_rejected")


async def test_a_repeated_cancel_removes_the_uploads_that_a_lost_reply_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("domain.recorder.ATTENTION", 0.0)
    backend = InMemoryBackend(line=lambda log: FlakyLog(log, ["-", "after"]))
    begun = await backend.start()
    with pytest.raises(LogUnavailable):
        await backend.cancel(begun)
    assert len(backend.images.kept) == 2
    assert await backend.cancel(begun) == "already_finished"
    assert backend.images.kept == {}
    async with backend.open():
        await backend.settled()  # A worker finds that it has ended.
    await backend.check()


async def test_a_generation_whose_log_stays_unavailable_is_given_up_and_others_continue() -> None:
    backend = InMemoryBackend(patience=0.1, line=lambda log: FlakyLog(log, ["-", "before", "before"]))
    async with backend.open():
        lost = await backend.start()
        await backend.settled()
        assert await backend.statuses(lost) == ["started"]
        assert len(backend.images.kept) == 2, "its uploads are still needed"
        done = await backend.make(user_id="bob")
        assert done.status == "completed"


async def test_a_read_that_fails_for_a_while_does_not_end_the_runner() -> None:
    flaky: list[FlakyLog] = []

    def line(log: WholeLog) -> WholeLog:
        flaky.append(FlakyLog(log))
        return flaky[0]

    backend = InMemoryBackend(line=line)
    async with backend.open():
        await backend.make()
        flaky[0].reads = 2
        lost = await backend.start()
        await backend.settled()
        assert (await backend.statuses(lost))[-1] == "completed"
        await backend.check()


# --- leaving ---------------------------------------------------------------------------------------------


async def test_a_stopped_runner_leaves_every_generation_at_its_stage() -> None:
    pause = Pause()
    backend = InMemoryBackend(max_running=1, editor=ScriptedEditor(pause))
    async with backend.open():
        working, waiting = await backend.start(), await backend.start()
        await pause.reached.wait()
    assert pause.aborted.is_set()
    assert (await backend.statuses(working))[-1] == "openai_editing"
    assert await backend.statuses(waiting) == ["started"]
    sheet, *uploads = sorted(backend.images.kept.values(), key=lambda picture: -len(picture.data))
    assert (sheet.data, len(uploads)) == (b"one+two", 4)
    assert (await backend.leases.count()).held == 0


async def test_interrupt_ends_everything_that_is_unfinished_refunded() -> None:
    pause = Pause()
    backend = InMemoryBackend(max_running=1, editor=ScriptedEditor(pause))
    async with backend.open():
        done = await backend.start(start_arguments("generate"))
        await pause.reached.wait()
        pause.released.set()
        await backend.settled()
        pause.released.clear()
        pause.reached.clear()
        working, waiting = await backend.start(), await backend.start(user_id="bob")
        await pause.reached.wait()
    await backend.runner.interrupt()
    for left, stage in ((working, "openai_editing"), (waiting, "started")):
        sent = (await backend.events(left))[-1]
        assert (sent["status"], sent["code"], sent["failedStage"]) == ("failed", "interrupted", stage)
    assert (await backend.statuses(done))[-1] == "completed"
    assert await backend.memory.unfinished() == []
    assert [await backend.workflow.credit(user_id) for user_id in ("ada", "bob")] == [9, 10]


async def test_interrupt_while_the_runner_still_works_ends_each_once() -> None:
    pause = Pause()
    backend = InMemoryBackend(editor=ScriptedEditor(pause), line=ForwardingLog)
    async with backend.open():
        begun = await backend.start()
        await pause.reached.wait()
        await backend.runner.interrupt()
        await backend.settled()
        assert pause.aborted.is_set()
    assert (await backend.events(begun))[-1]["code"] == "interrupted"
    await backend.check()


async def test_interrupt_ends_generations_that_move_at_that_moment() -> None:
    backend = InMemoryBackend(line=ForwardingLog)
    begun = await backend.start()
    recorder = EventRecorder(backend.memory, backend.clock)
    [history] = await backend.memory.unfinished()
    assert isinstance(backend.log, ForwardingLog)
    backend.log.overtake = lambda: recorder.move(generation_of(history), "composition")
    await backend.runner.interrupt()
    assert await backend.statuses(begun) == ["started", "composition", "failed"]


# --- what a provider may report ----------------------------------------------------------------------------


async def run_reporting(
    kind: Kind, face_swap: bool, fractions: list[float]
) -> tuple[InMemoryBackend, list[dict[str, object]]]:
    acts: list[Act] = [
        reports(fraction, f"At {index}.", png(f"preview {index}") if index % 2 else None)
        for index, fraction in enumerate(fractions)
    ]
    backend = InMemoryBackend(editor=ScriptedEditor(*acts), face_swapper=ScriptedFaceSwapper(*acts))
    async with backend.open():
        done = await backend.make(wanted(kind, face_swap))
    await backend.check()
    return backend, await backend.events(done)


VARIANTS: list[tuple[Kind, bool]] = [("edit", False), ("edit", True), ("generate", False)]

LIMITS = {"openai_editing": (60, 80), "face_swap": (85, 95), "ai_generation": (60, 100)}


def rose_within_its_stage(sent: list[dict[str, object]]) -> None:
    assert sent[-1]["status"] == "completed", sent[-1]
    for before, after in pairwise(sent):
        assert isinstance(before["progress"], int)
        assert isinstance(after["progress"], int)
        assert after["progress"] > before["progress"]
        if str(after["status"]) in LIMITS:
            low, high = LIMITS[str(after["status"])]
            assert low <= after["progress"] < high


@PROPERTY
@given(
    variant=st.sampled_from(VARIANTS),
    fractions=st.lists(st.one_of(st.floats(-2, 3), st.floats(0, 1), st.floats(-1e300, 1e300)), min_size=1, max_size=8),
)
def test_whatever_fraction_is_reported_progress_rises_within_the_stage(
    variant: tuple[Kind, bool], fractions: list[float]
) -> None:
    _, sent = asyncio.run(run_reporting(*variant, fractions))
    rose_within_its_stage(sent)


@pytest.mark.parametrize("fraction", [math.nan, math.inf, -math.inf, 1.7e308])
@pytest.mark.parametrize(("kind", "face_swap"), VARIANTS)
async def test_a_fraction_that_is_no_number_does_not_fail_the_stage(
    kind: Kind, face_swap: bool, fraction: float
) -> None:
    _, sent = await run_reporting(kind, face_swap, [0.2, fraction, 0.4])
    rose_within_its_stage(sent)
    assert not [event for event in sent if "faceSwapError" in event]


async def test_many_generations_leave_nothing_behind_in_the_runner() -> None:
    backend = InMemoryBackend(credits=None, max_per_user=1_000, max_running=4)
    async with backend.open():
        for _ in range(50):
            await backend.start(start_arguments(uploads=[InMemoryUpload(b"one")]))
        await backend.settled()
        assert backend.runner._jobs == {}
    await backend.check()
