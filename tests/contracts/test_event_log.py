"""The contract of `support.builders.WholeLog`: every adapter of it passes this suite."""

import asyncio
from datetime import timedelta

import pytest

from domain.errors import (
    AlreadyStarted,
    Conflict,
    IdempotencyMismatch,
    InsufficientCredit,
    LogUnavailable,
    TooManyGenerations,
)
from domain.feed import Logged
from domain.ports.log import IdempotencyRecord
from support.builders import EventRecorder, RecordingFollower, WholeLog, bodies, body, from_another_writer, statuses
from support.event_log import LogOpener, event_keys, full_feed, image, race


async def test_names_of_images_are_kept_beside_the_event_until_it_is_removed(
    log: WholeLog, recorder: EventRecorder
) -> None:
    generation = await recorder.start()
    name = f"{generation.generation_id}-{'0' * 32}.png"
    append, generation = recorder.prepare(
        generation, "composition", composition_url=f"http://test/images/{name}", preview_url="https://other.test/p.png"
    )
    assert append.images == {"composition_url": name}
    heard = RecordingFollower()
    async with log.follow(heard):
        assert (await log.append(append)).images == append.images
        await heard.until(lambda entries: [entry.images for entry in entries] == [append.images])
    assert (await log.append(append)).images == append.images
    await recorder.move(generation, "failed")
    history = await log.generation(generation.generation_id)
    assert history is not None
    assert [entry.images for entry in history.events] == [{}, append.images, {}]
    assert [entry.images for entry in (await full_feed(log)).entries] == [{}, append.images, {}]
    assert await log.remove(generation.generation_id, retention=False)
    assert [entry.images for entry in (await full_feed(log)).entries] == [{}, {}, {}]


async def test_standing_has_the_balance_and_the_number_of_unfinished_generations(
    recorder: EventRecorder, log: WholeLog
) -> None:
    assert await log.standing("ada") == (100, 0)
    await recorder.start()
    one = await recorder.start()
    assert await log.standing("ada") == (98, 2)
    await recorder.finish(one)
    assert await log.standing("ada") == (98, 1)
    assert await log.standing("bob") == (100, 0)


# --- one event after another -----------------------------------------------------------------------------


async def test_an_append_returns_the_entry_that_readers_get(recorder: EventRecorder, log: WholeLog) -> None:
    append, _ = recorder.prepare_start()
    logged = await log.append(append)
    assert logged == Logged(
        "ada", 1, append.event_id, append.generation_id, 1, "generation_started", logged.event, 1, None
    )
    assert body(logged)["credit"] == 99
    history = await log.generation(append.generation_id)
    assert history is not None
    assert list(history.events) == [logged]
    assert list((await full_feed(log)).entries) == [logged]


async def test_a_generation_reads_back_as_it_was_written(recorder: EventRecorder, log: WholeLog) -> None:
    generation = await recorder.run_to_end("ada", "edit", face_swap=True)
    history = await log.generation(generation.generation_id)
    assert history is not None
    assert (history.user_id, history.generation_id, history.kind) == ("ada", generation.generation_id, "edit")
    assert b'"face_swap":true' in history.request
    assert [event["sequence"] for event in bodies(history)] == list(range(1, 9))
    assert [entry.sequence for entry in history.events] == list(range(1, 9))
    assert [entry.name for entry in history.events] == [
        "generation_started", *["continue"] * 6, "generation_completed"
    ]  # fmt: skip
    assert {(entry.first, entry.end) for entry in history.events} == {(1, 8)}


async def test_the_free_mark_of_the_last_stage_is_stored_and_can_be_withdrawn(
    recorder: EventRecorder, log: WholeLog
) -> None:
    async def read() -> set[bool]:
        history = await log.generation(generation.generation_id)
        assert history is not None
        return {each.free for each in (history, *await log.unfinished(), *await log.generations("ada", limit=9))}

    generation = await recorder.move(await recorder.start(), "composition", "composition_completed")
    assert await read() == {False}
    generation = await recorder.move(generation, "openai_editing", free=True)
    assert await read() == {True}
    append, generation = recorder.prepare(generation, "openai_editing", free=True, progress=70)
    await log.append(append)
    await log.append(append)
    assert await read() == {True}
    await log.mark_paid(generation.generation_id)
    assert await read() == {False}
    generation = await recorder.move(generation, "openai_editing", free=True, progress=75)
    assert await read() == {True}
    await recorder.move(generation, "openai_editing_completed")
    assert await read() == {False}
    await log.mark_paid("edit_1_there_is_none")


