"""The timeout that sets no timer where there is nothing to wait for."""

import asyncio

import pytest

from domain.timeouts import within


async def at_once(value: int) -> int:
    return value


async def test_what_does_not_wait_is_awaited_in_the_same_pass_whatever_the_limit() -> None:
    passed: list[int] = []
    asyncio.get_running_loop().call_soon(passed.append, 1)
    assert [await within(seconds, at_once(7)) for seconds in (None, 1, 0, -1)] == [7] * 4
    assert not passed


@pytest.mark.parametrize("seconds", [None, 60])
async def test_what_waits_is_awaited_to_its_end(seconds: float | None) -> None:
    async def waits() -> list[int]:
        first: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(first.set_result, 1)
        return [await first, await asyncio.sleep(0, 2), await asyncio.sleep(0.001, 3)]

    assert await within(seconds, waits()) == [1, 2, 3]


async def test_a_future_can_be_awaited_too() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 1)
    assert await within(60, future) == 1


async def test_beyond_the_limit_the_work_is_cancelled_and_may_clean_up() -> None:
    cleaned: list[int] = []

    async def waits() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            cleaned.append(1)

    with pytest.raises(TimeoutError):
        await within(0.01, waits())
    assert cleaned


@pytest.mark.parametrize("passes", [0, 1])
async def test_what_the_work_raises_is_raised(passes: int) -> None:
    async def fails() -> None:
        for _ in range(passes):
            await asyncio.sleep(0)
        raise LookupError

    with pytest.raises(LookupError):
        await within(60, fails())


async def test_a_caller_that_is_cancelled_cancels_the_work() -> None:
    cancelled: list[int] = []

    async def waits() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.append(1)
            raise

    task = asyncio.create_task(within(60, waits()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled
