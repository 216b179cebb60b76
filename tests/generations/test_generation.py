"""Given events, when a move is proposed, then this event follows, or nothing happens."""

import contextlib
import gc
import json
import sys
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transitions import MachineError

from domain import generation as generation_module
from domain.errors import FAILURE_CODES, Failure, FailureCode, IllegalTransition, InvalidEventField
from domain.events import Event, decode, encode, event_name, timestamp, with_credit
from domain.generation import Generation
from domain.stages import FLOWS, GUARDS, INITIAL, Kind, moves
from support.builders import NOON, PROPERTY, fold, make_generation, make_request, moved_to, path_of, stage_fields

SHEET = "http://test/images/sheet.png"
EDITED = "http://test/images/edited.png"
SWAPPED = "http://test/images/swapped.png"
GENERATED = "http://test/images/generated.png"

#: A swap asked for, a swap not asked for.
VARIANTS: list[tuple[Kind, bool]] = [("edit", False), ("edit", True), ("generate", False)]
variants = pytest.mark.parametrize(("kind", "face_swap"), VARIANTS)


def story(generation: Generation, *statuses: str) -> tuple[list[Event], Generation]:
    events = []
    for status in statuses:
        event, generation = generation.propose(status, NOON, **stage_fields(generation.kind, status))
        events.append(event)
    return events, generation


def state(generation: Generation) -> dict[str, Any]:
    return {name: getattr(generation, name) for name in Generation.__slots__}


def wire(event: Event) -> dict[str, Any]:
    value = json.loads(encode(event))
    assert isinstance(value, dict)
    return value


def reach(kind: Kind, face_swap: bool, status: str) -> Generation:
    """A generation that has just entered this status."""
    generation = make_generation(kind, face_swap=face_swap)
    if status == INITIAL:
        return generation
    path = path_of(kind, face_swap=face_swap)
    if status == "failed":
        return moved_to(generation, "started", "failed")
    return moved_to(generation, *path[: path.index(status) + 1])


def stages_of(kind: Kind, face_swap: bool) -> list[str]:
    """Every status that this kind of generation can be in."""
    return [INITIAL, *path_of(kind, face_swap=face_swap), "failed"]


# --- the happy paths -------------------------------------------------------------------------------------


def test_an_edit_without_face_swap_goes_from_started_to_completed() -> None:
    events, generation = story(make_generation("edit"), *path_of("edit"))
    assert [(event.sequence, event.status, event.progress, event.message) for event in events] == [
        (1, "started", 0, "Image editing started..."),
        (2, "composition", 20, "Composing images..."),
        (3, "composition_completed", 40, "Image composition completed, starting OpenAI editing..."),
        (4, "openai_editing", 60, "OpenAI image editing started..."),
        (5, "openai_editing_completed", 80, "OpenAI image editing completed successfully!"),
        (6, "completed", 100, "Image editing completed successfully!"),
    ]
    assert generation.finished
    assert generation.outcome == {"composition_url": SHEET, "edited_image_url": EDITED}


def test_an_edit_with_face_swap_ends_with_the_swapped_picture() -> None:
    events, _ = story(make_generation("edit", face_swap=True), *path_of("edit", face_swap=True))
    assert [(event.status, event.progress) for event in events][5:] == [
        ("face_swap", 85),
        ("face_swap_completed", 95),
        ("completed", 100),
    ]
    assert wire(events[-1]) == {
        "generationId": "edit_1_0000000000000000",
        "kind": "edit",
        "sequence": 8,
        "status": "completed",
        "message": "Image editing completed successfully!",
        "progress": 100,
        "occurredAt": "2026-11-22T12:00:00.123Z",
        "compositionUrl": SHEET,
        "editedImageUrl": EDITED,
        "faceSwapUrl": SWAPPED,
    }


def test_a_generation_from_scratch_ends_with_the_generated_picture() -> None:
    events, _ = story(make_generation("generate"), *path_of("generate"))
    assert [(event.status, event.progress) for event in events] == [
        ("started", 0),
        ("composition", 20),
        ("composition_completed", 40),
        ("ai_generation", 60),
        ("completed", 100),
    ]
    assert events[-1].message == "Image generation completed successfully!"
    assert wire(events[-1])["generatedImageUrl"] == GENERATED


