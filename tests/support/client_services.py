"""What the tests of the clients run against: services whose editor waits, and files on another origin."""

import asyncio
from base64 import b64encode
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from adapters.memory.log import MemoryLog
from adapters.system import now
from domain.errors import LogUnavailable
from domain.feed import Cursor
from domain.ports.images import Picture
from domain.ports.providers import Report
from domain.requests import Options
from support.builders import memory_storage
from support.doubles import ScriptedComposer, png
from support.guarded import SECRET, guarded
from support.harness import JSON, PHOTO, running


class GatedEditor:
    """`domain.ports.providers.ImageEditor`: the prompt ``wait for X`` waits, after two reports, for ``let go X``."""

    free = False

    def __init__(self) -> None:
        self._gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        for fraction in (0.25, 0.5):
            await report(fraction, "Working...", None)
        verb, _, name = prompt.rpartition(" ")
        if verb == "wait for":
            await self._gates[name].wait()
        if verb == "let go":
            self._gates[name].set()
        return png("edited")

    generate = edit


class FirstReadFails(MemoryLog):
    """Raises `LogUnavailable` at the first read for a user whose name begins with ``shy``."""

    def __init__(self) -> None:
        super().__init__(epoch="shy", credits=100, clock=now)
        self._failed: set[str] = set()

    async def head_cursor(self, user_id: str) -> Cursor:
        if user_id.startswith("shy") and user_id not in self._failed:
            self._failed.add(user_id)
            raise LogUnavailable
        return await super().head_cursor(user_id)


@asynccontextmanager
async def services_for_node(folder: Path) -> AsyncIterator[JSON]:
    """Three services, and what the tests in Node need to know about them."""
    # Enough runners that one is left to open a gate while others wait.
    options: list[dict[str, Any]] = [
        {"overrides": {"editor": GatedEditor(), "composer": ScriptedComposer()}, "max_running": 50} for _ in range(3)
    ]
    options[1]["overrides"]["storage"] = memory_storage(FirstReadFails())
    async with (
        running(folder / "open", **options[0]) as open_mode,
        running(folder / "other", max_per_user=2, **options[1]) as other,
        guarded(folder / "keyed", **options[2]) as keyed,
    ):
        urls = {"open": open_mode.url, "other": other.url, "keyed": keyed.url}
        yield {**urls, "secret": SECRET, "photo": b64encode(PHOTO).decode()}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The files of this folder, served on another origin."""

    class Files(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=folder)) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
