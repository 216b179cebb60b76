"""The contract of `support.builders.WholeLog`: grants of credit."""

import asyncio
from datetime import timedelta

import pytest

from domain.errors import Conflict, CreditsOff, IdempotencyMismatch, InsufficientCredit
from support.builders import EventRecorder, RecordingFollower, WholeLog, bodies, body
from support.event_log import LogOpener, full_feed, race

# --- grants ----------------------------------------------------------------------------------------------


async def grant(
    recorder: EventRecorder, amount: int, key: str | None = None, user_id: str = "ada", keep: float = 60
) -> int:
    """The balance after a grant whose key is remembered for so many seconds."""
    at = recorder.clock()
    return await recorder.log.grant(user_id, amount, key=key, at=at, until=at + timedelta(seconds=keep))


async def test_a_grant_changes_the_balance_and_never_below_zero(recorder: EventRecorder, log: WholeLog) -> None:
    for amount, left in ((5, 105), (0, 105), (-100, 5), (-6, 0), (-1, 0), (3, 3), (-3, 0), (10**9, 10**9)):
        assert await grant(recorder, amount) == left
        assert (await log.standing("ada")).credit == left


async def test_a_grant_appends_no_event_and_followers_get_none(recorder: EventRecorder, log: WholeLog) -> None:
    await recorder.start()
    before = await full_feed(log)
    follower = RecordingFollower()
    async with log.follow(follower):
        await grant(recorder, 1)
        await grant(recorder, 0, user_id="nobody yet")
        await recorder.start("bob")
        await follower.until(lambda entries: bool(entries))
    assert [entry.user_id for entry in follower.entries] == ["bob"]
    assert await full_feed(log) == before
    assert (await full_feed(log, "nobody yet")).head == 0


async def test_a_user_granted_before_the_first_start_begins_with_that_balance(opener: LogOpener) -> None:
    recorder = await opener(credits=0)
    with pytest.raises(InsufficientCredit):
        await recorder.start()
    await grant(recorder, 1)
    append, _ = recorder.prepare_start()
    assert body(await recorder.log.append(append))["credit"] == 0
    with pytest.raises(InsufficientCredit):
        await recorder.start()


async def test_a_grant_does_not_move_the_head_of_the_feed(recorder: EventRecorder, log: WholeLog) -> None:
    for user_id in ("ada", "new"):
        if user_id == "ada":
            await recorder.start(user_id)
        before = await log.head_cursor(user_id)
        await grant(recorder, 1, user_id=user_id)
        assert await log.head_cursor(user_id) == before


async def test_a_grant_with_a_key_is_made_once_and_repeats_return_its_balance(
    recorder: EventRecorder, log: WholeLog
) -> None:
    assert await grant(recorder, 5, "k") == 105
    await grant(recorder, -50)
    await recorder.start()
    recorder.clock.step(59)
    assert await grant(recorder, 5, "k") == 105
    assert (await log.standing("ada")).credit == 54


async def test_a_repeated_grant_that_was_clamped_at_zero_returns_zero(recorder: EventRecorder, log: WholeLog) -> None:
    assert await grant(recorder, -1_000, "k") == 0
    await grant(recorder, 7)
    assert await grant(recorder, -1_000, "k") == 0
    assert (await log.standing("ada")).credit == 7


async def test_a_grant_key_with_another_amount_is_a_mismatch_and_grants_nothing(
    recorder: EventRecorder, log: WholeLog
) -> None:
    await grant(recorder, 5, "k")
    for other in (6, -5, 0):
        with pytest.raises(IdempotencyMismatch):
            await grant(recorder, other, "k")
    assert (await log.standing("ada")).credit == 105
    assert await grant(recorder, 5, "k") == 105


async def test_a_grant_key_expires(recorder: EventRecorder, log: WholeLog) -> None:
    await grant(recorder, 5, "k")
    recorder.clock.step(60)
    assert await grant(recorder, 6, "k") == 111
    recorder.clock.step(59)
    assert await grant(recorder, 6, "k") == 111
    assert (await log.standing("ada")).credit == 111


async def test_a_repeated_grant_does_not_extend_its_key(recorder: EventRecorder) -> None:
    await grant(recorder, 5, "k")
    recorder.clock.step(30)
    assert await grant(recorder, 5, "k") == 105
    recorder.clock.step(30)
    assert await grant(recorder, 5, "k") == 110


async def test_each_grant_key_expires_on_its_own(recorder: EventRecorder) -> None:
    """Also where the clock was set back an hour between two grants, or the retention was made shorter."""
    await grant(recorder, 1, "long", keep=3600)
    await grant(recorder, 5, "short", keep=60)
    recorder.clock.step(61)
    assert await grant(recorder, 5, "short") == 111
    assert await grant(recorder, 1, "long") == 101


async def test_a_grant_without_a_key_is_made_each_time(recorder: EventRecorder) -> None:
    assert [await grant(recorder, 5) for _ in range(3)] == [105, 110, 115]


