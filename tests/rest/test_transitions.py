"""A pipeline of the user's own moves a generation, from outside: by HTTP, and a phone sees it."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from adapters.memory.log import MemoryLog
from adapters.system import now
from domain import recorder
from support.builders import SteppableClock, memory_storage
from support.doubles import FlakyLog, Pause, ScriptedEditor
from support.guarded import guarded, token
from support.harness import JSON, Phone, Running, running
from support.http_app import assert_problem
from support.pipeline import (
    DONE,
    EDIT,
    EDITED,
    FACE,
    MADE,
    PREVIEW,
    SHEET,
    SWAP,
    SWAP_ERROR,
    SWAPPED,
    Pipeline,
    Row,
    begin,
    user_numbers,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
FLOWS: Final[dict[str, tuple[str, JSON, Sequence[Row]]]] = {
    "edit": ("edit", {}, (*EDIT, DONE)),
    "edit with face swap": (
        "edit",
        {"imageUrls": json.dumps([FACE])},
        (
            *EDIT,
            SWAP,
            ("face_swap_completed", {"faceSwapUrl": SWAPPED}, 95, "Face swap completed successfully!"),
            DONE,
        ),
    ),
    "edit of which the face swap fails": (
        "edit",
        {"imageUrls": json.dumps([FACE])},
        (
            *EDIT,
            SWAP,
            ("completed", {"faceSwapError": SWAP_ERROR}, 100, "Image editing completed, but the face swap failed."),
        ),
    ),
    "generate": (
        "generate",
        {},
        (
            ("composition", {}, 20, "Composing images..."),
            (
                "composition_completed",
                {"compositionUrl": SHEET},
                40,
                "Image composition completed, starting AI generation...",
            ),
            ("ai_generation", {}, 60, "AI image generation started..."),
            ("completed", {"generatedImageUrl": MADE}, 100, "Image generation completed successfully!"),
        ),
    ),
}
ALLOWED: Final[dict[str, list[str]]] = {
    "started": ["composition", "failed"],
    "composition": ["composition_completed", "failed"],
    "composition_completed": ["openai_editing", "failed"],
    "openai_editing": ["openai_editing", "openai_editing_completed", "failed"],
    "openai_editing_completed": ["completed", "failed"],
    "completed": [],
    "failed": [],
}
STATUSES: Final = {*ALLOWED, "ai_generation", "face_swap", "face_swap_completed"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """The service of most of these tests. Its log takes its time, so that calls meet."""
    folder = tmp_path_factory.mktemp("service")
    async with running(folder / "images", log=f"sqlite:///{folder / 'log.db'}") as running_service:
        yield running_service


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of a busy machine has all the time it needs, before anybody is told that the log does not answer."""
    monkeypatch.setattr(recorder, "ATTENTION", 60)
    monkeypatch.setattr(recorder, "_TIMEOUT", 60)


async def credit(service: Running, user: str) -> int:
    return int((await service.get("/me", user))["credit"])


# --- the way that it goes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS)
async def test_reported_stages_reach_the_device_and_the_log_unchanged(service: Running, flow: str) -> None:
    kind, form, rows = FLOWS[flow]
    user = f"user {next(user_numbers)}"
    async with service.phone(user) as phone:
        pipeline = await begin(service, kind, user=user, metadata='{"order": 7}', **form)
        answers = [await pipeline.report(status, **fields) for status, fields, _, _ in rows]
        await phone.until_over(pipeline.generation_id)
    started, *events = phone.of(pipeline.generation_id)
    assert started["status"] == "started"
    assert started.get("inputImage") == (FACE if form else None)
    assert [answer.json() for answer in answers] == events
    assert [name for name, _ in phone.events] == [
        "generation_started",
        *["continue"] * (len(rows) - 1),
        "generation_completed",
    ]
    known: JSON = {}
    for number, (event, (status, fields, progress, message)) in enumerate(zip(events, rows, strict=True)):
        known |= fields
        end = {"credit": 99} if status == "completed" else {}
        assert event == {
            "generationId": pipeline.generation_id,
            "kind": kind,
            "sequence": number + 2,
            "status": status,
            "message": message,
            "progress": progress,
            "occurredAt": event["occurredAt"],
            "metadata": {"order": 7},
            **known,
            **end,
        }
    answer = await service.http.get(
        f"/generations/{pipeline.generation_id}/events?after=1", headers={"X-User-Id": user}
    )
    for sent in answers:
        assert sent.headers["content-type"] == "application/json"
        assert b'"data":' + sent.content + b"}" in answer.content
    snapshot = await service.get(f"/generations/{pipeline.generation_id}", user)
    assert snapshot.items() >= {**known, "status": "completed", "progress": 100}.items()


