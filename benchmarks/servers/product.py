"""Stagecast's own server, log and recorder in one process, with its events made here instead of by work.

    python -m benchmarks.servers.product USERS [LIVE]

Mode ``decision`` is one `Recorder.move`: the machine decides, the event is made and appended, and goes to the sockets.
Mode ``append`` gives the log a finished event. `LIVE` generations are unfinished from the beginning. Users are ``u0``…
"""

import socket
import sys
from functools import partial
from typing import Any, Final

from adapters.memory.quotas import MemoryQuotas
from adapters.system import SystemEntropy, now
from api.app import create_server
from api.settings import load_settings
from api.wiring import collect_less, run, wire
from benchmarks.servers import control
from domain.events import Event, encode, timestamp
from domain.generation import Generation
from domain.ports.log import Append, EventLog, Start
from domain.recorder import Recorder
from domain.requests import GenerationRequest
from domain.stored_images import StoredImages

REQUEST: Final = GenerationRequest(prompt="a red hat", external=True)
START: Final = Start("edit", REQUEST.model_dump_json().encode(), None, "", 1_000_000)
#: The events after the first one of a generation, in mode ``decision``.
STEPS: Final[list[tuple[str, dict[str, Any]]]] = [
    ("composition", {}),
    ("composition_completed", {}),
    ("openai_editing", {}),
    *[("openai_editing", {"progress": progress}) for progress in range(61, 80)],
    ("openai_editing_completed", {}),
    ("completed", {"edited_image_url": "edited.png"}),
]
#: The events of a generation in mode ``append``.
EVENTS: Final = 30


class Source:
    """Makes events. Each user has at most one generation per mode that goes on; a finished one is replaced."""

    def __init__(self, log: EventLog, images: StoredImages, url: str) -> None:
        self._log = log
        self._entropy = SystemEntropy()
        self._recorder = Recorder(log, now, self._entropy, images, lambda name: f"{url}/{name}")
        self._decided: dict[int, Generation] = {}
        #: The id and the sequence.
        self._appended: dict[int, tuple[str, int]] = {}

    async def start(self, user: int) -> Generation:
        """Start a generation of this user."""
        generation = Generation(self._id(), "edit", f"u{user}", REQUEST)
        return await self._recorder.start(generation, START)

    async def emit(self, mode: str, user: int, message: str | None) -> None:
        """One event of this user's generation."""
        await (self._decide if mode == "decision" else self._append)(user, message)

    async def _decide(self, user: int, message: str | None) -> None:
        generation = self._decided.get(user)
        if generation is None:
            self._decided[user] = await self.start(user)
            return
        status, fields = STEPS[generation.sequence - 1]
        if message is not None:
            fields = {**fields, "message": message}
        self._decided[user] = await self._recorder.move(generation, status, fields)
        if status == "completed":
            del self._decided[user]

    async def _append(self, user: int, message: str | None) -> None:
        generation_id, sequence = self._appended.pop(user, ("", 0))
        generation_id, sequence, at = generation_id or self._id(), sequence + 1, now()
        event = b'{"generationId":"%b","kind":"edit","sequence":%d,%b' % (
            generation_id.encode(),
            sequence,
            FIELDS if message is None else FIELDS.replace(b"OpenAI image editing started...", message.encode()),
        )
        ends = {1: "generation_started", EVENTS: "generation_completed"}
        await self._log.append(
            Append(
                f"u{user}", generation_id, sequence, self._entropy.event_id(), event, ends.get(sequence, "continue"),
                at, terminal=sequence == EVENTS, start=START if sequence == 1 else None,
            )
        )  # fmt: skip
        if sequence < EVENTS:
            self._appended[user] = generation_id, sequence

    def _id(self) -> str:
        return f"edit_{now().timestamp() * 1000:.0f}_{self._entropy.token()}"


#: What the events of mode ``append`` have in common.
FIELDS: Final = encode(
    Event(
        generation_id="",
        kind="edit",
        sequence=1,
        status="openai_editing",
        message="OpenAI image editing started...",
        progress=60,
        occurred_at=timestamp(now()),
    )
).partition(b'"sequence":1,')[2]


async def main(users: int, live: int = 0) -> None:
    """Serve until stdin ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = load_settings({"port": port, "credits": None, "editor": "local", "face_swap": "local"})
        parts = await wire(settings)
        source = Source(parts.storage.log, StoredImages(parts.images, MemoryQuotas()), f"{settings.public_url}/images")
        for number in range(live):
            await source.start(number % users)

        def ready() -> None:
            collect_less()
            control.say(port=port)

        server = create_server(parts, ready)
        control.obey(users, source.emit)
        await server.serve([listener])


if __name__ == "__main__":
    run(partial(main, *map(int, sys.argv[1:])))
