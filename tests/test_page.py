"""The page, in a real browser."""

from pathlib import Path

from playwright.async_api import Page, expect

from browser import chromium, needs_chromium
from doubles import Hold, ScriptedEditor
from harness import running
from node import needs_client
from pictures import RED, solid

pytestmark = [needs_chromium, needs_client]


class Watched:
    """A page, and what it complained of or asked others for."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((url, url.replace("http", "ws"), "data:", "blob:"))
                else self.complaints.append(request.url)
            ),
        )


async def test_one_click_starts_an_edit_and_both_tabs_show_it_live_and_done(tmp_path: Path) -> None:
    hold = Hold()
    editor = ScriptedEditor(hold)
    editor.result = solid(RED, (200, 300), "JPEG")
    async with running(tmp_path, overrides={"editor": editor}) as service, chromium() as browser:
        context = await browser.new_context()
        tabs = [Watched(await context.new_page(), service.url) for _ in range(2)]
        for tab in tabs:
            await tab.page.goto(service.url)
            await expect(tab.page.locator("#connection")).to_have_attribute("data-state", "live")
        first = tabs[0].page
        await first.bring_to_front()  # A browser puts off what a hidden page draws.
        await first.click("#samples")
        await expect(first.locator("#thumbnails li")).to_have_count(3)
        await first.fill("#prompt", "<img src=x onerror=alert(1)> a red hat")
        await first.click("#start")
        await hold.reached.wait()
        for tab in tabs:
            bar = tab.page.locator("#active [role=progressbar]")
            await expect(bar).to_have_attribute("aria-valuenow", "60")
            await expect(tab.page.locator("#active")).to_contain_text("<img src=x onerror=alert(1)> a red hat")
            await expect(tab.page.locator("#active")).to_contain_text("OpenAI image editing started...")
        hold.let_go.set()
        for tab in tabs:
            await expect(tab.page.locator("#active [role=progressbar]")).to_have_count(0)
            picture = tab.page.locator("#finished img")
            await expect(picture).to_have_js_property("naturalWidth", 200)
            await expect(tab.page.locator("#credit")).to_have_text("99 credits")
            assert tab.complaints == []


async def test_cancel_in_one_tab_is_seen_in_the_other_and_gives_the_credit_back(tmp_path: Path) -> None:
    hold = Hold()
    async with running(tmp_path, overrides={"editor": ScriptedEditor(hold)}) as service, chromium() as browser:
        context = await browser.new_context()
        first, second = [await context.new_page() for _ in range(2)]
        for page in (first, second):
            await page.goto(service.url)
        await first.bring_to_front()  # A browser puts off what a hidden page draws.
        await first.click("#samples")
        await expect(first.locator("#thumbnails li")).to_have_count(3)
        await first.fill("#prompt", "a red hat")
        await first.click("#start")
        await hold.reached.wait()
        await second.get_by_role("button", name="Cancel").click()
        for page in (first, second):
            await expect(page.locator("#finished")).to_contain_text("Cancelled")
            await expect(page.locator("#credit")).to_have_text("100 credits")
