"""Engine.IO protocol cases in which the official test suites found a deviation, and similar cases."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio
import websockets

from support.harness import RAW_OPTIONS, TIMEOUT, Running, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/socket.io/?EIO=4&transport=polling"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("images")) as service:
        yield service


@contextlib.asynccontextmanager
async def session(service: Running) -> AsyncIterator[str]:
    """The path of a polling session, which is closed at the end."""
    answer = await service.http.get(PATH)
    path = f"{PATH}&sid={json.loads(answer.text[1:])['sid']}"
    try:
        yield path
    finally:
        await service.http.post(path, content="1")


async def waiting(service: Running, path: str) -> asyncio.Task[httpx2.Response]:
    """A poll that the service has received and is holding."""
    poll = asyncio.create_task(service.http.get(path))
    sid = path.rpartition("=")[2]
    await service.until(lambda: service.service.sockets.eio.sockets[sid]._polling)
    return poll


@contextlib.asynccontextmanager
async def websocket(service: Running, path: str, **options: Any) -> AsyncIterator[websockets.ClientConnection]:
    url = f"ws://127.0.0.1:{service.port}{path.replace('transport=polling', 'transport=websocket')}"
    async with asyncio.timeout(TIMEOUT), websockets.connect(url, **RAW_OPTIONS, **options) as connection:
        yield connection


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("transport", ["", "&transport=", "&transport=abc", "&transport=polling&transport=polling"])
async def test_a_request_without_a_known_transport_is_refused(service: Running, method: str, transport: str) -> None:
    async with session(service) as path:
        for query in ("EIO=4", path.partition("?")[2].replace("&transport=polling", "")):
            answer = await service.http.request(method, f"/socket.io/?{query}{transport}", content=b"4")
            assert (answer.status_code, answer.json()["code"]) == (400, 0)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
async def test_only_get_opens_a_session(service: Running, method: str) -> None:
    assert (await service.http.request(method, PATH)).status_code == 400
    assert service.service.sockets.idle


@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "OPTIONS"])
async def test_a_session_accepts_only_get_and_post_and_survives_others(service: Running, method: str) -> None:
    async with session(service) as path:
        assert (await service.http.request(method, path)).status_code == 400
        assert (await service.http.post(path, content="3")).text == "ok"


@pytest.mark.parametrize("query", ["transport=polling", "EIO=3&transport=polling", "EIO=4&transport=polling&j=0"])
async def test_other_protocols_are_refused(service: Running, query: str) -> None:
    assert (await service.http.get(f"/socket.io/?{query}")).status_code == 400


@pytest.mark.parametrize("query", ["EIO=4", "EIO=4&transport=polling", "transport=websocket", "EIO=4&transport=x"])
async def test_a_refused_websocket_gets_400_and_logs_no_error(
    service: Running, query: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with websocket(service, f"/socket.io/?{query}&sid=none".replace("&transport=polling", "&transport=p")):
            pass
    assert refused.value.response.status_code == 400
    await service.until(lambda: not service.server.server_state.tasks)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_poll_that_waits_when_its_client_closes_gets_a_noop(service: Running) -> None:
    async with session(service) as path:
        poll = await waiting(service, path)
        assert (await service.http.post(path, content="1")).text == "ok"
        assert (await poll).text == "6"
        assert (await service.http.get(path)).status_code == 400


async def test_a_second_poll_at_once_closes_the_session(service: Running) -> None:
    async with session(service) as path:
        first = await waiting(service, path)
        assert (await service.http.get(path)).status_code == 400
        assert (await first).text == "6"
        assert (await service.http.get(path)).status_code == 400


async def test_an_upgrade_delivers_no_packet_of_the_poll(service: Running) -> None:
    async with session(service) as path, websocket(service, path) as connection:
        await connection.send("2probe")
        assert await connection.recv() == "3probe"
        assert (await service.http.get(path)).text == "6"
        await connection.send("5")
        await connection.send('40{"userId":"ada"}')
        assert str(await connection.recv()).startswith('40{"sid":')


async def test_a_poll_that_waits_ends_with_the_upgrade(service: Running) -> None:
    async with session(service) as path:
        poll = await waiting(service, path)
        async with websocket(service, path) as connection:
            await connection.send("2probe")
            assert (await poll).text == "6"
            assert await connection.recv() == "3probe"


@pytest.mark.parametrize("said", ["2prob", "4", "5", "x", b"\1"])
async def test_an_upgrade_that_does_not_begin_with_a_probe_leaves_the_polling_session(
    service: Running, said: str | bytes
) -> None:
    async with session(service) as path:
        async with websocket(service, path) as connection:
            await connection.send(said)
            await connection.wait_closed()
        assert (await service.http.post(path, content='40{"userId":"ada"}')).text == "ok"
        assert (await service.http.get(path)).text.startswith('40{"sid":')


async def test_a_websocket_for_a_session_that_has_one_is_opened_and_closed(service: Running) -> None:
    async with session(service) as path, websocket(service, path) as connection:
        await connection.send("2probe")
        await connection.recv()
        async with websocket(service, path) as second:  # While the first one is upgrading.
            await second.wait_closed()
        await connection.send("5")
        await connection.send('40{"userId":"ada"}')
        assert str(await connection.recv()).startswith('40{"sid":')
        async with websocket(service, path) as third:
            await third.wait_closed()
        assert (await service.http.get(path)).status_code == 400
        assert (await service.http.post(path, content="3")).status_code == 400
        await connection.send('421["subscribe_to_generation",{}]')
        while not str(await connection.recv()).startswith("431"):
            pass


@pytest.mark.parametrize("transport", ["polling", "websocket"])
async def test_a_session_ends_when_a_ping_is_not_answered_in_time(
    service: Running, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    eio = service.service.sockets.eio
    monkeypatch.setattr(eio, "ping_interval", 0.1)
    monkeypatch.setattr(eio, "ping_timeout", 0.2)
    if transport == "websocket":
        async with websocket(service, PATH) as connection:
            opening = json.loads(str(await connection.recv())[1:])
            assert (opening["pingInterval"], opening["pingTimeout"], opening["upgrades"]) == (100, 200, [])
            for _ in range(2):
                assert await connection.recv() == "2"
                await connection.send("3")
            assert await connection.recv() == "2"
            await connection.wait_closed()
        return
    async with session(service) as path:
        for _ in range(2):
            assert (await service.http.get(path)).text == "2"
            assert (await service.http.post(path, content="3")).text == "ok"
        assert (await service.http.get(path)).text == "2"
        assert (await service.http.get(path)).text == "6"
        assert (await service.http.get(path)).status_code == 400


async def test_a_polling_request_may_be_chunked(service: Running) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"40", b'{"userId":', b'"ada"}', b"\x1e3"):
            yield piece

    async with session(service) as path:
        assert (await service.http.post(path, content=pieces())).text == "ok"
        assert (await service.http.get(path)).text.startswith('40{"sid":')


async def test_polling_answers_have_a_length_and_are_not_stored(service: Running) -> None:
    async with session(service) as path:
        answer = await service.http.post(path, content="3")
        assert answer.headers["content-length"] == "2"
        assert answer.headers["cache-control"] == "no-store"


async def test_large_polling_answers_are_compressed_where_the_client_accepts_it(service: Running) -> None:
    await service.start("ada", metadata=json.dumps({"filler": "x" * 1900}))
    for accepted, coding in (("gzip, br", "gzip"), ("identity", None)):
        async with session(service) as path:
            await service.http.post(path, content='40{"userId":"ada"}')
            answer = await service.http.get(path, headers={"Accept-Encoding": accepted})
            assert "x" * 1900 in answer.text
            assert answer.headers.get("content-encoding") == coding


@pytest.mark.parametrize("offered", [["stagecast"], ["b", "a"], ["v1.x", "base64"]])
async def test_the_first_offered_subprotocol_is_accepted(service: Running, offered: list[str]) -> None:
    async with websocket(service, PATH, subprotocols=offered) as connection:
        assert connection.subprotocol == offered[0]
    async with session(service) as path, websocket(service, path, subprotocols=offered) as connection:
        assert connection.subprotocol == offered[0]
    async with websocket(service, PATH) as connection:
        assert connection.subprotocol is None
