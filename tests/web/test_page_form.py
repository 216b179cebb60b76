"""The form: choosing pictures, marking the face, making pictures smaller, uploading, and options."""

import base64
import json
import os
import re
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any, Final

import pytest
import pytest_asyncio
from PIL import Image, ImageCms
from playwright.async_api import Browser, FilePayload, Route, expect

from adapters.images.colour_profiles import SRGB, from_chromaticities
from support.browser import PHOTO, Tab, axe_violations, needs_axe, needs_chromium, tabs
from support.harness import Running
from support.node import needs_client
from support.page import PromptedEditor, page_service
from support.pictures import BLUE, GREEN, ORANGE, RED, alike, colour_at, encoded, quarters, solid

pytestmark = [needs_chromium, needs_client, pytest.mark.asyncio(loop_scope="session")]


def display_p3() -> bytes:
    """The profile of Display P3: its primaries, and the curve of sRGB."""
    srgb, profile = SRGB.tobytes(), from_chromaticities(1, (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
    curve = srgb.index(b"para")
    return profile[:curve] + srgb[curve : curve + 32] + profile[curve + 32 :]


P3: Final = display_p3()
#: 26 megapixels, of which few are left.
LARGE_SIZE: Final = (26_000, 1_000)
HEIC: Final = FilePayload(
    name="IMG_1.HEIC", mimeType="", buffer=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(200))
)

#: Keeps the fields of each form that the page sends.
RECORD: Final = """
() => {
  const append = FormData.prototype.append;
  FormData.prototype.append = function (name, value, ...rest) {
    (window.sent ??= []).push([name, value]);
    return append.call(this, name, value, ...rest);
  };
}
"""
READ: Final = """
async () => Promise.all(window.sent.filter(([, value]) => value instanceof Blob).map((entry) => new Promise((done) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.split(",")[1]);
  reader.readAsDataURL(entry[1]);
})))
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with page_service(tmp_path_factory.mktemp("images"), PromptedEditor()) as service:
        yield service


def file(name: str, data: bytes) -> FilePayload:
    return FilePayload(name=name, mimeType="application/octet-stream", buffer=data)


async def choose(tab: Tab, *files: FilePayload) -> None:
    """Choose these files, and wait until they are ready."""
    before = await tab["#tray li"].count()
    await tab["#files"].set_input_files(files)
    await expect(tab["#tray li"]).to_have_count(before + len(files))
    await expect(tab["#tray [aria-busy=true]"]).to_have_count(0)


async def started(service: Running, user: str) -> dict[str, Any]:
    """The input of the user's only generation."""
    [generation] = (await service.get("/generations", user))["generations"]
    found: dict[str, Any] = generation["input"]
    return found


async def sent(tab: Tab) -> list[bytes]:
    """The files that the page has sent."""
    return [base64.b64decode(data) for data in await tab.page.evaluate(READ)]


async def test_the_face_can_be_marked_on_any_picture_by_keyboard(browser: Browser, service: Running, eve: str) -> None:
    async with tabs(browser, service.url, user=eve) as [tab]:
        await choose(tab, file("hat.png", solid(RED).data), file("grandma.png", solid(BLUE).data))
        await expect(tab["#face-swap"]).not_to_be_checked()
        await expect(tab["#face-hint"]).to_have_text("Mark the picture with the face.")
        face = tab.page.get_by_role("button", name="Use the face of grandma.png")
        await face.press("Enter")
        await expect(face).to_be_focused()
        await expect(face).to_have_attribute("aria-pressed", "true")
        await expect(tab["#face-hint"]).to_have_text("Face: grandma.png")
        await expect(tab["#face-swap"]).to_be_checked()
        await tab["#face-swap"].uncheck()
        await expect(face).to_have_attribute("aria-pressed", "false")
        await face.click()
        await tab["#url"].fill(f"{service.url}/static/samples/face.webp")
        await tab["#add-url"].click()
        await expect(face).to_have_attribute("aria-pressed", "true")
        await tab.start("grandma")
        await tab.shows("completed")
        request = await started(service, eve)
        assert request["faceSwap"] is True
        assert request["face"] == 1


async def test_without_a_mark_the_first_url_is_the_face_and_a_switch_turns_it_off(
    browser: Browser, service: Running, eve: str
) -> None:
    async with tabs(browser, service.url, user=eve) as [tab]:
        await tab["#url"].fill(f"{service.url}/static/samples/face.webp")
        await tab["#add-url"].click()
        await choose(tab, PHOTO)
        pressed = tab["#tray .face[aria-pressed=true]"]
        await expect(pressed).to_have_attribute("aria-label", "Use the face of 127.0.0.1:" + str(service.port))
        await tab["label:has-text('Generate')"].click()
        await expect(pressed).to_be_hidden()
        await tab["label:has-text('Edit')"].first.click()
        await tab["#face-swap"].uncheck()
        await tab.start("no face")
        await tab.shows("completed")
        assert (await started(service, eve))["faceSwap"] is False


async def test_pictures_that_are_too_large_are_made_smaller_upright_and_in_their_colours(
    browser: Browser, service: Running, eve: str
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # To be turned clockwise by a quarter.
    large = encoded(quarters(LARGE_SIZE), "JPEG", icc_profile=P3, exif=turned)
    clear = Image.new("RGBA", LARGE_SIZE, (*RED, 0))
    clear.paste((*BLUE, 255), (0, 0, 13_000, 1_000))
    async with tabs(browser, service.url, user=eve) as [tab]:
        await tab.page.evaluate(RECORD)
        await choose(tab, file("wide.bin", large), file("clear", encoded(clear)), PHOTO)
        await tab.start("smaller")
        await tab.shows("completed")
        first, second, third = await sent(tab)
        assert third == PHOTO["buffer"]
        photo = Image.open(BytesIO(first))
        assert photo.format == "JPEG"
        assert photo.size == (158, 4096)
        assert profile_of(photo).startswith("Display P3")
        corners = [colour_at(photo, across, down) for down in (0.25, 0.75) for across in (0.25, 0.75)]
        assert all(map(alike, corners, (BLUE, RED, ORANGE, GREEN))), corners
        drawing = Image.open(BytesIO(second)).convert("RGBA")
        assert drawing.size == (4096, 158)
        assert drawing.getpixel((4000, 80))[3] == 0  # type: ignore[index]
        assert drawing.getpixel((100, 80))[3] == 255  # type: ignore[index]
        assert len((await started(service, eve))["images"]) == 3


def profile_of(image: Image.Image) -> str:
    profile = ImageCms.ImageCmsProfile(BytesIO(image.info["icc_profile"]))
    return ImageCms.getProfileDescription(profile).strip()


@pytest.mark.long
async def test_files_above_ten_megabytes_are_made_smaller(browser: Browser, service: Running, eve: str) -> None:
    noise = Image.frombytes("RGB", (2200, 2200), os.urandom(3 * 2200 * 2200))
    large = encoded(noise, "JPEG", quality=100, subsampling=0)
    assert len(large) > 10 * 1024 * 1024
    async with tabs(browser, service.url, user=eve) as [tab]:
        await tab.page.evaluate(RECORD)
        await choose(tab, file("noise.jpg", large))
        await tab.start("noise")
        await tab.shows("completed")
        [smaller] = await sent(tab)
        assert len(smaller) <= 10 * 1024 * 1024
        assert Image.open(BytesIO(smaller)).size == (2200, 2200)


async def test_a_heic_picture_that_the_browser_cannot_read_is_named(
    browser: Browser, service: Running, eve: str
) -> None:
    for locale, text in (
        ("en-GB", "IMG_1.HEIC is a HEIC picture, which this browser cannot read."),
        ("tr-TR", "IMG_1.HEIC bir HEIC görseli"),
    ):
        async with tabs(browser, service.url, user=eve, locale=locale) as [tab]:
            await tab["#files"].set_input_files([HEIC, FilePayload(**{**HEIC, "name": "IMG_2.HEIC"}), PHOTO])
            await expect(tab["#problem"]).to_contain_text(text)
            await expect(tab["#problem"]).to_contain_text("IMG_2.HEIC")
            await expect(tab["#tray li"]).to_have_count(1)


async def test_an_upload_shows_its_progress_and_can_be_cancelled(browser: Browser, service: Running, eve: str) -> None:
    data = solid(RED).data + os.urandom(3_000_000)  # Bytes after the end of a picture are ignored.
    async with tabs(browser, service.url, user=eve, ignore="ERR_ABORTED") as [tab]:
        cdp = await tab.page.context.new_cdp_session(tab.page)
        await choose(tab, file("large.png", data))
        await tab["#prompt"].fill("a slow upload")
        slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 400_000}
        await cdp.send("Network.emulateNetworkConditions", slow)
        await tab["#start"].click()
        bar = tab.page.get_by_role("progressbar", name="Uploading")
        await expect(bar).to_be_visible()
        await expect(bar).not_to_have_attribute("aria-valuenow", "0")
        assert await axe_violations(tab.page, "color-contrast", "aria-progressbar-name") == []
        await tab.page.get_by_role("button", name="Cancel upload").click()
        await expect(tab["#problem"]).to_have_text("The upload was cancelled.")
        await expect(bar).to_be_hidden()
        await expect(tab["#start"]).to_be_focused()
        await expect(tab["#start"]).to_have_text("Start")
        assert (await service.get("/generations", eve))["generations"] == []
        await cdp.send("Network.emulateNetworkConditions", {**slow, "uploadThroughput": -1})
        await tab["#start"].click()
        await tab.shows("completed", "a slow upload")
        assert len((await service.get("/generations", eve))["generations"]) == 1


async def test_a_refused_start_keeps_the_whole_form(browser: Browser, service: Running, eve: str) -> None:
    body = json.dumps({"code": "queue_full", "detail": "The service is busy. Please try again shortly."})

    async def refuse(route: Route) -> None:
        await route.fulfill(status=503, body=body, content_type="application/problem+json")

    async with tabs(browser, service.url, user=eve, ignore="status of 503") as [tab]:
        await tab.page.route("**/generations/edit", refuse)
        await choose(tab, PHOTO)
        await tab["#prompt"].fill("kept")
        await tab["#more summary"].click()
        await tab["#quality"].select_option("high")
        await tab["#start"].click()
        await expect(tab["#problem"]).to_have_text("The service is busy. Please try again shortly.")
        await tab.page.unroute("**/generations/edit")
        await expect(tab["#tray li"]).to_have_count(1)
        await tab["#start"].dblclick(delay=150)
        await tab.shows("completed", "kept")
        assert (await started(service, eve))["quality"] == "high"


async def test_quality_background_and_input_fidelity_are_below_more(
    browser: Browser, service: Running, eve: str
) -> None:
    async with tabs(browser, service.url, user=eve) as [tab]:
        await expect(tab["#quality"]).to_be_hidden()
        await tab["#more summary"].press("Enter")
        await tab.page.get_by_label("Quality").select_option("low")
        await tab.page.get_by_label("Background").select_option("Transparent")
        await tab.page.get_by_label("Input fidelity").select_option("high")
        await tab.start("options")
        await tab.shows("completed")
        request = await started(service, eve)
        assert (request["quality"], request["background"], request["inputFidelity"]) == ("low", "transparent", "high")


@pytest.mark.parametrize("keys", ["Control+Enter", "Meta+Enter"])
async def test_control_or_command_and_enter_start_once(browser: Browser, service: Running, eve: str, keys: str) -> None:
    async with tabs(browser, service.url, user=eve) as [tab]:
        await choose(tab, PHOTO)
        await tab["#prompt"].fill("by keyboard")
        await tab.page.keyboard.down(keys.partition("+")[0])
        for _ in range(3):
            await tab.page.keyboard.down("Enter")  # From the second on as a repetition.
        await tab.shows("completed", "by keyboard")
        assert len((await service.get("/generations", eve))["generations"]) == 1


async def test_one_click_on_the_samples_in_the_form_starts(browser: Browser, service: Running, eve: str) -> None:
    async with tabs(browser, service.url, user=eve) as [tab]:
        await tab["#prompt"].fill("my own words")
        await tab["#samples"].dblclick()
        await tab.shows("completed", "my own words")
        assert len((await service.get("/generations", eve))["generations"]) == 1


async def test_a_stored_picture_is_used_by_its_address_and_marked_if_it_is_gone(
    browser: Browser, service: Running, eve: str
) -> None:
    first = await service.start(eve)
    stored = (await started(service, eve))["images"][0]
    async with tabs(browser, service.url, user=eve, ignore="status of 4") as [tab]:
        for address in (f"{service.url}/images/{stored.rsplit('/', 1)[1]}?width=320", f"{service.url}/images/gone.png"):
            await tab["#url"].fill(address)
            await tab["#add-url"].click()
        await choose(tab, PHOTO)
        await expect(tab["#tray li"].nth(1).locator("img")).to_have_js_property("complete", True)
        await tab["#prompt"].fill("once more")
        await tab["#start"].click()
        await expect(tab["#tray .wrong"]).to_have_count(1)
        await expect(tab["#tray li"].nth(2)).to_have_class("wrong")
        await expect(tab["#problem"]).to_contain_text("Earlier picture: ")
        await tab["#tray li"].nth(2).get_by_role("button", name="Remove").click()
        await tab["#start"].click()
        await tab.shows("completed", "once more")
        [newest, oldest] = (await service.get("/generations", eve))["generations"]
        assert oldest["generationId"] == first
        assert len(newest["input"]["images"]) == 2


async def test_phones_offer_the_camera_and_take_dropped_and_pasted_pictures_anywhere(
    browser: Browser, service: Running, eve: str
) -> None:
    await service.start(eve)
    phone: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    async with tabs(browser, service.url, user=eve, **phone) as [tab]:
        await tab.shows("completed")
        await tab["#composer > summary"].click()
        await expect(tab["#camera"]).to_be_visible()
        await expect(tab["#camera-file"]).to_have_attribute("capture", "environment")
        await tab["#camera-file"].set_input_files([PHOTO])
        await expect(tab["#tray li"]).to_have_count(1)
        await tab["#composer > summary"].click()
        dispatch = """([type, data]) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([new Uint8Array(data)], "dropped.png"));
          const options = { dataTransfer, clipboardData: dataTransfer, bubbles: true, cancelable: true };
          const event = type === "paste" ? new ClipboardEvent(type, options) : new DragEvent(type, options);
          document.querySelector("footer").dispatchEvent(event);
        }"""
        data = list(PHOTO["buffer"])
        await tab.page.evaluate(dispatch, ["dragover", data])
        await expect(tab["body"]).to_have_class("dragging")
        assert "Drop the pictures here" in await tab["body"].evaluate("(it) => getComputedStyle(it, '::after').content")
        await tab.page.evaluate(dispatch, ["drop", data])
        await expect(tab["#tray li"]).to_have_count(2)
        await tab.page.evaluate(dispatch, ["paste", data])
        await expect(tab["#tray li"]).to_have_count(3)
        await expect(tab["#composer"]).to_have_attribute("open", "")
        await expect(tab["body"]).to_have_class("composing")


async def test_text_is_pasted_as_text_and_links_are_dropped_with_their_comments(
    browser: Browser, service: Running, eve: str
) -> None:
    async with tabs(browser, service.url, user=eve) as [tab]:
        prevented = await tab["#prompt"].evaluate(
            r"""(prompt) => {
              const clipboardData = new DataTransfer();
              clipboardData.items.add(new File(["\x89PNG"], "cells.png", { type: "image/png" }));
              clipboardData.setData("text/plain", "two cells");
              const event = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
              return !prompt.dispatchEvent(event);
            }"""
        )
        assert not prevented
        await expect(tab["#tray li"]).to_have_count(0)
        await tab["footer"].evaluate(
            r"""(footer) => {
              const dataTransfer = new DataTransfer();
              const links = "# two pictures\r\nhttps://a.test/1.png\r\nhttps://a.test/2.png\r\n";
              dataTransfer.setData("text/uri-list", links);
              footer.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
            }"""
        )
        await expect(tab["#tray li"]).to_have_count(2)
        await expect(tab["#problem"]).to_be_empty()


async def test_a_picture_of_the_history_is_dragged_onto_the_form(browser: Browser, service: Running, eve: str) -> None:
    started = await service.start(eve)
    async with tabs(browser, service.url, user=eve) as [tab]:
        await tab.shows("completed")
        await expect(tab["#history .tile"]).to_have_count(1)
        await tab["#history .tile .picture"].evaluate(
            """(picture) => {
              const dataTransfer = new DataTransfer();
              const fire = (target, type) =>
                target.dispatchEvent(new DragEvent(type, { dataTransfer, bubbles: true, cancelable: true }));
              fire(picture, "dragstart");
              dataTransfer.items.add(new File(["as browsers add it"], "thumbnail.webp"));
              fire(document.querySelector("#drop"), "drop");
            }"""
        )
        await expect(tab["#tray li"]).to_have_count(1)
        await expect(tab["#tray li"]).to_have_attribute("data-list", "imageNames")
        await expect(tab["#tray img"]).to_have_attribute("src", re.compile(rf"/images/{started}-\w+\.\w+\?width=320$"))


async def test_a_stored_picture_is_known_by_its_public_url(browser: Browser, service: Running, eve: str) -> None:
    started = await service.start(eve)
    await service.service.leases.drain()
    url = (await service.get(f"/generations/{started}", eve))["editedImageUrl"]
    assert not url.startswith(service.url)
    async with tabs(browser, service.url, user=eve) as [tab]:
        await tab["#url"].fill(url)
        await tab["#add-url"].click()
        await tab["#drop"].evaluate(
            """(drop, url) => {
              const dataTransfer = new DataTransfer();
              dataTransfer.setData("text/uri-list", url);
              dataTransfer.items.add(new File(["as browsers add it"], "thumbnail.webp"));
              drop.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
            }""",
            url,
        )
        await expect(tab["#tray li[data-list=imageNames]"]).to_have_count(2)


async def test_a_problem_that_stays_in_the_other_language_says_so(browser: Browser, service: Running, eve: str) -> None:
    async with tabs(browser, service.url, user=eve) as [tab]:
        await tab["#start"].click()
        await expect(tab["#problem"]).not_to_be_empty()
        await tab["#language"].click()
        await expect(tab["html"]).to_have_attribute("lang", "tr")
        await expect(tab["#problem"]).to_have_attribute("lang", "en")


async def test_computers_do_not_offer_a_camera(browser: Browser, service: Running, eve: str) -> None:
    async with tabs(browser, service.url, user=eve) as [tab]:
        await expect(tab["#camera"]).to_be_hidden()


@needs_axe
@pytest.mark.parametrize("width", [320, pytest.param(390, marks=pytest.mark.long), 1280])
async def test_the_whole_form_fits_and_has_no_violations(
    browser: Browser, service: Running, eve: str, width: int
) -> None:
    options: dict[str, Any] = {"viewport": {"width": width, "height": 720}, "has_touch": width < 1000}
    async with tabs(browser, service.url, user=eve, **options) as [tab]:
        await tab["#more summary"].click()
        await choose(tab, *[PHOTO] * 4)
        await tab["#url"].fill("https://pictures.example.com/face.jpg")
        await tab["#add-url"].click()
        await expect(tab["#tray li"]).to_have_count(5)
        assert await axe_violations(tab.page) == []
        assert await tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
