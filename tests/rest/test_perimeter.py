"""The outermost layer: who may come in, and CORS on everything."""

import asyncio
from typing import Any

import pytest

from api.loopback import is_loopback
from api.rest.origin_guard import OriginGuard
from support.http_app import Api, assert_problem, serve_api

pytestmark = pytest.mark.asyncio(loop_scope="module")

APP = "https://app.example.com"
EVIL = "https://evil.example"


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1"])
async def test_loopback_names(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "example.com", "localhost.evil.com", "notlocalhost", "10.0.0.1", "0.0.0.0", "::"])
async def test_other_names(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "origin",
    ["http://localhost", "http://localhost:5173", "https://x.localhost:1", "http://127.4.5.6:9", "http://[::1]:8080"],
)
@pytest.mark.parametrize("path", ["/me", "/nowhere", "/generations/x", "/generations?limit=0"])
async def test_success_and_errors_carry_exactly_one_cors_header(shared_api: Api, origin: str, path: str) -> None:
    answer = await shared_api.client.get(path, headers={"Origin": origin})
    assert answer.headers.get_list("access-control-allow-origin") == [origin]
    assert answer.headers["vary"] == "Origin"
    exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert exposed == {"Location", "Retry-After", "X-Request-Id"}


async def test_an_internal_error_has_the_cors_header(
    shared_api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def break_down(*_: object) -> None:
        raise RuntimeError("the secret")

    monkeypatch.setattr(shared_api.workflow, "credit", break_down)
    answer = await shared_api.client.get("/me", headers={"Origin": "http://localhost"})
    assert_problem(answer, 500, "internal")
    assert answer.headers.get_list("access-control-allow-origin") == ["http://localhost"]
    assert "secret" not in answer.text
    assert [record.getMessage() for record in caplog.records] == ["GET: RuntimeError"]
    assert "Traceback" not in caplog.text


async def test_a_preflight_is_answered_with_one_header_and_what_is_allowed(shared_api: Api) -> None:
    answer = await shared_api.client.options(
        "/generations/edit",
        headers={
            "Origin": "http://localhost:5173",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,idempotency-key,x-user-id",
        },
    )
    assert answer.status_code == 200
    assert answer.headers.get_list("access-control-allow-origin") == ["http://localhost:5173"]
    assert "POST" in answer.headers["access-control-allow-methods"].split(", ")
    assert "Origin" in answer.headers["vary"]


async def test_the_same_origin_and_configured_origins_are_allowed() -> None:
    async with serve_api(origins=(APP,), hosts=("pictures.example.com",)) as api:
        for origin in (APP, APP.upper(), "http://pictures.example.com"):
            answer = await api.client.get("/me", headers={"Host": "Pictures.example.com", "Origin": origin})
            assert answer.status_code == 200
            assert answer.headers.get_list("access-control-allow-origin") == [origin]


@pytest.mark.parametrize(
    "origin",
    [
        EVIL,
        "null",
        "",
        "http://localhost.evil.example",
        "http://localhost@evil.example",
        "http://evil.example#localhost",
        "file://localhost",
        "http://",
    ],
)
async def test_another_origin_is_refused_without_a_cors_header(shared_api: Api, origin: str) -> None:
    for method, headers in (("GET", {}), ("OPTIONS", {"Access-Control-Request-Method": "POST"})):
        answer = await shared_api.client.request(method, "/me", headers={"Origin": origin, **headers})
        assert_problem(answer, 403, "origin_not_allowed")
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:3000", "localhost.evil.example", "10.0.0.1", "[::2]", "@"]
)
async def test_an_unknown_host_is_rejected(shared_api: Api, host: str) -> None:
    problem = assert_problem(await shared_api.client.get("/me", headers={"Host": host}), 403, "host_not_allowed")
    assert "STAGECAST_ALLOWED_HOSTS" in problem["detail"]


@pytest.mark.parametrize("host", ["LOCALHOST", "localhost:1", "127.0.0.1:99999", "[::1]:3000", "[::1]", "a.localhost"])
async def test_a_loopback_host_is_accepted_with_any_port_and_case(shared_api: Api, host: str) -> None:
    assert (await shared_api.client.get("/me", headers={"Host": host})).status_code == 200


async def test_a_request_without_a_host_or_with_two_is_refused(shared_api: Api) -> None:
    missing = await shared_api.raw(b"GET /me HTTP/1.0")
    assert b" 403 " in missing.splitlines()[0]
    double = await shared_api.raw(b"GET /me HTTP/1.1", b"Host: localhost", b"Host: evil.example", b"Connection: close")
    assert b" 403 " in double.splitlines()[0]


async def test_a_refused_host_is_still_readable_for_an_allowed_origin(shared_api: Api) -> None:
    headers = {"Host": "evil.example", "Origin": "http://localhost:5173"}
    answer = await shared_api.client.get("/me", headers=headers)
    assert_problem(answer, 403, "host_not_allowed")
    assert answer.headers.get_list("access-control-allow-origin") == ["http://localhost:5173"]


async def test_allow_open_answers_to_every_host_but_not_to_every_origin() -> None:
    async with serve_api(hosts=None) as api:
        assert (await api.client.get("/me", headers={"Host": "evil.example"})).status_code == 200
        problem = assert_problem(await api.client.get("/me", headers={"Origin": EVIL}), 403, "origin_not_allowed")
        assert "STAGECAST_CORS_ORIGINS" in problem["detail"]


async def test_the_request_is_refused_before_its_body_is_read(shared_api: Api) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", shared_api.port)
    writer.write(b"POST /generations/edit HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 1000000\r\n\r\n")
    assert b" 403 " in await asyncio.wait_for(reader.readline(), 30)
    writer.close()
    await writer.wait_closed()


async def websocket_messages(headers: list[tuple[bytes, bytes]]) -> list[Any]:
    """What is sent to a WebSocket upgrade; the application behind accepts everything."""
    sent: list[Any] = []

    async def accept(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "scheme": "ws",
        "path": "/",
        "headers": headers,
        "extensions": {"websocket.http.response": {}},
    }
    await OriginGuard(accept, open_mode=True, origins=(), hosts=())(scope, receive, send)
    return sent


async def test_a_websocket_from_another_origin_or_by_another_host_is_refused() -> None:
    for headers in (
        [(b"host", b"localhost:3000"), (b"origin", EVIL.encode())],
        [(b"host", b"localhost:3000"), (b"origin", b"null")],
        [(b"host", b"evil.example")],
    ):
        (start, body) = await websocket_messages(headers)
        assert (start["type"], start["status"]) == ("websocket.http.response.start", 403)
        assert body["type"] == "websocket.http.response.body"


async def test_a_websocket_of_the_same_origin_is_let_in() -> None:
    headers = [(b"host", b"localhost:3000"), (b"origin", b"http://localhost:3000")]
    assert await websocket_messages(headers) == [{"type": "websocket.accept"}]
