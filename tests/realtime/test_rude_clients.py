"""A hostile or broken client harms only itself."""

import asyncio
import base64
import contextlib
import gc
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import websockets

from adapters.memory.log import MemoryLog
from adapters.realtime import engineio_socket
from adapters.realtime.engineio_socket import EngineSocket
from adapters.realtime.send_buffer import MAX_BYTES, MAX_EVENTS
from adapters.serving import http_protocol
from adapters.system import now
from domain.errors import LogUnavailable
from domain.ports.log import History
from support.builders import memory_storage
from support.harness import Running, frames_until_close, running, stalled_device
from support.log_lines import debug_log

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT, PING = 1, 9


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    gc.collect()  # Objects of other tests may still log something.
    with debug_log():
        async with running(tmp_path_factory.mktemp("images")) as service:
            yield service


@pytest_asyncio.fixture(loop_scope="module")
async def service(shared: Running) -> AsyncIterator[Running]:
    """Shared by all these tests. It is idle after each of them."""
    yield shared
    await shared.until_all_disconnected()
    await shared.service.leases.drain()


@pytest.fixture(autouse=True)
def nothing_is_logged_that_an_operator_would_fear(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    records = [*caplog.get_records("call"), *caplog.records]
    assert [record for record in records if record.levelno >= logging.ERROR or record.exc_info] == []


class Bare:
    """A WebSocket written by hand, which reads only on request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def frame(self, opcode: int, data: bytes = b"", *, final: bool = True) -> bytes:
        length = bytes([0x80 | len(data)]) if len(data) < 126 else bytes([0xFE]) + struct.pack(">H", len(data))
        return bytes([final << 7 | opcode]) + length + b"\0\0\0\0" + data

    async def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))
        await self.writer.drain()

    async def gone(self) -> None:
        """Wait until the server has closed the connection."""
        async with asyncio.timeout(30):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(1 << 20):
                    pass


@contextlib.asynccontextmanager
async def bare(service: Running, *headers: str, query: str = "") -> AsyncIterator[Bare]:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    lines = [
        f"GET /socket.io/?EIO=4&transport=websocket{query} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        *headers,
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
        yield Bare(reader, writer)
    finally:
        writer.transport.abort()


async def polling(service: Running) -> str:
    """The sid of a polling session."""
    answer = await service.http.get("/socket.io/?EIO=4&transport=polling")
    return str(json.loads(answer.text[1:])["sid"])


async def test_an_oversized_websocket_handshake_closes_the_connection(service: Running) -> None:
    async with bare(service, "Cookie: " + "a" * 9_000) as client:
        await client.gone()
    async with bare(service, *(f"X-{n}: 1" for n in range(200))) as client:
        await client.gone()


async def test_a_client_that_requests_acks_and_never_reads_is_disconnected(service: Running) -> None:
    for _ in range(5):
        await service.start("ada", metadata=json.dumps({"filler": "x" * 1900}))
    connection = await stalled_device(service)
    [asking] = service.service.sockets.eio.sockets.values()
    with contextlib.suppress(websockets.ConnectionClosed):
        while not asking.gone:
            for _ in range(20):
                await connection.send('421["authenticate",{"userId":"ada"}]')
            await asyncio.sleep(0)
            assert len(asking.buffer) <= 2 * MAX_EVENTS + 1
            assert asking.buffer.bytes <= 4 * MAX_BYTES + 65_536
    connection.transport.abort()


async def test_a_client_that_floods_websocket_pings_is_disconnected(service: Running) -> None:
    async with bare(service) as client:
        await client.send(client.frame(TEXT, b'40{"userId":"ada"}'))
        with contextlib.suppress(ConnectionError):
            for _ in range(2_000):
                await client.send(client.frame(PING, b"x" * 125) * 500)
        await client.gone()


async def test_a_message_of_endless_fragments_closes_the_connection(service: Running) -> None:
    async with bare(service) as client:
        with contextlib.suppress(ConnectionError):
            await client.send(client.frame(TEXT, final=False), client.frame(0, final=False) * 5_000)
        await client.gone()


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([(TEXT, b"\xff")], id="no text"),
        pytest.param([(TEXT, b"\xff"), (TEXT, b"2"), (PING, b""), (8, b"")], id="no text, and more behind it"),
        pytest.param([(3, b"")], id="an opcode there is not"),
    ],
)
async def test_an_invalid_websocket_message_closes_the_connection(
    service: Running, frames: list[tuple[int, bytes]]
) -> None:
    async with bare(service) as client:
        await client.send(*(client.frame(*frame) for frame in frames))
        await client.gone()


async def test_a_stalled_websocket_that_closes_its_session_leaves_nothing_behind(service: Running) -> None:
    async with bare(service) as client:
        await client.send(client.frame(TEXT, b'40{"userId":"ada"}'))
        await client.send(*[client.frame(TEXT, b'421["authenticate",{"userId":"ada"}]')] * 200)
        await client.send(client.frame(TEXT, b"1"))
        await client.gone()
    await service.until(lambda: not service.server.server_state.tasks or service.service.sockets.idle)


def kept() -> int:
    """How many `EngineSocket` objects this process has, including those of other tests' servers."""
    gc.collect()
    return sum(type(thing) is EngineSocket for thing in gc.get_objects())


async def test_closed_sockets_are_freed_at_once(service: Running) -> None:
    before = kept()
    for _ in range(5):
        connection = await service.raw()
        await connection.send('40{"userId":"ada"}')
        await connection.recv()
        connection.transport.abort()
    await service.until(lambda: service.service.sockets.idle)
    await service.until(lambda: kept() <= before)


async def test_an_upgrade_that_stalls_does_not_starve_polling(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engineio_socket, "UPGRADE_TIMEOUT", 0.2)
    sid = await polling(service)
    path = f"/socket.io/?EIO=4&transport=polling&sid={sid}"
    await service.http.post(path, content='40{"userId":"ada"}')
    async with bare(service, query=f"&sid={sid}") as silent:
        await silent.gone()
        text = ""
        while '["authenticated"' not in text:
            text += (await service.http.get(path)).text
    await service.http.post(path, content="1")


async def test_a_second_upgrade_at_once_is_refused_and_the_first_goes_on(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engineio_socket, "UPGRADE_TIMEOUT", 60)
    sid = await polling(service)
    async with bare(service, query=f"&sid={sid}") as first:
        await first.send(first.frame(TEXT, b"2probe"))
        await service.until(lambda: service.service.sockets.eio.sockets[sid].upgrading)
        async with bare(service, query=f"&sid={sid}") as second:
            await second.gone()
        await first.send(first.frame(TEXT, b"5"))
        await service.until(lambda: service.service.sockets.eio.sockets[sid].upgraded)


@pytest.mark.parametrize("body", ["1\x1e6", "1\x1e5", "4", "x", "", "4" * 70_000, "b!", "42[" + "[" * 20_000])
async def test_a_malformed_polling_request_is_refused(service: Running, body: str) -> None:
    sid = await polling(service)
    answer = await service.http.post(f"/socket.io/?EIO=4&transport=polling&sid={sid}", content=body)
    assert answer.status_code in (200, 400)
    again = await service.http.post(f"/socket.io/?EIO=4&transport=polling&sid={sid}", content=body)
    assert again.status_code == 400
    await service.http.post(f"/socket.io/?EIO=4&transport=polling&sid={sid}", content="1")
    service.service.sockets.eio.sockets.pop(sid, None)


async def test_an_aborted_request_and_one_without_an_upgrade_are_refused(service: Running) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(
        b"POST /socket.io/?EIO=4&transport=polling&sid=x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    )
    writer.transport.abort()
    answer = await service.http.get("/socket.io/?EIO=4&transport=websocket", headers={"Upgrade": "websocket"})
    assert answer.status_code == 400
    jsonp = await service.http.get("/socket.io/?EIO=4&transport=polling&j=0")
    assert jsonp.status_code == 400
    del reader


async def test_reconnecting_does_not_extend_the_time_to_authenticate(tmp_path: Path) -> None:
    async with running(tmp_path, overrides={"auth_timeout": 0.4}) as service:
        connection = await service.raw()

        async def come_and_go() -> None:
            with contextlib.suppress(websockets.ConnectionClosed):
                while True:
                    await connection.send("40")
                    await connection.send("41")
                    await asyncio.sleep(0.1)

        async with asyncio.timeout(30):
            await come_and_go()


@pytest.mark.parametrize("frame", ['42/admin,7["authenticate",{"userId":"bob"}]', "41/admin,", "43/admin,7[]"])
async def test_packets_of_another_namespace_are_not_handled(service: Running, frame: str) -> None:
    connection = await service.raw()
    await connection.send('40{"userId":"ada"}')
    await connection.send(frame)
    assert not [each for each in await frames_until_close(connection) if "bob" in each]


async def test_a_client_that_requests_endless_replays_is_disconnected(service: Running) -> None:
    over = await service.start("ada")
    connection = await service.raw()
    await connection.send('40{"userId":"ada"}')
    subscribe = f'42["subscribe_to_generation",{{"generationId":"{over}","after":99}}]'
    async with service.phone("ada") as neighbour:
        with contextlib.suppress(websockets.ConnectionClosed):
            for _ in range(4_000):
                await connection.send(subscribe)
        generation_id = await service.start("ada")
        await neighbour.until_over(generation_id)
    connection.transport.abort()


class Forgetful(MemoryLog):
    """Does not answer the next reads of all events of a generation."""

    unanswered = 0

    async def generation(self, generation_id: str) -> History | None:
        if self.unanswered:
            self.unanswered -= 1
            raise LogUnavailable
        return await super().generation(generation_id)


async def test_a_replay_waits_until_the_log_is_available(tmp_path: Path) -> None:
    log = Forgetful(epoch="e1", credits=100, clock=now)
    async with running(tmp_path, overrides={"storage": memory_storage(log)}) as service, service.phone("ada") as phone:
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)
        phone.events.clear()
        log.unanswered = 1  # The snapshot in the ack is a summary.
        await phone.call("subscribe_to_generation", {"generationId": generation_id, "after": 0})
        await phone.until_over(generation_id)
        assert phone.sequences(generation_id) == [1, 2, 3, 4, 5, 6]


async def test_a_replay_that_sent_nothing_does_not_count_as_sent(service: Running) -> None:
    generation_id = await service.start("ada")
    await service.service.leases.drain()
    async with service.phone("ada") as phone:
        await phone.call("subscribe_to_generation", {"generationId": generation_id, "after": 100})
        await phone.call("subscribe_to_generation", {"generationId": generation_id})
        await phone.until_over(generation_id)


async def test_a_waiting_poll_ends_at_shutdown(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        sid = await polling(service)
        poll = asyncio.create_task(service.http.get(f"/socket.io/?EIO=4&transport=polling&sid={sid}"))
        await service.until(lambda: service.service.sockets.eio.sockets[sid]._polling)
        service.server.begin_shutdown(now=True)
        assert (await poll).text == "6"
        await service.until(lambda: service.server.should_exit)


@contextlib.asynccontextmanager
async def said_at_once(service: Running, head: bytes) -> AsyncIterator[Bare]:
    """A connection on which these bytes were sent before it is accepted, with a very short header timeout."""
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(http_protocol, "HEADER_TIMEOUT", 0.05)
        line = socket.create_connection(("127.0.0.1", service.port))
        line.sendall(head)
        reader, writer = await asyncio.open_connection(sock=line)
        try:
            yield Bare(reader, writer)
        finally:
            writer.transport.abort()


@pytest.mark.parametrize("said", [b"", b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX: "])
async def test_a_connection_without_a_whole_request_head_is_closed(tmp_path: Path, said: bytes) -> None:
    async with running(tmp_path) as service, said_at_once(service, said) as client, asyncio.timeout(30):
        with contextlib.suppress(ConnectionResetError):
            assert await client.reader.read() == b""


async def test_a_body_may_arrive_later_than_the_head_timeout(tmp_path: Path) -> None:
    head = b"POST /generations/edit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    async with running(tmp_path) as service, service.phone("ada") as phone:
        async with said_at_once(service, head) as client:
            await asyncio.sleep(0.2)
            await client.send(b"123456789")
            assert (await client.reader.readline()).startswith(b"HTTP/1.1 415")
        await phone.authenticate("ada")