async def test_only_the_next_sequence_is_accepted(recorder: EventRecorder, log: WholeLog) -> None:
    generation = await recorder.start()
    append, _ = recorder.prepare(generation, "composition")
    before = await image(log, "ada", generation.generation_id)
    for sequence in (0, 1, 3, 4, 100):
        with pytest.raises(Conflict):
            await log.append(append._replace(sequence=sequence))
    assert await image(log, "ada", generation.generation_id) == before
    await log.append(append)


async def test_nothing_follows_the_terminal_event(recorder: EventRecorder, log: WholeLog) -> None:
    running = await recorder.start()
    await recorder.move(running, "failed")
    append, _ = recorder.prepare(running, "composition")
    before = await image(log, "ada", running.generation_id)
    for sequence in (2, 3):
        with pytest.raises(Conflict):
            await log.append(append._replace(sequence=sequence))
    assert await image(log, "ada", running.generation_id) == before


async def test_an_event_without_a_start_is_refused(recorder: EventRecorder, log: WholeLog) -> None:
    _, unborn = recorder.prepare_start()
    append, _ = recorder.prepare(unborn, "composition")
    for sequence in (0, 1, 2):
        with pytest.raises(Conflict):
            await log.append(append._replace(sequence=sequence))
    with pytest.raises(Conflict):
        await log.append(append._replace(sequence=0, event=b""))
    assert await log.generation(unborn.generation_id) is None
    assert (await full_feed(log)).head == 0


async def test_a_generation_id_in_use_cannot_be_started_again(recorder: EventRecorder, log: WholeLog) -> None:
    append, _ = recorder.prepare_start()
    await log.append(append)
    for user_id in ("ada", "bob"):
        with pytest.raises(Conflict):
            await log.append(from_another_writer(append, 7)._replace(user_id=user_id))
    assert ((await log.standing("ada")).credit, (await log.standing("bob")).credit) == (99, 100)


# --- many writers ----------------------------------------------------------------------------------------


async def test_one_of_fifty_writers_of_a_sequence_wins_and_the_others_conflict(
    recorder: EventRecorder, log: WholeLog
) -> None:
    generation = await recorder.start()
    appends = [recorder.prepare(generation, "composition")[0] for _ in range(50)]
    won, refused = await race(*map(log.append, appends))
    assert len(won) == 1
    assert [type(refusal) for refusal in refused] == [Conflict] * 49
    history = await log.generation(generation.generation_id)
    assert statuses(history) == ["started", "composition"]
    assert history is not None
    assert history.events[1] == won[0]


async def test_equal_bytes_with_another_event_id_are_a_conflict(recorder: EventRecorder, log: WholeLog) -> None:
    generation = await recorder.start()
    append, _ = recorder.prepare(generation, "composition")
    await log.append(append)
    with pytest.raises(Conflict):
        await log.append(from_another_writer(append, append.event_id ^ 1))


async def test_a_racing_cancel_and_completion_make_one_end(recorder: EventRecorder, log: WholeLog) -> None:
    generation = await recorder.move(await recorder.start(), "composition", "composition_completed", "openai_editing")
    generation = await recorder.move(generation, "openai_editing_completed")
    racers = [recorder.prepare(generation, status)[0] for status in ("completed", "failed")]
    won, refused = await race(*map(log.append, racers))
    assert (len(won), len(refused)) == (1, 1)
    sent = statuses(await log.generation(generation.generation_id))
    assert [status for status in sent if status in ("completed", "failed")] == sent[-1:]
    assert (await log.standing("ada")).credit == (100 if sent[-1] == "failed" else 99)


# --- a reply that was lost -------------------------------------------------------------------------------


async def test_a_retried_append_succeeds_and_writes_one_entry(recorder: EventRecorder, log: WholeLog) -> None:
    generation = await recorder.start()
    append, _ = recorder.prepare(generation, "composition")
    logged = await log.append(append)
    before = await image(log, "ada", generation.generation_id)
    assert await log.append(append) == logged
    assert await image(log, "ada", generation.generation_id) == before


async def test_a_retry_succeeds_after_another_writer_appended_the_next_event(
    recorder: EventRecorder, log: WholeLog
) -> None:
    append, generation = recorder.prepare(await recorder.start(), "composition")
    logged = await log.append(append)
    await recorder.move(generation, "composition_completed", "openai_editing")
    before = await image(log, "ada", generation.generation_id)
    assert await log.append(append) == logged
    assert await image(log, "ada", generation.generation_id) == before
    await recorder.move(await recorder.start(), "composition")


