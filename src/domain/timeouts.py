"""A timeout that costs nothing where there is nothing to wait for."""

import asyncio
from collections.abc import Awaitable, Generator
from functools import partial
from types import coroutine
from typing import Any, TypeVar, cast

T = TypeVar("T")


async def within(seconds: float | None, work: Awaitable[T]) -> T:
    """Await `work`, and cancel it after these seconds, if any. Raises `TimeoutError`.

    If it does not wait at all, no timer is set: that would cost as much as an append in memory.
    """
    steps = work.__await__()
    try:
        awaited = steps.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    async with asyncio.timeout(seconds):
        return await _resume(steps, awaited)


@coroutine
def _resume(steps: Generator[Any, Any, T], awaited: object) -> Generator[object, None, T]:
    """Go on with these steps, of which the last one waits for `awaited`."""
    while True:
        step = partial(steps.send, None)
        try:
            yield awaited
        except BaseException as error:
            step = partial(steps.throw, error)
        try:
            awaited = step()
        except StopIteration as done:
            return cast(T, done.value)
