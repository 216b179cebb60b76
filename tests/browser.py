"""Real Chromium; tests that need it are skipped, loudly, where it is not."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import pytest
from playwright.async_api import Browser, async_playwright

_CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium: Final = pytest.mark.skipif(
    _CHROMIUM is None and "CI" not in os.environ, reason="needs Chromium: install it, then `make test`"
)


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
