"""The page in the oldest supported browsers, as far as a new browser can simulate them."""

import json
import os
import re
import subprocess
from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from support.browser import PHOTO, needs_chromium, tabs
from support.harness import Running, running
from support.node import ROOT, TESTS, needs_client, needs_node, node_test
from support.page import PromptedEditor, QuickComposer

needs_browser_data: Final = pytest.mark.skipif(
    "CI" not in os.environ and not (ROOT / "node_modules" / "@mdn").is_dir(),
    reason="needs MDN's compatibility data: install npm, then `make test`",
)
pytestmark = [needs_node, needs_browser_data, pytest.mark.asyncio(loop_scope="session")]

#: Deletes the APIs that the oldest browsers lack. Some cannot be deleted, as Chromium and Playwright need them.
_DELETE: Final = """
for (const [type, member, isStatic] of %s) {
  const owner = member ? (isStatic ? globalThis[type] : globalThis[type]?.prototype) : globalThis;
  try { if (owner) delete owner[member ?? type]; } catch {}
}
"""


def newer() -> str:
    script = "import('./oldest_browsers.mjs').then((it) => console.log(JSON.stringify(it.newerThanOldest())))"
    return subprocess.run(["node", "-e", script], cwd=TESTS, check=True, capture_output=True, text=True).stdout


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    overrides = {"editor": PromptedEditor(), "composer": QuickComposer()}
    async with running(tmp_path_factory.mktemp("images"), overrides=overrides) as service:
        yield service


async def test_the_page_uses_only_features_of_the_oldest_browsers() -> None:
    await node_test("client_browsers.mjs", services={})


@needs_chromium
@needs_client
async def test_pictures_and_menus_work_without_newer_browser_apis(browser: Browser, service: Running) -> None:
    missing = newer()
    assert ["URL", "canParse", True] in json.loads(missing)
    async with tabs(browser, service.url, user="old", open_page=False) as [tab]:
        await tab.page.add_init_script(_DELETE % missing)
        await tab.goto()
        await tab.is_connected()
        assert await tab.page.evaluate("[typeof URL.canParse, 'popover' in HTMLElement.prototype]") == [
            "undefined",
            False,
        ]
        await tab["#files"].set_input_files([PHOTO])
        await tab["#url"].fill("https://example.com/a.png")
        await tab["#add-url"].click()
        await tab.page.get_by_role("button", name="Remove example.com").click()
        await tab.start("an old hat")
        await tab.shows("completed")
        await expect(tab["#after"]).to_have_js_property("naturalWidth", 200)
        await expect(tab["#history .tile img"]).to_be_visible()
        await expect(tab["#history .tile img"]).to_have_attribute("src", re.compile(r"\?width=320$"))
        await expect(tab["#pictures a"]).not_to_have_count(0)
        await tab.page.reload()
        await tab.shows("completed")
        await expect(tab["#after"]).to_have_js_property("naturalWidth", 200)
        await expect(tab["#user-panel"]).to_be_hidden()
        await tab["#user-button"].click()
        await tab["#user"].press("Escape")
        await expect(tab["#user-panel"]).to_be_hidden()
        await tab.switch_user("older")
        await tab.shows("empty")
