"""HTTP alone behind a real server: the routes, the problems and the perimeter over a memory log, without workers.

Pictures are faked here: what matters is what HTTP makes of an adapter's answers.
"""

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, Final

import httpx2
import uvicorn
from fastapi import FastAPI

from adapters.memory.leases import MemoryLeases
from adapters.memory.log import MemoryLog
from adapters.memory.quotas import MemoryQuotas
from adapters.memory.sessions import MemorySessions
from adapters.system import SystemEntropy, now
from api.auth import Authenticator
from api.rest import accounts, generations, info, problems
from api.rest.origin_guard import OriginGuard
from domain.admission import Admission, Limits
from domain.errors import Failure, ImageTooLarge, InvalidImage, UnsupportedImageType
from domain.external import ExternalWork
from domain.ports.images import Content, Picture, read
from domain.quarantine import Quarantine
from domain.recorder import Recorder
from domain.stage_times import StageTimes
from domain.stored_images import StoredImages
from domain.supervisor import Supervisor
from domain.thumbnails import Thumbnails
from domain.workflow import Workflow
from support.builders import image_url

PNG: Final = b"\x89PNG\r\n\x1a\n a picture"
BROKEN: Final = b"\x89PNG broken"
HUGE: Final = b"\x89PNG huge"


class FakeIntake:
    """`domain.ports.images.ImageIntake` that looks at the first bytes only."""

    async def admit(self, content: Content) -> Picture:
        data = await read(content)
        if not data.startswith(b"\x89PNG"):
            raise UnsupportedImageType
        if data == BROKEN:
            raise InvalidImage
        if data == HUGE:
            raise ImageTooLarge
        return Picture(data, "image/png")

    async def thumbnail(self, content: Content, width: int) -> Picture:
        return Picture(f"{width} wide: ".encode() + (await self.admit(content)).data, "image/webp")


class FakeImages:
    """`domain.ports.images.ImageStore` in a dict."""

    def __init__(self) -> None:
        self.kept: dict[str, Picture] = {}
        self.full = False

    async def save(self, generation_id: str, picture: Picture, name: str | None = None) -> str:
        if self.full:
            raise Failure("storage_failed")
        name = name or f"{generation_id}-{secrets.token_hex(16)}.png"
        self.kept[name] = picture
        return name

    async def load(self, name: str) -> Picture | None:
        return self.kept.get(name)

    async def size(self, name: str) -> int:
        return len(self.kept[name].data) if name in self.kept else 0

    async def discard(self, name: str) -> None:
        self.kept.pop(name, None)

    async def remove(self, generation_id: str) -> None:
        self.kept = {name: kept for name, kept in self.kept.items() if not name.startswith(f"{generation_id}-")}

    async def names(self, *, older_than: datetime) -> dict[str, list[str]]:
        return {}

    async def probe(self) -> None:
        if self.full:
            raise Failure("storage_failed")

    async def close(self) -> None:
        pass


@dataclass
class Api:
    """A running service and a client of it."""

    client: httpx2.AsyncClient
    port: int
    app: FastAPI
    log: MemoryLog
    recorder: Recorder
    workflow: Workflow
    images: FakeImages

    async def start(self, kind: str = "edit", *, files: int = 1, **rest: Any) -> httpx2.Response:
        """Start a generation; `fields` and `headers` as given."""
        fields = {"prompt": "a red hat", **rest.pop("fields", {})}
        pictures = rest.pop("pictures", [PNG] * files)
        parts: list[tuple[str, tuple[str, bytes] | tuple[None, bytes]]] = [
            ("images", (f"{index}.png", data)) for index, data in enumerate(pictures)
        ]
        for name, given in fields.items():
            for value in given if isinstance(given, list) else [given]:
                parts.append((name, (None, str(value).encode())))
        return await self.client.post(f"/generations/{kind}", files=parts, **rest)

    async def started(self, **rest: Any) -> str:
        """Start a generation, and return its id."""
        answer = await self.start(**rest)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["generationId"])

    async def fail(self, generation_id: str) -> None:
        """End a generation."""
        history = await self.log.generation(generation_id)
        assert history is not None
        await self.recorder.end(generation_id, Failure("internal"))

    async def raw(self, *lines: bytes) -> bytes:
        """Everything that is answered to these lines of a request without a body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"\r\n".join([*lines, b"", b""]))
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer


@asynccontextmanager
async def serve_api(
    *,
    credits: int | None = 100,
    max_waiting: int = 200,
    max_per_user: int = 20,
    starts_per_minute: int | None = None,
    origins: tuple[str, ...] = (),
    hosts: tuple[str, ...] | None = (),
) -> AsyncIterator[Api]:
    log = MemoryLog(epoch="e1", credits=credits, clock=now)
    images, leases = FakeImages(), MemoryLeases()
    stored = StoredImages(images, MemoryQuotas())
    recorder = Recorder(log, now, SystemEntropy(), stored, image_url)
    limits = Limits(max_waiting, max_per_user, timedelta(days=1), starts_per_minute)
    workflow = Workflow(
        log=log,
        ledger=log,
        retention=log,
        recorder=recorder,
        leases=leases,
        external=ExternalWork(log, leases, recorder, Quarantine(recorder), now, 600),
        admission=Admission(log, leases, stored.quotas, limits),
        images=stored,
        intake=FakeIntake(),
        clock=now,
        entropy=SystemEntropy(),
        limits=limits,
        supervisor=Supervisor(),
        sessions=MemorySessions(timedelta(days=1)),
    )

    async def readiness() -> tuple[str | None, dict[str, str]]:
        return ("draining" if workflow.draining else None), {"log": "ok"}

    routes = [route for part in (generations, accounts, info) for route in part.router.routes]
    app = FastAPI(title="Stagecast", redirect_slashes=False, routes=routes)
    app.state.service = SimpleNamespace(
        workflow=workflow,
        authenticator=Authenticator(None, now),
        thumbnails=Thumbnails(stored, FakeIntake()),
        stage_times=StageTimes(),
        readiness=readiness,
    )
    config = uvicorn.Config(
        OriginGuard(problems.Problems(app), open_mode=True, origins=origins, hosts=hosts),
        lifespan="off",
        log_level="warning",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = int(listening.getsockname()[1])
        running = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            while not server.started:
                await asyncio.sleep(0.005)
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, verify=False) as client:
                yield Api(client, port, app, log, recorder, workflow, images)
        finally:
            server.should_exit = True
            await running


def assert_problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The answer is this problem, whole and by RFC 9457."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    content = json.loads(answer.content)
    assert isinstance(content, dict)
    assert content["code"] == code
    assert content["status"] == status
    assert content["type"] == "about:blank"
    assert content["title"]
    assert content["detail"]
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    return content
