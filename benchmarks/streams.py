"""The memory of an event stream, and the CPU time of an event on it, beside those of a socket.

    python benchmarks/streams.py [connections]

A server in a process of its own has that many connections (500) of one user: first sockets over WebSocket, then
streams of the feed. Printed are the resident memory per connection, and the CPU time of the server per event and
connection, while events of 1 kB are appended.
"""

import asyncio
import socket
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import websockets

from adapters.serving.uvicorn_server import Server
from adapters.system import SystemEntropy, now
from api.app import create_service
from api.service import Service
from api.settings import load_settings
from api.wiring import wire
from domain.events import Event, encode, timestamp
from domain.ports.log import Append, Start
from domain.requests import GenerationRequest

USER: Final = "watcher"
EVENTS: Final = 100


def resident() -> int:
    """The resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def append_all(service: Service) -> None:
    """One generation."""
    entropy, request = SystemEntropy(), GenerationRequest(prompt="x", external=True, metadata={"filler": "x" * 900})
    generation_id = f"edit_1_{entropy.token()}"
    for sequence in range(1, EVENTS + 1):
        last = sequence == EVENTS
        event = Event(
            generation_id=generation_id,
            kind="edit",
            sequence=sequence,
            status="started" if sequence == 1 else "completed" if last else "openai_editing",
            message="x",
            progress=0,
            occurred_at=timestamp(now()),
            metadata=request.metadata,
        )
        start = Start("edit", request.model_dump_json().encode(), None, "", 10) if sequence == 1 else None
        name = "generation_started" if sequence == 1 else "generation_completed" if last else "continue"
        place = USER, generation_id, sequence, entropy.event_id()
        await service.log.append(Append(*place, encode(event), name, now(), terminal=last, start=start))
        await service.hub.flushed()
        await asyncio.sleep(0.01)


async def serve(images: str) -> None:
    """The server's process: for each line of its input it prints its memory, and the CPU time of the events."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        port = listener.getsockname()[1]
        settings = load_settings({"port": port, "images": images, "credits": None, "max_lag_ms": None})
        service, app = create_service(await wire(settings))
        server = Server(app, service.shutdown, lambda: print(port, flush=True))
        serving = asyncio.create_task(server.serve([listener]))
        while command := (await asyncio.to_thread(sys.stdin.readline)).strip():
            before = time.process_time()
            if command == "events":
                await append_all(service)
            print(resident(), time.process_time() - before, flush=True)
        server.begin_shutdown(now=True)
        await serving


async def open_socket(port: int, opened: AsyncExitStack) -> None:
    """A device over WebSocket that reads everything."""
    address = f"ws://127.0.0.1:{port}/socket.io/?EIO=4&transport=websocket"
    device = await opened.enter_async_context(websockets.connect(address, compression=None, ping_interval=None))
    await device.send(f'40{{"userId":"{USER}"}}')
    while not str(await device.recv()).startswith('42["authenticated"'):
        pass

    async def read() -> None:
        async for frame in device:
            if frame == "2":
                await device.send("3")

    opened.callback(asyncio.create_task(read()).cancel)


async def open_stream(port: int, opened: AsyncExitStack) -> None:
    """A stream of the feed that reads everything."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    opened.callback(writer.close)
    writer.write(f"GET /events?userId={USER} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
    await reader.readuntil(b"event: authenticated")

    async def read() -> None:
        while await reader.read(1 << 16):
            pass

    opened.callback(asyncio.create_task(read()).cancel)


async def measure(connections: int) -> None:
    """The clients' process."""
    print(
        f"{connections} connections of one user, {EVENTS} events of 1 kB\n{'':8}  kB each  µs per event and connection"
    )
    for name, open_one in (("socket", open_socket), ("stream", open_stream)):
        with tempfile.TemporaryDirectory() as images:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, __file__, "--serve", images),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdin is not None
            assert process.stdout is not None

            async def ask(command: str, process: asyncio.subprocess.Process = process) -> tuple[int, float]:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(f"{command}\n".encode())
                memory, seconds = (await process.stdout.readline()).split()
                return int(memory), float(seconds)

            port = int(await process.stdout.readline())
            async with AsyncExitStack() as opened:
                await open_one(port, opened)
                await ask("events")
                before, _ = await ask("memory")
                for _ in range(connections - 1):
                    await open_one(port, opened)
                after, _ = await ask("memory")
                _, seconds = await ask("events")
            process.stdin.close()
            await process.wait()
        each = (after - before) / (connections - 1)
        print(f"{name:8}  {each / 1000:7.1f}  {seconds / EVENTS / connections * 1e6:7.1f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(serve(sys.argv[2]))
    else:
        asyncio.run(measure(int(sys.argv[1]) if sys.argv[1:] else 500))
