"""The page in a browser: starting, watching, failing, cancelling, deleting, and the history."""

import json
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, FilePayload, Route, expect

from support.browser import PHOTO, Tab, axe_violations, needs_axe, needs_chromium, tabs
from support.doubles import fails, reports
from support.harness import Running
from support.node import needs_client
from support.page import PromptedEditor, logged, page_service
from support.pictures import RED, solid

pytestmark = [needs_chromium, needs_client, pytest.mark.asyncio(loop_scope="session")]

ATTACK = '<img src=x onerror="window.broken=1"><script>window.broken=1</script>\'"javascript:window.broken=1'


EDITOR = PromptedEditor()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with page_service(tmp_path_factory.mktemp("images"), EDITOR, max_per_user=100) as service:
        yield service


async def test_two_tabs_show_each_stage_and_the_picture_live(browser: Browser, service: Running) -> None:
    pause = EDITOR.pause("a red hat")
    async with tabs(browser, service.url, 2, user="ada") as both:
        await both[0].start("a red hat")
        await pause.reached.wait()
        for tab in both:
            await tab.shows("active", "a red hat")
            bar = tab["#bar"]
            await expect(bar).to_have_attribute("aria-valuenow", "60")
            await expect(bar).to_have_attribute("aria-valuetext", "60%, Editing")
            await expect(tab["#standing"]).to_contain_text("60%")
            await expect(tab["#after"]).to_have_js_property("naturalWidth", 100)
            await expect(tab["#timeline li"]).to_have_count(6)
            assert await tab.timeline() == await logged(service, "ada")
            await expect(tab["#timeline [aria-current]"]).to_contain_text("Editing")
            await expect(tab["#timeline [data-state=to-come]"]).to_have_text(["Editing done 80%", "Completed 100%"])
        pause.released.set()
        for tab in both:
            await tab.shows("completed", "a red hat")
            await expect(tab["#after"]).to_have_js_property("naturalWidth", 200)
            await expect(tab["#before"]).to_have_js_property("naturalWidth", 100)
            await expect(tab["#credit"]).to_have_text("99 credits")
            await expect(tab["#history .tile"]).to_have_count(1)
            assert await tab.timeline() == await logged(service, "ada")


async def test_the_before_and_after_slider_works_by_keyboard_and_by_button(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="ben") as [tab]:
        await tab.start("a blue hat")
        await tab.shows("completed")
        slider = tab.page.get_by_role("slider", name="Before and after")
        await expect(slider).to_have_attribute("aria-valuetext", "After: 100%")
        await slider.focus()
        await slider.press("End")
        await expect(slider).to_have_attribute("aria-valuetext", "After: 0%")
        await expect(tab["#show-before"]).to_have_attribute("aria-pressed", "true")
        await slider.press("ArrowLeft")
        await expect(slider).to_have_attribute("aria-valuetext", "After: 1%")
        await tab["#show-after"].click()
        await expect(slider).to_have_attribute("aria-valuetext", "After: 100%")


async def test_a_reload_during_a_generation_loses_nothing(browser: Browser, service: Running) -> None:
    pause = EDITOR.pause("a slow hat")
    async with tabs(browser, service.url, user="cem") as [tab]:
        await tab.start("a slow hat")
        await pause.reached.wait()
        await tab.page.reload()
        await tab.shows("active", "a slow hat")
        await expect(tab["#bar"]).to_have_attribute("aria-valuenow", "60")
        await expect(tab["#timeline time"]).to_have_count(4)
        pause.released.set()
        await tab.shows("completed")
        assert await tab.timeline() == await logged(service, "cem")


