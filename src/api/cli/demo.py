"""``stagecast demo``: run one edit on a service of its own, over HTTP and Socket.IO, and watch it live.

The service runs in this process and keeps nothing. It accepts only a token that is made for this
run, and may fetch image URLs only from itself, because the face comes by URL.
"""

import asyncio
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Final

import httpx2
import socketio
from socketio.exceptions import SocketIOError

from api import logs
from api.app import create_server
from api.auth import DEFAULT_USER
from api.cli.client import Refused, Unavailable, content_of
from api.cli.display import Display, create_display
from api.settings import Settings, SettingsError, load_settings
from api.wiring import issue_token, wire

PROMPT: Final = "Portrait with hat, by the lake at dusk"
_SAMPLES: Final = Path(__file__).parent.parent / "web" / "static" / "samples"
_PHOTOGRAPHS: Final = ("portrait.webp", "hat.webp", "lake.webp")
_FACE: Final = "/static/samples/face.webp"
#: The keys of events that hold image URLs, in the order in which they appear, and the file name of each image.
_PICTURES: Final = {"compositionUrl": "composition", "editedImageUrl": "edited", "faceSwapUrl": "face-swapped"}

_JSON = dict[str, Any]


def demo_settings(overrides: Mapping[str, Any]) -> Settings:
    """The settings of the demo's service, with `overrides` by field name.

    From the environment come only the durations and, if a provider is chosen, how to reach it. The other variables
    configure another service: its users, its address, its storage.

    Raises:
        SettingsError: a value is not valid.
    """
    # The settings of a provider begin with its name.
    shared = ("local_seconds", "deadline", *(f"{overrides.get(name)}_" for name in ("editor", "face_swap")))
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
        if not name.startswith(shared)
    }
    return load_settings({**defaults, **own, **overrides})


def run(settings: Settings, listener: socket.socket, folder: Path) -> None:
    """Show one edit and store its images in the folder.

    Raises:
        Refused: the edit failed.
        Unavailable: the service failed.
        SettingsError: the folder cannot be created.
        OSError: an image or the output cannot be written.
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
        sys.stdout.reconfigure(errors="backslashreplace")  # A path may have characters that it cannot encode.
    logs.configure()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with TemporaryDirectory(prefix="stagecast-demo-", ignore_cleanup_errors=True) as store:
            settings = settings.model_copy(update={"public_url": url, "images": store})
            asyncio.run(_serve_edit(settings, listener, folder))
    except (httpx2.HTTPError, SocketIOError, TimeoutError):
        raise Unavailable("the demo's service does not answer.") from None


async def _serve_edit(settings: Settings, listener: socket.socket, folder: Path) -> None:
    """Run the service for as long as the edit takes."""
    ready = asyncio.Event()
    server = create_server(await wire(settings), ready=ready.set)
    server.capture_signals = nullcontext  # type: ignore[assignment, method-assign]  # asyncio cancels this task instead.
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    serving.add_done_callback(lambda _: ready.set())
    try:
        await ready.wait()
        if not server.started:
            raise Unavailable("the demo's service did not start.")
        await _run_edit(settings, folder)
    finally:
        server.begin_shutdown(now=True)
        await serving


async def _run_edit(settings: Settings, folder: Path) -> None:
    """Start the edit as any client would, and show its events as they arrive."""
    url = settings.public_url
    token = issue_token(settings, DEFAULT_USER, service=False, ttl=timedelta(days=1))
    events: asyncio.Queue[_JSON | None] = asyncio.Queue()
    headers = {"Authorization": f"Bearer {token}"}
    print(f"Stagecast demo on {url} (editor: {settings.editor}, face swap: {settings.face_swap})")
    print(f"{PROMPT}\n", flush=True)
    async with (
        httpx2.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=60) as http,
        asyncio.timeout(settings.deadline + 60),
    ):
        device = socketio.AsyncClient(reconnection=False, handle_sigint=False)
        device.on("*", lambda _, event: events.put_nowait(event) if "sequence" in event else None)
        device.on("disconnect", lambda *_: events.put_nowait(None))
        try:
            # The client's handlers take one argument.
            await device.connect(url, auth={"token": token, "recovery": False}, wait_timeout=10)
            with create_display(detailed=True) as display:
                started = time.monotonic()
                generation = content_of(await http.post("/generations/edit", **_form(url)))
                received, result = await _follow(events, http, folder, display)
                seconds = time.monotonic() - started
            path = f"/generations/{generation['generationId']}/events"
            logged = content_of(await http.get(path))["events"]
        finally:
            await device.disconnect()
    if [item["data"] for item in logged] != received:
        raise Refused("the events that came live are not those in the log.")
    print(f"\n{len(received)} events in {seconds:.1f} s, live over Socket.IO; the log has the same {len(logged)}.")
    print(f"The picture:  {result}\n{'':13} {result.as_uri()}")
    print('To go on:     "make run", then open http://localhost:3000', flush=True)


def _form(url: str) -> dict[str, Any]:
    """The form of ``POST /generations/edit``, in low quality because the editor may charge for it."""
    fields = {"prompt": PROMPT, "imageUrls": f"{url}{_FACE}", "faceSwap": "true", "quality": "low"}
    return {"data": fields, "files": [("images", (name, (_SAMPLES / name).read_bytes())) for name in _PHOTOGRAPHS]}


async def _follow(
    events: asyncio.Queue[_JSON | None], http: httpx2.AsyncClient, folder: Path, display: Display
) -> tuple[list[_JSON], Path]:
    """Show the events and store the images. Returns all events and the path of the last image."""
    received: list[_JSON] = []
    loaded: set[str] = set()
    result = folder
    while not received or received[-1]["status"] != "completed":
        event = await events.get()
        if event is None:
            raise Unavailable("the connection to the demo's service broke.")
        del event["cursor"]
        received.append(event)
        display.show(event)
        if event["status"] == "failed":
            raise Refused(event["error"])
        for key, name in _PICTURES.items():
            if (url := event.get(key)) and url not in loaded:
                loaded.add(url)
                result = folder / f"{name}{PurePosixPath(url).suffix}"
                result.write_bytes((await http.get(url)).raise_for_status().content)
    return received, result
