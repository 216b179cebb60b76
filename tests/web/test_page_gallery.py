"""The page in a browser: the history with filters and search, themes, and the layout at every size."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Route, expect

from support.browser import Tab, axe_violations, needs_axe, needs_chromium, tabs
from support.doubles import fails
from support.harness import Running, running
from support.node import needs_client
from support.page import PromptedEditor, QuickComposer

pytestmark = [needs_chromium, needs_client, pytest.mark.asyncio(loop_scope="session")]

EDITOR: Final = PromptedEditor()

DESKTOP, PHONE, NARROW = (1280, 800), (390, 844), (320, 568)
#: A desktop of 1280 pixels at 200 % has the width of 640.
SIZES: Final = (
    DESKTOP,
    NARROW,
    pytest.param(PHONE, marks=pytest.mark.long),
    pytest.param((640, 400), marks=pytest.mark.long),
)
LONG: Final = "A portrait with this hat, by the lake at dusk, and " + "the reeds, the mist and the far hills, " * 60


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    images: Path = tmp_path_factory.mktemp("images")
    overrides = {"editor": EDITOR, "composer": QuickComposer()}
    async with running(images, overrides=overrides, max_per_user=1_000, max_waiting=1_000) as service:
        yield service


def viewport(size: tuple[int, int]) -> dict[str, int]:
    return {"width": size[0], "height": size[1]}


async def history_of(service: Running, user: str, *generations: dict[str, Any]) -> None:
    """Generations that have ended, from the oldest to the newest."""
    for each in generations:
        await service.start(user, **each)
    await service.service.leases.drain()


MIXED: Final = (
    {"prompt": "İstanbul'da bir ŞAPKA", "aspectRatio": "3:2"},
    {"prompt": "a red hat", "kind": "generate", "aspectRatio": "1:1"},
    {"prompt": "a broken hat"},
    {"prompt": "Café at night", "aspectRatio": "2:3"},
)


async def found(tab: Tab, *titles: str) -> None:
    await expect(tab["#history .title"]).to_have_text(list(titles))


async def test_the_history_can_be_searched_and_filtered(browser: Browser, service: Running) -> None:
    EDITOR.at("a broken hat", fails("provider_unavailable"))
    await history_of(service, "ada", *MIXED)
    async with tabs(browser, service.url, user="ada") as [tab]:
        every = ("Café at night", "a broken hat", "a red hat", "İstanbul'da bir ŞAPKA")
        await found(tab, *every)
        search = tab.page.get_by_role("searchbox", name="Search prompts")
        for text, titles in {
            "HAT": ("a broken hat", "a red hat"),
            "hat red": ("a red hat",),
            "istanbul şapka": ("İstanbul'da bir ŞAPKA",),
            "ISTANBUL sapka": ("İstanbul'da bir ŞAPKA",),
            "cafe": ("Café at night",),
        }.items():
            await search.fill(text)
            await found(tab, *titles)
            await expect(tab["#found"]).to_have_text(f"{len(titles)} of 4 pictures")
        await search.fill(".*")
        await expect(tab["#found"]).to_have_text("Nothing found in 4 pictures.")
        await tab.page.get_by_role("button", name="Clear").click()
        await expect(search).to_be_focused()
        await found(tab, *every)
        await tab.page.get_by_label("State").select_option("failed")
        await found(tab, "a broken hat")
        await tab.page.get_by_label("State").select_option("completed")
        await tab["#filter-kind"].select_option("generate")
        await found(tab, "a red hat")
        await service.start("ada", kind="generate", prompt="a new hat")
        await found(tab, "a new hat", "a red hat")


async def test_a_search_finds_what_the_page_has_not_loaded_yet(browser: Browser, service: Running) -> None:
    await history_of(service, "bea", {"prompt": "a needle"}, *({"prompt": f"hay {number}"} for number in range(30)))
    async with tabs(browser, service.url, user="bea") as [tab]:
        await expect(tab["#history .tile"]).to_have_count(20)
        await tab["#search"].fill("needle")
        await found(tab, "a needle")
        await expect(tab["#found"]).to_have_text("1 of 31 pictures")
        await tab["#history .tile a"].click()
        await tab.shows("completed", "a needle")


async def shift(tab: Tab) -> float:
    """How much of the page has moved without the user's doing, as browsers measure it."""
    return float(
        await tab.page.evaluate(
            """() => new Promise((resolve) => {
              let sum = 0;
              new PerformanceObserver((list) => {
                for (const entry of list.getEntries()) if (!entry.hadRecentInput) sum += entry.value;
              }).observe({ type: "layout-shift", buffered: true });
              setTimeout(() => resolve(sum), 100);
            })"""
        )
    )


