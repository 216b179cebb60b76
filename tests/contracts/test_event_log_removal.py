"""The contract of `support.builders.WholeLog`: removal, retention and lists of generations."""

import asyncio
import contextlib
from datetime import timedelta
from itertools import pairwise

import pytest

from domain.errors import Conflict, NotFinished
from domain.feed import Cursor
from domain.ports.log import Removed
from support.builders import EventRecorder, RecordingFollower, WholeLog, statuses
from support.event_log import event_keys, full_feed, image, pull, usable

# --- removal ---------------------------------------------------------------------------------------------

retentions = pytest.mark.parametrize("retention", [True, False])


@retentions
async def test_a_removed_generation_looks_like_an_unknown_one(
    recorder: EventRecorder, log: WholeLog, retention: bool
) -> None:
    ended, other = await recorder.run_to_end(key="k"), await recorder.run_to_end()
    credit = (await log.standing("ada")).credit
    assert await log.remove(ended.generation_id, retention=retention) is True
    assert await log.generation(ended.generation_id) is None
    assert [history.generation_id for history in await log.generations("ada", limit=10)] == [other.generation_id]
    assert await log.find_by_idempotency_key("ada", "k") is None
    kept = [entry for entry in (await full_feed(log)).entries if entry.event is not None]
    assert {entry.generation_id for entry in kept} == {other.generation_id}
    assert (await log.standing("ada")).credit == credit
    assert await log.remove(ended.generation_id, retention=retention) is False
    append, _ = recorder.prepare(await recorder.start(), "composition")
    with pytest.raises(Conflict):
        await log.append(append._replace(generation_id=ended.generation_id, sequence=7))


@retentions
async def test_an_unknown_generation_cannot_be_removed(log: WholeLog, retention: bool) -> None:
    assert await log.remove("edit_1_unknown", retention=retention) is False


@pytest.mark.parametrize("strange", ["", "edit_1_\ud800", "a\x00b", "'; DROP TABLE users; --", "%", "x" * 60_000])
async def test_reads_accept_any_text(recorder: EventRecorder, log: WholeLog, strange: str) -> None:
    await recorder.start_and_fail()
    before = await image(log, "ada")
    assert await log.generation(strange) is None
    assert await log.remove(strange, retention=False) is False
    assert await image(log, "ada") == before


@pytest.mark.parametrize("user_id", ["'", '"; --', "Ünï 🎨 : % * {}", "ADA", "ada ", "e\u0301", "1" * 128])
async def test_user_ids_of_any_characters_stay_distinct(recorder: EventRecorder, log: WholeLog, user_id: str) -> None:
    await recorder.start_and_fail("ada", key="k")
    running = await recorder.start(user_id, key="k")
    assert [entry.user_id for entry in (await full_feed(log, user_id)).entries] == [user_id]
    assert [history.generation_id for history in await log.generations(user_id, limit=10)] == [running.generation_id]
    assert ((await log.standing("ada")).credit, (await log.standing(user_id)).credit) == (100, 99)


@retentions
async def test_a_running_generation_cannot_be_removed(recorder: EventRecorder, log: WholeLog, retention: bool) -> None:
    running = await recorder.start()
    before = await image(log, "ada", running.generation_id)
    with pytest.raises(NotFinished):
        await log.remove(running.generation_id, retention=retention)
    assert await image(log, "ada", running.generation_id) == before


@retentions
async def test_followers_are_notified_of_a_removal_once_and_after_the_events(
    recorder: EventRecorder, log: WholeLog, retention: bool
) -> None:
    follower = RecordingFollower()
    async with log.follow(follower):
        ended, other = await recorder.run_to_end(), await recorder.start()
        await follower.until(lambda entries: len(entries) == 7)  # What is removed before it is read is a gap.
        for _ in range(2):
            await log.remove(ended.generation_id, retention=retention)
        await log.remove(ended.generation_id, retention=True)
        await log.remove("edit_1_unknown", retention=retention)
        with pytest.raises(NotFinished):
            await log.remove(other.generation_id, retention=retention)
        await follower.until(lambda _: bool(follower.removed))
    assert follower.removed == [Removed("ada", ended.generation_id)]


