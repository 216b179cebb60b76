"""Starts generations over HTTP, each for another user, and tells how they were answered.

    python -m benchmarks.servers.starts PORT

``closed CONNECTIONS SECONDS``: each connection starts the next one once the last is answered. ``open RATE SECONDS``: so
many a second, whatever is answered, on as many connections as that takes. Both are answered with counts by status or
code.
"""

import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Final, cast

import uvloop

#: Connections that are open at most, each of which may use two descriptors of the service. A start that finds none free
#: is not sent.
MOST: Final = 8_000
_FORM: Final = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b--\r\n'
_HEAD: Final = (
    "POST /generations/edit?runner=external HTTP/1.1\r\nHost: 127.0.0.1\r\nX-User-Id: s{}\r\n"
    "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {}\r\n\r\n"
)
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_NUMBERS: Final = count()


class Connection(asyncio.Protocol):
    """One kept connection: it starts a generation as soon as it is open, and whenever it is asked to."""

    def __init__(self, answered: Callable[["Connection", str], None]) -> None:
        """`answered` is called with the status, or with the code of the problem."""
        self._answered = answered
        self._transport: asyncio.Transport | None = None
        self._waiting = False
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no instance of it.
        self.start()

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self._read += data
        head, separator, body = self._read.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if separator and length is not None and len(body) >= int(length[1]):
            self._read = b""
            if b"connection: close" in head.lower():
                self._transport = None
            status = head.split(b" ", 2)[1].decode()
            self._end(status if status == "202" else str(json.loads(body).get("code", status)))

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self._transport = None
        self._end("closed")

    @property
    def open(self) -> bool:
        """Whether another start can be sent."""
        return self._transport is not None

    def start(self) -> None:
        """Start a generation."""
        assert self._transport is not None
        self._waiting = True
        self._transport.write(_HEAD.format(next(_NUMBERS), len(_FORM)).encode() + _FORM)

    def _end(self, answer: str) -> None:
        if self._waiting:
            self._waiting = False
            self._answered(self, answer)


class Starts:
    """The connections, and what was answered."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[Connection] = []
        self._opened = 0
        self._answers: Counter[str] = Counter()
        #: How many starts wait for an answer.
        self._waiting = 0
        #: Set when none waits any more.
        self._none_waits = asyncio.Event()
        #: Until when an answered connection starts the next one.
        self._repeat_until = 0.0

    async def closed(self, connections: str, seconds: str) -> None:
        """Each connection starts the next one once the last is answered."""
        self._repeat_until = time.monotonic() + float(seconds)
        await asyncio.gather(*(self._start() for _ in range(int(connections))))
        await self._all_answered()

    async def open(self, rate: str, seconds: str) -> None:
        """Start so many a second."""
        begin, sent, total = time.monotonic(), 0, int(float(rate) * float(seconds))
        async with asyncio.TaskGroup() as tasks:
            while sent < total:
                due = min(int((time.monotonic() - begin) * float(rate)), total)
                for _ in range(sent, due):
                    if not self._start_on_free():
                        tasks.create_task(self._start())
                sent = due
                await asyncio.sleep(0.002)
        await self._all_answered()

    def _start_on_free(self) -> bool:
        """Start a generation on a free connection. False if no connection is free."""
        while self._free:
            connection = self._free.pop()
            if connection.open:
                self._waiting += 1
                connection.start()
                return True
            self._opened -= 1
        return False

    async def _start(self) -> None:
        if self._start_on_free():
            return
        if self._opened >= MOST:
            return
        self._opened += 1
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: Connection(self._end), "127.0.0.1", self._port)
        except OSError:
            self._end(Connection(self._end), "not connected")

    def _end(self, connection: Connection, answer: str) -> None:
        self._answers[answer] += 1
        if connection.open and time.monotonic() < self._repeat_until:
            connection.start()
            return
        self._free.append(connection)
        self._waiting -= 1
        if not self._waiting:
            self._none_waits.set()

    async def _all_answered(self) -> None:
        while self._waiting:
            self._none_waits.clear()
            await self._none_waits.wait()

    async def obey(self) -> None:
        """Obey until stdin ends."""
        stdin = asyncio.StreamReader()
        reading = asyncio.StreamReaderProtocol(stdin)
        await asyncio.get_running_loop().connect_read_pipe(lambda: reading, sys.stdin)
        while line := await stdin.readline():
            command, *arguments = line.decode().split()
            self._answers.clear()
            await (self.closed if command == "closed" else self.open)(*arguments)
            print(json.dumps(self._answers), flush=True)


if __name__ == "__main__":
    uvloop.run(Starts(int(sys.argv[1])).obey())
