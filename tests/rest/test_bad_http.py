"""What is no HTTP, or no WebSocket handshake, is answered with a problem too."""

import asyncio
import json
from pathlib import Path

import pytest

from support.harness import running

_UPGRADE = b"GET /socket.io/ HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"GARBAGE\r\n\r\n", id="no request line"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n", id="no header"),
        pytest.param(b"POST /me HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", id="no length"),
        pytest.param(_UPGRADE + b"Sec-WebSocket-Version: 8\r\nSec-WebSocket-Key: eA==\r\n\r\n", id="an old WebSocket"),
    ],
)
async def test_an_unreadable_request_is_answered_with_a_problem(tmp_path: Path, request_bytes: bytes) -> None:
    async with running(tmp_path) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(request_bytes)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"content-type: application/problem+json" in head.lower()
        problem = json.loads(body)
        assert (problem["status"], problem["code"], problem["type"]) == (400, "bad_request", "about:blank")
        assert problem["title"]
        assert problem["detail"]
