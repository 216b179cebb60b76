"""The contract of `domain.ports.leases.Leases`: every adapter of it passes this suite."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.memory.leases import MemoryLeases
from domain.ports.leases import Leases
from support.builders import PROPERTY
from support.nodes import Cluster, NodeLeases
from support.postgres import fresh_database, open_node


@asynccontextmanager
async def open_memory_leases() -> AsyncIterator[Leases]:
    yield MemoryLeases()


@asynccontextmanager
async def open_node_leases() -> AsyncIterator[Leases]:
    yield NodeLeases(Cluster())


@asynccontextmanager
async def open_postgres_leases() -> AsyncIterator[Leases]:
    async with fresh_database() as url, open_node(url) as storage:
        yield storage.leases


LEASES: dict[str, Callable[[], AbstractAsyncContextManager[Leases]]] = {
    "memory": open_memory_leases,
    "several nodes": open_node_leases,
    "postgres": open_postgres_leases,
}


@pytest.fixture(params=list(LEASES))
async def leases(request: pytest.FixtureRequest) -> AsyncIterator[Leases]:
    async with LEASES[request.param]() as leases:
        yield leases


async def claim(leases: Leases) -> str:
    async with asyncio.timeout(20):
        return await leases.claim()


async def turns(count: int = 5) -> None:
    """Let everybody who can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_jobs_of_a_user_are_claimed_in_the_order_offered(leases: Leases) -> None:
    for name in ("a1", "a2", "a3"):
        await leases.offer("ada", name)
    assert await leases.count() == (3, 0)
    assert [await claim(leases) for _ in range(3)] == ["a1", "a2", "a3"]
    assert await leases.count() == (0, 3)


async def test_many_jobs_of_one_user_do_not_delay_the_first_of_another(leases: Leases) -> None:
    for name in ("a1", "a2", "a3", "a4"):
        await leases.offer("ada", name)
    for name in ("b1", "b2"):
        await leases.offer("bob", name)
    await leases.offer("cy", "c1")
    assert [await claim(leases) for _ in range(7)] == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


async def test_a_late_user_waits_for_one_round_at_most(leases: Leases) -> None:
    for number in range(50):
        await leases.offer("ada", f"a{number}")
    assert await claim(leases) == "a0"
    await leases.offer("bob", "b0")
    assert "b0" in [await claim(leases), await claim(leases)]


async def test_a_user_who_keeps_offering_does_not_overtake_others(leases: Leases) -> None:
    await leases.offer("ada", "a1")
    await leases.offer("bob", "b1")
    assert await claim(leases) == "a1"
    await leases.offer("ada", "a2")
    assert [await claim(leases), await claim(leases)] == ["b1", "a2"]


async def test_a_claim_waits_until_something_is_offered(leases: Leases) -> None:
    waiting = asyncio.create_task(leases.claim())
    await turns()
    assert not waiting.done()
    await leases.offer("ada", "a1")
    async with asyncio.timeout(20):
        assert await waiting == "a1"
    assert await leases.count() == (0, 1)


async def test_each_generation_goes_to_one_claim(leases: Leases) -> None:
    claims = [asyncio.create_task(leases.claim()) for _ in range(10)]
    await turns()
    for number in range(10):
        await leases.offer(f"user{number % 3}", f"g{number}")
    async with asyncio.timeout(20):
        assert {await claimed for claimed in claims} == {f"g{number}" for number in range(10)}
    assert await leases.count() == (0, 10)


@pytest.mark.parametrize("turns_between", range(6))
async def test_a_cancelled_claim_loses_nothing(leases: Leases, turns_between: int) -> None:
    """At whichever moment: what it did not return, the next one gets."""
    cancelled, patient = asyncio.create_task(leases.claim()), asyncio.create_task(leases.claim())
    await turns()
    offering = asyncio.create_task(leases.offer("ada", "a1"))
    await turns(turns_between)
    cancelled.cancel()
    await asyncio.wait([cancelled, offering])
    async with asyncio.timeout(20):
        if cancelled.cancelled():
            assert await patient == "a1"
        else:
            assert cancelled.result() == "a1"
            await leases.offer("ada", "a2")
            assert await patient == "a2"
    assert (await leases.count()).waiting == 0


