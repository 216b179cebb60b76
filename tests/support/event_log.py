"""Opens logs of the adapter under test, and reads them whole."""

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Final

import pytest

from domain.errors import Refusal
from domain.feed import Cursor, Feed, Logged
from support import builders
from support.builders import EventRecorder, OpenLog, SteppableClock, WholeLog
from support.postgres import open_postgres_log

#: Every adapter of the ports of `WholeLog`, by name. A new one is tried by all suites once it is here.
LOGS: Final[Mapping[str, OpenLog]] = {**builders.LOGS, "postgres": open_postgres_log}


def examples_of(quick: Mapping[str, int], long: int) -> list[object]:
    """Parameters: the name of a log and how many examples to try on it, and more of them on a server in a long run."""
    return [*quick.items(), pytest.param("postgres", long, marks=[pytest.mark.long, pytest.mark.timeout(600)])]


class LogOpener:
    """Opens logs of the adapter under test, which are closed when the test is over."""

    def __init__(self, factory: OpenLog, stack: AsyncExitStack, clock: SteppableClock) -> None:
        self._factory = factory
        self._stack = stack
        self.clock = clock

    async def __call__(self, *, credits: int | None = 100, epoch: str = "e1", outbox: bool = False) -> EventRecorder:
        opened = self._factory(clock=self.clock, credits=credits, epoch=epoch, outbox=outbox)
        return EventRecorder(await self._stack.enter_async_context(opened), self.clock)


async def race(*attempts: Awaitable[Logged]) -> tuple[list[Logged], list[Refusal]]:
    """Those that won and those that were refused; anything else is raised."""
    results = await asyncio.gather(*attempts, return_exceptions=True)
    for result in results:
        if not isinstance(result, Logged | Refusal):
            assert isinstance(result, BaseException)
            raise result
    return (
        [result for result in results if isinstance(result, Logged)],
        [result for result in results if isinstance(result, Refusal)],
    )


async def full_feed(log: WholeLog, user_id: str = "ada") -> Feed:
    return await log.feed(user_id, after=0, anchor=0, limit=10_000)


async def image(log: WholeLog, user_id: str, *generation_ids: str) -> object:
    """Everything that a log has of a user, to check that nothing has changed."""
    return (
        await full_feed(log, user_id),
        (await log.standing(user_id)).credit,
        await log.generations(user_id, limit=1_000),
        [await log.generation(generation_id) for generation_id in generation_ids],
        await log.unfinished(),
        await log.head_cursor(user_id),
    )


def event_keys(entries: Iterable[Logged]) -> list[tuple[str, int]]:
    return [(entry.generation_id, entry.sequence) for entry in entries]


async def pull(log: WholeLog, user_id: str, cursor: Cursor, limit: int = 1_000) -> tuple[list[Logged], Cursor]:
    """Everything wanted behind a cursor that has to be usable."""
    sent: list[Logged] = []
    while True:
        feed = await log.feed(user_id, after=cursor.seen, anchor=cursor.live, limit=limit)
        assert cursor.usable(feed)
        wanted, cursor = cursor.advance(feed)
        sent += [entry for entry, _ in wanted]
        if feed.upto >= feed.head:
            return sent, cursor


async def usable(log: WholeLog, user_id: str, cursor: Cursor) -> bool:
    return cursor.usable(await log.feed(user_id, after=cursor.seen, anchor=cursor.live, limit=0))
