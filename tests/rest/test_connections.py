"""HTTP as clients and proxies send it: upgrades that are not WebSockets, HTTP/1.0, idle connections."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from api.app import create_server
from api.settings import Settings
from api.wiring import wire
from support.harness import TIMEOUT, Running, running
from support.raw_http import LAST, exchange, serving, statuses, stream

pytestmark = pytest.mark.asyncio(loop_scope="module")

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
KEY = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
FORM = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red hat\r\n--x--\r\n'
START = b"POST /generations/edit?runner=external HTTP/1.1\r\nHost: localhost\r\n"
MULTIPART = b"Content-Type: multipart/form-data; boundary=x\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("images"), max_per_user=1_000, credits=None) as service:
        yield service


def sized(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def chunked(body: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 7]), body[at : at + 7]) for at in range(0, len(body), 7))
    return b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "upgrade",
    [
        pytest.param(H2C, id="h2c"),
        pytest.param(b"Upgrade: h2c\r\nConnection: keep-alive\r\nConnection: upgrade\r\n", id="two Connection headers"),
        pytest.param(b"Upgrade: TLS/1.2, foo/2\r\nUpgrade: bar\r\nConnection: Upgrade\r\n", id="unknown protocols"),
        pytest.param(H2C.replace(b"Upgrade,", b"keep-alive, Upgrade,"), id="keep-alive named"),
        pytest.param(b"Upgrade: \r\nConnection: Upgrade\r\n", id="an empty Upgrade"),
        pytest.param(WEBSOCKET, id="websocket on a POST"),
        pytest.param(WEBSOCKET + KEY, id="a whole WebSocket handshake on a POST"),
    ],
)
@pytest.mark.parametrize("body", [sized(FORM), chunked(FORM)], ids=["sized", "chunked"])
@pytest.mark.parametrize("split", [1 << 20, 50])
async def test_an_upgrade_that_is_no_websocket_is_ignored_and_the_body_read(
    service: Running, upgrade: bytes, body: bytes, split: int
) -> None:
    request = START + MULTIPART + upgrade + body + LAST
    answer = await exchange(service, *[request[at : at + split] for at in range(0, len(request), split)])
    assert statuses(answer) == [202, 200], answer


async def test_a_body_that_looks_like_a_request_is_not_read_as_one(service: Running) -> None:
    for upgrade in (H2C, WEBSOCKET, WEBSOCKET + KEY):
        head = b"POST /generations/edit HTTP/1.1\r\nHost: localhost\r\n" + upgrade
        assert statuses(await exchange(service, head + sized(LAST) + LAST)) == [415, 200]
        get = b"GET /stages HTTP/1.1\r\nHost: localhost\r\n" + upgrade
        assert statuses(await exchange(service, get + sized(LAST) + LAST)) == [200, 200]


async def test_an_upgrade_on_the_last_request_of_a_connection_is_ignored_too(service: Running) -> None:
    last = H2C.replace(b"Upgrade,", b"Upgrade, close,")
    assert statuses(await exchange(service, START + MULTIPART + last + sized(FORM))) == [202]
    assert statuses(await exchange(service, START.replace(b"1.1", b"1.0") + MULTIPART + H2C + sized(FORM))) == [202]


async def test_requests_that_ask_for_an_upgrade_are_answered_one_after_the_other(service: Running) -> None:
    one = b"GET /stages HTTP/1.1\r\nHost: localhost\r\n" + H2C + b"\r\n"
    answer = await exchange(service, (one + START + MULTIPART + H2C + sized(FORM)) * 5 + LAST)
    assert statuses(answer) == [200, 202] * 5 + [200]


async def test_a_client_that_asks_for_an_upgrade_may_expect_100_continue(service: Running) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    expects = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(FORM)
    writer.write(START + MULTIPART + H2C + expects)
    async with asyncio.timeout(TIMEOUT):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(FORM + LAST)
        assert statuses(await reader.read()) == [202, 200]
    writer.close()


async def test_a_polling_client_that_asks_for_an_upgrade_is_served(service: Running) -> None:
    polling = b" /socket.io/?EIO=4&transport=polling%b HTTP/1.1\r\nHost: localhost\r\n" + H2C
    opened = await exchange(service, b"GET" + polling % b"" + b"\r\n" + LAST)
    sid = re.search(rb'"sid":"([^"]+)"', opened)
    assert sid is not None
    session = polling % b"&sid=%b" % sid[1]
    packets = sized(b'40{"userId":"ada"}')
    answer = await exchange(service, b"POST" + session + packets + b"GET" + session + b"\r\n" + LAST)
    assert b'40{"sid":' in answer
    assert statuses(await exchange(service, b"POST" + session + sized(b"1") + LAST)) == [200, 200]


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        (b"GET / HTTP/1.1", WEBSOCKET, 200),
        (b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1", WEBSOCKET, 400),
        (b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.0", WEBSOCKET + KEY, 400),
        (b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1", KEY + b"Upgrade: websocket\r\n", 400),
        (b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1", KEY + WEBSOCKET + b"Content-Length: 3\r\n", 400),
        (b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1", WEBSOCKET + KEY.replace(b"13", b"8"), 400),
        (b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1", WEBSOCKET + KEY.replace(b"dGhl", b"!!!!"), 400),
        (b"CONNECT example.com:443 HTTP/1.1", b"", 400),
        (b"CONNECT example.com:443 HTTP/1.1", H2C, 400),
        (b"PRI * HTTP/2.0", b"", 400),
    ],
)
async def test_an_incomplete_websocket_handshake_is_an_ordinary_request(
    service: Running, request_line: bytes, headers: bytes, status: int
) -> None:
    body = b"abc" if b"Length: 3" in headers else b""
    answer = await exchange(service, request_line + b"\r\nHost: localhost\r\n" + headers + b"\r\n" + body + LAST)
    assert statuses(answer)[0] == status, answer
    assert statuses(answer)[1:] in ([], [200])


@pytest.mark.parametrize("upgrade", ["websocket", "WebSocket", "h2c, websocket", "websocket/13,websocket"])
async def test_a_websocket_handshake_may_offer_further_protocols_to_upgrade_to(service: Running, upgrade: str) -> None:
    head = f"Host: localhost\r\nUpgrade: {upgrade}\r\nConnection: keep-alive, Upgrade\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\n" + head + KEY + b"Content-Length: 0\r\n\r\n")
    async with asyncio.timeout(TIMEOUT):
        assert (await reader.readline()).startswith(b"HTTP/1.1 101 ")
        assert b'0{"sid":' in await reader.readuntil(b"maxPayload")
    writer.transport.abort()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_that_tries_http2_uploads_a_form(service: Running) -> None:
    url = f"{service.url}/generations/edit?runner=external"
    curl = await asyncio.create_subprocess_exec(
        *("curl", "--silent", "--http2", "--max-time", "20", "--form", "prompt=x", "--write-out", "%{http_code}", url),
        stdout=asyncio.subprocess.PIPE,
    )
    assert (await curl.communicate())[0].endswith(b"202")


HTTP10 = b" HTTP/1.0\r\nHost: localhost\r\n"


@pytest.mark.parametrize("keep", [b"", b"Connection: keep-alive\r\n", b"Connection: close\r\n"])
@pytest.mark.parametrize("path", [b"/stages", b"/", b"/nothing", b"/docs"])
async def test_http_1_0_gets_a_length_and_the_end_of_the_connection(service: Running, path: bytes, keep: bytes) -> None:
    head, _, body = (await exchange(service, b"GET " + path + HTTP10 + keep + b"\r\n")).partition(b"\r\n\r\n")
    headers = head.lower().split(b"\r\n")
    assert b"content-length: %d" % len(body) in headers
    assert b"connection: close" in headers
    assert b"transfer-encoding" not in head.lower()


async def test_a_client_polls_by_http_1_0(service: Running) -> None:
    polling = b"%b /socket.io/?EIO=4&transport=polling"
    opened = await exchange(service, polling % b"GET" + HTTP10 + b"\r\n")
    sid = json.loads(opened.partition(b"\r\n\r\n0")[2])["sid"].encode()
    session = polling + b"&sid=" + sid + HTTP10
    answer = await exchange(service, session % b"POST" + b"Expect: 100-continue\r\n" + sized(b'40{"userId":"ada"}'))
    assert statuses(answer) == [200]
    assert b'\r\n\r\n40{"sid":' in await exchange(service, session % b"GET" + b"\r\n")
    assert statuses(await exchange(service, session % b"POST" + sized(b"1"))) == [200]


async def test_a_stream_by_http_1_0_is_not_chunked_and_ends_with_the_connection() -> None:
    async with serving(stream) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), TIMEOUT)
        assert answer.endswith(b"\r\nconnection: close\r\n\r\none two")
        assert b"chunked" not in answer
        writer.close()


async def test_an_idle_connection_is_kept_as_long_as_the_setting_says() -> None:
    async with serving(stream, keep_alive=0.3) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for pause in (0.1, 0.1, 0):
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
            await asyncio.sleep(pause)
        assert await asyncio.wait_for(reader.read(), TIMEOUT) == b""
        writer.close()


@pytest.mark.parametrize(("chosen", "seconds"), [({}, 80), ({"keep_alive": 5}, 5)])
async def test_the_setting_of_idle_connections_reaches_the_server(
    tmp_path: Path, chosen: dict[str, Any], seconds: float
) -> None:
    settings = Settings(_env_file=None, images=tmp_path, **chosen)
    assert create_server(await wire(settings)).config.timeout_keep_alive == seconds
