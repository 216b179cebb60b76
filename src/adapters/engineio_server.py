"""python-engineio's server, with bounds: what waits for a client is counted, and every transport can be ended.

The library keeps its own table of sockets and its own writers. What is ours: a queue that knows its size,
answers to malformed frames, and closing that never waits for a client.
"""

import asyncio
import contextlib
import logging
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, Final

import engineio
from engineio import async_socket, exceptions, packet, payload

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: The ASGI scope extension in which a server that lets its transports be aborted hands them over.
TRANSPORT: Final = "stagecast.transport"

#: What may wait for one client.
MAX_EVENTS: Final = 256
MAX_BYTES: Final = 512 * 1024

#: Seconds in which something has to move while a client has not taken what waits for it.
STALL: Final = 5.0

#: Seconds between two looks for clients that have not answered their ping, or take nothing.
_WATCH_EVERY: Final = 0.5

#: Seconds in which an upgrade has to be done: meanwhile nothing is sent to the client.
_PROBE: Final = 5.0

#: Seconds a client has to take what it is sent last: a WebSocket's transport is aborted then.
_GOODBYE: Final = 1.0

#: What one polling answer or one turn of the writer takes; python-engineio's client refuses more in one answer.
_TURN: Final = 16


class Outbox(asyncio.Queue[packet.Packet | None]):
    """What waits for one client, counted."""

    def _init(self, maxsize: int) -> None:
        super()._init(maxsize)
        self.bytes = 0
        #: How many packets have been taken so far.
        self.taken = 0
        self.moved = asyncio.Event()

    def _put(self, item: packet.Packet | None) -> None:
        super()._put(item)
        self.bytes += _weight(item)

    def _get(self) -> packet.Packet | None:
        item: packet.Packet | None = super()._get()
        self.bytes -= _weight(item)
        self.taken += 1
        self.moved.set()
        return item


def _weight(item: packet.Packet | None) -> int:
    return len(item.data) if item is not None and isinstance(item.data, str) else 0


