"""``stagecast demo``: one real edit, on a service of its own, over HTTP and Socket.IO, watched live.

The service runs in a thread of this process and keeps nothing. It lets in nobody but the holder of a token that is
made for this run, and it may fetch from itself alone: the face comes by URL.
"""

import asyncio
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from io import BytesIO, TextIOWrapper
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any, Final, Self

import aiohttp
import httpx2
import socketio
from PIL import Image, ImageOps
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.style import Style
from rich.table import Table
from rich.text import Text
from socketio.exceptions import SocketIOError

from api import logs
from api.app import create_server
from api.auth import DEFAULT_USER
from api.cli.client import Refused, Unavailable
from api.settings import Settings, SettingsError, load_settings
from api.wiring import issue_token, wire

PROMPT: Final = "Portrait with hat, by the lake at dusk"
_SAMPLES: Final = Path(__file__).parent.parent / "web" / "static" / "samples"
_PHOTOGRAPHS: Final = ("portrait.webp", "hat.webp", "lake.webp")
_FACE: Final = "/static/samples/face.webp"

#: The pictures that events name, in the order in which they come, and what those are called that stay in the folder.
_PICTURES: Final = {
    "compositionUrl": "composition",
    "previewUrl": None,
    "editedImageUrl": "edited",
    "faceSwapUrl": "face-swapped",
}

#: Where `stagecast serve` serves the page.
_PAGE: Final = "http://localhost:3000"

#: Of the terminal, at least.
_ROWS: Final = 17
_HIDE_CURSOR: Final = "\x1b[?25l"
_SHOW_CURSOR: Final = "\x1b[?25h"

_JSON = dict[str, Any]


def demo_settings(overrides: Mapping[str, Any]) -> Settings:
    """The settings of the demo's service, with `overrides`, by field name.

    The environment has a say in how long it takes and, where a provider is asked for, in how that is reached. What
    else is set there is meant for another service: its users, its address, its store.

    Raises:
        SettingsError: an override is wrong, or what they and the environment come to.
    """
    shared = ["local_seconds", "deadline"]
    shared += ["openai_"] if overrides.get("editor") == "openai" else []
    shared += ["replicate_"] if overrides.get("face_swap") == "replicate" else []
    own = {
        "port": 0,
        "public_url": "http://127.0.0.1",
        "jwt_secret": secrets.token_urlsafe(32),
        "editor": "local",
        "face_swap": "local",
        "fetch_allow": "127.0.0.1/32",
    }
    defaults = {
        name: field.get_default(call_default_factory=True, validated_data=own)
        for name, field in Settings.model_fields.items()
        if not name.startswith(tuple(shared))
    }
    return load_settings({**defaults, **own, **overrides})


def run(settings: Settings, listener: socket.socket, folder: Path) -> None:
    """Show one edit, and leave its pictures in the folder.

    Raises:
        Refused: the edit failed.
        Unavailable: the service did.
        SettingsError: the folder cannot be written.
        OSError: a picture or the output cannot be written.
        KeyboardInterrupt: on SIGINT and SIGTERM.
    """
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise SettingsError("--folder must be a folder that can be written.") from None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A path may have letters that it does not know.
    logs.configure()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with TemporaryDirectory(prefix="stagecast-demo-", ignore_cleanup_errors=True) as store:
            settings = settings.model_copy(update={"public_url": url, "images": Path(store)})
            with _serving(settings, listener):
                asyncio.run(_show(settings, folder))
    except (httpx2.HTTPError, SocketIOError, TimeoutError):
        raise Unavailable("the demo's service does not answer.") from None


@contextmanager
def _serving(settings: Settings, listener: socket.socket) -> Iterator[None]:
    """The service, in a thread, until the end of the context."""
    ready = Event()
    server = create_server(wire(settings), ready=ready.set)

    def serve() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            ready.set()

    thread = Thread(target=serve, name="service", daemon=True)
    thread.start()
    try:
        ready.wait()
        if not server.started:
            raise Unavailable("the demo's service did not start.")
        yield
    finally:
        if thread.is_alive():
            server.handle_exit(signal.SIGINT, None)
            thread.join(10)