def test_a_failed_face_swap_keeps_the_edit_and_has_the_error() -> None:
    given_ = reach("edit", True, "face_swap")
    status, fields = given_.ending(Failure("provider_timeout"))
    event, after = given_.propose(status, NOON, **fields)
    sent = wire(event)
    assert sent["status"] == "completed"
    assert sent["progress"] == 100
    assert sent["message"] == "Image editing completed, but the face swap failed."
    assert sent["faceSwapError"] == {
        "code": "provider_timeout",
        "message": "The image service took too long to answer. Please try again.",
    }
    assert sent["editedImageUrl"] == EDITED
    assert not {"faceSwapUrl", "error", "code", "failedStage", "retryable"} & set(sent)
    assert after.finished
    shown = after.snapshot()
    assert shown.face_swap_error is not None
    assert (shown.face_swap_error.code, shown.face_swap_url) == ("provider_timeout", None)


@pytest.mark.parametrize("code", FAILURE_CODES)
@variants
def test_a_failure_ends_every_other_stage_in_failed_with_its_code_and_sentence(
    kind: Kind, face_swap: bool, code: FailureCode
) -> None:
    for status in stages_of(kind, face_swap)[1:-2]:
        if status == "face_swap":
            continue
        given_ = reach(kind, face_swap, status)
        ending, fields = given_.ending(Failure(code, "Said plainly.", retryable=True))
        assert ending == "failed"
        event, after = given_.propose(ending, NOON, **fields)
        sent = wire(event)
        assert sent["failedStage"] == status
        assert (sent["code"], sent["error"], sent["retryable"]) == (code, "Said plainly.", True)
        assert sent["progress"] == given_.progress
        assert sent["message"] == FLOWS[kind]["failed"].message
        assert not [key for key in sent if key.endswith("Url")]
        assert after.finished
        assert after.snapshot().failed_stage == status


def test_a_cancelled_face_swap_fails_as_any_other_stage() -> None:
    event, after = reach("edit", True, "face_swap").propose("failed", NOON, **stage_fields("edit", "failed"))
    assert (event.failed_stage, event.progress, after.finished) == ("face_swap", 85, True)


# --- what is not legal -----------------------------------------------------------------------------------


def legal(kind: Kind, face_swap: bool) -> set[tuple[str, str]]:
    """Which status may follow which when every fact is there, written out beside the machine."""
    path = path_of(kind, face_swap=face_swap)
    pairs = {(INITIAL, "started"), *pairwise(path)}
    return pairs | {(status, "failed") for status in path[:-1]}


@variants
def test_every_illegal_move_raises_and_changes_nothing(kind: Kind, face_swap: bool) -> None:
    every = {INITIAL, "nonsense", "", *FLOWS["edit"], *FLOWS["generate"]}
    refused = 0
    for source, target in product(stages_of(kind, face_swap), sorted(every)):
        given_ = reach(kind, face_swap, source)
        before = state(given_)
        if (source, target) in legal(kind, face_swap):
            given_.propose(target, NOON, **stage_fields(kind, target))
        else:
            with pytest.raises(IllegalTransition) as refusal:
                given_.propose(target, NOON, **stage_fields(kind, target))
            allowed = () if isinstance(refusal.value, InvalidEventField) else given_.allowed
            assert refusal.value.allowed == allowed
            refused += 1
        assert state(given_) == before
    assert refused == len(stages_of(kind, face_swap)) * len(every) - len(legal(kind, face_swap))


@variants
def test_a_legal_move_changes_only_the_copy(kind: Kind, face_swap: bool) -> None:
    for source, target in legal(kind, face_swap):
        given_ = reach(kind, face_swap, source)
        before = state(given_)
        event, after = given_.propose(target, NOON, **stage_fields(kind, target))
        assert state(given_) == before
        assert (after.status, after.sequence) == (target, given_.sequence + 1)
        assert (event.status, event.sequence) == (target, given_.sequence + 1)


