"""The contract of `domain.ports.leases.WorkQueue`: every adapter of it passes this suite."""

import asyncio
from collections.abc import Callable

import pytest

from adapters.memory.queue import MemoryQueue
from domain.ports.leases import WorkQueue

QUEUES: dict[str, Callable[[], WorkQueue]] = {"memory": MemoryQueue}


@pytest.fixture(params=list(QUEUES))
async def queue(request: pytest.FixtureRequest) -> WorkQueue:
    return QUEUES[request.param]()


async def claim(queue: WorkQueue) -> str:
    async with asyncio.timeout(20):
        return await queue.claim()


async def turns(count: int = 5) -> None:
    """Let everybody who can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_jobs_of_a_user_are_claimed_in_the_order_offered(queue: WorkQueue) -> None:
    for name in ("a1", "a2", "a3"):
        await queue.offer("ada", name)
    assert (queue.waiting, queue.held) == (3, 0)
    assert [await claim(queue) for _ in range(3)] == ["a1", "a2", "a3"]
    assert (queue.waiting, queue.held) == (0, 3)


async def test_many_jobs_of_one_user_do_not_delay_the_first_of_another(queue: WorkQueue) -> None:
    for name in ("a1", "a2", "a3", "a4"):
        await queue.offer("ada", name)
    for name in ("b1", "b2"):
        await queue.offer("bob", name)
    await queue.offer("cy", "c1")
    assert [await claim(queue) for _ in range(7)] == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


async def test_a_late_user_waits_for_one_round_at_most(queue: WorkQueue) -> None:
    for number in range(50):
        await queue.offer("ada", f"a{number}")
    assert await claim(queue) == "a0"
    await queue.offer("bob", "b0")
    assert "b0" in [await claim(queue), await claim(queue)]


async def test_a_user_who_keeps_offering_does_not_overtake_others(queue: WorkQueue) -> None:
    await queue.offer("ada", "a1")
    await queue.offer("bob", "b1")
    assert await claim(queue) == "a1"
    await queue.offer("ada", "a2")
    assert [await claim(queue), await claim(queue)] == ["b1", "a2"]


async def test_a_claim_waits_until_something_is_offered(queue: WorkQueue) -> None:
    waiting = asyncio.create_task(queue.claim())
    await turns()
    assert not waiting.done()
    await queue.offer("ada", "a1")
    async with asyncio.timeout(20):
        assert await waiting == "a1"
    assert (queue.waiting, queue.held) == (0, 1)


async def test_each_generation_goes_to_one_claim(queue: WorkQueue) -> None:
    claims = [asyncio.create_task(queue.claim()) for _ in range(10)]
    await turns()
    for number in range(10):
        await queue.offer(f"user{number % 3}", f"g{number}")
    async with asyncio.timeout(20):
        assert {await claimed for claimed in claims} == {f"g{number}" for number in range(10)}
    assert (queue.waiting, queue.held) == (0, 10)


@pytest.mark.parametrize("turns_between", range(6))
async def test_a_cancelled_claim_loses_nothing(queue: WorkQueue, turns_between: int) -> None:
    """At whichever moment: what it did not return, the next one gets."""
    cancelled, patient = asyncio.create_task(queue.claim()), asyncio.create_task(queue.claim())
    await turns()
    offering = asyncio.create_task(queue.offer("ada", "a1"))
    await turns(turns_between)
    cancelled.cancel()
    await asyncio.wait([cancelled, offering])
    await turns()
    if cancelled.cancelled():
        assert patient.result() == "a1"
    else:
        assert cancelled.result() == "a1"
        await queue.offer("ada", "a2")
        await turns()
        assert patient.result() == "a2"
    assert queue.waiting == 0


async def test_a_released_job_is_neither_claimed_nor_waiting(queue: WorkQueue) -> None:
    await queue.offer("ada", "a1")
    await queue.release(await claim(queue))
    assert (queue.waiting, queue.held) == (0, 0)


async def test_releasing_an_unclaimed_job_changes_nothing(queue: WorkQueue) -> None:
    await queue.offer("ada", "a1")
    await queue.release("a1")
    await queue.release("unknown")
    assert (queue.waiting, queue.held) == (1, 0)
    assert await claim(queue) == "a1"


async def test_a_withdrawn_job_is_not_claimed_and_makes_room(queue: WorkQueue) -> None:
    for name in ("a1", "a2", "a3"):
        await queue.offer("ada", name)
    await queue.offer("bob", "b1")
    assert await queue.withdraw("a2") is True
    assert await queue.withdraw("b1") is True
    assert (queue.waiting, queue.held) == (2, 0)
    assert [await claim(queue), await claim(queue)] == ["a1", "a3"]
    assert queue.waiting == 0


async def test_a_job_that_does_not_wait_cannot_be_withdrawn(queue: WorkQueue) -> None:
    await queue.offer("ada", "a1")
    assert await claim(queue) == "a1"
    assert await queue.withdraw("a1") is False
    assert await queue.withdraw("unknown") is False
    assert queue.held == 1


async def test_withdrawing_the_last_job_settles_the_queue(queue: WorkQueue) -> None:
    await queue.offer("ada", "a1")
    settled = asyncio.create_task(queue.settled())
    await turns()
    assert not settled.done()
    assert await queue.withdraw("a1")
    async with asyncio.timeout(20):
        await settled


async def test_settled_waits_for_waiting_and_claimed_jobs(queue: WorkQueue) -> None:
    async with asyncio.timeout(20):
        await queue.settled()
    await queue.offer("ada", "a1")
    await queue.offer("bob", "b1")
    settled = asyncio.create_task(queue.settled())
    await turns()
    assert not settled.done()
    one, two = await claim(queue), await claim(queue)
    await turns()
    assert not settled.done()
    await queue.release(one)
    await turns()
    assert not settled.done()
    await queue.release(two)
    async with asyncio.timeout(20):
        await settled


async def test_a_queue_forgets_users_who_wait_for_nothing(queue: WorkQueue) -> None:
    for number in range(100):
        await queue.offer(f"user{number}", f"g{number}")
    for _ in range(100):
        await queue.release(await claim(queue))
    sizes = [len(value) for value in vars(queue).values() if hasattr(value, "__len__")]
    assert sizes == [0] * len(sizes)


# --- the line of those whose image URLs are to be fetched --------------------------------------------------


async def claim_fetch(queue: WorkQueue) -> str:
    async with asyncio.timeout(20):
        return await queue.claim(fetching=True)


async def test_fetching_and_work_have_separate_queues(queue: WorkQueue) -> None:
    await queue.offer("ada", "f1", fetching=True)
    await queue.offer("ada", "w1")
    assert (queue.waiting, queue.held) == (2, 0)
    assert (await claim(queue), await claim_fetch(queue)) == ("w1", "f1")
    assert (queue.waiting, queue.held) == (0, 2)
    assert await queue.renew(["w1", "f1", "x"]) == ["x"]


async def test_at_most_two_jobs_of_a_user_fetch_at_once_and_others_do_not_wait(queue: WorkQueue) -> None:
    for name in ("a1", "a2", "a3"):
        await queue.offer("ada", name, fetching=True)
    assert [await claim_fetch(queue), await claim_fetch(queue)] == ["a1", "a2"]
    third = asyncio.create_task(queue.claim(fetching=True))
    await turns()
    assert not third.done()
    await queue.offer("bob", "b1", fetching=True)
    async with asyncio.timeout(20):
        assert await third == "b1"
    await queue.release("a1")
    assert await claim_fetch(queue) == "a3"


async def test_a_fetched_job_frees_its_fetch_slot_once_it_is_claimed_for_work(queue: WorkQueue) -> None:
    for name in ("a1", "a2", "a3"):
        await queue.offer("ada", name, fetching=True)
    first, _ = await claim_fetch(queue), await claim_fetch(queue)
    third = asyncio.create_task(queue.claim(fetching=True))
    await queue.offer("ada", first)
    await turns()
    assert not third.done()
    assert await claim(queue) == first
    async with asyncio.timeout(20):
        assert await third == "a3"
    assert (queue.waiting, queue.held) == (0, 3)
    await queue.release(first)
    assert queue.held == 2


async def test_a_job_that_waits_to_fetch_can_be_withdrawn(queue: WorkQueue) -> None:
    await queue.offer("ada", "a1", fetching=True)
    assert await queue.withdraw("a1") is True
    assert await queue.withdraw("a1") is False
    async with asyncio.timeout(20):
        await queue.settled()
