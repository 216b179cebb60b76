"""Appends to a log, and tells what that took.

    python -m benchmarks.servers.stored memory EVENTS
    python -m benchmarks.servers.stored sqlite SECONDS
    python -m benchmarks.servers.stored rows SECONDS

``memory``: bytes of this process per event and of the event's JSON. The others: appends per second of `WRITERS` at once
in the log of a file, and of the same rows that are written to the same tables without any check, `WRITERS` in a batch.
Those two run as the service does: on its event loop, and with its garbage collection.
"""

import asyncio
import gc
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from adapters.images.folder import ImageFolder
from adapters.memory.log import MemoryLog
from adapters.memory.quotas import MemoryQuotas
from adapters.sqlite.database import Database
from adapters.sqlite.log import SqliteLog
from adapters.system import SystemEntropy, now
from api.wiring import collect_less, run
from benchmarks.servers import control
from benchmarks.servers.product import REQUEST, START
from domain.events import Event, encode, event_name, timestamp
from domain.generation import Generation
from domain.ports.log import Append
from domain.recorder import Recorder
from domain.stored_images import StoredImages

WRITERS: Final = 128
ENTROPY: Final = SystemEntropy()
#: The events of an edit.
STEPS: Final[Sequence[tuple[str, dict[str, Any]]]] = (
    ("composition", {}),
    ("composition_completed", {"composition_url": f"{'c' * 60}.png"}),
    ("openai_editing", {}),
    ("openai_editing", {"progress": 70}),
    ("openai_editing_completed", {"edited_image_url": f"{'e' * 60}.png"}),
    ("completed", {}),
)


async def memory(events: int) -> None:
    """Append this many events through the recorder, and tell what the process has grown by."""
    log = MemoryLog(epoch="benchmark", credits=None, clock=now)
    images = StoredImages(ImageFolder(Path("images"), log="memory", epoch="benchmark"), MemoryQuotas())
    recorder = Recorder(log, now, ENTROPY, images, lambda name: f"http://localhost:3000/images/{name}")

    async def edit(user: int) -> None:
        generation = Generation(f"edit_1763829000123_{ENTROPY.token()}", "edit", f"u{user}", REQUEST)
        generation = await recorder.start(generation, START)
        for status, fields in STEPS:
            generation = await recorder.move(generation, status, fields)
        await asyncio.sleep(0)  # Lets the loop drop the timeouts of the appends.

    await edit(0)
    gc.collect()
    before, generations = resident(), max(events // (len(STEPS) + 1), 1)
    for number in range(generations):
        await edit(number % 1_000)
    gc.collect()
    used = resident() - before
    found = [each for user in range(1_000) for each in await log.generations(f"u{user}", limit=events)]
    histories = [await log.generation(each.generation_id) for each in found]  # `found` has not all events.
    sizes = [len(entry.event or b"") for history in histories if history for entry in history.events]
    control.say(memory=used / len(sizes), json=sum(sizes) / len(sizes))


def resident() -> int:
    """The resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def appends(user_id: str) -> Iterator[Append]:
    """What one user's edits append, one after the other."""
    while True:
        generation_id = f"edit_1763829000123_{ENTROPY.token()}"
        statuses = ["started", *(status for status, _ in STEPS)]
        for sequence, status in enumerate(statuses, 1):
            at = now()
            event = Event(
                generation_id=generation_id,
                kind="edit",
                sequence=sequence,
                status=status,
                message="OpenAI image editing started...",
                progress=60,
                occurred_at=timestamp(at),
                composition_url=f"http://localhost:3000/images/{'c' * 60}.png",
            )
            yield Append(
                user_id,
                generation_id,
                sequence,
                ENTROPY.event_id(),
                encode(event),
                event_name(status),
                at,
                credit={1: -1, len(statuses): 0}.get(sequence),
                terminal=sequence == len(statuses),
                start=START if sequence == 1 else None,
            )


async def sqlite(seconds: float) -> None:
    """Append with the log of a file."""
    collect_less()
    database = Database(Path("log.db"), epoch="benchmark")
    log = SqliteLog(database, credits=10**9, clock=now)
    count, end = 0, time.monotonic() + seconds

    async def write(user_id: str) -> None:
        nonlocal count
        for entry in appends(user_id):
            if time.monotonic() > end:
                return
            await log.append(entry)
            count += 1

    await asyncio.gather(*(write(f"u{user}") for user in range(WRITERS)))
    control.say(per_second=count / seconds)
    await database.close()


async def rows(seconds: float) -> None:
    """Write what the log would, as fast as SQLite can."""
    collect_less()
    await Database(Path("log.db"), epoch="benchmark").close()  # Creates the tables.
    connection = sqlite3.connect("log.db", isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    writers = [appends(f"u{user}") for user in range(WRITERS)]
    heads, generations, numbers = [0] * WRITERS, [0] * WRITERS, 0
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        connection.execute("BEGIN IMMEDIATE")
        for user, writer in enumerate(writers):
            entry = next(writer)
            position = heads[user] = heads[user] + 1
            if position == 1:
                connection.execute("INSERT INTO users VALUES (?, ?, 1000, 1, 0, 0)", (user + 1, entry.user_id))
            else:
                connection.execute("UPDATE users SET head = ?, credit = ? WHERE id = ?", (position, 1_000, user + 1))
            if start := entry.start:
                numbers += 1
                generations[user] = numbers
                connection.execute(
                    "INSERT INTO generations (id, generation_id, owner, kind, order_json, fingerprint, reserved,"
                    " first_position) VALUES (?, ?, ?, ?, ?, ?, 1, ?)",
                    (numbers, entry.generation_id, user + 1, start.kind, start.request, start.fingerprint, position),
                )
            inserted = connection.execute(
                "INSERT INTO events (owner, position, generation, sequence, event_id, name, event)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (user + 1, position, generations[user], entry.sequence, entry.event_id, entry.name, entry.event),
            )
            if entry.terminal:
                connection.execute(
                    "UPDATE generations SET end_position = ?, ended_at = ?, end_event = ? WHERE id = ?",
                    (position, int(entry.at.timestamp() * 1e6), inserted.lastrowid, generations[user]),
                )
        connection.execute("COMMIT")
        count += WRITERS
    control.say(per_second=count / seconds)
    connection.close()


if __name__ == "__main__":
    what, amount = sys.argv[1:]
    if what == "memory":
        asyncio.run(memory(int(amount)))
    else:
        run(partial(sqlite if what == "sqlite" else rows, float(amount)))