class EngineSocket(async_socket.AsyncSocket):  # type: ignore[misc]  # python-engineio has no types
    """One client's transport, polling or WebSocket, and what waits for it."""

    queue: Outbox
    upgrading: bool
    upgraded: bool
    last_ping: float | None
    _transport: asyncio.WriteTransport | None = None
    _ping: asyncio.TimerHandle | None = None
    #: What had been taken by the last look, and for how many seconds it has been that.
    _progress = (0, 0)
    _still = 0.0

    def __init__(self, server: "EngineServer", sid: str) -> None:
        super().__init__(server, sid)
        #: A polling client has taken all there was, and asks for more.
        self._asked = asyncio.Event()

    @property
    def gone(self) -> bool:
        """Whether nothing can be sent any more."""
        return bool(self.closing or self.closed)

    def has_room(self, frame: packet.Packet) -> bool:
        """Whether this frame may wait here too."""
        return self.queue.qsize() < MAX_EVENTS and self.queue.bytes + _weight(frame) <= MAX_BYTES

    def put(self, frame: packet.Packet) -> None:
        """Queue a frame. Never waits; after the end, does nothing.

        What asks `has_room` first never fills this up. What answers a client (acks) does not ask: a client that
        goes on asking and takes no answer is cut off.
        """
        if self.gone:
            return
        if self.queue.qsize() >= 2 * MAX_EVENTS or self.queue.bytes > 4 * MAX_BYTES:
            self.abort()
        else:
            self.queue.put_nowait(frame)

    async def send(self, pkt: packet.Packet) -> None:
        """Called by the library, also with the CLOSE packet of a socket that is closing."""
        if pkt.packet_type == packet.CLOSE:
            self.queue.put_nowait(pkt)
        else:
            self.put(pkt)

    def schedule_ping(self) -> None:
        """Called by the library when the client has answered the last ping."""
        if self.last_ping:
            self.last_ping = None
            loop = asyncio.get_running_loop()
            self._ping = loop.call_later(self.server.ping_interval, self._send_ping_now)

    def _send_ping_now(self) -> None:
        self.last_ping = time.time()
        self.put(packet.Packet(packet.PING))

    async def drained(self, *, events: int = MAX_EVENTS // 2, size: int = MAX_BYTES // 4) -> bool:
        """Wait until no more than this waits here; False where the transport ends first."""
        queue = self.queue
        while not self.gone and (queue.qsize() > events or queue.bytes > size):
            queue.moved.clear()
            await queue.moved.wait()
        return not self.gone

    def look(self, seconds: float) -> None:
        """Called every so many seconds. Who has taken nothing of what waits for it, for `STALL` of them, is cut off.

        Counted are not the seconds of a clock: where this process stood still, so did what it sends.
        """
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        progress = self.queue.taken, unsent
        waits = unsent or self.queue.qsize() > MAX_EVENTS // 2 or self.queue.bytes > MAX_BYTES // 4
        if not waits or self.upgrading or progress != self._progress:
            self._still = 0.0
        else:
            self._still += seconds
        self._progress = progress
        if self._still >= STALL:
            self.abort()

    def abort(self) -> None:
        """End the transport now, whether the client takes anything or not."""
        self.server.spawn(self.close(wait=False, abort=True))
        if self._transport is not None:
            self._transport.abort()

    def finish(self) -> None:
        """Send what waits, then end the transport."""
        self._asked.clear()
        self.server.spawn(self._finish(polled=not self.upgraded and not self.queue.empty()))

    async def _finish(self, polled: bool) -> None:
        if polled:
            # Of one answer the JavaScript client minds a CLOSE before what came ahead of it, and loses that.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), _GOODBYE)
        await self.close(wait=False)

    async def close(self, wait: bool = True, abort: bool = False, reason: str | None = None) -> None:
        """Close, without ever waiting for the client, as the library's `wait` would."""
        await super().close(wait=False, abort=abort, reason=reason)
        if self._ping is not None:
            self._ping.cancel()
        if abort:
            while not self.queue.empty():
                self.queue.get_nowait()
            self.server.sockets.pop(self.sid, None)
        self.queue.put_nowait(None)  # Ends a pending poll, and a WebSocket's writer.
        self.queue.moved.set()
        if self._transport is not None:
            asyncio.get_running_loop().call_later(_GOODBYE, self._transport.abort)

    async def poll(self) -> list[packet.Packet]:
        """Wait for something to send, and take a bounded part of it."""
        if self.queue.empty():
            self._asked.set()
        try:
            first = await asyncio.wait_for(self.queue.get(), self.server.ping_interval + self.server.ping_timeout)
        except TimeoutError:
            raise exceptions.QueueEmpty from None
        packets: list[packet.Packet] = []
        while first is not None:
            packets.append(first)
            if len(packets) == _TURN or self.queue.empty():
                return packets
            first = self.queue.get_nowait()
        self.queue.put_nowait(None)  # For whoever else waits here.
        return packets

    async def handle_post_request(self, environ: Mapping[str, Any]) -> None:
        """Take a polling request. What cannot be read ends the transport."""
        try:
            length = int(environ.get("CONTENT_LENGTH", "0"))
            if not 0 < length <= self.server.max_http_buffer_size:
                raise exceptions.ContentTooLongError
            body = await environ["wsgi.input"].read(length)
            for received in _Payload(encoded_payload=body.decode()).packets:
                await self.receive(received)
                await asyncio.sleep(0)  # Others have their turn between one client's packets.
        except exceptions.EngineIOError:
            raise
        except Exception:
            raise exceptions.EngineIOError from None

    async def _upgrade_websocket(self, environ: Mapping[str, Any]) -> Any:
        if self.upgrading or self.upgraded:
            return self.server._bad_request()
        self._transport = environ["asgi.scope"].get("extensions", {}).get(TRANSPORT)
        hesitation = asyncio.get_running_loop().call_later(_PROBE, self._give_up_upgrade, self._transport)
        try:
            return await super()._upgrade_websocket(environ)
        except Exception:
            return None  # A malformed frame: the handshake is over, and the transport ends below.
        finally:
            hesitation.cancel()
            if self.upgraded:
                await self.close(wait=False, abort=True, reason=self.server.reason.TRANSPORT_CLOSE)
            else:
                self.upgrading = False  # Polling goes on.
                self._transport = None

    def _give_up_upgrade(self, transport: asyncio.WriteTransport | None) -> None:
        if not self.upgraded and transport is not None:
            transport.abort()  # Polling goes on.


class _Payload(payload.Payload):  # type: ignore[misc]
    max_decode_packets = 256


class EngineServer(engineio.AsyncServer):  # type: ignore[misc]
    """The table of transports."""

    sockets: dict[str, EngineSocket]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watching: asyncio.Task[None] | None = None
        #: What is still being done for sockets that come and go.
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run this in a task of its own."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def create_queue(self, *args: Any, **kwargs: Any) -> Outbox:
        """Called by the library for each new socket."""
        return Outbox()

    async def _handle_connect(self, environ: Mapping[str, Any], transport: str, jsonp_index: int | None = None) -> Any:
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        socket = EngineSocket(self, self.generate_id())
        self.sockets[socket.sid] = socket
        opening = {
            "sid": socket.sid,
            "upgrades": self._upgrades(socket.sid, transport),
            "pingTimeout": int(self.ping_timeout * 1000),
            "pingInterval": int(self.ping_interval * 1000),
            "maxPayload": self.max_http_buffer_size,
        }
        socket.put(packet.Packet(packet.OPEN, opening))
        await self._trigger_event("connect", socket.sid, environ, run_async=False)
        socket.schedule_ping()
        if transport == "websocket":
            try:
                return await socket.handle_get_request(environ)
            finally:
                await socket.close(wait=False, abort=True)
        socket.connected = True
        return self._ok(await socket.poll())

    async def handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one request. Whatever the library makes of an odd one, it is answered, and with no worse than 400."""
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            # JSONP, which no client of today asks for, is not escaped well enough by the library.
            if "j" not in urllib.parse.parse_qs(scope["query_string"].decode("latin-1")):
                await super().handle_request(scope, receive, watch)
        except Exception as error:
            logger.warning("a Socket.IO request was refused: %s", type(error).__name__)
        if not started and scope["type"] == "http":
            await send({"type": "http.response.start", "status": 400, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})

    async def shutdown(self) -> None:
        """Stop watching for clients that are gone."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching = None

    async def _watch(self) -> None:
        """Close what has not answered its ping in time, or takes nothing.

        (The library's own task would hold on to what is gone.)
        """
        while True:
            await asyncio.sleep(_WATCH_EVERY)
            for sid in list(self.sockets):
                socket = self.sockets.get(sid)
                if socket is not None and socket.closed:
                    del self.sockets[sid]
                elif socket is not None and not socket.closing:
                    socket.look(_WATCH_EVERY)
                    await socket.check_ping_timeout()
                del socket
