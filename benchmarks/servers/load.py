"""The load client: many WebSockets that count the events they receive, and measure how long those took.

    python -m benchmarks.servers.load PORT USERS DEVICES PROTOCOL IN_FLIGHT

`PROTOCOL` is ``stagecast`` (a socket counts as connected once it receives `authenticated`), ``socketio``
(once the server has answered its CONNECT) or ``raw`` (once it is open). Like a browser it offers permessage-deflate.
Once all are connected it prints how many there are, and obeys these commands, with an answer for each:

``arm`` waits until no events come any more and forgets them, ``until COUNT SECONDS`` waits for so many events since.
"""

import asyncio
import json
import statistics
import sys
import time
import zlib
from typing import Any, Final

import picows
import uvloop

#: What tells that a socket is connected.
READY: Final = {"stagecast": b'42["authenticated"', "socketio": b"40", "raw": None}
#: Seconds without an event after which nothing is on the way any more.
QUIET: Final = 0.4


class Load:
    """What all sockets have received."""

    def __init__(self) -> None:
        self.joined = 0
        self.lost = 0
        self.count = 0
        self.last = 0.0
        #: In µs.
        self.latencies: list[float] = []

    def event(self, text: bytes) -> None:
        """One event has come."""
        self.count += 1
        stamped = text.find(b'"@')
        if stamped >= 0:
            sent = int(text[stamped + 2 : text.index(b'"', stamped + 2)])
            self.latencies.append((time.monotonic_ns() - sent) / 1e3)

    async def arm(self) -> dict[str, Any]:
        """Wait until it is quiet, then forget what came."""
        before = -1
        while before != self.count:
            before = self.count
            await asyncio.sleep(QUIET)
        self.count, self.latencies = 0, []
        return {"lost": self.lost}

    async def until(self, count: str, seconds: str) -> dict[str, Any]:
        """Wait for so many events, and tell how many came and how long they took."""
        end = time.monotonic() + float(seconds)
        while self.count < int(count) and time.monotonic() < end:
            await asyncio.sleep(0.005)
        answer: dict[str, Any] = {"count": self.count, "lost": self.lost}
        if len(self.latencies) > 1:
            cuts = statistics.quantiles(self.latencies, n=100)
            answer |= {"p50": cuts[49], "p99": cuts[98]}
        return answer


class Socket(picows.WSListener):  # type: ignore[misc]
    """One connection."""

    def __init__(self, load: Load, user: int, ready: bytes | None) -> None:
        super().__init__()
        self.load = load
        self.user = user
        self.ready = ready
        self.joined = asyncio.get_running_loop().create_future()
        self.inflate: Any = None

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        """Called by picows."""
        if self.ready is None:
            self.join()

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        """Called by picows."""
        if frame.msg_type != picows.WSMsgType.TEXT:
            return
        text = frame.get_payload_as_bytes()
        if frame.rsv1:
            self.inflate = self.inflate or zlib.decompressobj(-15)
            text = self.inflate.decompress(text + b"\0\0\xff\xff")
        if self.joined.done() and text.startswith(b"42"):
            self.load.event(text)
        elif text == b"2":
            transport.send(picows.WSMsgType.TEXT, b"3")
        elif text.startswith(b"0"):
            transport.send(picows.WSMsgType.TEXT, b'40{"userId":"u%d"}' % self.user)
        elif self.ready is not None and text.startswith(self.ready):
            self.join()

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        """Called by picows."""
        self.load.lost += 1
        if not self.joined.done():
            self.joined.set_result(False)

    def join(self) -> None:
        """It is connected."""
        self.load.joined += 1
        self.joined.set_result(True)


async def connect(load: Load, port: int, user: int, ready: bytes | None) -> None:
    """Open one socket and wait until it is connected."""
    url = f"ws://127.0.0.1:{port}/socket.io/?EIO=4&transport=websocket&u={user}"
    offer = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
    try:
        _, socket = await picows.ws_connect(
            lambda: Socket(load, user, ready), url, extra_headers=None if ready is None else offer,
            websocket_handshake_timeout=60, read_buffer_init_size=2048,
        )  # fmt: skip
        await socket.joined
    except (OSError, picows.WSError):
        load.lost += 1


async def main(port: int, users: int, devices: int, protocol: str, in_flight: int) -> None:
    """Connect all sockets and obey until stdin ends."""
    load, ready = Load(), READY[protocol]
    waiting = iter([user for user in range(users) for _ in range(devices)])

    async def worker() -> None:
        for user in waiting:
            await connect(load, port, user, ready)

    async with asyncio.timeout(120):
        await asyncio.gather(*(worker() for _ in range(in_flight)))
    print(json.dumps({"joined": load.joined, "lost": load.lost}), flush=True)
    stdin = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    while line := await stdin.readline():
        command, *arguments = line.decode().split()
        answer = await (load.arm() if command == "arm" else load.until(*arguments))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        _, port, users, devices, protocol, in_flight = sys.argv
        runner.run(main(int(port), int(users), int(devices), protocol, int(in_flight)))
