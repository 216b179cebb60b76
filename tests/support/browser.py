"""Chromium, and the page in it. Without Chromium, tests that need it are skipped with a reason."""

import asyncio
import contextlib
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Literal

import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    FilePayload,
    Locator,
    Page,
    Request,
    WebSocket,
    async_playwright,
    expect,
)

from support.node import ROOT
from support.pictures import RED, solid

#: The first is Chromium without a window, which takes half of the time.
_NAMES: Final = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_CHROMIUM: Final = next(filter(None, map(shutil.which, _NAMES)), None)
_AXE: Final = ROOT / "node_modules" / "axe-core" / "axe.min.js"
_CI: Final = "CI" in os.environ

needs_chromium: Final = pytest.mark.skipif(
    _CHROMIUM is None and not _CI, reason="needs Chromium: install it, then `make test`"
)

needs_axe: Final = pytest.mark.skipif(not _AXE.is_file() and not _CI, reason="needs axe-core: install npm, `make test`")

#: A picture in the format of `set_input_files`.
PHOTO: Final = FilePayload(name="red.png", mimeType="image/png", buffer=solid(RED).data)

# Long enough for slow machines: the timeout only ends what hangs.
expect.set_options(timeout=60_000)

State = Literal["empty", "active", "completed", "failed"]


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser that makes no requests of its own."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=_CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        try:
            yield browser
        finally:
            await browser.close()


class Tab:
    """The page in one tab. Records its errors, and its requests to other hosts as errors."""

    def __init__(self, page: Page, url: str, ignore: str | None) -> None:
        """`ignore`: a pattern of errors that the test expects."""
        self.page = page
        self.url = url
        self.errors: list[str] = []
        self._ignore = re.compile(ignore) if ignore else None
        page.on("console", lambda message: self._on_error(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self._on_error(str(error)))
        page.on("request", self._on_request)
        page.on("websocket", self._on_socket)
        self._upgraded = asyncio.Event()

    def _on_request(self, request: Request) -> None:
        if not self._ours(request.url):
            self._on_error(request.url)
        if request.is_navigation_request():
            self._upgraded.clear()

    def _on_socket(self, socket: WebSocket) -> None:
        self._upgraded.clear()
        socket.on("framesent", self._on_frame)

    def _on_frame(self, payload: str | bytes) -> None:
        # The end of an upgrade, or a CONNECT by WebSocket: after an upgrade the page reconnects by WebSocket.
        if str(payload).startswith(("5", "40")):
            self._upgraded.set()

    def _on_error(self, text: str) -> None:
        if self._ignore is None or not self._ignore.search(text):
            self.errors.append(text)

    def _ours(self, url: str) -> bool:
        return url.startswith((f"{self.url}/", self.url.replace("http", "ws", 1), "blob:"))

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    async def goto(self) -> None:
        await self.page.goto(f"{self.url}/", wait_until="domcontentloaded")

    async def is_connected(self, state: str = "live") -> None:
        await expect(self["body"]).to_have_attribute("data-connection", state)

    async def shows(self, state: State, title: str | None = None) -> None:
        """Wait until the selected generation has this state and title."""
        await expect(self["#stage"]).to_have_attribute("data-state", state)
        if title is not None:
            await expect(self["#stage-title"]).to_have_text(title)

    async def start(self, prompt: str) -> None:
        """Start an edit with this prompt; of a small picture if none is chosen."""
        if not await self["#tray li"].count():
            await self["#files"].set_input_files([PHOTO])
        await self["#prompt"].fill(prompt)
        await self["#start"].click()
        await expect(self["#stage-title"]).to_have_text(prompt)

    async def upgraded(self) -> None:
        """Wait until an open socket has been upgraded to WebSocket.

        The service then notices at once when the tab closes, and the browser logs no error about a WebSocket that is
        closed before it is open.
        """
        if await self["body"].get_attribute("data-connection") == "live":
            # If the upgrade times out on a slow machine, the socket keeps polling.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._upgraded.wait(), 10)

    async def cut(self) -> None:
        """Press the button that disconnects."""
        await self.upgraded()
        await self["#cut"].click()
        await self.is_connected("offline")

    async def switch_user(self, user: str) -> None:
        """Switch to another user."""
        await self.upgraded()
        await self["#user-button"].click()
        await self["#user"].fill(user)
        await self["#user"].press("Enter")

    async def timeline(self) -> list[str]:
        """The times of the events in the timeline."""
        times = await self["#timeline time"].evaluate_all("times => times.map(time => time.dateTime)")
        return [str(time) for time in times]


@asynccontextmanager
async def tabs(
    browser: Browser,
    url: str,
    count: int = 1,
    *,
    user: str | None = None,
    ignore: str | None = None,
    open_page: bool = True,
    **options: Any,
) -> AsyncIterator[list[Tab]]:
    """Tabs of one browser, connected as this user. Fails at the end if one of them had errors."""
    context: BrowserContext = await browser.new_context(**{"locale": "en-GB", "reduced_motion": "reduce", **options})
    try:
        context.set_default_timeout(60_000)
        if user is not None:
            await context.add_init_script(f"sessionStorage['stagecast.user'] ??= {json.dumps(user)}")
        opened = [Tab(await context.new_page(), url, ignore) for _ in range(count)]
        if open_page:
            for tab in opened:
                await tab.goto()
                await tab.is_connected()
            await opened[0].page.bring_to_front()  # Browsers defer the rendering of hidden pages.
        yield opened
        for tab in opened:
            await tab.upgraded()
            assert tab.errors == [], tab.errors
    finally:
        await context.close()


async def axe_violations(page: Page, *rules: str) -> Sequence[str]:
    """The violations of at least moderate impact that axe-core finds, by these of its rules or by all."""
    if not await page.evaluate("() => 'axe' in window"):
        await page.evaluate(_AXE.read_text("utf-8"))
    found = await page.evaluate(
        "(rules) => axe.run({ resultTypes: ['violations'], ...(rules.length && { runOnly: rules }) })", rules
    )
    return [
        f"{violation['impact']} {violation['id']}: {node['html']} {node['failureSummary']}"
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical", "moderate")
        for node in violation["nodes"]
    ]