async def test_a_released_job_is_neither_claimed_nor_waiting(leases: Leases) -> None:
    await leases.offer("ada", "a1")
    await leases.release(await claim(leases))
    assert await leases.count() == (0, 0)


async def test_releasing_an_unclaimed_job_changes_nothing(leases: Leases) -> None:
    await leases.offer("ada", "a1")
    await leases.release("a1")
    await leases.release("unknown")
    assert await leases.count() == (1, 0)
    assert await claim(leases) == "a1"


async def test_a_withdrawn_job_is_not_claimed_and_makes_room(leases: Leases) -> None:
    for name in ("a1", "a2", "a3"):
        await leases.offer("ada", name)
    await leases.offer("bob", "b1")
    assert await leases.withdraw("a2") is True
    assert await leases.withdraw("b1") is True
    assert await leases.count() == (2, 0)
    assert [await claim(leases), await claim(leases)] == ["a1", "a3"]
    assert (await leases.count()).waiting == 0


@pytest.mark.parametrize("fetching", [False, True])
async def test_the_later_jobs_of_a_user_move_up_when_one_is_withdrawn(leases: Leases, fetching: bool) -> None:
    for name in ("a1", "a2", "a3", "a4"):
        await leases.offer("ada", name, fetching=fetching)
    for name in ("b1", "b2", "b3"):
        await leases.offer("bob", name, fetching=fetching)
    await leases.offer("ada", "x1", fetching=not fetching)
    await leases.withdraw("a1")
    await leases.withdraw("a3")
    assert await leases.positions() == {"a2": 1, "b1": 2, "a4": 3, "b2": 4, "b3": 5, "x1": 1}


async def test_a_job_that_does_not_wait_cannot_be_withdrawn(leases: Leases) -> None:
    await leases.offer("ada", "a1")
    assert await claim(leases) == "a1"
    assert await leases.withdraw("a1") is False
    assert await leases.withdraw("unknown") is False
    assert (await leases.count()).held == 1


async def test_a_job_that_waits_or_is_claimed_cannot_be_offered_again(leases: Leases) -> None:
    assert await leases.offer("ada", "a1") is True
    assert await leases.offer("ada", "a1") is False
    assert await leases.offer("ada", "a1", fetching=True) is False
    assert await claim(leases) == "a1"
    assert await leases.offer("ada", "a1") is False
    assert await leases.count() == (0, 1)
    await leases.release("a1")
    assert await leases.offer("ada", "a1") is True


async def test_a_drain_waits_for_claimed_jobs_and_for_waiting_ones_that_no_other_node_does(leases: Leases) -> None:
    await leases.offer("ada", "a1")
    await leases.offer("bob", "b1")
    one = await claim(leases)
    drained = asyncio.create_task(leases.drain())
    await turns()
    assert not drained.done()
    if not leases.shared:
        await leases.release(await claim(leases))
        await turns()
        assert not drained.done()
    await leases.release(one)
    async with asyncio.timeout(20):
        await drained
        await leases.drain()


async def test_withdrawing_the_last_job_ends_the_drain(leases: Leases) -> None:
    await leases.offer("ada", "a1")
    drained = asyncio.create_task(leases.drain())
    if leases.shared:
        await drained
    await turns()
    assert drained.done() is leases.shared
    assert await leases.withdraw("a1")
    async with asyncio.timeout(20):
        await drained


async def test_a_node_that_drains_claims_nothing_that_others_can_do() -> None:
    cluster = Cluster()
    leaving, staying = NodeLeases(cluster), NodeLeases(cluster)
    waiting = asyncio.create_task(leaving.claim())
    await turns()
    await leaving.drain()
    await staying.offer("ada", "a1")
    assert await claim(staying) == "a1"
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_a_chore_is_done_by_one_node_until_it_dies(leases: Leases) -> None:
    assert await leases.claim_chore("sweep", 10)
    assert await leases.claim_chore("sweep", 10)
    if isinstance(leases, NodeLeases):
        other = NodeLeases(leases.cluster)
        assert not await other.claim_chore("sweep", 10)
        assert await other.claim_chore("retention", 10)
        await leases.die()
        assert await other.claim_chore("sweep", 10)


