"""The seam between the past and the live: at any interleaving, each device gets everything once, in order."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from engineio.packet import Packet

from adapters.memory_log import MemoryLog
from adapters.realtime.socketio_projection import Device, Projection
from adapters.system import SystemEntropy, now
from domain.feed import Cursor, Feed, Logged, feed_name
from domain.feed_sessions import Beginning
from domain.ports import Append, Deliver, History, Lost, Start
from domain.quarantine import Quarantine
from domain.recorder import Recorder

ROUNDS = 2_500
FEED = feed_name("e", "u")
NOW = datetime(2026, 11, 22, tzinfo=UTC)


class LaggingLog(MemoryLog):
    """The memory log as it would look over a network: reads take time, and followers hear of entries late."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(epoch="e", credits=None, clock=lambda: NOW)
        self.chance = chance
        self.announced: asyncio.Queue[Logged | Lost] = asyncio.Queue()

    async def lag(self) -> None:
        for _ in range(self.chance.randrange(4)):
            await asyncio.sleep(0)

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        await self.lag()
        feed = await super().feed(user_id, after=after, anchor=anchor, limit=min(limit, self.chance.randint(1, 6)))
        await self.lag()
        return feed

    async def generation(self, generation_id: str) -> History | None:
        await self.lag()
        history = await super().generation(generation_id)
        await self.lag()
        return history

    async def present(self, user_id: str) -> Cursor:
        await self.lag()
        cursor = await super().present(user_id)
        await self.lag()
        return cursor

    @asynccontextmanager
    async def follow(self, deliver: Deliver) -> AsyncIterator[None]:
        async def tell() -> None:
            while True:
                entry = await self.announced.get()
                await self.lag()
                if self.chance.random() < 0.05:
                    entry = Lost()  # What it stood for has to be read.
                deliver(entry)
                self.announced.task_done()

        async with super().follow(self.announced.put_nowait):
            task = asyncio.create_task(tell())
            try:
                yield
            finally:
                task.cancel()


@dataclass
class Reader:
    """A client that reads now and then, and remembers the last cursor it saw."""

    chance: random.Random
    room: int
    waiting: list[Packet] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: bool = False

    def has_room(self, frame: Packet) -> bool:
        return len(self.waiting) < self.room

    def put(self, frame: Packet) -> None:
        assert len(self.waiting) < self.room, "more was put than there is room for"
        self.waiting.append(frame)

    async def drained(self, *, events: int = 1, size: int = 0) -> bool:
        while len(self.waiting) > events:
            self.moved.clear()
            await self.moved.wait()
        return True

    def abort(self) -> None:
        self.aborted = True

    def read(self) -> None:
        for frame in self.waiting:
            assert isinstance(frame.data, str)
            _, event, cursor = json.loads(frame.data[1:])
            self.events.append(event)
            self.cursors.append(cursor)
        self.waiting.clear()
        self.moved.set()

    async def read_on(self) -> None:
        while True:
            for _ in range(self.chance.randrange(6)):
                await asyncio.sleep(0)
            self.read()
            await asyncio.sleep(0)


def append_for(generation_id: str, sequence: int, terminal: bool, chance: random.Random) -> Append:
    event = json.dumps({"generationId": generation_id, "sequence": sequence}).encode()
    name = "generation_completed" if terminal else "continue" if sequence > 1 else "generation_started"
    start = Start("edit", b"{}", None, "", 1000) if sequence == 1 else None
    return Append(
        "u", generation_id, sequence, chance.getrandbits(63), event, name, NOW, terminal=terminal, start=start
    )


async def write(log: LaggingLog, generation_id: str, length: int) -> None:
    for sequence in range(1, length + 1):
        await log.append(append_for(generation_id, sequence, sequence == length, log.chance))
        await log.lag()


async def attach(projection: Projection, reader: Reader, text: str | None) -> tuple[Device, Cursor]:
    log = projection.log
    cursor = Cursor.parse(text, FEED) or await log.present("u")
    device = projection.attach("u", reader, Beginning(cursor, text is not None, cursor.live, "t"), inline=False)
    await asyncio.sleep(0)
    device.start()
    return device, cursor


def wanted(history: History, base: Cursor) -> list[int]:
    """The sequences that a device based here is to be sent of a generation that has ended."""
    return [
        entry.sequence
        for entry in history.events
        if entry.position > base.live or (entry.position > base.seen and (entry.end or 0) > base.live)
    ]


def received(reader: Reader, generation_id: str) -> list[int]:
    return [event["sequence"] for event in reader.events if event["generationId"] == generation_id]


async def play(seed: int) -> int:
    """One round: writers, devices that come, go and come back, and readers of every speed. Returns events checked."""
    chance = random.Random(seed)
    log = LaggingLog(chance)
    projection = Projection(log, Quarantine(Recorder(log, now, SystemEntropy())))
    follower = asyncio.create_task(projection.run())
    lengths = {f"edit_1_{number}": chance.randint(2, 9) for number in range(chance.randint(1, 4))}
    before = {name: lengths[name] for name in list(lengths)[: chance.randrange(2)]}
    for name, length in before.items():
        await write(log, name, length)
    writers = [asyncio.create_task(write(log, name, length)) for name, length in lengths.items() if name not in before]
    sessions: list[tuple[Reader, Device, Cursor]] = []
    tasks: list[asyncio.Task[None]] = []
    for _ in range(chance.randint(1, 3)):
        text = None
        for _ in range(chance.randint(1, 3)):  # The same person, coming back with the last cursor.
            await log.lag()
            reader = Reader(chance, room=chance.randint(2, 8))
            tasks.append(asyncio.create_task(reader.read_on()))
            device, base = await attach(projection, reader, text)
            assert text is None or text.startswith(base.text(FEED))
            sessions.append((reader, device, base))
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                break
            device.close()
            reader.waiting.clear()  # Lost with the connection.
            text = reader.cursors[-1] if reader.cursors else text or base.text(FEED)
    await asyncio.gather(*writers)
    await log.announced.join()
    checked = 0
    for reader, device, base in sessions:
        stayed = device in projection.rooms.get("u", set())
        if stayed:
            await device.settled()
            reader.read()
        assert not reader.aborted
        for name in lengths:
            history = await log.generation(name)
            assert history is not None
            got, due = received(reader, name), wanted(history, base)
            assert got == (due if stayed else due[: len(got)]), (seed, name, base)
        checked += len(reader.events)
        device.close()
    for task in [*tasks, follower]:
        task.cancel()
    await asyncio.gather(*tasks, follower, return_exceptions=True)
    assert projection.rooms == {}
    return checked


@pytest.mark.parametrize("part", range(4))
async def test_no_interleaving_of_past_and_live_leaves_a_gap_or_a_duplicate(part: int) -> None:
    checked = 0
    for seed in range(part * ROUNDS // 4, (part + 1) * ROUNDS // 4):
        checked += await play(seed)
    assert checked > ROUNDS  # The rounds are not empty.