async def test_nothing_moves_when_the_thumbnails_are_loaded(browser: Browser, service: Running) -> None:
    shapes = ("2:3", "1:1", "3:2")
    await history_of(service, "cem", *({"prompt": f"a {shape} hat", "aspectRatio": shape} for shape in shapes))
    async with tabs(browser, service.url, user="cem", open_page=False) as [tab]:
        loaded = asyncio.Event()

        async def hold(route: Route) -> None:
            await loaded.wait()
            await route.continue_()

        await tab.page.route("**/images/**", hold)
        await tab.goto()
        await expect(tab["#history .tile"]).to_have_count(3)
        await expect(tab["#timeline time"]).to_have_count(6)
        boxes = "(all) => all.map((it) => it.getBoundingClientRect()).map(({ width, height }) => [width, height])"
        before, moved = await tab["#history .picture"].evaluate_all(boxes), await shift(tab)
        assert [width / height for width, height in before] == [
            pytest.approx(ratio, abs=0.01) for ratio in (3 / 2, 1, 2 / 3)
        ]
        assert max(height for _, height in before) - min(height for _, height in before) < 1
        loaded.set()
        for image in (tab["#after"], *await tab["#history .tile img"].all()):
            await expect(image).to_have_js_property("naturalWidth", 200)
        assert await tab["#history .picture"].evaluate_all(boxes) == before
        assert await shift(tab) == moved


async def test_the_expiry_is_shown(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="dan") as [tab]:
        await tab.start("a mortal hat")
        await tab.shows("completed")
        await expect(tab["#kept"]).to_contain_text("Kept until ")
        await expect(tab["#history .expiry"]).to_have_text("23 hr left")
        await tab.start("a second hat")
        await tab.shows("completed", "a second hat")
        await expect(tab["#kept"]).to_contain_text("Kept until ")


# ---- Themes and languages -------------------------------------------------------------------------------------------


async def test_the_theme_follows_the_system_until_one_is_chosen(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, 2, user="eva", color_scheme="dark") as [tab, other]:

        async def ground(tab: Tab) -> str:
            return str(await tab["body"].evaluate("(body) => getComputedStyle(body).backgroundColor"))

        dark, light = "rgb(17, 21, 22)", "rgb(247, 246, 243)"
        assert await ground(tab) == dark
        await tab["#user-button"].click()
        await expect(tab.page.get_by_role("radio", name="System")).to_be_checked()
        await tab["label:has([value=light])"].click()
        assert await ground(tab) == light
        await expect(other["html"]).to_have_attribute("data-theme", "light")
        await expect(other["[name=theme][value=light]"]).to_be_checked()
        await tab.page.reload()
        assert await ground(tab) == light
        await tab.page.emulate_media(color_scheme="light")
        await tab["#user-button"].click()
        await tab["label:has([value=dark])"].click()
        assert await ground(tab) == dark
        assert await tab["html"].evaluate("(html) => getComputedStyle(html).colorScheme") == "dark"
        await tab["label:has([value=system])"].click()
        assert await ground(tab) == light
        await tab.is_connected()


