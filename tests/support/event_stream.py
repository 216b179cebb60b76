"""Event streams, read with httpx2's client."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

from support.asyncapi import check_message
from support.harness import JSON, TIMEOUT, Running

ACCEPT: Final = {"Accept": "text/event-stream"}


@dataclass
class Stream:
    """An open stream, and what it has brought so far."""

    response: httpx2.Response
    _blocks: AsyncIterator[httpx2.ServerSentEvent]
    blocks: list[httpx2.ServerSentEvent] = field(default_factory=list)

    #: Name and data of each event of a generation.
    events: list[tuple[str, JSON]] = field(default_factory=list)

    async def until(self, happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT):
            while not happened():
                self._take(await anext(self._blocks))

    async def rest(self) -> None:
        """Read on until the stream ends."""
        async with asyncio.timeout(TIMEOUT):
            async for block in self._blocks:
                self._take(block)

    def _take(self, block: httpx2.ServerSentEvent) -> None:
        if block.data:
            check_message(block.event, json.loads(block.data))
        self.blocks.append(block)
        if block.event == "continue" or (block.event.startswith("generation_") and block.event != "generation_removed"):
            self.events.append((block.event, json.loads(block.data)))

    async def named(self, name: str) -> JSON:
        """The data of the first event with this name."""
        await self.until(lambda: any(block.event == name for block in self.blocks))
        return dict(json.loads(next(block.data for block in self.blocks if block.event == name)))

    @property
    def ids(self) -> list[str]:
        return [block.id for block in self.blocks if block.data]

    async def until_count(self, count: int) -> None:
        await self.until(lambda: len(self.events) >= count)


@asynccontextmanager
async def open_stream(
    service: Running,
    path: str = "/events",
    user: str | None = "ada",
    *,
    last: str | bytes | None = None,
    http: Any = None,
    **headers: Any,
) -> AsyncIterator[Stream]:
    """`http`: the client of a proxy in front of the service."""
    sent: JSON = (
        ({} if user is None else {"X-User-Id": user}) | ({} if last is None else {"Last-Event-ID": last}) | headers
    )
    async with (http or service.http).sse(path, headers=sent) as source:
        assert source.response.status_code == 200, (await source.response.aread()).decode()
        yield Stream(source.response, aiter(source))


def of_generation(generation_id: str) -> str:
    return f"/generations/{generation_id}/events"
