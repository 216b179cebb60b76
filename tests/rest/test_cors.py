"""CORS as real browsers apply it: pages of other origins call the service with the official client and with fetch."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx2
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Frame, Page

from api.rest.origin_guard import OriginGuard
from support.browser import needs_chromium
from support.guarded import guarded, token
from support.harness import JSON, Running
from support.http_app import assert_problem
from support.node import ROOT, needs_client
from support.pictures import RED, solid

pytestmark = pytest.mark.asyncio(loop_scope="session")

APP: Final = "http://app.example.com"
PATTERN: Final = "http://*.preview.example.com"
APPS: Final = (
    "capacitor://localhost",
    "ionic://localhost",
    "tauri://localhost",
    "chrome-extension://abcdef",
    "file://",
)
TOKEN: Final = {"Authorization": f"Bearer {token('ada')}"}
MISSING: Final = "/generations/edit_1763829000123_k3v9x2ab4c6d8e0f"
_CLIENT: Final = ROOT / "src" / "api" / "web" / "static" / "vendor" / "socket.io.min.js"

_FETCH: Final = """async ([url, init]) => {
    try {
        const response = await fetch(url, init);
        return { status: response.status, headers: Object.fromEntries(response.headers), text: await response.text() };
    } catch (error) {
        return { blocked: error.message };
    }
}"""

_CONNECT: Final = """([url, options]) => new Promise((resolve) => {
    const socket = io(url, { forceNew: true, reconnection: false, ...options });
    const done = (result) => { socket.disconnect(); resolve(result); };
    socket.on("connect_error", ({ message }) => done({ blocked: message }));
    socket.on("authenticated", ({ userId }) => {
        const { engine } = socket.io;
        const finish = () => done({ userId, transport: engine.transport.name });
        if (engine.transport.name === "websocket" || options.transports.length === 1) return finish();
        engine.on("upgrade", finish);
    });
})"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def port() -> AsyncIterator[int]:
    """The port of a server that has an empty page for every host name."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            page = b"<!doctype html><title>app</title>"
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % len(page) + page)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory, port: int) -> AsyncIterator[Running]:
    live = (f"http://app.localhost:{port}", f"http://*.preview.localhost:{port}")
    origins = (*live, APP, PATTERN, "https://*-team.example.org", "null", *APPS)
    async with guarded(tmp_path_factory.mktemp("images"), cors_origins=origins) as service:
        yield service


@asynccontextmanager
async def page_at(browser: Browser, origin: str) -> AsyncIterator[Page]:
    """An empty page of this origin."""
    page = await browser.new_page()
    try:
        await page.goto(f"{origin}/")
        yield page
    finally:
        await page.close()


async def fetch(page: Page | Frame, url: str, **init: Any) -> JSON:
    result = await page.evaluate(_FETCH, [url, {"credentials": "include", **init}])
    assert isinstance(result, dict)
    return result


async def preflight(
    service: Running, origin: str, method: str = "POST", headers: str | Sequence[str] = ()
) -> httpx2.Response:
    lines = [headers] if isinstance(headers, str) else headers
    return await service.http.request(
        "OPTIONS",
        "/generations/edit",
        headers=[
            (name.encode(), value.encode("latin-1"))
            for name, value in (
                ("Origin", origin),
                ("Access-Control-Request-Method", method),
                *(("Access-Control-Request-Headers", line) for line in lines),
            )
        ],
    )


def cors_headers(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


@needs_chromium
async def test_a_page_of_an_allowed_origin_may_send_any_header_with_any_method(
    service: Running, browser: Browser, port: int
) -> None:
    names = (
        "traceparent",
        "tracestate",
        "baggage",
        "sentry-trace",
        "Last-Event-ID",
        "Idempotency-Key",
        "X-Request-Id",
        "X-Datadog-Trace-Id",
        "If-None-Match",
        "ngrok-skip-browser-warning",
        "x_under!score",
    )
    headers = dict.fromkeys(names, "1") | TOKEN
    async with page_at(browser, f"http://app.localhost:{port}") as page:
        for method, path, status in (
            ("GET", "/me", 200),
            ("HEAD", "/me", None),
            ("DELETE", MISSING, 404),
            ("POST", f"{MISSING}/cancel", 404),
            ("PUT", "/me", 405),
            ("PATCH", "/me", 405),
            ("OPTIONS", "/me", 405),
        ):
            answer = await fetch(page, service.url + path, method=method, headers=headers)
            assert status in (None, answer.get("status")), (method, answer)
            assert "blocked" not in answer, (method, answer)
        allowed = await fetch(page, f"{service.url}/me", headers={**TOKEN, "X-Forwarded-For": "1.2.3.4"})
        assert "blocked" in allowed


@needs_chromium
async def test_a_page_of_an_allowed_origin_reads_errors_and_the_exposed_headers(
    service: Running, browser: Browser, port: int
) -> None:
    async with page_at(browser, f"http://app.localhost:{port}") as page:
        for path, init, status in (
            ("/me", {}, 401),
            ("/nowhere", {"headers": TOKEN}, 404),
            ("/generations?limit=0", {"headers": TOKEN}, 422),
            ("/generations/edit", {"headers": TOKEN, "method": "POST", "body": "x"}, 415),
            ("/socket.io/?EIO=4&transport=polling&sid=unknown", {}, 400),
        ):
            answer = await fetch(page, service.url + path, **init)
            assert answer.get("status") == status, (path, answer)


@needs_chromium
@needs_client
async def test_the_official_client_connects_from_an_allowed_origin(
    service: Running, browser: Browser, port: int
) -> None:
    how: list[JSON] = [{"withCredentials": True}, {"extraHeaders": {"x-tenant": "7", "traceparent": "00-1-2-01"}}]
    transports = (["polling"], ["websocket"], ["polling", "websocket"])
    chosen = [{**options, "transports": names} for options in how for names in transports]
    async with page_at(browser, f"http://pr-7.preview.localhost:{port}") as page:
        await page.add_script_tag(path=_CLIENT)
        for options in chosen:
            result = await page.evaluate(_CONNECT, [service.url, {**options, "auth": {"token": token("ada")}}])
            assert result == {"userId": "ada", "transport": options["transports"][-1]}, options


@needs_chromium
async def test_a_sandboxed_frame_is_served_where_null_is_allowed(service: Running, browser: Browser, port: int) -> None:
    async with page_at(browser, f"http://app.localhost:{port}") as page:
        document = f"data:text/html,{quote('<!doctype html>')}"
        await page.evaluate(
            "(src) => new Promise((done) => { const frame = document.createElement('iframe'); frame.onload = done; "
            "frame.sandbox = 'allow-scripts'; frame.src = src; document.body.append(frame); })",
            document,
        )
        frame = page.frames[-1]
        assert (await fetch(frame, f"{service.url}/me", headers=TOKEN))["status"] == 200


@needs_chromium
async def test_a_page_of_another_origin_reads_nothing(service: Running, browser: Browser, port: int) -> None:
    async with page_at(browser, f"http://evil.localhost:{port}") as page:
        for init in ({}, {"headers": TOKEN}, {"method": "DELETE"}, {"credentials": "omit"}):
            assert "blocked" in await fetch(page, f"{service.url}/stages", **init)
        assert "blocked" in await fetch(page, f"{service.url}/socket.io/?EIO=4&transport=polling&sid=unknown")


async def test_a_preflight_allows_what_was_asked_for_except_headers_of_proxies_and_browsers(service: Running) -> None:
    asked = "traceparent, X-Own,cookie,Host,X-Forwarded-For,x-forwarded-anything,X-STAGECAST-node,authorization"
    for method in ("GET", "HEAD", "POST", "DELETE", "PUT"):
        answer = await preflight(service, APP, method, asked)
        assert answer.status_code == 200
        assert answer.headers.get_list("access-control-allow-origin") == [APP]
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert answer.headers["access-control-allow-headers"] == "traceparent, X-Own, authorization"
        assert method in answer.headers["access-control-allow-methods"].split(", ")
        assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize("asked", ["*", "x-a, *", "", ",", "x a", "x:a", "x/a", '"x"', "x\x80"])
async def test_a_preflight_allows_no_wildcard_and_no_malformed_name(service: Running, asked: str) -> None:
    answer = await preflight(service, APP, headers=[asked, "x-b"])
    names = answer.headers["access-control-allow-headers"].split(", ")
    assert names == (["x-a", "x-b"] if "x-a" in asked else ["x-b"])
    assert "*" not in "".join(cors_headers(answer).values())


@pytest.mark.parametrize(
    "origin",
    [
        *APPS,
        "null",
        "CAPACITOR://localhost",
        "http://pr-7.preview.example.com",
        "http://x_y.preview.example.com:80",
        "https://branch-team.example.org",
        "https://branch-team.example.org:443",
    ],
)
async def test_listed_origins_of_every_scheme_are_allowed(service: Running, origin: str) -> None:
    for answer in (await preflight(service, origin), await service.http.get("/me", headers={"Origin": origin})):
        assert answer.headers.get_list("access-control-allow-origin") == [origin]
        assert answer.headers["access-control-allow-credentials"] == "true"


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "*",
        "null.",
        "nullx",
        "file:///",
        "capacitor://localhost.evil.com",
        "capacitor://localhost:1",
        "http://app.example.com.",
        "http://app.example.com:8080",
        "https://app.example.com",
        "http://app.example.com@evil.com",
        "http://preview.example.com",
        "http://.preview.example.com",
        "http://a.b.preview.example.com",
        "http://evil.com#.preview.example.com",
        "http://evil.com/.preview.example.com",
        "http://evil.com?.preview.example.com",
        "http://evil.com\\.preview.example.com",
        "http://evil.com:80.preview.example.com",
        "http://a@b.preview.example.com",
        "http://a.preview.example.com.evil.com",
        "http://a.previewxexample.com",
        "http://a.preview.example.com:8080",
        "https://a.preview.example.com",
        f"http://{'a' * 64}.preview.example.com",
        "https://-team.example.org",
        "https://evil.com-team.example.org",
        "http://localhost",
    ],
)
async def test_an_origin_that_only_looks_like_a_listed_one_gets_no_cors_header(service: Running, origin: str) -> None:
    answer = await service.http.get("/stages", headers={"Origin": origin})
    assert (answer.status_code, cors_headers(answer), answer.headers["vary"]) == (200, {}, "Origin")
    refused = await preflight(service, origin)
    assert_problem(refused, 403, "origin_not_allowed")
    assert "STAGECAST_CORS_ORIGINS" in refused.json()["detail"]
    assert (cors_headers(refused), refused.headers["vary"]) == ({}, "Origin")


async def test_two_origin_headers_are_rejected(service: Running) -> None:
    answer = await service.http.get("/stages", headers=[("Origin", APP), ("Origin", APP)])
    assert cors_headers(answer) == {}


async def test_a_response_to_no_origin_varies_by_it_and_a_route_may_vary_by_more() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"vary", b"Accept"), (b"vary", b"Accept-Language")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    for headers in ([], [(b"origin", APP.encode())]):
        sent: list[Any] = []

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request"}

        scope = {"type": "http", "method": "GET", "scheme": "http", "path": "/", "headers": headers}
        await OriginGuard(app, open_mode=False, origins=(APP,), hosts=None)(scope, receive, send)
        (message,) = sent
        assert [value for name, value in message["headers"] if name == b"vary"] == [b"Accept, Accept-Language, Origin"]


async def test_the_default_port_does_not_make_another_origin(service: Running) -> None:
    for host, origin in itertools.product(("a.example", "a.example:80"), ("http://a.example", "http://a.example:80")):
        answer = await service.http.get("/stages", headers={"Host": host, "Origin": origin})
        assert answer.headers.get_list("access-control-allow-origin") == [origin]


@needs_chromium
async def test_a_form_with_a_picture_is_sent_from_an_allowed_origin(
    service: Running, browser: Browser, port: int, tmp_path: Path
) -> None:
    picture = tmp_path / "red.png"
    picture.write_bytes(solid(RED).data)
    async with page_at(browser, f"http://app.localhost:{port}") as page:
        await page.evaluate("document.body.innerHTML = '<input type=file>'")
        await page.locator("input").set_input_files(picture)
        answer = await page.evaluate(
            """async ([url, headers]) => {
                const body = new FormData();
                body.append("prompt", "a red hat");
                body.append("images", document.querySelector("input").files[0]);
                const response = await fetch(url, { method: "POST", body, headers, credentials: "include" });
                return [response.status, response.headers.get("Location")];
            }""",
            [f"{service.url}/generations/edit", {**TOKEN, "Idempotency-Key": "from-a-browser"}],
        )
        assert answer[0] == 202
        assert answer[1].startswith("/generations/edit_")
        await service.service.leases.drain()