async def test_retention_raises_the_floor_to_the_last_purged_position(recorder: EventRecorder, log: WholeLog) -> None:
    one, two, _ = [await recorder.start_and_fail() for _ in range(3)]
    assert await log.remove(one.generation_id, retention=True)
    assert (await full_feed(log)).floor == 2
    assert await log.remove(two.generation_id, retention=True)
    feed = await full_feed(log)
    assert (feed.floor, feed.head) == (4, 6)
    assert [entry.position for entry in feed.entries] == [5, 6]


async def test_tombstones_are_removed_when_retention_would_have_removed_the_events(
    recorder: EventRecorder, log: WholeLog
) -> None:
    gone, _ = await recorder.start_and_fail(), await recorder.start_and_fail()
    assert await log.remove(gone.generation_id, retention=False)
    assert (await full_feed(log)).floor == 0
    assert gone.generation_id in await log.finished_before(recorder.clock.step(), 10)
    assert await log.remove(gone.generation_id, retention=True)
    feed = await full_feed(log)
    assert feed.floor == 2
    assert [entry.position for entry in feed.entries] == [3, 4]
    assert gone.generation_id not in await log.finished_before(recorder.clock.step(), 10)
    assert await log.remove(gone.generation_id, retention=True) is False


async def test_retention_never_lowers_the_floor(recorder: EventRecorder, log: WholeLog) -> None:
    one, two = await recorder.start_and_fail(), await recorder.start_and_fail()
    assert await log.remove(two.generation_id, retention=True)
    ids = (await log.feed("ada", after=0, anchor=4, limit=0)).anchor_id
    assert await log.remove(one.generation_id, retention=True)
    feed = await log.feed("ada", after=0, anchor=4, limit=10)
    assert (feed.floor, feed.anchor_id, list(feed.entries)) == (4, ids, [])


async def test_deleting_keeps_the_floor_and_leaves_tombstones_with_event_ids(
    recorder: EventRecorder, log: WholeLog
) -> None:
    generations = [await recorder.start_and_fail() for _ in range(3)]
    every = (await full_feed(log)).entries
    assert await log.remove(generations[1].generation_id, retention=False)
    feed = await full_feed(log)
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
async def test_removing_any_generation_leaves_other_and_later_ones_whole(
    recorder: EventRecorder, log: WholeLog, retention: bool, which: tuple[int, ...]
) -> None:
    generations = [await recorder.start_and_fail() for _ in range(3)]
    every = list((await full_feed(log)).entries)
    for index in which:
        assert await log.remove(generations[index].generation_id, retention=retention)
    left = [generations[index].generation_id for index in range(3) if index not in which]
    feed = await full_feed(log)
    kept = [entry for entry in feed.entries if entry.event is not None]
    assert kept == [entry for entry in every if entry.generation_id in left]
    assert (feed.head, feed.upto) == (6, 6)
    assert feed.floor == (max(2 * index + 2 for index in which) if retention else 0)
    # A new client, and one at the head, continue without a gap.
    at_head = Cursor(6, every[-1].event_id, 6)
    attached = await log.head_cursor("ada")
    assert attached == at_head
    following = await recorder.run_to_end()
    for cursor in (at_head, attached):
        for limit in (1, 2, 100):
            sent, _ = await pull(log, "ada", cursor, limit)
            assert [(entry.generation_id, entry.position) for entry in sent] == [
                (following.generation_id, position) for position in range(7, 13)
            ]


async def test_the_event_id_at_the_floor_is_kept_and_lower_ones_are_removed(
    recorder: EventRecorder, log: WholeLog
) -> None:
    for _ in range(2):
        await recorder.start_and_fail()
    every = (await full_feed(log)).entries
    for history in await log.generations("ada", limit=10):
        assert await log.remove(history.generation_id, retention=True)
    assert (await log.feed("ada", after=0, anchor=4, limit=0)).anchor_id == every[3].event_id
    for below in (0, 1, 2, 3):
        assert not await usable(log, "ada", Cursor(below, every[below - 1].event_id, below))
    assert await usable(log, "ada", Cursor(4, every[3].event_id, 4))


