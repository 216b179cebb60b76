"""The contract of `support.builders.WholeLog`: followers, reads, cursors and undelivered ends."""

import asyncio
from collections.abc import Sequence

import pytest

from domain.errors import Conflict
from domain.feed import Logged
from domain.ports.log import History, Notice
from domain.rehydrate import generation_of
from support.builders import EventRecorder, RecordingFollower, WholeLog, from_another_writer, statuses
from support.event_log import LogOpener, event_keys, full_feed, pull, usable

# --- summaries ---


@pytest.mark.parametrize("progress", [0, 1, 15])
async def test_a_summary_has_the_first_and_the_last_two_events_and_tells_the_same_state(
    recorder: EventRecorder, log: WholeLog, progress: int
) -> None:
    async def agree(listed: Sequence[History], generation_id: str) -> None:
        whole = await log.generation(generation_id)
        summary = await log.summary(generation_id)
        assert whole is not None
        assert summary is not None
        count = len(whole.events)
        assert [entry.sequence for entry in whole.events] == list(range(1, count + 1))
        assert [entry.sequence for entry in summary.events] == sorted({1, max(count - 1, 1), count})
        assert summary.events == [whole.events[entry.sequence - 1] for entry in summary.events]
        assert whole._replace(events=()) == summary._replace(events=())
        assert generation_of(summary).snapshot() == generation_of(whole).snapshot()
        assert summary in listed

    generation = await recorder.start(metadata={"a": 1}, face_swap=True)
    await agree(await log.unfinished(), generation.generation_id)
    generation = await recorder.move(generation, "composition")
    await agree(await log.unfinished(), generation.generation_id)
    generation = await recorder.move(generation, "composition_completed", "openai_editing")
    names = {f"{generation.generation_id}-{number:032x}.png" for number in range(progress)}
    for percent, name in enumerate(sorted(names), 61):
        generation = await recorder.move(
            generation, "openai_editing", progress=percent, preview_url=f"http://test/images/{name}"
        )
    await agree(await log.generations("ada", limit=9), generation.generation_id)
    assert set(await log.images(generation.generation_id)) == names
    generation = await recorder.finish(generation)
    await agree(await log.generations("ada", active=False, limit=9), generation.generation_id)
    assert await log.summary("edit_1_unknown") is None
    assert list(await log.images("edit_1_unknown")) == []


# --- followers -------------------------------------------------------------------------------------------


async def entries_of(follower: RecordingFollower, count: int) -> list[Logged]:
    return await follower.until(lambda entries: len(entries) >= count)


async def test_a_follower_gets_every_entry_once_in_order_during_appends(recorder: EventRecorder, log: WholeLog) -> None:
    follower = RecordingFollower()

    async def live(user_id: str) -> None:
        for _ in range(10):
            await recorder.run_to_end(user_id)
            await asyncio.sleep(0)

    async with log.follow(follower):
        await asyncio.gather(*(live(user_id) for user_id in ("ada", "ada", "bob")))
        await entries_of(follower, 180)
    for user_id, count in (("ada", 120), ("bob", 60)):
        sent = [entry for entry in follower.entries if entry.user_id == user_id]
        assert [entry.position for entry in sent] == list(range(1, count + 1))
        kept = (await full_feed(log, user_id)).entries
        assert [entry.event for entry in sent] == [entry.event for entry in kept]
        assert [entry.event_id for entry in sent] == [entry.event_id for entry in kept]


async def test_a_follower_gets_the_entry_as_it_was_appended(recorder: EventRecorder, log: WholeLog) -> None:
    follower = RecordingFollower()
    async with log.follow(follower):
        append, generation = recorder.prepare_start()
        logged = [await log.append(append)]
        append, _ = recorder.prepare(generation, "failed")
        logged.append(await log.append(append))
        assert await entries_of(follower, 2) == logged
    assert [(entry.first, entry.end) for entry in logged] == [(1, None), (1, 2)]


async def test_a_read_and_the_follower_leave_no_gap(recorder: EventRecorder, log: WholeLog) -> None:
    async def write() -> None:
        for _ in range(30):
            await recorder.run_to_end()
            await asyncio.sleep(0)

    async def attach(after: int) -> None:
        follower = RecordingFollower()
        async with log.follow(follower):
            read = [entry.position for entry in (await full_feed(log)).entries]
            await entries_of(follower, after)
            live = [entry.position for entry in follower.entries]
            assert live == list(range(live[0], live[0] + len(live)))
            assert live[0] <= (read[-1] if read else 0) + 1

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        for after in range(1, 12):
            await asyncio.sleep(0)
            group.create_task(attach(after))


