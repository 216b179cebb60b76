"""A bare Socket.IO client, byte by byte."""

import asyncio
import base64
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from domain.events import CONTINUE, NAMES
from support.proxy import reset

JSON = dict[str, Any]

#: A frame's mask, which changes nothing.
_MASK: Final = bytes(4)
_TEXT, _BINARY, _CLOSE = 1, 2, 8
_EVENTS: Final = tuple(f'42["{name}",'.encode() for name in (CONTINUE, *NAMES.values()))


class Refused(Exception):
    """CONNECT was answered with CONNECT_ERROR: its message, and its code."""


class ReceivedEvent(NamedTuple):
    """One event, as it came."""

    text: bytes
    #: By `time.monotonic_ns`.
    at: int


#: What texts say, by text: many clients are sent the same bytes.
_parsed: dict[bytes, list[Any]] = {}


def parse(text: bytes) -> list[Any]:
    """Name, event, cursor."""
    if text not in _parsed:
        if len(_parsed) > 20_000:
            _parsed.clear()
        _parsed[text] = json.loads(text[2:])
    return _parsed[text]


def _is_end(event: JSON, generation_id: str) -> bool:
    return event["generationId"] == generation_id and event["status"] in ("completed", "failed")


def frame(data: bytes | str, *, opcode: int | None = None, final: bool = True) -> bytes:
    """A client's WebSocket frame."""
    if opcode is None:
        opcode = _TEXT if isinstance(data, str) else _BINARY
    if isinstance(data, str):
        data = data.encode()
    size = len(data)
    if size < 126:
        head = bytes([0x80 | size])
    elif size < 65_536:
        head = b"\xfe" + size.to_bytes(2)
    else:
        head = b"\xff" + size.to_bytes(8)
    return bytes([final << 7 | opcode]) + head + _MASK + data


