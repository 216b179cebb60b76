"""Lets a benchmark control a Python server by lines on its stdin; each answer is one line of JSON on its stdout.

``flood MODE SECONDS`` emits as fast as possible, ``rate MODE PER_SECOND SECONDS`` at a fixed rate with the time in each
event, ``paced`` the same with the time when the event was due. All go round the users and answer how many events they
emitted. The process ends with its stdin.
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


async def flood(emit: Emit, users: int, mode: str, seconds: str) -> None:
    """Emit as fast as possible."""
    sent, end = 0, time.monotonic() + float(seconds)
    while time.monotonic() < end:
        await emit(mode, sent % users, None)
        sent += 1
        await asyncio.sleep(0)
    say(sent=sent)


async def rate(emit: Emit, users: int, mode: str, per_second: str, seconds: str, *, paced: bool) -> None:
    """Emit at a fixed rate. The message is a time in ns: of the emit, or with `paced` when that was due."""
    sent, begin, total = 0, time.monotonic_ns(), int(float(per_second) * float(seconds))
    pause = 1e9 / float(per_second)
    while sent < total:
        due = min(int((time.monotonic_ns() - begin) / pause), total)
        while sent < due:
            at = begin + int((sent + 1) * pause) if paced else time.monotonic_ns()
            await emit(mode, sent % users, f"@{at}")
            sent += 1
        await asyncio.sleep(0.001)
    say(sent=sent)


def obey(users: int, emit: Emit) -> None:
    """Obey commands from now on, in the running loop."""
    loop = asyncio.get_running_loop()

    async def run(command: str, arguments: list[str]) -> None:
        try:
            if command == "flood":
                await flood(emit, users, *arguments)
            else:
                await rate(emit, users, *arguments, paced=command == "paced")
        except Exception as error:
            say(error=repr(error))

    def read() -> None:
        for line in sys.stdin:
            command, *arguments = line.split()
            asyncio.run_coroutine_threadsafe(run(command, arguments), loop)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