async def test_a_failure_shows_its_reason_and_can_be_tried_again(browser: Browser, service: Running) -> None:
    EDITOR.at("a lost hat", reports(0.5, "Painting..."), fails("provider_unavailable"))
    EDITOR.acts["a lost hat"].rotate(-1)
    async with tabs(browser, service.url, user="dora") as [tab]:
        await tab.start("a lost hat")
        await tab.shows("failed", "a lost hat")
        await expect(tab["#outcome"]).to_have_text(
            "The image service is not available right now. Please try again. The credit was refunded."
        )
        await expect(tab["#credit"]).to_have_text("100 credits")
        await expect(tab["#announcer"]).to_contain_text("The image service is not available")
        await tab["#again"].click()
        await tab.shows("completed", "a lost hat")
        await expect(tab["#history .tile"]).to_have_count(2)


async def test_a_generation_of_another_tab_can_be_tried_again_with_its_inputs(
    browser: Browser, service: Running
) -> None:
    prompt = f"a torn hat{' at noon' * 100}"
    EDITOR.at(prompt, fails("provider_timeout"))
    async with tabs(browser, service.url, user="eva", viewport={"width": 390, "height": 844}) as [tab]:
        await tab["#files"].set_input_files([PHOTO])
        await tab["#prompt"].fill(prompt)
        await tab[".shapes label:has-text('1:1')"].click()
        await tab["#start"].click()
        await tab.shows("failed")
        await tab.page.reload()
        await tab.shows("failed")
        await tab["#again"].click()
        await tab.shows("completed")
        again, first = (await service.get("/generations", "eva"))["generations"]
        assert len(again["input"].pop("images")) == len(first["input"].pop("images")) == 1
        assert again["input"] == first["input"]


async def test_a_cancellation_shows_in_both_tabs_and_refunds_the_credit(browser: Browser, service: Running) -> None:
    holds = [EDITOR.pause("a small hat"), EDITOR.pause("a big hat")]
    async with tabs(browser, service.url, 2, user="fay") as [first, second]:
        await first.start("a small hat")
        await first.start("a big hat")
        for pause in holds:
            await pause.reached.wait()
        await second.page.bring_to_front()
        await second.page.get_by_role("button", name="Cancel: a small hat").click()
        for tab in (first, second):
            await expect(tab["#history .tile"]).to_contain_text("Cancelled")
        await second["#cancel"].click()
        for tab in (first, second):
            await tab.shows("failed", "a big hat")
            await expect(tab["#stage-name"]).to_have_text("Cancelled")
            await expect(tab["#credit"]).to_have_text("100 credits")


async def test_deleting_needs_a_confirmation_and_removes_the_generation_in_both_tabs(
    browser: Browser, service: Running
) -> None:
    async with tabs(browser, service.url, 2, user="gus") as [tab, other]:
        for prompt in ("an old hat", "a new hat"):
            await tab.start(prompt)
            for each in (tab, other):
                await each.shows("completed", prompt)
        await tab["#delete"].click()
        await expect(tab["#delete"]).to_have_text("Really delete?")
        await tab["#delete"].click()
        for each in (tab, other):
            await each.shows("completed", "an old hat")
            await expect(each["#history .tile"]).to_have_count(1)
        assert len((await service.get("/generations", "gus"))["generations"]) == 1


async def load_older(tab: Tab) -> None:
    """Load the next page of the history. Until the first page has loaded, its start is unknown: click again."""
    url = ""
    while "before=" not in url:
        async with tab.page.expect_request(re.compile(r"/generations\?")) as asked:
            await tab["#older"].click()
        url = (await asked.value).url
        await (await asked.value).response()


async def test_the_history_loads_page_by_page_and_each_entry_has_a_timeline(browser: Browser, service: Running) -> None:
    started = [await service.start("hal", metadata=json.dumps({"title": f"hat {n}"})) for n in range(42)]
    await service.service.leases.drain()  # Otherwise generations that end later are added to the history.
    async with tabs(browser, service.url, user="hal") as [tab]:
        tiles = tab["#history .tile"]
        await expect(tiles).to_have_count(20)
        await load_older(tab)
        await expect(tiles).to_have_count(42)
        await expect(tab["#older"]).to_be_hidden()
        await tiles.last.get_by_role("link").press("Enter")
        await tab.shows("completed", "hat 0")
        await expect(tab["#stage-title"]).to_be_focused()
        await expect(tab["#timeline time"]).to_have_count(6)
        assert await tab.timeline() == [event["occurredAt"] for event in await service.events(started[0], "hal")]
        await tab.page.go_back()
        await tab.shows("completed", "hat 41")


