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
from domain.generation import Snapshot
from domain.ports.images import Picture
from domain.ports.log import EventLog
from domain.ports.providers import Report
from domain.rehydrate import generation_of
from domain.stages import Kind
from support.builders import EDIT, EDIT_WITH_SWAP, GENERATE, PROPERTY, Heard, Scribe
from support.doubles import (
    Act,
    Bytes,
    Flaky,
    Hold,
    Passing,
    ScriptedComposer,
    ScriptedEditor,
    ScriptedFaceSwapper,
    Studio,
    failed_well,
    fails,
    pass_time,
    picture_of,
    png,
    reports,
    swap_wish,
    wanted,
    wish,
)

# --- the deadline ----------------------------------------------------------------------------------------


async def overdue(studio: Studio, hold: Hold) -> Snapshot:
    """Start one that asks for a face swap, let its time be over where it is held, and wait for its end."""
    begun = await studio.start(swap_wish())
    await hold.reached.wait()
    await pass_time(studio.deadline)
    await studio.settled()
    assert hold.aborted.is_set()
    return await studio.workflow.snapshot("ada", begun.generation_id)


@pytest.mark.parametrize(
    ("held", "stage"), [("fetcher", "composition"), ("composer", "composition"), ("editor", "openai_editing")]
)
async def test_whatever_takes_too_long_is_aborted_and_refunded(held: str, stage: str) -> None:
    hold = Hold()
    studio = Studio()
    getattr(studio, held).acts = [hold]
    async with studio.open():
        done = await overdue(studio, hold)
    await failed_well(studio, done, stage, "deadline_exceeded")


async def test_a_face_swap_that_takes_too_long_keeps_the_edit() -> None:
    hold = Hold()
    studio = Studio(face_swapper=ScriptedFaceSwapper(hold))
    async with studio.open():
        done = await overdue(studio, hold)
    assert done.face_swap_error is not None
    assert (done.status, done.face_swap_error.code) == ("completed", "deadline_exceeded")
    await studio.check()


async def test_waiting_in_line_does_not_count_against_the_deadline() -> None:
    hold = Hold()
    studio = Studio(max_running=1, editor=ScriptedEditor(hold))
    async with studio.open():
        first = await studio.start()
        second = await studio.start()
        await hold.reached.wait()
        hold.reached.clear()
        await pass_time(studio.deadline)
        await hold.reached.wait()
        assert (await studio.statuses(first))[-1] == "failed"
        hold.let_go.set()
        await studio.settled()
        assert tuple(await studio.statuses(second)) == EDIT


