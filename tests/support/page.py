"""What the tests of the page share: providers that a test steers by prompt, and what the log says."""

from collections import defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from domain.ports.images import Load, Picture
from domain.ports.providers import Report
from domain.requests import Options
from support.doubles import Act, Pause, ScriptedFaceSwapper
from support.harness import Running, running
from support.pictures import GREEN, RED, solid


class PromptedEditor:
    """`domain.ports.providers.ImageEditor` that runs the acts registered for a prompt."""

    free = False

    def __init__(self) -> None:
        self.acts: dict[str, deque[Act]] = defaultdict(deque)

    def at(self, prompt: str, *acts: Act) -> None:
        """Register acts for a prompt; each edit with it runs the next one."""
        self.acts[prompt].extend(acts)

    def pause(self, prompt: str) -> Pause:
        pause = Pause()
        self.at(prompt, pause)
        return pause

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        if self.acts[prompt]:
            await self.acts[prompt].popleft()(report)
        return solid(RED, (200, 300), "JPEG")

    generate = edit


class QuickComposer:
    """`domain.ports.images.Composer`: returns an empty sheet."""

    async def compose(self, pictures: Sequence[Load]) -> Picture:
        return solid((250, 250, 250), (100, 140))


@asynccontextmanager
async def page_service(images: Path, editor: PromptedEditor, **settings: Any) -> AsyncIterator[Running]:
    """A service with this editor, whose face swaps are green, and which fetches from this machine."""
    face = ScriptedFaceSwapper()
    face.result = solid(GREEN, (200, 300), "JPEG")
    overrides = {"editor": editor, "composer": QuickComposer(), "face_swapper": face}
    async with running(images, overrides=overrides, fetch_allow="127.0.0.0/8", **settings) as service:
        yield service


async def logged(service: Running, user: str) -> list[str]:
    """The times of the events of the user's newest generation."""
    [newest, *_] = (await service.get("/generations", user))["generations"]
    return [event["occurredAt"] for event in await service.events(newest["generationId"], user)]


#: The browser's own error messages when the network fails.
NETWORK = r"net::ERR_|^WebSocket connection to "
