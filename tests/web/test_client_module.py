"""The JavaScript client, ``/static/stagecast.js``, and the examples that use it: in Node and in a real browser."""

import asyncio
import os
from base64 import b64encode
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final

import pytest
from playwright.async_api import expect

from adapters.memory.log import MemoryLog
from adapters.system import now
from domain.errors import LogUnavailable
from domain.feed import Cursor
from domain.ports.images import Picture
from domain.ports.providers import Report
from domain.requests import Options
from support.browser import chromium, needs_chromium
from support.builders import memory_storage
from support.doubles import ScriptedComposer, png
from support.guarded import SECRET, guarded
from support.harness import JSON, PHOTO, running
from support.node import ROOT, needs_client, needs_node, node_test

LIVE: Final = tuple(f"client_{name}.mjs" for name in ("live", "polling", "stream", "wake", "tokens", "http"))

needs_react: Final = pytest.mark.skipif(
    "CI" not in os.environ and not (ROOT / "node_modules" / "react-dom").is_dir(),
    reason="needs React: install npm, then `make test`",
)


class GatedEditor:
    """`domain.ports.providers.ImageEditor`: the prompt ``wait for X`` waits, after two reports, for ``let go X``."""

    free = False

    def __init__(self) -> None:
        self._gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        for fraction in (0.25, 0.5):
            await report(fraction, "Working...", None)
        verb, _, name = prompt.rpartition(" ")
        if verb == "wait for":
            await self._gates[name].wait()
        if verb == "let go":
            self._gates[name].set()
        return png("edited")

    generate = edit


class FirstReadFails(MemoryLog):
    """Raises `LogUnavailable` at the first read for a user whose name begins with ``shy``."""

    def __init__(self) -> None:
        super().__init__(epoch="shy", credits=100, clock=now)
        self._failed: set[str] = set()

    async def head_cursor(self, user_id: str) -> Cursor:
        if user_id.startswith("shy") and user_id not in self._failed:
            self._failed.add(user_id)
            raise LogUnavailable
        return await super().head_cursor(user_id)


@asynccontextmanager
async def services_for_node(folder: Path) -> AsyncIterator[JSON]:
    """Three services, and what the tests in Node need to know about them."""
    # Enough runners that one is left to open a gate while others wait.
    options: list[dict[str, Any]] = [
        {"overrides": {"editor": GatedEditor(), "composer": ScriptedComposer()}, "max_running": 50} for _ in range(3)
    ]
    options[1]["overrides"]["storage"] = memory_storage(FirstReadFails())
    async with (
        running(folder / "open", **options[0]) as open_mode,
        running(folder / "other", max_per_user=2, **options[1]) as other,
        guarded(folder / "keyed", **options[2]) as keyed,
    ):
        urls = {"open": open_mode.url, "other": other.url, "keyed": keyed.url}
        yield {**urls, "secret": SECRET, "photo": b64encode(PHOTO).decode()}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The files of this folder, served on another origin."""

    class Files(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=folder)) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@needs_node
async def test_the_reducer_accepts_updates_in_any_order() -> None:
    await node_test("client_reduce.mjs", services={})


@needs_node
async def test_the_client_emits_each_event_once_whatever_the_network_does(tmp_path: Path) -> None:
    async with services_for_node(tmp_path) as services:
        await node_test(*LIVE, services=services)


@needs_node
@needs_react
async def test_the_react_hook_and_the_node_backend_work(tmp_path: Path) -> None:
    async with services_for_node(tmp_path) as services:
        await node_test("client_examples.mjs", services=services)


@needs_client
@needs_chromium
async def test_the_plain_page_shows_an_edit_live_from_another_origin(tmp_path: Path) -> None:
    editor = GatedEditor()
    overrides = {"editor": editor, "composer": ScriptedComposer()}
    errors: list[str] = []
    with served(ROOT / "examples" / "plain") as origin:
        async with running(tmp_path, overrides=overrides) as service, chromium() as browser:
            page = await browser.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            await page.goto(f"{origin}/?service={service.url}")
            await expect(page.locator("#state")).to_have_text("live")
            await expect(page.locator("#credit")).to_have_text("100 credits")
            photo: Any = {"name": "ada.jpg", "mimeType": "image/jpeg", "buffer": PHOTO}
            await page.set_input_files("[name=images]", photo)
            await page.fill("[name=prompt]", "wait for it")
            await page.click("text=Start")
            await expect(page.locator("li")).to_contain_text("Working...")
            await expect(page.locator("progress")).to_have_js_property("value", 70)
            await service.start("demo", "generate", prompt="let go it")
            await expect(page.locator("li").nth(1)).to_contain_text("Image editing completed successfully!")
            # Both have finished: the only Cancel button is that of the next one.
            await expect(page.locator("li").nth(0)).to_contain_text("Image generation completed successfully!")
            await page.fill("[name=prompt]", "wait for ever")
            await page.click("text=Start")
            await page.click("text=Cancel")
            await expect(page.locator("li").first).to_contain_text("cancelled")
            await page.close()
    assert errors == []