async def test_images_are_optional_and_the_service_does_none_of_the_work(service: Running) -> None:
    async with service.phone("painter") as phone:
        pipelines = [await begin(service, user="painter", images=images) for images in (0, 1, 5)]
        await phone.until_over(await service.start("painter"))
        assert [phone.sequences(pipeline.generation_id) for pipeline in pipelines] == [[1], [1], [1]]
        await service.service.leases.drain()
        for pipeline in pipelines:
            await pipeline.report_accepted("composition")


async def test_an_unknown_runner_or_a_malformed_form_is_rejected(service: Running) -> None:
    assert_problem(await service.post("ada", "edit?runner=internal"), 422, "invalid_request")
    assert_problem(await service.post("ada", "edit", images=0), 422, "invalid_request")
    assert_problem(await service.post("ada", "edit?runner=external", images=6), 422, "invalid_request")
    assert_problem(await service.post("ada", "edit?runner=external", images=0, prompt=""), 422, "invalid_request")
    swap = await service.post("ada", "edit?runner=external", images=0, faceSwap="true")
    assert assert_problem(swap, 422, "invalid_request")["errors"][0]["field"] == "faceSwap"


async def test_a_reused_key_starts_nothing_and_runner_is_part_of_the_request(service: Running) -> None:
    first = await service.post("key", "edit?runner=external", key="k")
    again = await service.post("key", "edit?runner=external", key="k")
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.headers["location"] == again.headers["location"]
    assert_problem(await service.post("key", "edit", key="k"), 422, "idempotency_mismatch")


# --- what may come next ------------------------------------------------------------------------------------


async def test_an_illegal_transition_is_rejected_with_the_allowed_ones(service: Running) -> None:
    pipeline = await begin(service)
    for status in ("started", *[row[0] for row in (*EDIT, DONE)]):
        if status != "started":
            await pipeline.report_accepted(status)
        for illegal in [*sorted(STATUSES - {*ALLOWED[status]} - {status}), "begin", "flying"]:
            problem = await pipeline.assert_rejected(illegal, "illegal_transition")
            assert problem["allowed"] == ALLOWED[status]
    # What is told with it does not matter then.
    assert (await pipeline.assert_rejected("failed", "illegal_transition", generatedImageUrl=MADE))["allowed"] == []


async def test_a_face_swap_stage_is_required_exactly_if_it_was_requested(service: Running) -> None:
    plain = await (await begin(service)).report_up_to("openai_editing_completed")
    assert (await plain.assert_rejected("face_swap", "illegal_transition"))["allowed"] == ["completed", "failed"]
    swap = await (await begin(service, imageUrls=FACE)).report_up_to("openai_editing_completed")
    assert (await swap.assert_rejected("completed", "illegal_transition"))["allowed"] == ["face_swap", "failed"]


async def test_every_stage_can_be_reported_by_status_alone(service: Running) -> None:
    swapped = await begin(service, imageUrls=FACE)
    for status, *_ in (*EDIT, SWAP):
        await swapped.report_accepted(status)
    assert (await swapped.report_accepted("face_swap_completed"))["progress"] == 95
    assert "faceSwapError" not in await swapped.report_accepted("completed")
    kept = await (await begin(service, imageUrls=FACE)).report_up_to("face_swap")
    end = await kept.report_accepted("completed")
    assert end["message"] == "Image editing completed, but the face swap failed."
    assert end["faceSwapError"]["code"] == "internal"
    failed = await (await begin(service)).report_accepted("failed")
    assert (failed["code"], failed["retryable"], failed["error"]) == ("internal", False, "Something went wrong.")


