"""The page in Firefox."""

from pathlib import Path

import pytest

from support.firefox import firefox, needs_firefox
from support.harness import running
from support.node import needs_client
from support.page import PromptedEditor, QuickComposer
from support.pictures import RED, encoded, quarters, solid

STATE = "document.body.dataset.connection"
STAGE = "document.querySelector('#stage').dataset.state"


@needs_firefox
@needs_client
@pytest.mark.long
async def test_firefox_starts_follows_is_cut_off_and_catches_up(tmp_path: Path) -> None:
    editor = PromptedEditor()
    small, large = tmp_path / "small.png", tmp_path / "large.jpg"
    small.write_bytes(solid(RED).data)
    large.write_bytes(encoded(quarters((26_000, 1_000)), "JPEG"))
    pause = editor.pause("a hat in Firefox")
    overrides = {"editor": editor, "composer": QuickComposer()}
    async with running(tmp_path / "images", overrides=overrides) as service, firefox(f"{service.url}/") as tab:
        await tab.until(STATE, "live")
        await tab.choose("#files", small, large)
        await tab.until("document.querySelectorAll('#tray [aria-busy=false]').length", 2)
        await tab.evaluate("document.querySelector('#prompt').focus()")
        await tab.press(*"a hat in Firefox", "Ctrl+Enter")
        await tab.until(STAGE, "active")
        await pause.reached.wait()
        [generation] = (await service.get("/generations", "demo"))["generations"]
        assert len(generation["input"]["images"]) == 2
        await tab.evaluate("document.querySelector('#cut').click()")
        await tab.until(STATE, "offline")
        pause.released.set()
        await service.service.leases.drain()
        await tab.evaluate("document.querySelector('#cut').click()")
        await tab.until(STATE, "live")
        await tab.until(STAGE, "completed")
        await tab.until("document.querySelector('#after').naturalWidth", 200)
        assert "missed" in await tab.evaluate("document.querySelector('#notice').textContent")
        assert await tab.evaluate("document.querySelectorAll('#timeline .late').length") > 0
        assert await tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.errors == []
