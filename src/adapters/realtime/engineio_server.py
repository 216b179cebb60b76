"""An Engine.IO server over ASGI, by the protocol's specification, with limits on what waits for each client.

python-engineio brings the packets, the sessions' table and their events. Requests are read and answered here: a queue
that knows its size, a heartbeat by timers, answers to malformed requests, and closing that never waits for a client.
"""

import asyncio
import contextlib
import logging
import urllib.parse
from collections.abc import Callable, Coroutine
from typing import Any, Final

import engineio
from engineio import async_socket, exceptions, packet, payload
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

#: The ASGI scope extension in which a server that lets its transports be aborted hands them over.
TRANSPORT: Final = "stagecast.transport"

#: What may wait for one client.
MAX_EVENTS: Final = 256
MAX_BYTES: Final = 512 * 1024

#: Seconds in which something has to move while a client has not taken what waits for it.
STALL: Final = 5.0

#: Seconds between two looks for clients that take nothing.
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
    connected: bool
    _transport: asyncio.WriteTransport | None = None
    #: Until the next ping, or until the last one has to be answered.
    _heartbeat: asyncio.TimerHandle | None = None
    _polling = False
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
        """Called with a new session, and by the library when the client has answered a ping."""
        self._set_heartbeat(self.server.ping_interval, self._ping_now)

    def _ping_now(self) -> None:
        self.put(packet.Packet(packet.PING))
        self._set_heartbeat(self.server.ping_timeout, self._ping_unanswered)

    def _ping_unanswered(self) -> None:
        self.server.spawn(self.close(wait=False, reason=self.server.reason.PING_TIMEOUT))

    def _set_heartbeat(self, seconds: float, then: Callable[[], None]) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if not self.gone:
            self._heartbeat = asyncio.get_running_loop().call_later(seconds, then)

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
        _abort(self._transport)

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
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if abort:
            while not self.queue.empty():
                self.queue.get_nowait()
        self.server.sockets.pop(self.sid, None)
        self.queue.put_nowait(None)  # Ends a pending poll, and a WebSocket's writer.
        self.queue.moved.set()
        asyncio.get_running_loop().call_later(_GOODBYE, _abort, self._transport)

    async def poll(self) -> list[packet.Packet]:
        """Wait for something to send, and take a bounded part of it; nothing after the end."""
        if self.queue.empty():
            self._asked.set()
        first = await self.queue.get()
        packets: list[packet.Packet] = []
        while first is not None:
            packets.append(first)
            if len(packets) == _TURN or self.queue.empty():
                return packets
            first = self.queue.get_nowait()
        self.queue.put_nowait(None)  # For whoever else waits here.
        return packets

    async def answer_poll(self) -> list[packet.Packet]:
        """What a polling request is answered with; nothing where it is refused, since another one is waiting."""
        if self.upgrading:
            return [packet.Packet(packet.NOOP)]
        if self._polling:
            await self.close(wait=False)
            return []
        self._polling = True
        try:
            return await self.poll() or [packet.Packet(packet.NOOP)]
        finally:
            self._polling = False

    async def take(self, request: Request) -> None:
        """Handle the packets of a polling request. Raises where they cannot be read, or there are none."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.server.max_http_buffer_size:
                raise exceptions.ContentTooLongError
        if not body:
            raise exceptions.EngineIOError
        for received in _Payload(encoded_payload=body.decode()).packets:
            await self.receive(received)
            await asyncio.sleep(0)  # Others have their turn between one client's packets.

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Speak over this WebSocket until it ends: it is a new session, or takes over from polling."""
        transport = scope.get("extensions", {}).get(TRANSPORT)
        # Clients that offer subprotocols fail without one of them.
        await send({"type": "websocket.accept", "subprotocol": next(iter(scope.get("subprotocols", ())), None)})
        if self.upgrading or self.upgraded:
            await send({"type": "websocket.close"})
            asyncio.get_running_loop().call_later(_GOODBYE, _abort, transport)
            return
        self._transport = transport
        if self.connected and not await self._upgrade(receive, send):
            self._transport = None  # Polling goes on.
            return
        self.connected = self.upgraded = True
        writer = asyncio.create_task(self._write(send))
        # Until it ends, a frame is malformed, or the server ends.
        with contextlib.suppress(Exception, asyncio.CancelledError):
            while True:
                with contextlib.suppress(exceptions.UnknownPacketError):
                    await self.receive(await self._read(receive))
                await asyncio.sleep(0)  # As in `take`.
        await self.close(wait=False, abort=True, reason=self.server.reason.TRANSPORT_CLOSE)
        await writer

    async def _upgrade(self, receive: Receive, send: Send) -> bool:
        """Take over from polling. Meanwhile nothing is sent to the client, so its time is limited."""
        self.upgrading = True
        limit = asyncio.get_running_loop().call_later(_PROBE, _abort, self._transport)
        try:
            probe = await self._read(receive)
            if (probe.packet_type, probe.data) != (packet.PING, "probe"):
                return False
            await send({"type": "websocket.send", "text": packet.Packet(packet.PONG, data="probe").encode()})
            if self._polling:
                self.queue.put_nowait(packet.Packet(packet.NOOP))
            self.upgraded = (await self._read(receive)).packet_type == packet.UPGRADE and not self.gone
        except Exception:
            return False
        finally:
            self.upgrading = False
            limit.cancel()
        return self.upgraded

    async def _read(self, receive: Receive) -> packet.Packet:
        """The next packet. Raises where the WebSocket has ended, or sends none."""
        message = await receive()
        frame = message.get("text") or message.get("bytes")
        if message["type"] != "websocket.receive" or not frame or len(frame) > self.server.max_http_buffer_size:
            raise ConnectionError
        return packet.Packet(encoded_packet=frame)

    async def _write(self, send: Send) -> None:
        with contextlib.suppress(Exception):
            while packets := await self.poll():
                for each in packets:
                    frame = each.encode()
                    await send({"type": "websocket.send", "text" if isinstance(frame, str) else "bytes": frame})
            await send({"type": "websocket.close"})


