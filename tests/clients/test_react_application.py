"""The React example as an application of its own: installed by npm, built by Vite, in a browser and on a server."""

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import expect

from support.browser import chromium, needs_chromium
from support.client_services import GatedEditor, served
from support.documents import snippet
from support.doubles import ScriptedComposer
from support.harness import PHOTO, running
from support.javascript_package import pack, run
from support.node import ROOT, needs_node
from support.proxy import Proxy

pytestmark = [needs_node, needs_chromium, pytest.mark.long]


def install(folder: Path) -> Path:
    """The example with the packed package, as `npm install` leaves it."""
    application = folder / "application"
    shutil.copytree(ROOT / "examples/react", application, ignore=shutil.ignore_patterns("node_modules", "dist*"))
    manifest = json.loads((application / "package.json").read_text())
    manifest["dependencies"]["stagecast-client"] = f"file:{pack(folder / 'release')}"
    (application / "package.json").write_text(json.dumps(manifest))
    run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock"], application)
    return application


async def test_the_example_is_built_and_shows_a_bar_that_moves_through_a_cut(tmp_path: Path) -> None:
    application = install(tmp_path)
    overrides = {"editor": GatedEditor(), "composer": ScriptedComposer()}
    errors: list[str] = []
    async with (
        running(tmp_path / "service", overrides=overrides) as service,
        Proxy.open(service.port) as proxy,
        chromium() as browser,
    ):
        os.environ["VITE_STAGECAST_URL"] = proxy.url
        try:
            run(["npm", "run", "--silent", "build"], application)
        finally:
            del os.environ["VITE_STAGECAST_URL"]
        with served(application / "dist") as origin:
            page = await browser.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            await page.goto(origin)
            await expect(page.locator("[role=status]")).to_have_text("live, 100 credits")
            assert len(service.service.streams.open) == 1
            photo: Any = {"name": "ada.jpg", "mimeType": "image/jpeg", "buffer": PHOTO}
            await page.set_input_files("[name=images]", photo)
            await page.fill("[name=prompt]", "wait for it")
            await page.click("text=Start")
            await expect(page.locator("progress")).to_have_js_property("value", 70)
            proxy.strike("reset")
            await service.start("demo", "generate", prompt="let go it")
            await expect(page.locator("li").nth(1)).to_contain_text("Image editing completed successfully!")
            await page.fill("[name=prompt]", "wait for ever")
            await page.click("text=Start")
            await page.click("text=Cancel")
            await expect(page.locator("li").first).to_contain_text("cancelled")
            await expect(page.locator("li a")).to_have_count(2)
            await page.close()
    assert errors == []
    run(["npm", "run", "--silent", "build:server"], application)
    program = "import { render } from './dist-server/server.js'; console.log(render('http://localhost:1'));"
    page_of_server = run(["node", "--input-type=module", "--eval", program], application, timeout=20)
    assert '<h1>Generations</h1><p role="status">connecting</p>' in page_of_server


async def test_the_commands_of_the_page_lead_from_an_empty_folder_to_a_bar(tmp_path: Path) -> None:
    package = pack(tmp_path / "release")
    commands = snippet("docs/react.md", "sh").replace("../stagecast/dist/stagecast-client-0.1.0.tgz", str(package))
    await asyncio.to_thread(run, ["sh", "-ec", commands], tmp_path)
    application = tmp_path / "my-app"
    async with running(tmp_path / "service") as service, chromium() as browser:
        code = snippet("docs/react.md", "tsx").replace("http://localhost:3000", service.url)
        (application / "src/App.tsx").write_text(code)
        await asyncio.to_thread(run, ["npm", "run", "--silent", "build"], application)  # It checks the types, too.
        with served(application / "dist") as origin:
            page = await browser.new_page()
            await page.goto(origin)
            photo: Any = {"name": "ada.jpg", "mimeType": "image/jpeg", "buffer": PHOTO}
            await page.set_input_files("[name=photo]", photo)
            await page.click("text=Start")
            await expect(page.locator("progress")).to_have_js_property("value", 100)
            await expect(page.locator("a")).to_have_text("Picture")
            await service.start("demo", "generate", prompt="A quiet sea")
            await expect(page.locator("a")).to_have_count(2)
            await service.start("demo", "edit?runner=external")
            await page.click("text=Cancel")
            await expect(page.locator("p").first).to_contain_text("cancelled")
            await expect(page.locator("p button")).to_have_count(0)
            await page.close()
