"""The page on a phone and on a small laptop."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, FilePayload, Locator, expect

from support.browser import PHOTO, Tab, axe_violations, needs_axe, needs_chromium, tabs
from support.harness import Running, running
from support.node import needs_client
from support.page import NETWORK, PromptedEditor, QuickComposer

pytestmark = [needs_chromium, needs_client, pytest.mark.asyncio(loop_scope="session")]

EDITOR = PromptedEditor()

PHONE, NARROW, LAPTOP = (390, 844), (320, 568), (1280, 720)
LONG = "A portrait with this hat, by the lake at dusk, and " + "the reeds, the mist and the far hills, " * 60


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    overrides = {"editor": EDITOR, "composer": QuickComposer()}
    async with running(tmp_path_factory.mktemp("images"), overrides=overrides) as service:
        yield service


def viewport(size: tuple[int, int]) -> dict[str, int]:
    return {"width": size[0], "height": size[1]}


async def is_on_screen(element: Locator) -> bool:
    """Whether the whole element is on the screen, and its centre is not covered."""
    return bool(
        await element.evaluate(
            """(element) => {
              const { left, top, right, bottom } = element.getBoundingClientRect();
              const above = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
              return top >= 0 && left >= 0 && bottom <= innerHeight && right <= innerWidth && element.contains(above);
            }"""
        )
    )


async def fits(tab: Tab) -> bool:
    return bool(await tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.mark.parametrize("size", [PHONE, NARROW, LAPTOP])
@pytest.mark.parametrize("locale", ["tr-TR", pytest.param("en-GB", marks=pytest.mark.long)])
async def test_the_header_has_room_for_the_name_of_the_user(
    browser: Browser, service: Running, size: tuple[int, int], locale: str
) -> None:
    user = "ada@example.com"
    async with tabs(browser, service.url, user=user, viewport=viewport(size), locale=locale) as [tab]:
        name = tab["#user-button"]
        await expect(name).to_have_text(user)
        await expect(name).to_have_attribute("title", user)
        assert await name.evaluate("(name) => name.scrollWidth <= name.clientWidth")
        rows = {await tab[part].evaluate("(part) => part.offsetTop") for part in ("#cut", "#credit", "#language")}
        assert max(rows) < 80
        assert await fits(tab)


async def test_the_prompt_is_on_the_screen_when_a_laptop_opens_the_form(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="laptop", viewport=viewport(LAPTOP)) as [tab]:
        assert await is_on_screen(tab["#prompt"])
        await tab["#files"].set_input_files([PHOTO])
        await expect(tab["#tray li"]).not_to_have_count(0)
        assert await is_on_screen(tab["#prompt"])


@pytest.mark.parametrize("size", [pytest.param(PHONE, marks=pytest.mark.long), NARROW, LAPTOP])
async def test_the_start_button_stays_visible_and_leads_to_the_new_generation(
    browser: Browser, service: Running, size: tuple[int, int]
) -> None:
    user = f"start {size[0]}"
    pause = EDITOR.pause(user)
    async with tabs(browser, service.url, user=user, viewport=viewport(size)) as [tab]:
        if size == LAPTOP:
            assert await is_on_screen(tab["#start"])
        await tab["#files"].set_input_files([PHOTO])
        await tab["#more summary"].click()
        for place in ("#drop", "#url", "#prompt", ".shapes", "#input-fidelity"):
            await tab[place].evaluate("(element) => element.scrollIntoView({ block: 'center' })")
            assert await is_on_screen(tab["#start"]), place
        await tab.start(user)
        await pause.reached.wait()
        await expect(tab["#stage-name"]).to_have_text("Editing")
        for part in ("#stage-title", "#percent", "#bar"):
            assert await is_on_screen(tab[part]), part
        await expect(tab["#strip"]).to_be_hidden()
        await tab["#timeline li"].last.scroll_into_view_if_needed()
        await tab.page.evaluate("scrollTo(0, document.body.scrollHeight)")
        if size == LAPTOP:
            assert await is_on_screen(tab["#start"])
        else:
            await expect(tab["#strip"]).to_be_visible()
            await expect(tab["#strip"]).to_have_text("Live 60% Editing", use_inner_text=False)
            assert await is_on_screen(tab["#strip"])
            assert await fits(tab)
            pause.released.set()
            await expect(tab["#strip"]).to_contain_text("Completed")
            await tab["#strip"].click()
            await expect(tab["#stage-title"]).to_be_focused()
            await expect(tab["#strip"]).to_be_hidden()
        pause.released.set()
        await tab.shows("completed")


@needs_axe
async def test_the_strip_is_readable_and_shows_that_the_page_is_offline(browser: Browser, service: Running) -> None:
    pause = EDITOR.pause("a far hat")
    async with tabs(browser, service.url, user="strip", viewport=viewport(PHONE), locale="tr-TR") as [tab]:
        await tab.start("a far hat")
        await pause.reached.wait()
        await expect(tab["#bar"]).to_have_attribute("aria-valuenow", "60")
        await tab.page.evaluate("scrollTo(0, document.body.scrollHeight)")
        await expect(tab["#strip"]).to_contain_text("Canlı")
        assert await axe_violations(tab.page, "color-contrast", "button-name") == []
        await tab["#cut"].evaluate("(button) => button.click()")
        await expect(tab["#strip"]).to_contain_text("Çevrimdışı")
        pause.released.set()


@pytest.mark.parametrize("size", [PHONE, pytest.param(LAPTOP, marks=pytest.mark.long)])
async def test_the_samples_start_with_one_click(browser: Browser, service: Running, size: tuple[int, int]) -> None:
    user = f"samples {size[0]}"
    async with tabs(browser, service.url, user=user, viewport=viewport(size), locale="tr-TR") as [tab]:
        await tab["#try-samples"].dblclick()
        await tab.shows("completed", "Bu şapkayla, alacakaranlıkta göl kıyısında bir portre")
        assert len((await service.get("/generations", user))["generations"]) == 1


async def test_a_refused_picture_is_marked_and_named(browser: Browser, service: Running) -> None:
    broken = FilePayload(name="broken.png", mimeType="image/png", buffer=b"\x89PNG\r\n\x1a\nno picture at all")
    async with tabs(browser, service.url, user="refused", ignore="status of 4", viewport=viewport(PHONE)) as [tab]:
        await tab["#files"].set_input_files([PHOTO, broken])
        await tab["#prompt"].fill("a broken hat")
        await tab["#start"].click()
        await expect(tab["#tray .wrong"]).to_have_count(1)
        await expect(tab["#tray li"].nth(1)).to_have_class("wrong")
        await expect(tab["#problem"]).to_contain_text("broken.png: ")
        await expect(tab["#problem"]).not_to_contain_text("images.")
        assert await is_on_screen(tab["#problem"])
        await tab.page.get_by_role("button", name="Remove broken.png").click()
        await expect(tab["#tray .wrong"]).to_have_count(0)
        await tab["#start"].click()
        await tab.shows("completed", "a broken hat")


async def test_errors_do_not_show_api_field_names(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="nul", ignore="status of 4") as [tab]:
        await tab["#files"].set_input_files([PHOTO])
        await tab["#prompt"].evaluate("(prompt) => prompt.removeAttribute('maxlength')")
        await tab["#prompt"].fill("hat " * 1_001)
        await tab["#start"].click()
        await expect(tab["#problem"]).not_to_be_empty()
        await expect(tab["#problem"]).not_to_contain_text("prompt:")
        await expect(tab["#prompt"]).to_be_focused()


async def test_the_whole_prompt_is_shown_by_one_click_also_of_a_second_generation(
    browser: Browser, service: Running
) -> None:
    for _ in range(2):
        await service.start("longs", prompt=LONG)
    await service.service.leases.drain()
    async with tabs(browser, service.url, user="longs", viewport=viewport(LAPTOP)) as [tab]:
        for tile in (tab["#history .tile a"].first, tab["#history .tile a"].last):
            await tile.click()
            await expect(tile).to_have_attribute("aria-current", "true")
            await expect(tab["#whole"]).to_have_attribute("aria-expanded", "false")
            await tab["#whole"].click()
            await expect(tab["#whole"]).to_have_attribute("aria-expanded", "true")


@pytest.mark.parametrize("size", [NARROW, pytest.param(LAPTOP, marks=pytest.mark.long)])
async def test_a_long_prompt_can_be_expanded(browser: Browser, service: Running, size: tuple[int, int]) -> None:
    user = f"long {size[0]}"
    async with tabs(browser, service.url, user=user, viewport=viewport(size)) as [tab]:
        await tab["#files"].set_input_files([PHOTO])
        await tab["#prompt"].fill(LONG)
        await tab["#start"].click()
        await tab.shows("completed")
        await tab["#whole"].click()
        await expect(tab["#stage-title"]).to_have_text(LONG.strip())
        title = tab["#stage-title"]
        assert await title.evaluate("(title) => title.scrollHeight <= title.clientHeight + 1")
        assert await fits(tab)
        await tab["#whole"].click()
        assert await title.evaluate(
            "(title) => title.scrollHeight > title.clientHeight || title.textContent.length < 300"
        )
        await tab["#composer"].evaluate("(composer) => (composer.open = true)")
        await tab.start("a short hat")
        await tab.shows("completed", "a short hat")
        await expect(tab["#whole"]).to_be_hidden()


async def test_a_generation_started_elsewhere_has_its_own_shape_and_request(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="curl") as [tab]:
        await tab.is_connected()
        started = await service.post("curl", "edit", prompt="A wide hat", aspectRatio="3:2")
        assert started.status_code == 202
        for _ in range(2):
            await tab.shows("completed", "A wide hat")
            await expect(tab["#stage"]).to_have_attribute("data-shape", "wide")
            await tab.page.reload()
            await tab.is_connected()


async def test_offline_notices_make_no_claims_about_the_service(browser: Browser, service: Running) -> None:
    for locale, claims in (("en-GB", ("goes on", "service")), ("tr-TR", ("sürüyor", "servis"))):
        async with tabs(browser, service.url, user="dead", ignore=NETWORK, locale=locale) as [tab]:
            await tab.page.context.set_offline(True)
            await tab.is_connected("offline")
            for _ in range(2):
                notice = (await tab["#notice"].inner_text()).lower()
                assert notice
                assert [claim for claim in claims if claim in notice] == []
                await tab["#cut"].click()
