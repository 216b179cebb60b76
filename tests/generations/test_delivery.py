"""The seam between history and live events: at any interleaving, each device gets every event once, in order.

Without a network: the send buffer and the encoders are the smallest that fulfil their ports, or those of event streams.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest

from adapters.memory.log import MemoryLog
from adapters.realtime import send_buffer
from adapters.realtime.send_buffer import BoundedSendBuffer
from api.sse.blocks import CURSOR_AS_ID, SEQUENCE_AS_ID
from domain.delivery import Hub
from domain.device import Device
from domain.feed import Cursor, Feed, Logged, feed_name
from domain.feed_sessions import StartPosition
from domain.ports.log import Append, Deliver, Gap, History, Notice, Start
from domain.quarantine import Quarantine
from support.doubles import plain_recorder

ROUNDS = 300
FEED = feed_name("e", "u")
NOW = datetime(2026, 11, 22, tzinfo=UTC)


class LaggingLog(MemoryLog):
    """The memory log as it would look over a network: reads take time, and entries reach the follower late."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(epoch="e", credits=None, clock=lambda: NOW)
        self.chance = chance
        self.announced: asyncio.Queue[Notice] = asyncio.Queue()

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

    async def head_cursor(self, user_id: str) -> Cursor:
        await self.lag()
        cursor = await super().head_cursor(user_id)
        await self.lag()
        return cursor

    @asynccontextmanager
    async def follow(self, deliver: Deliver) -> AsyncIterator[None]:
        async def announce() -> None:
            while True:
                entry = await self.announced.get()
                await self.lag()
                if self.chance.random() < 0.05:
                    entry = Gap()  # The entry it replaces must be read from the log.
                deliver(entry)
                self.announced.task_done()

        async with super().follow(self.announced.put_nowait):
            task = asyncio.create_task(announce())
            try:
                yield
            finally:
                task.cancel()


class Frame(NamedTuple):
    """A frame of the simplest form."""

    entry: Logged
    cursor: str