#: A server costs more.
EXAMPLES = {"memory": 100, "several nodes": 100, "postgres": 10}
STEPS = st.lists(
    st.tuples(st.sampled_from(["offer", "fetch", "claim", "claim fetch", "withdraw", "release"]), st.integers(0, 7))
)


@pytest.mark.parametrize("name", list(LEASES))
def test_a_job_is_in_one_place_whatever_is_done(name: str) -> None:
    @settings(PROPERTY, max_examples=EXAMPLES[name])
    @given(STEPS)
    def check(steps: list[tuple[str, int]]) -> None:
        asyncio.run(_check_places(name, steps))

    check()


async def _check_places(name: str, steps: list[tuple[str, int]]) -> None:
    work, fetches = set[str](), set[str]()
    held, fetching = set[str](), set[str]()
    async with LEASES[name]() as leases:
        for step, number in steps:
            job, user = f"g{number}", f"user{number % 3}"
            match step:
                case "offer":
                    free = job not in work | fetches | held
                    assert await leases.offer(user, job) is free
                    work |= {job} if free else set()
                case "fetch":
                    free = job not in work | fetches | held | fetching
                    assert await leases.offer(user, job, fetching=True) is free
                    fetches |= {job} if free else set()
                case "claim" if work:
                    claimed = await claim(leases)
                    work.remove(claimed)
                    fetching.discard(claimed)
                    held.add(claimed)
                case "claim fetch" if any(_user_of(each) not in _busy(fetching) for each in fetches):
                    claimed = await claim_fetch(leases)
                    assert _user_of(claimed) not in _busy(fetching)
                    fetches.remove(claimed)
                    fetching.add(claimed)
                case "withdraw":
                    assert await leases.withdraw(job) is (job in work | fetches)
                    work.discard(job)
                    fetches.discard(job)
                case "release":
                    await leases.release(job)
                    held.discard(job)
                    fetching.discard(job)
            assert await leases.count() == (len(work) + len(fetches), len(held) + len(fetching))
            ranks = await leases.positions()
            for line in (work, fetches):
                assert sorted(ranks[each] for each in line) == [*range(1, len(line) + 1)]
            assert len(ranks) == len(work) + len(fetches)
            assert not await leases.renew([*held, *fetching])


def _user_of(job: str) -> int:
    return int(job[1:]) % 3


def _busy(fetching: set[str]) -> set[int]:
    users = [_user_of(each) for each in fetching]
    return {user for user in users if users.count(user) >= 2}


@pytest.mark.parametrize("name", list(LEASES))
def test_positions_are_the_order_in_which_jobs_are_claimed(name: str) -> None:
    @settings(PROPERTY, max_examples=EXAMPLES[name])
    @given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["offer", "offer", "offer", "claim", "withdraw"]))))
    def check(steps: list[tuple[int, str]]) -> None:
        asyncio.run(_check_positions(name, steps))

    check()


async def _check_positions(name: str, steps: list[tuple[int, str]]) -> None:
    async with LEASES[name]() as leases:
        for number, (user, step) in enumerate(steps):
            ranks = await leases.positions()
            match step:
                case "offer":
                    await leases.offer(f"user{user}", f"g{number}")
                case "claim" if ranks:
                    assert ranks[await claim(leases)] == 1
                case "withdraw" if ranks:
                    await leases.withdraw(list(ranks)[user % len(ranks)])
        ranks = await leases.positions()
        order = [await claim(leases) for _ in range((await leases.count()).waiting)]
        assert order == sorted(ranks, key=ranks.__getitem__)
        assert not await leases.positions()


async def test_leases_forget_users_who_wait_for_nothing(leases: Leases) -> None:
    for number in range(100):
        await leases.offer(f"user{number}", f"g{number}")
    for _ in range(100):
        await leases.release(await claim(leases))
    sizes = [
        len(value) for value in vars(leases).values() if hasattr(value, "__len__") and not isinstance(value, tuple)
    ]
    assert sizes == [0] * len(sizes)
    assert await leases.count() == (0, 0)