async def test_user_input_is_shown_as_text(browser: Browser, service: Running) -> None:
    EDITOR.at(ATTACK, fails("provider_rejected"))
    async with tabs(browser, service.url, user="ivy") as [tab]:
        name = f"{ATTACK.replace('/', '')}.png"
        await tab["#files"].set_input_files([FilePayload(name=name, mimeType="image/png", buffer=PHOTO["buffer"])])
        await tab["#url"].fill(f"http://127.0.0.1:{service.port}/static/samples/face.webp?{ATTACK.replace(' ', '')}")
        await tab["#add-url"].click()
        await expect(tab["#tray li"]).to_have_count(2)
        await tab["#url"].fill("javascript:window.broken=1")
        await tab["#add-url"].click()
        await expect(tab["#problem"]).to_have_text("This is not an http or https URL.")
        await tab["#url"].fill("")
        await tab["#prompt"].fill(ATTACK)
        await tab["#start"].click()
        await tab.shows("failed", ATTACK)
        await service.start(
            "ivy", metadata=json.dumps({"title": f"{ATTACK}2", "aspectRatio": ATTACK, "prompt": [ATTACK]})
        )
        await tab.shows("completed", f"{ATTACK}2")
        await tab.switch_user(ATTACK)
        await expect(tab["#user-button"]).to_have_text(ATTACK)
        await tab.is_connected()
        assert await tab.page.evaluate("window.broken") is None
        assert await tab["main script, main [onerror], main img[src=x]"].count() == 0


async def test_files_can_be_dropped_and_urls_pasted(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="jan") as [tab]:
        data = list(solid(RED).data)
        await tab.page.evaluate(
            """(data) => {
              const dataTransfer = new DataTransfer();
              for (const [name, content] of [["a.bin", new Uint8Array(data)], ["b.png", "no picture"]])
                dataTransfer.items.add(new File([content], name));
              document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
              const clipboardData = new DataTransfer();
              clipboardData.setData("text/plain", "https://example.com/a.jpg https://example.org/b.jpg");
              document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
            }""",
            data,
        )
        await expect(tab["#tray li"]).to_have_count(3)
        await expect(tab["#tray .host:visible"]).to_have_text(["example.com", "example.org"])
        await expect(tab["#face-hint"]).to_have_text("Face: a.jpg")
        await expect(tab["#face-swap"]).to_be_checked()
        await tab.page.get_by_role("button", name="Remove example.com").click()
        await expect(tab["#face-hint"]).to_have_text("Face: b.jpg")
        await tab["#files"].set_input_files([PHOTO] * 4)
        await expect(tab["#tray li"]).to_have_count(5)
        await expect(tab["#problem"]).to_have_text("At most 5 pictures can be used.")
        await tab["#files"].set_input_files([FilePayload(name="d.gif", mimeType="image/gif", buffer=b"GIF89a")])
        await expect(tab["#problem"]).to_have_text("d.gif is not a PNG, JPEG or WebP picture.")


async def test_an_image_url_enables_the_face_swap(browser: Browser, service: Running) -> None:
    pause = EDITOR.pause("another face")
    async with tabs(browser, service.url, user="kim") as [tab]:
        await expect(tab["#face-swap"]).to_be_disabled()
        await tab["#url"].fill(f"{service.url}/static/samples/face.webp")
        await tab["#url"].press("Enter")
        await expect(tab["#tray img"]).to_have_js_property("naturalWidth", 600)
        await tab.start("another face")
        await pause.reached.wait()
        ahead = ["Editing done 80%", "Face swap 85%", "Face swapped 95%", "Completed 100%"]
        await expect(tab["#timeline [data-state=to-come]"]).to_have_text(ahead)
        pause.released.set()
        await tab.shows("completed")
        await expect(tab["#pictures a"]).to_have_text(["Sheet ↗", "Edited ↗", "Face swapped ↗"])
        await expect(tab["#timeline time"]).to_have_count(8)