async def test_a_follower_that_raises_affects_neither_append_nor_other_followers(
    recorder: EventRecorder, log: WholeLog, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = RecordingFollower(), RecordingFollower()
    tries: list[Notice] = []

    def broken(entry: Notice) -> None:
        tries.append(entry)
        raise RuntimeError("a secret")

    async with log.follow(before), log.follow(broken), log.follow(after):
        generation = await recorder.run_to_end()
        assert len(await entries_of(before, 6)) == len(await entries_of(after, 6)) == 6
    assert len(tries) == 6
    assert statuses(await log.generation(generation.generation_id))[-1] == "completed"
    assert caplog.records
    assert "a secret" not in caplog.text


async def test_a_follower_that_leaves_gets_nothing_more_and_others_do(recorder: EventRecorder, log: WholeLog) -> None:
    leaving, staying = RecordingFollower(), RecordingFollower()
    async with log.follow(staying):
        async with log.follow(leaving):
            await recorder.start()
            await entries_of(leaving, 1)
        await recorder.start()
        await entries_of(staying, 2)
    assert len(leaving.entries) == 1


async def test_followers_get_no_refused_or_retried_appends(recorder: EventRecorder, log: WholeLog) -> None:
    append, generation = recorder.prepare_start()
    await log.append(append)
    follower = RecordingFollower()
    async with log.follow(follower):
        await log.append(append)
        with pytest.raises(Conflict):
            await log.append(from_another_writer(append, 1))
        await recorder.move(generation, "composition")
        await entries_of(follower, 1)
    assert [entry.sequence for entry in follower.entries] == [2]


# --- the feed --------------------------------------------------------------------------------------------


async def test_an_unknown_user_has_an_empty_feed(log: WholeLog) -> None:
    feed = await log.feed("nobody", after=0, anchor=0, limit=10)
    assert (list(feed.entries), feed.upto, feed.head, feed.floor, [*feed.deleted_spans]) == ([], 0, 0, 0, [])
    assert feed.anchor_id is not None
    assert (await log.feed("nobody", after=0, anchor=1, limit=10)).anchor_id is None


async def test_pages_of_any_size_return_the_whole_feed_once_in_order(recorder: EventRecorder, log: WholeLog) -> None:
    for _ in range(3):
        await recorder.run_to_end()
    every = list((await full_feed(log)).entries)
    assert len(every) == 18
    for limit in (1, 2, 5, 17, 18, 19, 1_000):
        sent: list[Logged] = []
        after = 0
        while True:
            feed = await log.feed("ada", after=after, anchor=0, limit=limit)
            assert len(feed.entries) <= limit
            assert feed.head == 18
            sent += feed.entries
            if feed.upto == feed.head:
                break
            assert feed.upto > after
            after = feed.upto
        assert sent == every


async def test_a_read_with_limit_zero_returns_only_bounds_and_anchor(recorder: EventRecorder, log: WholeLog) -> None:
    await recorder.run_to_end()
    feed = await log.feed("ada", after=2, anchor=4, limit=0)
    ids = [entry.event_id for entry in (await full_feed(log)).entries]
    assert (list(feed.entries), feed.upto, feed.head, feed.anchor_id) == ([], 2, 6, ids[3])


async def test_the_anchor_of_every_position_is_the_id_of_its_event(recorder: EventRecorder, log: WholeLog) -> None:
    await recorder.run_to_end()
    for entry in (await full_feed(log)).entries:
        feed = await log.feed("ada", after=0, anchor=entry.position, limit=0)
        assert (feed.anchor_id, [*feed.deleted_spans]) == (entry.event_id, [])
    for beyond in (7, 8, 1_000_000):
        assert (await log.feed("ada", after=0, anchor=beyond, limit=0)).anchor_id is None


async def test_the_anchor_before_the_first_event_depends_on_user_and_epoch_only(opener: LogOpener) -> None:
    one, two = await opener(epoch="one"), await opener(epoch="two")

    async def zero(recorder: EventRecorder, user_id: str) -> int | None:
        return (await recorder.log.feed(user_id, after=0, anchor=0, limit=0)).anchor_id

    ids = [await zero(recorder, user_id) for recorder in (one, two) for user_id in ("ada", "bob")]
    assert len(set(ids)) == 4
    assert None not in ids
    await one.start("ada")
    assert await zero(one, "ada") == ids[0]
    assert (one.log.epoch, two.log.epoch) == ("one", "two")


async def test_a_read_beyond_the_head_finds_nothing(recorder: EventRecorder, log: WholeLog) -> None:
    await recorder.start()
    feed = await log.feed("ada", after=5, anchor=0, limit=10)
    assert (list(feed.entries), feed.head) == ([], 1)


async def test_the_head_cursor_of_a_new_user_is_before_the_first_event(recorder: EventRecorder, log: WholeLog) -> None:
    cursor = await log.head_cursor("ada")
    assert (cursor.live, cursor.seen) == (0, 0)
    generation = await recorder.start()
    sent, _ = await pull(log, "ada", cursor)
    assert event_keys(sent) == [(generation.generation_id, 1)]


async def test_the_head_cursor_covers_running_generations_and_no_ended_ones(
    recorder: EventRecorder, log: WholeLog
) -> None:
    await recorder.run_to_end()
    running = await recorder.move(await recorder.start(), "composition")
    await recorder.run_to_end()
    cursor = await log.head_cursor("ada")
    assert (cursor.live, cursor.seen) == (14, 6)
    sent, behind = await pull(log, "ada", cursor)
    assert event_keys(sent) == [(running.generation_id, 1), (running.generation_id, 2)]
    assert (behind.live, behind.seen) == (14, 14)


async def test_the_head_cursor_of_an_idle_user_is_the_head(recorder: EventRecorder, log: WholeLog) -> None:
    ended = await recorder.run_to_end()
    cursor = await log.head_cursor("ada")
    assert (cursor.live, cursor.seen) == (6, 6)
    assert await usable(log, "ada", cursor)
    assert not await usable(log, "bob", cursor)
    assert (await pull(log, "ada", cursor))[0] == []
    assert await log.remove(ended.generation_id, retention=True)
    assert await usable(log, "ada", await log.head_cursor("ada"))


# --- what is yet to be told ------------------------------------------------------------------------------


async def test_undelivered_ends_are_kept_in_order_until_delivered(opener: LogOpener) -> None:
    recorder = await opener(outbox=True)
    log = recorder.log
    slow = await recorder.start("ada")
    quick = await recorder.run_to_end("bob", face_swap=True)
    slow = await recorder.move(slow, "failed")
    last = await recorder.start_and_fail("ada")
    await recorder.start("ada")
    ends = []
    for generation in (quick, slow, last):
        history = await log.generation(generation.generation_id)
        assert history is not None
        ends.append(history.events[-1])
    assert list(await log.claim_undelivered(10)) == ends
    assert list(await log.claim_undelivered(2)) == ends[:2]
    assert list(await log.claim_undelivered(0)) == []
    await log.delivered(slow.generation_id)
    assert list(await log.claim_undelivered(10)) == [ends[0], ends[2]]
    for generation in (quick, slow, last):
        await log.delivered(generation.generation_id)
    assert list(await log.claim_undelivered(10)) == []
    assert (await log.generation(last.generation_id)) is not None


async def test_a_retried_append_of_a_delivered_end_is_not_queued_again(
    opener: LogOpener,
) -> None:
    recorder = await opener(outbox=True)
    append, generation = recorder.prepare(await recorder.start(), "failed")
    await recorder.log.append(append)
    await recorder.log.append(append)
    assert len(await recorder.log.claim_undelivered(10)) == 1
    await recorder.log.delivered(generation.generation_id)
    await recorder.log.append(append)
    assert list(await recorder.log.claim_undelivered(10)) == []


@pytest.mark.parametrize("retention", [True, False])
async def test_a_removed_generation_is_not_delivered(opener: LogOpener, retention: bool) -> None:
    recorder = await opener(outbox=True)
    gone, kept = await recorder.start_and_fail(), await recorder.start_and_fail()
    assert await recorder.log.remove(gone.generation_id, retention=retention)
    assert [entry.generation_id for entry in await recorder.log.claim_undelivered(10)] == [kept.generation_id]
    await recorder.log.delivered(gone.generation_id)
    await recorder.log.delivered("edit_1_unknown")
    assert [entry.generation_id for entry in await recorder.log.claim_undelivered(10)] == [kept.generation_id]


async def test_without_an_outbox_nothing_is_undelivered(recorder: EventRecorder, log: WholeLog) -> None:
    generation = await recorder.start_and_fail()
    assert list(await log.claim_undelivered(10)) == []
    await log.delivered(generation.generation_id)
