"""What one process has left unfinished, the next takes up again, or ends."""

from collections.abc import Collection
from datetime import timedelta
from typing import Any

import pytest

from adapters.memory.leases import MemoryLeases
from adapters.memory.quotas import MemoryQuotas
from domain import runner, supervisor
from domain.errors import LogUnavailable
from domain.generation import Generation
from domain.rehydrate import generation_of
from domain.stored_images import StoredImages
from support.builders import EDIT_WITH_SWAP, EventRecorder, bodies
from support.doubles import (
    BASE,
    FlakyLog,
    InMemoryBackend,
    Pause,
    ScriptedEditor,
    ScriptedFaceSwapper,
    png,
    reports,
    start_arguments,
    swap_arguments,
)

FREE_EDITING = {"status": "openai_editing", "free": True}


async def leave(backend: InMemoryBackend, *events: dict[str, Any]) -> Generation:
    """An edit with a face swap that another process has left after these events."""
    begun = await backend.start(swap_arguments())
    await backend.leases.withdraw(begun.generation_id)
    history = await backend.memory.generation(begun.generation_id)
    assert history is not None
    left = generation_of(history)
    recorder = EventRecorder(backend.memory, backend.clock, backend.entropy)
    for event in events:
        fields = dict(event)
        status = fields.pop("status")
        for stage, field in (
            ("composition_completed", "composition_url"),
            ("openai_editing_completed", "edited_image_url"),
            ("face_swap_completed", "face_swap_url"),
        ):
            if status == stage:
                fields[field] = BASE + await backend.images.save(begun.generation_id, png(status))
        left = await recorder.move(left, status, **fields)
    return left


async def go_on(backend: InMemoryBackend, left: Generation) -> list[dict[str, object]]:
    """Let the next process take up what is left, and return all events once it has ended."""
    await backend.runner.resume()
    async with backend.open():
        await backend.settled()
    events = bodies(await backend.memory.generation(left.generation_id))
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    progress = [event["progress"] for event in events]
    assert progress == sorted(progress)
    return events


def before(status: str) -> list[dict[str, Any]]:
    """The events from the first stage after ``started`` to this one."""
    return [{"status": each} for each in EDIT_WITH_SWAP[1 : EDIT_WITH_SWAP.index(status) + 1]]


@pytest.mark.parametrize("status", EDIT_WITH_SWAP[:-1])
async def test_a_stage_is_repeated_unless_it_may_have_been_paid_for(status: str) -> None:
    backend = InMemoryBackend()
    events = await go_on(backend, await leave(backend, *before(status)))
    sent = events[-1]
    edits, swaps = len(backend.editor.calls), len(backend.face_swapper.calls)
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
            assert (sent["status"], sent["code"], sent["failedStage"]) == ("failed", "interrupted", status)
            assert sent["credit"] == 10
        case "face_swap":  # The edit that was paid for is kept.
            assert sent["status"] == "completed"
            error = sent["faceSwapError"]
            assert isinstance(error, dict)
            assert error["code"] == "interrupted"
        case _:
            assert sent["status"] == "completed"
            assert "faceSwapError" not in sent


@pytest.mark.parametrize("status", ["openai_editing", "face_swap"])
@pytest.mark.parametrize("reached", [None, 0.5])
async def test_a_stage_that_was_entered_with_a_free_provider_is_repeated_without_being_entered_again(
    status: str, reached: float | None
) -> None:
    low, high = (60, 80) if status == "openai_editing" else (85, 95)
    acts = [reports(fraction, f"at {fraction}") for fraction in (0.2, 0.5, 0.8)]
    backend = InMemoryBackend(
        editor=ScriptedEditor(*acts, free=True), face_swapper=ScriptedFaceSwapper(*acts, free=True)
    )
    events = [*before(status)[:-1], {"status": status, "free": True}]
    if reached is not None:
        halfway = low + int(reached * (high - low))
        events.append({"status": status, "free": True, "progress": halfway, "message": "Halfway"})
    sent = await go_on(backend, await leave(backend, *events))
    assert sent[-1]["status"] == "completed"
    assert "faceSwapError" not in sent[-1]
    of_stage = [(event["progress"], event["message"]) for event in sent if event["status"] == status]
    expected = [0.2, 0.5, 0.8] if reached is None else [0.8]
    assert of_stage[len(events) - len(before(status)) + 1 :] == [
        (low + int(fraction * (high - low)), f"at {fraction}") for fraction in expected
    ]


async def test_a_free_stage_before_does_not_make_a_paid_one_free() -> None:
    backend = InMemoryBackend(editor=ScriptedEditor(free=True))
    edited = [*before("composition_completed"), FREE_EDITING, {"status": "openai_editing_completed"}]
    left = await leave(backend, *edited, {"status": "face_swap"})
    error = (await go_on(backend, left))[-1]["faceSwapError"]
    assert isinstance(error, dict)
    assert error["code"] == "interrupted"