async def test_the_sample_face_is_added_with_one_click(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="lin") as [tab]:
        await tab["#sample-face"].click()
        await expect(tab["#tray img"]).to_have_js_property("naturalWidth", 600)
        await expect(tab["#face-swap"]).to_be_checked()
        await tab["#face-swap"].uncheck()
        await tab["#try-samples"].click()
        await expect(tab["#tray li"]).to_have_count(4)
        await expect(tab["#face-swap"]).not_to_be_checked()


async def test_pictures_on_other_sites_are_linked_and_not_fetched(browser: Browser, service: Running) -> None:
    headers = {"X-User-Id": "max"}
    fields = {"prompt": (None, "a hat from elsewhere"), "metadata": (None, '{"prompt": "a hat from elsewhere"}')}
    started = await service.http.post("/generations/generate?runner=external", files=fields, headers=headers)
    path = started.headers["location"]
    picture = "https://pictures.example.com/images/hat.png"
    for transition in (
        {"status": "composition"},
        {"status": "composition_completed"},
        {"status": "ai_generation", "previewUrl": picture},
        {"status": "completed", "generatedImageUrl": picture},
    ):
        answer = await service.http.post(f"{path}/transitions", json=transition, headers=headers)
        assert answer.status_code == 200, answer.text
    async with tabs(browser, service.url, user="max") as [tab]:
        await tab.shows("completed", "a hat from elsewhere")
        link = tab.page.get_by_role("link", name="Generated (at pictures.example.com)")
        await expect(link).to_have_attribute("href", picture)
        await expect(link).to_have_attribute("rel", "noopener noreferrer")
        await expect(tab["#no-picture"]).to_contain_text("The picture is stored on another site")


async def test_switching_users_shows_the_other_users_generations(browser: Browser, service: Running) -> None:
    await service.start("leo")
    async with tabs(browser, service.url, user="leo") as [tab]:
        await tab.shows("completed")
        await tab.switch_user("Ağaç 🌳")
        await tab.shows("empty")
        await expect(tab["#credit"]).to_have_text("100 credits")
        await tab.start("a tree")
        await tab.shows("completed", "a tree")
        await tab.page.reload()
        await tab.shows("completed", "a tree")
        await tab.switch_user("leo")
        await tab.shows("completed", "a red hat")


async def test_a_generation_that_curl_started_has_its_prompt_as_title_live_and_after_a_reload(
    browser: Browser, service: Running
) -> None:
    pause = EDITOR.pause("a hat from curl")
    async with tabs(browser, service.url, user="curl") as [tab]:
        await tab.shows("empty")
        first = await service.start("curl", prompt="the first hat")
        await tab.shows("completed", "the first hat")
        await service.start("curl", prompt="a hat from curl")
        await tab.shows("active", "a hat from curl")
        await tab.page.reload()
        await tab.shows("active", "a hat from curl")
        pause.released.set()
        await tab.shows("completed", "a hat from curl")
        await tab.page.reload()
        await tab.shows("completed", "a hat from curl")
        await expect(tab.page.locator(f'#history a[href="#{first}"] .title')).to_have_text("the first hat")


