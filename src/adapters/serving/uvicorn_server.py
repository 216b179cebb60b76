"""uvicorn with graceful shutdown, and with limits for slow or hostile clients."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType
from typing import Any, Final

import uvicorn

from adapters.serving.connection_table import ConnectionTable
from adapters.serving.http_protocol import HttpProtocol
from adapters.serving.websocket_protocol import WebSocketProtocol

#: Called when the process is asked to stop; returns when it may exit. It must not wait once the event is set.
Drain = Callable[[asyncio.Event], Awaitable[None]]

#: Seconds without progress after which a connection with unsent data is aborted, and seconds between two checks.
SEND_TIMEOUT = 30.0
_CHECK_INTERVAL: Final = 0.5
#: The kernel's queue of connections to accept, and how many are accepted in a row: few, so that connections beyond
#: the limit are closed before descriptors run out.
_BACKLOG: Final = 4096
_ACCEPTED_AT_ONCE: Final = 8
#: Seconds that open connections have to close at shutdown, and then that their tasks have to notice it.
_CLOSE_GRACE: Final = 0.15
#: The reason with which the tasks of requests that remain then are cancelled.
_SHUTDOWN: Final = "the server shuts down"


def _is_no_shutdown(record: logging.LogRecord) -> bool:
    """Drop uvicorn's error about a request that a shutdown has cancelled: it is no fault of the application."""
    error = record.exc_info and record.exc_info[1]
    return not (isinstance(error, asyncio.CancelledError) and error.args == (_SHUTDOWN,))


logging.getLogger("uvicorn.error").addFilter(_is_no_shutdown)


class Server(uvicorn.Server):
    """On SIGTERM it finishes work before it exits; on SIGINT or a second signal it does not wait. Both exit with 0."""

    def __init__(
        self,
        app: Any,
        drain: Drain,
        ready: Callable[[], None],
        keep_alive: float = 80,
        table: ConnectionTable | None = None,
    ) -> None:
        """`ready` is called once connections are accepted; `keep_alive`: seconds that an idle one is kept.

        `table` limits the number of connections; ``None``: no limit.
        """
        table = table or ConnectionTable()
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(HttpProtocol, table),  # type: ignore[arg-type]  # any factory is fine
                timeout_keep_alive=keep_alive,  # type: ignore[arg-type]  # fractions of a second are fine
                ws=partial(WebSocketProtocol, table),  # type: ignore[arg-type]
                backlog=_ACCEPTED_AT_ONCE,
                ws_max_size=64 * 1024,
                ws_per_message_deflate=False,
                ws_ping_interval=None,  # Engine.IO has pings of its own.
                interface="asgi3",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # `api.rest.proxies` handles them.
            )
        )
        self._drain = drain
        self._ready = ready
        self._force = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        #: By connection with unsent data: how many bytes, and for how many seconds that has not changed.
        self._unsent: dict[Any, tuple[int, float]] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once by uvicorn, within the loop."""
        self._loop = asyncio.get_running_loop()
        if sockets and not isinstance(self._loop, asyncio.BaseEventLoop):
            # uvloop accepts one connection of each listener in a pass: in a busy service, all others would wait.
            sockets += [listener.dup() for listener in sockets for _ in range(_ACCEPTED_AT_ONCE - 1)]
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_BACKLOG)  # Not uvicorn's `backlog`: asyncio also accepts that many in a row.
        if self.started and self._draining is None:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if counter % 5 == 0:
            self._check_progress()
        return await super().on_tick(counter)

    def _check_progress(self) -> None:
        """Called every `_CHECK_INTERVAL`. Counts ticks, not wall time, as a paused process sends nothing."""
        unsent: dict[Any, tuple[int, float]] = {}
        for connection in self.server_state.connections:
            size = connection.transport.get_write_buffer_size()
            if size:
                before, stalled_for = self._unsent.get(connection, (0, 0.0))
                unsent[connection] = size, stalled_for + _CHECK_INTERVAL if size == before else 0.0
                if unsent[connection][1] >= SEND_TIMEOUT:
                    connection.transport.abort()
        self._unsent = unsent

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler."""
        if self._loop is None:
            os._exit(0)  # Nothing has started yet.
        else:
            self._loop.call_soon_threadsafe(self.begin_shutdown, sig == signal.SIGINT)

    def begin_shutdown(self, now: bool = False) -> None:
        """Start to shut down; with `now`, or when called again, without waiting for work."""
        if now or self._draining is not None:
            self._force.set()
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        try:
            await self._drain(self._force)
        finally:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close open connections, and abort those that do not close within `_CLOSE_GRACE`."""
        abort = asyncio.create_task(self._abort_remaining())
        try:
            await super().shutdown(sockets)
        finally:
            abort.cancel()

    async def _abort_remaining(self) -> None:
        await asyncio.sleep(_CLOSE_GRACE)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        # Only then cancel tasks, so that those of aborted connections see the disconnect first.
        await asyncio.sleep(_CLOSE_GRACE)
        for task in self.server_state.tasks:
            task.cancel(_SHUTDOWN)