async def test_a_provider_stage_can_be_reported_again_with_higher_progress(service: Running) -> None:
    pipeline = await begin(service, imageUrls=FACE)
    for stage, low, high in (("openai_editing", 60, 80), ("face_swap", 85, 95)):
        await pipeline.report_up_to(stage, EDIT) if stage == "openai_editing" else await pipeline.report_accepted(stage)
        first = await pipeline.report_accepted(stage, progress=low + 4, message="Half-way…", previewUrl=PREVIEW)
        assert (first["progress"], first["message"], first["previewUrl"]) == (low + 4, "Half-way…", PREVIEW)
        for progress in (low, low + 4, high, 100):
            await pipeline.assert_field_rejected(stage, "progress", progress=progress, message="Other words")
        await pipeline.assert_field_rejected(stage, "progress", message="Without any")
        second = await pipeline.report_accepted(stage, progress=high - 1)
        assert (second["progress"], second["sequence"]) == (high - 1, first["sequence"] + 1)
        assert second["previewUrl"] == PREVIEW
        assert second["message"] == ("OpenAI image editing started..." if high == 80 else "Applying face swap...")
        if high == 80:
            await pipeline.report_accepted("openai_editing_completed", editedImageUrl=EDITED)
    await pipeline.report_accepted("face_swap_completed", faceSwapUrl=SWAPPED)
    end = await pipeline.report_accepted("completed")
    assert "previewUrl" not in end


async def test_progress_stays_within_the_stage(service: Running) -> None:
    pipeline = await begin(service)
    for status, low, high in (
        ("composition", 20, 39),
        ("composition_completed", 40, 59),
        ("openai_editing", 60, 79),
        ("openai_editing_completed", 80, 84),
        ("completed", 100, 100),
    ):
        for progress in {-1, 0, low - 1, high + 1, 101} - {low}:
            await pipeline.assert_field_rejected(status, "progress", progress=progress)
        assert (await pipeline.report_accepted(status, progress=high))["progress"] == high


async def test_the_first_event_of_a_stage_can_have_its_own_message(service: Running) -> None:
    pipeline = await begin(service)
    assert (await pipeline.report_accepted("composition", message="Cutting out the hat…"))[
        "message"
    ] == "Cutting out the hat…"


# --- the same again ----------------------------------------------------------------------------------------


async def test_a_repeated_report_is_answered_with_the_same_event_byte_for_byte(service: Running) -> None:
    pipeline = await begin(service, imageUrls=FACE)
    _, _, rows = FLOWS["edit with face swap"]
    repeats = {"openai_editing": {"progress": 70, "message": "Half-way…"}}
    for status, fields, _, _ in rows:
        for sent in [fields, *([repeats[status]] if status in repeats else [])]:
            first = await pipeline.report(status, **sent)
            count = len(await pipeline.events())
            same = await pipeline.report(status, **sent)
            other = await pipeline.post(json.dumps({"sequence": None, **sent, "status": status}, indent=2))
            assert (first.status_code, same.status_code, other.status_code) == (200, 200, 200)
            assert first.content == same.content == other.content
            assert len(await pipeline.events()) == count
    assert await credit(service, pipeline.user) == 99


async def test_only_an_identical_report_of_the_last_event_is_a_repeat(service: Running) -> None:
    pipeline = await begin(service)
    await pipeline.report_accepted("composition")
    await pipeline.assert_rejected("composition", "illegal_transition", message="Composing images...")
    await pipeline.assert_rejected("composition", "illegal_transition", progress=20)
    await pipeline.report_accepted("composition_completed", compositionUrl=SHEET)
    await pipeline.assert_rejected("composition", "illegal_transition")
    await pipeline.assert_rejected("composition_completed", "illegal_transition")
    await pipeline.assert_rejected("composition_completed", "illegal_transition", compositionUrl=SHEET + "?")
    await pipeline.report_accepted("failed", error="It broke.")
    await pipeline.assert_rejected("failed", "illegal_transition")
    assert (await pipeline.report_accepted("failed", error="It broke."))["error"] == "It broke."
    assert await credit(service, pipeline.user) == 100


async def test_the_expected_sequence_can_be_sent_and_must_match(service: Running) -> None:
    pipeline = await begin(service)
    for wrong in (1, 3, 99):
        await pipeline.assert_rejected("composition", "conflict", sequence=wrong)
    first = await pipeline.report("composition", sequence=2)
    assert first.json()["sequence"] == 2
    assert (await pipeline.report("composition", sequence=2)).content == first.content
    await pipeline.assert_rejected("composition_completed", "conflict", sequence=2)
    await pipeline.assert_rejected("flying", "illegal_transition", sequence=3)
    for malformed in (0, -1, "3", 3.5, True):
        await pipeline.assert_field_rejected("composition_completed", "sequence", sequence=malformed)
    await pipeline.report_accepted("composition_completed", sequence=3)