async def test_a_running_generation_older_than_the_floor_stays_readable(recorder: EventRecorder, log: WholeLog) -> None:
    old = await recorder.start()
    ended = await recorder.start_and_fail()
    old = await recorder.move(old, "composition")
    assert await log.remove(ended.generation_id, retention=True)
    feed = await full_feed(log)
    assert (feed.floor, [entry.position for entry in feed.entries]) == (3, [1, 4])
    history = await log.generation(old.generation_id)
    assert statuses(history) == ["started", "composition"]
    cursor = await log.head_cursor("ada")
    assert event_keys((await pull(log, "ada", cursor))[0]) == [(old.generation_id, 1), (old.generation_id, 2)]
    await recorder.finish(old)
    assert event_keys((await pull(log, "ada", cursor, 1))[0]) == [(old.generation_id, n) for n in range(1, 7)]


async def test_reading_goes_on_from_before_the_floor_when_only_unwanted_events_went(
    recorder: EventRecorder, log: WholeLog
) -> None:
    running = await recorder.start()
    ended = await recorder.start_and_fail()
    running = await recorder.move(running, "composition")
    cursor = await log.head_cursor("ada")
    assert (cursor.live, cursor.seen) == (4, 0)
    assert await log.remove(ended.generation_id, retention=True)
    assert await usable(log, "ada", cursor)
    assert event_keys((await pull(log, "ada", cursor, 1))[0]) == [
        (running.generation_id, 1),
        (running.generation_id, 2),
    ]


@retentions
async def test_a_cursor_is_unusable_once_a_generation_it_followed_is_removed(
    recorder: EventRecorder, log: WholeLog, retention: bool
) -> None:
    wanted = await recorder.start()
    cursor = await log.head_cursor("ada")
    wanted = await recorder.move(wanted, "composition")
    middle = (await full_feed(log)).entries[-1]
    await recorder.move(wanted, "failed")
    behind = (await full_feed(log)).entries[-1]
    assert await log.remove(wanted.generation_id, retention=retention)
    for lost in (cursor, cursor._replace(seen=cursor.live), Cursor(middle.position, middle.event_id, middle.position)):
        assert not await usable(log, "ada", lost)
    assert await usable(log, "ada", Cursor(behind.position, behind.event_id, behind.position))


async def test_a_tombstone_is_open_from_its_first_event_until_before_its_last(
    recorder: EventRecorder, log: WholeLog
) -> None:
    await recorder.start_and_fail()
    gone = await recorder.move(await recorder.start(), "composition", "failed")
    await recorder.start_and_fail()
    assert await log.remove(gone.generation_id, retention=False)
    deleted_spans = [[*(await log.feed("ada", after=0, anchor=anchor, limit=0)).deleted_spans] for anchor in range(8)]
    assert deleted_spans == [[], [], [], [3], [3], [], [], []]


async def test_a_generation_deleted_before_it_was_seen_is_skipped(recorder: EventRecorder, log: WholeLog) -> None:
    cursor = await log.head_cursor("ada")
    gone = await recorder.start_and_fail()
    kept = await recorder.start_and_fail()
    assert await log.remove(gone.generation_id, retention=False)
    for limit in (2, 3, 100):
        sent, behind = await pull(log, "ada", cursor, limit)
        assert event_keys(sent) == [(kept.generation_id, 1), (kept.generation_id, 2)]
        assert behind.live == behind.seen == 4


async def test_tombstones_are_removed_once_the_floor_has_passed_them(recorder: EventRecorder, log: WholeLog) -> None:
    deleted, purged = await recorder.start_and_fail(), await recorder.start_and_fail()
    assert await log.remove(deleted.generation_id, retention=False)
    assert await log.remove(purged.generation_id, retention=True)
    feed = await full_feed(log)
    assert (list(feed.entries), feed.upto, feed.head, feed.floor, [*feed.deleted_spans]) == ([], 4, 4, 4, [])
    assert not (await log.feed("ada", after=0, anchor=1, limit=0)).deleted_spans


async def test_deleting_below_the_floor_leaves_no_tombstones(recorder: EventRecorder, log: WholeLog) -> None:
    low, high = await recorder.start_and_fail(), await recorder.start_and_fail()
    assert await log.remove(high.generation_id, retention=True)
    assert await log.remove(low.generation_id, retention=False)
    feed = await full_feed(log)
    assert (list(feed.entries), feed.floor, feed.head, [*feed.deleted_spans]) == ([], 4, 4, [])