async def test_free_work_repeated_by_a_paid_provider_is_called_once() -> None:
    """The service is killed, started with a paid editor, killed while that works, and started once more."""
    pause = Pause()
    backend = InMemoryBackend(editor=ScriptedEditor(pause, free=False))
    left = await leave(backend, *before("composition_completed"), FREE_EDITING)
    await backend.runner.resume()
    async with backend.open():
        await pause.reached.wait()
    assert len(backend.editor.calls) == 1
    assert len(bodies(await backend.memory.generation(left.generation_id))) == left.sequence, "an event says so"
    end = (await go_on(backend, left))[-1]
    assert (end["status"], end["code"], end["credit"]) == ("failed", "interrupted", 10)
    assert len(backend.editor.calls) == 1


async def test_the_log_records_a_paid_stage_before_the_provider_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RETRY_DELAY", 0.01)
    backend = InMemoryBackend(line=Unwilling)
    left = await leave(backend, *before("composition_completed"), FREE_EDITING)
    log = backend.log
    assert isinstance(log, Unwilling)
    log.editor = backend.editor
    assert (await go_on(backend, left))[-1]["status"] == "completed"
    assert log.refusals == 0


class Unwilling(FlakyLog):
    """A log that is not available for the first notes that a stage is paid."""

    editor: ScriptedEditor
    refusals = 3

    async def mark_paid(self, generation_id: str) -> None:
        assert self.editor.calls == []
        if self.refusals:
            self.refusals -= 1
            raise LogUnavailable
        await super().mark_paid(generation_id)


async def test_a_paid_stage_stays_paid_where_the_next_provider_is_free() -> None:
    backend = InMemoryBackend(editor=ScriptedEditor(free=True))
    end = (await go_on(backend, await leave(backend, *before("openai_editing"))))[-1]
    assert (end["status"], end["code"]) == ("failed", "interrupted")
    assert backend.editor.calls == []


async def test_the_deadline_counts_the_work_that_was_done_before_and_not_the_time_in_between() -> None:
    backend = InMemoryBackend(deadline=600)
    ok, late = [await backend.start() for _ in range(2)]
    recorder = EventRecorder(backend.memory, backend.clock, backend.entropy)
    for begun, worked in ((ok, 540), (late, 600)):
        history = await backend.memory.generation(begun.generation_id)
        assert history is not None
        composing = await recorder.move(generation_of(history), "composition")
        backend.clock.step(worked)
        name = await backend.images.save(begun.generation_id, next(iter(backend.images.kept.values())))
        await recorder.move(composing, "composition_completed", composition_url=f"http://test/images/{name}")
        await backend.leases.withdraw(begun.generation_id)
    backend.clock.present += timedelta(hours=1)
    await backend.runner.resume()
    async with backend.open():
        await backend.settled()
    assert (await backend.events(ok))[-1]["status"] == "completed"
    assert (await backend.events(late))[-1]["code"] == "deadline_exceeded"


async def test_external_generations_are_left_to_their_pipeline() -> None:
    backend = InMemoryBackend()
    begun = await backend.start(start_arguments(external=True))
    await backend.runner.resume()
    assert (await backend.leases.count()).waiting == 0
    assert await backend.statuses(begun) == ["started"]


class Taken(MemoryLeases):
    """A line shared with another process, which takes everything over at some time."""

    taken = False

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        return generation_ids if self.taken else ()


async def test_work_taken_over_by_another_process_is_dropped_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_RENEW", 0.01)
    pause = Pause()
    backend = InMemoryBackend(editor=ScriptedEditor(pause))
    backend.leases = backend.runner.leases = backend.workflow.leases = leases = Taken()
    async with backend.open():
        begun = await backend.start()
        await pause.reached.wait()
        leases.taken = True
        await backend.settled()
        assert pause.aborted.is_set()
    assert (await backend.statuses(begun))[-1] == "openai_editing"


async def test_the_pictures_of_a_resumed_generation_count_for_its_user() -> None:
    backend = InMemoryBackend()
    left = await leave(backend, *before("composition_completed"))
    backend.runner.images = stored = StoredImages(backend.images, MemoryQuotas())
    await go_on(backend, left)
    assert await stored.quotas.stored("ada") == sum(len(picture.data) for picture in backend.images.kept.values()) > 0
    await backend.images.save(left.generation_id, png("of an event that was lost"))  # Never counted.
    for name in list(backend.images.kept):
        await stored.discard(name)
        assert await stored.quotas.stored("ada") >= 0
    await stored.remove(left.generation_id)
    assert await stored.quotas.stored("ada") == 0
