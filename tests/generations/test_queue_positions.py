"""The announcement of places in line: what devices are told is the order in which generations are claimed."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.realtime.send_buffer import MAX_EVENTS, BoundedSendBuffer
from api.sse.blocks import CURSOR_AS_ID
from domain import queue_positions
from domain.delivery import Hub
from domain.device import Device
from domain.feed import Feed
from domain.feed_sessions import StartPosition
from domain.generation import Snapshot
from domain.ports.leases import Leases
from domain.ports.log import Gap, Removed
from domain.queue_positions import QueuePositions
from domain.rehydrate import generation_of
from support.builders import PROPERTY, WholeLog
from support.doubles import FACE_URL, ForwardingLog, InMemoryBackend, advance_time, start_arguments
from support.nodes import Cluster, NodeLeases

USERS = ("ada", "bob", "cy")


class Watcher:
    """A device of one user, which reads all that it is sent."""

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        self.buffer = BoundedSendBuffer[bytes](len, lambda: None)
        self.device: Device[bytes] | None = None
        #: Each position it was sent, and the place of each generation as its client knows it.
        self.sent: list[tuple[str, int]] = []
        self.known: dict[str, int] = {}

    async def join(self, backend: InMemoryBackend, hub: Hub) -> None:
        start = StartPosition(await backend.log.head_cursor(self.user_id), False, 0, None)
        self.device = hub.join(self.user_id, self.buffer, CURSOR_AS_ID, start)
        self.device.start()

    async def read(self) -> None:
        while len(self.buffer):
            for block in await self.buffer.take(64):
                fields = dict(line.split(": ", 1) for line in block.decode().splitlines() if line)
                data = json.loads(fields["data"])
                generation_id = data["generationId"]
                if fields["event"] == "queue_position":
                    assert "id" not in fields
                    self.sent.append((generation_id, data["queuePosition"]))
                    self.known[generation_id] = data["queuePosition"]
                elif data["sequence"] > 1:
                    self.known.pop(generation_id, None)


class Line:
    """A backend without a runner: the test claims what waits."""

    def __init__(self, leases: Leases | None = None, through: Callable[[WholeLog], WholeLog] = lambda log: log) -> None:
        self.backend = InMemoryBackend(credits=None, shared_leases=leases, line=through)
        self.hub = Hub(self.backend.log, self.backend.quarantine)
        self.positions = QueuePositions(self.backend.log, self.backend.leases, self.hub)
        self.watchers = [Watcher(user_id) for user_id in USERS]

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Line"]:
        for watcher in self.watchers:
            await watcher.join(self.backend, self.hub)
        tasks = [asyncio.create_task(self.hub.run()), asyncio.create_task(self.positions.run())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def claim(self) -> str:
        """Claim the next one, and move it on as a worker does."""
        generation_id = await self.backend.leases.claim()
        history = await self.backend.log.generation(generation_id)
        assert history is not None
        await self.backend.recorder.move(generation_of(history), "composition", {}, free=False)
        return generation_id

    async def received(self) -> dict[str, int]:
        """Wait for the next announcement; the places that the devices know."""
        await advance_time(queue_positions._PAUSE)
        known = dict[str, int]()
        for watcher in self.watchers:
            await watcher.read()
            known |= watcher.known
        return known


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_positions, "_PAUSE", 0)


@pytest.mark.usefixtures("at_once")
@PROPERTY
@given(
    st.lists(st.tuples(st.sampled_from(["start", "start", "claim", "cancel"]), st.integers(0, 11)), max_size=12),
    st.booleans(),
)
def test_the_positions_that_devices_are_told_are_the_order_of_the_claims(
    steps: list[tuple[str, int]], shared: bool
) -> None:
    async def run() -> None:
        async with Line(NodeLeases(Cluster()) if shared else None).open() as line:
            waiting: dict[str, Snapshot] = {}

            async def known() -> dict[str, int]:
                for _ in range(8):
                    await asyncio.sleep(0)
                places = dict[str, int]()
                for watcher in line.watchers:
                    await watcher.read()
                    assert all(waiting[each].user_id == watcher.user_id for each in watcher.known)
                    places |= watcher.known
                assert sorted(places.values()) == [*range(1, len(waiting) + 1)]
                for each, place in places.items():
                    shown = await line.backend.workflow.snapshot(waiting[each].user_id, each)
                    assert shown.queue_position == place
                return places

            for step, number in steps:
                places = await known()
                match step:
                    case "start":
                        begun = await line.backend.start(start_arguments(), USERS[number % 3])
                        waiting[begun.generation_id] = begun
                    case "claim" if waiting:
                        claimed = await line.claim()
                        assert places[claimed] == 1
                        ended = waiting.pop(claimed)
                        shown = await line.backend.workflow.snapshot(ended.user_id, claimed)
                        assert shown.queue_position is None
                    case "cancel" if waiting:
                        cancelled = waiting.pop(list(waiting)[number % len(waiting)])
                        await line.backend.cancel(cancelled)
            places = await known()
            order = [await line.claim() for _ in places]
            assert order == sorted(places, key=places.__getitem__)
            for each in order:
                del waiting[each]
            assert await known() == {}

    asyncio.run(run())


async def test_a_position_is_sent_only_when_it_changes_and_at_most_once_a_second() -> None:
    async with Line().open() as line:
        ids = [(await line.backend.start(start_arguments(), "ada")).generation_id for _ in range(3)]
        assert await line.received() == {ids[0]: 1, ids[1]: 2, ids[2]: 3}
        ada = line.watchers[0]
        assert len(ada.sent) == 3
        await line.received()
        await line.received()
        assert len(ada.sent) == 3
        assert [await line.claim(), await line.claim()] == ids[:2]
        for _ in range(20):
            await asyncio.sleep(0)
        await ada.read()
        assert len(ada.sent) == 3
        assert await line.received() == {ids[2]: 1}
        assert ada.sent[3:] == [(ids[2], 1)]
        assert queue_positions._PAUSE > 1


async def test_external_generations_have_no_position() -> None:
    async with Line().open() as line:
        begun = await line.backend.start(start_arguments(external=True))
        assert begun.queue_position is None
        assert (await line.backend.workflow.snapshot("ada", begun.generation_id)).queue_position is None
        assert await line.received() == {}


async def test_what_is_fetched_for_has_no_position_but_keeps_its_place_before_the_others() -> None:
    async with Line().open() as line:
        backend, leases = line.backend, line.backend.leases
        fetched = (await backend.start(start_arguments(image_urls=(FACE_URL,)), "ada")).generation_id
        assert await line.received() == {fetched: 1}
        assert await leases.claim(fetching=True) == fetched
        history = await backend.log.generation(fetched)
        assert history is not None
        await backend.recorder.move(generation_of(history), "composition", {}, free=False)
        await leases.offer("ada", fetched)
        waits = (await backend.start(start_arguments(), "bob")).generation_id
        assert await line.received() == {waits: 2}
        assert (await backend.workflow.snapshot("ada", fetched)).queue_position is None
        assert await leases.claim() == fetched
        assert await line.received() == {waits: 1}


async def test_positions_are_known_again_after_entries_were_missed() -> None:
    async with Line().open() as line:
        ids = [(await line.backend.start(start_arguments(), "ada")).generation_id for _ in range(3)]
        before = await line.received()
        line.positions._notice(Gap())
        assert await line.received() == before
        assert len(line.watchers[0].sent) == 3
        await line.claim()
        assert await line.received() == {ids[1]: 1, ids[2]: 2}


async def test_what_waited_before_the_service_started_has_its_position_announced() -> None:
    line = Line()
    begun = await line.backend.start(start_arguments(), "ada")
    async with line.open():
        await line.received()
        assert line.watchers[0].sent == [(begun.generation_id, 1)]


async def test_a_device_with_a_full_buffer_gets_no_position_and_others_do() -> None:
    async with Line().open() as line:
        slow, other = line.watchers[0], Watcher("ada")
        await other.join(line.backend, line.hub)
        first = (await line.backend.start(start_arguments(), "ada")).generation_id
        second = (await line.backend.start(start_arguments(), "ada")).generation_id
        await line.received()
        while slow.buffer.offer(b'event: x\ndata: {"generationId":"x","sequence":1}\n\n'):
            pass
        assert len(slow.buffer) == MAX_EVENTS
        await other.read()
        assert await line.claim() == first
        await advance_time(queue_positions._PAUSE)
        await other.read()
        assert (second, 1) in other.sent
        assert len(slow.buffer) == MAX_EVENTS
        await slow.read()
        await line.received()  # Once it has read, its device continues from the log.
        assert slow.known == {second: 2}


class HeldReads(ForwardingLog):
    """A log that answers reads of a feed only while `open` is set."""

    def __init__(self, log: WholeLog) -> None:
        super().__init__(log)
        self.open = asyncio.Event()
        self.open.set()

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        await self.open.wait()
        return await super().feed(user_id, after=after, anchor=anchor, limit=limit)


async def test_no_position_follows_the_event_with_which_a_generation_leaves_the_line() -> None:
    """Also where the device was reading the log while the position was announced."""
    async with Line(through=HeldReads).open() as line:
        ada, log = line.watchers[0], line.backend.log
        assert ada.device is not None
        assert isinstance(log, HeldReads)
        ids = [(await line.backend.start(start_arguments(), "ada")).generation_id for _ in range(2)]
        log.open.clear()
        ada.device.read_again()
        await line.received()
        assert ada.sent == []
        await line.claim()
        log.open.set()
        assert await line.received() == {ids[1]: 1}
        assert ids[0] not in dict(ada.sent)


async def test_a_generation_whose_end_was_removed_before_it_was_read_waits_no_longer() -> None:
    """As on another node, where a user is removed together with the generation that still waited."""
    async with Line().open() as line:
        begun = await line.backend.start()
        line.positions._notice(Removed("ada", begun.generation_id))
        assert line.positions._waiting == {}
