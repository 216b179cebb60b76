"""Event streams behind nginx with its default settings: buffering on, and HTTP/1.0 or 1.1 to the service."""

import asyncio
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import httpx2
import pytest

from adapters.system import now
from support.builders import EventWriter, SteppableClock
from support.event_stream import ACCEPT, of_generation, open_stream
from support.harness import TIMEOUT, running
from support.node import ROOT

#: Debian has it where a user's PATH does not lead.
_NGINX: Final = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")

needs_nginx: Final = pytest.mark.skipif(_NGINX is None and "CI" not in os.environ, reason="needs nginx: install it")

_CONFIGURATION: Final = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder}; gzip on; gzip_types text/event-stream;
    server {{
        listen 127.0.0.1:{port};
        {locations}
    }}
}}
"""


@asynccontextmanager
async def behind_nginx(folder: Path, locations: str) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of nginx with these locations."""
    assert _NGINX is not None, "nginx is not installed"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configuration = folder / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(folder=folder, port=port, locations=locations))
    process = await asyncio.create_subprocess_exec(_NGINX, "-p", folder, "-c", configuration, "-e", "stderr")
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT, trust_env=False) as http:
            async with asyncio.timeout(TIMEOUT):
                while not await _answers(http):
                    await asyncio.sleep(0.02)
            yield http
    finally:
        process.terminate()
        await process.wait()


async def _answers(http: httpx2.AsyncClient) -> bool:
    try:
        await http.get("/health/live")
    except httpx2.TransportError:
        return False
    return True


@needs_nginx
@pytest.mark.parametrize("extra", ["", "proxy_http_version 1.1;"], ids=["defaults", "http-1.1"])
async def test_nginx_passes_each_event_on_at_once(tmp_path: Path, extra: str) -> None:
    async with (
        running(tmp_path / "images") as service,
        behind_nginx(tmp_path, f"location / {{ proxy_pass {service.url}; {extra} }}") as http,
    ):
        writer = EventWriter(service.service.log, SteppableClock(now()))
        generation = await writer.start()
        async with (
            open_stream(service, http=http) as feed,
            open_stream(service, of_generation(generation.generation_id), http=http) as one,
        ):
            for count, status in enumerate(("composition", "composition_completed", "openai_editing"), 2):
                await feed.until_count(count - 1)  # Nothing more is sent until this has arrived.
                await one.until_count(count - 1)
                generation = await writer.move(generation, status)
            await writer.finish(generation)
            await one.rest()
            await feed.until_count(len(one.events))
            assert feed.events == one.events
            assert [data for _, data in one.events] == await service.events(generation.generation_id)
            last = one.ids[2]
        async with open_stream(service, of_generation(generation.generation_id), last=last, http=http) as again:
            await again.rest()
            assert again.events == one.events[3:]
        await service.until_all_disconnected()


@needs_nginx
async def test_the_configuration_of_the_docs_lets_an_event_source_come_back(tmp_path: Path) -> None:
    [locations] = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs" / "sse.md").read_text(), re.DOTALL)
    async with running(tmp_path / "images") as service:
        locations = locations.replace("http://127.0.0.1:3000", service.url)
        async with behind_nginx(tmp_path, locations) as http, open_stream(service, http=http) as stream:
            await stream.named("authenticated")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        away = locations.replace(service.url, f"http://127.0.0.1:{nobody.getsockname()[1]}")
    async with behind_nginx(tmp_path, away) as http:
        answer = await http.get("/generations/edit_1/events", headers=ACCEPT)
    assert (answer.status_code, answer.text) == (200, "retry: 1000\n\n")
    assert answer.headers["content-type"] == "text/event-stream"
