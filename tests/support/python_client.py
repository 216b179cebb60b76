"""The Python package ``stagecast-client``: its two clients behind one interface, so that each test runs on both."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

from stagecast_client import AsyncStagecast, Stagecast

CLIENTS: Final[list[type[Stagecast] | type[AsyncStagecast]]] = [Stagecast, AsyncStagecast]
_END: Final = object()


class EitherClient:
    """A client, of which the blocking one runs in threads."""

    def __init__(self, client: Stagecast | AsyncStagecast) -> None:
        self._client = client

    async def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """The result of a method."""
        method = getattr(self._client, name)
        if isinstance(self._client, AsyncStagecast):
            return await method(*arguments, **options)
        return await asyncio.to_thread(method, *arguments, **options)

    async def run(self, *arguments: Any, **options: Any) -> Any:
        return await self.call("run", *arguments, **options)

    async def iterate(self, name: str, *arguments: Any, **options: Any) -> AsyncGenerator[Any, None]:
        """The values of an iterator; leaving it early closes it."""
        iterator = getattr(self._client, name)(*arguments, **options)
        if isinstance(self._client, AsyncStagecast):
            async with aclosing(iterator):
                async for value in iterator:
                    yield value
            return
        while (value := await asyncio.to_thread(next, iterator, _END)) is not _END:
            yield value

    async def collect(
        self, name: str, *arguments: Any, until: Callable[[Any], bool] | None = None, **options: Any
    ) -> list[Any]:
        """All values of an iterator, or those until a condition holds."""
        values = []
        async with aclosing(self.iterate(name, *arguments, **options)) as iterator:
            async for value in iterator:
                values.append(value)
                if until and until(value):
                    break
        return values

    async def close(self) -> None:
        await self.call("close")
