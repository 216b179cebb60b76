"""Announcements: events that are not in the log, such as the removal of a generation."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from adapters.memory.log import MemoryLog
from adapters.realtime import send_buffer
from adapters.realtime.send_buffer import BoundedSendBuffer
from api.sse.blocks import CURSOR_AS_ID, SEQUENCE_AS_ID
from domain.delivery import Hub
from domain.device import Device
from domain.feed import Feed
from domain.feed_sessions import StartPosition
from domain.ports.log import Append, History, Start
from domain.quarantine import Quarantine
from support.doubles import plain_recorder

NOW = datetime(2026, 11, 22, tzinfo=UTC)
ID = "edit_1_0"


class SlowLog(MemoryLog):
    """A memory log whose reads take a few turns of the event loop."""

    def __init__(self, chance: random.Random | None = None) -> None:
        super().__init__(epoch="e", credits=None, clock=lambda: NOW)
        self.chance = chance

    async def lag(self) -> None:
        for _ in range(self.chance.randrange(4) if self.chance else 0):
            await asyncio.sleep(0)

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        await self.lag()
        feed = await super().feed(user_id, after=after, anchor=anchor, limit=limit)
        await self.lag()
        return feed

    async def generation(self, generation_id: str) -> History | None:
        await self.lag()
        history = await super().generation(generation_id)
        await self.lag()
        return history


async def write(log: SlowLog, length: int, generation_id: str = ID) -> None:
    for sequence in range(1, length + 1):
        last = sequence == length
        start = Start("edit", b"{}", None, "", 1000) if sequence == 1 else None
        event = json.dumps({"generationId": generation_id, "sequence": sequence}).encode()
        name = "generation_completed" if last else "continue" if sequence > 1 else "generation_started"
        chance = random.Random(f"{generation_id} {sequence}")
        await log.append(
            Append("u", generation_id, sequence, chance.getrandbits(63), event, name, NOW, terminal=last, start=start)
        )
        await log.lag()


class Client:
    """The client of an event stream."""

    def __init__(self) -> None:
        self.buffer = BoundedSendBuffer[bytes](len, self._abort)
        self.aborted = False
        #: The name, id and data of each event.
        self.events: list[tuple[str, str, dict[str, Any]]] = []

    def _abort(self) -> None:
        self.aborted = True

    async def read(self) -> None:
        while len(self.buffer):
            for block in await self.buffer.take(64):
                fields = dict(line.split(": ", 1) for line in block.decode().splitlines() if line)
                self.events.append((fields["event"], fields.get("id", ""), json.loads(fields["data"])))

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.events]


@asynccontextmanager
async def serving(log: SlowLog) -> AsyncIterator[Hub]:
    hub = Hub(log, Quarantine(plain_recorder(log)))
    follower = asyncio.create_task(hub.run())
    await asyncio.sleep(0)
    yield hub
    follower.cancel()
    await asyncio.wait([follower])


async def join(hub: Hub, log: SlowLog, client: Client) -> Device[bytes]:
    cursor = await log.head_cursor("u")
    return hub.join("u", client.buffer, CURSOR_AS_ID, StartPosition(cursor, False, cursor.live, None))


@pytest.mark.parametrize("part", range(2))
async def test_a_removal_is_announced_after_the_events_or_in_place_of_them(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_buffer, "MAX_EVENTS", 6)
    monkeypatch.setattr(send_buffer, "_LOW_EVENTS", 3)
    announced = 0
    for seed in range(part * 500, (part + 1) * 500):
        chance = random.Random(seed)
        log, client = SlowLog(chance), Client()
        async with serving(log) as hub:
            writing = asyncio.create_task(write(log, 5))
            for _ in range(chance.randrange(30)):
                await asyncio.sleep(0)
            device = await join(hub, log, client)
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            device.start()
            for _ in range(chance.randrange(3)):
                device.replay(ID, chance.choice([None, 0, 2]))
            removing = asyncio.create_task(remove(log, writing, chance))
            reading = asyncio.create_task(read_on(client, chance))
            await removing
            await device.flushed()
            reading.cancel()
            await asyncio.wait([reading])
            await client.read()
            device.close()
        names = client.names
        announced += "generation_removed" in names
        assert "generation_removed" not in names[:-1], (seed, names)
    assert announced > 250


async def read_on(client: Client, chance: random.Random) -> None:
    while True:
        for _ in range(chance.randrange(9)):
            await asyncio.sleep(0)
        await client.read()


async def remove(log: SlowLog, writing: "asyncio.Task[None]", chance: random.Random) -> None:
    await writing
    for _ in range(chance.randrange(6)):
        await asyncio.sleep(0)
    assert await log.remove(ID, retention=chance.random() < 0.5)


async def test_an_announcement_has_no_cursor_and_reaches_only_its_user() -> None:
    log, client, other = SlowLog(), Client(), Client()
    async with serving(log) as hub:
        device = await join(hub, log, client)
        foreign = hub.join("v", other.buffer, CURSOR_AS_ID, StartPosition(await log.head_cursor("v"), False, 0, None))
        device.start()
        foreign.start()
        await device.flushed()
        hub.announce("u", "queue_position", {"generationId": ID, "queuePosition": 3})
        await client.read()
        await other.read()
        assert client.events == [("queue_position", "", {"generationId": ID, "queuePosition": 3})]
        assert other.events == []
        device.close()
        foreign.close()


async def test_nothing_is_announced_before_a_device_has_started() -> None:
    log, client = SlowLog(), Client()
    async with serving(log) as hub:
        device = await join(hub, log, client)
        hub.announce("u", "queue_position", {"queuePosition": 1})
        assert len(client.buffer) == 0
        device.start()
        await asyncio.sleep(0)
        await client.read()
        assert client.names == ["queue_position"]
        device.close()


async def test_of_the_positions_announced_while_a_device_reads_the_log_only_the_last_is_sent() -> None:
    log, client = SlowLog(), Client()
    async with serving(log) as hub:
        device = await join(hub, log, client)
        for position in (3, 2, 1):
            for each in (ID, "edit_1_1"):
                data = {"generationId": each, "queuePosition": position}
                hub.announce("u", "queue_position", data, waits=each)
        device.start()
        while not client.events:
            await asyncio.sleep(0)
            await client.read()
        assert [(data["generationId"], data["queuePosition"]) for _, _, data in client.events] == [
            (ID, 1),
            ("edit_1_1", 1),
        ]
        device.close()


async def test_announcements_are_dropped_for_a_client_whose_buffer_is_full() -> None:
    log, client = SlowLog(), Client()
    async with serving(log) as hub:
        device = await join(hub, log, client)
        device.start()
        await device.flushed()
        for _ in range(send_buffer.MAX_EVENTS + 50):
            hub.announce("u", "queue_position", {"queuePosition": 1})
        assert len(client.buffer) == send_buffer.MAX_EVENTS
        await client.read()
        hub.announce("u", "queue_position", {"queuePosition": 2})
        await client.read()
        assert client.events[-1][2] == {"queuePosition": 2}
        assert len(client.events) == send_buffer.MAX_EVENTS + 1
        assert not client.aborted
        device.close()


async def test_nothing_is_announced_in_the_stream_of_one_generation() -> None:
    log, client = SlowLog(), Client()
    async with serving(log) as hub:
        await write(log, 3)
        await write(log, 3, "edit_1_1")
        device = hub.join_generation("u", client.buffer, SEQUENCE_AS_ID, ID, 0)
        hub.announce("u", "queue_position", {"queuePosition": 1})
        device.start()
        hub.announce("u", "queue_position", {"queuePosition": 1})
        await log.remove("edit_1_1", retention=False)
        await device.flushed()
        await client.read()
        assert client.names == ["generation_started", "continue", "generation_completed"]
        assert client.buffer.closed
        device.close()
