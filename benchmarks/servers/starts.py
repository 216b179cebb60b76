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
from itertools import count
from typing import Final

#: Connections that are open at most; a start that finds none free is not sent.
MOST: Final = 1_500
_FORM: Final = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b--\r\n'
_HEAD: Final = (
    "POST /generations/edit?runner=external HTTP/1.1\r\nHost: 127.0.0.1\r\nX-User-Id: s{}\r\n"
    "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {}\r\n\r\n"
)
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_NUMBERS: Final = count()


class Connection(asyncio.Protocol):
    """One kept connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[str] | None = None
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self._read += data
        head, separator, body = self._read.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not separator or length is None or len(body) < int(length[1]) or self._answer is None:
            return
        self._read = b""
        status = head.split(b" ", 2)[1].decode()
        self._answer.set_result(status if status == "202" else str(json.loads(body).get("code", status)))

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result("closed")
        self._transport = None

    @property
    def open(self) -> bool:
        """Whether another start can be sent."""
        return self._transport is not None

    async def start(self) -> str:
        """Start a generation: the status, or the code of the problem."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(_HEAD.format(next(_NUMBERS), len(_FORM)).encode() + _FORM)
        return await self._answer


class Starts:
    """The connections, and what was answered."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[Connection] = []
        self._opened = 0
        self._answers: Counter[str] = Counter()

    async def closed(self, connections: str, seconds: str) -> None:
        """Each connection starts the next one once the last is answered."""
        end = time.monotonic() + float(seconds)

        async def repeat() -> None:
            while time.monotonic() < end:
                await self._one()

        await asyncio.gather(*(repeat() for _ in range(int(connections))))

    async def open(self, rate: str, seconds: str) -> None:
        """Start so many a second."""
        begin, sent, total = time.monotonic(), 0, int(float(rate) * float(seconds))
        async with asyncio.TaskGroup() as tasks:
            while sent < total:
                due = min(int((time.monotonic() - begin) * float(rate)), total)
                while sent < due:
                    tasks.create_task(self._one())
                    sent += 1
                await asyncio.sleep(0.002)

    async def _one(self) -> None:
        while self._free and not self._free[-1].open:
            self._free.pop()
            self._opened -= 1
        if self._free:
            connection = self._free.pop()
        elif self._opened >= MOST:
            self._answers["not sent"] += 1
            return
        else:
            self._opened += 1
            loop = asyncio.get_running_loop()
            try:
                _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
            except OSError:
                self._opened -= 1
                self._answers["not connected"] += 1
                return
        self._answers[await connection.start()] += 1
        self._free.append(connection)

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
    asyncio.run(Starts(int(sys.argv[1])).obey())
