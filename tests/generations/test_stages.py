"""The table is the one in the contract, which is written out here word for word."""

from inspect import iscoroutinefunction
from itertools import pairwise

import pytest

from domain.events import Event
from domain.runner import _Job
from domain.stages import FLOWS, GUARDS, INITIAL, Kind, ceiling, moves

Row = tuple[str, int | None, str, set[str]]

CONTRACT: dict[Kind, list[Row]] = {
    "edit": [
        ("started", 0, "Image editing started...", {"composition"}),
        ("composition", 20, "Composing images...", {"composition_completed"}),
        (
            "composition_completed",
            40,
            "Image composition completed, starting OpenAI editing...",
            {"openai_editing"},
        ),
        ("openai_editing", 60, "OpenAI image editing started...", {"openai_editing_completed"}),
        (
            "openai_editing_completed",
            80,
            "OpenAI image editing completed successfully!",
            {"face_swap", "completed"},
        ),
        ("face_swap", 85, "Applying face swap...", {"face_swap_completed", "completed"}),
        ("face_swap_completed", 95, "Face swap completed successfully!", {"completed"}),
        ("completed", 100, "Image editing completed successfully!", set()),
        ("failed", None, "Image editing failed!", set()),
    ],
    "generate": [
        ("started", 0, "Image generation started...", {"composition"}),
        ("composition", 20, "Composing images...", {"composition_completed"}),
        (
            "composition_completed",
            40,
            "Image composition completed, starting AI generation...",
            {"ai_generation"},
        ),
        ("ai_generation", 60, "AI image generation started...", {"completed"}),
        ("completed", 100, "Image generation completed successfully!", set()),
        ("failed", None, "Image generation failed!", set()),
    ],
}

REPEATING: dict[Kind, dict[str, int]] = {
    "edit": {"openai_editing": 80, "face_swap": 95},
    "generate": {"ai_generation": 100},
}

kinds = pytest.mark.parametrize("kind", list(CONTRACT))


def successors(kind: Kind, status: str) -> set[str]:
    return {move.status for move in moves(kind) if move.source == status}


def test_there_are_two_kinds_of_generation() -> None:
    assert set(FLOWS) == set(CONTRACT)


@kinds
def test_statuses_percentages_messages_and_successors_match_the_contract(kind: Kind) -> None:
    table = [(status, stage.progress, stage.message, set(stage.next)) for status, stage in FLOWS[kind].items()]
    assert table == CONTRACT[kind]


def test_a_failed_face_swap_has_its_own_closing_message() -> None:
    own = {(move.source, move.status): move.via.message for move in moves("edit") if move.via.message}
    assert own == {("face_swap", "completed"): "Image editing completed, but the face swap failed."}
    assert not [move for move in moves("generate") if move.via.message]


@kinds
def test_a_generation_begins_with_the_first_row_only(kind: Kind) -> None:
    assert [move.status for move in moves(kind) if move.source == INITIAL] == ["started"]
    assert not [move for move in moves(kind) if move.status in (INITIAL, "started") and move.source != INITIAL]


@kinds
def test_failed_follows_every_stage_that_is_not_terminal(kind: Kind) -> None:
    before = {move.source for move in moves(kind) if move.status == "failed"}
    assert before == {status for status, *_, following in CONTRACT[kind] if following}


@kinds
@pytest.mark.parametrize("status", ["completed", "failed"])
def test_nothing_follows_a_terminal_stage(kind: Kind, status: str) -> None:
    assert FLOWS[kind][status].terminal
    assert successors(kind, status) == set()


@kinds
def test_the_moves_are_exactly_rows_failures_and_repeats(kind: Kind) -> None:
    expected = {(INITIAL, "started")}
    for status, _, _, following in CONTRACT[kind]:
        expected |= {(status, after) for after in following}
        if following:
            expected.add((status, "failed"))
    expected |= {(status, status) for status in REPEATING[kind]}
    found = [(move.source, move.status) for move in moves(kind)]
    assert set(found) == expected
    assert len(found) == len(expected)


@kinds
def test_only_the_stages_of_a_provider_repeat_and_only_while_progress_rises(kind: Kind) -> None:
    repeats = {move.source: move.via.guard for move in moves(kind) if move.source == move.status}
    assert repeats == dict.fromkeys(REPEATING[kind], "progress_rises")


@kinds
def test_a_repeat_stays_below_whatever_may_follow(kind: Kind) -> None:
    assert {status: ceiling(kind, status) for status in REPEATING[kind]} == REPEATING[kind]


@kinds
def test_progress_rises_along_every_move(kind: Kind) -> None:
    for move in moves(kind):
        if move.source in (INITIAL, move.status) or move.status == "failed":
            continue
        before, after = FLOWS[kind][move.source].progress, FLOWS[kind][move.status].progress
        assert before is not None
        assert after is not None
        assert before < after, move


def test_a_face_swap_that_was_asked_for_and_one_that_was_not_exclude_each_other() -> None:
    guards = {move.status: move.via.guard for move in moves("edit") if move.source == "openai_editing_completed"}
    assert guards == {"face_swap": "face_swap_requested", "completed": "face_swap_not_requested", "failed": None}


@kinds
def test_every_guard_has_a_description(kind: Kind) -> None:
    assert {move.via.guard for move in moves(kind)} - {None} <= set(GUARDS)
    assert all(guard.condition for guard in GUARDS.values())


@kinds
def test_every_name_in_a_row_exists(kind: Kind) -> None:
    for move in moves(kind):
        stage = FLOWS[kind][move.status]
        assert set(stage.fields + move.via.fields) <= set(Event.model_fields)
        assert stage.step is None or iscoroutinefunction(getattr(_Job, stage.step))
    assert all(stage.step for stage in FLOWS[kind].values() if stage.provider)
    assert {guard.field for guard in GUARDS.values()} - {None} <= set(Event.model_fields)


@kinds
def test_a_start_reserves_a_credit_and_only_a_failure_refunds_it(kind: Kind) -> None:
    credit = {status: stage.credit for status, stage in FLOWS[kind].items() if stage.credit is not None}
    assert credit == {"started": -1, "completed": 0, "failed": 1}


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        pytest.param(
            "edit",
            "started composition composition_completed openai_editing openai_editing_completed completed",
            id="edit",
        ),
        pytest.param(
            "edit",
            "started composition composition_completed openai_editing openai_editing_completed"
            " face_swap face_swap_completed completed",
            id="edit with face swap",
        ),
        pytest.param(
            "edit",
            "started composition composition_completed openai_editing openai_editing_completed face_swap completed",
            id="edit with a failed face swap",
        ),
        pytest.param("generate", "started composition composition_completed ai_generation completed", id="generate"),
    ],
)
def test_the_declared_sequences_are_legal_from_end_to_end(kind: Kind, path: str) -> None:
    legal = {(move.source, move.status) for move in moves(kind)}
    assert set(pairwise([INITIAL, *path.split()])) <= legal
