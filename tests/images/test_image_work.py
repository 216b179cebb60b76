"""Image work on threads: limits, cancellation, and fairness between users."""

import asyncio
import os
import re
import threading
import time
from pathlib import Path

import pytest

from adapters.images.threads import ImageThreads
from domain.errors import Draining
from domain.identity import WORKING_FOR


async def test_work_runs_on_a_thread_of_its_own() -> None:
    threads = ImageThreads()
    assert await threads.run(threading.get_ident) != threading.get_ident()
    threads.close()


async def test_an_exception_of_the_work_is_raised() -> None:
    threads = ImageThreads()
    with pytest.raises(ZeroDivisionError):
        await threads.run(divmod, 1, 0)
    threads.close()


@pytest.mark.skipif(not Path("/proc/self/sched").exists(), reason="the kernel does not tell priorities in /proc")
async def test_everything_else_goes_first_on_a_shared_core() -> None:
    threads = ImageThreads()
    text = await threads.run(Path("/proc/thread-self/sched").read_text)
    shown = {name: int(value) for name, value in re.findall(r"^(\S+) +: +(\d+)$", text, re.MULTILINE)}
    assert shown["prio"] >= 120 + 10
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 12):
        assert shown["se.slice"] == 100_000_000
    threads.close()


async def test_no_more_work_runs_at_once_than_allowed() -> None:
    threads = ImageThreads(1)
    running, most = 0, 0

    def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        running -= 1

    await asyncio.gather(*(threads.run(work) for _ in range(5)))
    assert most == 1
    threads.close()


async def test_there_are_never_more_threads_than_cores() -> None:
    threads = ImageThreads(1000)
    cores = len(os.sched_getaffinity(0))
    barrier = threading.Barrier(cores + 1)
    waiting = [asyncio.ensure_future(threads.run(barrier.wait)) for _ in range(barrier.parties)]
    while barrier.n_waiting < cores and not any(each.done() for each in waiting):
        await asyncio.sleep(0.005)
    # One more thread would release the barrier.
    await asyncio.sleep(0.1)
    assert barrier.n_waiting == cores
    barrier.abort()
    await asyncio.gather(*waiting, return_exceptions=True)
    threads.close()


async def test_work_cancelled_in_the_queue_is_never_started() -> None:
    threads = ImageThreads(1)
    go, begun = threading.Event(), threading.Event()
    first = asyncio.ensure_future(threads.run(go.wait))
    second = asyncio.ensure_future(threads.run(begun.set))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second])
    go.set()
    await first
    await threads.run(int)
    assert not begun.is_set()
    threads.close()


async def test_closed_threads_refuse_the_work_that_waits_and_all_that_comes() -> None:
    threads = ImageThreads(1)
    barrier = threading.Barrier(2)
    first = asyncio.ensure_future(threads.run(barrier.wait))
    second = asyncio.ensure_future(threads.run(int))
    while not barrier.n_waiting:
        await asyncio.sleep(0.005)
    threads.close()
    barrier.wait()
    await first
    for late in (second, threads.run(int)):
        with pytest.raises(Draining):
            await late


# --- the queue --------------------------------------------------------------------------------------------


class Work:
    """Work that waits for its event in `go`. `order` has the names in the order in which they started."""

    def __init__(self, threads: ImageThreads) -> None:
        self.threads = threads
        self.order: list[str] = []
        self.go: dict[str, threading.Event] = {}

    def begin(self, user: str, name: str, cost: int) -> asyncio.Task[None]:
        self.go[name] = threading.Event()

        async def take_a_turn() -> None:
            WORKING_FOR.set(user)
            async with self.threads.turn(cost) as run:
                await run(self._work, name)

        return asyncio.create_task(take_a_turn())

    def _work(self, name: str) -> None:
        self.order.append(name)
        assert self.go[name].wait(30)

    async def until(self, *names: str) -> None:
        async with asyncio.timeout(30):
            while self.order != list(names):
                await asyncio.sleep(0.001)


async def test_users_share_the_queue_fairly_however_much_each_of_them_sends() -> None:
    work = Work(ImageThreads(1))
    tasks = [work.begin("ada", "first", 10)]
    await work.until("first")
    tasks += [work.begin("ada", f"a{number}", 10) for number in range(4)]
    await asyncio.sleep(0)
    tasks += [work.begin("bob", "b0", 10), work.begin("cy", "c0", 10)]
    await asyncio.sleep(0)
    for event in work.go.values():
        event.set()
    await asyncio.gather(*tasks)
    assert set(work.order[1:4]) == {"a0", "b0", "c0"}
    assert work.order[4:] == ["a1", "a2", "a3"]
    work.threads.close()


async def test_small_work_overtakes_large_work_of_other_users() -> None:
    work = Work(ImageThreads(1))
    tasks = [work.begin("ada", "first", 10)]
    await work.until("first")
    tasks += [work.begin("bob", "large", 10_000_000)]
    await asyncio.sleep(0)
    tasks += [work.begin("cy", "small", 10)]
    await asyncio.sleep(0)
    for event in work.go.values():
        event.set()
    await asyncio.gather(*tasks)
    assert work.order == ["first", "small", "large"]
    work.threads.close()


async def test_large_work_is_not_starved_by_small_work_of_new_users() -> None:
    work = Work(ImageThreads(1))
    tasks = [work.begin("ada", "first", 10)]
    await work.until("first")
    tasks += [work.begin("bob", "large", 1_000)]
    while "large" not in work.order:
        # A new user always has small work waiting before the next turn.
        begun = len(work.order)
        assert begun < 100
        tasks.append(work.begin(f"user{begun}", f"small{begun}", 100))
        await asyncio.sleep(0)
        work.go[work.order[-1]].set()
        while len(work.order) == begun:
            await asyncio.sleep(0.001)
    assert len(work.order) > 5
    for event in work.go.values():
        event.set()
    await asyncio.gather(*tasks)
    work.threads.close()


async def test_one_thread_is_kept_free_for_small_work() -> None:
    threads = ImageThreads(2)
    if threads.size < 2:
        pytest.skip("needs two cores")
    work = Work(threads)
    tasks = [work.begin("ada", "large", 25_000_000), work.begin("bob", "larger", 30_000_000)]
    await work.until("large")
    tasks.append(work.begin("cy", "small", 10))
    await work.until("large", "small")
    for event in work.go.values():
        event.set()
    await asyncio.gather(*tasks)
    assert work.order == ["large", "small", "larger"]
    threads.close()


@pytest.mark.parametrize("cost", [10, 25_000_000])
async def test_a_cancelled_turn_keeps_its_thread_until_its_work_ends(cost: int) -> None:
    work = Work(ImageThreads(2 if cost > 10 else 1))  # Only one thread does large work.
    first = work.begin("ada", "first", cost)
    await work.until("first")
    first.cancel()
    await asyncio.wait([first])
    second = work.begin("bob", "second", cost)
    await asyncio.sleep(0.05)
    assert work.order == ["first"]
    work.go["first"].set()
    work.go["second"].set()
    await second
    work.threads.close()