async def test_the_page_is_turkish_by_preference_and_can_be_switched_to_english(
    browser: Browser, service: Running
) -> None:
    EDITOR.at("bir şapka", fails("provider_timeout"))
    async with tabs(browser, service.url, user="mert", locale="tr-TR") as [tab]:
        await expect(tab["html"]).to_have_attribute("lang", "tr")
        await tab.start("bir şapka")
        await tab.shows("failed", "bir şapka")
        await expect(tab["#outcome"]).to_contain_text("Görsel servisi çok geç kaldı")
        await expect(tab["#timeline"]).to_contain_text("Kolaj hazır")
        await expect(tab["#timeline"]).to_contain_text("%40")
        await tab["#language"].click()
        await expect(tab["html"]).to_have_attribute("lang", "en")
        await expect(tab["#stage-name"]).to_have_text("Failed")
        await expect(tab["#timeline"]).to_contain_text("Sheet composed")
        await tab.page.reload()
        await tab.is_connected()
        await expect(tab["#start"]).to_have_text("Start")


async def test_all_controls_can_be_reached_by_keyboard(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="nil") as [tab]:
        keyboard = tab.page.keyboard
        await keyboard.press("Tab")
        await expect(tab[".skip"]).to_be_focused()
        await tab["#samples"].focus()
        await keyboard.press("Enter")
        await tab.shows("completed")
        reached = set()
        await tab["body"].focus()
        for _ in range(45):
            await keyboard.press("Tab")
            reached.add(await tab.page.evaluate("document.activeElement.id"))
        wanted = {"cut", "user-button", "language", "files", "url", "add-url", "prompt", "start", "wipe", "delete"}
        assert wanted <= reached


@needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_no_violations_in_any_state(browser: Browser, service: Running, scheme: str) -> None:
    user, prompts = f"oya {scheme}", [f"{what} {scheme}" for what in ("run", "fail", "done")]
    rules = () if scheme == "light" else ("color-contrast",)
    pause = EDITOR.pause(prompts[0])
    EDITOR.at(prompts[1], fails("provider_unavailable"))
    async with tabs(browser, service.url, user=user, color_scheme=scheme) as [tab]:
        assert await axe_violations(tab.page, *rules) == [], "empty"
        await tab.start(prompts[0])
        await pause.reached.wait()
        await tab.cut()
        assert await axe_violations(tab.page, *rules) == [], "running, cut off"
        await tab["#cut"].click()
        await tab.is_connected()
        await tab.start(prompts[1])
        await tab.shows("failed")
        assert await axe_violations(tab.page, *rules) == [], "failed, another runs"
        pause.released.set()
        await tab.start(prompts[2])
        await tab.shows("completed")
        await tab["#user-button"].click()
        assert await axe_violations(tab.page, *rules) == [], "finished, the user's menu is open"


async def test_the_page_fits_a_phone_of_360_pixels(browser: Browser, service: Running) -> None:
    pause = EDITOR.pause("wide")
    async with tabs(browser, service.url, user="pia", viewport={"width": 360, "height": 640}) as [tab]:
        await fits(tab)
        await tab.start("Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen" * 3)
        await tab.shows("completed")
        await fits(tab)
        await tab["#composer > summary"].click()
        await tab[".shapes label:has-text('3:2')"].click()
        await tab.start("wide")
        await pause.reached.wait()
        await tab.cut()
        await fits(tab)
        pause.released.set()


async def fits(tab: Tab) -> None:
    assert await tab.page.evaluate("document.documentElement.scrollWidth") <= 360


async def test_an_unanswered_start_is_retried_with_the_same_key(browser: Browser, service: Running) -> None:
    ignore = "net::ERR_FAILED"
    async with tabs(browser, service.url, user="rex", ignore=ignore) as [tab]:
        keys: list[str | None] = []

        async def lose(route: Route) -> None:
            keys.append(route.request.headers.get("idempotency-key"))
            if len(keys) < 3:
                await route.fetch()  # The request arrives, the response is lost.
                await route.abort("failed")
            else:
                await route.continue_()

        await tab.page.route("**/generations/edit", lose)
        await tab.start("once")
        await tab.shows("completed", "once")
        await expect(tab["#start"]).to_have_attribute("aria-disabled", "false")
        assert len(keys) == 3
        assert len(set(keys)) == 1
        assert len((await service.get("/generations", "rex"))["generations"]) == 1
