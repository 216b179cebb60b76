"""The page while one waits: the title and icon of the tab, notifications, and the time that is left."""

import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from adapters.system import now
from domain.errors import Failure
from domain.ports.providers import Report
from domain.stage_times import Entered
from support.browser import Tab, needs_chromium, tabs
from support.doubles import Pause
from support.harness import Running, running
from support.node import needs_client
from support.page import PromptedEditor, QuickComposer

pytestmark = [needs_chromium, needs_client, pytest.mark.asyncio(loop_scope="session")]

EDITOR: Final = PromptedEditor()

#: Records notifications, and the drawings that become the icon of the tab; and hides the page when a test wants it.
WATCH: Final = """
  globalThis.shown = []; globalThis.asked = 0; globalThis.answer = "granted"; globalThis.permission = "default";
  globalThis.Notification = class {
    static get permission() { return permission; }
    static async requestPermission() { asked++; return (permission = answer); }
    constructor(title, options) { shown.push([title, options.body, options.tag]); globalThis.last = this; }
    close() {}
  };
  globalThis.icons = new Map();
  const create = URL.createObjectURL;
  URL.createObjectURL = (blob) => {
    const url = create(blob);
    blob.text().then((text) => icons.set(url, text));
    return url;
  };
  let hidden = false;
  Object.defineProperty(Document.prototype, "hidden", { get: () => hidden });
  globalThis.hide = (value) => { hidden = value; document.dispatchEvent(new Event("visibilitychange")); };
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    images: Path = tmp_path_factory.mktemp("images")
    overrides = {"editor": EDITOR, "composer": QuickComposer()}
    async with running(images, overrides=overrides) as service:
        yield service


async def watched(tab: Tab) -> None:
    await tab.page.add_init_script(WATCH)
    await tab.goto()
    await tab.is_connected()


async def icon_has(page: Page, part: str) -> None:
    """Wait until the drawing on the tab has this part."""
    link = "document.querySelector('link[rel=icon]').href"
    await page.wait_for_function(f"(part) => icons.get({link})?.includes(part)", arg=part)


async def has_own_icon(page: Page) -> bool:
    return bool(await page.evaluate("document.querySelector('link[rel=icon]').href.endsWith('icon.svg')"))


async def test_the_title_and_the_icon_show_progress_and_the_end(browser: Browser, service: Running) -> None:
    pause, second = EDITOR.pause("a far hat"), Pause()

    async def fail(report: Report) -> None:
        await second(report)
        raise Failure("provider_unavailable")

    EDITOR.at("a bad hat", fail)
    async with tabs(browser, service.url, user="ada", open_page=False) as [tab]:
        await watched(tab)
        await expect(tab.page).to_have_title("Stagecast")
        assert await has_own_icon(tab.page)
        await tab.start("a far hat")
        await pause.reached.wait()
        await expect(tab.page).to_have_title("60% · Editing · a far hat · Stagecast")
        await icon_has(tab.page, 'stroke-dasharray="60 100"')
        icon = await tab["link[rel=icon]"].get_attribute("href")
        await tab.cut()
        await expect(tab.page).to_have_title("Offline · 60% · Editing · a far hat · Stagecast")
        await icon_has(tab.page, "#8b8f8d")
        # The browser may load an icon late.
        assert await tab.page.evaluate("(src) => Object.assign(new Image(), { src }).decode().then(() => true)", icon)
        await tab["#cut"].click()
        await tab.is_connected()
        await tab.page.evaluate("hide(true)")
        pause.released.set()
        await expect(tab.page).to_have_title("Completed · a far hat · Stagecast")
        await icon_has(tab.page, "m9 17 5 5 9-11")
        await tab.page.evaluate("hide(false)")
        await expect(tab.page).to_have_title("Stagecast")
        assert await has_own_icon(tab.page)
        await tab.start("a bad hat")
        await second.reached.wait()
        await tab.page.evaluate("hide(true)")
        second.released.set()
        await service.service.leases.drain()
        await expect(tab.page).to_have_title("Failed · a bad hat · Stagecast")
        await icon_has(tab.page, "#c0443b")
        assert await tab.page.evaluate("shown.length") == 0  # Nobody has asked for notifications.


async def test_notifications_are_offered_while_something_runs_and_asked_for_by_a_click(
    browser: Browser, service: Running
) -> None:
    pauses = [EDITOR.pause(prompt) for prompt in ("one", "two", "three")]
    async with tabs(browser, service.url, user="bea", open_page=False) as [tab]:
        await watched(tab)
        await expect(tab["#notify"]).to_be_hidden()
        await tab.start("one")
        await pauses[0].reached.wait()
        button = tab.page.get_by_role("button", name="Notify me at the end")
        await expect(button).to_have_attribute("aria-pressed", "false")
        assert await tab.page.evaluate("asked") == 0
        await button.click()
        await expect(tab["#notify"]).to_have_attribute("aria-pressed", "true")
        assert await tab.page.evaluate("asked") == 1
        pauses[0].released.set()
        await tab.shows("completed", "one")
        assert await tab.page.evaluate("shown") == []  # The page was looked at.
        await expect(tab.page).to_have_title("Completed · one · Stagecast")
        await icon_has(tab.page, "m9 17 5 5 9-11")
        await tab["#prompt"].focus()
        await tab["#prompt"].press("Home")
        await expect(tab.page).to_have_title("Stagecast")
        await tab.start("two")
        await pauses[1].reached.wait()
        await tab.page.evaluate("hide(true)")
        pauses[1].released.set()
        await tab.shows("completed", "two")
        identity = await tab["#generation-id"].text_content()
        assert await tab.page.evaluate("shown") == [["Completed", "two", identity]]
        await tab.page.evaluate("last.onclick()")
        await expect(tab.page).to_have_url(f"{service.url}/#{identity}")
        await tab.page.evaluate("hide(false)")
        await tab.start("three")
        await pauses[2].reached.wait()
        await expect(tab["#notify"]).to_have_text("Notification is on")
        await tab["#notify"].click()  # Off again.
        await tab.page.evaluate("hide(true)")
        pauses[2].released.set()
        await tab.shows("completed", "three")
        assert await tab.page.evaluate("[shown.length, asked]") == [1, 1]


async def test_where_notifications_are_denied_nothing_is_offered(browser: Browser, service: Running) -> None:
    pause = EDITOR.pause("a quiet hat")
    async with tabs(browser, service.url, user="cem", open_page=False) as [tab]:
        await watched(tab)
        await tab.page.evaluate("answer = 'denied'")
        await tab.start("a quiet hat")
        await pause.reached.wait()
        await tab["#notify"].click()
        await expect(tab["#notify"]).to_be_hidden()
        pause.released.set()
        await tab.shows("completed")


async def test_the_time_left_is_a_range_that_is_gone_when_it_is_exceeded(browser: Browser, service: Running) -> None:
    begin = now()
    stages = [("started", 0), ("composition", 1), ("composition_completed", 5), ("openai_editing", 5)]
    stages += [("openai_editing_completed", 45), ("completed", 45)]
    entered = [Entered(status, begin + timedelta(seconds=seconds)) for status, seconds in stages]
    pause = EDITOR.pause("a timed hat")
    async with tabs(browser, service.url, user="dan") as [tab]:
        for _ in range(5 + 1_000):  # More than the other tests add.
            service.service.stage_times.add("edit", entered)
        await tab.page.reload()
        await tab.is_connected()
        await tab.page.clock.install()
        await tab.start("a timed hat")
        await pause.reached.wait()
        await expect(tab["#left"]).to_have_text(re.compile(r"^usually [123][05]–[56][05] sec more$"))
        await tab.page.clock.fast_forward(20_000)
        await expect(tab["#left"]).to_have_text(re.compile(r"^usually .+(30|35|40) sec more$"))
        await tab.cut()
        await expect(tab["#left"]).to_be_hidden()  # Nobody knows what happens meanwhile.
        await tab["#cut"].click()
        await expect(tab["#left"]).to_be_visible()
        await tab.page.clock.fast_forward(45_000)
        await expect(tab["#left"]).to_be_hidden()
        pause.released.set()
        await tab.shows("completed")
        await expect(tab["#left"]).to_be_hidden()


async def test_a_waiting_generation_shows_its_place_and_what_it_usually_takes(browser: Browser, tmp_path: Path) -> None:
    hold = EDITOR.pause("hold")
    overrides = {"editor": EDITOR, "composer": QuickComposer()}
    async with running(tmp_path, overrides=overrides, max_running=1) as service:
        begin = now()
        stages = [("composition", 0), ("composition_completed", 4), ("openai_editing", 4)]
        stages += [("openai_editing_completed", 44), ("completed", 44)]
        for _ in range(5):
            service.service.stage_times.add(
                "edit", [Entered(status, begin + timedelta(seconds=seconds)) for status, seconds in stages]
            )
        await service.start("eva", prompt="hold")
        await hold.reached.wait()
        await service.start("eva", prompt="next")
        async with tabs(browser, service.url, user="eva") as [tab]:
            await tab.shows("active", "next")
            await expect(tab["#stage-name"]).to_have_text("Waiting, next in line")
            await expect(tab["#left"]).to_have_text("then usually up to 2 min")
            hold.released.set()
            await tab.shows("completed", "next")
