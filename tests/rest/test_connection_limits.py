"""How many connections and sockets there may be, and who gives way."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from adapters import DESCRIPTOR
from adapters.realtime import socketio_server
from adapters.serving.connection_table import ClientLimit, ConnectionTable
from adapters.system import descriptors
from api.rest.proxies import ForwardedHeaders
from api.settings import load_settings
from api.wiring import connection_table
from support.deployment import Deployment
from support.harness import TIMEOUT, running
from support.raw_http import Client, serving

REQUEST = b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n"
PROXIES = [ip_network("127.0.0.0/8")]


async def patient(scope: Any, receive: Any, send: Any) -> None:
    """An application whose answer to /wait has no end."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"here", "more_body": scope["path"] == "/wait"})
    while scope["path"] == "/wait" and (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def client(
    port: int, path: bytes = b"", *, address: str = "127.0.0.1", forwarded: str = ""
) -> AsyncIterator[Client]:
    """A connection on which a request was sent, or nothing where `path` is empty."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    if path:
        header = f"\r\nX-Forwarded-For: {forwarded}\r\n\r\n".encode() if forwarded else b"\r\n\r\n"
        writer.write((REQUEST % path).replace(b"\r\n\r\n", header))
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


async def answered(each: Client) -> bool:
    """Whether this is answered, and not hung up on."""
    try:
        async with asyncio.timeout(TIMEOUT):
            return b"here" in await each.reader.readuntil(b"here")
    except (asyncio.IncompleteReadError, ConnectionError):
        return False


async def closed(each: Client) -> bool:
    try:
        await asyncio.wait_for(each.reader.read(), 0.1)
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


async def test_an_idle_connection_is_closed_to_accept_another_at_the_limit() -> None:
    async with (
        serving(patient, table=ConnectionTable(3)) as port,
        client(port, b"wait") as busy,
        client(port, b"done") as idle,
        client(port) as silent,
    ):
        assert await answered(busy)
        assert await answered(idle)
        async with client(port, b"done") as newcomer:
            assert await answered(newcomer)
            assert await closed(idle)
            async with client(port, b"done") as another:
                assert await answered(another)
                assert await closed(silent)
                assert not await closed(busy)


async def test_a_connection_over_the_limit_is_closed_if_none_is_idle() -> None:
    async with serving(patient, table=ConnectionTable(2)) as port, contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            assert await answered(await stack.enter_async_context(client(port, b"wait")))
        async with client(port, b"done") as newcomer:
            assert not await answered(newcomer)


async def test_an_upload_takes_two_descriptors_until_it_is_answered() -> None:
    upload = b"POST /%b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
    async with (
        serving(patient, table=ConnectionTable(100, descriptors=4)) as port,
        contextlib.AsyncExitStack() as stack,
    ):
        kept = await stack.enter_async_context(client(port))
        for _ in range(3):
            kept.writer.write(upload % b"done" + b"xx")
            assert await answered(kept)
        first, second, third = [await stack.enter_async_context(client(port)) for _ in range(3)]
        for each in (first, second):
            each.writer.write(upload % b"wait" + b"xx")
            assert await answered(each)
        assert await closed(kept)
        assert await closed(third)
        assert not await closed(first)
        assert not await closed(second)


@pytest.mark.parametrize("upgrade", [False, True])
async def test_a_connection_that_is_opened_for_a_request_takes_a_descriptor_until_it_is_closed(upgrade: bool) -> None:
    opened, closing = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/pass-on":
            with scope["extensions"][DESCRIPTOR]():
                opened.set()
                await closing.wait()
            opened.clear()
        await patient(scope, receive, send)

    async with serving(app, table=ConnectionTable(100, descriptors=3)) as port, client(port) as idle:
        websocket = (
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        )
        async with client(port, b"pass-on") if not upgrade else client(port) as passing:
            if upgrade:
                passing.writer.write((REQUEST % b"pass-on")[:-2] + websocket + b"Connection: Upgrade\r\n\r\n")
            await asyncio.wait_for(opened.wait(), TIMEOUT)
            assert not await closed(idle)
            async with client(port, b"done") as newcomer:
                assert await answered(newcomer)
                assert await closed(idle)
                closing.set()
                async with client(port, b"done") as another:
                    assert await answered(another)
                    assert not await closed(newcomer)


async def test_an_upload_no_longer_counts_once_it_is_answered_even_if_its_end_is_awaited() -> None:
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await patient(scope, receive, send)
        await receive()  # As a response with background work does, to notice a disconnect.
        ended.set()

    upload = b"POST /done HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nxx"
    async with serving(app, table=ConnectionTable(100, descriptors=2)) as port, client(port) as uploads:
        uploads.writer.write(upload)
        assert await answered(uploads)
        await asyncio.wait_for(ended.wait(), 5)
        async with client(port, b"done") as other:
            assert await answered(other)
            assert not await closed(uploads)


async def test_an_upload_behind_a_proxy_takes_two_descriptors() -> None:
    table = ConnectionTable(100, proxies=PROXIES, descriptors=3)
    app = ForwardedHeaders(ClientLimit(patient), PROXIES)
    upload = b"POST /wait HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 9.9.9.9\r\nContent-Length: 2\r\n\r\nxx"
    async with serving(app, table=table) as port, client(port) as idle, client(port) as other:
        other.writer.write(upload)
        assert await answered(other)
        assert not await closed(idle)
        async with client(port, b"done") as newcomer:
            assert await answered(newcomer)
            assert await closed(idle)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
async def test_the_address_with_most_connections_is_closed_first() -> None:
    async with serving(patient, table=ConnectionTable(100)) as port, contextlib.AsyncExitStack() as stack:
        crowd = [await stack.enter_async_context(client(port, b"wait")) for _ in range(100)]
        assert all(await asyncio.gather(*map(answered, crowd)))
        for number in range(2, 22):
            assert await answered(await stack.enter_async_context(client(port, b"wait", address=f"127.0.0.{number}")))
        assert sum(await asyncio.gather(*map(closed, crowd))) == 20


async def test_an_address_is_limited_in_connections_and_others_are_served() -> None:
    table = ConnectionTable(None, 2)
    async with serving(patient, table=table) as port, contextlib.AsyncExitStack() as stack:
        async with client(port) as first:
            assert await answered(await stack.enter_async_context(client(port, b"wait")))
            async with client(port) as third:
                assert await asyncio.wait_for(third.reader.read(), TIMEOUT) == b""
            assert not await closed(first)
        while len(table._addresses) > 1:
            await asyncio.sleep(0.01)
        async with client(port, b"done") as again:
            assert await answered(again)
        if sys.platform == "linux":
            assert await answered(await stack.enter_async_context(client(port, b"wait", address="127.0.0.2")))


async def test_behind_a_proxy_the_forwarded_address_counts() -> None:
    app = ForwardedHeaders(ClientLimit(patient), PROXIES)
    table = ConnectionTable(None, 2, PROXIES)
    async with serving(app, table=table) as port, contextlib.AsyncExitStack() as stack:
        for address in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"):
            assert await answered(await stack.enter_async_context(client(port, b"wait", forwarded=address)))
        for address in ("192.0.2.1", "2001:db8::3"):
            async with client(port, b"wait", forwarded=address) as one_too_many:
                assert not await answered(one_too_many)
        for _ in range(5):  # Each is the proxy's own again, once it is answered.
            assert await answered(await stack.enter_async_context(client(port, b"done", forwarded="192.0.2.2")))


async def test_a_closed_websocket_frees_its_slot(tmp_path: Path) -> None:
    table = ConnectionTable(None, 1)
    async with running(tmp_path) as service, serving(service.server.config.app, table=table) as port:
        service.port = port
        for _ in range(3):
            connection = await service.raw()
            async with client(port, b"health/live") as beside:
                assert await asyncio.wait_for(beside.reader.read(), TIMEOUT) == b""
            await connection.close()
            await service.until(lambda: not table._addresses)


def test_the_connection_limit_never_exceeds_the_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for chosen, most in (({}, descriptors() - 64), ({"max_connections": 10}, 10)):
        assert connection_table(load_settings(chosen))._most == most
    assert connection_table(load_settings({"max_connections": 10**9}))._most == descriptors() - 64


def test_only_some_limits_can_be_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("max_connections_per_address", "max_sockets_per_user"):
        assert getattr(load_settings({}), name) is None
        assert getattr(load_settings({name: "off"}), name) is None
        assert getattr(load_settings({name: "5"}), name) == 5


# --- sockets -----------------------------------------------------------------------------------------------


async def test_a_user_has_as_many_sockets_as_allowed(tmp_path: Path) -> None:
    async with running(tmp_path, max_sockets_per_user=2) as service, service.phone("ada"), service.phone() as other:
        async with service.phone(userId="ada"):
            for frames in (['40{"userId":"ada"}'], ["40", '420["authenticate",{"userId":"ada"}]']):
                one_too_many = await service.raw()
                for frame in frames:
                    await one_too_many.send(frame)
                await asyncio.wait_for(one_too_many.wait_closed(), TIMEOUT)
            await other.authenticate("bob")
        await service.until(lambda: service.service.hub.device_count("ada") == 1)
        async with service.phone("ada") as again:
            await again.authenticate("ada")  # The same socket counts once.


async def test_a_socket_that_is_taken_up_again_replaces_the_older_one(tmp_path: Path) -> None:
    async with running(tmp_path, max_sockets_per_user=1) as service:
        first = await service.raw()
        await first.send('40{"userId":"ada"}')
        pid = str(await first.recv()).split('"pid":"')[1].split('"')[0]
        again = await service.raw()
        await again.send(f'40{{"pid":"{pid}","userId":"ada"}}')
        await asyncio.wait_for(first.wait_closed(), TIMEOUT)
        assert pid in str(await again.recv())
        await again.close()


async def test_of_too_many_unauthenticated_sessions_the_oldest_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socketio_server, "MAX_UNAUTHENTICATED", 5)
    polling = "/socket.io/?EIO=4&transport=polling"
    async with running(tmp_path) as service, service.phone("ada") as phone:
        answers = [await service.http.get(polling) for _ in range(8)]
        sids = [json.loads(answer.text[1:])["sid"] for answer in answers]
        sessions = service.service.sockets.eio.sockets
        await service.until(lambda: len(sessions) == 6)
        assert [sid in sessions for sid in sids] == [False] * 3 + [True] * 5
        assert (await service.http.post(f"{polling}&sid={sids[0]}", content="40")).status_code == 400
        await phone.authenticate("ada")
        for sid in sids[3:]:
            await service.http.post(f"{polling}&sid={sid}", content="1")


# --- descriptors -------------------------------------------------------------------------------------------


def descriptor_limits(pid: int) -> list[str]:
    """The soft and the hard one of this process."""
    return Path(f"/proc/{pid}/limits").read_text().split("Max open files")[1].split()[:2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the limit in /proc")
async def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_one(tmp_path: Path) -> None:
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))"
    async with Deployment(tmp_path / "service", prelude=prelude, durable=False).serving() as life:
        assert descriptor_limits(life.pid.result()) == ["300", "300"]