async def _show(settings: Settings, folder: Path) -> None:
    """Start the edit as any client would, and put its events on the screen as they come."""
    url = settings.public_url
    token = issue_token(settings, DEFAULT_USER, service=False, ttl=timedelta(days=1))
    events: asyncio.Queue[_JSON | None] = asyncio.Queue()
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession() as session,
        httpx2.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=60) as http,
        asyncio.timeout(settings.deadline + 60),
    ):
        device = socketio.AsyncClient(reconnection=False, handle_sigint=False, http_session=session)
        device.on("*", lambda _, event: events.put_nowait(event))
        device.on("disconnect", lambda *_: events.put_nowait(None))
        try:
            # The client's handlers take one argument.
            await device.connect(url, auth={"recovery": False}, wait_timeout=10)
            ack = await device.call("authenticate", {"userId": DEFAULT_USER, "token": token}, timeout=10)
            if not ack["ok"]:
                raise Refused(ack["message"])
            stages = _answer(await http.get("/stages"))["edit"]
            with _screen(settings, stages) as screen:
                begun = time.monotonic()
                generation = _answer(await http.post("/generations/edit", files=_form(url)))
                seen, result = await _follow(events, http, folder, screen)
                taken = time.monotonic() - begun
            logged = _answer(await http.get(f"/generations/{generation['generationId']}/events"))["events"]
        finally:
            await device.disconnect()
    if [item["data"] for item in logged] != seen:
        raise Refused("the events that came live are not those in the log.")
    screen.end(f"{len(seen)} events in {taken:.1f} s, live over Socket.IO; the log has the same {len(logged)}.", result)


def _form(url: str) -> list[tuple[str, Any]]:
    """The form of ``POST /generations/edit``. Of an editor that is paid, not more is asked than a glance needs."""
    fields = {"prompt": PROMPT, "imageUrls": f"{url}{_FACE}", "faceSwap": "true", "quality": "low"}
    files = [("images", (name, (_SAMPLES / name).read_bytes(), "image/webp")) for name in _PHOTOGRAPHS]
    return [*files, *((name, (None, value.encode())) for name, value in fields.items())]


def _answer(response: httpx2.Response) -> _JSON:
    if not response.is_success:
        raise Refused(f"the demo's service answered with status {response.status_code}.")
    content = response.json()
    assert isinstance(content, dict)
    return content


async def _follow(
    events: asyncio.Queue[_JSON | None], http: httpx2.AsyncClient, folder: Path, screen: "_Lines"
) -> tuple[list[_JSON], Path]:
    """All events, and where the last picture lies."""
    seen: list[_JSON] = []
    shown: set[str] = set()
    result = folder
    while not seen or seen[-1]["status"] != "completed":
        event = await events.get()
        if event is None:
            raise Unavailable("the demo's service broke off.")
        del event["cursor"]
        seen.append(event)
        screen.show(event)
        if event["status"] == "failed":
            raise Refused(event["error"])
        for key, name in _PICTURES.items():
            url = event.get(key)
            if url is None or url in shown:
                continue
            shown.add(url)
            picture = (await http.get(url)).raise_for_status().content
            screen.picture(picture)
            if name is not None:
                result = folder / f"{name}{PurePosixPath(url).suffix}"
                result.write_bytes(picture)
    return seen, result


def _screen(settings: Settings, stages: Sequence[_JSON]) -> "_Lines":
    """What suits where the output goes."""
    console = Console(highlight=False)
    # Rich itself also takes a pipe for a terminal, where the environment says so.
    able = sys.stdout.isatty() and not console.is_dumb_terminal and not console.legacy_windows
    if able and console.encoding.startswith("utf") and console.height > _ROWS and console.width >= 46:
        return _Show(settings, stages, console)
    return _Lines(settings)


class _Lines:
    """For a pipe or a file: a line for each event."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __enter__(self) -> Self:
        """Begin to show."""
        who = f"editor: {self.settings.editor}, face swap: {self.settings.face_swap}"
        print(f"Stagecast demo on {self.settings.public_url} ({who})")
        print(f"{PROMPT}\n", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing more comes, whether it went well or not."""

    def show(self, event: _JSON) -> None:
        """Show where the edit is now."""
        print(f"{event['progress']:3} %  {event['status']:<26} {event['message']}", flush=True)

    def picture(self, data: bytes) -> None:
        """Show the picture, where that can be."""

    def end(self, summary: str, result: Path) -> None:
        """Say how it went, and how to go on."""
        print(f"\n{summary}")
        print(f"The picture:  {result}\n{'':13} {result.as_uri()}")
        print(f'To go on:     "stagecast serve", then open {_PAGE}', flush=True)


