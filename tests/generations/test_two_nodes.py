"""Two nodes over one storage: work, webhooks and chores are done once, and a dead node's are taken over."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adapters.memory.log import MemoryLog
from adapters.system import now
from domain import runner
from domain.housekeeping import GRACE, Housekeeping
from domain.ports.images import Picture
from domain.ports.webhook_outbox import CLAIM
from domain.webhooks import Webhooks
from support.builders import CountedEntropy, EventWriter, SteppableClock, memory_storage, statuses
from support.doubles import (
    FACE_URL,
    ForwardingLog,
    InMemoryBackend,
    InMemoryImages,
    Pause,
    ScriptedEditor,
    ScriptedFetcher,
    advance_time,
    png,
    start_arguments,
)
from support.harness import Running, running
from support.nodes import Cluster, NodeLeases, NodeOutbox
from support.webhooks import until, until_all_delivered, working


class Nodes:
    """Backends that share a log, its leases and the images."""

    def __init__(self, **shared: Any) -> None:
        self.clock, self.entropy = SteppableClock(), CountedEntropy()
        self.log = MemoryLog(epoch="e1", credits=100, clock=self.clock)
        self.cluster = Cluster(self.log)
        self.images = InMemoryImages()
        self.shared = shared
        self._stack = AsyncExitStack()
        self._running: dict[NodeLeases, AsyncExitStack] = {}

    def make(self, editor: ScriptedEditor, **rest: Any) -> InMemoryBackend:
        """A node that is not started yet."""
        return InMemoryBackend(
            editor=editor,
            credits=100,
            clock=self.clock,
            entropy=self.entropy,
            images=self.images,
            shared_log=self.log,
            shared_leases=NodeLeases(self.cluster),
            **{**self.shared, **rest},
        )

    async def start(self, node: InMemoryBackend) -> InMemoryBackend:
        await node.runner.resume()
        assert isinstance(node.leases, NodeLeases)
        self._running[node.leases] = stack = AsyncExitStack()
        await stack.enter_async_context(node.open())
        await self._stack.enter_async_context(stack)
        return node

    async def add(self, editor: ScriptedEditor, **rest: Any) -> InMemoryBackend:
        return await self.start(self.make(editor, **rest))

    async def stop(self, node: InMemoryBackend, *, dead: bool) -> None:
        assert isinstance(node.leases, NodeLeases)
        if dead:
            await node.leases.die()
        await self._running[node.leases].aclose()

    async def all_ended(self) -> None:
        """Wait until every generation has ended and its lease is released."""
        async with asyncio.timeout(20):
            while await self.log.unfinished():
                await asyncio.sleep(0.005)
            await self.cluster.lines.drain()

    async def close(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def nodes(**shared: Any) -> AsyncIterator[Nodes]:
    made = Nodes(**shared)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture(autouse=True)
def quick_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_RENEW", 0.01)


async def test_two_nodes_do_each_work_once() -> None:
    async with nodes() as all_nodes:
        one, two = await all_nodes.add(ScriptedEditor()), await all_nodes.add(ScriptedEditor())
        begun = [await node.start(user_id=user) for node in (one, two) for user in ("ada", "bob") for _ in range(5)]
        await all_nodes.all_ended()
        assert len(one.editor.calls) + len(two.editor.calls) == len(begun)
        assert {(await one.statuses(each))[-1] for each in begun} == {"completed"}
        assert all_nodes.cluster.holders == {}


@pytest.mark.parametrize("free", [True, False], ids=["free", "paid"])
async def test_the_work_of_a_dead_node_is_repeated_if_it_is_free_and_otherwise_interrupted(free: bool) -> None:
    pause = Pause()
    async with nodes() as all_nodes:
        dying = await all_nodes.add(ScriptedEditor(pause, free=free))
        begun = await dying.start()
        await pause.reached.wait()
        other = await all_nodes.add(ScriptedEditor(free=free))
        await all_nodes.stop(dying, dead=True)
        await all_nodes.all_ended()
        end = (await other.events(begun))[-1]
        assert (end["status"], end.get("code")) == (("completed", None) if free else ("failed", "interrupted"))
        assert (len(other.editor.calls), (await all_nodes.log.standing("ada")).credit) == (
            (1, 99) if free else (0, 100)
        )
        await other.check()


async def test_a_node_that_starts_disturbs_no_work_of_another() -> None:
    paid, fetching = Pause(), Pause()
    async with nodes() as all_nodes:
        one = await all_nodes.add(ScriptedEditor(paid), fetcher=ScriptedFetcher(fetching), max_running=1)
        edit, fetch = await one.start(), await one.start(start_arguments(image_urls=(FACE_URL,)), "bob")
        await paid.reached.wait()
        await fetching.reached.wait()
        two = await all_nodes.add(ScriptedEditor())
        third = await two.start(user_id="cy")
        await two.reached(third.generation_id, "completed")
        assert [(await one.statuses(each))[-1] for each in (edit, fetch)] == ["openai_editing", "composition"]
        paid.released.set()
        fetching.released.set()
        await all_nodes.all_ended()
        assert {(await one.statuses(each))[-1] for each in (edit, fetch, third)} == {"completed"}
        assert len(one.editor.calls) + len(two.editor.calls) == 3


async def test_a_node_that_leaves_finishes_its_own_work_and_leaves_the_rest_to_others() -> None:
    pause = Pause()
    async with nodes(max_running=1) as all_nodes:
        leaving = await all_nodes.add(ScriptedEditor(pause))
        own = await leaving.start()
        await pause.reached.wait()
        waiting = [await leaving.start(user_id=user) for user in ("bob", "cy")]
        drained = asyncio.create_task(leaving.leases.drain())
        await asyncio.sleep(0)
        pause.released.set()
        async with asyncio.timeout(20):
            await drained
        assert (await leaving.statuses(own))[-1] == "completed"
        assert [await leaving.statuses(each) for each in waiting] == [["started"]] * 2
        await all_nodes.stop(leaving, dead=False)
        staying = await all_nodes.add(ScriptedEditor())
        await all_nodes.all_ended()
        assert (len(leaving.editor.calls), len(staying.editor.calls)) == (1, 2)


async def test_what_a_node_could_not_finish_before_it_left_is_taken_over() -> None:
    pause = Pause()
    async with nodes() as all_nodes:
        leaving, staying = await all_nodes.add(ScriptedEditor(pause, free=True)), all_nodes.make(ScriptedEditor())
        begun = await leaving.start()
        await pause.reached.wait()
        await all_nodes.start(staying)
        await all_nodes.stop(leaving, dead=False)
        await all_nodes.all_ended()
        assert await staying.statuses(begun) == statuses(await all_nodes.log.generation(begun.generation_id))
        assert (await staying.statuses(begun))[-1] == "completed"


async def test_the_deadline_of_external_work_is_kept_by_another_node_when_one_dies() -> None:
    async with nodes() as all_nodes:
        one, two = all_nodes.make(ScriptedEditor()), all_nodes.make(ScriptedEditor())
        keeping = [asyncio.create_task(each.external.run()) for each in (one, two)]
        await asyncio.sleep(0)
        begun = await one.start(start_arguments(external=True))
        assert await one.leases.claim_chore("external", 10)
        keeping[0].cancel()
        assert isinstance(one.leases, NodeLeases)
        await one.leases.die()
        all_nodes.clock.step(2 * one.deadline)
        await advance_time(2)
        await all_nodes.all_ended()
        assert (await two.events(begun))[-1]["code"] == "deadline_exceeded"
        for each in keeping:
            each.cancel()
        await asyncio.wait(keeping)


async def test_external_work_that_ends_while_the_deadline_of_other_work_is_checked_disturbs_nothing() -> None:
    backend = InMemoryBackend(line=ForwardingLog, deadline=1)
    keeping = asyncio.create_task(backend.supervisor.keep("external", backend.external.run))
    await asyncio.sleep(0)
    first, second = [await backend.start(start_arguments(external=True)) for _ in range(2)]
    assert isinstance(backend.log, ForwardingLog)
    backend.log.overtake = lambda: backend.cancel(second)  # Just before the end of the first one is appended.
    backend.clock.step(5)
    async with asyncio.timeout(10):
        while len(await backend.events(first)) < 2:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert [(await backend.events(each))[-1]["code"] for each in (first, second)] == ["deadline_exceeded", "cancelled"]
    assert backend.supervisor.parts == {"external": "ok"}
    keeping.cancel()
    await asyncio.wait([keeping])


# --- pictures ----------------------------------------------------------------------------------------------


async def test_a_picture_that_another_node_is_about_to_name_is_never_swept(tmp_path: Path) -> None:
    class Aging(InMemoryImages):
        stored: datetime

        async def names(self, *, older_than: datetime) -> dict[str, list[str]]:
            return await super().names(older_than=older_than) if self.stored < older_than else {}

    pause, clock = Pause(), SteppableClock()
    backend = InMemoryBackend(images=Aging(), editor=ScriptedEditor(pause), clock=clock)
    assert isinstance(backend.images, Aging)
    backend.images.stored = clock()
    keeper = Housekeeping(backend.log, backend.log, backend.stored)
    async with backend.open():
        begun = await backend.start()
        await pause.reached.wait()
        late = await backend.images.save(begun.generation_id, png("of an event that the log does not have yet"))
        start = await backend.images.save("edit_1_0000000000000000", png("of a start that the log does not have yet"))
        kept = dict(backend.images.kept)
        await keeper.sweep(now=clock() + GRACE)
        assert backend.images.kept == kept
        await keeper.sweep(now=clock() + GRACE + timedelta(seconds=1))
        assert kept.keys() - backend.images.kept.keys() == {start}
        assert await backend.images.load(late) is not None
        pause.released.set()
        await backend.settled()
        await keeper.sweep(now=clock() + 10 * GRACE)
        assert await backend.images.load(late) is None
        await backend.check()


# --- webhooks ----------------------------------------------------------------------------------------------


class CountingPoster:
    """`domain.webhooks.Poster` that counts the posts of each generation, and accepts nothing while the gate is shut."""

    def __init__(self) -> None:
        self.posts = Counter[str]()
        self.gate = asyncio.Event()
        self.gate.set()

    async def post(self, message_id: str, body: bytes) -> None:
        self.posts[json.loads(body)["data"]["generationId"]] += 1
        await self.gate.wait()


async def test_each_webhook_is_sent_by_one_node_and_those_of_a_dead_node_by_another() -> None:
    log = MemoryLog(epoch="e1", credits=100, clock=SteppableClock(), outbox=True)
    claims, writer, poster = dict[str, NodeOutbox](), EventWriter(log), CountingPoster()
    outboxes = [NodeOutbox(log, claims) for _ in range(2)]
    one, two = (Webhooks(log, outbox, poster, lambda: 0.5) for outbox in outboxes)
    async with working(two):
        async with working(one):
            for index in range(60):
                await writer.start_and_fail(f"user {index % 5}")
                await asyncio.sleep(0)
            await until_all_delivered(log)
            assert set(poster.posts.values()) == {1}
            poster.gate.clear()
            left = [(await writer.start_and_fail()).generation_id for _ in range(20)]
            await until(lambda: len(poster.posts) > 68)  # One node posts eight at once.
            assert set(poster.posts.values()) == {1}
        outboxes[0].dead = True
        of_the_dead = {each for each in left if claims.get(each) is outboxes[0] and each in poster.posts}
        assert of_the_dead
        poster.gate.set()
        await advance_time(CLAIM)
        await until_all_delivered(log)
    assert {each for each, count in poster.posts.items() if count == 2} == of_the_dead
    assert len(poster.posts) == 80


# --- services ----------------------------------------------------------------------------------------------


class SharedImages(InMemoryImages):
    """Images that count their sweeps. Each node has the same."""

    sweeps = 0

    async def names(self, *, older_than: datetime) -> dict[str, list[str]]:
        self.sweeps += 1
        return await super().names(older_than=older_than)

    async def load(self, name: str) -> Picture | None:
        return self.kept.get(name)


@asynccontextmanager
async def service(tmp_path: Path, cluster: Cluster, images: SharedImages, **rest: Any) -> AsyncIterator[Running]:
    assert isinstance(cluster.log, MemoryLog)
    storage = memory_storage(cluster.log, leases=NodeLeases(cluster))
    async with running(tmp_path, overrides={"storage": storage, "images": images, **rest}) as opened:
        yield opened


async def test_two_services_sweep_once_and_a_generation_outlives_the_one_that_accepted_it(tmp_path: Path) -> None:
    class Durable(MemoryLog):
        durable = True

    cluster, images, pause = Cluster(Durable(epoch="e1", credits=100, clock=now)), SharedImages(), Pause()
    editor = ScriptedEditor(pause, free=True)
    node = partial(service, tmp_path, cluster, images)
    async with node(editor=editor) as one:
        ids = [await one.start() for _ in range(4)]
        await one.until(lambda: bool(editor.calls))
        async with node() as two, two.phone("ada") as phone:
            one.server.begin_shutdown(now=True)
            await phone.until_over(*ids)
            assert {phone.of(each)[-1]["status"] for each in ids} == {"completed"}
    assert images.sweeps == 1
