"""What the tests of the page share: providers that a test steers by prompt, and what the log says."""

from collections import defaultdict, deque
from collections.abc import Sequence

from domain.ports.images import Load, Picture
from domain.ports.providers import Report
from domain.requests import Options
from support.doubles import Act, Pause
from support.harness import Running
from support.pictures import RED, solid


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


async def logged(service: Running, user: str) -> list[str]:
    """The times of the events of the user's newest generation."""
    [newest, *_] = (await service.get("/generations", user))["generations"]
    return [event["occurredAt"] for event in await service.events(newest["generationId"], user)]


#: The browser's own error messages when the network fails.
NETWORK = r"net::ERR_|^WebSocket connection to "