class Plain:
    """The simplest encoder. It counts the calls, and can fail."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.encoded: list[int] = []
        self.fails_at = fails_at

    def event(self, entry: Logged, cursor: str) -> Frame:
        self.encoded.append(entry.position)
        if entry.position == self.fails_at:
            raise ValueError
        return Frame(entry, cursor)

    def announcement(self, name: str, data: bytes) -> Frame:
        raise NotImplementedError


PLAIN = Plain()


@dataclass
class Reader:
    """The send buffer of a client that reads now and then, and remembers the last cursor it saw."""

    chance: random.Random
    room: int
    waiting: list[Frame] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False
    aborted: bool = False

    def offer(self, frame: Frame) -> bool:
        if len(self.waiting) >= self.room:
            return False
        self.waiting.append(frame)
        return True

    async def drained(self) -> bool:
        await self.at_most(1)
        return True

    async def flushed(self) -> None:
        await self.at_most(0)

    async def at_most(self, count: int) -> None:
        while len(self.waiting) > count:
            self.moved.clear()
            await self.moved.wait()

    def finish(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    @property
    def buffer(self) -> "Reader":
        return self

    def drop(self) -> None:
        """Lose what waits, with the connection."""
        self.waiting.clear()

    async def read(self) -> None:
        for frame in self.waiting:
            assert frame.entry.event is not None
            self.events.append(json.loads(frame.entry.event))
            self.cursors.append(frame.cursor)
        self.waiting.clear()
        self.moved.set()


@dataclass
class StreamReader:
    """The client of an event stream, which reads now and then and remembers the last id. Its buffer is the real one."""

    chance: random.Random
    events: list[dict[str, Any]] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)
    aborted: bool = False

    def __post_init__(self) -> None:
        self.buffer = BoundedSendBuffer[bytes](len, self.abort)

    def abort(self) -> None:
        self.aborted = True

    def drop(self) -> None:
        self.buffer.clear()

    async def read(self) -> None:
        while len(self.buffer):
            for block in await self.buffer.take(self.chance.randint(1, 3)):
                name, cursor, data, *end = block.decode().split("\n")
                assert (name[:7], end) == ("event: ", ["", ""])
                self.cursors.append(cursor.removeprefix("id: "))
                self.events.append(json.loads(data.removeprefix("data: ")))


async def read_on(reader: Reader | StreamReader) -> None:
    while True:
        for _ in range(reader.chance.randrange(6)):
            await asyncio.sleep(0)
        await reader.read()
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


async def join(hub: Hub, log: MemoryLog, reader: Reader | StreamReader, text: str | None) -> tuple[Device[Any], Cursor]:
    cursor = Cursor.parse(text, FEED) or await log.head_cursor("u")
    start = StartPosition(cursor, text is not None, cursor.live, "t")
    if isinstance(reader, Reader):
        device: Device[Any] = hub.join("u", reader, PLAIN, start)
    else:
        device = hub.join("u", reader.buffer, CURSOR_AS_ID, start)
    await asyncio.sleep(0)
    device.start()
    return device, cursor


def wanted(history: History, base: Cursor) -> list[int]:
    """The sequences of a finished generation that a device with this base must be sent."""
    return [
        entry.sequence
        for entry in history.events
        if entry.position > base.live or (entry.position > base.seen and (entry.end or 0) > base.live)
    ]


def received(reader: Reader | StreamReader, generation_id: str) -> list[int]:
    return [event["sequence"] for event in reader.events if event["generationId"] == generation_id]


async def play(seed: int, form: type[Reader | StreamReader]) -> int:
    """One round: writers, devices that connect, leave and return, readers of every speed. Returns events checked."""
    chance = random.Random(seed)
    log = LaggingLog(chance)
    hub = Hub(log, Quarantine(plain_recorder(log)))
    follower = asyncio.create_task(hub.run())
    lengths = {f"edit_1_{number}": chance.randint(2, 9) for number in range(chance.randint(1, 4))}
    before = {name: lengths[name] for name in list(lengths)[: chance.randrange(2)]}
    for name, length in before.items():
        await write(log, name, length)
    writers = [asyncio.create_task(write(log, name, length)) for name, length in lengths.items() if name not in before]
    sessions: list[tuple[Reader | StreamReader, Device[Any], Cursor]] = []
    tasks: list[asyncio.Task[None]] = []
    for _ in range(chance.randint(1, 3)):
        text = None
        for _ in range(chance.randint(1, 3)):  # The same client, returning with its last cursor.
            await log.lag()
            reader = Reader(chance, room=chance.randint(2, 8)) if form is Reader else StreamReader(chance)
            tasks.append(asyncio.create_task(read_on(reader)))
            device, base = await join(hub, log, reader, text)
            assert text is None or text.startswith(base.text(FEED))
            sessions.append((reader, device, base))
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                break
            device.close()
            reader.drop()
            text = reader.cursors[-1] if reader.cursors else text or base.text(FEED)
    await asyncio.gather(*writers)
    await log.announced.join()
    checked = 0
    for reader, device, base in sessions:
        stayed = device in hub.rooms.get("u", set())
        if stayed:
            await device.flushed()
            await reader.read()
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
    assert hub.rooms == {}
    return checked


async def play_streams_of_one(seed: int) -> int:
    """One round: streams of one generation each, whose clients leave and return with the last sequence they saw."""
    chance = random.Random(seed)
    log = LaggingLog(chance)
    hub = Hub(log, Quarantine(plain_recorder(log)))
    tasks = [asyncio.create_task(hub.run())]
    lengths = {f"edit_1_{number}": chance.randint(2, 9) for number in range(chance.randint(1, 3))}
    writers = [asyncio.create_task(write(log, name, length)) for name, length in lengths.items()]
    checked = 0

    async def client(name: str) -> None:
        nonlocal checked
        while await log.generation(name) is None:
            await log.lag()
        after, stays = chance.choice([0, chance.randrange(11)]), False
        while not stays:
            stays = chance.random() < 0.5
            reader = StreamReader(chance)
            reading = asyncio.create_task(read_on(reader))
            device = hub.join_generation("u", reader.buffer, SEQUENCE_AS_ID, name, after)
            await asyncio.sleep(0)
            device.start()
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            while stays and not (reader.buffer.closed and len(reader.buffer) == 0):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
            device.close()
            due = list(range(after + 1, lengths[name] + 1))
            got = received(reader, name)
            assert got == (due if stays else due[: len(got)]), (seed, name, after)
            assert [event["generationId"] for event in reader.events] == [name] * len(got)
            assert not reader.aborted
            checked += len(got)
            after = int(reader.cursors[-1]) if reader.cursors else after

    async with asyncio.timeout(30):
        await asyncio.gather(*writers, *(client(chance.choice([*lengths])) for _ in range(chance.randint(1, 4))))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert hub.rooms == {}
    return checked


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few events, so that they are full at times."""
    monkeypatch.setattr(send_buffer, "MAX_EVENTS", 4)
    monkeypatch.setattr(send_buffer, "_LOW_EVENTS", 2)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize(
    ("form", "part"),
    [
        *((Reader, part) for part in range(4)),
        *((StreamReader, part) for part in (4, 5)),
        *(pytest.param(form, part, marks=pytest.mark.long) for form in (Reader, StreamReader) for part in range(6, 20)),
    ],
)
async def test_no_interleaving_of_past_and_live_leaves_a_gap_or_a_duplicate(
    form: type[Reader | StreamReader], part: int
) -> None:
    checked = 0
    for seed in range(part * ROUNDS, (part + 1) * ROUNDS):
        checked += await play(seed, form)
    assert checked > ROUNDS  # The rounds are not empty.


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("part", range(2))
async def test_no_interleaving_leaves_a_gap_or_a_duplicate_in_the_stream_of_one_generation(part: int) -> None:
    checked = 0
    for seed in range(part * ROUNDS, (part + 1) * ROUNDS):
        checked += await play_streams_of_one(seed)
    assert checked > ROUNDS


