"""The function in PostgreSQL that appends: it decides as the domain does, and waits for nobody that it need not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.append_rules import Accepted, Known, decide
from domain.errors import (
    AlreadyStarted,
    Conflict,
    IdempotencyMismatch,
    InsufficientCredit,
    LogUnavailable,
    Refusal,
    TooManyGenerations,
)
from domain.events import with_credit
from domain.ports.log import Append, IdempotencyRecord, Start
from support.builders import NOON, PROPERTY, EventRecorder, SteppableClock
from support.postgres import fresh_database, open_node

OUTCOMES: dict[str, type[Refusal]] = {
    "late": LogUnavailable,
    "mismatch": IdempotencyMismatch,
    "started": AlreadyStarted,
    "conflict": Conflict,
    "too_many": TooManyGenerations,
    "no_credit": InsufficientCredit,
}

small = st.integers(0, 2)
knowns = st.builds(
    Known,
    exists=st.booleans(),
    ended=st.booleans(),
    sequence=small,
    event_id=st.none() | small,
    idempotency_record=st.none() | st.builds(IdempotencyRecord, st.just("edit_1_b"), st.sampled_from(["one", "two"])),
    unfinished=small,
    credit=st.none() | small,
    reserved=st.booleans(),
)
starts = st.none() | st.builds(
    Start, st.just("edit"), st.just(b""), st.just("k"), st.sampled_from(["one", "two"]), small
)
appends = st.tuples(small, small, starts, st.none() | st.integers(-1, 1), st.booleans())


@pytest.fixture
async def decider() -> AsyncIterator[asyncpg.Connection]:
    async with fresh_database() as url, open_node(url):
        connection = await asyncpg.connect(url)
        yield connection
        await connection.close()


async def test_the_database_decides_as_the_domain_does(decider: asyncpg.Connection) -> None:
    """The order of the checks exists once per language."""
    cases: list[tuple[Append, Known, int | None, bool]] = []

    @settings(PROPERTY, max_examples=300)
    @given(appends, knowns, st.none() | small)
    def collect(append: tuple[Any, ...], known: Known, credits: int | None) -> None:
        sequence, event_id, start, change, late = append
        entry = Append(
            "ada", "edit_1_a", sequence, event_id, b'{"a":1}', "continue", NOON, credit=change, start=start,
            not_after=NOON if late else None,
        )  # fmt: skip
        cases.append((entry, known, credits, late))

    collect()
    function = f"stagecast.decide_v1({', '.join(f'${number}' for number in range(1, 18))})"
    statement = await decider.prepare(f"SELECT * FROM {function}")
    clock = SteppableClock()
    clock.step()
    for entry, known, credits, late in cases:
        begun = known.idempotency_record or (None, None)
        start = entry.start
        row = await statement.fetchrow(
            *(known.exists, known.ended, known.sequence, known.event_id, *begun, known.unfinished, known.credit),
            *(known.reserved, entry.sequence, entry.event_id, start is not None),
            *((start.fingerprint, start.max_unfinished) if start else (None, None)),
            *(entry.credit, late, credits),
        )
        decided: object = OUTCOMES.get(row["outcome"])
        if row["outcome"] == "accepted":
            event = with_credit(entry.event, row["credit"]) if row["shows_credit"] else entry.event
            decided = Accepted(event, row["credit"], row["reserved"])
        try:
            expected: object = decide(entry, known, credits=credits, clock=clock)
        except Refusal as refusal:
            expected = type(refusal)
        assert decided == expected, (entry, known, credits)
        assert (row["outcome"] == "again") is (expected is None)


async def test_appends_of_other_users_do_not_wait_for_a_locked_one() -> None:
    async with fresh_database() as url, open_node(url) as storage:
        recorder = EventRecorder(storage.log, SteppableClock())
        for user_id in ("ada", "cy", "dee", "bob"):
            await recorder.start(user_id)
        stranger = await asyncpg.connect(url)
        async with stranger.transaction():
            await stranger.execute("SELECT FROM stagecast.users WHERE user_id <> 'bob' FOR UPDATE")
            locked = [asyncio.create_task(recorder.start("ada")) for _ in range(3)]
            await asyncio.sleep(0.05)
            others = [asyncio.create_task(recorder.start(user_id)) for user_id in ("cy", "dee")]
            await asyncio.gather(*(recorder.start("bob") for _ in range(20)))
            assert not any(task.done() for task in locked + others)
        await asyncio.gather(*locked, *others)
        assert (await storage.log.feed("ada", after=0, anchor=0, limit=9)).head == 4
        await stranger.close()


async def test_who_has_given_up_waits_for_no_lock() -> None:
    """An append that is cancelled while others wait for their locks, and that is tried again once its own is free."""
    async with fresh_database() as url, open_node(url) as storage:
        recorder = EventRecorder(storage.log, SteppableClock())
        for user_id in ("ada", "bob"):
            await recorder.start(user_id)
        ada, bob = await asyncpg.connect(url), await asyncpg.connect(url)
        async with ada.transaction():
            await ada.execute("SELECT FROM stagecast.users WHERE user_id = 'ada' FOR UPDATE")
            locked = asyncio.create_task(recorder.start("ada"))
            async with bob.transaction():
                await bob.execute("SELECT FROM stagecast.users WHERE user_id = 'bob' FOR UPDATE")
                await asyncio.sleep(0.05)
                append, _ = recorder.prepare_start("bob")
                given_up = asyncio.create_task(storage.log.append(append))
                await asyncio.sleep(0.05)
                given_up.cancel()
            await storage.log.append(append)
            assert not locked.done()
        await locked
        for connection in (ada, bob):
            await connection.close()


async def test_a_locked_user_is_given_up_in_time_and_a_retry_succeeds_once() -> None:
    async with fresh_database() as url, open_node(url) as storage:
        recorder = EventRecorder(storage.log, SteppableClock())
        await recorder.start()
        append, _ = recorder.prepare_start()
        stranger = await asyncpg.connect(url)
        async with stranger.transaction():
            await stranger.execute("SELECT FROM stagecast.users WHERE user_id = 'ada' FOR UPDATE")
            async with asyncio.timeout(20):
                with pytest.raises(LogUnavailable):
                    await storage.log.append(append)
        await storage.log.append(append)
        await storage.log.append(append)
        assert (await storage.log.feed("ada", after=0, anchor=0, limit=9)).head == 2
        await stranger.close()


async def test_a_cancelled_append_is_not_cancelled_in_the_database() -> None:
    async with fresh_database() as url, open_node(url) as storage:
        recorder = EventRecorder(storage.log, SteppableClock())
        await recorder.start()
        append, _ = recorder.prepare_start()
        stranger = await asyncpg.connect(url)
        async with stranger.transaction():
            await stranger.execute("SELECT FROM stagecast.users WHERE user_id = 'ada' FOR UPDATE")
            task = asyncio.create_task(storage.log.append(append))
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while not await stranger.fetchval(waiting):
                await asyncio.sleep(0.01)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        async with asyncio.timeout(20):
            while (await storage.log.feed("ada", after=0, anchor=0, limit=9)).head < 2:
                await asyncio.sleep(0.01)
        await stranger.close()