async def test_repeats_and_deadlines_survive_a_restart(
    tmp_path: Path,
) -> None:
    settings: JSON = {"log": f"sqlite:///{tmp_path / 'log.db'}", "deadline": 0.5}
    clock = SteppableClock(now())
    overrides = {"clock": clock}
    async with running(tmp_path / "images", overrides=overrides, **settings) as service:
        going, silent = await begin(service, user="ada"), await begin(service, user="ada")
        first = await going.report("composition", message="Cutting out the hat…")
        await silent.report_accepted("composition")
    async with running(tmp_path / "images", overrides=overrides, **settings) as service, service.phone("ada") as phone:
        going.service = silent.service = service
        assert (await going.report("composition", message="Cutting out the hat…")).content == first.content
        await going.report_accepted("composition_completed")
        clock.step(0.4)
        await going.report_accepted("openai_editing")
        clock.step(0.4)
        await phone.until_over(silent.generation_id)
        assert phone.of(silent.generation_id)[-1]["code"] == "deadline_exceeded"
        await going.report_accepted("failed")


async def test_a_report_whose_log_reply_was_lost_is_one_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = FlakyLog(MemoryLog(epoch="e1", credits=100, clock=now))
    async with running(tmp_path, overrides={"storage": memory_storage(log)}) as service:
        pipeline = await begin(service, user="ada")
        log.appends = ["after"]
        assert (await pipeline.report_accepted("composition"))["sequence"] == 2
        # It is in the log, but whoever told it hears nothing of that.
        monkeypatch.setattr(recorder, "ATTENTION", 0.2)
        log.appends = ["after", *["before"] * 50]
        assert_problem(await pipeline.report("composition_completed", compositionUrl=SHEET), 503, "log_unavailable")
        log.appends.clear()
        assert (await pipeline.report_accepted("composition_completed", compositionUrl=SHEET))["sequence"] == 3
        assert [event["sequence"] for event in await pipeline.events()] == [1, 2, 3]


# --- what may be told --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "cdn.example.com/a.png",
        "/a.png",
        "//cdn.example.com/a.png",
        "ftp://cdn.example.com/a.png",
        "javascript:alert(1)",
        "data:image/png;base64,AAAA",
        "file:///etc/passwd",
        "https://",
        "https:// cdn.example.com/a.png",
        "https://cdn.example.com/a\nb.png",
        "https://cdn.example.com/" + "a" * 2048,
        7,
        ["https://cdn.example.com/a.png"],
    ],
)
async def test_urls_are_http_or_https(service: Running, url: object) -> None:
    pipeline = await (await begin(service, imageUrls=FACE)).report_up_to("face_swap")
    await pipeline.assert_field_rejected("failed", "compositionUrl", compositionUrl=url)
    for field in ("compositionUrl", "previewUrl", "editedImageUrl", "generatedImageUrl", "faceSwapUrl"):
        await pipeline.assert_field_rejected("face_swap_completed", field, **{field: url})


@pytest.mark.parametrize(
    ("status", "fact"),
    [
        ("composition", {"generatedImageUrl": MADE}),
        ("composition", {"error": "No."}),
        ("composition", {"code": "internal"}),
        ("composition", {"faceSwapError": SWAP_ERROR}),
        ("failed", {"compositionUrl": SHEET}),
        ("failed", {"faceSwapError": SWAP_ERROR}),
    ],
)
async def test_fields_of_another_status_are_rejected(service: Running, status: str, fact: JSON) -> None:
    await (await begin(service)).assert_field_rejected(status, next(iter(fact)), **fact)


@pytest.mark.parametrize(
    "wrong",
    [
        {"colour": "red"},
        {"retryable": True},
        {"credit": 1_000},
        {"generationId": "edit_1"},
        {"metadata": {}},
        {"message": ""},
        {"message": "x" * 501},
        {"message": 7},
        {"progress": "20"},
        {"progress": 20.5},
        {"progress": True},
    ],
)
async def test_an_unknown_key_or_a_value_of_another_kind_is_refused(service: Running, wrong: JSON) -> None:
    await (await begin(service)).assert_field_rejected("composition", next(iter(wrong)), **wrong)


