"""No client holds a connection, or what it has uploaded, by being slow."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from adapters.serving import http_protocol, uvicorn_server
from api.rest import bodies
from support.harness import TIMEOUT, Running, running
from support.pictures import RED, solid
from support.raw_http import Client, serving, statuses, stream

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOST = b" HTTP/1.1\r\nHost: localhost\r\n"
EDIT = b"POST /generations/edit" + HOST
FORM = b"Content-Type: multipart/form-data; boundary=x\r\n"
FILE = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n' + solid(RED).data
LONG = b"Content-Length: 5000000\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("images"), max_per_user=1_000, credits=None) as service:
        yield service


@contextlib.asynccontextmanager
async def connected(port: int, *said: bytes) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"".join(said))
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


def problem(answer: bytes) -> Any:
    return json.loads(answer.rpartition(b"\r\n\r\n")[2])


def spooled() -> int:
    """How many temporary files this process has open."""
    files = 0
    for descriptor in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            files += str(descriptor.readlink()).endswith(" (deleted)")
    return files


# --- answered before the body was read ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "trickle", "status"),
    [
        pytest.param(b"POST /nothing" + HOST + LONG, b"x", 404, id="no such route"),
        pytest.param(b"POST /nothing" + HOST + CHUNKED, b"1\r\nx\r\n", 404, id="chunked"),
        pytest.param(b"POST /nothing" + HOST + CHUNKED + b"0\r\nX: ", b"y", 404, id="trailers"),
        pytest.param(b"POST /nothing" + HOST + CHUNKED + b"1;", b"y", 404, id="chunk extensions"),
        pytest.param(EDIT + LONG, b"x", 415, id="no form"),
        pytest.param(EDIT + FORM + LONG.replace(b"5", b"500"), b"x", 413, id="too large"),
        pytest.param(EDIT + b"Expect: 100-continue\r\n" + LONG, b"x", 415, id="not told to continue"),
        pytest.param(EDIT + b"Connection: close\r\n" + LONG, b"x", 415, id="asked to close"),
        pytest.param(EDIT.replace(b"1.1", b"1.0") + LONG, b"x", 415, id="HTTP/1.0"),
        pytest.param(EDIT + b"Upgrade: h2c\r\nConnection: Upgrade\r\n" + LONG, b"x", 415, id="an upgrade"),
        pytest.param(b"GET /stages" + HOST + LONG, b"x", 200, id="GET with a body"),
        pytest.param(b"HEAD /stages" + HOST + LONG, b"x", 200, id="HEAD with a body"),
        pytest.param(b"POST /socket.io/?EIO=4&transport=polling&sid=x" + HOST + LONG, b"x", 400, id="no such session"),
        pytest.param(b"GET /stages" + HOST + b"X: " + b"x" * 140_000, b"x" * 1_000, 431, id="too large a head"),
        pytest.param(b"GARBAGE\r\n\r\n", b"x", 400, id="no HTTP"),
    ],
)
async def test_a_connection_is_closed_soon_after_an_answer_that_did_not_wait_for_the_body(
    service: Running, monkeypatch: pytest.MonkeyPatch, request_bytes: bytes, trickle: bytes, status: int
) -> None:
    monkeypatch.setattr(http_protocol, "LINGER", 0.2)
    async with connected(service.port, request_bytes) as client:
        answer = await client.until_closed(trickle)
    assert statuses(answer) == [status]
    assert b"\r\nconnection: close\r\n" in answer.lower()


async def test_a_client_that_sends_its_whole_body_first_can_read_the_answer(service: Running) -> None:
    async with connected(service.port, EDIT + LONG) as client, asyncio.timeout(TIMEOUT):
        for _ in range(78):  # Short of the end, so that it is the service that closes.
            client.writer.write(b"x" * 64_000)
            await client.writer.drain()
        answer = await client.reader.read()
        assert statuses(answer) == [415]
        assert problem(answer)["code"] == "unsupported_media_type"


async def test_no_request_is_answered_after_connection_close(service: Running) -> None:
    before = len((await service.get("/generations?limit=100"))["generations"])
    start = (
        FORM
        + b"Content-Length: %d\r\n\r\n"
        % len(form := b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red hat\r\n--x--\r\n')
        + form
    )
    async with connected(service.port, b"POST /nothing" + HOST + b"Content-Length: 1\r\n\r\n") as client:
        await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), TIMEOUT)
        client.writer.write(b"x" + EDIT.replace(b"edit", b"edit?runner=external") + start)
        rest = await asyncio.wait_for(client.reader.read(), TIMEOUT)
    assert statuses(rest) == []
    assert len((await service.get("/generations?limit=100"))["generations"]) == before


async def test_a_whole_request_keeps_its_connection_whatever_it_is_answered(service: Running) -> None:
    async with connected(
        service.port, EDIT + b"Content-Length: 3\r\n\r\nabc", b"GET /stages" + HOST + b"\r\n"
    ) as client:
        head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), TIMEOUT)
        assert b"connection: close" not in head
        await asyncio.wait_for(client.reader.readuntil(b"HTTP/1.1 200 OK\r\n"), TIMEOUT)


# --- what is no body ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "flood"),
    [
        pytest.param(EDIT + FORM + CHUNKED + b"2\r\n--\r\n0\r\n", b"X: yyyyyyyy\r\n" * 6_000, id="many trailers"),
        pytest.param(EDIT + FORM + CHUNKED + b"2\r\n--\r\n0\r\nX: ", b"y" * 60_000, id="one long trailer"),
        pytest.param(EDIT + FORM + CHUNKED + b"2;", b"y" * 60_000, id="a long chunk extension"),
        pytest.param(b"GET /stages" + HOST, b"X: yyyyyyyy\r\n" * 6_000, id="many headers"),
    ],
)
async def test_a_request_may_have_so_many_bytes_of_headers_and_trailers(
    service: Running, request_bytes: bytes, flood: bytes
) -> None:
    async with connected(service.port, request_bytes) as client:
        answer = await client.until_closed(flood, 0.01)
    assert statuses(answer) == [431]


async def test_an_oversized_head_is_rejected_and_a_large_body_after_a_head_is_not(
    service: Running,
) -> None:
    async with connected(service.port, b"GET /stages" + HOST) as client, asyncio.timeout(TIMEOUT):
        client.writer.write(b"X: " + b"y" * 65_000 + b"\r\nZ: " + b"y" * 66_100 + b"\r\n\r\n")
        assert statuses(await client.reader.read()) == [431]
    body = b"x" * 3_000_000
    async with connected(service.port) as client, asyncio.timeout(TIMEOUT):
        for _ in range(3):
            client.writer.write(EDIT + FORM + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            await client.writer.drain()
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert statuses(head) == [400]
            await client.reader.readuntil(b"}")


async def test_trailers_are_not_taken_for_headers(service: Running) -> None:
    trailers = b"4\r\nnull\r\n0\r\nX-User-Id: mallory\r\n\r\n"
    async with connected(service.port, b"GET /me" + HOST + CHUNKED + trailers) as client, asyncio.timeout(TIMEOUT):
        answer = await client.reader.readuntil(b"}")
    assert statuses(answer) == [200]
    assert problem(answer)["userId"] == "demo"


async def test_all_files_of_a_request_take_one_descriptor(service: Running) -> None:
    part = b'\r\n--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n' + b"x" * 300_000
    before = spooled()
    async with connected(service.port, EDIT + FORM + LONG, FILE, part * 9) as client, asyncio.timeout(TIMEOUT):
        while spooled() == before:
            await asyncio.sleep(0.01)
        await client.writer.drain()
        assert spooled() == before + 1
    async with asyncio.timeout(TIMEOUT):
        while spooled() > before:
            await asyncio.sleep(0.01)


# --- bodies that come slowly -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "trickle"),
    [
        pytest.param(EDIT + FORM + LONG + FILE + b"x" * 1_500_000, b"", id="half an upload"),
        pytest.param(EDIT + FORM + LONG + FILE, b"x", id="a byte now and then"),
        pytest.param(EDIT + FORM + CHUNKED, b"1\r\n-\r\n", id="tiny chunks"),
        pytest.param(EDIT + FORM + CHUNKED + b"1;", b"y", id="chunk extensions"),
        pytest.param(EDIT + FORM + CHUNKED + b"0\r\nX: ", b"y", id="trailers"),
        pytest.param(EDIT + FORM + b"Expect: 100-continue\r\n" + LONG, b"", id="told to continue"),
        pytest.param(b"POST /users/ada/credit" + HOST + b"Content-Length: 50\r\n\r\n{", b" ", id="JSON"),
    ],
)
async def test_a_body_that_comes_too_slowly_is_answered_with_408_and_nothing_of_it_is_kept(
    service: Running, monkeypatch: pytest.MonkeyPatch, request_bytes: bytes, trickle: bytes
) -> None:
    monkeypatch.setattr(bodies, "BODY_WINDOW", 0.5)
    monkeypatch.setattr(http_protocol, "LINGER", 0.2)
    before = spooled()
    async with connected(service.port, request_bytes) as client:
        answer = (
            await client.until_closed(trickle) if trickle else await asyncio.wait_for(client.reader.read(), TIMEOUT)
        )
    assert statuses(answer)[-1] == 408
    assert (problem(answer)["code"], problem(answer)["status"]) == ("request_timeout", 408)
    assert b"connection: close" in answer.lower()
    assert spooled() == before


async def test_a_slow_polling_request_is_answered_with_408_and_ends_its_session(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = await service.http.get("/socket.io/?EIO=4&transport=polling")
    sid = json.loads(opened.text[1:])["sid"]
    monkeypatch.setattr(bodies, "BODY_WINDOW", 0.3)
    path = f"POST /socket.io/?EIO=4&transport=polling&sid={sid}".encode()
    async with connected(service.port, path + HOST + b"Content-Length: 9\r\n\r\n4") as client:
        answer = await asyncio.wait_for(client.reader.read(), TIMEOUT)
    assert problem(answer)["code"] == "request_timeout"
    await service.until(lambda: sid not in service.service.sockets.eio.sockets)


async def test_an_endless_body_is_answered_with_408_at_any_speed(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT", 0.5)
    monkeypatch.setattr(http_protocol, "LINGER", 0.2)
    async with connected(service.port, EDIT + FORM + CHUNKED) as client:
        answer = await client.until_closed(b"400\r\n" + b"x" * 0x400 + b"\r\n", 0.01)
    assert problem(answer)["code"] == "request_timeout"


async def test_an_upload_at_an_acceptable_pace_may_take_long(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_WINDOW", 1)
    fields = b'\r\n--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red hat\r\n--x--\r\n'
    form = (b"-" * 10_000) + b"\r\n" + FILE + fields
    async with connected(service.port, EDIT + FORM + b"Content-Length: %d\r\n\r\n" % len(form)) as client:
        for at in range(0, len(form), 300):
            client.writer.write(form[at : at + 300])
            await asyncio.sleep(0.05)
        head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), TIMEOUT)
    assert statuses(head) == [202]


async def test_a_poll_without_a_body_may_wait_longer_than_a_body(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    polling = "/socket.io/?EIO=4&transport=polling"
    sid = json.loads((await service.http.get(polling)).text[1:])["sid"]
    monkeypatch.setattr(bodies, "BODY_WINDOW", 0.1)
    poll = asyncio.create_task(service.http.get(f"{polling}&sid={sid}"))
    await asyncio.wait([poll], timeout=0.3)
    assert not poll.done()
    await service.http.post(f"{polling}&sid={sid}", content="40")
    assert (await poll).text.startswith("40{")
    await service.http.post(f"{polling}&sid={sid}", content="1")


# --- idle connections, and answers that are not read -------------------------------------------------------


async def test_empty_lines_do_not_keep_an_idle_connection() -> None:
    async with serving(stream, keep_alive=0.3) as port, connected(port, b"GET /" + HOST + b"\r\n") as client:
        assert statuses(await client.until_closed(b"\r\n")) == [200]


async def large(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * 10_000_000})


@pytest.mark.parametrize("rest", [b"\r\n", b"Connection: close\r\n\r\n"], ids=["keep-alive", "close"])
async def test_a_response_that_is_not_read_is_aborted(monkeypatch: pytest.MonkeyPatch, rest: bytes) -> None:
    monkeypatch.setattr(uvicorn_server, "SEND_TIMEOUT", 0.5)
    async with serving(large) as port, connected(port, b"GET /" + HOST + rest) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(2)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = 0
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(TIMEOUT):
                while data := await client.reader.read(1 << 20):
                    received += len(data)
        assert received < 10_000_000


async def test_a_response_that_is_read_slowly_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn_server, "SEND_TIMEOUT", 1)
    async with serving(large) as port, connected(port, b"GET /" + HOST + b"Connection: close\r\n\r\n") as client:
        received = 0
        while data := await asyncio.wait_for(client.reader.read(200_000), TIMEOUT):
            received += len(data)
            await asyncio.sleep(0.02)
        assert received > 10_000_000
