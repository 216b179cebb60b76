"""The page in a browser on a connection that dies without a close: in a tunnel, asleep, on another network."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, WebSocket, expect

from support.browser import Tab, needs_chromium, tabs
from support.harness import Running, running
from support.node import needs_client
from support.page import NETWORK, PromptedEditor, QuickComposer, logged
from support.proxy import Proxy

pytestmark = [needs_chromium, needs_client, pytest.mark.asyncio(loop_scope="session")]

EDITOR = PromptedEditor()

#: How a browser signals that the page may have slept or changed networks.
SIGNALS = {
    "visibilitychange": "document.dispatchEvent(new Event('visibilitychange'))",
    "resume": "document.dispatchEvent(new Event('resume'))",
    "pageshow": "dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))",
    "focus": "dispatchEvent(new Event('focus'))",
    "online": "dispatchEvent(new Event('online'))",
    "clock": "Date.now = ((now) => () => now() + 3_600_000)(Date.now.bind(Date))",
}

#: Scripts that leave the page without a WebSocket, so that it polls: with Socket.IO, or without it.
POLLING = {
    "Socket.IO": "delete globalThis.WebSocket",
    "HTTP": "Object.defineProperty(globalThis, 'io', { get() {}, set() {} })",
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    overrides = {"editor": EDITOR, "composer": QuickComposer()}
    async with running(tmp_path_factory.mktemp("images"), overrides=overrides) as service:
        yield service


async def no_checks(tab: Tab, off: bool = True) -> None:
    """The page does not check the connection each second while it sends pictures."""
    await tab["#upload"].evaluate("(upload, off) => { upload.hidden = !off; }", off)


@asynccontextmanager
async def half_open(browser: Browser, service: Running, user: str, *scripts: str) -> AsyncIterator[tuple[Tab, Proxy]]:
    """A tab whose connection died unnoticed while it showed a generation, which has finished meanwhile."""
    # A poll of the replaced session may still reach the service, which then answers 400.
    options: dict[str, Any] = {"user": user, "ignore": f"{NETWORK}|status of 400", "open_page": False}
    async with Proxy.open(service.port) as proxy, tabs(browser, proxy.url, **options) as [tab]:
        for script in scripts:
            await tab.page.add_init_script(script)
        await tab.goto()
        await expect(tab["body"]).to_have_attribute("data-connection", re.compile("live|polling"))
        pause = EDITOR.pause(user)
        await tab.start(user)
        await pause.reached.wait()
        await expect(tab["#bar"]).to_have_attribute("aria-valuenow", "60")
        if not scripts:
            await tab.upgraded()
        await no_checks(tab)
        proxy.strike("half_open")
        async with service.phone(user) as phone:
            [generation] = (await service.get("/generations", user))["generations"]
            pause.released.set()
            await phone.until_over(generation["generationId"])
        await tab.shows("active", user)
        yield tab, proxy


@pytest.mark.parametrize("signal", ["focus", *(pytest.param(each, marks=pytest.mark.long) for each in SIGNALS)])
async def test_a_dead_connection_is_replaced_after(browser: Browser, service: Running, signal: str) -> None:
    async with half_open(browser, service, signal) as (tab, _):
        await tab.is_connected("live")
        await tab.page.evaluate(SIGNALS[signal])
        await tab.shows("completed", signal)
        assert await tab.timeline() == await logged(service, signal)
        await expect(tab["#notice"]).to_contain_text("Back: 2 events you missed.")


@pytest.mark.long
async def test_a_dead_connection_is_replaced_when_the_page_is_used(browser: Browser, service: Running) -> None:
    async with half_open(browser, service, "used") as (tab, _):
        await tab.is_connected("live")
        await tab.page.mouse.move(300, 300)
        await tab.shows("completed", "used")
        await expect(tab["#notice"]).to_contain_text("Back: 2 events you missed.")


async def test_a_dead_connection_is_replaced_when_the_page_is_only_looked_at(
    browser: Browser, service: Running
) -> None:
    async with half_open(browser, service, "watched") as (tab, _):
        await tab.is_connected("live")
        await no_checks(tab, off=False)
        await tab.shows("completed", "watched")
        await expect(tab["#notice"]).to_contain_text("Back: 2 events you missed.")


@pytest.mark.parametrize("how", ["Socket.IO", pytest.param("HTTP", marks=pytest.mark.long)])
async def test_a_dead_network_is_detected_without_a_websocket_too(browser: Browser, service: Running, how: str) -> None:
    async with half_open(browser, service, how, POLLING[how]) as (tab, proxy):
        await tab.page.evaluate(SIGNALS["focus"])
        await tab.is_connected("offline")
        proxy.strike("reset")  # The browser notices that the connections are dead.
        await tab.shows("completed")
        await expect(tab["#notice"]).to_contain_text("Back: 2 events you missed.")
        await tab["#cut"].click()


@pytest.mark.parametrize("how", ["WebSocket", pytest.param("HTTP", marks=pytest.mark.long)])
async def test_the_offline_event_takes_effect_at_once(browser: Browser, service: Running, how: str) -> None:
    scripts = [POLLING[how]] if how in POLLING else []
    async with half_open(browser, service, f"{how} offline", *scripts) as (tab, _):
        state = "document.body.dataset.connection"
        assert await tab.page.evaluate(f"dispatchEvent(new Event('offline')), {state}") == "offline"
        await tab["#cut"].click()


async def test_many_signals_cause_one_check_and_keep_a_working_connection(browser: Browser, service: Running) -> None:
    sockets: list[WebSocket] = []
    sent: list[str] = []
    async with tabs(browser, service.url, user="many", open_page=False) as [tab]:
        tab.page.on("websocket", lambda socket: sockets.append(socket))
        await tab.goto()
        await tab.is_connected()
        await tab.upgraded()
        [socket] = sockets
        await no_checks(tab)
        socket.on("framesent", lambda frame: sent.append(str(frame)))
        # Without the clock: after a jump of it, Socket.IO itself disconnects.
        each = [script for signal, script in SIGNALS.items() if signal != "clock"]
        for signals in (f"for (let i = 0; i < 100; i++) {{ {'; '.join(each)} }}", *each):
            async with socket.expect_event("framereceived", lambda frame: "bad_request" in str(frame)):
                await tab.page.evaluate(f"() => {{ {signals} }}")
        assert sum('"probe"' in frame for frame in sent) == 1 + len(each)
        await tab.is_connected()
        assert sockets == [socket]
        assert not socket.is_closed()


async def test_wake_signals_do_not_restore_a_manual_disconnect(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="cut") as [tab]:
        await tab.cut()
        await tab.page.evaluate(f"{'; '.join(SIGNALS.values())}; dispatchEvent(new Event('offline'))")
        async with service.phone("cut") as phone:
            await phone.until_over(await service.start("cut"))
        await tab.shows("empty")
        await tab["#cut"].click()
        await tab.shows("completed")