async def test_keys_have_one_spelling(service: Running) -> None:
    await (await begin(service)).assert_field_rejected("composition", "composition_url", composition_url=SHEET)


@pytest.mark.parametrize("body", ["", "{", "[]", '"composition"', "null", "{}", '{"status": 7}', '{"status": ""}'])
async def test_a_malformed_transition_is_rejected(service: Running, body: str) -> None:
    pipeline = await begin(service)
    assert_problem(await pipeline.post(body), 422, "invalid_request")
    assert len(await pipeline.events()) == 1


async def test_an_endless_body_is_rejected(service: Running) -> None:
    pipeline = await begin(service)
    assert_problem(await pipeline.post(json.dumps({"status": "x" * 70_000})), 413, "content_too_large")


# --- ends --------------------------------------------------------------------------------------------------


async def test_a_failure_without_a_code_is_internal_and_not_retryable(service: Running) -> None:
    pipeline = await (await begin(service)).report_up_to("openai_editing")
    await pipeline.report_accepted("openai_editing", progress=72)
    await pipeline.assert_field_rejected("failed", "progress", progress=100)
    event = await pipeline.report_accepted("failed")
    assert event.pop("error")
    assert (
        event.items()
        >= {
            "status": "failed",
            "message": "Image editing failed!",
            "progress": 72,
            "code": "internal",
            "retryable": False,
            "failedStage": "openai_editing",
            "credit": 100,
        }.items()
    )
    assert "editedImageUrl" not in event
    assert (await service.get(f"/generations/{pipeline.generation_id}", pipeline.user))["retryable"] is False


@pytest.mark.parametrize(
    ("code", "retryable"),
    [
        ("invalid_image", False),
        ("image_fetch_failed", True),
        ("provider_rejected", False),
        ("provider_rate_limited", True),
        ("provider_unavailable", True),
        ("provider_timeout", True),
        ("storage_failed", True),
        ("cancelled", True),
        ("interrupted", True),
        ("deadline_exceeded", True),
        ("internal", True),
    ],
)
async def test_a_failure_with_a_code_has_its_retryable_flag(service: Running, code: str, retryable: bool) -> None:
    event = await (await begin(service, "generate")).report_accepted("failed", code=code, error="Only seas today.")
    assert (event["code"], event["retryable"], event["error"]) == (code, retryable, "Only seas today.")


@pytest.mark.parametrize("wrong", [{"code": "teapot"}, {"code": ""}, {"code": 7}, {"error": ""}, {"error": "x" * 501}])
async def test_an_unknown_code_or_no_sentence_is_refused(service: Running, wrong: JSON) -> None:
    await (await begin(service)).assert_field_rejected("failed", next(iter(wrong)), **wrong)


async def test_a_failed_face_swap_has_a_reason(service: Running) -> None:
    pipeline = await (await begin(service, imageUrls=FACE)).report_up_to("face_swap")
    for wrong, field in (
        ({}, "faceSwapError.code"),
        ({"code": "internal"}, "faceSwapError.message"),
        ({"code": "teapot", "message": "No."}, "faceSwapError.code"),
        ({"code": "internal", "message": ""}, "faceSwapError.message"),
        ({**SWAP_ERROR, "retryable": True}, "faceSwapError.retryable"),
        ("internal", "faceSwapError"),
    ):
        await pipeline.assert_field_rejected("completed", field, faceSwapError=wrong)
    event = await pipeline.report_accepted("completed", faceSwapError=SWAP_ERROR)
    assert event["faceSwapError"] == SWAP_ERROR
    assert event["editedImageUrl"] == EDITED
    assert "faceSwapUrl" not in event


async def test_without_a_face_swap_its_fields_are_rejected(service: Running) -> None:
    pipeline = await (await begin(service)).report_up_to("openai_editing")
    await pipeline.assert_field_rejected("openai_editing_completed", "faceSwapUrl", faceSwapUrl=SWAPPED)
    await pipeline.report_accepted("openai_editing_completed")
    await pipeline.assert_field_rejected("completed", "faceSwapUrl", faceSwapUrl=SWAPPED)
    await pipeline.assert_field_rejected("completed", "faceSwapError", faceSwapError=SWAP_ERROR)