async def test_floors_are_separate_per_user(recorder: EventRecorder, log: WholeLog) -> None:
    gone, _ = await recorder.start_and_fail("ada"), await recorder.start_and_fail("bob")
    assert await log.remove(gone.generation_id, retention=True)
    assert [(await full_feed(log, user_id)).floor for user_id in ("ada", "bob")] == [2, 0]


async def test_positions_stay_contiguous_under_retention(recorder: EventRecorder, log: WholeLog) -> None:
    previous = await recorder.start_and_fail()
    for turn in range(2, 40):
        current = await recorder.start_and_fail()
        assert await log.remove(previous.generation_id, retention=True)
        feed = await full_feed(log)
        assert [entry.position for entry in feed.entries] == [2 * turn - 1, 2 * turn]
        assert (feed.head, feed.floor) == (2 * turn, 2 * turn - 2)
        previous = current


# --- lists -----------------------------------------------------------------------------------------------


async def test_generations_come_newest_first_filtered_and_in_pages(recorder: EventRecorder, log: WholeLog) -> None:
    running = [await recorder.start() for _ in range(3)]
    ended = [await recorder.start_and_fail() for _ in range(3)]
    running.append(await recorder.start())
    await recorder.start("bob")

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


async def test_the_age_of_a_generation_is_that_of_its_first_event(recorder: EventRecorder, log: WholeLog) -> None:
    older, newer = await recorder.start(), await recorder.start()
    await recorder.move(newer, "failed")
    await recorder.move(older, "failed")
    found = await log.generations("ada", active=False, limit=10)
    assert [history.generation_id for history in found] == [newer.generation_id, older.generation_id]


async def test_unfinished_returns_running_generations_of_all_users_oldest_first(
    recorder: EventRecorder, log: WholeLog
) -> None:
    one = await recorder.start("ada")
    two = await recorder.start("bob")
    await recorder.start_and_fail("ada")
    three = await recorder.start("ada")
    two = await recorder.move(two, "composition")
    found = await log.unfinished()
    assert [history.generation_id for history in found] == [one.generation_id, two.generation_id, three.generation_id]
    assert [statuses(history)[-1] for history in found] == ["started", "composition", "started"]
    for generation in (one, two, three):
        await recorder.move(generation, "failed")
    assert list(await log.unfinished()) == []


async def test_finished_before_returns_the_oldest_ends_first(recorder: EventRecorder, log: WholeLog) -> None:
    slow = await recorder.start("ada")
    quick = await recorder.start_and_fail("bob")
    recorder.clock.step(10)
    await recorder.move(slow, "failed")
    recorder.clock.step(10)
    last = await recorder.start_and_fail("ada")
    await recorder.start("ada")
    now = recorder.clock()
    every = [quick.generation_id, slow.generation_id, last.generation_id]
    assert list(await log.finished_before(now + timedelta(seconds=1), 10)) == every
    assert list(await log.finished_before(now + timedelta(seconds=1), 2)) == every[:2]
    assert list(await log.finished_before(now, 10)) == every[:2]
    assert list(await log.finished_before(now - timedelta(seconds=10), 10)) == every[:1]
    assert list(await log.finished_before(now - timedelta(seconds=20), 10)) == []
    assert await log.remove(quick.generation_id, retention=True)
    assert list(await log.finished_before(now + timedelta(seconds=1), 10)) == every[1:]


async def test_removal_during_appends_is_atomic(recorder: EventRecorder, log: WholeLog) -> None:
    """A reader of one atomic read never sees a generation without its beginning or its end."""
    done = asyncio.Event()

    async def churn() -> None:
        for turn in range(40):
            generation = await recorder.start_and_fail()
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