@asynccontextmanager
async def following(*readers: tuple[Reader, Plain]) -> AsyncIterator[MemoryLog]:
    """A log whose hub has these devices, all live. In the end each has taken everything."""
    log = MemoryLog(epoch="e", credits=None, clock=lambda: NOW)
    hub = Hub(log, Quarantine(plain_recorder(log)))
    running = asyncio.create_task(hub.run())
    cursor = await log.head_cursor("u")
    devices = [hub.join("u", reader, encoder, StartPosition(cursor, False, 0, None)) for reader, encoder in readers]
    for device in devices:
        device.start()
        await device.flushed()
    yield log
    for device, (reader, _) in zip(devices, readers, strict=True):
        await reader.read()
        await device.flushed()
        device.close()
    running.cancel()
    await asyncio.wait([running])
    assert hub.rooms == {}


async def append(log: MemoryLog, generation_id: str, sequence: int) -> None:
    await log.append(append_for(generation_id, sequence, False, random.Random(f"{generation_id} {sequence}")))


async def test_a_live_entry_is_encoded_once_per_form_for_all_devices() -> None:
    one, other = Plain(), Plain()
    readers = [(Reader(random.Random(0), room=8), encoder) for encoder in (one, other, one, other, one)]
    async with following(*readers) as log:
        for sequence in (1, 2, 3):
            await append(log, "edit_1_0", sequence)
        for reader, _encoder in readers:
            while len(reader.waiting) < 3:
                await asyncio.sleep(0)
    assert one.encoded == other.encoded == [1, 2, 3]
    assert [reader.events for reader, _ in readers] == [readers[0][0].events] * 5


async def test_an_entry_that_cannot_be_encoded_sets_its_generation_aside_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reader = Reader(random.Random(0), room=8)
    async with following((reader, Plain(fails_at=2))) as log:
        await append(log, "edit_1_0", 1)
        await append(log, "edit_1_0", 2)
        await append(log, "edit_1_1", 1)
        while len(reader.waiting) < 3:
            await asyncio.sleep(0)
    assert "generation edit_1_0 is set aside" in caplog.text
    seen = [(event["generationId"], event["sequence"]) for event in reader.events]
    assert seen == [("edit_1_0", 1), ("edit_1_1", 1), ("edit_1_0", 3)]  # The last one ends it.
    assert not reader.aborted


@pytest.mark.usefixtures("small_buffers")
async def test_the_stream_of_a_generation_that_is_removed_before_its_end_was_sent_ends() -> None:
    reader = StreamReader(random.Random(0))
    async with following() as log:
        for sequence in range(1, 8):
            await append(log, "edit_1_0", sequence)
        hub = Hub(
            log,
            Quarantine(plain_recorder(log)),
        )
        device = hub.join_generation("u", reader.buffer, SEQUENCE_AS_ID, "edit_1_0", 0)
        device.start()
        while len(reader.buffer) < 4:
            await asyncio.sleep(0)
        await log.append(append_for("edit_1_0", 8, True, random.Random(0)))
        await log.remove("edit_1_0", retention=False)
        while not reader.buffer.closed:
            await reader.read()
            await asyncio.sleep(0)
        device.close()
    assert received(reader, "edit_1_0") == [1, 2, 3, 4]
    assert not reader.aborted
