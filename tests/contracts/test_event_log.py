"""The contract of `domain.ports.EventLog`: every adapter of it passes this suite."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest

from domain.errors import (
    AlreadyStarted,
    Conflict,
    CreditsOff,
    IdempotencyMismatch,
    InsufficientCredit,
    LogUnavailable,
    NotFinished,
    Refusal,
    TooManyGenerations,
)
from domain.feed import Cursor, Feed, Logged
from domain.ports import Begun, EventLog, Gap
from support.builders import LOGS, Heard, OpenLog, Scribe, SteppableClock, anonymous, bodies, body, statuses


class Opener:
    """Opens logs of the adapter under test, which are closed when the test is over."""

    def __init__(self, factory: OpenLog, stack: AsyncExitStack, clock: SteppableClock) -> None:
        self._factory = factory
        self._stack = stack
        self.clock = clock

    async def __call__(self, *, credits: int | None = 100, epoch: str = "e1", outbox: bool = False) -> Scribe:
        opened = self._factory(clock=self.clock, credits=credits, epoch=epoch, outbox=outbox)
        return Scribe(await self._stack.enter_async_context(opened), self.clock)


@pytest.fixture(params=list(LOGS))
async def opener(request: pytest.FixtureRequest) -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:
        yield Opener(LOGS[request.param], stack, SteppableClock())


@pytest.fixture
async def scribe(opener: Opener) -> Scribe:
    return await opener()


@pytest.fixture
def log(scribe: Scribe) -> EventLog:
    return scribe.log


async def race(*attempts: Awaitable[Logged]) -> tuple[list[Logged], list[Refusal]]:
    """Those that won and those that were refused; anything else is raised."""
    results = await asyncio.gather(*attempts, return_exceptions=True)
    for result in results:
        if not isinstance(result, Logged | Refusal):
            assert isinstance(result, BaseException)
            raise result
    return (
        [result for result in results if isinstance(result, Logged)],
        [result for result in results if isinstance(result, Refusal)],
    )


async def whole_feed(log: EventLog, user_id: str = "ada") -> Feed:
    return await log.feed(user_id, after=0, anchor=0, limit=10_000)


async def image(log: EventLog, user_id: str, *generation_ids: str) -> object:
    """Everything that a log tells about a user: to see that nothing has happened."""
    return (
        await whole_feed(log, user_id),
        await log.credit(user_id),
        await log.generations(user_id, limit=1_000),
        [await log.generation(generation_id) for generation_id in generation_ids],
        await log.unfinished(),
        await log.head_cursor(user_id),
    )


def places(entries: Iterable[Logged]) -> list[tuple[str, int]]:
    return [(entry.generation_id, entry.sequence) for entry in entries]


async def test_standing_tells_the_balance_and_what_is_unfinished(scribe: Scribe, log: EventLog) -> None:
    assert await log.standing("ada") == (100, 0)
    await scribe.start()
    one = await scribe.start()
    assert await log.standing("ada") == (98, 2)
    await scribe.finish(one)
    assert await log.standing("ada") == (98, 1)
    assert await log.standing("bob") == (100, 0)


# --- one event after another -----------------------------------------------------------------------------


async def test_an_append_returns_the_entry_that_everybody_reads(scribe: Scribe, log: EventLog) -> None:
    append, _ = scribe.prepare_start()
    logged = await log.append(append)
    assert logged == Logged(
        "ada", 1, append.event_id, append.generation_id, 1, "generation_started", logged.event, 1, None
    )
    assert body(logged)["credit"] == 99
    history = await log.generation(append.generation_id)
    assert history is not None
    assert list(history.events) == [logged]
    assert list((await whole_feed(log)).entries) == [logged]


async def test_a_generation_reads_back_as_it_was_written(scribe: Scribe, log: EventLog) -> None:
    generation = await scribe.whole("ada", "edit", face_swap=True)
    history = await log.generation(generation.generation_id)
    assert history is not None
    assert (history.user_id, history.generation_id, history.kind) == ("ada", generation.generation_id, "edit")
    assert b'"face_swap":true' in history.order
    assert [event["sequence"] for event in bodies(history)] == list(range(1, 9))
    assert [entry.sequence for entry in history.events] == list(range(1, 9))
    assert [entry.name for entry in history.events] == [
        "generation_started", *["continue"] * 6, "generation_completed"
    ]  # fmt: skip
    assert {(entry.first, entry.end) for entry in history.events} == {(1, 8)}


async def test_whether_the_last_stage_is_free_is_read_back_and_can_be_withdrawn(scribe: Scribe, log: EventLog) -> None:
    async def read() -> set[bool]:
        history = await log.generation(generation.generation_id)
        assert history is not None
        return {each.free for each in (history, *await log.unfinished(), *await log.generations("ada", limit=9))}

    generation = await scribe.move(await scribe.start(), "composition", "composition_completed")
    assert await read() == {False}
    generation = await scribe.move(generation, "openai_editing", free=True)
    assert await read() == {True}
    append, generation = scribe.prepare(generation, "openai_editing", free=True, progress=70)
    await log.append(append)
    await log.append(append)
    assert await read() == {True}
    await log.mark_paid(generation.generation_id)
    assert await read() == {False}
    generation = await scribe.move(generation, "openai_editing", free=True, progress=75)
    assert await read() == {True}
    await scribe.move(generation, "openai_editing_completed")
    assert await read() == {False}
    await log.mark_paid("edit_1_there_is_none")


async def test_only_the_next_sequence_is_taken(scribe: Scribe, log: EventLog) -> None:
    generation = await scribe.start()
    append, _ = scribe.prepare(generation, "composition")
    before = await image(log, "ada", generation.generation_id)
    for sequence in (0, 1, 3, 4, 100):
        with pytest.raises(Conflict) as refusal:
            await log.append(replace(append, sequence=sequence))
        assert (refusal.value.proposed, refusal.value.actual) == (sequence, 1)
    assert await image(log, "ada", generation.generation_id) == before
    await log.append(append)


async def test_nothing_follows_the_terminal_event(scribe: Scribe, log: EventLog) -> None:
    running = await scribe.start()
    await scribe.move(running, "failed")
    append, _ = scribe.prepare(running, "composition")
    before = await image(log, "ada", running.generation_id)
    for sequence in (2, 3):
        with pytest.raises(Conflict) as refusal:
            await log.append(replace(append, sequence=sequence))
        assert refusal.value.actual == 2
    assert await image(log, "ada", running.generation_id) == before


async def test_a_generation_that_never_started_takes_no_event(scribe: Scribe, log: EventLog) -> None:
    _, unborn = scribe.prepare_start()
    append, _ = scribe.prepare(unborn, "composition")
    for sequence in (1, 2):
        with pytest.raises(Conflict) as refusal:
            await log.append(replace(append, sequence=sequence))
        assert refusal.value.actual == 0
    assert await log.generation(unborn.generation_id) is None
    assert (await whole_feed(log)).head == 0


async def test_an_id_that_is_taken_cannot_be_started_again(scribe: Scribe, log: EventLog) -> None:
    append, _ = scribe.prepare_start()
    await log.append(append)
    for user_id in ("ada", "bob"):
        with pytest.raises(Conflict):
            await log.append(replace(anonymous(append, 7), user_id=user_id))
    assert (await log.credit("ada"), await log.credit("bob")) == (99, 100)


# --- many writers ----------------------------------------------------------------------------------------


async def test_of_fifty_writers_of_one_sequence_one_wins_and_the_others_conflict(scribe: Scribe, log: EventLog) -> None:
    generation = await scribe.start()
    appends = [scribe.prepare(generation, "composition")[0] for _ in range(50)]
    won, refused = await race(*map(log.append, appends))
    assert len(won) == 1
    assert [type(refusal) for refusal in refused] == [Conflict] * 49
    history = await log.generation(generation.generation_id)
    assert statuses(history) == ["started", "composition"]
    assert history is not None
    assert history.events[1] == won[0]


async def test_two_writers_with_equal_bytes_are_two_writers(scribe: Scribe, log: EventLog) -> None:
    generation = await scribe.start()
    append, _ = scribe.prepare(generation, "composition")
    await log.append(append)
    with pytest.raises(Conflict):
        await log.append(anonymous(append, append.event_id ^ 1))


async def test_of_a_cancel_and_a_completion_that_race_one_is_the_end(scribe: Scribe, log: EventLog) -> None:
    generation = await scribe.move(await scribe.start(), "composition", "composition_completed", "openai_editing")
    generation = await scribe.move(generation, "openai_editing_completed")
    racers = [scribe.prepare(generation, status)[0] for status in ("completed", "failed")]
    won, refused = await race(*map(log.append, racers))
    assert (len(won), len(refused)) == (1, 1)
    told = statuses(await log.generation(generation.generation_id))
    assert [status for status in told if status in ("completed", "failed")] == told[-1:]
    assert await log.credit("ada") == (100 if told[-1] == "failed" else 99)


# --- a reply that was lost -------------------------------------------------------------------------------


async def test_an_append_tried_again_is_one_entry_and_succeeds(scribe: Scribe, log: EventLog) -> None:
    generation = await scribe.start()
    append, _ = scribe.prepare(generation, "composition")
    logged = await log.append(append)
    before = await image(log, "ada", generation.generation_id)
    assert await log.append(append) == logged
    assert await image(log, "ada", generation.generation_id) == before


async def test_it_succeeds_also_after_somebody_appended_the_next(scribe: Scribe, log: EventLog) -> None:
    append, generation = scribe.prepare(await scribe.start(), "composition")
    logged = await log.append(append)
    await scribe.move(generation, "composition_completed", "openai_editing")
    before = await image(log, "ada", generation.generation_id)
    assert await log.append(append) == logged
    assert await image(log, "ada", generation.generation_id) == before
    await scribe.move(await scribe.start(), "composition")


async def test_it_succeeds_also_after_the_generation_has_ended(scribe: Scribe, log: EventLog) -> None:
    append, generation = scribe.prepare(await scribe.start(), "composition")
    logged = await log.append(append)
    ended = await scribe.finish(generation)
    assert await log.append(append) == logged._replace(end=ended.sequence)


async def test_the_terminal_append_tried_again_refunds_once(scribe: Scribe, log: EventLog) -> None:
    generation = await scribe.start()
    append, _ = scribe.prepare(generation, "failed")
    logged = await log.append(append)
    assert await log.append(append) == logged
    assert await log.credit("ada") == 100
    assert statuses(await log.generation(generation.generation_id)) == ["started", "failed"]


@pytest.mark.parametrize("key", [None, "k"])
async def test_the_first_append_tried_again_debits_once(opener: Opener, key: str | None) -> None:
    scribe = await opener(credits=1)
    append, generation = scribe.prepare_start(key=key, max_unfinished=1)
    logged = await scribe.log.append(append)
    assert await scribe.log.append(append) == logged
    assert await scribe.log.credit("ada") == 0
    await scribe.move(generation, "composition")
    assert await scribe.log.append(append) == logged
    assert (await whole_feed(scribe.log)).head == 2


async def test_retries_that_race_with_their_own_first_try_are_one_entry(scribe: Scribe, log: EventLog) -> None:
    append, _ = scribe.prepare(await scribe.start(), "composition")
    won, refused = await race(*(log.append(append) for _ in range(20)))
    assert refused == []
    assert len(won) == 20
    assert len(set(won)) == 1
    assert (await whole_feed(log)).head == 2


async def test_a_retry_at_another_sequence_is_another_event(scribe: Scribe, log: EventLog) -> None:
    append, generation = scribe.prepare(await scribe.start(), "composition")
    await log.append(append)
    with pytest.raises(Conflict):
        await log.append(replace(append, sequence=1))
    other, _ = scribe.prepare(generation, "composition_completed")
    await log.append(replace(other, event_id=append.event_id))
    assert (await whole_feed(log)).head == 3


# --- too late --------------------------------------------------------------------------------------------


async def test_an_append_later_than_it_may_be_is_refused_and_nothing_comes_to_life(
    scribe: Scribe, log: EventLog
) -> None:
    append, _ = scribe.prepare_start(key="k", not_after=scribe.clock() + timedelta(seconds=5))
    before = await image(log, "ada", append.generation_id)
    scribe.clock.step(5.001)
    for _ in range(2):
        with pytest.raises(LogUnavailable):
            await log.append(append)
    assert await image(log, "ada", append.generation_id) == before
    assert await log.begun("ada", "k") is None


async def test_an_append_just_in_time_is_taken(scribe: Scribe, log: EventLog) -> None:
    append, _ = scribe.prepare_start(not_after=scribe.clock() + timedelta(seconds=5))
    scribe.clock.step(5)
    await log.append(append)


async def test_an_entry_that_is_in_the_log_is_recognised_however_late(scribe: Scribe, log: EventLog) -> None:
    append, _ = scribe.prepare_start(not_after=scribe.clock() + timedelta(seconds=5))
    logged = await log.append(append)
    scribe.clock.step(3_600)
    assert await log.append(append) == logged
    assert await log.credit("ada") == 99


# --- the order of the checks -----------------------------------------------------------------------------


async def test_refusals_come_in_the_declared_order(opener: Opener) -> None:
    scribe = await opener(credits=1)
    log = scribe.log
    first, _ = scribe.prepare_start(key="k", fingerprint="one")
    await log.append(first)
    assert first.start is not None
    late = scribe.clock() - timedelta(seconds=1)
    mismatch = replace(first.start, fingerprint="two", max_unfinished=1)
    keyless = replace(mismatch, key=None)

    # Everything is wrong at once, and then one thing less at a time.
    wrong = replace(anonymous(first, 5), sequence=9, not_after=late, start=mismatch)
    before = await image(log, "ada", first.generation_id)
    with pytest.raises(LogUnavailable):
        await log.append(wrong)
    with pytest.raises(IdempotencyMismatch):
        await log.append(replace(wrong, not_after=None))
    with pytest.raises(AlreadyStarted):
        await log.append(replace(wrong, not_after=None, start=replace(mismatch, fingerprint="one")))
    with pytest.raises(Conflict):
        await log.append(replace(wrong, not_after=None, start=keyless))
    fresh = replace(wrong, not_after=None, start=keyless, generation_id="edit_1_fresh", sequence=1)
    with pytest.raises(TooManyGenerations):
        await log.append(fresh)
    with pytest.raises(InsufficientCredit):
        await log.append(replace(fresh, start=replace(keyless, max_unfinished=2)))
    assert await image(log, "ada", first.generation_id) == before
    assert await log.generation("edit_1_fresh") is None


# --- positions and sequences -----------------------------------------------------------------------------


async def test_positions_are_contiguous_per_user_and_sequences_per_generation(scribe: Scribe, log: EventLog) -> None:
    async def live(user_id: str) -> None:
        for _ in range(3):
            await scribe.whole(user_id)
            await asyncio.sleep(0)

    await asyncio.gather(*(live(user_id) for user_id in ("ada", "ada", "bob", "cy")))
    for user_id, generations in (("ada", 6), ("bob", 3), ("cy", 3)):
        feed = await whole_feed(log, user_id)
        assert [entry.position for entry in feed.entries] == list(range(1, generations * 6 + 1))
        assert (feed.head, feed.upto) == (generations * 6, generations * 6)
        assert {entry.user_id for entry in feed.entries} == {user_id}
        for history in await log.generations(user_id, limit=100):
            assert [entry.sequence for entry in history.events] == [1, 2, 3, 4, 5, 6]
            positions = [entry.position for entry in history.events]
            assert positions == sorted(positions)


async def test_interleaved_generations_share_one_feed_in_the_order_of_their_appends(
    scribe: Scribe, log: EventLog
) -> None:
    one, two = await scribe.start(), await scribe.start()
    two = await scribe.move(two, "composition")
    one = await scribe.move(one, "failed")
    await scribe.move(two, "composition_completed")
    a, b = one.generation_id, two.generation_id
    assert places((await whole_feed(log)).entries) == [(a, 1), (b, 1), (b, 2), (a, 2), (b, 3)]
    assert [entry.end for entry in (await whole_feed(log)).entries] == [4, None, None, 4, None]
    assert [entry.first for entry in (await whole_feed(log)).entries] == [1, 2, 2, 1, 2]


# --- credit ----------------------------------------------------------------------------------------------


async def test_a_credit_is_reserved_at_the_start_and_kept_by_a_completion(scribe: Scribe, log: EventLog) -> None:
    assert await log.credit("ada") == 100
    generation = await scribe.start()
    assert await log.credit("ada") == 99
    await scribe.finish(generation)
    assert await log.credit("ada") == 99
    told = bodies(await log.generation(generation.generation_id))
    assert [event.get("credit") for event in told] == [99, None, None, None, None, 99]


async def test_a_failure_gives_the_credit_back(scribe: Scribe, log: EventLog) -> None:
    generation = await scribe.start()
    await scribe.move(generation, "composition", "failed")
    assert await log.credit("ada") == 100
    told = bodies(await log.generation(generation.generation_id))
    assert [event.get("credit") for event in told] == [99, None, 100]
    assert list(told[-1])[-1] == "credit"


async def test_without_credit_nothing_starts_and_nothing_changes(opener: Opener) -> None:
    scribe = await opener(credits=0)
    append, _ = scribe.prepare_start(key="k")
    before = await image(scribe.log, "ada", append.generation_id)
    with pytest.raises(InsufficientCredit):
        await scribe.log.append(append)
    assert await image(scribe.log, "ada", append.generation_id) == before
    assert await scribe.log.begun("ada", "k") is None


async def test_of_two_starts_that_race_for_the_last_credit_one_is_taken(opener: Opener) -> None:
    scribe = await opener(credits=1)
    won, refused = await race(*(scribe.log.append(scribe.prepare_start()[0]) for _ in range(2)))
    assert len(won) == 1
    assert [type(refusal) for refusal in refused] == [InsufficientCredit]
    assert await scribe.log.credit("ada") == 0
    assert (await whole_feed(scribe.log)).head == 1


async def test_a_refunded_credit_can_be_spent_again(opener: Opener) -> None:
    scribe = await opener(credits=1)
    for _ in range(3):
        await scribe.short()
    assert await scribe.log.credit("ada") == 1


async def test_balances_of_users_are_their_own(scribe: Scribe, log: EventLog) -> None:
    await scribe.start("ada")
    await scribe.start("ada")
    await scribe.start("bob")
    assert [await log.credit(user_id) for user_id in ("ada", "bob", "cy")] == [98, 99, 100]


async def test_where_no_balances_are_kept_no_event_shows_one_and_nobody_runs_out(opener: Opener) -> None:
    scribe = await opener(credits=None)
    generations = [await scribe.whole() for _ in range(3)] + [await scribe.short()]
    assert await scribe.log.credit("ada") is None
    for generation in generations:
        assert not [
            event for event in bodies(await scribe.log.generation(generation.generation_id)) if "credit" in event
        ]


# --- idempotency keys ------------------------------------------------------------------------------------


async def test_of_twenty_racing_starts_with_one_key_one_begins_and_pays(scribe: Scribe, log: EventLog) -> None:
    appends = [scribe.prepare_start(key="k")[0] for _ in range(20)]
    won, refused = await race(*map(log.append, appends))
    assert len(won) == 1
    assert {type(refusal) for refusal in refused} == {AlreadyStarted}
    assert {refusal.generation_id for refusal in refused if isinstance(refusal, AlreadyStarted)} == {
        won[0].generation_id
    }
    assert len(refused) == 19
    assert await log.credit("ada") == 99
    assert len(await log.generations("ada", limit=100)) == 1
    assert await log.begun("ada", "k") == Begun(won[0].generation_id, "same")


async def test_a_key_with_another_request_is_a_mismatch_and_changes_nothing(scribe: Scribe, log: EventLog) -> None:
    await scribe.start(key="k", fingerprint="one")
    append, _ = scribe.prepare_start(key="k", fingerprint="two")
    before = await image(log, "ada", append.generation_id)
    with pytest.raises(IdempotencyMismatch):
        await log.append(append)
    assert await image(log, "ada", append.generation_id) == before


async def test_a_key_is_its_users_own(scribe: Scribe, log: EventLog) -> None:
    ada = await scribe.start("ada", key="k", fingerprint="one")
    assert await log.begun("bob", "k") is None
    bob = await scribe.start("bob", key="k", fingerprint="two")
    assert await log.begun("ada", "k") == Begun(ada.generation_id, "one")
    assert await log.begun("bob", "k") == Begun(bob.generation_id, "two")
    assert await log.begun("ada", "other") is None


@pytest.mark.parametrize("retention", [True, False])
async def test_a_key_outlives_the_end_of_its_generation_and_dies_with_its_removal(
    scribe: Scribe, log: EventLog, retention: bool
) -> None:
    first = await scribe.short(key="k", fingerprint="one")
    with pytest.raises(AlreadyStarted):
        await scribe.start(key="k", fingerprint="one")
    assert await log.remove(first.generation_id, retention=retention)
    assert await log.begun("ada", "k") is None
    second = await scribe.start(key="k", fingerprint="two")
    assert await log.begun("ada", "k") == Begun(second.generation_id, "two")


# --- how many at once ------------------------------------------------------------------------------------


async def test_no_more_than_allowed_are_unfinished_however_many_race(scribe: Scribe, log: EventLog) -> None:
    appends = [scribe.prepare_start(max_unfinished=3)[0] for _ in range(20)]
    won, refused = await race(*map(log.append, appends))
    assert len(won) == 3
    assert [type(refusal) for refusal in refused] == [TooManyGenerations] * 17
    assert await log.credit("ada") == 97
    assert len(await log.unfinished()) == 3


async def test_the_end_of_one_makes_room_for_the_next_and_others_do_not_count(scribe: Scribe, log: EventLog) -> None:
    one = await scribe.start(max_unfinished=1)
    with pytest.raises(TooManyGenerations):
        await scribe.start(max_unfinished=1)
    await scribe.start("bob", max_unfinished=1)
    await scribe.move(one, "failed")
    await scribe.start(max_unfinished=1)


# --- followers -------------------------------------------------------------------------------------------


async def heard(follower: Heard, count: int) -> list[Logged]:
    return await follower.until(lambda entries: len(entries) >= count)


async def test_a_follower_hears_every_entry_once_in_order_while_appends_run(scribe: Scribe, log: EventLog) -> None:
    follower = Heard()

    async def live(user_id: str) -> None:
        for _ in range(10):
            await scribe.whole(user_id)
            await asyncio.sleep(0)

    async with log.follow(follower):
        await asyncio.gather(*(live(user_id) for user_id in ("ada", "ada", "bob")))
        await heard(follower, 180)
    for user_id, count in (("ada", 120), ("bob", 60)):
        told = [entry for entry in follower.entries if entry.user_id == user_id]
        assert [entry.position for entry in told] == list(range(1, count + 1))
        kept = (await whole_feed(log, user_id)).entries
        assert [entry.event for entry in told] == [entry.event for entry in kept]
        assert [entry.event_id for entry in told] == [entry.event_id for entry in kept]


async def test_a_follower_hears_the_entry_as_it_was_at_the_append(scribe: Scribe, log: EventLog) -> None:
    follower = Heard()
    async with log.follow(follower):
        append, generation = scribe.prepare_start()
        logged = [await log.append(append)]
        append, _ = scribe.prepare(generation, "failed")
        logged.append(await log.append(append))
        assert await heard(follower, 2) == logged
    assert [(entry.first, entry.end) for entry in logged] == [(1, None), (1, 2)]


async def test_between_a_read_and_what_is_heard_there_is_no_gap(scribe: Scribe, log: EventLog) -> None:
    async def write() -> None:
        for _ in range(30):
            await scribe.whole()
            await asyncio.sleep(0)

    async def attach(after: int) -> None:
        follower = Heard()
        async with log.follow(follower):
            read = [entry.position for entry in (await whole_feed(log)).entries]
            await heard(follower, after)
            live = [entry.position for entry in follower.entries]
            assert live == list(range(live[0], live[0] + len(live)))
            assert live[0] <= (read[-1] if read else 0) + 1

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        for after in range(1, 12):
            await asyncio.sleep(0)
            group.create_task(attach(after))


async def test_a_follower_that_raises_undoes_nothing_and_stops_nobody(
    scribe: Scribe, log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = Heard(), Heard()
    tries: list[Logged | Gap] = []

    def broken(entry: Logged | Gap) -> None:
        tries.append(entry)
        raise RuntimeError("a secret")

    async with log.follow(before), log.follow(broken), log.follow(after):
        generation = await scribe.whole()
        assert len(await heard(before, 6)) == len(await heard(after, 6)) == 6
    assert len(tries) == 6
    assert statuses(await log.generation(generation.generation_id))[-1] == "completed"
    assert caplog.records
    assert "a secret" not in caplog.text


async def test_who_has_left_hears_nothing_more_and_who_stays_does(scribe: Scribe, log: EventLog) -> None:
    leaving, staying = Heard(), Heard()
    async with log.follow(staying):
        async with log.follow(leaving):
            await scribe.start()
            await heard(leaving, 1)
        await scribe.start()
        await heard(staying, 2)
    assert len(leaving.entries) == 1


async def test_refused_and_repeated_appends_are_not_heard(scribe: Scribe, log: EventLog) -> None:
    append, generation = scribe.prepare_start()
    await log.append(append)
    follower = Heard()
    async with log.follow(follower):
        await log.append(append)
        with pytest.raises(Conflict):
            await log.append(anonymous(append, 1))
        await scribe.move(generation, "composition")
        await heard(follower, 1)
    assert [entry.sequence for entry in follower.entries] == [2]


# --- the feed --------------------------------------------------------------------------------------------


async def test_an_unknown_user_has_an_empty_feed(log: EventLog) -> None:
    feed = await log.feed("nobody", after=0, anchor=0, limit=10)
    assert (list(feed.entries), feed.upto, feed.head, feed.floor, [*feed.deleted_spans]) == ([], 0, 0, 0, [])
    assert feed.anchor_id is not None
    assert (await log.feed("nobody", after=0, anchor=1, limit=10)).anchor_id is None


async def test_pages_of_any_size_tell_the_whole_feed_once_in_order(scribe: Scribe, log: EventLog) -> None:
    for _ in range(3):
        await scribe.whole()
    every = list((await whole_feed(log)).entries)
    assert len(every) == 18
    for limit in (1, 2, 5, 17, 18, 19, 1_000):
        told: list[Logged] = []
        after = 0
        while True:
            feed = await log.feed("ada", after=after, anchor=0, limit=limit)
            assert len(feed.entries) <= limit
            assert feed.head == 18
            told += feed.entries
            if feed.upto == feed.head:
                break
            assert feed.upto > after
            after = feed.upto
        assert told == every


async def test_a_read_without_room_tells_only_what_lies_around(scribe: Scribe, log: EventLog) -> None:
    await scribe.whole()
    feed = await log.feed("ada", after=2, anchor=4, limit=0)
    ids = [entry.event_id for entry in (await whole_feed(log)).entries]
    assert (list(feed.entries), feed.upto, feed.head, feed.anchor_id) == ([], 2, 6, ids[3])


async def test_the_anchor_of_every_position_is_the_id_of_its_event(scribe: Scribe, log: EventLog) -> None:
    await scribe.whole()
    for entry in (await whole_feed(log)).entries:
        feed = await log.feed("ada", after=0, anchor=entry.position, limit=0)
        assert (feed.anchor_id, [*feed.deleted_spans]) == (entry.event_id, [])
    for beyond in (7, 8, 1_000_000):
        assert (await log.feed("ada", after=0, anchor=beyond, limit=0)).anchor_id is None


async def test_the_id_before_the_first_event_is_the_users_the_epochs_and_stays(opener: Opener) -> None:
    one, two = await opener(epoch="one"), await opener(epoch="two")

    async def zero(scribe: Scribe, user_id: str) -> int | None:
        return (await scribe.log.feed(user_id, after=0, anchor=0, limit=0)).anchor_id

    ids = [await zero(scribe, user_id) for scribe in (one, two) for user_id in ("ada", "bob")]
    assert len(set(ids)) == 4
    assert None not in ids
    await one.start("ada")
    assert await zero(one, "ada") == ids[0]
    assert (one.log.epoch, two.log.epoch) == ("one", "two")


async def test_a_read_beyond_the_head_finds_nothing(scribe: Scribe, log: EventLog) -> None:
    await scribe.start()
    feed = await log.feed("ada", after=5, anchor=0, limit=10)
    assert (list(feed.entries), feed.head) == ([], 1)


# --- the present -----------------------------------------------------------------------------------------


async def pull(log: EventLog, user_id: str, cursor: Cursor, limit: int = 1_000) -> tuple[list[Logged], Cursor]:
    """Everything wanted behind a cursor that has to be usable."""
    told: list[Logged] = []
    while True:
        feed = await log.feed(user_id, after=cursor.seen, anchor=cursor.live, limit=limit)
        assert cursor.usable(feed)
        wanted, cursor = cursor.advance(feed)
        told += [entry for entry, _ in wanted]
        if feed.upto >= feed.head:
            return told, cursor


async def usable(log: EventLog, user_id: str, cursor: Cursor) -> bool:
    return cursor.usable(await log.feed(user_id, after=cursor.seen, anchor=cursor.live, limit=0))


async def test_the_present_of_nobody_is_where_their_first_event_will_come(scribe: Scribe, log: EventLog) -> None:
    cursor = await log.head_cursor("ada")
    assert (cursor.live, cursor.seen) == (0, 0)
    generation = await scribe.start()
    told, _ = await pull(log, "ada", cursor)
    assert places(told) == [(generation.generation_id, 1)]


async def test_the_present_holds_what_still_runs_and_nothing_that_has_ended(scribe: Scribe, log: EventLog) -> None:
    await scribe.whole()
    running = await scribe.move(await scribe.start(), "composition")
    await scribe.whole()
    cursor = await log.head_cursor("ada")
    assert (cursor.live, cursor.seen) == (14, 6)
    told, behind = await pull(log, "ada", cursor)
    assert places(told) == [(running.generation_id, 1), (running.generation_id, 2)]
    assert (behind.live, behind.seen) == (14, 14)


async def test_the_present_of_a_user_with_nothing_running_is_the_head(scribe: Scribe, log: EventLog) -> None:
    ended = await scribe.whole()
    cursor = await log.head_cursor("ada")
    assert (cursor.live, cursor.seen) == (6, 6)
    assert await usable(log, "ada", cursor)
    assert not await usable(log, "bob", cursor)
    assert (await pull(log, "ada", cursor))[0] == []
    assert await log.remove(ended.generation_id, retention=True)
    assert await usable(log, "ada", await log.head_cursor("ada"))


# --- what is yet to be told ------------------------------------------------------------------------------


async def test_ends_are_kept_in_their_order_until_they_have_been_told(opener: Opener) -> None:
    scribe = await opener(outbox=True)
    log = scribe.log
    slow = await scribe.start("ada")
    quick = await scribe.whole("bob", face_swap=True)
    slow = await scribe.move(slow, "failed")
    last = await scribe.short("ada")
    await scribe.start("ada")
    ends = []
    for generation in (quick, slow, last):
        history = await log.generation(generation.generation_id)
        assert history is not None
        ends.append(history.events[-1])
    assert list(await log.undelivered(10)) == ends
    assert list(await log.undelivered(2)) == ends[:2]
    assert list(await log.undelivered(0)) == []
    await log.delivered(slow.generation_id)
    assert list(await log.undelivered(10)) == [ends[0], ends[2]]
    for generation in (quick, slow, last):
        await log.delivered(generation.generation_id)
    assert list(await log.undelivered(10)) == []
    assert (await log.generation(last.generation_id)) is not None


async def test_an_end_that_was_told_is_not_to_be_told_again_because_its_append_is_tried_again(opener: Opener) -> None:
    scribe = await opener(outbox=True)
    append, generation = scribe.prepare(await scribe.start(), "failed")
    await scribe.log.append(append)
    await scribe.log.append(append)
    assert len(await scribe.log.undelivered(10)) == 1
    await scribe.log.delivered(generation.generation_id)
    await scribe.log.append(append)
    assert list(await scribe.log.undelivered(10)) == []


@pytest.mark.parametrize("retention", [True, False])
async def test_what_is_removed_is_not_told_any_more(opener: Opener, retention: bool) -> None:
    scribe = await opener(outbox=True)
    gone, kept = await scribe.short(), await scribe.short()
    assert await scribe.log.remove(gone.generation_id, retention=retention)
    assert [entry.generation_id for entry in await scribe.log.undelivered(10)] == [kept.generation_id]
    await scribe.log.delivered(gone.generation_id)
    await scribe.log.delivered("edit_1_unknown")
    assert [entry.generation_id for entry in await scribe.log.undelivered(10)] == [kept.generation_id]


async def test_without_an_outbox_nothing_is_to_be_told(scribe: Scribe, log: EventLog) -> None:
    generation = await scribe.short()
    assert list(await log.undelivered(10)) == []
    await log.delivered(generation.generation_id)


# --- removal ---------------------------------------------------------------------------------------------

retentions = pytest.mark.parametrize("retention", [True, False])


@retentions
async def test_what_was_removed_answers_as_one_that_never_was(scribe: Scribe, log: EventLog, retention: bool) -> None:
    ended, other = await scribe.whole(key="k"), await scribe.whole()
    credit = await log.credit("ada")
    assert await log.remove(ended.generation_id, retention=retention) is True
    assert await log.generation(ended.generation_id) is None
    assert [history.generation_id for history in await log.generations("ada", limit=10)] == [other.generation_id]
    assert await log.begun("ada", "k") is None
    kept = [entry for entry in (await whole_feed(log)).entries if entry.event is not None]
    assert {entry.generation_id for entry in kept} == {other.generation_id}
    assert await log.credit("ada") == credit
    assert await log.remove(ended.generation_id, retention=retention) is False
    append, _ = scribe.prepare(await scribe.start(), "composition")
    with pytest.raises(Conflict) as refusal:
        await log.append(replace(append, generation_id=ended.generation_id, sequence=7))
    assert refusal.value.actual == 0


@retentions
async def test_what_never_was_cannot_be_removed(log: EventLog, retention: bool) -> None:
    assert await log.remove("edit_1_unknown", retention=retention) is False


@pytest.mark.parametrize("strange", ["", "edit_1_\ud800", "a\x00b", "'; DROP TABLE users; --", "%", "x" * 60_000])
async def test_any_text_may_be_asked_for(scribe: Scribe, log: EventLog, strange: str) -> None:
    await scribe.short()
    before = await image(log, "ada")
    assert await log.generation(strange) is None
    assert await log.remove(strange, retention=False) is False
    assert await image(log, "ada") == before


@pytest.mark.parametrize("user_id", ["'", '"; --', "Ünï 🎨 : % * {}", "ADA", "ada ", "e\u0301", "1" * 128])
async def test_a_user_may_have_any_name_and_none_is_taken_for_another(
    scribe: Scribe, log: EventLog, user_id: str
) -> None:
    await scribe.short("ada", key="k")
    running = await scribe.start(user_id, key="k")
    assert [entry.user_id for entry in (await whole_feed(log, user_id)).entries] == [user_id]
    assert [history.generation_id for history in await log.generations(user_id, limit=10)] == [running.generation_id]
    assert (await log.credit("ada"), await log.credit(user_id)) == (100, 99)


@retentions
async def test_what_still_runs_is_not_removed(scribe: Scribe, log: EventLog, retention: bool) -> None:
    running = await scribe.start()
    before = await image(log, "ada", running.generation_id)
    with pytest.raises(NotFinished):
        await log.remove(running.generation_id, retention=retention)
    assert await image(log, "ada", running.generation_id) == before


async def test_retention_raises_the_floor_to_the_last_purged_position(scribe: Scribe, log: EventLog) -> None:
    one, two, _ = [await scribe.short() for _ in range(3)]
    assert await log.remove(one.generation_id, retention=True)
    assert (await whole_feed(log)).floor == 2
    assert await log.remove(two.generation_id, retention=True)
    feed = await whole_feed(log)
    assert (feed.floor, feed.head) == (4, 6)
    assert [entry.position for entry in feed.entries] == [5, 6]


async def test_the_places_of_a_deleted_one_are_forgotten_when_retention_would_have_purged_it(
    scribe: Scribe, log: EventLog
) -> None:
    gone, _ = await scribe.short(), await scribe.short()
    assert await log.remove(gone.generation_id, retention=False)
    assert (await whole_feed(log)).floor == 0
    assert gone.generation_id in await log.finished_before(scribe.clock.step(), 10)
    assert await log.remove(gone.generation_id, retention=True)
    feed = await whole_feed(log)
    assert feed.floor == 2
    assert [entry.position for entry in feed.entries] == [3, 4]
    assert gone.generation_id not in await log.finished_before(scribe.clock.step(), 10)
    assert await log.remove(gone.generation_id, retention=True) is False


async def test_retention_never_lowers_the_floor(scribe: Scribe, log: EventLog) -> None:
    one, two = await scribe.short(), await scribe.short()
    assert await log.remove(two.generation_id, retention=True)
    ids = (await log.feed("ada", after=0, anchor=4, limit=0)).anchor_id
    assert await log.remove(one.generation_id, retention=True)
    feed = await log.feed("ada", after=0, anchor=4, limit=10)
    assert (feed.floor, feed.anchor_id, list(feed.entries)) == (4, ids, [])


async def test_delete_leaves_the_floor_and_empty_places_with_their_ids(scribe: Scribe, log: EventLog) -> None:
    generations = [await scribe.short() for _ in range(3)]
    every = (await whole_feed(log)).entries
    assert await log.remove(generations[1].generation_id, retention=False)
    feed = await whole_feed(log)
    assert (feed.floor, feed.head) == (0, 6)
    places_left = {entry.position: entry for entry in feed.entries}
    for entry in every:
        read = await log.feed("ada", after=0, anchor=entry.position, limit=0)
        assert read.anchor_id == entry.event_id
        if entry.position in (3, 4) and entry.position in places_left:
            assert places_left[entry.position].event is None
    assert [p for p, entry in places_left.items() if entry.event is not None] == [1, 2, 5, 6]


@retentions
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2), (2, 0), (0, 1, 2), (2, 1, 0)])
async def test_removal_from_anywhere_leaves_the_others_and_the_future_whole(
    scribe: Scribe, log: EventLog, retention: bool, which: tuple[int, ...]
) -> None:
    generations = [await scribe.short() for _ in range(3)]
    every = list((await whole_feed(log)).entries)
    for index in which:
        assert await log.remove(generations[index].generation_id, retention=retention)
    left = [generations[index].generation_id for index in range(3) if index not in which]
    feed = await whole_feed(log)
    kept = [entry for entry in feed.entries if entry.event is not None]
    assert kept == [entry for entry in every if entry.generation_id in left]
    assert (feed.head, feed.upto) == (6, 6)
    assert feed.floor == (max(2 * index + 2 for index in which) if retention else 0)
    # Whoever attaches anew, and whoever was at the head, goes on without a hole.
    at_head = Cursor(6, every[-1].event_id, 6)
    attached = await log.head_cursor("ada")
    assert attached == at_head
    following = await scribe.whole()
    for cursor in (at_head, attached):
        for limit in (1, 2, 100):
            told, _ = await pull(log, "ada", cursor, limit)
            assert [(entry.generation_id, entry.position) for entry in told] == [
                (following.generation_id, position) for position in range(7, 13)
            ]


async def test_the_id_at_the_floor_stays_and_those_below_go(scribe: Scribe, log: EventLog) -> None:
    for _ in range(2):
        await scribe.short()
    every = (await whole_feed(log)).entries
    for history in await log.generations("ada", limit=10):
        assert await log.remove(history.generation_id, retention=True)
    assert (await log.feed("ada", after=0, anchor=4, limit=0)).anchor_id == every[3].event_id
    for below in (0, 1, 2, 3):
        assert not await usable(log, "ada", Cursor(below, every[below - 1].event_id, below))
    assert await usable(log, "ada", Cursor(4, every[3].event_id, 4))


async def test_a_running_generation_older_than_the_floor_stays_readable(scribe: Scribe, log: EventLog) -> None:
    old = await scribe.start()
    ended = await scribe.short()
    old = await scribe.move(old, "composition")
    assert await log.remove(ended.generation_id, retention=True)
    feed = await whole_feed(log)
    assert (feed.floor, [entry.position for entry in feed.entries]) == (3, [1, 4])
    history = await log.generation(old.generation_id)
    assert statuses(history) == ["started", "composition"]
    cursor = await log.head_cursor("ada")
    assert places((await pull(log, "ada", cursor))[0]) == [(old.generation_id, 1), (old.generation_id, 2)]
    await scribe.finish(old)
    assert places((await pull(log, "ada", cursor, 1))[0]) == [(old.generation_id, n) for n in range(1, 7)]


async def test_reading_goes_on_from_before_the_floor_when_only_unwanted_events_went(
    scribe: Scribe, log: EventLog
) -> None:
    running = await scribe.start()
    ended = await scribe.short()
    running = await scribe.move(running, "composition")
    cursor = await log.head_cursor("ada")
    assert (cursor.live, cursor.seen) == (4, 0)
    assert await log.remove(ended.generation_id, retention=True)
    assert await usable(log, "ada", cursor)
    assert places((await pull(log, "ada", cursor, 1))[0]) == [(running.generation_id, 1), (running.generation_id, 2)]


@retentions
async def test_a_cursor_is_lost_once_a_generation_it_wanted_to_the_end_is_gone(
    scribe: Scribe, log: EventLog, retention: bool
) -> None:
    wanted = await scribe.start()
    cursor = await log.head_cursor("ada")
    wanted = await scribe.move(wanted, "composition")
    middle = (await whole_feed(log)).entries[-1]
    await scribe.move(wanted, "failed")
    behind = (await whole_feed(log)).entries[-1]
    assert await log.remove(wanted.generation_id, retention=retention)
    for lost in (cursor, cursor._replace(seen=cursor.live), Cursor(middle.position, middle.event_id, middle.position)):
        assert not await usable(log, "ada", lost)
    assert await usable(log, "ada", Cursor(behind.position, behind.event_id, behind.position))


async def test_deleted_spans_is_told_from_the_first_event_on_and_before_the_last(scribe: Scribe, log: EventLog) -> None:
    await scribe.short()
    gone = await scribe.move(await scribe.start(), "composition", "failed")
    await scribe.short()
    assert await log.remove(gone.generation_id, retention=False)
    deleted_spans = [[*(await log.feed("ada", after=0, anchor=anchor, limit=0)).deleted_spans] for anchor in range(8)]
    assert deleted_spans == [[], [], [], [3], [3], [], [], []]


async def test_one_deleted_before_it_was_seen_at_all_is_skipped(scribe: Scribe, log: EventLog) -> None:
    cursor = await log.head_cursor("ada")
    gone = await scribe.short()
    kept = await scribe.short()
    assert await log.remove(gone.generation_id, retention=False)
    for limit in (2, 3, 100):
        told, behind = await pull(log, "ada", cursor, limit)
        assert places(told) == [(kept.generation_id, 1), (kept.generation_id, 2)]
        assert behind.live == behind.seen == 4


async def test_places_left_by_delete_go_once_the_floor_has_passed_them(scribe: Scribe, log: EventLog) -> None:
    deleted, purged = await scribe.short(), await scribe.short()
    assert await log.remove(deleted.generation_id, retention=False)
    assert await log.remove(purged.generation_id, retention=True)
    feed = await whole_feed(log)
    assert (list(feed.entries), feed.upto, feed.head, feed.floor, [*feed.deleted_spans]) == ([], 4, 4, 4, [])
    assert not (await log.feed("ada", after=0, anchor=1, limit=0)).deleted_spans


async def test_deleting_below_the_floor_leaves_no_places(scribe: Scribe, log: EventLog) -> None:
    low, high = await scribe.short(), await scribe.short()
    assert await log.remove(high.generation_id, retention=True)
    assert await log.remove(low.generation_id, retention=False)
    feed = await whole_feed(log)
    assert (list(feed.entries), feed.floor, feed.head, [*feed.deleted_spans]) == ([], 4, 4, [])


async def test_two_users_do_not_share_a_floor(scribe: Scribe, log: EventLog) -> None:
    gone, _ = await scribe.short("ada"), await scribe.short("bob")
    assert await log.remove(gone.generation_id, retention=True)
    assert [(await whole_feed(log, user_id)).floor for user_id in ("ada", "bob")] == [2, 0]


async def test_a_long_life_under_retention_keeps_numbering_without_a_gap(scribe: Scribe, log: EventLog) -> None:
    previous = await scribe.short()
    for turn in range(2, 40):
        current = await scribe.short()
        assert await log.remove(previous.generation_id, retention=True)
        feed = await whole_feed(log)
        assert [entry.position for entry in feed.entries] == [2 * turn - 1, 2 * turn]
        assert (feed.head, feed.floor) == (2 * turn, 2 * turn - 2)
        previous = current


# --- lists -----------------------------------------------------------------------------------------------


async def test_generations_come_newest_first_filtered_and_in_pages(scribe: Scribe, log: EventLog) -> None:
    running = [await scribe.start() for _ in range(3)]
    ended = [await scribe.short() for _ in range(3)]
    running.append(await scribe.start())
    await scribe.start("bob")

    async def ids(active: bool | None, before: int | None = None, limit: int = 100) -> list[str]:
        found = await log.generations("ada", active=active, before=before, limit=limit)
        return [history.generation_id for history in found]

    newest_first = [g.generation_id for g in (running[3], *ended[::-1], *running[2::-1])]
    assert await ids(None) == newest_first
    assert await ids(True) == [g.generation_id for g in running[::-1]]
    assert await ids(False) == [g.generation_id for g in ended[::-1]]
    assert await ids(None, limit=0) == []
    for active in (None, True, False):
        for limit in (1, 2, 3):
            paged: list[str] = []
            before = None
            while page := await log.generations("ada", active=active, before=before, limit=limit):
                assert len(page) <= limit
                paged += [history.generation_id for history in page]
                before = page[-1].events[0].position
            assert paged == await ids(active)
    assert await log.generations("nobody", limit=5) == []


async def test_the_age_of_a_generation_is_that_of_its_first_event(scribe: Scribe, log: EventLog) -> None:
    older, newer = await scribe.start(), await scribe.start()
    await scribe.move(newer, "failed")
    await scribe.move(older, "failed")
    found = await log.generations("ada", active=False, limit=10)
    assert [history.generation_id for history in found] == [newer.generation_id, older.generation_id]


async def test_unfinished_tells_everybodys_running_generations_oldest_first(scribe: Scribe, log: EventLog) -> None:
    one = await scribe.start("ada")
    two = await scribe.start("bob")
    await scribe.short("ada")
    three = await scribe.start("ada")
    two = await scribe.move(two, "composition")
    found = await log.unfinished()
    assert [history.generation_id for history in found] == [one.generation_id, two.generation_id, three.generation_id]
    assert [statuses(history)[-1] for history in found] == ["started", "composition", "started"]
    for generation in (one, two, three):
        await scribe.move(generation, "failed")
    assert list(await log.unfinished()) == []


async def test_finished_before_tells_those_that_ended_earlier_first_ended_first(scribe: Scribe, log: EventLog) -> None:
    slow = await scribe.start("ada")
    quick = await scribe.short("bob")
    scribe.clock.step(10)
    await scribe.move(slow, "failed")
    scribe.clock.step(10)
    last = await scribe.short("ada")
    await scribe.start("ada")
    now = scribe.clock()
    every = [quick.generation_id, slow.generation_id, last.generation_id]
    assert list(await log.finished_before(now + timedelta(seconds=1), 10)) == every
    assert list(await log.finished_before(now + timedelta(seconds=1), 2)) == every[:2]
    assert list(await log.finished_before(now, 10)) == every[:2]
    assert list(await log.finished_before(now - timedelta(seconds=10), 10)) == every[:1]
    assert list(await log.finished_before(now - timedelta(seconds=20), 10)) == []
    assert await log.remove(quick.generation_id, retention=True)
    assert list(await log.finished_before(now + timedelta(seconds=1), 10)) == every[1:]


async def test_removing_while_appending_is_seen_whole_or_not_at_all(scribe: Scribe, log: EventLog) -> None:
    """A reader of one atomic read never sees a generation without its beginning or its end."""
    done = asyncio.Event()

    async def churn() -> None:
        for turn in range(40):
            generation = await scribe.short()
            await asyncio.sleep(0)
            assert await log.remove(generation.generation_id, retention=turn % 2 == 0)
        done.set()

    async def read() -> int:
        reads = 0
        while not done.is_set():
            reads += 1
            feed = await log.feed("ada", after=0, anchor=0, limit=1_000)
            positions = [entry.position for entry in feed.entries]
            assert all(before < after for before, after in pairwise(positions))
            assert not positions or positions[-1] == feed.head
            for history in await log.generations("ada", limit=100):
                assert [entry.sequence for entry in history.events] in ([1], [1, 2])
            await asyncio.sleep(0)
        return reads

    _, reads = await asyncio.gather(churn(), read())
    assert reads > 1


async def test_every_answer_holds_after_the_same_append_was_sent_by_many(scribe: Scribe, log: EventLog) -> None:
    """Eight writers drive three generations; each step is taken once, whoever takes it."""
    running = [await scribe.start() for _ in range(3)]
    steps = ("composition", "composition_completed", "openai_editing", "openai_editing_completed", "completed")

    async def drive() -> None:
        for generation in running:
            present = generation
            for status in steps:
                append, present = scribe.prepare(present, status)
                with contextlib.suppress(Conflict):
                    await log.append(append)
                await asyncio.sleep(0)

    await asyncio.gather(*(drive() for _ in range(8)))
    for generation in running:
        assert statuses(await log.generation(generation.generation_id)) == ["started", *steps]
    assert await log.credit("ada") == 97


# --- grants ----------------------------------------------------------------------------------------------


async def grant(scribe: Scribe, amount: int, key: str | None = None, user_id: str = "ada", keep: float = 60) -> int:
    """The balance after a grant whose key is remembered for so many seconds."""
    at = scribe.clock()
    return await scribe.log.grant(user_id, amount, key=key, at=at, until=at + timedelta(seconds=keep))


async def test_a_grant_changes_the_balance_and_never_below_zero(scribe: Scribe, log: EventLog) -> None:
    for amount, left in ((5, 105), (0, 105), (-100, 5), (-6, 0), (-1, 0), (3, 3), (-3, 0), (10**9, 10**9)):
        assert await grant(scribe, amount) == left
        assert await log.credit("ada") == left


async def test_a_grant_is_no_event_and_nobody_hears_of_it(scribe: Scribe, log: EventLog) -> None:
    await scribe.start()
    before = await whole_feed(log)
    heard = Heard()
    async with log.follow(heard):
        await grant(scribe, 1)
        await grant(scribe, 0, user_id="nobody yet")
        await scribe.start("bob")
        await heard.until(lambda entries: bool(entries))
    assert [entry.user_id for entry in heard.entries] == ["bob"]
    assert await whole_feed(log) == before
    assert (await whole_feed(log, "nobody yet")).head == 0


async def test_who_was_granted_before_they_began_starts_from_that_balance(opener: Opener) -> None:
    scribe = await opener(credits=0)
    with pytest.raises(InsufficientCredit):
        await scribe.start()
    await grant(scribe, 1)
    append, _ = scribe.prepare_start()
    assert body(await scribe.log.append(append))["credit"] == 0
    with pytest.raises(InsufficientCredit):
        await scribe.start()


async def test_the_place_of_a_feed_does_not_move_by_a_grant(scribe: Scribe, log: EventLog) -> None:
    for user_id in ("ada", "new"):
        if user_id == "ada":
            await scribe.start(user_id)
        before = await log.head_cursor(user_id)
        await grant(scribe, 1, user_id=user_id)
        assert await log.head_cursor(user_id) == before


async def test_a_grant_with_a_key_happens_once_and_returns_what_it_had_brought(scribe: Scribe, log: EventLog) -> None:
    assert await grant(scribe, 5, "k") == 105
    await grant(scribe, -50)
    await scribe.start()
    scribe.clock.step(59)
    assert await grant(scribe, 5, "k") == 105
    assert await log.credit("ada") == 54


async def test_a_grant_that_was_cut_at_zero_returns_zero_again(scribe: Scribe, log: EventLog) -> None:
    assert await grant(scribe, -1_000, "k") == 0
    await grant(scribe, 7)
    assert await grant(scribe, -1_000, "k") == 0
    assert await log.credit("ada") == 7


async def test_a_key_with_another_amount_is_a_mismatch_and_grants_nothing(scribe: Scribe, log: EventLog) -> None:
    await grant(scribe, 5, "k")
    for other in (6, -5, 0):
        with pytest.raises(IdempotencyMismatch):
            await grant(scribe, other, "k")
    assert await log.credit("ada") == 105
    assert await grant(scribe, 5, "k") == 105


async def test_a_key_of_a_grant_is_forgotten_when_its_time_is_over(scribe: Scribe, log: EventLog) -> None:
    await grant(scribe, 5, "k")
    scribe.clock.step(60)
    assert await grant(scribe, 6, "k") == 111
    scribe.clock.step(59)
    assert await grant(scribe, 6, "k") == 111
    assert await log.credit("ada") == 111


async def test_keys_that_were_asked_for_again_live_no_longer(scribe: Scribe) -> None:
    await grant(scribe, 5, "k")
    scribe.clock.step(30)
    assert await grant(scribe, 5, "k") == 105
    scribe.clock.step(30)
    assert await grant(scribe, 5, "k") == 110


async def test_each_key_of_a_grant_has_a_time_of_its_own(scribe: Scribe) -> None:
    """Also where the clock was set back an hour between two grants, or the retention was made shorter."""
    await grant(scribe, 1, "long", keep=3600)
    await grant(scribe, 5, "short", keep=60)
    scribe.clock.step(61)
    assert await grant(scribe, 5, "short") == 111
    assert await grant(scribe, 1, "long") == 101


async def test_a_grant_without_a_key_happens_each_time(scribe: Scribe) -> None:
    assert [await grant(scribe, 5) for _ in range(3)] == [105, 110, 115]


async def test_a_key_of_a_grant_is_its_users_own_and_not_a_starts(scribe: Scribe, log: EventLog) -> None:
    await scribe.start(key="k")
    assert await grant(scribe, 5, "k") == 104
    assert await grant(scribe, 6, "k", "bob") == 106
    assert await log.begun("bob", "k") is None
    await scribe.start("bob", key="k")
    assert (await log.credit("ada"), await log.credit("bob")) == (104, 105)


async def test_where_no_balances_are_kept_nothing_is_granted(opener: Opener) -> None:
    scribe = await opener(credits=None)
    for amount, key in ((5, None), (0, None), (5, "k"), (6, "k")):
        with pytest.raises(CreditsOff):
            await grant(scribe, amount, key)
    assert await scribe.log.credit("ada") is None


async def test_a_user_whose_generations_are_all_gone_keeps_the_balance_and_the_keys(
    scribe: Scribe, log: EventLog
) -> None:
    await grant(scribe, 5, "k")
    generation = await scribe.whole()
    assert await log.remove(generation.generation_id, retention=True)
    assert await log.credit("ada") == 104
    assert await grant(scribe, 5, "k") == 105
    assert await log.credit("ada") == 104


async def test_of_twenty_racing_grants_with_one_key_one_happens(scribe: Scribe, log: EventLog) -> None:
    assert await asyncio.gather(*(grant(scribe, 5, "k") for _ in range(20))) == [105] * 20
    assert await log.credit("ada") == 105


async def test_of_racing_grants_with_one_key_and_two_amounts_one_amount_happens(scribe: Scribe, log: EventLog) -> None:
    results = await asyncio.gather(*(grant(scribe, 5 + n % 2, "k") for n in range(10)), return_exceptions=True)
    won = {result for result in results if isinstance(result, int)}
    assert sum(isinstance(result, IdempotencyMismatch) for result in results) == 5
    assert won == {await log.credit("ada")}


async def test_grants_that_race_with_starts_lose_no_credit(opener: Opener) -> None:
    """I6: start + grants - reserved + refunded = balance."""
    scribe = await opener(credits=10)
    appends = [scribe.prepare_start()[0] for _ in range(60)]
    grants = [asyncio.ensure_future(grant(scribe, 1)) for _ in range(20)]
    won, lost = await race(*(scribe.log.append(append) for append in appends))
    balances = await asyncio.gather(*grants)
    assert len(won) + len(lost) == 60
    assert all(isinstance(refusal, InsufficientCredit) for refusal in lost)
    assert 10 <= len(won) <= 30
    assert await scribe.log.credit("ada") == 10 + 20 - len(won)
    assert all(0 <= balance <= 30 for balance in balances)
    seen = [body(entry)["credit"] for entry in won]
    assert all(balance >= 0 for balance in seen)


async def test_what_is_taken_back_while_credits_are_reserved_is_refunded_on_top(scribe: Scribe, log: EventLog) -> None:
    running = [await scribe.start() for _ in range(3)]
    assert await grant(scribe, -1_000) == 0
    failed = await scribe.move(running[0], "failed")
    assert bodies(await log.generation(failed.generation_id))[-1]["credit"] == 1
    await asyncio.gather(grant(scribe, -1_000), *(scribe.move(each, "failed") for each in running[1:]))
    left = await log.credit("ada")
    assert left is not None
    assert 0 <= left <= 2


async def test_a_start_that_is_tried_again_after_its_generation_was_deleted_is_refused(log: EventLog) -> None:
    scribe = Scribe(log)
    append, generation = scribe.prepare_start()
    await log.append(append)
    await scribe.move(generation, "failed")
    await log.remove(generation.generation_id, retention=False)
    with pytest.raises(Conflict):
        await log.append(append)
    assert await log.credit("ada") == 100


async def test_a_deleted_generation_that_the_floor_has_passed_is_no_more(log: EventLog) -> None:
    scribe = Scribe(log)
    deleted, purged = await scribe.short(), await scribe.short()
    await log.remove(deleted.generation_id, retention=False)
    later = scribe.clock.step(10)
    assert await log.finished_before(later, 10) == [deleted.generation_id, purged.generation_id]
    assert await log.remove(purged.generation_id, retention=True)
    assert await log.finished_before(later, 10) == []
    assert not await log.remove(deleted.generation_id, retention=True)


async def test_a_log_that_can_be_written_says_so_and_is_not_changed_by_being_asked(log: EventLog) -> None:
    scribe = Scribe(log)
    generation = await scribe.short()
    before = await log.head_cursor("ada"), await log.generation(generation.generation_id), log.epoch
    await log.probe()
    assert before == (await log.head_cursor("ada"), await log.generation(generation.generation_id), log.epoch)
