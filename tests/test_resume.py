"""What one process has left unfinished, the next takes up again, or ends."""

from collections.abc import Collection
from datetime import timedelta

import pytest

from adapters.memory_queue import MemoryQueue
from builders import EDIT_WITH_SWAP, Scribe
from domain import runner
from domain.queries import generation_of
from doubles import (
    Hold,
    ScriptedEditor,
    Studio,
    swap_wish,
    wish,
)

PAID = ("openai_editing", "face_swap")


@pytest.mark.parametrize("status", EDIT_WITH_SWAP[:-1])
async def test_what_is_free_is_repeated_and_what_may_have_been_paid_for_is_not(status: str) -> None:
    studio = Studio()
    begun = await studio.start(swap_wish())
    history = await studio.memory.generation(begun.generation_id)
    assert history is not None
    left = generation_of(history)
    scribe = Scribe(studio.memory, studio.clock, studio.entropy)
    sheet = studio.images.kept | {}
    for each in EDIT_WITH_SWAP[1 : EDIT_WITH_SWAP.index(status) + 1]:
        facts = {}
        for stage, field in (
            ("composition_completed", "composition_url"),
            ("openai_editing_completed", "edited_image_url"),
            ("face_swap_completed", "face_swap_url"),
        ):
            if each == stage:
                name = await studio.images.save(begun.generation_id, next(iter(sheet.values())))
                facts[field] = f"http://test/images/{name}"
        left = await scribe.move(left, each, **facts)
    await studio.queue.withdraw(begun.generation_id)
    await studio.runner.resume()
    async with studio.open():
        await studio.settled()
    told = (await studio.events(begun))[-1]
    edits, swaps = len(studio.editor.calls), len(studio.face_swapper.calls)
    assert (edits, swaps) == {
        "started": (1, 1),
        "composition": (1, 1),
        "composition_completed": (1, 1),
        "openai_editing": (0, 0),
        "openai_editing_completed": (0, 1),
        "face_swap": (0, 0),
        "face_swap_completed": (0, 0),
    }[status]
    match status:
        case "openai_editing":
            assert (told["status"], told["code"], told["failedStage"]) == ("failed", "interrupted", status)
            assert told["credit"] == 10
        case "face_swap":  # The edit that was paid for is kept.
            assert told["status"] == "completed"
            error = told["faceSwapError"]
            assert isinstance(error, dict)
            assert error["code"] == "interrupted"
        case _:
            assert told["status"] == "completed"
            assert "faceSwapError" not in told
    assert told["sequence"] == len(await studio.events(begun))


async def test_the_deadline_counts_the_work_that_was_done_before_and_not_the_time_in_between() -> None:
    studio = Studio(deadline=600)
    ok, late = [await studio.start() for _ in range(2)]
    scribe = Scribe(studio.memory, studio.clock, studio.entropy)
    for begun, worked in ((ok, 540), (late, 600)):
        history = await studio.memory.generation(begun.generation_id)
        assert history is not None
        composing = await scribe.move(generation_of(history), "composition")
        studio.clock.step(worked)
        name = await studio.images.save(begun.generation_id, next(iter(studio.images.kept.values())))
        await scribe.move(composing, "composition_completed", composition_url=f"http://test/images/{name}")
        await studio.queue.withdraw(begun.generation_id)
    studio.clock.present += timedelta(hours=1)
    await studio.runner.resume()
    async with studio.open():
        await studio.settled()
    assert (await studio.events(ok))[-1]["status"] == "completed"
    assert (await studio.events(late))[-1]["code"] == "deadline_exceeded"


async def test_what_a_pipeline_of_the_users_own_works_on_is_left_to_it() -> None:
    studio = Studio()
    begun = await studio.start(wish()._replace(external=True))
    await studio.runner.resume()
    assert studio.queue.waiting == 0
    assert await studio.statuses(begun) == ["started"]


class Taken(MemoryQueue):
    """A line shared with another process, which takes everything over at some time."""

    taken = False

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        return generation_ids if self.taken else ()


async def test_what_somebody_else_has_taken_over_is_let_go_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_RENEW", 0.01)
    hold = Hold()
    studio = Studio(editor=ScriptedEditor(hold))
    studio.queue = studio.runner.queue = studio.workflow._queue = queue = Taken()
    async with studio.open():
        begun = await studio.start()
        await hold.reached.wait()
        queue.taken = True
        await studio.settled()
        assert hold.aborted.is_set()
    assert (await studio.statuses(begun))[-1] == "openai_editing"
