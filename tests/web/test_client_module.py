"""The JavaScript client, ``/static/stagecast.js``, and the examples that use it: in Node and in a real browser."""

from pathlib import Path
from typing import Any, Final

import pytest
from playwright.async_api import expect

from support.browser import chromium, needs_chromium
from support.client_services import GatedEditor, served, services_for_node
from support.doubles import ScriptedComposer
from support.harness import PHOTO, running
from support.node import ROOT, needs_client, needs_node, node_test

SLOW: Final = ("stream", "wake")
LIVE: Final = ("live", "polling", "tokens", "http", *(pytest.param(each, marks=pytest.mark.long) for each in SLOW))


@needs_node
async def test_the_reducer_accepts_updates_in_any_order() -> None:
    await node_test("client_reduce.mjs", services={})


@needs_node
@pytest.mark.parametrize("name", LIVE)
async def test_the_client_emits_each_event_once_whatever_the_network_does(tmp_path: Path, name: str) -> None:
    async with services_for_node(tmp_path) as services:
        await node_test(f"client_{name}.mjs", services=services)


@needs_node
async def test_the_node_backend_works(tmp_path: Path) -> None:
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