def _abort(transport: asyncio.WriteTransport | None) -> None:
    if transport is not None:
        transport.abort()


class _Payload(payload.Payload):  # type: ignore[misc]
    max_decode_packets = 256


class EngineServer(engineio.AsyncServer):  # type: ignore[misc]
    """The table of transports."""

    sockets: dict[str, EngineSocket]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watching: asyncio.Task[None] | None = None
        self._compressed = GZipMiddleware(self._handle, minimum_size=self.compression_threshold, compresslevel=6)
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

    async def handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one request or WebSocket. Whatever it sends, it is answered."""
        await self._compressed(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._answer(scope, receive, send)
        except Exception as error:
            logger.warning("a Socket.IO request was refused: %s", type(error).__name__)
            response = _refusal()
        if response is not None:
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """The response; ``None`` where this was a WebSocket, which has ended."""
        query = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
        websocket = scope["type"] == "websocket"
        method = "GET" if websocket else scope["method"]
        new = "sid" not in query
        if query.get("transport") != ["websocket" if websocket else "polling"]:
            return _refusal(0, "Transport unknown")
        if "j" in query:  # JSONP, which no client of today asks for.
            return _refusal()
        if new and query.get("EIO") != ["4"]:
            return _refusal(5, "Unsupported protocol version")
        if method != "GET" and (new or method != "POST"):
            return _refusal(2, "Bad handshake method")
        socket = await self._open(scope) if new else self.sockets.get(query["sid"][0])
        if socket is None or socket.gone or not (new or socket.connected):
            return _refusal(1, "Session ID unknown")
        if websocket:
            await receive()  # The opening handshake.
            try:
                await socket.serve(scope, receive, send)
            finally:
                if new:
                    await socket.close(wait=False, abort=True)
            return None
        if socket.upgraded:
            return _refusal()
        if method == "POST":
            try:
                await socket.take(Request(scope, receive))
            except Exception:
                await socket.close(wait=False)
                raise
            return _plain("ok")
        socket.connected = True
        packets = await socket.answer_poll()
        return _plain(payload.Payload(packets=packets).encode()) if packets else _refusal()

    async def _open(self, scope: Scope) -> EngineSocket:
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        socket = EngineSocket(self, self.generate_id())
        self.sockets[socket.sid] = socket
        opening = {
            "sid": socket.sid,
            "upgrades": [] if scope["type"] == "websocket" else ["websocket"],
            "pingTimeout": int(self.ping_timeout * 1000),
            "pingInterval": int(self.ping_interval * 1000),
            "maxPayload": self.max_http_buffer_size,
        }
        socket.put(packet.Packet(packet.OPEN, opening))
        await self._trigger_event("connect", socket.sid, {"asgi.scope": scope}, run_async=False)
        socket.schedule_ping()
        return socket

    async def shutdown(self) -> None:
        """Stop watching for clients that are gone."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching = None

    async def _watch(self) -> None:
        """Look every so often for clients that take nothing."""
        while True:
            await asyncio.sleep(_WATCH_EVERY)
            for sid in list(self.sockets):
                self.sockets[sid].look(_WATCH_EVERY)


def _plain(text: str) -> Response:
    return Response(text, headers={"Cache-Control": "no-store"}, media_type="text/plain")


def _refusal(code: int = 3, message: str = "Bad request") -> Response:
    """By the codes and messages of the reference implementation."""
    return JSONResponse({"code": code, "message": message}, 400)