@PROPERTY
@given(data=st.data(), variant=st.sampled_from(VARIANTS))
def test_only_listed_moves_are_accepted_and_progress_never_falls(
    data: st.DataObject, variant: tuple[Kind, bool]
) -> None:
    kind, face_swap = variant
    generation = make_generation(kind, face_swap=face_swap)
    listed = {(move.source, move.status) for move in moves(kind)}
    events: list[Event] = []
    for _ in range(data.draw(st.integers(1, 25))):
        target = data.draw(st.sampled_from([INITIAL, *FLOWS[kind]]))
        fields = stage_fields(kind, target)
        if target == generation.status:
            fields["progress"] = data.draw(st.integers(0, 100))
        before, present = state(generation), generation.status
        after = None
        with contextlib.suppress(IllegalTransition):
            event, after = generation.propose(target, NOON, **fields)
        assert state(generation) == before
        if after is None:
            assert (present, target) not in listed or present == target or target not in generation.allowed
        else:
            assert (present, target) in listed
            assert event.progress > generation.progress or target in ("failed", "started")
            events.append(event)
            generation = after
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    terminal = [FLOWS[kind][event.status].terminal for event in events]
    assert not any(terminal[:-1])
    order = make_request(face_swap=face_swap)
    folded = fold(generation.generation_id, kind, generation.user_id, order, events)
    assert state(folded) == state(generation)


def test_an_invalid_field_value_is_refused_and_changes_nothing() -> None:
    given_ = reach("edit", False, "openai_editing")
    before = state(given_)
    with pytest.raises(ValidationError):
        given_.propose("openai_editing", NOON, progress=101)
    with pytest.raises(ValidationError):
        given_.propose("openai_editing", NOON, progress=70, surprise="!")
    assert state(given_) == before


@pytest.mark.parametrize("progress", [0, 19, 20, 21, 39, 40, 41, 99, 100])
def test_a_stage_is_entered_with_a_percentage_of_its_own(progress: int) -> None:
    started = reach("edit", False, "started")
    before = state(started)
    if 20 <= progress < 40:
        assert started.propose("composition", NOON, progress=progress)[0].progress == progress
    else:
        with pytest.raises(InvalidEventField) as refused:
            started.propose("composition", NOON, progress=progress)
        assert (refused.value.field, refused.value.reason) == ("progress", "This has to be from 20 to 39")
    for status, only in (("failed", 0), ("completed", 100)):
        last = started if status == "failed" else reach("edit", False, "openai_editing_completed")
        if progress == only:
            assert last.propose(status, NOON, progress=progress)[0].progress == only
        else:
            with pytest.raises(InvalidEventField):
                last.propose(status, NOON, progress=progress)
    assert state(started) == before


# --- repeats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "face_swap", "status", "low", "high"),
    [
        ("edit", False, "openai_editing", 60, 80),
        ("edit", True, "face_swap", 85, 95),
        ("generate", False, "ai_generation", 60, 100),
    ],
)
def test_repeated_progress_must_rise_and_stay_below_the_next_stage(
    kind: Kind, face_swap: bool, status: str, low: int, high: int
) -> None:
    for progress in range(101):
        given_ = reach(kind, face_swap, status)
        before = state(given_)
        if low < progress < high:
            event, after = given_.propose(status, NOON, progress=progress, message="Still painting...")
            assert (event.progress, event.message) == (progress, "Still painting...")
            assert (after.progress, after.status) == (progress, status)
            with pytest.raises(IllegalTransition):
                after.propose(status, NOON, progress=progress)
        else:
            with pytest.raises(IllegalTransition):
                given_.propose(status, NOON, progress=progress)
        assert state(given_) == before


@variants
def test_no_other_status_can_be_repeated(kind: Kind, face_swap: bool) -> None:
    for status in stages_of(kind, face_swap)[1:]:
        if status in ("openai_editing", "face_swap", "ai_generation"):
            continue
        given_ = reach(kind, face_swap, status)
        with pytest.raises(IllegalTransition):
            given_.propose(status, NOON, progress=min(100, given_.progress + 1))


def test_the_last_percent_below_the_next_stage_ends_the_repeats() -> None:
    given_ = reach("edit", False, "openai_editing")
    assert "openai_editing" in given_.allowed
    _, full = given_.propose("openai_editing", NOON, progress=79)
    assert "openai_editing" not in full.allowed


def test_a_preview_is_shown_until_the_end_but_not_in_the_terminal_event() -> None:
    _, working = reach("edit", False, "openai_editing").propose("openai_editing", NOON, progress=70, preview_url="p")
    done, after = working.propose("openai_editing_completed", NOON, edited_image_url=EDITED)
    assert wire(done)["previewUrl"] == "p"
    end, _ = after.propose("completed", NOON)
    assert "previewUrl" not in wire(end)


