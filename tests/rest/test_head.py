"""HEAD answers what GET answers, without the body."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from api.rest.head import HeadAsGet
from support.harness import TIMEOUT, Running, running
from support.raw_http import LAST, exchange, serving, statuses

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("images")) as service:
        yield service


async def test_head_answers_every_route_as_get_does_without_the_body(service: Running) -> None:
    generation_id = await service.start("demo")
    await service.service.leases.drain()
    image = (await service.events(generation_id, "demo"))[-1]["editedImageUrl"]
    routes = (await service.http.get("/openapi.json")).json()["paths"]
    values = {"generation_id": generation_id, "generationId": generation_id, "name": image.rpartition("/")[2]}
    paths = [path.format_map({**values, "user_id": "ada", "userId": "ada"}) for path in routes]
    paths += ["/", "/docs", "/openapi.json", "/static/index.html", "/static/", "/nothing", "/generations/edit_1_x"]
    answered = set()
    for path in [*paths, "/events?after=nonsense", "/generations?limit=x"]:
        if path == "/metrics":
            continue  # Each request changes them.
        get, head = [
            await service.http.request(method, path, headers={"Accept-Encoding": "identity"})
            for method in ("GET", "HEAD")
        ]
        answered.add(get.status_code)
        assert head.status_code == get.status_code, path
        changing = ("date", "x-request-id")
        assert [(k, v) for k, v in head.headers.items() if k not in changing] == [
            (k, v) for k, v in get.headers.items() if k not in changing
        ], path
        assert head.content == b""
        assert int(head.headers["content-length"]) == len(get.content), path
    assert answered == {200, 404, 405, 422}
    assert not [path for path, operations in routes.items() if "head" in operations]


@pytest.mark.parametrize("headers", [{"Host": "example.com"}, {"Origin": "https://example.com"}])
async def test_head_is_refused_as_get_is(service: Running, headers: dict[str, str]) -> None:
    get, head = [await service.http.request(method, "/me", headers=headers) for method in ("GET", "HEAD")]
    assert (head.status_code, head.content) == (get.status_code, b"") == (403, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


async def test_head_needs_a_token_where_get_does(tmp_path: Path) -> None:
    async with running(tmp_path, jwt_secret="s" * 32) as guarded:
        get, head = await guarded.http.get("/generations"), await guarded.http.head("/generations")
        assert (head.status_code, head.content) == (get.status_code, b"") == (401, b"")
        assert head.headers["www-authenticate"] == "Bearer"
        guarded.server.should_exit = True


async def test_a_head_answer_has_no_body_and_the_connection_stays_usable(service: Running) -> None:
    head = b"HEAD %b HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = await exchange(service, head % b"/stages" + head % b"/nothing" + head % b"/" + LAST)
    assert statuses(answer) == [200, 404, 200, 200]
    assert answer.count(b"{") == 1


async def test_allow_lists_head_where_get_is_allowed(service: Running) -> None:
    for path, allowed in (
        ("/stages", {"GET", "HEAD"}),
        ("/", {"GET", "HEAD"}),
        ("/static/index.html", {"GET", "HEAD"}),
        ("/generations/edit_1_x", {"GET", "HEAD", "DELETE"}),
        ("/generations/edit", {"POST"}),
    ):
        answer = await service.http.put(path)
        assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, allowed), path
    assert (await service.http.head("/generations/edit_1_x/cancel")).headers["allow"] == "POST"


async def test_the_socket_answers_no_head(service: Running) -> None:
    assert (await service.http.head("/socket.io/?EIO=4&transport=polling")).status_code in (400, 405)
    assert service.service.sockets.idle


async def test_head_of_a_stream_is_its_headers_and_the_end() -> None:
    ended = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await stream_start(send)
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()

    async def stream_start(send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"retry: 1000\n\n", "more_body": True})

    async with serving(HeadAsGet(endless)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), TIMEOUT)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b"\r\n\r\n")
        assert b"retry" not in answer
        await asyncio.wait_for(ended.wait(), TIMEOUT)
        writer.close()
