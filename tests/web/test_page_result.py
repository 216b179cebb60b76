"""The page in a browser: what people do with a generation that has ended."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from domain.errors import FAILURE_CODES
from domain.stages import FLOWS
from support.browser import Tab, axe_violations, needs_axe, needs_chromium, tabs
from support.doubles import fails
from support.guarded import guarded, token
from support.harness import JSON, Running, running
from support.node import needs_client, needs_node, node_test
from support.page import PromptedEditor, QuickComposer, page_service
from support.pictures import GREEN, RED, solid

pytestmark = [needs_chromium, needs_client, pytest.mark.asyncio(loop_scope="session")]

EDITOR: Final = PromptedEditor()
PHONE: Final = {"width": 390, "height": 844}

#: A prompt that means something to shells, to the form syntax of curl, to JavaScript, Python and HTML.
HOSTILE: Final = (
    '@it\'s "quoted" $(touch pwned) `touch pwned` $HOME \\n \\\\ %s {x} ${x} !! ;type=text/html </script><b>\n'
    "# second line 'x' \"\"\" ''' \t tab \x1b[201~ \x07 \u202e\u2066\u200b\u2028\u00a0 Ağaç 🌳"
)

#: What a user may be told beside the failures of generations.
REFUSALS: Final = (
    *("insufficient_credit", "too_many_generations", "too_many_starts", "storage_limit", "overloaded", "queue_full"),
    *("draining", "log_unavailable", "content_too_large", "unsupported_image_type", "image_too_large", "unknown_image"),
    *("not_found", "not_finished", "request_timeout", "token_expired", "invalid_token", "unauthenticated"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with page_service(tmp_path_factory.mktemp("images"), EDITOR, max_per_user=100) as service:
        yield service


async def finished(service: Running, user: str, **fields: object) -> str:
    """A generation that has ended."""
    started = await service.start(user, **fields)  # type: ignore[arg-type]
    await service.service.leases.drain()
    return started


async def input_of(service: Running, generation_id: str, user: str) -> JSON:
    """What was asked for, with the contents of the stored pictures in place of their URLs."""
    asked: JSON = (await service.get(f"/generations/{generation_id}", user))["input"]
    paths = ["/images/" + url.rpartition("/")[2] for url in asked["images"]]
    return {**asked, "images": [(await service.http.get(path)).content for path in paths]}


@needs_node
async def test_the_texts_are_complete_in_both_languages() -> None:
    messages = {stage.message for flow in FLOWS.values() for stage in flow.values()}
    await node_test("page_texts.mjs", services={"stages": sorted(messages), "codes": [*FAILURE_CODES, *REFUSALS]})


@needs_node
async def test_file_names_and_estimates_are_right() -> None:
    await node_test("page_snippets.mjs", services={})


async def test_the_picture_is_downloaded_under_the_name_of_its_prompt(browser: Browser, service: Running) -> None:
    prompt = 'A hat: "red"/blue?\nby the lake'
    started = await finished(service, "ada", prompt=prompt)
    url = (await service.get(f"/generations/{started}", "ada"))["editedImageUrl"]
    async with tabs(browser, service.url, user="ada") as [tab]:
        await tab.shows("completed")
        async with tab.page.expect_download() as downloading:
            await tab.page.get_by_role("link", name="Download").click()
        download = await downloading.value
        assert download.suggested_filename == "A hat red blue by the lake.jpg"
        stored = (await service.http.get("/images/" + url.rpartition("/")[2])).content
        assert (await download.path()).read_bytes() == stored


async def test_the_picture_the_link_the_id_and_the_code_can_be_copied(browser: Browser, service: Running) -> None:
    started = await finished(service, "bea", prompt="a copied hat")
    permissions = ["clipboard-read", "clipboard-write"]
    async with tabs(browser, service.url, user="bea", permissions=permissions) as [tab]:
        await tab.shows("completed")

        async def copied(button: str) -> str:
            await tab[button].click()
            await expect(tab[button]).to_have_text("Copied")
            await expect(tab["#announcer"]).to_have_text("Copied")
            return str(await tab.page.evaluate("navigator.clipboard.readText()"))

        assert await copied("#copy-link") == f"{service.url}/#{started}"
        await tab["#details summary"].click()
        assert await copied("#copy-id") == started
        assert await copied("#copy-code") == await tab["#code"].text_content()
        await tab["#copy-picture"].click()
        await expect(tab["#copy-picture"]).to_have_text("Copied")
        size = await tab.page.evaluate(
            """async () => {
              const [item] = await navigator.clipboard.read();
              const bitmap = await createImageBitmap(await item.getType("image/png"));
              return [bitmap.width, bitmap.height];
            }"""
        )
        assert size == [200, 300]
        await expect(tab["#copy-picture"]).to_have_text("Copy picture")


async def test_without_the_newer_clipboard_texts_can_still_be_copied(browser: Browser, service: Running) -> None:
    started = await finished(service, "bob", prompt="an old hat")
    async with tabs(browser, service.url, user="bob", open_page=False) as [tab]:
        await tab.page.add_init_script("delete Navigator.prototype.clipboard")
        await tab.goto()
        await tab.shows("completed")
        await expect(tab["#copy-picture"]).to_be_hidden()
        await tab["#copy-link"].click()
        await expect(tab["#copy-link"]).to_have_text("Copied")
        await tab["#prompt"].focus()
        await tab.page.keyboard.press("Control+V")
        await expect(tab["#prompt"]).to_have_value(f"{service.url}/#{started}")


# ---- The picture at full size ---------------------------------------------------------------------------------------


async def transform(tab: Tab) -> list[float]:
    """The x, y and scale of the picture in the viewer."""
    style = await tab["#viewer-image"].evaluate("(image) => image.style.transform")
    return [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", style)]


@needs_axe
async def test_the_picture_opens_large_and_is_zoomed_by_keyboard_and_mouse(browser: Browser, service: Running) -> None:
    await finished(service, "cleo", prompt="a large hat")
    async with tabs(browser, service.url, user="cleo") as [tab]:
        await tab.shows("completed")
        keyboard, mouse, zoom = tab.page.keyboard, tab.page.mouse, tab["#viewer-zoom"]
        await tab.page.get_by_role("button", name="Open large").focus()
        await keyboard.press("Enter")
        dialog = tab.page.get_by_role("dialog", name="Picture: a large hat")
        await expect(dialog).to_be_visible()
        await expect(tab["#viewer-image"]).to_have_attribute("alt", "Edited: a large hat")
        await expect(tab["#viewer-image"]).to_have_js_property("naturalWidth", 200)
        assert await axe_violations(tab.page) == []
        await keyboard.press("+")
        await keyboard.press("+")
        await expect(zoom).to_have_text("225%")
        await keyboard.press("ArrowDown")
        assert await transform(tab) == [0, -80, 2.25]
        await keyboard.press("0")
        assert await transform(tab) == [0, 0, 1]
        await keyboard.press("ArrowLeft")
        await expect(tab["#viewer-image"]).to_have_attribute("alt", "Sheet: a large hat")
        await expect(tab["#viewer-names [aria-pressed=true]"]).to_have_text("Sheet")
        await keyboard.press("ArrowRight")
        await mouse.move(640, 300)
        await mouse.wheel(0, -400)
        await expect(zoom).to_have_text("272%")
        before = await transform(tab)
        await mouse.down()
        await mouse.move(640, 260)
        await mouse.up()
        assert (await transform(tab))[1] == pytest.approx(before[1] - 40, abs=0.01)
        await tab["#viewer-in"].click(click_count=9)
        await expect(zoom).to_have_text("800%")
        await mouse.dblclick(640, 300)
        await expect(zoom).to_have_text("100%")
        await keyboard.press("Escape")
        await expect(dialog).to_be_hidden()
        await expect(tab["#large"]).to_be_focused()


async def test_the_large_picture_is_zoomed_with_two_fingers(browser: Browser, service: Running) -> None:
    await finished(service, "cora", prompt="a pinched hat")
    async with tabs(browser, service.url, user="cora", viewport=PHONE, has_touch=True) as [tab]:
        await tab.shows("completed")
        await tab["#large"].tap()
        await expect(tab["#viewer-image"]).to_have_js_property("naturalWidth", 200)
        touch = await tab.page.context.new_cdp_session(tab.page)

        async def fingers(kind: str, *points: tuple[int, int]) -> None:
            touches = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
            await touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

        await fingers("touchStart", (150, 400), (250, 400))
        await fingers("touchMove", (100, 400), (300, 400))
        await fingers("touchEnd")
        await expect(tab["#viewer-zoom"]).to_have_text("200%")
        x, y, _ = await transform(tab)
        await fingers("touchStart", (200, 400))
        await fingers("touchMove", (180, 400))
        await fingers("touchEnd")
        assert await transform(tab) == [pytest.approx(x - 20, abs=0.01), y, 2]
        assert await tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# ---- Once more ------------------------------------------------------------------------------------------------------


async def test_a_generation_runs_again_with_the_same_inputs_on_another_device(
    browser: Browser, service: Running
) -> None:
    url = f"{service.url}/static/samples/face.webp"
    fields = {"aspectRatio": "3:2", "quality": "high", "background": "opaque", "inputFidelity": "high", "face": 1}
    first = await finished(service, "dan", prompt="two hats", images=2, imageUrls=url, **fields)
    async with tabs(browser, service.url, user="dan", viewport=PHONE) as [tab]:
        await tab.shows("completed", "two hats")
        await tab["#again"].click()
        await expect(tab["#history .tile"]).to_have_count(2)
        await tab.shows("completed", "two hats")
        [again, _] = (await service.get("/generations", "dan"))["generations"]
        assert again["generationId"] != first
        wanted = await input_of(service, first, "dan")
        assert wanted == await input_of(service, again["generationId"], "dan")
        assert wanted["face"] == 1
        assert len(wanted["images"]) == 2


async def test_editing_fills_the_form_and_the_result_becomes_an_input(browser: Browser, service: Running) -> None:
    first = await finished(service, "edi", prompt="a plain hat", images=2, aspectRatio="1:1")
    async with tabs(browser, service.url, user="edi") as [tab]:
        await tab.shows("completed", "a plain hat")
        await tab["#edit"].click()
        await expect(tab["#prompt"]).to_be_focused()
        await expect(tab["#prompt"]).to_have_value("a plain hat")
        await expect(tab[".shapes input:checked"]).to_have_value("1:1")
        await expect(tab["#tray li"]).to_have_count(2)
        await tab["#prompt"].fill("a fancy hat")
        await tab["#start"].click()
        await tab.shows("completed", "a fancy hat")
        [changed, _] = (await service.get("/generations", "edi"))["generations"]
        wanted = await input_of(service, first, "edi")
        assert await input_of(service, changed["generationId"], "edi") == {**wanted, "prompt": "a fancy hat"}
        await tab.page.reload()
        await tab.shows("completed", "a fancy hat")
        await tab["#use"].click()
        await expect(tab["#prompt"]).to_be_focused()
        await tab.start("the next hat")
        await tab.shows("completed", "the next hat")
        [last, *_] = (await service.get("/generations", "edi"))["generations"]
        edited = (await service.get(f"/generations/{changed['generationId']}", "edi"))["editedImageUrl"]
        result = (await service.http.get("/images/" + edited.rpartition("/")[2])).content
        assert (await input_of(service, last["generationId"], "edi"))["images"] == [result]


async def test_a_failed_generation_offers_the_same(browser: Browser, service: Running) -> None:
    EDITOR.at("a refused hat", fails("provider_rejected"))
    await finished(service, "fred", prompt="a refused hat", images=2)
    async with tabs(browser, service.url, user="fred") as [tab]:
        await tab.shows("failed", "a refused hat")
        await expect(tab["#edit"]).to_have_class("primary")  # The same request would be refused again.
        await expect(tab["#download"]).to_be_hidden()
        for button in ("#again", "#copy-link", "#large"):
            await expect(tab[button]).to_be_visible()
        await tab["#details summary"].click()
        await expect(tab["#inputs img"]).to_have_count(2)
        await tab["#edit"].click()
        await expect(tab["#tray li"]).to_have_count(2)


async def test_one_whose_pictures_are_gone_asks_for_them_again(browser: Browser, tmp_path: Path) -> None:
    EDITOR.pause("hold")
    async with running(tmp_path, overrides={"editor": EDITOR, "composer": QuickComposer()}, max_running=1) as service:
        held = await service.start("gil", prompt="hold")
        waiting = await service.start("gil", prompt="a waiting hat")
        for each in (waiting, held):
            await service.http.post(f"/generations/{each}/cancel", headers={"X-User-Id": "gil"})
        async with tabs(browser, service.url, user="gil", ignore="status of 4") as [tab]:
            await tab.shows("failed", "a waiting hat")
            await tab["#again"].click()
            await expect(tab["#problem"]).to_contain_text("choose the pictures again")
            await expect(tab["#prompt"]).to_have_value("a waiting hat")


# ---- The same request by API ----------------------------------------------------------------------------------------


COMMANDS: Final = {
    "curl": ("bash", "-c"),
    "javascript": ("node", "--input-type=module", "-e"),
    "python": (sys.executable, "-c"),
}


async def run(language: str, code: str, folder: Path) -> str:
    """Run a code sample as its reader does, and return the id that it prints."""
    process = await asyncio.create_subprocess_exec(
        *COMMANDS[language],
        code,
        cwd=folder,
        env={**os.environ, "STAGECAST_TOKEN": token(USER)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, errors.decode()
    found = re.search(rb"edit_[0-9]+_[a-z0-9]+", output)
    assert found, output
    return found[0].decode()


USER: Final = "o'neil Ağaç"


@needs_node
@pytest.mark.parametrize("secured", [False, pytest.param(True, marks=pytest.mark.long)])
async def test_the_code_samples_start_exactly_the_same_generation(
    browser: Browser, tmp_path: Path, secured: bool
) -> None:
    overrides = {"editor": EDITOR, "composer": QuickComposer()}
    serve = guarded if secured else running
    async with serve(tmp_path / "images", overrides=overrides, fetch_allow="127.0.0.0/8") as service:
        user = {b"X-User-Id": USER.encode()}

        async def asked(generation_id: str) -> JSON:
            """What was asked for, with the contents of the stored pictures in place of their URLs."""
            snapshot = (await service.http.get(f"/generations/{generation_id}", headers=user)).json()
            paths = ["/images/" + url.rpartition("/")[2] for url in snapshot["input"]["images"]]
            pictures = [(await service.http.get(path)).content for path in paths]
            return {**snapshot["input"], "images": pictures, "metadata": snapshot["metadata"]}

        fields = {
            "prompt": HOSTILE,
            "imageUrls": json.dumps([f"{service.url}/static/samples/face.webp?a=1&b='x'"]),
            "face": "1",
            "inputFidelity": "low",
            "metadata": json.dumps({"title": HOSTILE[:60], "flag": True, "none": None}),
        }
        files = [("images", (f"{colour}.png", solid(colour).data, "image/png")) for colour in (RED, GREEN)]
        answer = await service.http.post("/generations/edit", data=fields, files=files, headers=user)
        assert answer.status_code == 202, answer.text
        first = answer.json()["generationId"]
        wanted = await asked(first)
        assert wanted["face"] == 1
        async with tabs(browser, service.url, user=USER, open_page=False) as [tab]:
            await tab.page.goto(f"{service.url}/#{first}")
            if secured:
                await tab["#token"].fill(token(USER))
                await tab["#token"].press("Enter")
            await tab.is_connected()
            await tab["#details summary"].click()
            for language in COMMANDS:
                await tab[f"#languages label:has([value={language}])"].click()
                code = await tab["#code"].text_content() or ""
                assert (token(USER)[:20] in code, "STAGECAST_TOKEN" in code) == (False, secured)
                assert await asked(await run(language, code, tmp_path)) == wanted, language
                assert not (tmp_path / "pwned").exists()
            await tab["#languages label:has([value=events])"].click()
            await tab.shows("completed")
            await expect(tab["#code"]).to_contain_text('"generation_completed"')
            shown = json.loads(await tab["#code"].text_content() or "")
            assert shown == (await service.http.get(f"/generations/{first}/events", headers=user)).json()


# ---- Links ----------------------------------------------------------------------------------------------------------


@needs_axe
async def test_a_link_opens_an_old_generation_on_another_device_of_its_owner_only(
    browser: Browser, service: Running
) -> None:
    old = await finished(service, "hedy", prompt="an old hat")
    for number in range(21):
        await service.start("hedy", prompt=f"hat {number}")
    await service.service.leases.drain()
    ignore = "status of 404|net::ERR_FAILED"
    async with tabs(browser, service.url, 2, user="hedy", ignore=ignore, open_page=False) as [tab, other]:
        await tab.page.route(f"**/generations/{old}", lambda route: route.abort("failed"))
        await tab.page.goto(f"{service.url}/#{old}")
        await expect(tab["#lookup-failed"]).to_be_visible()
        await expect(tab["#stage-title"]).to_be_hidden()
        await tab.page.unroute_all()
        await tab.cut()
        await tab["#cut"].click()
        await tab.shows("completed", "an old hat")
        await tab.page.evaluate("location.hash = '#edit_1_k3v9x2ab4c6d8e0f'")
        await expect(tab["#missing-text"]).to_contain_text("There is no such picture for hedy.")
        assert await axe_violations(tab.page) == []
        await tab["#show-newest"].click()
        await tab.shows("completed", "hat 20")
        for damaged in (f"{old}.", old[:-5].upper(), "edit_", "gen_1763829000123", "edit_1/../../me", "edit_%F0%9F"):
            await tab.page.evaluate("(id) => { location.hash = id; }", damaged)
            await expect(tab["#stage"]).to_have_attribute("data-state", "missing")
        await tab.page.evaluate("(id) => { location.hash = id; }", old)
        await tab.shows("completed", "an old hat")
        await tab[".skip"].focus()
        await tab.page.keyboard.press("Enter")
        await expect(tab["#stage"]).to_be_focused()
        await expect(tab.page).to_have_url(f"{service.url}/#{old}")
        await tab.shows("completed", "an old hat")
        await other.page.add_init_script("sessionStorage['stagecast.user'] = 'a stranger'")
        await other.page.goto(f"{service.url}/#{old}")
        await other.page.bring_to_front()
        await expect(other["#missing-text"]).to_contain_text("There is no such picture for a stranger.")
        await expect(other["#missing-text"]).to_contain_text("a link opens only for its owner")
        await expect(other["#stage-title"]).to_be_hidden()


async def test_a_generation_deleted_elsewhere_leaves_the_page(browser: Browser, service: Running) -> None:
    kept = await finished(service, "ines", prompt="a kept hat")
    gone = await finished(service, "ines", prompt="a gone hat")
    async with tabs(browser, service.url, user="ines", ignore="status of 404") as [tab]:
        await tab.page.goto(f"{service.url}/#{gone}")
        await tab.shows("completed", "a gone hat")
        await service.http.delete(f"/generations/{gone}", headers={"X-User-Id": "ines"})
        await tab.shows("completed", "a kept hat")
        await expect(tab["#generation-id"]).to_have_text(kept)
        assert "#" not in tab.page.url