async def test_no_english_is_left_on_the_turkish_page(browser: Browser, service: Running) -> None:
    EDITOR.at("bozuk şapka", fails("provider_rejected"))
    pause = EDITOR.pause("uzun şapka")
    titles = ("bozuk şapka", "mavi şapka", "uzun şapka")
    await history_of(service, "fay", {"prompt": titles[0]}, {"prompt": titles[1], "quality": "high"})
    await service.start("fay", prompt=titles[2])
    await pause.reached.wait()
    async with tabs(browser, service.url, user="fay", locale="tr-TR") as [tab]:
        await tab["#user-button"].click()
        english: set[str] = set(
            await tab.page.evaluate(
                """async () => {
                  const { TEXTS: { en, tr } } = await import("/static/texts.js");
                  const flat = (texts) => Object.values(texts).flatMap((text) =>
                    typeof text === "object" ? flat(text) : typeof text === "string" ? text : []);
                  const turkish = new Set(flat(tr));
                  return flat(en).filter((text) => !turkish.has(text));
                }"""
            )
        )
        shown = set[str]()
        await tab["#details"].evaluate("(details) => (details.open = true)")
        for title in titles:
            await tab["#running a, #history a"].filter(has_text=title).first.click()
            await expect(tab["#stage-title"]).to_have_text(title)
            await expect(tab["#timeline [data-state=started], #timeline [aria-current]"]).not_to_have_count(0)
            shown |= set(
                await tab.page.evaluate(
                    """() => [...document.body.querySelectorAll("*")].flatMap((element) => [
                      ...["aria-label", "placeholder", "title", "alt", "aria-valuetext"]
                        .map((it) => element.getAttribute(it)),
                      ...[...element.childNodes].filter((it) => it.nodeType === 3).map((it) => it.data.trim()),
                    ]).filter(Boolean)"""
                )
            )
        assert shown & english == set()
        assert {"Yeniden çalıştır", "Yeniden dene", "Düzenleniyor", "Biçim: 2:3 · Kalite: Yüksek"} <= shown
        pause.released.set()


# ---- Sizes and senses -----------------------------------------------------------------------------------------------


async def overflows(tab: Tab) -> list[str]:
    """What reaches beyond the sides of the window, without being in a box that scrolls."""
    found: list[str] = await tab.page.evaluate(
        """() => document.documentElement.scrollWidth <= innerWidth ? [] :
          [...document.querySelectorAll("body *")].filter((it) => it.getBoundingClientRect().right > innerWidth + 1)
            .map((it) => it.outerHTML.slice(0, 80))"""
    )
    return found


async def is_covered(element: Locator) -> bool:
    """Whether another element lies over its centre."""
    return bool(
        await element.evaluate(
            """(element) => {
              const { left, top, width, height } = element.getBoundingClientRect();
              return !element.contains(document.elementFromPoint(left + width / 2, top + height / 2));
            }"""
        )
    )


@needs_axe
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("locale", ["en-GB", pytest.param("tr-TR", marks=pytest.mark.long)])
async def test_every_state_fits_every_size(
    browser: Browser, service: Running, size: tuple[int, int], locale: str
) -> None:
    user = f"size {size} {locale}"
    EDITOR.at(f"bad {user}", fails("provider_unavailable"))
    await history_of(service, user, {"prompt": LONG, "aspectRatio": "3:2"}, {"prompt": f"bad {user}", "images": 5})
    async with tabs(browser, service.url, user=user, viewport=viewport(size), locale=locale) as [tab]:
        await tab.shows("failed")
        await tab["#details summary"].click()
        assert await overflows(tab) == []
        await tab["#history .tile a"].last.click()
        await tab.shows("completed")
        for language in ("python", "javascript", "events"):
            await tab[f"#languages label:has([value={language}])"].click()
            assert await overflows(tab) == []
        await tab["#whole"].click()
        assert await overflows(tab) == []
        for button in ("#download", "#again", "#edit", "#use", "#copy-link", "#delete", "#search"):
            await tab[button].scroll_into_view_if_needed()
            await tab[button].focus()
            assert not await is_covered(tab[button]), button
        await tab["#user-button"].click()
        assert await overflows(tab) == []
        assert await axe_violations(tab.page) == []
        await tab["#user"].press("Escape")
        await tab["#large"].click()
        assert await overflows(tab) == []
        for button in ("#viewer-in", "#viewer-close"):
            assert not await is_covered(tab[button]), button


