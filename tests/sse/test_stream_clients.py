"""Event streams with the clients that people use, through connections that break."""

import asyncio
import json
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import httpx2
import pytest
import pytest_asyncio
from playwright.async_api import Browser

from adapters.system import now
from domain.generation import Generation
from support.browser import needs_chromium
from support.builders import EventWriter, SteppableClock
from support.documents import snippet
from support.event_stream import of_generation
from support.harness import JSON, TIMEOUT, Running, running
from support.node import ROOT, TESTS, needs_node
from support.proxy import Fault, Proxy, forward

pytestmark = pytest.mark.asyncio(loop_scope="session")

needs_curl: Final = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("images")) as service:
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def proxy(service: Running) -> AsyncIterator[Proxy]:
    async with Proxy.open(service.port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def writer(service: Running) -> EventWriter:
    return EventWriter(service.service.log, SteppableClock(now()))


@asynccontextmanager
async def program(*command: str) -> AsyncIterator[asyncio.StreamReader]:
    """What a running program prints."""
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(TIMEOUT):
            yield process.stdout
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def finish_once_read(service: Running, writer: EventWriter, generation: Generation) -> None:
    await service.until(lambda: bool(service.service.streams.open))
    await writer.finish(generation)


def blocks(text: str) -> list[tuple[str, str, JSON]]:
    """Event, id and data of each complete event."""
    found = re.findall(r"^event: (.+)\nid: (.+)\ndata: (.+)\n\n", text, re.MULTILINE)
    return [(name, event_id, json.loads(data)) for name, event_id, data in found]


@needs_curl
async def test_curl_prints_each_event_as_it_comes_and_goes_on_after_a_cut(
    service: Running, proxy: Proxy, writer: EventWriter, eve: str
) -> None:
    generation = await writer.move(await writer.start(eve), "composition")
    url = proxy.url + of_generation(generation.generation_id)
    curl = ("curl", "-sN", "-H", "Accept: text/event-stream", "-H", f"X-User-Id: {eve}")
    async with program(*curl, url) as output:
        text = (await output.readuntil(b'"sequence":2')).decode()
        proxy.strike("reset")
        text += (await output.read()).decode()
    before = blocks(text)
    async with program(*curl, "-H", f"Last-Event-ID: {before[-1][1] if before else 0}", url) as output:
        await finish_once_read(service, writer, generation)
        after = blocks((await output.read()).decode())
    assert [data for _, _, data in before + after] == await service.events(generation.generation_id, eve)


@needs_node
async def test_a_node_program_reads_a_stream_with_fetch(
    service: Running, proxy: Proxy, writer: EventWriter, eve: str
) -> None:
    generation = await writer.start(eve)
    url = f"{proxy.url}{of_generation(generation.generation_id)}?userId={eve}"
    async with program("node", str(TESTS / "stream_fetch.mjs"), url) as output:
        await output.readline()
        await writer.finish(generation)
        lines = (await output.read()).splitlines()
    assert [json.loads(line)["data"] for line in lines] == (await service.events(generation.generation_id, eve))[1:]


async def test_httpx2_resumes_through_a_connection_that_breaks_after_any_number_of_bytes(
    service: Running, proxy: Proxy, writer: EventWriter, eve: str
) -> None:
    generation = await writer.start(eve)
    seen: list[JSON] = []
    position: dict[str, str] = {}
    finishing = asyncio.create_task(writer.finish(generation))
    proxy.plan.extend(Fault("reset", "down", after) for after in (1, 300, 400, 600, 700, 900))
    try:
        async with httpx2.AsyncClient(base_url=proxy.url, headers={"X-User-Id": eve}, timeout=TIMEOUT) as http:
            while True:
                try:
                    async with http.sse(of_generation(generation.generation_id), headers=position) as source:
                        if source.response.status_code == 204:
                            break
                        async for event in source:
                            position = {"Last-Event-ID": event.id} if event.id else position
                            if event.data:
                                seen.append(json.loads(event.data))
                except httpx2.TransportError:
                    pass
    finally:
        proxy.plan.clear()
    await finishing
    assert seen == await service.events(generation.generation_id, eve)


code: Final = partial(snippet, "docs/sse.md")

PAGE: Final = """(url) => {
  const events = [], states = [];
  window.source = new EventSource(url);
  source.onopen = () => states.push("open");
  source.onerror = () => states.push(source.readyState === EventSource.CLOSED ? "closed" : "connecting");
  for (const name of ["generation_started", "continue", "generation_completed", "generation_failed", "authenticated"])
    source.addEventListener(name, (event) => events.push([name, event.lastEventId, JSON.parse(event.data)]));
  window.events = events;
  window.states = states;
}"""


@needs_chromium
async def test_an_event_source_comes_back_by_itself_and_stops_at_the_end(
    service: Running, proxy: Proxy, writer: EventWriter, browser: Browser, eve: str
) -> None:
    """Behind the proxy, whose origin is another one: that of the page is the service's."""
    generation = await writer.move(await writer.start(eve), "composition")
    page = await browser.new_page()
    await page.goto(f"{service.url}/health/live")
    one, feed = (f"{proxy.url}{path}?userId={eve}" for path in (of_generation(generation.generation_id), "/events"))
    await page.evaluate(PAGE, one)
    feed_page = await browser.new_page()
    await feed_page.goto(f"{service.url}/health/live")
    await feed_page.evaluate(PAGE, feed)
    await page.wait_for_function("events.length == 2")
    await feed_page.wait_for_function("events.length == 3")
    proxy.strike("reset")
    await writer.finish(generation)
    await page.wait_for_function("states.at(-1) == 'closed'")
    await feed_page.wait_for_function("events.length >= 8")
    every = await service.events(generation.generation_id, eve)
    assert [data for _, _, data in await page.evaluate("events")] == every
    received = await feed_page.evaluate("events")
    assert [data for name, _, data in received if name != "authenticated"] == every
    assert [data["recovered"] for name, _, data in received if name == "authenticated"] == [False, True]
    assert (await page.evaluate("states"))[:3] == ["open", "connecting", "open"]
    await page.close()
    await feed_page.close()


@needs_curl
async def test_a_stream_works_below_a_path_behind_a_proxy(tmp_path: Path) -> None:
    async with (
        running(tmp_path, public_url="https://example.com/stagecast", allowed_hosts="example.com") as service,
        Proxy.open(service.port, rewrite=forward(path="/stagecast", strip=True)) as stripping,
        Proxy.open(service.port, rewrite=forward(path="/stagecast")) as keeping,
    ):
        done = await EventWriter(service.service.log, SteppableClock(now())).run_to_end("demo")
        for proxy in (stripping, keeping):
            url = f"{proxy.url}/stagecast{of_generation(done.generation_id)}"
            async with program("curl", "-sN", "-H", "Accept: text/event-stream", url) as output:
                assert len(blocks((await output.read()).decode())) == 6


@needs_curl
async def test_the_curl_command_of_the_docs_prints_a_generation(service: Running, writer: EventWriter) -> None:
    done = await writer.run_to_end("demo")
    command = code("sh", "curl").replace("http://localhost:3000", service.url).replace("$ID", done.generation_id)
    async with program("sh", "-c", command.replace("curl -N", "curl -sN")) as output:
        assert len(blocks((await output.read()).decode())) == 6


async def test_the_python_program_of_the_docs_prints_events(service: Running, writer: EventWriter) -> None:
    text = (
        code("python", "httpx2").replace("http://localhost:3000", service.url).replace("print(", "print(flush=True, *(")
    )
    text = text.replace("event.json())", "event.json()))")
    async with program(sys.executable, "-c", text) as output:
        assert (await output.readline()).startswith(b"authenticated {'ok': True")
        done = await writer.run_to_end("123")
        for event in await service.events(done.generation_id, "123"):
            assert event["message"].encode() in await output.readline()


@needs_chromium
async def test_the_event_source_of_the_docs_logs_each_event(
    service: Running, writer: EventWriter, browser: Browser
) -> None:
    page = await browser.new_page()
    lines: list[str] = []
    page.on("console", lambda message: lines.append(message.text))
    await page.goto(f"{service.url}/health/live")
    await page.evaluate(f"() => {{ {code('js', 'EventSource').replace('http://localhost:3000', service.url)} }}")
    await service.until(lambda: any(line.startswith("connected") for line in lines))
    done = await writer.run_to_end("123", "generate")
    await service.until(lambda: len(lines) >= 1 + 5)
    assert lines[-1] == f"{done.generation_id} 100% Image generation completed successfully!"
    await page.close()