async def test_a_retry_succeeds_after_the_generation_has_ended(recorder: EventRecorder, log: WholeLog) -> None:
    append, generation = recorder.prepare(await recorder.start(), "composition")
    logged = await log.append(append)
    ended = await recorder.finish(generation)
    assert await log.append(append) == logged._replace(end=ended.sequence)


async def test_a_retried_failure_refunds_once(recorder: EventRecorder, log: WholeLog) -> None:
    generation = await recorder.start()
    append, _ = recorder.prepare(generation, "failed")
    logged = await log.append(append)
    assert await log.append(append) == logged
    assert (await log.standing("ada")).credit == 100
    assert statuses(await log.generation(generation.generation_id)) == ["started", "failed"]


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_retried_start_debits_once(opener: LogOpener, key: str | None) -> None:
    recorder = await opener(credits=1)
    append, generation = recorder.prepare_start(key=key, max_unfinished=1)
    logged = await recorder.log.append(append)
    assert await recorder.log.append(append) == logged
    assert (await recorder.log.standing("ada")).credit == 0
    await recorder.move(generation, "composition")
    assert await recorder.log.append(append) == logged
    assert (await full_feed(recorder.log)).head == 2


async def test_racing_retries_of_one_append_write_one_entry(recorder: EventRecorder, log: WholeLog) -> None:
    append, _ = recorder.prepare(await recorder.start(), "composition")
    won, refused = await race(*(log.append(append) for _ in range(20)))
    assert refused == []
    assert len(won) == 20
    assert won == won[:1] * 20
    assert (await full_feed(log)).head == 2


async def test_an_event_id_at_another_sequence_is_not_a_retry(recorder: EventRecorder, log: WholeLog) -> None:
    append, generation = recorder.prepare(await recorder.start(), "composition")
    await log.append(append)
    with pytest.raises(Conflict):
        await log.append(append._replace(sequence=1))
    other, _ = recorder.prepare(generation, "composition_completed")
    await log.append(other._replace(event_id=append.event_id))
    assert (await full_feed(log)).head == 3


# --- too late --------------------------------------------------------------------------------------------


async def test_an_append_after_its_deadline_is_refused_and_starts_nothing(
    recorder: EventRecorder, log: WholeLog
) -> None:
    append, _ = recorder.prepare_start(key="k", not_after=recorder.clock() + timedelta(seconds=5))
    before = await image(log, "ada", append.generation_id)
    recorder.clock.step(5.001)
    for _ in range(2):
        with pytest.raises(LogUnavailable):
            await log.append(append)
    assert await image(log, "ada", append.generation_id) == before
    assert await log.find_by_idempotency_key("ada", "k") is None


async def test_an_append_before_its_deadline_is_accepted(recorder: EventRecorder, log: WholeLog) -> None:
    append, _ = recorder.prepare_start(not_after=recorder.clock() + timedelta(seconds=60))
    recorder.clock.step(30)
    await log.append(append)


async def test_a_retry_is_recognised_after_its_deadline(recorder: EventRecorder, log: WholeLog) -> None:
    append, _ = recorder.prepare_start(not_after=recorder.clock() + timedelta(seconds=5))
    logged = await log.append(append)
    recorder.clock.step(3_600)
    assert await log.append(append) == logged
    assert (await log.standing("ada")).credit == 99


# --- the order of the checks -----------------------------------------------------------------------------


async def test_checks_are_made_in_the_declared_order(opener: LogOpener) -> None:
    recorder = await opener(credits=1)
    log = recorder.log
    first, _ = recorder.prepare_start(key="k", fingerprint="one")
    await log.append(first)
    assert first.start is not None
    late = recorder.clock() - timedelta(seconds=1)
    mismatch = first.start._replace(fingerprint="two", max_unfinished=1)
    keyless = mismatch._replace(key=None)

    # Everything is wrong at once, and then one thing less at a time.
    wrong = from_another_writer(first, 5)._replace(sequence=9, not_after=late, start=mismatch)
    before = await image(log, "ada", first.generation_id)
    with pytest.raises(LogUnavailable):
        await log.append(wrong)
    with pytest.raises(IdempotencyMismatch):
        await log.append(wrong._replace(not_after=None))
    with pytest.raises(AlreadyStarted):
        await log.append(wrong._replace(not_after=None, start=mismatch._replace(fingerprint="one")))
    with pytest.raises(Conflict):
        await log.append(wrong._replace(not_after=None, start=keyless))
    fresh = wrong._replace(not_after=None, start=keyless, generation_id="edit_1_fresh", sequence=1)
    with pytest.raises(TooManyGenerations):
        await log.append(fresh)
    with pytest.raises(InsufficientCredit):
        await log.append(fresh._replace(start=keyless._replace(max_unfinished=2)))
    assert await image(log, "ada", first.generation_id) == before
    assert await log.generation("edit_1_fresh") is None