class _Show(_Lines):
    """For a terminal: the picture as it becomes, the stages, and a bar that moves.

    Only lines that have changed are written again: a picture in characters is long.
    """

    def __init__(self, settings: Settings, stages: Sequence[_JSON], console: Console) -> None:
        super().__init__(settings)
        self._console = console
        self._stages = [stage["status"] for stage in stages if "progress" in stage]
        #: The stages that were entered, and when.
        self._entered: dict[str, float] = {}
        self._message = "Sending the pictures..."
        self._progress = self._drawn = 0.0
        self._spinner = Spinner("dots", style="cyan")
        self._rows = max(_ROWS, min(28, console.height - 8))
        self._columns = round(self._rows * 4 / 3)
        colours = console.color_system in ("256", "truecolor") and not console.no_color
        self._pictures = colours and console.width >= self._columns + 46
        self._picture = [""] * self._rows
        self.picture((_SAMPLES / _PHOTOGRAPHS[0]).read_bytes())
        self._written = [""] * self._rows

    def __enter__(self) -> Self:
        sys.stdout.write(_HIDE_CURSOR + "\n" * (1 + self._rows))
        self._ticking = asyncio.create_task(self._tick())
        return self

    def __exit__(self, *_: object) -> None:
        self._ticking.cancel()
        self._drawn = self._progress
        self._write()
        sys.stdout.write(_SHOW_CURSOR)
        sys.stdout.flush()

    def show(self, event: _JSON) -> None:
        self._entered.setdefault(event["status"], time.monotonic())
        self._progress, self._message = event["progress"], event["message"]

    def picture(self, data: bytes) -> None:
        if self._pictures:
            # A character shows two pixels, one above the other.
            size = self._columns, 2 * self._rows
            image = Image.open(BytesIO(data))
            image.draft("RGB", size)
            small = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
            self._picture = [f"{line}   " for line in self._lines(_in_characters(small), self._columns)]

    def end(self, summary: str, result: Path) -> None:
        say = partial(self._console.print, soft_wrap=True)
        link = Style(color="cyan", link=result.as_uri())
        say(f"\n  [green]✔[/] {summary}")
        say(Text.assemble(("  The picture  ", "dim"), (str(result), "bold")))
        say(Text.assemble(("               ", ""), (result.as_uri(), link)))
        say(f"  [dim]To go on[/]     [bold]stagecast serve[/], then open [cyan]{_PAGE}[/]")

    async def _tick(self) -> None:
        while True:
            # The bar glides to where the last event has put it.
            self._drawn += (self._progress - self._drawn) * 0.4
            self._write()
            await asyncio.sleep(0.08)

    def _write(self) -> None:
        taken = self._columns + 7 if self._pictures else 4
        facts = self._lines(self._facts(), min(64, self._console.width - taken))
        facts = [*[""] * ((self._rows - len(facts)) // 2), *facts]
        lines = [f"  {left}{right}" for left, right in zip_longest(self._picture, facts[: self._rows], fillvalue="")]
        # The cursor stands below the last line, goes up to one that has changed, and comes back.
        for up, old, new in zip(range(self._rows, 0, -1), self._written, lines, strict=True):
            if new != old:
                sys.stdout.write(f"\x1b[{up}A\r{new}\x1b[K\x1b[{up}B\r")
        sys.stdout.flush()
        self._written = lines

    def _lines(self, what: RenderableType, width: int) -> list[str]:
        with self._console.capture() as capture:
            self._console.print(what, width=width)
        return capture.get().splitlines()

    def _facts(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(width=5, justify="right")
        done = ProgressBar(completed=self._drawn, complete_style="cyan", finished_style="green")
        bar.add_row(done, f"{self._drawn:.0f} %")
        return Group(
            Text.assemble(("Stagecast", "bold cyan"), (" demo", "bold")),
            Text(f"editor: {self.settings.editor} · face swap: {self.settings.face_swap}", "dim"),
            Text(f"\n{PROMPT}\n", "italic"),
            self._list(),
            Text(f"\n{self._message}", "dim", no_wrap=True, overflow="ellipsis"),
            bar,
        )

    def _list(self) -> Table:
        """The stages that were entered, the one it is in, and those to come."""
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=1)
        table.add_column(ratio=1)
        table.add_column(justify="right", style="dim")
        begun, last = next(iter(self._entered.values()), 0.0), next(reversed(self._entered), None)
        for status in self._stages if last != "failed" else [*self._stages, "failed"]:
            sign: RenderableType = self._spinner
            style, after = "bold", ""
            if status not in self._entered:
                sign, style = Text("–" if last in ("completed", "failed") else "○", "dim"), "dim"
            else:
                after = f"{self._entered[status] - begun:.1f} s"
                if status == "failed":
                    sign, style = Text("✘", "red"), "bold red"
                elif status != last or status == "completed":
                    sign, style = Text("✔", "green"), ""
            table.add_row(sign, Text(status, style), after)
        return table


def _in_characters(image: Image.Image) -> Text:
    """The picture, to be broken into lines: each character has the colour of a pixel, upon that of the one below."""
    pixels, row = image.tobytes(), 3 * image.width
    text = Text()
    for place in range(0, len(pixels) - row, 3):
        if place % (2 * row) < row:
            upper, lower = (Color.from_rgb(*pixels[at : at + 3]) for at in (place, place + row))
            text.append("▀", Style(color=upper, bgcolor=lower))
    return text