@pytest.mark.parametrize("size", [DESKTOP, pytest.param((640, 600), marks=pytest.mark.long), PHONE])
async def test_the_connection_stays_in_view(browser: Browser, service: Running, size: tuple[int, int]) -> None:
    await history_of(service, f"far {size}", *({"prompt": f"hat {number}"} for number in range(8)))
    async with tabs(browser, service.url, user=f"far {size}", viewport=viewport(size)) as [tab]:
        await expect(tab["#history .tile"]).to_have_count(8)
        await tab.page.evaluate("scrollTo(0, document.body.scrollHeight)")
        await expect(tab["#connection"]).to_be_in_viewport(ratio=1)
        await tab.cut()
        await expect(tab["#connection"]).to_have_text("Offline")
        assert not await is_covered(tab["#connection"])


async def test_everything_works_by_keyboard_and_has_a_name(browser: Browser, service: Running) -> None:
    await history_of(service, "kay", {"prompt": "a first hat"}, {"prompt": "a second hat"})
    async with tabs(browser, service.url, user="kay") as [tab]:
        await tab.shows("completed", "a second hat")
        await tab["#details summary"].press("Enter")
        reached, names = set[str](), list[str]()
        await tab[".skip"].focus()
        for _ in range(60):
            await tab.page.keyboard.press("Tab")
            element = tab.page.locator(":focus")
            if not await element.count():
                break
            reached.add(await element.evaluate("(it) => it.id || it.name || it.localName"))
            names.append(await element.aria_snapshot())
        wanted = {
            "download",
            "again",
            "edit",
            "use",
            "copy-link",
            "delete",
            "large",
            "wipe",
            "copy-id",
            "copy-code",
            "code",
        }
        assert wanted | {"language", "search", "filter-kind", "filter-state", "user-button"} <= set(reached)
        assert [name for name in names if '"' not in name and ":" not in name] == []


async def test_nothing_moves_by_itself_for_those_who_ask_for_that(browser: Browser, service: Running) -> None:
    pause = EDITOR.pause("a still hat")
    async with tabs(browser, service.url, user="lou", reduced_motion="reduce") as [tab]:
        await tab.start("a still hat")
        await pause.reached.wait()
        assert await tab.page.evaluate("document.getAnimations().length") == 0
        pause.released.set()
        await tab.shows("completed")
        assert await tab.page.evaluate("document.getAnimations().length") == 0


async def test_chosen_and_pressed_states_are_visible_in_forced_colours(browser: Browser, service: Running) -> None:
    await history_of(service, "mia", {"prompt": "a stark hat"})
    async with tabs(browser, service.url, user="mia", forced_colors="active") as [tab]:
        await tab.shows("completed")
        await tab["#details summary"].click()
        outline = "(it) => getComputedStyle(it).outlineStyle"
        assert await tab["#languages :checked + span"].evaluate(outline) == "solid"
        assert await tab["#languages :not(:checked) + span"].first.evaluate(outline) == "none"
        for button in ("#download", "#again", "#large"):
            assert await tab[button].evaluate("(it) => getComputedStyle(it).borderTopColor") != "rgba(0, 0, 0, 0)"


# ---- A long history -------------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_of_a_thousand_generations_only_some_are_on_the_page(browser: Browser, tmp_path: Path) -> None:
    off = {"credits": "off", "starts_per_minute": "off"}
    overrides = {"editor": EDITOR, "composer": QuickComposer()}
    async with running(tmp_path, overrides=overrides, max_per_user=1_000, max_waiting=1_000, **off) as service:
        for number in range(1_000):
            await service.start("many", prompt=f"hat {number}", aspectRatio=("2:3", "1:1", "3:2")[number % 3])
        await service.service.leases.drain()
        async with tabs(browser, service.url, user="many") as [tab]:
            requests = list[str]()
            tab.page.on("request", lambda request: requests.append(request.url))
            await expect(tab["#history .tile"]).to_have_count(20)
            await tab["#search"].fill("hat 99")
            await expect(tab["#found"]).to_have_text("19 of 1000 pictures")
            assert len([url for url in requests if "/generations?" in url]) <= 11
            await tab["#clear-filters"].click()
            for count in (20, 60, 100, 140):
                await expect(tab["#history .tile"]).to_have_count(count)
                await tab["#older"].click()
