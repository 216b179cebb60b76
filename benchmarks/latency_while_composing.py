"""How long an event takes from its append to another user's socket, alone and while sheets are composed.

    python benchmarks/latency_while_composing.py

A server of its own process appends 200 events a second for one user, each stamped with the machine's monotonic
clock; this process is that user's device. The phases take turns: nothing else happens, or another user's edits, each
of three 12-megapixel JPEGs, are taken in and composed one after the other. Printed are percentiles of each phase in
milliseconds, and the ratio of the medians of the phases' p99.
"""

import asyncio
import json
import statistics
import sys
import tempfile
import time
from io import BytesIO
from typing import Final

import httpx2
import websockets
from PIL import Image

from adapters.serving.uvicorn_server import Server
from adapters.system import SystemEntropy, now
from api.app import create_service
from api.settings import load_settings
from api.wiring import wire
from domain.events import Event, encode
from domain.ports.log import Append, EventLog, Start
from domain.requests import GenerationRequest

PER_SECOND: Final = 200
SECONDS: Final = 3.0
REPETITIONS: Final = 5
USER: Final = "watcher"


async def tick(log: EventLog) -> None:
    """Append for ever, in generations of 1,000 events."""
    entropy, order = SystemEntropy(), GenerationRequest(prompt="x").model_dump_json().encode()
    while True:
        generation_id = f"edit_1_{entropy.token()}"
        for sequence in range(1, 1_001):
            await asyncio.sleep(1 / PER_SECOND)
            last = sequence == 1_000
            event = Event(
                generation_id=generation_id,
                kind="edit",
                sequence=sequence,
                status="started" if sequence == 1 else "completed" if last else "openai_editing",
                message=str(time.monotonic_ns()),
                progress=0,
                occurred_at="",
            )
            start = Start("edit", order, None, "", 1_000) if sequence == 1 else None
            name = "generation_started" if sequence == 1 else "generation_completed" if last else "continue"
            await log.append(
                Append(
                    USER,
                    generation_id,
                    sequence,
                    entropy.event_id(),
                    encode(event),
                    name,
                    now(),
                    terminal=last,
                    start=start,
                )
            )


async def serve(images: str) -> None:
    """The server's process: prints its port, and serves until it is killed."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = load_settings({"port": port, "images": images, "local_seconds": 0, "credits": None})
        service, app = create_service(await wire(settings))
        server = Server(app, service.shutdown, lambda: print(port, flush=True))
        ticking = asyncio.create_task(tick(service.log))
        await server.serve([listener])
        ticking.cancel()


def photograph() -> bytes:
    """A 12-megapixel JPEG of about the size that a phone makes."""
    noise = Image.effect_noise((1000, 750), 60).resize((4000, 3000))
    file = BytesIO()
    Image.merge("RGB", [noise, noise.rotate(180), noise]).save(file, "JPEG", quality=88)
    return file.getvalue()


async def watch(socket: websockets.ClientConnection, seconds: float) -> list[float]:
    """The latencies, in milliseconds, of what arrives in so many seconds."""
    latencies: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        frame = str(await socket.recv())
        if frame == "2":
            await socket.send("3")
        elif frame.startswith('42["continue"'):
            stamp = int(json.loads(frame[2:])[1]["message"])
            latencies.append((time.monotonic_ns() - stamp) / 1e6)
    return latencies


async def compose(http: httpx2.AsyncClient, picture: bytes) -> None:
    """Edits, one after the other, until cancelled."""
    while True:
        files = [("images", (f"{n}.jpg", picture)) for n in range(3)]
        answer = await http.post("/generations/edit", data={"prompt": "x"}, files=files)
        answer.raise_for_status()
        while "completed" not in (await http.get(answer.headers["location"])).json()["status"]:
            await asyncio.sleep(0.05)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """p50, p99 and the maximum."""
    cuts = statistics.quantiles(values, n=100)
    return cuts[49], cuts[98], max(values)


async def measure() -> None:
    """The client's process."""
    picture = photograph()
    with tempfile.TemporaryDirectory() as images:
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--serve", images, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        phases: dict[str, list[tuple[float, float, float]]] = {"alone": [], "composing": []}
        try:
            async with (
                httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
                websockets.connect(f"ws://127.0.0.1:{port}/socket.io/?EIO=4&transport=websocket") as socket,
            ):
                await socket.send(f'40{{"userId":"{USER}"}}')
                await watch(socket, 1.0)
                for _ in range(REPETITIONS):
                    phases["alone"].append(percentiles(await watch(socket, SECONDS)))
                    composing = asyncio.create_task(compose(http, picture))
                    await watch(socket, 0.5)
                    phases["composing"].append(percentiles(await watch(socket, SECONDS)))
                    composing.cancel()
                    await watch(socket, 1.5)
        finally:
            process.kill()
            await process.wait()
    print(f"a 12-megapixel JPEG of {len(picture) / 1e6:.1f} MB, three an edit; {REPETITIONS} repetitions")
    print("phase       p50 ms   p99 ms   max ms   (medians)")
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in phases.items()}
    for name, (p50, p99, worst) in medians.items():
        print(f"{name:10} {p50:7.2f}  {p99:7.2f}  {worst:7.2f}")
    print(f"p99 while composing / p99 alone: {medians['composing'][1] / medians['alone'][1]:.1f}")


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[2]) if sys.argv[1:2] == ["--serve"] else measure())