# --- allowed and onward ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "face_swap", "status", "allowed"),
    [
        ("edit", False, INITIAL, ("started",)),
        ("edit", False, "started", ("composition", "failed")),
        ("edit", False, "openai_editing", ("openai_editing", "openai_editing_completed", "failed")),
        ("edit", False, "openai_editing_completed", ("completed", "failed")),
        ("edit", True, "openai_editing_completed", ("face_swap", "failed")),
        ("edit", True, "face_swap", ("face_swap", "face_swap_completed", "completed", "failed")),
        ("edit", True, "face_swap_completed", ("completed", "failed")),
        ("edit", False, "completed", ()),
        ("edit", False, "failed", ()),
        ("generate", False, "ai_generation", ("ai_generation", "completed", "failed")),
    ],
)
def test_allowed_lists_what_may_follow_now(kind: Kind, face_swap: bool, status: str, allowed: tuple[str, ...]) -> None:
    assert reach(kind, face_swap, status).allowed == allowed


@variants
def test_onward_follows_the_success_path(kind: Kind, face_swap: bool) -> None:
    generation = make_generation(kind, face_swap=face_swap)
    for status in path_of(kind, face_swap=face_swap):
        fields = stage_fields(kind, status)
        assert generation.onward(fields) == status
        generation = moved_to(generation, status)
    with pytest.raises(IllegalTransition):
        generation.onward({})


def test_onward_from_a_face_swap_depends_on_its_fields() -> None:
    given_ = reach("edit", True, "face_swap")
    assert given_.onward({"face_swap_url": SWAPPED}) == "face_swap_completed"
    assert given_.onward({"face_swap_error": {"code": "internal", "message": "No."}}) == "completed"


def test_a_face_swap_is_skipped_only_with_a_reason_and_complete_only_without_one() -> None:
    given_ = reach("edit", True, "face_swap")
    before = state(given_)
    with pytest.raises(IllegalTransition):
        given_.propose("completed", NOON)
    with pytest.raises(IllegalTransition):
        given_.propose("face_swap_completed", NOON, face_swap_error={"code": "internal", "message": "No."})
    assert state(given_) == before


# --- fold and snapshot -----------------------------------------------------------------------------------


@variants
def test_folding_the_bytes_of_the_log_gives_the_moved_generation(kind: Kind, face_swap: bool) -> None:
    metadata: dict[str, Any] = {"order": 7, "tags": ["a", None], "nested": {"x": 1.5}}
    order = make_request(face_swap=face_swap, metadata=metadata)
    events, moved = story(
        make_generation(kind, face_swap=face_swap, metadata=metadata), *path_of(kind, face_swap=face_swap)
    )
    for length in range(len(events) + 1):
        kept = [decode(with_credit(encode(event), 3)) for event in events[:length]]
        folded = fold(moved.generation_id, kind, "ada", order, kept)
        assert folded.sequence == length
        assert (
            folded.snapshot()
            == moved_to(
                make_generation(kind, face_swap=face_swap, metadata=metadata),
                *path_of(kind, face_swap=face_swap)[:length],
            ).snapshot()
        )


def test_a_snapshot_has_start_and_update_times_and_the_results() -> None:
    _, started = make_generation("edit", metadata={"n": 1}).propose("started", NOON, input_image="http://x/face.png")
    _, moved = started.propose("composition", NOON + timedelta(seconds=2))
    assert json.loads(moved.snapshot().model_dump_json(by_alias=True, exclude_none=True)) == {
        "generationId": "edit_1_0000000000000000",
        "userId": "ada",
        "kind": "edit",
        "status": "composition",
        "progress": 20,
        "message": "Composing images...",
        "sequence": 2,
        "createdAt": "2026-11-22T12:00:00.123Z",
        "updatedAt": "2026-11-22T12:00:02.123Z",
        "metadata": {"n": 1},
        "inputImage": "http://x/face.png",
    }


# --- the event's JSON ------------------------------------------------------------------------------------