# --- the line of those whose image URLs are to be fetched --------------------------------------------------


async def claim_fetch(leases: Leases) -> str:
    async with asyncio.timeout(20):
        return await leases.claim(fetching=True)


async def test_fetching_and_work_have_separate_lines(leases: Leases) -> None:
    await leases.offer("ada", "f1", fetching=True)
    await leases.offer("ada", "w1")
    assert await leases.count() == (2, 0)
    assert (await claim(leases), await claim_fetch(leases)) == ("w1", "f1")
    assert await leases.count() == (0, 2)
    assert await leases.renew(["w1", "f1", "x"]) == ["x"]


async def test_at_most_two_jobs_of_a_user_fetch_at_once_and_others_do_not_wait(leases: Leases) -> None:
    for name in ("a1", "a2", "a3"):
        await leases.offer("ada", name, fetching=True)
    assert [await claim_fetch(leases), await claim_fetch(leases)] == ["a1", "a2"]
    third = asyncio.create_task(leases.claim(fetching=True))
    await turns()
    assert not third.done()
    await leases.offer("bob", "b1", fetching=True)
    async with asyncio.timeout(20):
        assert await third == "b1"
    await leases.release("a1")
    assert await claim_fetch(leases) == "a3"


async def test_a_fetched_job_frees_its_fetch_slot_once_it_is_claimed_for_work(leases: Leases) -> None:
    for name in ("a1", "a2", "a3"):
        await leases.offer("ada", name, fetching=True)
    first, _ = await claim_fetch(leases), await claim_fetch(leases)
    third = asyncio.create_task(leases.claim(fetching=True))
    await leases.offer("ada", first)
    await turns()
    assert not third.done()
    assert await claim(leases) == first
    async with asyncio.timeout(20):
        assert await third == "a3"
    assert await leases.count() == (0, 3)
    await leases.release(first)
    assert (await leases.count()).held == 2


async def test_later_jobs_move_up_when_one_that_has_fetched_is_withdrawn(leases: Leases) -> None:
    await leases.offer("ada", "a1", fetching=True)
    await leases.offer("ada", await claim_fetch(leases))
    for user_id, name in (("ada", "a2"), ("ada", "a3"), ("bob", "b1"), ("bob", "b2")):
        await leases.offer(user_id, name)
    assert await leases.withdraw("a1") is True
    assert await leases.count() == (4, 1)
    assert [await claim(leases) for _ in range(4)] == ["a2", "b1", "a3", "b2"]


async def test_the_positions_of_each_line_are_its_own(leases: Leases) -> None:
    for name in ("a1", "a2", "a3", "a4"):
        await leases.offer("ada", name, fetching=True)
    await leases.offer("bob", "w1")
    await leases.offer("bob", "b1", fetching=True)
    assert await leases.positions() == {"w1": 1, "a1": 1, "b1": 2, "a2": 3, "a3": 4, "a4": 5}
    assert [await claim_fetch(leases) for _ in range(3)] == ["a1", "b1", "a2"]
    assert await leases.positions() == {"w1": 1, "a3": 1, "a4": 2}
    # Ada has as many fetched for as allowed: others are claimed before her.
    await leases.offer("cy", "c1", fetching=True)
    assert await leases.positions() == {"w1": 1, "c1": 1, "a3": 2, "a4": 3}
    await leases.release("a1")
    assert await leases.positions() == {"w1": 1, "a3": 1, "c1": 2, "a4": 3}
    await leases.offer("ada", "a2")
    assert await leases.positions() == {"w1": 1, "a2": 2, "a3": 1, "c1": 2, "a4": 3}


async def test_a_job_that_waits_to_fetch_can_be_withdrawn(leases: Leases) -> None:
    await leases.offer("ada", "a1", fetching=True)
    assert await leases.withdraw("a1") is True
    assert await leases.withdraw("a1") is False
    async with asyncio.timeout(20):
        await leases.drain()