@pytest.mark.parametrize("event", [2, 3, 4, 5, 6])
async def test_a_deadline_that_falls_on_an_append_in_flight_ends_it_once(
    event: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The append is in the log, and its reply is on the way when the deadline comes."""
    monkeypatch.setattr(recorder, "_UNANSWERED", 90)
    studio = Studio(deadline=60, line=lambda log: Flaky(log, ["-"] * (event - 1) + ["slow"]))
    assert isinstance(studio.log, Flaky)
    async with studio.open():
        begun = await studio.start()
        await studio.log.stuck.wait()
        await pass_time(60)
        await pass_time(60)
        await studio.settled()
    told = await studio.events(begun)
    end = ["failed"] if event < len(EDIT) else []
    assert [each["status"] for each in told] == [*EDIT[:event], *end]
    await studio.check()
    for each in told:
        for key, url in each.items():
            if key.endswith("Url"):
                assert picture_of(studio, url)


# --- cancel ----------------------------------------------------------------------------------------------


def studio_held_in(stage: str, hold: Hold) -> Studio:
    studio = Studio()
    double: Any = {
        "composition": studio.composer,
        "openai_editing": studio.editor,
        "face_swap": studio.face_swapper,
    }[stage]
    double.acts = [hold]
    return studio


@pytest.mark.parametrize("stubborn", [False, True], ids=["aborted", "late result"])
@pytest.mark.parametrize("stage", ["composition", "openai_editing", "face_swap"])
async def test_a_cancel_aborts_the_work_and_a_late_result_is_dropped(stage: str, stubborn: bool) -> None:
    hold = Hold(stubborn=stubborn)
    studio = studio_held_in(stage, hold)
    async with studio.open():
        begun = await studio.start(swap_wish())
        await hold.reached.wait()
        assert await studio.cancel(begun) == "cancelled"
        assert await studio.cancel(begun) == "already_finished"
        await hold.aborted.wait()
        await studio.settled()
    told = (await studio.events(begun))[-1]
    assert (told["status"], told["code"], told["failedStage"]) == ("failed", "cancelled", stage)
    assert told["credit"] == 10
    assert await studio.cancel(begun) == "already_finished"
    await studio.check()


@pytest.mark.parametrize("face_swap", [False, True])
@pytest.mark.parametrize("boundary", range(1, 9))
@pytest.mark.parametrize("log", [None, Passing], ids=["at once", "over a line"])
async def test_a_cancel_at_any_event_leaves_one_end_and_one_refund(
    boundary: int, face_swap: bool, log: Callable[[EventLog], EventLog] | None
) -> None:
    path = EDIT_WITH_SWAP if face_swap else EDIT
    if boundary > len(path):
        return
    studio = Studio() if log is None else Studio(line=log)
    async with studio.open():
        begun = await studio.start(wanted("edit", face_swap))
        neighbour = await studio.start(wish("generate"), "bob")
        await studio.reached(begun.generation_id, path[boundary - 1])
        outcomes = await asyncio.gather(studio.cancel(begun), studio.cancel(begun))
        await studio.settled()
        final = (await studio.statuses(begun))[-1]
        assert sorted(outcomes) in (["already_finished", "cancelled"], ["already_finished"] * 2)
        assert ("cancelled" in outcomes) is (final == "failed")
        assert tuple(await studio.statuses(neighbour)) == GENERATE
    await studio.check("ada", "bob")


@pytest.mark.parametrize("turns", range(12))
async def test_cancel_and_completion_that_race_are_one_end(turns: int) -> None:
    hold = Hold()
    studio = Studio(editor=ScriptedEditor(hold), line=Passing)
    heard = Heard()
    async with studio.open(), studio.memory.follow(heard):
        begun = await studio.start()
        await hold.reached.wait()
        hold.let_go.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        outcome = await studio.cancel(begun)
        await studio.settled()
        final = (await studio.statuses(begun))[-1]
        assert (outcome, final) in (("cancelled", "failed"), ("already_finished", "completed"))
    ends = [entry for entry in heard.of(begun.generation_id) if entry.end == entry.position]
    assert len(ends) == 1
    assert heard.of(begun.generation_id)[-1] == ends[0]
    await studio.check()


async def test_a_cancel_frees_the_place_for_the_next() -> None:
    hold = Hold()
    studio = Studio(max_running=1, editor=ScriptedEditor(hold))
    async with studio.open():
        first = await studio.start()
        await hold.reached.wait()
        second = await studio.start()
        studio.editor.acts = []
        await studio.cancel(first)
        await studio.reached(second.generation_id, "completed")
        await studio.settled()
    await studio.check()


async def test_one_that_somebody_else_moved_on_is_left_to_them() -> None:
    """A holder that lost its lease is fenced by the expected sequence: one provider's picture too many is dropped."""
    hold = Hold()
    studio = Studio(editor=ScriptedEditor(hold))
    async with studio.open():
        begun = await studio.start()
        await hold.reached.wait()
        taken_over = await studio.memory.generation(begun.generation_id)
        assert taken_over is not None
        scribe = Scribe(studio.memory, studio.clock)
        await scribe.move(generation_of(taken_over), "openai_editing", progress=70)
        hold.let_go.set()
        await studio.settled()
    assert (await studio.statuses(begun))[-1] == "openai_editing"
    assert len(await studio.events(begun)) == 5
    assert b"edited" not in {picture.data for picture in studio.images.kept.values()}


async def test_a_fenced_holder_leaves_the_uploads_to_who_goes_on() -> None:
    hold = Hold()
    studio = Studio(composer=ScriptedComposer(hold))
    async with studio.open():
        begun = await studio.start()
        await hold.reached.wait()
        taken_over = await studio.memory.generation(begun.generation_id)
        assert taken_over is not None
        scribe = Scribe(studio.memory, studio.clock)
        await scribe.move(generation_of(taken_over), "composition_completed")
        hold.let_go.set()
        await studio.settled()
    assert {picture.data for picture in studio.images.kept.values()} >= {b"one", b"two"}


# --- limits ----------------------------------------------------------------------------------------------


class Busy(ScriptedEditor):
    """Works until it is let go, and counts how many do so at once."""

    def __init__(self) -> None:
        super().__init__(self.work)
        self.let_go = asyncio.Event()
        self.news = asyncio.Event()
        self.now = self.most = 0
        self.order: list[str] = []

    async def work(self, report: Report) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        self.news.set()
        await self.let_go.wait()
        self.now -= 1

    async def reached(self, count: int) -> None:
        while self.now < count:
            self.news.clear()
            await self.news.wait()

    async def edit(self, sheet: Picture, prompt: str, *rest: Any) -> Picture:
        self.order.append(prompt)
        return await super().edit(sheet, prompt, *rest)


@pytest.mark.parametrize("max_running", [1, 2, 5])
async def test_never_more_are_worked_on_at_once_than_allowed_and_as_many_as_that(max_running: int) -> None:
    busy = Busy()
    studio = Studio(max_running=max_running, editor=busy, credits=None)
    async with studio.open():
        for _ in range(12):
            await studio.start()
        await busy.reached(max_running)
        for _ in range(20):
            await asyncio.sleep(0)
        assert (studio.queue.held, studio.queue.waiting) == (max_running, 12 - max_running)
        busy.let_go.set()
        await studio.settled()
    assert busy.most == max_running
    assert len(busy.calls) == 12
    await studio.check()


async def test_one_users_many_do_not_delay_anothers_first() -> None:
    busy = Busy()
    busy.let_go.set()
    studio = Studio(max_running=1, editor=busy)
    for number in range(4):
        await studio.start(wish(prompt=f"ada {number}"))
    await studio.start(wish(prompt="bob 0"), "bob")
    async with studio.open():
        await studio.settled()
    assert busy.order == ["ada 0", "bob 0", "ada 1", "ada 2", "ada 3"]
    await studio.check("ada", "bob")


async def test_those_that_wait_stay_at_started_until_there_is_room() -> None:
    hold = Hold()
    studio = Studio(max_running=1, editor=ScriptedEditor(hold))
    async with studio.open():
        await studio.start()
        await hold.reached.wait()
        second = await studio.start()
        assert (studio.queue.held, studio.queue.waiting) == (1, 1)
        assert await studio.statuses(second) == ["started"]
        hold.let_go.set()
        await studio.settled()
    await studio.check()


# --- a log that does not answer ----------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["before", "after"])
@pytest.mark.parametrize("event", [2, 3, 4, 5, 6])
async def test_an_append_that_fails_for_a_while_is_tried_again_and_made_once(event: int, trouble: str) -> None:
    flaky: list[Flaky] = []

    def line(log: EventLog) -> EventLog:
        flaky.append(Flaky(log, ["-"] * (event - 1) + [trouble] * 2))
        return flaky[0]

    studio = Studio(line=line)
    async with studio.open():
        done = await studio.make()
    assert flaky[0].tries == 6 + 2
    assert tuple(await studio.statuses(done)) == EDIT
    assert len(studio.editor.calls) == 1
    await studio.check()


@pytest.mark.parametrize("trouble", ["before", "after"])
async def test_an_end_in_failed_that_is_lost_for_a_while_refunds_once(trouble: str) -> None:
    studio = Studio(
        line=lambda log: Flaky(log, ["-"] * 4 + [trouble] * 2), editor=ScriptedEditor(fails("provider_rejected"))
    )
    async with studio.open():
        done = await studio.make()
    await failed_well(studio, done, "openai_editing", "provider_rejected")


async def test_a_log_that_stays_away_is_given_up_and_the_others_go_on() -> None:
    studio = Studio(patience=0.1, line=lambda log: Flaky(log, ["-", "before", "before"]))
    async with studio.open():
        lost = await studio.start()
        await studio.settled()
        assert await studio.statuses(lost) == ["started"]
        assert len(studio.images.kept) == 2, "its uploads are still needed"
        done = await studio.make(user_id="bob")
        assert done.status == "completed"


async def test_a_read_that_fails_for_a_while_does_not_end_the_runner() -> None:
    flaky: list[Flaky] = []

    def line(log: EventLog) -> EventLog:
        flaky.append(Flaky(log))
        return flaky[0]

    studio = Studio(line=line)
    async with studio.open():
        await studio.make()
        flaky[0].reads = 2
        lost = await studio.start()
        await studio.settled()
        assert (await studio.statuses(lost))[-1] == "completed"
        await studio.check()


# --- leaving ---------------------------------------------------------------------------------------------


async def test_a_runner_that_is_stopped_leaves_every_generation_where_it_stands() -> None:
    hold = Hold()
    studio = Studio(max_running=1, editor=ScriptedEditor(hold))
    async with studio.open():
        working, waiting = await studio.start(), await studio.start()
        await hold.reached.wait()
    assert hold.aborted.is_set()
    assert (await studio.statuses(working))[-1] == "openai_editing"
    assert await studio.statuses(waiting) == ["started"]
    sheet, *uploads = sorted(studio.images.kept.values(), key=lambda picture: -len(picture.data))
    assert (sheet.data, len(uploads)) == (b"one+two", 4)
    assert studio.queue.held == 0


async def test_interrupt_ends_everything_that_is_unfinished_refunded() -> None:
    hold = Hold()
    studio = Studio(max_running=1, editor=ScriptedEditor(hold))
    async with studio.open():
        done = await studio.start(wish("generate"))
        await hold.reached.wait()
        hold.let_go.set()
        await studio.settled()
        hold.let_go.clear()
        hold.reached.clear()
        working, waiting = await studio.start(), await studio.start(user_id="bob")
        await hold.reached.wait()
    await studio.runner.interrupt()
    for left, stage in ((working, "openai_editing"), (waiting, "started")):
        told = (await studio.events(left))[-1]
        assert (told["status"], told["code"], told["failedStage"]) == ("failed", "interrupted", stage)
    assert (await studio.statuses(done))[-1] == "completed"
    assert await studio.memory.unfinished() == []
    assert [await studio.workflow.credit(user_id) for user_id in ("ada", "bob")] == [9, 10]


async def test_interrupt_while_the_runner_still_works_ends_each_once() -> None:
    hold = Hold()
    studio = Studio(editor=ScriptedEditor(hold), line=Passing)
    async with studio.open():
        begun = await studio.start()
        await hold.reached.wait()
        await studio.runner.interrupt()
        await studio.settled()
        assert hold.aborted.is_set()
    assert (await studio.events(begun))[-1]["code"] == "interrupted"
    await studio.check()


async def test_interrupt_ends_also_what_moves_on_at_that_moment() -> None:
    studio = Studio(line=Passing)
    begun = await studio.start()
    scribe = Scribe(studio.memory, studio.clock)
    [history] = await studio.memory.unfinished()
    assert isinstance(studio.log, Passing)
    studio.log.overtake = lambda: scribe.move(generation_of(history), "composition")
    await studio.runner.interrupt()
    assert await studio.statuses(begun) == ["started", "composition", "failed"]


# --- what a provider may report ----------------------------------------------------------------------------


async def run_reporting(kind: Kind, face_swap: bool, fractions: list[float]) -> tuple[Studio, list[dict[str, object]]]:
    acts: list[Act] = [
        reports(fraction, f"At {index}.", png(f"preview {index}") if index % 2 else None)
        for index, fraction in enumerate(fractions)
    ]
    studio = Studio(editor=ScriptedEditor(*acts), face_swapper=ScriptedFaceSwapper(*acts))
    async with studio.open():
        done = await studio.make(wanted(kind, face_swap))
    await studio.check()
    return studio, await studio.events(done)


VARIANTS: list[tuple[Kind, bool]] = [("edit", False), ("edit", True), ("generate", False)]

LIMITS = {"openai_editing": (60, 80), "face_swap": (85, 95), "ai_generation": (60, 100)}


def rose_within_its_stage(told: list[dict[str, object]]) -> None:
    assert told[-1]["status"] == "completed", told[-1]
    for before, after in pairwise(told):
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
    _, told = asyncio.run(run_reporting(*variant, fractions))
    rose_within_its_stage(told)


@pytest.mark.parametrize("fraction", [math.nan, math.inf, -math.inf, 1.7e308])
@pytest.mark.parametrize(("kind", "face_swap"), VARIANTS)
async def test_a_fraction_that_is_no_number_does_not_fail_the_stage(
    kind: Kind, face_swap: bool, fraction: float
) -> None:
    _, told = await run_reporting(kind, face_swap, [0.2, fraction, 0.4])
    rose_within_its_stage(told)
    assert not [event for event in told if "faceSwapError" in event]


async def test_many_generations_leave_nothing_behind_in_the_runner() -> None:
    studio = Studio(credits=None, max_per_user=1_000, max_running=4)
    async with studio.open():
        for _ in range(50):
            await studio.start(wish(uploads=[Bytes(b"one")]))
        await studio.settled()
        assert studio.runner._jobs == {}
    await studio.check()
