"""When each terminal event is posted: order, retries, restarts and shutdown."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from adapters.sqlite.database import Database
from adapters.sqlite.log import SqliteLog
from domain.errors import LogUnavailable
from domain.feed import Logged
from domain.webhooks import NotDelivered, Webhooks
from support.builders import EventRecorder, SteppableClock, WholeLog
from support.doubles import ForwardingLog
from support.provider_faults import hang, listening
from support.webhooks import Receiver, ids, sender_to, status, until, until_all_delivered, webhooks_for, working

# --- the loop ----------------------------------------------------------------------------------------------


class Scripted:
    """`domain.webhooks.Poster` that raises the planned exceptions by generation, and accepts the other messages."""

    def __init__(self) -> None:
        #: Exceptions to raise, in turn; the last one repeats.
        self.plans: dict[str, list[Exception]] = {}
        self.posts: list[str] = []
        self.taken: list[str] = []

    async def post(self, message_id: str, body: bytes) -> None:
        generation_id = json.loads(body)["data"]["generationId"]
        self.posts.append(generation_id)
        await asyncio.sleep(0)
        plan = self.plans.get(generation_id)
        if plan:
            raise plan.pop(0) if len(plan) > 1 else plan[0]
        self.taken.append(generation_id)


async def test_oldest_end_is_posted_first(log: WholeLog) -> None:
    """Up to the two times eight that are claimed at once."""
    recorder = EventRecorder(log)
    late = await recorder.start("ada")
    ended = [await recorder.start_and_fail(f"user {index}") for index in range(30)]
    ended.append(await recorder.finish(late))
    poster = Scripted()
    async with working(webhooks_for(log, poster)):
        await until_all_delivered(log)
    places = [poster.posts.index(each.generation_id) for each in ended]
    assert len(poster.posts) == len(ended)
    assert all(abs(place - rank) <= 16 for rank, place in enumerate(places)), places


async def test_many_ends_are_posted_once_each(log: WholeLog) -> None:
    recorder = EventRecorder(log)
    poster = Scripted()
    async with working(webhooks_for(log, poster)):
        ended = [await recorder.start_and_fail(f"user {index % 7}") for index in range(300)]
        await until_all_delivered(log)
    assert sorted(poster.posts) == sorted(each.generation_id for each in ended)


async def test_slow_delivery_does_not_delay_others(memory: WholeLog, receiver: Receiver) -> None:
    recorder = EventRecorder(memory)
    slow = await recorder.start_and_fail()
    receiver.always[slow.generation_id] = hang
    async with working(webhooks_for(memory, sender_to(receiver.origin))):
        others = [await recorder.start_and_fail() for _ in range(30)]
        await until(lambda: len(receiver.ids) == len(others) and bool(receiver.posts(slow)))
        async with asyncio.timeout(60):
            while ids(await memory.claim_undelivered(10)) != [slow.generation_id]:
                await asyncio.sleep(0.005)
    assert sorted(receiver.ids) == [each.generation_id for each in others]
    assert len(receiver.posts(slow)) == 1


async def test_messages_that_always_fail_do_not_block_others(memory: WholeLog, receiver: Receiver) -> None:
    recorder = EventRecorder(memory)
    poison = [await recorder.start_and_fail() for _ in range(25)]
    receiver.always = {each.generation_id: hang for each in poison}
    webhooks = webhooks_for(memory, sender_to(receiver.origin, timeout=0.1))
    async with working(webhooks):
        await webhooks.flushed()
        others = [await recorder.start_and_fail() for _ in range(30)]
        await until(lambda: {*receiver.ids} == {each.generation_id for each in others})
        # All of them are still retried.
        await until(lambda: all(len(receiver.posts(each)) > 1 for each in poison))


async def test_concurrent_posts_are_limited(memory: WholeLog) -> None:
    class Counting(Scripted):
        at_once = most = 0

        async def post(self, message_id: str, body: bytes) -> None:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            await asyncio.sleep(0.001)
            self.at_once -= 1
            await super().post(message_id, body)

    poster = Counting()
    recorder = EventRecorder(memory)
    for _ in range(50):
        await recorder.start_and_fail()
    async with working(webhooks_for(memory, poster)):
        await until_all_delivered(memory)
    assert poster.most == 8


async def test_state_of_delivered_or_removed_messages_is_dropped(memory: WholeLog) -> None:
    class Watched(ForwardingLog):
        limits: ClassVar[list[int]] = []

        async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
            self.limits.append(limit)
            return await super().claim_undelivered(limit)

    recorder, poster = EventRecorder(memory), Scripted()
    refused = [await recorder.start_and_fail() for _ in range(20)]
    poster.plans = {each.generation_id: [NotDelivered("answered with 500")] for each in refused}
    watched = Watched(memory)
    webhooks = webhooks_for(watched, poster)
    async with working(webhooks):
        await webhooks.flushed()
        for each in refused[:10]:
            await memory.remove(each.generation_id, retention=False)
        poster.plans.clear()
        await until_all_delivered(memory)
        for _ in range(2):
            await recorder.start_and_fail()
            await webhooks.flushed()
    assert max(watched.limits) > watched.limits[0]
    assert watched.limits[-1] == watched.limits[0]


async def test_backoff_doubles_up_to_a_limit_and_is_logged_less_often(
    memory: WholeLog, caplog: pytest.LogCaptureFixture
) -> None:
    generation = await EventRecorder(memory).start_and_fail()
    poster = Scripted()
    poster.plans[generation.generation_id] = [NotDelivered("answered with 500")]
    async with working(Webhooks(memory, memory, poster, lambda: 0.0, backoff=0.01, longest=0.05)):
        await until(lambda: len(poster.posts) > 8)
    lines = [record for record in caplog.records if record.name == "domain.webhooks"]
    pauses = [record.args[-1] for record in lines if isinstance(record.args, tuple)]
    assert pauses == [0.01, 0.02, 0.05, 0.05]
    assert f"webhook {generation.generation_id}:2 was not delivered, attempt 4: answered with 500" in caplog.text


@pytest.mark.parametrize(("chance", "pause"), [(0.0, 8.0), (1.0, 4.0)])
async def test_backoff_has_jitter(
    memory: WholeLog, caplog: pytest.LogCaptureFixture, chance: float, pause: float
) -> None:
    poster = Scripted()
    poster.plans[(await EventRecorder(memory).start_and_fail()).generation_id] = [NotDelivered("answered with 500")]
    webhooks = Webhooks(memory, memory, poster, lambda: chance, backoff=8)
    async with working(webhooks):
        await webhooks.flushed()
    assert f"again in {pause:.0f} s" in caplog.text


async def test_retry_after_delays_only_its_own_message(memory: WholeLog, caplog: pytest.LogCaptureFixture) -> None:
    recorder = EventRecorder(memory)
    patient, greedy, plain = [await recorder.start_and_fail() for _ in range(3)]
    poster = Scripted()
    poster.plans[patient.generation_id] = [NotDelivered("answered with 429", after=60)]
    poster.plans[greedy.generation_id] = [NotDelivered("answered with 503", after=1e9)]
    poster.plans[plain.generation_id] = [NotDelivered("answered with 500")]
    async with working(webhooks_for(memory, poster)):
        await until(lambda: poster.posts.count(plain.generation_id) > 8)
    assert poster.posts.count(patient.generation_id) == 1
    assert "429; again in 60 s" in caplog.text
    assert "503; again in 3600 s" in caplog.text


async def test_unexpected_exception_of_the_sender_is_retried(
    memory: WholeLog, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = EventRecorder(memory)
    poster = Scripted()
    broken = await recorder.start_and_fail()
    poster.plans[broken.generation_id] = [ZeroDivisionError("secret")] * 2 + [NotDelivered("answered with 500")]
    async with working(webhooks_for(memory, poster)):
        await until(lambda: poster.posts.count(broken.generation_id) > 3)
        del poster.plans[broken.generation_id]
        await until_all_delivered(memory)
    assert poster.taken == [broken.generation_id]
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text


async def test_removed_generation_is_not_posted(log: WholeLog) -> None:
    recorder, poster = EventRecorder(log), Scripted()
    before, refused, last = [await recorder.start_and_fail() for _ in range(3)]
    await log.remove(before.generation_id, retention=False)
    poster.plans[refused.generation_id] = [NotDelivered("answered with 500")]
    async with working(webhooks_for(log, poster)):
        await until(lambda: poster.posts.count(refused.generation_id) > 2)
        await log.remove(refused.generation_id, retention=True)
        await until_all_delivered(log)
        # Entries read from the log before that are posted first.
        marker = await recorder.start_and_fail("bob")
        await until_all_delivered(log)
        tries = poster.posts.count(refused.generation_id)
        poster.plans.clear()
        again = await recorder.start_and_fail("bob")
        await until_all_delivered(log)
    assert poster.posts.count(refused.generation_id) == tries
    assert poster.taken == [each.generation_id for each in (last, marker, again)]
    assert before.generation_id not in poster.posts


# --- restarts, and a log that does not answer -------------------------------------------------------------


@asynccontextmanager
async def life(path: Path) -> AsyncIterator[WholeLog]:
    """A durable log, opened and closed."""
    database = Database(path, epoch="e1")
    try:
        yield SqliteLog(database, credits=100, clock=SteppableClock(), outbox=True)
    finally:
        await database.close()


async def test_undelivered_messages_are_posted_once_after_a_restart(tmp_path: Path, receiver: Receiver) -> None:
    earlier = Receiver()
    async with life(tmp_path / "log.db") as log, listening(earlier.origin):
        recorder = EventRecorder(log)
        taken, refused, unanswered = [await recorder.start_and_fail() for _ in range(3)]
        earlier.always = {refused.generation_id: status(500), unanswered.generation_id: hang}
        async with working(webhooks_for(log, sender_to(earlier.origin))):
            await until(lambda: len(earlier.posts(refused)) > 1 and bool(earlier.posts(unanswered)))
            while len(await log.claim_undelivered(10)) > 2:
                await asyncio.sleep(0.005)
        late = await recorder.start_and_fail()
    async with life(tmp_path / "log.db") as log:
        assert ids(await log.claim_undelivered(10)) == [each.generation_id for each in (refused, unanswered, late)]
        async with working(webhooks_for(log, sender_to(receiver.origin))):
            await until_all_delivered(log)
    assert earlier.ids == [taken.generation_id]
    assert sorted(receiver.ids) == [each.generation_id for each in (refused, unanswered, late)]
    assert len({post.body for post in (*earlier.posts(refused), *receiver.posts(refused))}) == 1


class Absent(ForwardingLog):
    """A log whose next `reads` reads and `marks` confirmations fail."""

    reads = 0
    marks = 0

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        if self.reads:
            self.reads -= 1
            raise LogUnavailable
        return await super().claim_undelivered(limit)

    async def delivered(self, generation_id: str) -> None:
        if self.marks:
            self.marks -= 1
            raise LogUnavailable
        await super().delivered(generation_id)


async def test_unavailable_log_is_retried_without_duplicates(memory: WholeLog) -> None:
    absent = Absent(memory)
    absent.reads, absent.marks = 2, 2
    generation = await EventRecorder(memory).start_and_fail()
    poster = Scripted()
    async with working(webhooks_for(absent, poster)):
        await until_all_delivered(memory)
    assert (absent.reads, absent.marks) == (0, 0)
    assert poster.posts == [generation.generation_id]


class Stale(ForwardingLog):
    """A log whose read of two ends returns only after the first was delivered."""

    def __init__(self, log: WholeLog) -> None:
        super().__init__(log)
        self.has_read_both = asyncio.Event()

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        entries = await super().claim_undelivered(limit)
        if len(entries) == 2 and not self.has_read_both.is_set():
            self.has_read_both.set()
            while len(await self.inner.claim_undelivered(2)) == 2:
                await asyncio.sleep(0.005)
        return entries


async def test_message_delivered_during_a_read_is_not_posted_again(memory: WholeLog) -> None:
    stale = Stale(memory)

    class Slow(Scripted):
        async def post(self, message_id: str, body: bytes) -> None:
            await super().post(message_id, body)
            await stale.has_read_both.wait()

    recorder = EventRecorder(memory)
    poster = Slow()
    async with working(webhooks_for(stale, poster)):
        first = await recorder.start_and_fail()
        await until(lambda: poster.posts == [first.generation_id])
        second = await recorder.start_and_fail()
        await until_all_delivered(memory)
    assert poster.posts == [first.generation_id, second.generation_id]


async def test_stopping_does_not_wait_for_a_pending_delivery(memory: WholeLog, receiver: Receiver) -> None:
    generation = await EventRecorder(memory).start_and_fail()
    receiver.always[generation.generation_id] = hang
    async with working(webhooks_for(memory, sender_to(receiver.origin))):
        await asyncio.wait_for(receiver.origin.reached.wait(), 20)
    await asyncio.wait_for(receiver.origin.left.wait(), 20)
    assert ids(await memory.claim_undelivered(1)) == [generation.generation_id]


async def test_shutdown_can_wait_until_all_ends_are_posted(memory: WholeLog) -> None:
    recorder = EventRecorder(memory)
    poster = Scripted()
    refused = await recorder.start_and_fail()
    poster.plans[refused.generation_id] = [NotDelivered("answered with 500", after=60)]
    webhooks = webhooks_for(memory, poster)
    async with working(webhooks):
        await webhooks.flushed()
        assert poster.posts == [refused.generation_id]
        ended = [await recorder.start_and_fail() for _ in range(20)]
        await webhooks.flushed()
        assert poster.taken == [each.generation_id for each in ended]


class Overtaken(ForwardingLog):
    """A log in which another generation ends during the first read."""

    def __init__(self, log: WholeLog, end: Callable[[], Awaitable[object]]) -> None:
        super().__init__(log)
        self.ends = [end]

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        entries = await super().claim_undelivered(limit)
        while self.ends:
            await self.ends.pop()()
        return entries


async def test_shutdown_also_waits_for_ends_during_a_read(memory: WholeLog) -> None:
    poster = Scripted()
    webhooks = webhooks_for(Overtaken(memory, EventRecorder(memory).start_and_fail), poster)
    async with working(webhooks):
        await webhooks.flushed()
        assert len(poster.posts) == 1
