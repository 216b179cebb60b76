"""Takes the README's pictures of the page: ``python docs/screenshots.py``, with Chromium installed.

The service is real, and so are the edits: some short ones, so that there is a history, and a long one that two devices
watch. Only the date is made up, so that the pictures do not change with each run more than they have to. In the moving
picture one of the devices loses its connection meanwhile. ``python docs/screenshots.py moving`` takes only that one.
"""

import asyncio
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

import httpx2
from PIL import Image, ImageDraw, ImageFont
from playwright.async_api import Browser, Page, async_playwright, expect

from adapters.images.threads import ImageThreads
from adapters.offline.editor import LocalEditor
from adapters.offline.face_swap import LocalFaceSwap
from adapters.system import now
from api.app import create_server
from api.settings import Settings
from api.wiring import wire
from domain.ports.images import Picture
from domain.ports.providers import Report
from domain.requests import Options

Scheme = Literal["light", "dark"]

FOLDER: Final = Path(__file__).resolve().parent / "images"
_SAMPLES: Final = Path(__file__).resolve().parent.parent / "src" / "api" / "web" / "static" / "samples"

_BEGIN: Final = datetime(2026, 11, 22, 17, 30, tzinfo=UTC)
_USER: Final = "ada"
_PROMPT: Final = "A portrait with this hat, by the lake at dusk"
_EARLIER: Final = (
    ("A quiet evening, printed in two colours", "2:3", ("lake",)),
    ("The hat in the colours of autumn", "1:1", ("hat",)),
    ("Both of them on one poster", "2:3", ("portrait", "face")),
    ("A postcard of the lake and the hat", "3:2", ("lake", "hat")),
)
#: How long the watched edit takes in each of its two slow stages, in seconds.
_SLOW: Final = 8.0

#: Width, height and pixels per point.
_DEVICES: Final = {
    "desktop": (1280, 940, 1.5),
    "phone": (390, 780, 1.5),
    "left": (720, 640, 1.5),
    "right": (360, 640, 1.5),
}
_SCHEMES: Final[tuple[Scheme, ...]] = ("light", "dark")

#: Bytes that a picture may have, and the moving one.
_LIMIT: Final = 150_000
_MOVING_LIMIT: Final = 2_000_000

#: Milliseconds for which a frame of the moving picture is shown, and one in which something is to be read.
_FRAME: Final = 200
_READ: Final = 1_800


class _Editor:
    """`domain.ports.providers.ImageEditor`: the offline one, slow enough to be watched where it is watched."""

    free = True

    def __init__(self, threads: ImageThreads) -> None:
        self._quick, self._slow = LocalEditor(threads, 0), LocalEditor(threads, _SLOW)

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        editor = self._slow if prompt == _PROMPT else self._quick
        return await editor.edit(sheet, prompt, options, report)

    generate = edit


@asynccontextmanager
async def _service(images: Path, ahead: timedelta) -> AsyncIterator[str]:
    """A service whose clock is so much ahead of ours. Yields its address."""
    threads = ImageThreads()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        settings = Settings(_env_file=None, images=images, public_url=url, fetch_allow="127.0.0.1/32")
        ready = asyncio.Event()
        parts = await wire(settings, clock=lambda: now() + ahead)
        parts.editor, parts.face_swapper = _Editor(threads), LocalFaceSwap(threads, _SLOW)
        server = create_server(parts, ready.set)
        serving = asyncio.create_task(server.serve([listener]))
        await ready.wait()
        try:
            yield url
        finally:
            server.begin_shutdown(now=True)
            await serving
            threads.close()


async def _make_a_history(url: str) -> None:
    async with httpx2.AsyncClient(base_url=url, headers={"X-User-Id": _USER}, timeout=60) as http:
        for prompt, shape, names in _EARLIER:
            files = [("images", (name, (_SAMPLES / f"{name}.webp").read_bytes(), "image/webp")) for name in names]
            fields = {"prompt": prompt, "aspectRatio": shape, "metadata": f'{{"title": "{prompt}"}}'}
            answer = await http.post("/generations/edit", files=files, data=fields)
            answer.raise_for_status()


async def _open(browser: Browser, url: str, ahead: timedelta, device: str, scheme: Scheme) -> Page:
    width, height, scale = _DEVICES[device]
    context = await browser.new_context(
        viewport={"width": width, "height": height},
        device_scale_factor=scale,
        color_scheme=scheme,
        reduced_motion="reduce",
        locale="en-GB",
        timezone_id="UTC",
    )
    await context.add_init_script(f"sessionStorage['stagecast.user'] ??= '{_USER}'")
    await context.add_init_script(
        f"""globalThis.Date = class extends Date {{
          constructor(...parts) {{ parts.length ? super(...parts) : super(Date.now()); }}
          static now() {{ return super.now() + {ahead / timedelta(milliseconds=1)}; }}
        }}"""
    )
    page = await context.new_page()
    await page.goto(url)
    await expect(page.locator("body")).to_have_attribute("data-connection", "live")
    return page


async def _take(page: Page, name: str) -> None:
    await page.evaluate("scrollTo(0, 0)")
    await page.mouse.move(0, 0)
    await page.wait_for_load_state("networkidle")
    image = Image.open(BytesIO(await page.screenshot()))
    for quality in (88, 80, 70, 60):
        image.convert("RGB").save(FOLDER / f"{name}.webp", quality=quality, method=6)
        if (FOLDER / f"{name}.webp").stat().st_size <= _LIMIT:
            return
    raise SystemExit(f"{name}.webp is too large.")