async def test_appends_sent_by_many_writers_leave_a_consistent_log(recorder: EventRecorder, log: WholeLog) -> None:
    """Eight writers drive three generations; each step is taken once, whoever takes it."""
    running = [await recorder.start() for _ in range(3)]
    steps = ("composition", "composition_completed", "openai_editing", "openai_editing_completed", "completed")

    async def drive() -> None:
        for generation in running:
            present = generation
            for status in steps:
                append, present = recorder.prepare(present, status)
                with contextlib.suppress(Conflict):
                    await log.append(append)
                await asyncio.sleep(0)

    await asyncio.gather(*(drive() for _ in range(8)))
    for generation in running:
        assert statuses(await log.generation(generation.generation_id)) == ["started", *steps]
    assert (await log.standing("ada")).credit == 97


# --- users -----------------------------------------------------------------------------------------------


async def test_a_removed_user_leaves_nothing_and_others_are_unchanged(recorder: EventRecorder, log: WholeLog) -> None:
    now = recorder.clock()
    for user in ("ada", "bob"):
        await log.grant(user, 7, key="g", at=now, until=now + timedelta(days=1))
    deleted, ended = await recorder.run_to_end(key="one"), await recorder.run_to_end(key="two")
    await recorder.start_and_fail("bob", key="one")
    running = await recorder.start("bob", key="two")
    await log.remove(deleted.generation_id, retention=False)
    before = await image(log, "bob", running.generation_id)
    follower = RecordingFollower()
    async with log.follow(follower):
        removed = await log.remove_user("ada")
        assert [list(await log.remove_user(user)) for user in ("ada", "nobody")] == [[], []]
        await recorder.finish(running)
        await follower.until(lambda entries: len(entries) == 5)
    assert sorted(removed) == sorted([deleted.generation_id, ended.generation_id])
    assert follower.removed == [Removed("ada", ended.generation_id)]
    assert follower.removed_users == ["ada"]
    assert before != await image(log, "bob", running.generation_id)
    assert await log.generation(ended.generation_id) is None
    assert list(await log.generations("ada", limit=10)) == []
    assert await log.find_by_idempotency_key("ada", "two") is None
    assert (await log.standing("ada")).credit == 100
    assert await log.grant("ada", 7, key="g", at=now, until=now + timedelta(days=1)) == 107
    assert await log.find_by_idempotency_key("bob", "one") is not None
    assert list(await log.finished_before(recorder.clock.step(), 10)) == [
        history.generation_id for history in reversed(await log.generations("bob", limit=10))
    ]


async def test_a_user_with_running_work_is_not_removed(recorder: EventRecorder, log: WholeLog) -> None:
    await recorder.run_to_end()
    running = await recorder.start()
    before = await image(log, "ada", running.generation_id)
    with pytest.raises(NotFinished):
        await log.remove_user("ada")
    assert await image(log, "ada", running.generation_id) == before


async def test_the_cursors_of_a_removed_user_are_unusable_and_new_ones_are_not(
    recorder: EventRecorder, log: WholeLog
) -> None:
    first = await log.head_cursor("ada")
    await recorder.run_to_end()
    old = [await log.head_cursor("ada")]
    await recorder.run_to_end()
    old.append(await log.head_cursor("ada"))
    await log.remove_user("ada")
    assert [await usable(log, "ada", cursor) for cursor in (first, *old)] == [True, False, False]
    assert await log.head_cursor("ada") == first
    for _ in range(3):
        await recorder.run_to_end()
    assert [await usable(log, "ada", cursor) for cursor in (first, *old)] == [True, False, False]
    feed = await full_feed(log)
    assert [entry.position for entry in feed.entries] == list(range(1, 19))
    assert (feed.floor, feed.head) == (0, 18)


async def test_a_removed_users_undelivered_webhooks_are_forgotten(recorder: EventRecorder, log: WholeLog) -> None:
    await recorder.run_to_end()
    await log.remove_user("ada")
    assert list(await log.claim_undelivered(10)) == []


async def test_a_start_and_a_removal_at_once_leave_the_generation_whole_or_not_at_all(
    recorder: EventRecorder, log: WholeLog
) -> None:
    for _ in range(10):
        await recorder.run_to_end()
        start, removal = await asyncio.gather(recorder.start(), log.remove_user("ada"), return_exceptions=True)
        assert not isinstance(start, BaseException)
        assert await log.generation(start.generation_id) is not None
        if isinstance(removal, BaseException):
            assert isinstance(removal, NotFinished)
        await recorder.finish(start)