class Wire(asyncio.Protocol):
    """One WebSocket that speaks Engine.IO and Socket.IO by hand. It answers pings by itself.

    `received` can be passed from a wire to its successor: all events that the device ever received.
    """

    transport: asyncio.Transport

    def __init__(self, received: list[ReceivedEvent] | None = None) -> None:
        self.received: list[ReceivedEvent] = [] if received is None else received
        #: Every other event: name and data.
        self.notices: list[tuple[str, JSON]] = []
        self.acks: dict[int, Any] = {}
        #: How many events had come before each ack.
        self.marks: dict[int, int] = {}
        #: The id of its transport.
        self.sid = ""
        #: How many bytes have come.
        self.taken = 0
        #: Whether it has stood what it was used for.
        self.survived = False
        #: What the packets CONNECT and CONNECT_ERROR brought.
        self.hello: JSON | None = None
        self.refused: JSON | None = None
        #: A DISCONNECT came, after which official clients stay away.
        self.disconnected_by_server = False
        self.gone = asyncio.Event()
        self.user = ""
        self._buffer = bytearray()
        self._upgraded = False
        self._news = asyncio.Event()
        self._calls = 0

    @classmethod
    async def open(
        cls, port: int, *, received: list[ReceivedEvent] | None = None, narrow: bool = False, query: str = ""
    ) -> "Wire":
        """A WebSocket. `narrow`: with the segments and the buffer of a phone, so that little is on its way."""
        sock = socket.socket()
        sock.setblocking(False)
        if narrow:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1_400)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        loop = asyncio.get_running_loop()
        wire = cls(received)
        try:
            await loop.sock_connect(sock, ("127.0.0.1", port))
            wire.transport, _ = await loop.create_connection(lambda: wire, sock=sock)
        except BaseException:
            sock.close()
            raise
        wire.transport.write(
            f"GET /socket.io/?EIO=4&transport=websocket{query} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n".encode()
        )
        await wire.until(lambda: wire._upgraded)
        return wire

    # what it does

    def send(self, *frames: str | bytes) -> None:
        """Text, or binary."""
        self.write(*(frame(each) for each in frames))

    def write(self, *data: bytes) -> None:
        """Bytes as they are."""
        if not self.transport.is_closing():
            self.transport.write(b"".join(data))

    async def connect(self, **auth: Any) -> JSON:
        """Send CONNECT with this `auth` and wait for the answer; where it names somebody, for `authenticated` too.

        Raises:
            Refused, ConnectionResetError
        """
        self.send("40" + (json.dumps(auth) if auth else ""))
        await self.until(lambda: self.hello is not None or self.refused is not None)
        if self.hello is None:
            refused = self.refused or {}
            raise Refused(refused.get("message"), refused.get("data", {}).get("code"))
        if "userId" in auth or "token" in auth:
            await self.until(lambda: bool(self.notices))
            self.user = self.notices[0][1]["userId"]
            return self.notices[0][1]
        return self.hello

    async def call(self, name: str, *arguments: Any) -> JSON:
        """Send an event and return its ack."""
        number = self.ask(name, *arguments)
        await self.until_asked(number)
        ack = self.acks[number]
        assert isinstance(ack, dict)
        return ack

    def ask(self, name: str, *arguments: Any) -> int:
        """Send an event, and return the number of its ack."""
        self._calls += 1
        self.send(f"42{self._calls}{json.dumps([name, *arguments])}")
        return self._calls

    def abort(self) -> None:
        """Hang up, by RST."""
        reset(self.transport)

    async def until(self, holds: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something holds of what has come. Raises ConnectionResetError where it no longer can."""
        async with asyncio.timeout(seconds):
            while not holds():
                if self.gone.is_set():
                    raise ConnectionResetError("the server has hung up")
                self._news.clear()
                await self._news.wait()

    async def until_asked(self, number: int) -> None:
        """Wait for the ack of this number."""
        await self.until(lambda: number in self.acks)

    async def until_received(self, count: int, seconds: float = 60) -> None:
        """Wait until it has received so many events in all."""
        await self.until(lambda: len(self.received) >= count, seconds)

    async def until_end_of(self, generation_id: str) -> None:
        """Wait until the last received event is the end of this generation."""
        await self.until(lambda: bool(self.received) and _is_end(parse(self.received[-1].text)[1], generation_id))

    async def until_gone(self, seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            await self.gone.wait()

    # what it has received

    @property
    def events(self) -> list[JSON]:
        """The events of generations, in order."""
        return [parse(each.text)[1] for each in self.received]

    def cursor_after(self, count: int) -> str:
        """The cursor that came with the event of this number, from 1 on."""
        return str(parse(self.received[count - 1].text)[2])

    @property
    def pid(self) -> str:
        """The session that it may take up again."""
        assert self.hello is not None
        return str(self.hello["pid"])

    @property
    def offset(self) -> JSON:
        """What the official client says when it comes back: its session, and how far it had come."""
        last = {"offset": self.cursor_after(len(self.received))} if self.received else {}
        return {"pid": self.pid, **last}

    # what comes

    def data_received(self, data: bytes) -> None:
        self.taken += len(data)
        buffer = self._buffer
        buffer += data
        if not self._upgraded:
            head, end, _ = buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if b" 101 " not in head.split(b"\r\n", 1)[0]:
                self.transport.abort()
                return
            self._upgraded = True
            del buffer[: len(head) + 4]
        at = 0
        while len(buffer) >= at + 2:
            size, start = buffer[at + 1], at + 2
            if size > 125:
                start += 2 if size == 126 else 8
                if len(buffer) < start:
                    break
                size = int.from_bytes(buffer[at + 2 : start])
            if len(buffer) < start + size:
                break
            self._take(buffer[at] & 15, bytes(buffer[start : start + size]))
            at = start + size
        del buffer[:at]
        self._news.set()

    def connection_lost(self, _: Exception | None) -> None:
        self.gone.set()
        self._news.set()

    def _take(self, opcode: int, data: bytes) -> None:
        if opcode == _CLOSE:
            self.write(frame(data, opcode=_CLOSE))
        elif data.startswith(_EVENTS):
            self.received.append(ReceivedEvent(data, time.monotonic_ns()))
        elif data == b"2":
            self.send("3")
        elif data.startswith(b"0"):
            self.sid = json.loads(data[1:])["sid"]
        elif data.startswith(b"40"):
            self.hello = json.loads(data[2:])
        elif data.startswith(b"41"):
            self.disconnected_by_server = True
        elif data.startswith(b"42"):
            name, notice = json.loads(data[2:])
            self.notices.append((name, notice))
        elif data.startswith(b"43"):
            number, _, ack = data[2:].partition(b"[")
            self.acks[int(number)] = json.loads(ack[:-1] or b"null")
            self.marks[int(number)] = len(self.received)
        elif data.startswith(b"44"):
            refused = data[2:] if data[2:3] == b"{" else data.partition(b",")[2]  # Behind a namespace.
            self.refused = json.loads(refused)


async def hang_up(wires: Sequence[Wire]) -> None:
    """All of them, at once and without a word."""
    for wire in wires:
        wire.abort()
    await asyncio.gather(*(wire.until_gone() for wire in wires))
