"""The operator's page in a real browser: what it shows, asks for and can do."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, expect

from api.web.page import FOLDER
from domain.errors import FAILURE_CODES
from support.browser import needs_chromium
from support.doubles import Pause, ScriptedEditor
from support.guarded import SERVICE, ask, guarded, token
from support.harness import Running, running

pytestmark = [needs_chromium, pytest.mark.asyncio(loop_scope="session")]

USER = "Ünal <b>& Söhne</b>"


@asynccontextmanager
async def opened(browser: Browser, service: Running, *, width: int = 1200, path: str = "") -> AsyncIterator[Page]:
    context = await browser.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce")
    page = await context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
    try:
        await page.goto(f"{service.url}{path}/admin")
        yield page
        assert problems == []
    finally:
        await context.close()


async def start(service: Running, user: str, **fields: str) -> str:
    parts = [("prompt", (None, "a red hat")), *((name, (None, value)) for name, value in fields.items())]
    headers = {b"X-User-Id": user.encode()}
    answer = await service.http.post("/generations/generate", files=parts, headers=headers)
    assert answer.status_code in (202, 422), answer.text
    if answer.status_code == 422:  # It needs an image.
        answer = await service.http.post("/generations/generate?runner=external", files=parts, headers=headers)
    return str(answer.json()["generationId"])


async def test_it_shows_the_service_filters_opens_a_timeline_and_cancels(browser: Browser, tmp_path: Path) -> None:
    pause = Pause()
    async with running(tmp_path, overrides={"editor": ScriptedEditor(pause)}) as service:
        works, own = await service.start("ada"), await start(service, USER)
        async with opened(browser, service) as page:
            rows = page.locator("#generations tr")
            await expect(rows).to_have_count(2)
            await expect(rows.first).to_contain_text(USER)
            await expect(page.locator("#numbers")).to_contain_text(re.compile("Running1"))
            await expect(page.locator("#nodes")).to_contain_text("local")
            # It polls.
            third = await start(service, "bob")
            await expect(rows).to_have_count(3)
            await page.locator("[name=user]").fill(USER)
            await page.get_by_role("button", name="Filter").click()
            await expect(rows).to_have_count(1)
            await expect(rows).to_contain_text(own)
            page.on("dialog", lambda dialog: dialog.accept())
            await page.get_by_role("button", name=f"Timeline of {own}").click()
            timeline = page.locator("#timeline")
            await expect(timeline.locator("tr")).to_have_count(1)
            await expect(timeline).to_contain_text(f"generate of {USER}")
            await timeline.get_by_role("button", name="Cancel this generation").click()
            await expect(timeline.locator("tr")).to_have_count(2)
            await expect(timeline).to_contain_text("The generation was cancelled. (cancelled)")
            await expect(timeline.get_by_role("button", name="Cancel this generation")).to_be_hidden()
            await timeline.get_by_role("button", name="Close").click()
            await page.locator("[name=user]").fill("")
            await page.locator("[name=status]").select_option("active")
            await expect(rows).to_have_count(2)
            await page.get_by_role("button", name=f"Cancel {third}").click()
            await expect(rows).to_have_count(1)
            await expect(page.locator("#failures")).to_contain_text("cancelled2")
            await page.locator("[name=code]").select_option("cancelled")
            await expect(page.locator("#none")).to_be_visible()
        async with service.phone("ada") as phone:
            pause.released.set()
            await phone.until_over(works)


async def test_with_a_key_it_shows_nothing_without_a_service_token(browser: Browser, tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        generation_id = await start(service, "ada")
        async with opened(browser, service) as page:
            await expect(page.get_by_label("Service token")).to_be_focused()
            await expect(page.locator("#main")).to_be_hidden()
            await page.get_by_label("Service token").fill(token("ada"))
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("alert").first).to_have_text(
                "This needs a token with the scope stagecast:service."
            )
            assert generation_id not in await page.content()
            await page.get_by_label("Service token").fill(SERVICE)
            await page.keyboard.press("Enter")
            await expect(page.locator("#generations")).to_contain_text(generation_id)
            await page.reload()
            await expect(page.locator("#generations")).to_contain_text(generation_id)
            await page.get_by_role("button", name="Forget the token").click()
            await expect(page.get_by_label("Service token")).to_be_visible()
            assert generation_id not in await page.content()
        await service.http.post(f"/generations/{generation_id}/cancel", headers={"X-User-Id": "ada"})


async def test_a_pasted_token_is_checked_and_may_have_its_scheme(browser: Browser, tmp_path: Path) -> None:
    async with guarded(tmp_path) as service, opened(browser, service) as page:
        for wrong in ("abc…def", "two words"):
            await page.get_by_label("Service token").fill(wrong)
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("alert").first).to_have_text("This is not a token.")
            await page.get_by_label("Service token").fill("ey.no.token")
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("alert").first).not_to_have_text("This is not a token.")
        await page.get_by_label("Service token").fill(f" Bearer {SERVICE}\n")
        await page.keyboard.press("Enter")
        await expect(page.locator("#main")).to_be_visible()
        await expect(page.locator("#state")).to_contain_text("as of")


async def test_requests_that_fail_leave_the_rest_of_the_page_usable(browser: Browser, tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        generation_id = await service.start("ada")
        await service.service.leases.drain()
        async with opened(browser, service) as page:
            await page.route("**/stages", lambda route: route.abort(), times=1)
            await page.reload()
            await expect(page.locator("[name=kind] option")).to_have_text(["all", "edit", "generate"])
            await page.get_by_role("button", name=f"Timeline of {generation_id}").click()
            await expect(page.locator("#events tr").first).to_contain_text("started")
            await service.http.delete(f"/generations/{generation_id}", headers={"X-User-Id": "ada"})
            await expect(page.locator("#timeline-problem")).not_to_be_empty()
            await expect(page.locator("#none")).to_be_visible()
            await expect(page.locator("#state")).to_contain_text("as of")


async def test_it_fits_on_a_phone_and_works_below_a_path(browser: Browser, tmp_path: Path) -> None:
    async with running(tmp_path, public_url="http://localhost/cast") as service:
        ids = [await service.start(), await start(service, "m" * 128)]
        async with opened(browser, service, width=320, path="/cast") as page:
            await expect(page.locator("#generations tr")).to_have_count(2)
            wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
            assert not await page.evaluate(wide)
            await page.get_by_role("button", name=f"Timeline of {ids[0]}").click()
            await expect(page.locator("#events tr").first).to_contain_text("started")
            assert not await page.evaluate(wide)
        await service.http.post(f"/generations/{ids[1]}/cancel", headers={"X-User-Id": "m" * 128})


async def test_the_page_itself_is_static_and_its_codes_are_those_of_failures(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        answer = await ask(service, None, "/admin")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    script = (FOLDER / "admin.js").read_text()
    assert tuple(re.findall('"([a-z_]+)"', script.partition("CODES = [")[2].partition("]")[0])) == FAILURE_CODES
