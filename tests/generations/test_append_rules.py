"""The checks of an append, in their order."""

from datetime import timedelta
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.append_rules import Accepted, Known, decide
from domain.errors import (
    AlreadyStarted,
    Conflict,
    IdempotencyMismatch,
    InsufficientCredit,
    LogUnavailable,
    TooManyGenerations,
)
from domain.ports.log import Append, IdempotencyRecord, Start
from support.builders import NOON, PROPERTY

START: Final = Start("edit", b"{}", "key", "same", 3)
LATE: Final = NOON + timedelta(seconds=1)
#: What is wrong with an append, in the order of the checks, and what comes of it.
FAULTS: Final = {
    "late": LogUnavailable,
    "key with another request": IdempotencyMismatch,
    "key used": AlreadyStarted,
    "sequence": Conflict,
    "exists": Conflict,
    "ended": Conflict,
    "too many": TooManyGenerations,
    "no credit": InsufficientCredit,
}


def start_with(faults: set[str]) -> tuple[Append, Known]:
    """A start with exactly these faults, and what the log has."""
    entry = Append("ada", "edit_1_a", 1, 7, b"{}", "generation_started", NOON, credit=-1, start=START)
    known = Known(unfinished=2, credit=1)
    if "late" in faults:
        entry = entry._replace(not_after=NOON)
    if "key used" in faults:
        known = known._replace(idempotency_record=IdempotencyRecord("edit_1_b", "same"))
    if "key with another request" in faults:
        known = known._replace(idempotency_record=IdempotencyRecord("edit_1_b", "other"))
    if "sequence" in faults:
        entry = entry._replace(sequence=3)
    if "exists" in faults:
        known = known._replace(exists=True)
    if "ended" in faults:
        known = known._replace(ended=True)
    if "too many" in faults:
        known = known._replace(unfinished=3)
    if "no credit" in faults:
        known = known._replace(credit=0)
    return entry, known


@given(faults=st.sets(st.sampled_from(list(FAULTS))))
@PROPERTY
def test_an_append_is_refused_for_the_first_fault_of_the_order(faults: set[str]) -> None:
    entry, known = start_with(faults)
    if not faults:
        accepted = Accepted(b'{,"credit":0}', 0, reserved=True)
        assert decide(entry, known, credits=100, clock=lambda: LATE) == accepted
        return
    first = next(expected for fault, expected in FAULTS.items() if fault in faults)
    with pytest.raises(first):
        decide(entry, known, credits=100, clock=lambda: LATE)


@given(faults=st.sets(st.sampled_from(list(FAULTS))))
@PROPERTY
def test_an_event_that_the_log_has_is_found_again_whatever_else_is_wrong(faults: set[str]) -> None:
    entry, known = start_with(faults)
    assert decide(entry, known._replace(event_id=7), credits=100, clock=lambda: LATE) is None


@given(
    kept=st.none() | st.integers(0, 5),
    credits=st.none() | st.integers(0, 5),
    change=st.none() | st.sampled_from([-1, 0, 1]),
    reserved=st.booleans(),
    begins=st.booleans(),
)
@PROPERTY
def test_a_balance_changes_only_where_the_start_took_a_credit_and_never_falls_below_zero(
    kept: int | None, credits: int | None, change: int | None, reserved: bool, begins: bool
) -> None:
    start, sequence = (START, 1) if begins else (None, 2)
    entry = Append("ada", "edit_1_a", sequence, 7, b'{"a":1}', "continue", NOON, credit=change, start=start)
    known = Known(exists=not begins, sequence=sequence - 1, credit=kept, reserved=reserved)
    counts = credits is not None if begins else reserved
    before = credits if kept is None else kept
    after = before if before is None or change is None or not counts else before + change
    if after is not None and after < 0:
        with pytest.raises(InsufficientCredit):
            decide(entry, known, credits=credits, clock=lambda: NOON)
        return
    accepted = decide(entry, known, credits=credits, clock=lambda: NOON)
    assert accepted is not None
    assert (accepted.credit, accepted.reserved) == (after, counts)
    shown = change is not None and credits is not None
    assert accepted.event == (b'{"a":1,"credit":%d}' % (after or 0) if shown else b'{"a":1}')
