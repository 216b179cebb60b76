"""Lets a benchmark control a Python server by lines on its stdin; each answer is one line of JSON on its stdout.

``flood MODE SECONDS`` emits as fast as possible, ``rate MODE PER_SECOND SECONDS`` at a fixed rate with a time stamp in
each event. Both go round the users and answer how many events they emitted. The process ends with its stdin.
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

#: Emits one event by this mode to the user of this number, with this message; ``None``: that of the stage.
Emit = Callable[[str, int, str | None], Awaitable[object]]


def say(**answer: Any) -> None:
    """Print one answer."""
    print(json.dumps(answer), flush=True)


def data(message: str | None) -> dict[str, Any]:
    """What the peers emit."""
    return {
        "generationId": "edit_1763829000123_k3v9x2ab4",
        "status": "openai_editing",
        "message": message or "OpenAI image editing started...",
        "progress": 60,
    }


def stamp() -> str:
    """The message of an event that tells when it was made, in ns of the machine's monotonic clock."""
    return f"@{time.monotonic_ns()}"


async def flood(emit: Emit, users: int, mode: str, seconds: str) -> None:
    """Emit as fast as possible."""
    sent, end = 0, time.monotonic() + float(seconds)
    while time.monotonic() < end:
        await emit(mode, sent % users, None)
        sent += 1
        await asyncio.sleep(0)
    say(sent=sent)


async def rate(emit: Emit, users: int, mode: str, per_second: str, seconds: str) -> None:
    """Emit at a fixed rate."""
    sent, begin, total = 0, time.monotonic(), int(float(per_second) * float(seconds))
    while sent < total:
        due = min(int((time.monotonic() - begin) * float(per_second)), total)
        while sent < due:
            await emit(mode, sent % users, stamp())
            sent += 1
        await asyncio.sleep(0.001)
    say(sent=sent)


def obey(users: int, emit: Emit) -> None:
    """Obey commands from now on, in the running loop."""
    loop = asyncio.get_running_loop()

    async def run(command: str, arguments: list[str]) -> None:
        try:
            await (rate if command == "rate" else flood)(emit, users, *arguments)
        except Exception as error:
            say(error=repr(error))

    def read() -> None:
        for line in sys.stdin:
            command, *arguments = line.split()
            asyncio.run_coroutine_threadsafe(run(command, arguments), loop)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