async def test_a_face_swap_result_and_a_face_swap_error_exclude_each_other(service: Running) -> None:
    failed = await (await begin(service, imageUrls=FACE)).report_up_to("face_swap")
    await failed.assert_rejected("completed", "invalid_request", 422, faceSwapError=SWAP_ERROR, faceSwapUrl=SWAPPED)
    await failed.report_accepted("face_swap_completed", faceSwapUrl=SWAPPED)
    await failed.assert_field_rejected("completed", "faceSwapError", faceSwapError=SWAP_ERROR)


async def test_a_cancel_ends_it_and_nothing_follows(service: Running) -> None:
    user = f"user {next(user_numbers)}"
    async with service.phone(user) as phone:
        pipeline = await (await begin(service, user=user)).report_up_to("openai_editing")
        cancelled = await service.http.post(
            f"/generations/{pipeline.generation_id}/cancel", headers={"X-User-Id": user}
        )
        assert cancelled.json() == {"outcome": "cancelled"}
        await phone.until_over(pipeline.generation_id)
        end = phone.of(pipeline.generation_id)[-1]
        assert (end["code"], end["failedStage"], end["credit"]) == ("cancelled", "openai_editing", 100)
        for status in ("openai_editing", "openai_editing_completed", "failed"):
            assert (await pipeline.assert_rejected(status, "illegal_transition"))["allowed"] == []
        assert await credit(service, user) == 100


async def test_a_silent_pipeline_fails_at_the_deadline_and_an_active_one_does_not(tmp_path: Path) -> None:
    clock = SteppableClock(now())
    async with (
        running(tmp_path, overrides={"clock": clock}, deadline=0.5) as service,
        service.phone("ada") as phone,
    ):
        going, silent = await begin(service, user="ada"), await begin(service, user="ada")
        swapping = await begin(service, user="ada", imageUrls=FACE)
        await swapping.report_up_to("face_swap")
        for progress in range(61, 65):
            clock.step(0.4)
            await (
                going.report_up_to("openai_editing")
                if progress == 61
                else going.report_accepted("openai_editing", progress=progress)
            )
        await phone.until_over(silent.generation_id, swapping.generation_id)
        end = phone.of(silent.generation_id)[-1]
        assert (end["code"], end["failedStage"]) == ("deadline_exceeded", "started")
        assert end["credit"] == 98
        # A face swap that comes to nothing does not waste the edit.
        kept = phone.of(swapping.generation_id)[-1]
        assert (kept["status"], kept["faceSwapError"]["code"]) == ("completed", "deadline_exceeded")
        assert (await going.report_accepted("openai_editing_completed"))["sequence"] == 8
        clock.step(0.6)
        await phone.until_over(going.generation_id)
        assert (await going.assert_rejected("completed", "illegal_transition"))["allowed"] == []
        assert await credit(service, "ada") == 99


# --- who may -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def with_key(images: Path) -> AsyncIterator[tuple[Running, Phone]]:
    async with guarded(images) as service, service.phone(token=token("ada")) as phone:
        phone.user = "ada"
        yield service, phone


async def test_with_a_key_only_service_tokens_can_report_for_a_user(tmp_path: Path) -> None:
    async with with_key(tmp_path) as (service, phone):
        pipeline = await begin(service, user="ada")
        await pipeline.report_accepted("composition")
        await phone.until(lambda: phone.sequences(pipeline.generation_id) == [1, 2])
        path = f"/generations/{pipeline.generation_id}"
        assert (await service.get(path))["userId"] == "ada"
        owner = {"Authorization": f"Bearer {token('ada')}"}
        nobody = {"Authorization": ""}
        form = {"prompt": (None, "a red hat"), "imageUrls": (None, FACE)}
        for headers, status, code in ((owner, 403, "forbidden"), (nobody, 401, "unauthenticated")):
            tell = await service.http.post(f"{path}/transitions", json={"status": "failed"}, headers=headers)
            assert_problem(tell, status, code)
            start = await service.http.post("/generations/edit?runner=external", files=form, headers=headers)
            assert_problem(start, status, code)
        assert len(await pipeline.events()) == 2
        # The owner may still look, and cancel.
        cancelled = await service.http.post(f"{path}/cancel", headers=owner)
        assert cancelled.json() == {"outcome": "cancelled"}
        await phone.until_over(pipeline.generation_id)