async def test_grant_keys_are_separate_per_user_and_from_start_keys(recorder: EventRecorder, log: WholeLog) -> None:
    await recorder.start(key="k")
    assert await grant(recorder, 5, "k") == 104
    assert await grant(recorder, 6, "k", "bob") == 106
    assert await log.find_by_idempotency_key("bob", "k") is None
    await recorder.start("bob", key="k")
    assert ((await log.standing("ada")).credit, (await log.standing("bob")).credit) == (104, 105)


async def test_without_balances_a_grant_is_refused(opener: LogOpener) -> None:
    recorder = await opener(credits=None)
    for amount, key in ((5, None), (0, None), (5, "k"), (6, "k")):
        with pytest.raises(CreditsOff):
            await grant(recorder, amount, key)
    assert (await recorder.log.standing("ada")).credit is None


async def test_a_user_without_generations_left_keeps_balance_and_grant_keys(
    recorder: EventRecorder, log: WholeLog
) -> None:
    await grant(recorder, 5, "k")
    generation = await recorder.run_to_end()
    assert await log.remove(generation.generation_id, retention=True)
    assert (await log.standing("ada")).credit == 104
    assert await grant(recorder, 5, "k") == 105
    assert (await log.standing("ada")).credit == 104


async def test_twenty_racing_grants_with_one_key_grant_once(recorder: EventRecorder, log: WholeLog) -> None:
    assert await asyncio.gather(*(grant(recorder, 5, "k") for _ in range(20))) == [105] * 20
    assert (await log.standing("ada")).credit == 105


async def test_racing_grants_with_one_key_and_two_amounts_grant_one_of_them(
    recorder: EventRecorder, log: WholeLog
) -> None:
    results = await asyncio.gather(*(grant(recorder, 5 + n % 2, "k") for n in range(10)), return_exceptions=True)
    won = {result for result in results if isinstance(result, int)}
    assert sum(isinstance(result, IdempotencyMismatch) for result in results) == 5
    assert won == {(await log.standing("ada")).credit}


async def test_grants_that_race_with_starts_lose_no_credit(opener: LogOpener) -> None:
    """I6: start + grants - reserved + refunded = balance."""
    recorder = await opener(credits=10)
    appends = [recorder.prepare_start()[0] for _ in range(60)]
    grants = [asyncio.ensure_future(grant(recorder, 1)) for _ in range(20)]
    won, lost = await race(*(recorder.log.append(append) for append in appends))
    balances = await asyncio.gather(*grants)
    assert len(won) + len(lost) == 60
    assert all(isinstance(refusal, InsufficientCredit) for refusal in lost)
    assert 10 <= len(won) <= 30
    assert (await recorder.log.standing("ada")).credit == 10 + 20 - len(won)
    assert all(0 <= balance <= 30 for balance in balances)
    seen = [body(entry)["credit"] for entry in won]
    assert all(balance >= 0 for balance in seen)


async def test_a_refund_after_a_negative_grant_is_added_to_the_balance(recorder: EventRecorder, log: WholeLog) -> None:
    running = [await recorder.start() for _ in range(3)]
    assert await grant(recorder, -1_000) == 0
    failed = await recorder.move(running[0], "failed")
    assert bodies(await log.generation(failed.generation_id))[-1]["credit"] == 1
    await asyncio.gather(grant(recorder, -1_000), *(recorder.move(each, "failed") for each in running[1:]))
    left = (await log.standing("ada")).credit
    assert left is not None
    assert 0 <= left <= 2


async def test_a_retried_start_of_a_deleted_generation_is_refused(log: WholeLog) -> None:
    recorder = EventRecorder(log)
    append, generation = recorder.prepare_start()
    await log.append(append)
    await recorder.move(generation, "failed")
    await log.remove(generation.generation_id, retention=False)
    with pytest.raises(Conflict):
        await log.append(append)
    assert (await log.standing("ada")).credit == 100


async def test_a_deleted_generation_below_the_floor_is_forgotten(log: WholeLog) -> None:
    recorder = EventRecorder(log)
    deleted, purged = await recorder.start_and_fail(), await recorder.start_and_fail()
    await log.remove(deleted.generation_id, retention=False)
    later = recorder.clock.step(10)
    assert await log.finished_before(later, 10) == [deleted.generation_id, purged.generation_id]
    assert await log.remove(purged.generation_id, retention=True)
    assert await log.finished_before(later, 10) == []
    assert not await log.remove(deleted.generation_id, retention=True)


async def test_a_probe_of_a_writable_log_succeeds_and_changes_nothing(log: WholeLog) -> None:
    recorder = EventRecorder(log)
    generation = await recorder.start_and_fail()
    before = await log.head_cursor("ada"), await log.generation(generation.generation_id), log.epoch
    await log.probe()
    assert before == (await log.head_cursor("ada"), await log.generation(generation.generation_id), log.epoch)
