"""The two clients. Both carry out the commands of the same operations, one blocking, one with asyncio."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, aclosing, closing
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx2

from stagecast_client.operations import (
    SILENCE,
    Call,
    Command,
    Emit,
    Operation,
    Operations,
    Read,
    ReadFiles,
    Send,
    Sleep,
    Steps,
    Token,
    is_stream,
)

E = TypeVar("E")
P = ParamSpec("P")
T = TypeVar("T")


def _method(
    operation: Callable[Concatenate[Operations, P], Operation[Any, T]],
) -> "Callable[Concatenate[Stagecast, P], T]":
    @wraps(operation)
    def method(self: "Stagecast", /, *args: P.args, **options: P.kwargs) -> T:
        steps = Steps(operation(self._operations, *args, **options))
        for _ in self._iterate(steps):
            pass
        return steps.result

    return method


def _iterator(
    operation: Callable[Concatenate[Operations, P], Operation[E, None]],
) -> "Callable[Concatenate[Stagecast, P], Iterator[E]]":
    @wraps(operation)
    def method(self: "Stagecast", /, *args: P.args, **options: P.kwargs) -> Iterator[E]:
        return self._iterate(Steps(operation(self._operations, *args, **options)))

    return method


def _async_method(
    operation: Callable[Concatenate[Operations, P], Operation[Any, T]],
) -> "Callable[Concatenate[AsyncStagecast, P], Coroutine[Any, Any, T]]":
    @wraps(operation)
    async def method(self: "AsyncStagecast", /, *args: P.args, **options: P.kwargs) -> T:
        steps = Steps(operation(self._operations, *args, **options))
        async for _ in self._iterate(steps):
            pass
        return steps.result

    return method


def _async_iterator(
    operation: Callable[Concatenate[Operations, P], Operation[E, None]],
) -> "Callable[Concatenate[AsyncStagecast, P], AsyncIterator[E]]":
    @wraps(operation)
    def method(self: "AsyncStagecast", /, *args: P.args, **options: P.kwargs) -> AsyncIterator[E]:
        return self._iterate(Steps(operation(self._operations, *args, **options)))

    return method


class _Client:
    """What both clients have."""

    def __init__(
        self,
        url: str = "http://localhost:3000",
        *,
        user_id: str | int | None = None,
        token: Token | None = None,
        timeout: float = 30,
        retry_for: float = 60,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: the service's, with its path if it has one.
            user_id: the user, by default ``demo``. With a token only if that is a service token.
            token: a JWT, or a function that returns a new one whenever one is needed.
            timeout: seconds for each step of a request: to connect, and without progress.
            retry_for: seconds for which requests and streams are repeated while the service does not answer.
        """
        self._operations = Operations(url, user_id, token, retry_for)
        self._timeout = httpx2.Timeout(timeout)
        self._stream_timeout = httpx2.Timeout(timeout, read=SILENCE)
        self._open()

    def _open(self) -> None:
        raise NotImplementedError


class Stagecast(_Client):
    """A client of a Stagecast service, for one user. `close` it, or use it as a context.

    >>> with Stagecast("http://localhost:3000", user_id=123) as stagecast:
    ...     done = stagecast.run("edit", prompt="a red hat", images=["photo.jpg"])
    >>> done.status
    'completed'
    """

    def _open(self) -> None:
        self._http = httpx2.Client(timeout=self._timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _iterate(self, steps: Steps[E, Any]) -> Iterator[E]:
        with ExitStack() as stream, closing(steps):
            events: Iterator[httpx2.ServerSentEvent] = iter(())

            def perform(command: Command) -> Any:
                nonlocal events
                match command:
                    case Send(method=method, stream=False):
                        return self._http.request(method, **command.arguments)
                    case Send():
                        stream.close()
                        source = stream.enter_context(self._http.sse(**command.arguments, timeout=self._stream_timeout))
                        if is_stream(source.response):
                            events = iter(source)
                        else:
                            source.response.read()
                        return source.response
                    case Read():
                        return next(events, None)
                    case Call(function, arguments):
                        return function(*arguments)
                    case ReadFiles(function):
                        return function()
                    case Sleep(seconds):
                        time.sleep(seconds)
                return None

            while command := steps.next_command():
                if isinstance(command, Emit):
                    yield command.value
                    steps.succeed()
                    continue
                try:
                    steps.succeed(perform(command))
                except httpx2.TransportError as error:
                    if isinstance(command, Call):  # The user's own.
                        raise
                    steps.fail(error)

    start = _method(Operations.start)
    run = _method(Operations.run)
    events = _iterator(Operations.events)
    watch = _iterator(Operations.watch)
    get = _method(Operations.get)
    list = _method(Operations.list)
    cancel = _method(Operations.cancel)
    delete = _method(Operations.delete)
    transition = _method(Operations.transition)
    me = _method(Operations.me)


class AsyncStagecast(_Client):
    """`Stagecast` with asyncio: methods are awaited, and `events` and `watch` are asynchronous iterators.

    `token` and `on_progress` may be asynchronous functions. An iterator that is left early keeps its connection until
    `aclose`, as `contextlib.aclosing` calls it.
    """

    def _open(self) -> None:
        self._http = httpx2.AsyncClient(timeout=self._timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _iterate(self, steps: Steps[E, Any]) -> AsyncIterator[E]:
        async with AsyncExitStack() as stream:
            stream_events: Any = None

            async def perform(command: Command) -> Any:
                nonlocal stream_events
                match command:
                    case Send(method=method, stream=False):
                        return await self._http.request(method, **command.arguments)
                    case Send():
                        await stream.aclose()
                        opening = self._http.sse(**command.arguments, timeout=self._stream_timeout)
                        source = await stream.enter_async_context(opening)
                        if is_stream(source.response):
                            stream_events = await stream.enter_async_context(aclosing(aiter(source)))
                        else:
                            await source.response.aread()
                        return source.response
                    case Read():
                        return await anext(stream_events, None)
                    case Call(function, arguments):
                        result = function(*arguments)
                        return await result if inspect.isawaitable(result) else result
                    case ReadFiles(function):
                        return await asyncio.to_thread(function)
                    case Sleep(seconds):
                        await asyncio.sleep(seconds)
                return None

            with closing(steps):
                while command := steps.next_command():
                    if isinstance(command, Emit):
                        yield command.value
                        steps.succeed()
                        continue
                    try:
                        steps.succeed(await perform(command))
                    except httpx2.TransportError as error:
                        if isinstance(command, Call):  # The user's own.
                            raise
                        steps.fail(error)

    start = _async_method(Operations.start)
    run = _async_method(Operations.run)
    events = _async_iterator(Operations.events)
    watch = _async_iterator(Operations.watch)
    get = _async_method(Operations.get)
    list = _async_method(Operations.list)
    cancel = _async_method(Operations.cancel)
    delete = _async_method(Operations.delete)
    transition = _async_method(Operations.transition)
    me = _async_method(Operations.me)