async def test_another_users_generation_is_not_found(service: Running) -> None:
    pipeline = await begin(service)
    stranger = Pipeline(service, "a stranger", pipeline.generation_id)
    missing = Pipeline(service, "a stranger", "edit_1763829000123_k3v9x2ab4c6d8e0f")
    answers = [
        await each.report(status, **fields)
        for each in (stranger, missing)
        for status, fields in (("composition", {}), ("flying", {}), ("composition", {"sequence": 9}))
    ]
    assert {answer.content for answer in answers} == {answers[0].content}
    assert_problem(answers[0], 404, "not_found")
    assert_problem(await Pipeline(service, pipeline.user, "edit_1").report("composition"), 404, "not_found")
    assert len(await pipeline.events()) == 1


async def test_a_generation_run_by_the_service_takes_no_reports(tmp_path: Path) -> None:
    pause = Pause()
    async with running(tmp_path, overrides={"editor": ScriptedEditor(pause)}) as service, service.phone("ada") as phone:
        internal = Pipeline(service, "ada", await service.start("ada"))
        await pause.reached.wait()
        await internal.assert_rejected("openai_editing_completed", "not_external")
        await internal.assert_rejected("failed", "not_external", sequence=99)
        pause.released.set()
        await phone.until_over(internal.generation_id)
        await internal.assert_rejected("failed", "not_external")


# --- at the same time --------------------------------------------------------------------------------------


async def test_concurrent_identical_reports_are_answered_with_one_event(service: Running) -> None:
    pipeline = await (await begin(service)).report_up_to("openai_editing")
    for fields in ({"progress": 70}, {"progress": 75, "sequence": 6}):
        answers = await asyncio.gather(*(pipeline.report("openai_editing", **fields) for _ in range(12)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
    assert [event["sequence"] for event in await pipeline.events()] == [1, 2, 3, 4, 5, 6]


async def test_one_of_many_different_concurrent_reports_is_accepted(service: Running) -> None:
    pipeline = await begin(service)
    for status, code, more in (
        ("composition", "illegal_transition", {}),
        ("composition_completed", "conflict", {"sequence": 3}),
    ):
        answers = await asyncio.gather(*(pipeline.report(status, message=f"Pipeline {n}", **more) for n in range(12)))
        [heard] = [answer for answer in answers if answer.status_code == 200]
        for answer in answers:
            if answer is not heard:
                assert_problem(answer, 409, code)
        assert (await pipeline.events())[-1] == heard.json()


async def test_progress_reported_concurrently_rises_without_a_gap(service: Running) -> None:
    pipeline = await (await begin(service)).report_up_to("openai_editing")
    answers = await asyncio.gather(*(pipeline.report("openai_editing", progress=each) for each in range(61, 79)))
    assert {answer.status_code for answer in answers} <= {200, 422}
    events = await pipeline.events()
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    progress = [event["progress"] for event in events[4:]]
    assert progress == sorted({answer.json()["progress"] for answer in answers if answer.status_code == 200})
    assert progress[-1] == 78


async def test_a_cancel_and_a_reported_end_at_once_make_one_end(service: Running) -> None:
    for _ in range(5):
        pipeline = await (await begin(service, user="racer")).report_up_to("openai_editing_completed")
        path = f"/generations/{pipeline.generation_id}/cancel"
        end, cancel = await asyncio.gather(
            pipeline.report("completed"), service.http.post(path, headers={"X-User-Id": "racer"})
        )
        outcome = cancel.json()["outcome"]
        assert (end.status_code, outcome) in ((200, "already_finished"), (409, "cancelled"))
        events = await pipeline.events()
        assert events[-1]["status"] == ("completed" if end.status_code == 200 else "failed")
        assert len(events) == 6


async def test_a_url_of_a_pipeline_is_no_picture_of_ours_even_where_it_looks_like_one(service: Running) -> None:
    pipeline = await begin(service)
    url = f"{service.url}/images/{pipeline.generation_id}-{'0' * 32}.png"
    await pipeline.report_accepted("composition", compositionUrl=url)
    event = await pipeline.report_accepted("composition_completed")
    assert event["compositionUrl"] == url
    history = await service.service.log.generation(pipeline.generation_id)
    assert history is not None
    assert not any(entry.images for entry in history.events)
