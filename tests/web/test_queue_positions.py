"""The place in line of a waiting generation: the client module in Node, and the page in both languages."""

from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from domain import queue_positions
from support.browser import axe_violations, needs_axe, needs_chromium, tabs
from support.harness import PHOTO, Running, running
from support.node import needs_client, needs_node, node_test
from support.page import PromptedEditor, QuickComposer

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    """A service with one worker, which the prompt "hold" keeps busy once. Positions are sent soon."""
    monkeypatch.setattr(queue_positions, "_PAUSE", 0.05)
    editor = PromptedEditor()
    editor.pause("hold")
    overrides = {"editor": editor, "composer": QuickComposer()}
    async with running(tmp_path, overrides=overrides, max_running=1) as service:
        yield service


@needs_node
async def test_the_client_module_keeps_the_place_in_line(service: Running) -> None:
    await node_test("client_queue.mjs", services={"open": service.url, "photo": b64encode(PHOTO).decode()})


async def cancel(service: Running, generation_id: str) -> None:
    answer = await service.http.post(f"/generations/{generation_id}/cancel", headers={"X-User-Id": "ada"})
    assert answer.json() == {"outcome": "cancelled"}


@needs_chromium
@needs_client
@needs_axe
async def test_the_page_shows_the_place_in_line_in_both_languages(service: Running, browser: Browser) -> None:
    held = await service.start(prompt="hold")
    async with service.phone("ada") as phone:
        await phone.until(lambda: len(phone.of(held)) > 1)
    async with (
        tabs(browser, service.url, user="ada") as [en],
        tabs(browser, service.url, user="ada", locale="tr") as [tr],
    ):
        first = await service.start(prompt="the first")
        second = await service.start(prompt="the second")
        for tab, percent, next_one, number_two in (
            (en, "0%", "Waiting, next in line", "Waiting, number 2 in line"),
            (tr, "%0", "Bekliyor, sıradaki iş", "Bekliyor, 2. sırada"),
        ):
            await tab.shows("active")
            await expect(tab["#stage-name"]).to_have_text(number_two)
            await expect(tab["#bar"]).to_have_attribute("aria-valuetext", f"{percent}, {number_two}")
            await expect(tab["#running .row"].filter(has_text=next_one)).to_have_count(1)
        assert await axe_violations(en.page) == []
        await cancel(service, first)
        await expect(en["#stage-name"]).to_have_text("Waiting, next in line")
        await expect(tr["#stage-name"]).to_have_text("Bekliyor, sıradaki iş")
        await cancel(service, held)
        for tab in (en, tr):
            await tab.shows("completed")
            await expect(tab["#stage-name"]).not_to_contain_text("line")
        assert (await service.get(f"/generations/{second}"))["status"] == "completed"