# --- positions and sequences -----------------------------------------------------------------------------


async def test_positions_are_contiguous_per_user_and_sequences_per_generation(
    recorder: EventRecorder, log: WholeLog
) -> None:
    async def live(user_id: str) -> None:
        for _ in range(3):
            await recorder.run_to_end(user_id)
            await asyncio.sleep(0)

    await asyncio.gather(*(live(user_id) for user_id in ("ada", "ada", "bob", "cy")))
    for user_id, generations in (("ada", 6), ("bob", 3), ("cy", 3)):
        feed = await full_feed(log, user_id)
        assert [entry.position for entry in feed.entries] == list(range(1, generations * 6 + 1))
        assert (feed.head, feed.upto) == (generations * 6, generations * 6)
        assert {entry.user_id for entry in feed.entries} == {user_id}
        for summary in await log.generations(user_id, limit=100):
            history = await log.generation(summary.generation_id)
            assert history is not None
            assert [entry.sequence for entry in history.events] == [1, 2, 3, 4, 5, 6]
            positions = [entry.position for entry in history.events]
            assert positions == sorted(positions)


async def test_interleaved_generations_share_one_feed_in_the_order_of_their_appends(
    recorder: EventRecorder, log: WholeLog
) -> None:
    one, two = await recorder.start(), await recorder.start()
    two = await recorder.move(two, "composition")
    one = await recorder.move(one, "failed")
    await recorder.move(two, "composition_completed")
    a, b = one.generation_id, two.generation_id
    assert event_keys((await full_feed(log)).entries) == [(a, 1), (b, 1), (b, 2), (a, 2), (b, 3)]
    assert [entry.end for entry in (await full_feed(log)).entries] == [4, None, None, 4, None]
    assert [entry.first for entry in (await full_feed(log)).entries] == [1, 2, 2, 1, 2]


# --- credit ----------------------------------------------------------------------------------------------


async def test_a_start_reserves_a_credit_and_a_completion_spends_it(recorder: EventRecorder, log: WholeLog) -> None:
    assert (await log.standing("ada")).credit == 100
    generation = await recorder.start()
    assert (await log.standing("ada")).credit == 99
    await recorder.finish(generation)
    assert (await log.standing("ada")).credit == 99
    sent = bodies(await log.generation(generation.generation_id))
    assert [event.get("credit") for event in sent] == [99, None, None, None, None, 99]


async def test_a_failure_refunds_the_credit(recorder: EventRecorder, log: WholeLog) -> None:
    generation = await recorder.start()
    await recorder.move(generation, "composition", "failed")
    assert (await log.standing("ada")).credit == 100
    sent = bodies(await log.generation(generation.generation_id))
    assert [event.get("credit") for event in sent] == [99, None, 100]
    assert list(sent[-1])[-1] == "credit"


async def test_without_credit_nothing_starts_and_nothing_changes(opener: LogOpener) -> None:
    recorder = await opener(credits=0)
    append, _ = recorder.prepare_start(key="k")
    before = await image(recorder.log, "ada", append.generation_id)
    with pytest.raises(InsufficientCredit):
        await recorder.log.append(append)
    assert await image(recorder.log, "ada", append.generation_id) == before
    assert await recorder.log.find_by_idempotency_key("ada", "k") is None


async def test_one_of_two_racing_starts_gets_the_last_credit(opener: LogOpener) -> None:
    recorder = await opener(credits=1)
    won, refused = await race(*(recorder.log.append(recorder.prepare_start()[0]) for _ in range(2)))
    assert len(won) == 1
    assert [type(refusal) for refusal in refused] == [InsufficientCredit]
    assert (await recorder.log.standing("ada")).credit == 0
    assert (await full_feed(recorder.log)).head == 1


