"""One service behind nginx and HAProxy, as the examples configure them: uploads, streams, a path, forged headers.

Sockets are in `test_balancers`.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest

from support.balancers import balancer
from support.event_stream import ACCEPT
from support.guarded import SERVICE, guarded
from support.harness import PHOTO, TIMEOUT, Running

_MEGABYTE: Final = 1_000_000


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Running]:
    path = "http://localhost/cast"
    async with guarded(tmp_path, public_url=path, trusted_proxies="127.0.0.1", local_seconds=0) as service:
        yield service


@pytest.fixture(params=["haproxy", "nginx"])
async def proxy(request: pytest.FixtureRequest, service: Running) -> AsyncIterator[httpx2.AsyncClient]:
    async with balancer([service.port] * 3, request.param, "roundrobin") as url:
        headers = {"Authorization": f"Bearer {SERVICE}", "X-User-Id": "ada"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=False) as http:
            yield http


def large() -> bytes:
    """A JPEG of nearly 10 MB: what follows its end is ignored."""
    return PHOTO + os.urandom(9_900_000)


async def test_large_uploads_streams_and_a_path_pass(proxy: httpx2.AsyncClient, service: Running) -> None:
    picture = large()
    parts: list[tuple[str, Any]] = [("images", (f"{n}.jpg", picture, "image/jpeg")) for n in range(5)]
    async with proxy.stream("GET", "/cast/events", headers=ACCEPT) as stream:
        assert stream.status_code == 200
        answer = await proxy.post("/cast/generations/edit", files=[*parts, ("prompt", (None, "a red hat"))])
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"].startswith("/cast/generations/")
        statuses = []
        async with asyncio.timeout(TIMEOUT):
            async for line in stream.aiter_lines():
                if line.startswith("event: generation_"):
                    statuses.append(line.partition("generation_")[2])
                    if statuses[-1] in ("completed", "failed"):
                        break
    assert statuses == ["started", "completed"]
    assert (await proxy.get(answer.headers["location"])).json()["status"] == "completed"
    too_large = ("images", ("6.jpg", picture + b"x" * 2 * _MEGABYTE, "image/jpeg"))
    refused = await proxy.post("/cast/generations/edit", files=[too_large, ("prompt", (None, "a red hat"))])
    assert (refused.status_code, refused.json()["code"]) == (413, "content_too_large")


@pytest.mark.parametrize(
    ("forged", "origin"),
    [
        ({"X-Forwarded-Host": "evil.example"}, "http://evil.example"),
        ({"X-Forwarded-Proto": "https"}, "https://{host}"),
        ({"X-Forwarded-Port": "1"}, "http://127.0.0.1:1"),
    ],
)
async def test_headers_that_only_a_proxy_may_set_are_not_believed_from_clients(
    proxy: httpx2.AsyncClient, service: Running, forged: dict[str, str], origin: str
) -> None:
    host = proxy.base_url.netloc.decode()
    own = await proxy.get("/me", headers={"Origin": f"http://{host}"})
    assert own.headers["access-control-allow-origin"] == f"http://{host}"
    lie = await proxy.get("/me", headers={"Origin": origin.format(host=host), **forged})
    assert "access-control-allow-origin" not in lie.headers


async def test_nodes_answer_for_themselves_while_none_is_ready() -> None:
    checks = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal checks
        head = await reader.readuntil(b"\r\n\r\n")
        checks += head.startswith(b"GET /health/ready")
        writer.write(b"HTTP/1.1 503 Unavailable\r\ncontent-length: 15\r\nconnection: close\r\n\r\nlog_unavailable")
        await writer.drain()
        writer.close()

    async with (
        await asyncio.start_server(answer, "127.0.0.1") as node,
        balancer([node.sockets[0].getsockname()[1]] * 3, "haproxy", "roundrobin") as url,
        httpx2.AsyncClient(base_url=url) as http,
    ):
        async with asyncio.timeout(20):
            while checks < 12:  # After nine the balancer has given up all three.
                await asyncio.sleep(0.05)
        assert (await http.get("/me")).text == "log_unavailable"
