"""Image work beside the event loop."""

import asyncio
import os
import threading
import time

import pytest

from adapters.image_work import ImageThreads


async def test_it_runs_beside_the_event_loop() -> None:
    threads = ImageThreads()
    assert await threads.run(threading.get_ident) != threading.get_ident()
    threads.close()


async def test_what_the_function_raises_is_raised() -> None:
    threads = ImageThreads()
    with pytest.raises(ZeroDivisionError):
        await threads.run(divmod, 1, 0)
    threads.close()


async def test_no_more_runs_at_once_than_allowed() -> None:
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
    # One more would open it.
    await asyncio.sleep(0.1)
    assert barrier.n_waiting == cores
    barrier.abort()
    await asyncio.gather(*waiting, return_exceptions=True)
    threads.close()


async def test_what_is_cancelled_in_line_is_never_begun() -> None:
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
