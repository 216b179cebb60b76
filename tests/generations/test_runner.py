"""The runner takes generations from started to their end, whatever happens on the way."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import pytest

from domain.errors import FAILURE_CODES, Failure, FailureCode
from domain.events import decode
from domain.rehydrate import generation_of
from domain.stages import Kind
from support.builders import EDIT, EDIT_WITH_SWAP, GENERATE
from support.doubles import (
    BASE,
    FACE_URL,
    InMemoryBackend,
    Pause,
    ScriptedComposer,
    ScriptedEditor,
    ScriptedFetcher,
    assert_failed_and_refunded,
    fails,
    picture_of,
    png,
    raises,
    reports,
    start_arguments,
    swap_arguments,
    wanted,
)

# --- when nothing fails ----------------------------------------------------------------------------------


async def test_an_edit_passes_its_stages_and_each_event_has_the_known_results() -> None:
    backend = InMemoryBackend()
    async with backend.open():
        done = await backend.make(start_arguments(shop="izmir"))
    sent = await backend.events(done)
    assert tuple(event["status"] for event in sent) == EDIT
    assert [event["sequence"] for event in sent] == [1, 2, 3, 4, 5, 6]
    assert all(event["metadata"] == {"shop": "izmir"} for event in sent)
    assert ["compositionUrl" in event for event in sent] == [False, False, True, True, True, True]
    assert ["editedImageUrl" in event for event in sent] == [False, False, False, False, True, True]
    assert picture_of(backend, sent[-1]["compositionUrl"]) == b"one+two"
    assert picture_of(backend, sent[-1]["editedImageUrl"]) == b"edited"
    assert (sent[-1]["progress"], sent[-1]["credit"]) == (100, 9)
    assert not [key for event in sent for key in event if key.startswith("faceSwap")]
    await backend.check()


async def test_the_log_has_the_names_of_the_pictures_beside_each_event_that_shows_them() -> None:
    async with InMemoryBackend().open() as backend:
        done = await backend.make(swap_arguments())
    history = await backend.memory.generation(done.generation_id)
    assert history is not None
    for entry in history.events:
        shown = {field: url for field, url in decode(entry.event or b"") if isinstance(url, str) and BASE in url}
        assert shown == {field: BASE + name for field, name in entry.images.items()}
    assert [len(entry.images) for entry in history.events] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert generation_of(history).images == history.events[-1].images
    await backend.check()


async def test_a_generation_from_scratch_ends_with_its_picture() -> None:
    backend = InMemoryBackend()
    async with backend.open():
        done = await backend.make(start_arguments("generate"))
    sent = await backend.events(done)
    assert tuple(event["status"] for event in sent) == GENERATE
    assert picture_of(backend, sent[-1]["generatedImageUrl"]) == b"edited"
    assert done.generated_image_url == sent[-1]["generatedImageUrl"]
    assert "editedImageUrl" not in sent[-1]
    await backend.check()


async def test_a_face_swap_puts_the_first_url_into_the_edited_picture() -> None:
    backend = InMemoryBackend()
    other = "http://pictures.test/2.png"
    async with backend.open():
        done = await backend.make(start_arguments(image_urls=(FACE_URL, other), face_swap=True))
    sent = await backend.events(done)
    assert tuple(event["status"] for event in sent) == EDIT_WITH_SWAP
    assert picture_of(backend, sent[-1]["faceSwapUrl"]) == b"swapped"
    assert sent[0]["inputImage"] == FACE_URL
    assert backend.fetcher.calls == [FACE_URL, other]
    assert backend.face_swapper.calls == [(png("edited"), png(f"<{FACE_URL}>"))]
    await backend.check()


async def test_the_sheet_shows_files_then_urls_in_the_order_given() -> None:
    backend = InMemoryBackend()
    async with backend.open():
        await backend.make(start_arguments(image_urls=("http://b.test", "http://a.test")))
    [pictures] = backend.composer.calls
    assert [picture.data for picture in pictures] == [b"one", b"two", b"<http://b.test>", b"<http://a.test>"]


async def test_the_provider_gets_the_sheet_the_prompt_and_the_options_once() -> None:
    backend = InMemoryBackend()
    async with backend.open():
        await backend.make(start_arguments(prompt="a green hat"))
    [(kind, sheet, prompt, options)] = backend.editor.calls
    assert (kind, sheet.data, prompt) == ("edit", b"one+two", "a green hat")
    assert options.aspect_ratio == "2:3"


@pytest.mark.parametrize(("kind", "face_swap"), [("edit", False), ("edit", True), ("generate", False)])
async def test_uploads_and_named_pictures_are_kept_and_fetched_ones_removed(kind: Kind, face_swap: bool) -> None:
    backend = InMemoryBackend()
    async with backend.open():
        done = await backend.make(wanted(kind, face_swap))
    last = (await backend.events(done))[-1]
    named = {str(url).removeprefix(BASE) for key, url in last.items() if key.endswith("Url")}
    assert len(named) == (3 if face_swap else 2)
    assert done.input is not None
    uploads = {url.removeprefix(BASE) for url in done.input.images}
    assert len(uploads) == (1 if face_swap else 2)
    assert set(backend.images.kept) == named | uploads


async def test_a_provider_report_repeats_its_stage_with_rising_progress() -> None:
    editor = ScriptedEditor(
        reports(0.25, "A quarter..."), reports(0.1, "Lower?"), reports(0.5, "Half...", png("preview")), reports(0.5)
    )
    backend = InMemoryBackend(editor=editor)
    async with backend.open():
        done = await backend.make()
    repeats = [event for event in await backend.events(done) if event["status"] == "openai_editing"]
    assert [(event["progress"], event["message"]) for event in repeats] == [
        (60, "OpenAI image editing started..."),
        (65, "A quarter..."),
        (70, "Half..."),
    ]
    assert picture_of(backend, repeats[-1]["previewUrl"]) == b"preview"
    await backend.check()


async def test_a_generation_left_by_another_process_continues_at_its_stage() -> None:
    """As after a restart with a durable log: the sheet is loaded again by the URL in the log."""
    pause = Pause()
    backend = InMemoryBackend(composer=ScriptedComposer(pause))
    async with backend.open():
        begun = await backend.start()
        await pause.reached.wait()
    assert await backend.statuses(begun) == ["started", "composition"]
    backend.composer.acts = []
    await backend.leases.offer("ada", begun.generation_id)
    async with backend.open():
        await backend.settled()
    assert tuple(await backend.statuses(begun)) == EDIT
    await backend.check()


# --- every step failing at every point -------------------------------------------------------------------


class Point(NamedTuple):
    """Somewhere that something can go wrong."""

    name: str
    stage: str
    break_it: Callable[[InMemoryBackend, BaseException], None]


def at_fetch(backend: InMemoryBackend, error: BaseException) -> None:
    backend.runner.fetcher = ScriptedFetcher(raises(error))


def at_compose(backend: InMemoryBackend, error: BaseException) -> None:
    backend.composer.acts = [raises(error)]


def at_edit(backend: InMemoryBackend, error: BaseException) -> None:
    backend.editor.acts = [reports(0.3, preview=png("preview")), raises(error)]


def at_swap(backend: InMemoryBackend, error: BaseException) -> None:
    backend.face_swapper.acts = [reports(0.3, preview=png("preview")), raises(error)]


POINTS = [Point("fetch", "composition", at_fetch), Point("compose", "composition", at_compose)]
EDITOR = {
    ("edit", False): "openai_editing",
    ("edit", True): "openai_editing",
    ("generate", False): "ai_generation",
}  # fmt: skip


@pytest.mark.parametrize("code", FAILURE_CODES)
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
async def test_a_composition_that_fails_ends_in_failed_refunded(point: Point, code: FailureCode) -> None:
    backend = InMemoryBackend()
    point.break_it(backend, Failure(code))
    async with backend.open():
        done = await backend.make(swap_arguments())
    await assert_failed_and_refunded(backend, done, point.stage, code)
    assert backend.editor.calls == []


@pytest.mark.parametrize("code", FAILURE_CODES)
@pytest.mark.parametrize(("kind", "face_swap"), list(EDITOR))
async def test_a_provider_that_fails_is_called_once_and_ends_it_in_failed_refunded(
    kind: Kind, face_swap: bool, code: FailureCode
) -> None:
    backend = InMemoryBackend()
    at_edit(backend, Failure(code))
    async with backend.open():
        done = await backend.make(wanted(kind, face_swap))
    await assert_failed_and_refunded(backend, done, EDITOR[kind, face_swap], code)
    assert done.progress > 60
    assert len(backend.editor.calls) == 1
    assert backend.face_swapper.calls == []


@pytest.mark.parametrize("error", [RuntimeError("/etc/secret sk-123"), TimeoutError(), OSError(28, "No space")])
@pytest.mark.parametrize("break_it", [at_fetch, at_compose, at_edit])
async def test_an_unexpected_exception_ends_in_internal_without_its_message(
    break_it: Callable[[InMemoryBackend, BaseException], None], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    backend = InMemoryBackend()
    break_it(backend, error)
    async with backend.open():
        done = await backend.make(swap_arguments())
    await assert_failed_and_refunded(
        backend, done, "openai_editing" if break_it is at_edit else "composition", "internal"
    )
    assert "secret" not in str(await backend.events(done))
    assert done.generation_id in caplog.text
    assert type(error).__name__ in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("break_it", [at_fetch, at_compose, at_edit, at_swap])
async def test_a_provider_that_was_cancelled_inside_ends_its_stage(
    break_it: Callable[[InMemoryBackend, BaseException], None],
) -> None:
    backend = InMemoryBackend()
    break_it(backend, asyncio.CancelledError())
    async with backend.open():
        done = await backend.make(swap_arguments())
    assert done.status in ("failed", "completed")
    await backend.check()


@pytest.mark.parametrize("code", sorted({*FAILURE_CODES} - {"cancelled"}))
async def test_a_face_swap_that_fails_keeps_the_edit_that_was_paid_for(code: FailureCode) -> None:
    backend = InMemoryBackend()
    at_swap(backend, Failure(code, "Not this face."))
    async with backend.open():
        done = await backend.make(swap_arguments())
    sent = (await backend.events(done))[-1]
    assert (sent["status"], sent["progress"], sent["credit"]) == ("completed", 100, 9)
    assert sent["message"] == "Image editing completed, but the face swap failed."
    assert sent["faceSwapError"] == {"code": code, "message": "Not this face."}
    assert picture_of(backend, sent["editedImageUrl"]) == b"edited"
    assert not {"faceSwapUrl", "error", "code", "failedStage"} & set(sent)
    assert len(backend.face_swapper.calls) == 1
    await backend.check()


async def test_a_face_swap_that_breaks_keeps_the_edit_too() -> None:
    backend = InMemoryBackend()
    at_swap(backend, RuntimeError("secret"))
    async with backend.open():
        done = await backend.make(swap_arguments())
    sent = (await backend.events(done))[-1]
    assert sent["status"] == "completed"
    assert isinstance(sent["faceSwapError"], dict)
    assert sent["faceSwapError"]["code"] == "internal"
    await backend.check()


@pytest.mark.parametrize(
    ("unstorable", "stage"),
    [(b"one+<http://pictures.test/face.png>", "composition"), (b"edited", "openai_editing")],
)
async def test_a_picture_that_cannot_be_stored_ends_it_in_storage_failed(unstorable: bytes, stage: str) -> None:
    backend = InMemoryBackend()
    backend.images.refused = {unstorable}
    async with backend.open():
        done = await backend.make(swap_arguments())
    await assert_failed_and_refunded(backend, done, stage, "storage_failed")


async def test_a_swapped_picture_that_cannot_be_stored_keeps_the_edit() -> None:
    backend = InMemoryBackend()
    backend.images.refused = {b"swapped"}
    async with backend.open():
        done = await backend.make(swap_arguments())
    assert done.face_swap_error is not None
    assert (done.status, done.face_swap_error.code) == ("completed", "storage_failed")
    await backend.check()


async def test_a_missing_upload_ends_in_storage_failed() -> None:
    backend = InMemoryBackend()
    begun = await backend.start()
    backend.images.kept.clear()
    async with backend.open():
        await backend.settled()
    failed = (await backend.events(begun))[-1]
    assert (failed["failedStage"], failed["code"], failed["credit"]) == ("composition", "storage_failed", 10)


async def test_a_failing_generation_does_not_affect_others() -> None:
    pause = Pause()
    backend = InMemoryBackend(editor=ScriptedEditor(pause), max_running=3)
    async with backend.open():
        fine = await backend.start()
        await pause.reached.wait()
        backend.runner.fetcher = ScriptedFetcher(fails("image_fetch_failed"))
        broken = await backend.start(start_arguments(uploads=[], image_urls=("http://x.test",)))
        await backend.reached(broken.generation_id, "failed")
        assert (await backend.statuses(fine))[-1] == "openai_editing"
        pause.released.set()
        await backend.settled()
        assert tuple(await backend.statuses(fine)) == EDIT
        await backend.check()


async def test_a_picture_that_cannot_be_discarded_stops_no_generation() -> None:
    backend = InMemoryBackend()
    backend.images.discard_errors = [OSError("disk"), Failure("storage_failed")]
    async with backend.open():
        for _ in range(3):
            await backend.make()