async def _shoot(browser: Browser, scheme: Scheme) -> None:
    """One edit, started on the desktop; the phone shows it at work, the desktop what has become of it."""
    ahead = _BEGIN - now()
    with TemporaryDirectory() as images:
        async with _service(Path(images), ahead) as url:
            await _make_a_history(url)
            phone = await _open(browser, url, ahead, "phone", scheme)
            desktop = await _open(browser, url, ahead, "desktop", scheme)
            await expect(desktop.locator("#history .tile")).to_have_count(len(_EARLIER), timeout=30_000)
            await desktop.fill("#prompt", _PROMPT)
            await desktop.click("#samples")
            # The preview comes half-way through the stage.
            await expect(phone.locator("#pictures a")).to_have_count(1, timeout=30_000)
            await expect(phone.locator("#after")).not_to_have_class("sheet", timeout=30_000)
            await _take(phone, f"phone-{scheme}")
            await expect(desktop.locator("#stage")).to_have_attribute("data-state", "completed", timeout=60_000)
            await desktop.locator("#wipe").fill("42")
            await desktop.locator("#stage-title").focus()
            await _take(desktop, f"desktop-{scheme}")
            await phone.context.close()
            await desktop.context.close()


@dataclass
class _Film:
    """The moving picture: both devices side by side, above a sentence about what happens."""

    pages: tuple[Page, Page]
    sentence: str = ""
    frames: list[Image.Image] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)

    async def take(self, duration: int = _FRAME) -> None:
        """Take a frame."""
        shots = [Image.open(BytesIO(await page.screenshot())).convert("RGB") for page in self.pages]
        gap, below = 36, 96
        width = sum(shot.width for shot in shots) + 3 * gap
        frame = Image.new("RGB", (width, shots[0].height + gap + below), "#dfe5e4")
        draw = ImageDraw.Draw(frame)
        left = gap
        for shot in shots:
            mask = Image.new("L", shot.size)
            ImageDraw.Draw(mask).rounded_rectangle((0, 0, shot.width - 1, shot.height - 1), 24, fill=255)
            frame.paste(shot, (left, gap), mask)
            left += shot.width + gap
        place = (width / 2, frame.height - below / 2)
        draw.text(place, self.sentence, fill="#1b2023", font=ImageFont.load_default(40), anchor="mm")
        if self.frames and self.frames[-1].tobytes() == frame.tobytes():
            self.durations[-1] += duration
        else:
            self.frames.append(frame)
            self.durations.append(duration)

    async def until(self, page: Page, selector: str) -> None:
        """Take frames until there is such an element on the page."""
        while not await page.locator(selector).count():
            await self.take()
        await self.take()

    def save(self, file: Path) -> None:
        """Write all frames, in the best quality that fits."""
        for quality in (92, 84, 76, 60):
            options: dict[str, Any] = {
                "save_all": True,
                "append_images": self.frames[1:],
                "duration": self.durations,
                "loop": 0,
            }
            self.frames[0].save(file, quality=quality, method=4, minimize_size=True, **options)
            if file.stat().st_size < _MOVING_LIMIT:
                return
        raise SystemExit(f"{file.name} is too large.")


async def _film(browser: Browser) -> None:
    """One edit on two devices, of which one is cut off and catches up."""
    ahead = _BEGIN - now()
    with TemporaryDirectory() as images:
        async with _service(Path(images), ahead) as url:
            await _make_a_history(url)
            left = await _open(browser, url, ahead, "left", "light")
            right = await _open(browser, url, ahead, "right", "light")
            for page in (left, right):
                await expect(page.locator("#history .tile")).to_have_count(len(_EARLIER), timeout=30_000)
            film = _Film((left, right), "One user, two devices.")
            await film.take(_READ)
            film.sentence = "An edit is started on one of them, and both show each step."
            await left.click("#composer > summary")
            await left.fill("#prompt", _PROMPT)
            await film.take(_READ)
            await left.click("#samples")
            for page in (left, right):
                await page.evaluate("document.activeElement.blur(); scrollTo({ top: 0, behavior: 'instant' })")
            await film.until(right, "[data-state=active] #after:not(.sheet, [hidden])")
            film.sentence = "The phone loses its connection. The work goes on."
            await right.context.set_offline(True)
            await film.until(right, "body[data-connection=offline]")
            await film.until(left, "#stage[data-state=completed]")
            await film.take(_READ)
            film.sentence = "It is back, and has caught up: nothing was missed."
            await right.context.set_offline(False)
            await film.until(right, "body[data-connection=live] #stage[data-state=completed]")
            await film.take(_READ)
            await right.locator("#timeline li.late").first.scroll_into_view_if_needed()
            await right.evaluate("document.querySelector('#timeline').scrollIntoView({ block: 'center' })")
            await film.take(2 * _READ)
            film.save(FOLDER / "moving.webp")
            await right.context.close()
            await left.context.close()


async def main(*, only_moving: bool) -> None:
    """Write every picture, or only the moving one."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    FOLDER.mkdir(exist_ok=True)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        )
        for scheme in _SCHEMES:
            if not only_moving:
                await _shoot(browser, scheme)
        await _film(browser)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main(only_moving="moving" in sys.argv))