async def test_a_refunded_credit_can_be_reserved_again(opener: LogOpener) -> None:
    recorder = await opener(credits=1)
    for _ in range(3):
        await recorder.start_and_fail()
    assert (await recorder.log.standing("ada")).credit == 1


async def test_balances_are_separate_per_user(recorder: EventRecorder, log: WholeLog) -> None:
    await recorder.start("ada")
    await recorder.start("ada")
    await recorder.start("bob")
    assert [(await log.standing(user_id)).credit for user_id in ("ada", "bob", "cy")] == [98, 99, 100]


async def test_without_balances_no_event_has_one_and_every_start_is_accepted(opener: LogOpener) -> None:
    recorder = await opener(credits=None)
    generations = [await recorder.run_to_end() for _ in range(3)] + [await recorder.start_and_fail()]
    assert (await recorder.log.standing("ada")).credit is None
    for generation in generations:
        assert not [
            event for event in bodies(await recorder.log.generation(generation.generation_id)) if "credit" in event
        ]


# --- idempotency keys ------------------------------------------------------------------------------------


async def test_twenty_racing_starts_with_one_key_start_and_charge_once(recorder: EventRecorder, log: WholeLog) -> None:
    appends = [recorder.prepare_start(key="k")[0] for _ in range(20)]
    won, refused = await race(*map(log.append, appends))
    assert len(won) == 1
    assert {type(refusal) for refusal in refused} == {AlreadyStarted}
    assert {refusal.generation_id for refusal in refused if isinstance(refusal, AlreadyStarted)} == {
        won[0].generation_id
    }
    assert len(refused) == 19
    assert (await log.standing("ada")).credit == 99
    assert len(await log.generations("ada", limit=100)) == 1
    assert await log.find_by_idempotency_key("ada", "k") == IdempotencyRecord(won[0].generation_id, "same")


async def test_a_reused_key_with_another_request_is_a_mismatch_and_changes_nothing(
    recorder: EventRecorder, log: WholeLog
) -> None:
    await recorder.start(key="k", fingerprint="one")
    append, _ = recorder.prepare_start(key="k", fingerprint="two")
    before = await image(log, "ada", append.generation_id)
    with pytest.raises(IdempotencyMismatch):
        await log.append(append)
    assert await image(log, "ada", append.generation_id) == before


async def test_idempotency_keys_are_separate_per_user(recorder: EventRecorder, log: WholeLog) -> None:
    ada = await recorder.start("ada", key="k", fingerprint="one")
    assert await log.find_by_idempotency_key("bob", "k") is None
    bob = await recorder.start("bob", key="k", fingerprint="two")
    assert await log.find_by_idempotency_key("ada", "k") == IdempotencyRecord(ada.generation_id, "one")
    assert await log.find_by_idempotency_key("bob", "k") == IdempotencyRecord(bob.generation_id, "two")
    assert await log.find_by_idempotency_key("ada", "other") is None


@pytest.mark.parametrize("retention", [True, False])
async def test_an_idempotency_key_lasts_until_its_generation_is_removed(
    recorder: EventRecorder, log: WholeLog, retention: bool
) -> None:
    first = await recorder.start_and_fail(key="k", fingerprint="one")
    with pytest.raises(AlreadyStarted):
        await recorder.start(key="k", fingerprint="one")
    assert await log.remove(first.generation_id, retention=retention)
    assert await log.find_by_idempotency_key("ada", "k") is None
    second = await recorder.start(key="k", fingerprint="two")
    assert await log.find_by_idempotency_key("ada", "k") == IdempotencyRecord(second.generation_id, "two")


# --- how many at once ------------------------------------------------------------------------------------


async def test_racing_starts_never_exceed_the_limit_of_unfinished_generations(
    recorder: EventRecorder, log: WholeLog
) -> None:
    appends = [recorder.prepare_start(max_unfinished=3)[0] for _ in range(20)]
    won, refused = await race(*map(log.append, appends))
    assert len(won) == 3
    assert [type(refusal) for refusal in refused] == [TooManyGenerations] * 17
    assert (await log.standing("ada")).credit == 97
    assert len(await log.unfinished()) == 3


async def test_the_limit_of_unfinished_generations_is_per_user_and_an_end_makes_room(
    recorder: EventRecorder, log: WholeLog
) -> None:
    one = await recorder.start(max_unfinished=1)
    with pytest.raises(TooManyGenerations):
        await recorder.start(max_unfinished=1)
    await recorder.start("bob", max_unfinished=1)
    await recorder.move(one, "failed")
    await recorder.start(max_unfinished=1)
