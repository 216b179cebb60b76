"""Real Chromium, and the page in it; tests that need it are skipped, loudly, where it is not."""

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

from node import ROOT
from pictures import RED, solid

#: The first one is the same browser without a window, and takes half of the time.
_NAMES: Final = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_CHROMIUM: Final = next(filter(None, map(shutil.which, _NAMES)), None)
_AXE: Final = ROOT / "node_modules" / "axe-core" / "axe.min.js"
_CI: Final = "CI" in os.environ

needs_chromium: Final = pytest.mark.skipif(
    _CHROMIUM is None and not _CI, reason="needs Chromium: install it, then `make test`"
)

needs_axe: Final = pytest.mark.skipif(not _AXE.is_file() and not _CI, reason="needs axe-core: install npm, `make test`")

#: As `set_input_files` takes it.
PHOTO: Final = FilePayload(name="red.png", mimeType="image/png", buffer=solid(RED).data)

# However slow the machine is: a limit only tells what hangs.
expect.set_options(timeout=30_000)

State = Literal["empty", "active", "completed", "failed"]


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser that asks nothing of anybody but the pages it is sent to."""
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
    """The page in one tab: what is on it, what it complains of, and what it asks of others."""

    def __init__(self, page: Page, url: str, forgive: str | None) -> None:
        """`forgive`: a pattern of complaints that belong to the test."""
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        self._forgive = re.compile(forgive) if forgive else None
        page.on("console", lambda message: self._complain(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self._complain(str(error)))
        page.on("request", self._on_request)
        page.on("websocket", self._on_socket)
        self._upgraded = asyncio.Event()

    def _on_request(self, request: Request) -> None:
        if not self._ours(request.url):
            self._complain(request.url)
        if request.is_navigation_request():
            self._upgraded.clear()

    def _on_socket(self, socket: WebSocket) -> None:
        self._upgraded.clear()
        socket.on("framesent", self._on_frame)

    def _on_frame(self, payload: str | bytes) -> None:
        # The end of an upgrade, or CONNECT over a socket that needs none: the page comes back by WebSocket.
        if str(payload).startswith(("5", "40")):
            self._upgraded.set()

    def _complain(self, text: str) -> None:
        if self._forgive is None or not self._forgive.search(text):
            self.complaints.append(text)

    def _ours(self, url: str) -> bool:
        return url.startswith((f"{self.url}/", self.url.replace("http", "ws", 1), "blob:"))

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    async def goto(self) -> None:
        await self.page.goto(f"{self.url}/", wait_until="domcontentloaded")

    async def is_connected(self, state: str = "live") -> None:
        await expect(self["body"]).to_have_attribute("data-connection", state)

    async def shows(self, state: State, title: str | None = None) -> None:
        """Wait until what is looked at is so, and called so."""
        await expect(self["#stage"]).to_have_attribute("data-state", state)
        if title is not None:
            await expect(self["#stage-title"]).to_have_text(title)

    async def start(self, prompt: str) -> None:
        """Start this, from a small picture where nothing else is chosen."""
        if not await self["#tray li"].count():
            await self["#files"].set_input_files([PHOTO])
        await self["#prompt"].fill(prompt)
        await self["#start"].click()
        await expect(self["#stage-title"]).to_have_text(prompt)

    async def settled(self) -> None:
        """Wait until a socket that there is has left polling.

        That of a tab which then goes is missed at once; and a browser complains of a WebSocket that is closed before
        it is open.
        """
        if await self["body"].get_attribute("data-connection") == "live":
            # One that took seconds for it on a slow machine polls for good.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._upgraded.wait(), 10)

    async def cut(self) -> None:
        """Press the button that cuts the connection."""
        await self.settled()
        await self["#cut"].click()
        await self.is_connected("offline")

    async def become(self, user: str) -> None:
        """Name another user."""
        await self.settled()
        await self["#user-button"].click()
        await self["#user"].fill(user)
        await self["#user"].press("Enter")

    async def timeline(self) -> list[str]:
        """When the events happened that are shown."""
        times = await self["#timeline time"].evaluate_all("times => times.map(time => time.dateTime)")
        return [str(time) for time in times]


@asynccontextmanager
async def tabs(
    browser: Browser,
    url: str,
    count: int = 1,
    *,
    user: str | None = None,
    forgive: str | None = None,
    at_once: bool = True,
    **options: Any,
) -> AsyncIterator[list[Tab]]:
    """Tabs of one browser, live as this user; where one of them complained, that is an error in the end."""
    context: BrowserContext = await browser.new_context(**{"locale": "en-GB", "reduced_motion": "reduce", **options})
    try:
        context.set_default_timeout(30_000)
        if user is not None:
            await context.add_init_script(f"sessionStorage['stagecast.user'] ??= {json.dumps(user)}")
        every = [Tab(await context.new_page(), url, forgive) for _ in range(count)]
        if at_once:
            for tab in every:
                await tab.goto()
                await tab.is_connected()
            await every[0].page.bring_to_front()  # A browser puts off what a hidden page draws.
        yield every
        for tab in every:
            await tab.settled()
            assert tab.complaints == [], tab.complaints
    finally:
        await context.close()


async def serious_faults(page: Page, *rules: str) -> Sequence[str]:
    """What axe-core finds that is in people's way, by these of its rules, or by all of them."""
    if not await page.evaluate("() => 'axe' in window"):
        await page.evaluate(_AXE.read_text("utf-8"))
    found = await page.evaluate(
        "(rules) => axe.run({ resultTypes: ['violations'], ...(rules.length && { runOnly: rules }) })", rules
    )
    return [
        f"{fault['impact']} {fault['id']}: {node['html']} {node['failureSummary']}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical", "moderate")
        for node in fault["nodes"]
    ]