def test_an_event_is_camel_case_json_without_absent_values() -> None:
    event, _ = make_generation("edit").propose("started", NOON)
    assert encode(event) == (
        b'{"generationId":"edit_1_0000000000000000","kind":"edit","sequence":1,"status":"started",'
        b'"message":"Image editing started...","progress":0,"occurredAt":"2026-11-22T12:00:00.123Z"}'
    )


@variants
def test_no_event_of_any_path_holds_a_null_or_a_key_in_snake_case(kind: Kind, face_swap: bool) -> None:
    for event in story(make_generation(kind, face_swap=face_swap), *path_of(kind, face_swap=face_swap))[0]:
        sent = wire(event)
        assert None not in sent.values()
        assert not [key for key in sent if "_" in key]


def test_credit_is_the_last_key_and_the_rest_of_the_bytes_stay() -> None:
    event, _ = make_generation("edit", metadata={"credit": 5}).propose("started", NOON)
    plain = encode(event)
    sent = with_credit(plain, 42)
    assert sent == plain[:-1] + b',"credit":42}'
    assert list(json.loads(sent))[-1] == "credit"
    assert decode(sent) == event.model_copy(update={"credit": 42})


@PROPERTY
@given(
    moment=st.datetimes(
        min_value=datetime(1970, 1, 1),
        max_value=datetime(2200, 1, 1),
        timezones=st.sampled_from([UTC, timezone(timedelta(hours=3)), timezone(timedelta(hours=-9, minutes=-30))]),
    )
)
def test_a_timestamp_is_utc_to_the_millisecond_with_a_z(moment: datetime) -> None:
    text = timestamp(moment)
    assert len(text) == len("2026-11-22T17:30:00.123Z")
    assert text.endswith("Z")
    read = datetime.fromisoformat(text)
    assert read.utcoffset() == timedelta(0)
    assert timedelta(0) <= moment - read < timedelta(milliseconds=1)


@variants
def test_metadata_is_in_every_event_and_in_the_failed_one(kind: Kind, face_swap: bool) -> None:
    metadata: dict[str, Any] = {"shop": "İzmir", "n": 0, "none": None, "list": [1, {"a": False}]}
    given_ = make_generation(kind, face_swap=face_swap, metadata=metadata)
    events, _ = story(given_, *path_of(kind, face_swap=face_swap))
    events += story(given_, "started", "failed")[0]
    assert [wire(event)["metadata"] for event in events] == [metadata] * len(events)


def test_every_status_is_carried_by_its_socket_event() -> None:
    assert {status: event_name(status) for flow in FLOWS.values() for status in flow} == {
        "started": "generation_started",
        "composition": "continue",
        "composition_completed": "continue",
        "openai_editing": "continue",
        "openai_editing_completed": "continue",
        "ai_generation": "continue",
        "face_swap": "continue",
        "face_swap_completed": "continue",
        "completed": "generation_completed",
        "failed": "generation_failed",
    }


# --- the shared machines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("guards", [False, True])
def test_the_remembered_answers_are_those_of_the_machine(kind: Kind, guards: bool) -> None:
    machine = generation_module._MACHINES[kind]
    for source, status in product([INITIAL, *FLOWS[kind]], FLOWS[kind]):
        via = generation_module._VIAS[kind].get((source, status))
        model = SimpleNamespace(status=source, **{guard: lambda: guards for guard in GUARDS})
        if via is None:
            with pytest.raises(MachineError):
                machine.events[status].trigger(model)
        else:
            for _ in range(2):  # The second one is remembered.
                assert generation_module._allows(kind, source, status, guards) is (guards or via.guard is None)
            assert machine.events[status].trigger(model) is (guards or via.guard is None)
            assert model.status == (status if guards or via.guard is None else source)


def test_the_shared_machines_keep_no_generation() -> None:
    for kind, machine in generation_module._MACHINES.items():
        generation = moved_to(make_generation(kind), *path_of(kind))
        with pytest.raises(IllegalTransition):
            generation.propose("started", NOON)
        assert machine.models == []
        references = sys.getrefcount(generation)
        gc.collect()
        assert sys.getrefcount(generation) == references == 2


def test_memory_does_not_grow_with_the_number_of_generations() -> None:
    def go_by(count: int) -> None:
        for _ in range(count):
            moved_to(make_generation("generate"), *path_of("generate"))

    go_by(50)
    gc.collect()
    tracemalloc.start()
    try:
        go_by(20)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        go_by(300)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 10_000
