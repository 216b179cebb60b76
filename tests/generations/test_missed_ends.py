"""Work stops when its generation ends or is removed on another node, also if this node never receives its end."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import pytest

from domain import supervisor
from domain.feed import Logged
from domain.generation import Snapshot
from domain.ports.images import Picture
from domain.ports.log import Deliver, Gap, Notice, Removed
from support.builders import SteppableClock, WholeLog
from support.doubles import FlakyLog, InMemoryBackend, InMemoryImages, Pause, ScriptedEditor


class LossyLog(FlakyLog):
    """A log whose follower receives no end of a generation and, if so set, no removal."""

    def __init__(self, log: WholeLog, *, removals: bool) -> None:
        super().__init__(log)
        self._removals = removals
        self._deliver: Deliver

    def follow(self, deliver: Deliver) -> AbstractAsyncContextManager[None]:
        self._deliver = deliver
        return self.inner.follow(self._filter)

    def _filter(self, notice: Notice) -> None:
        lost = isinstance(notice, Logged) and notice.end == notice.position
        if not lost and (self._removals or not isinstance(notice, Removed | Gap)):
            self._deliver(notice)

    def report_gap(self) -> None:
        self._deliver(Gap())


class TwoNodes:
    """A node that works, with such a log, and another one over the same storage, which does not."""

    def __init__(self, log: WholeLog, clock: SteppableClock, *, removals: bool) -> None:
        self.log = LossyLog(log, removals=removals)
        self.pause = Pause()
        self.here = InMemoryBackend(
            shared_log=log, line=lambda _: self.log, clock=clock, editor=ScriptedEditor(self.pause)
        )
        self.there = replace(self.here, line=lambda log: log, shared_leases=self.here.leases)

    async def working(self, user_id: str = "ada") -> Snapshot:
        """A generation whose edit has begun."""
        self.pause.reached.clear()
        begun = await self.there.start(user_id=user_id)
        await self.pause.reached.wait()
        return begun


async def cancel(node: InMemoryBackend, begun: Snapshot) -> None:
    await node.cancel(begun)


async def delete(node: InMemoryBackend, begun: Snapshot) -> None:
    await node.cancel(begun)
    await node.workflow.delete(begun.user_id, begun.generation_id)


async def remove_user(node: InMemoryBackend, begun: Snapshot) -> None:
    await node.workflow.remove_user(begun.user_id)


End = Callable[[InMemoryBackend, Snapshot], Awaitable[None]]


@pytest.mark.parametrize("end", [delete, remove_user])
async def test_work_stops_when_its_generation_is_removed(log: WholeLog, clock: SteppableClock, end: End) -> None:
    nodes = TwoNodes(log, clock, removals=True)
    async with nodes.here.open():
        begun = await nodes.working()
        await end(nodes.there, begun)
        async with asyncio.timeout(20):
            await nodes.pause.aborted.wait()
        await nodes.here.settled()
    assert nodes.here.images.kept == {}
    assert nodes.here.runner.running == 0


@pytest.mark.parametrize("end", [cancel, delete, remove_user])
async def test_after_a_gap_only_work_stops_whose_generation_has_ended_or_is_gone(
    log: WholeLog, clock: SteppableClock, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RETRY_DELAY", 0.01)
    nodes = TwoNodes(log, clock, removals=False)
    async with nodes.here.open():
        begun, other = await nodes.working(), await nodes.working("bob")
        await end(nodes.there, begun)
        nodes.log.reads = 2  # The log does not answer at first.
        nodes.log.report_gap()
        async with asyncio.timeout(20):
            await nodes.pause.aborted.wait()
        nodes.pause.released.set()
        await nodes.here.settled()
    assert (await nodes.here.statuses(other))[-1] == "completed"
    assert nodes.here.runner.provider_calls == {("editor", "cancelled"): 1, ("editor", "ok"): 1}
    await nodes.here.check("bob", *(["ada"] if end is cancel else []))


async def test_after_a_gap_nobody_waits_for_interrupted_generations_that_have_ended(
    log: WholeLog, clock: SteppableClock
) -> None:
    nodes = TwoNodes(log, clock, removals=False)
    async with nodes.here.open():
        begun = await nodes.working()
    again = replace(nodes.here, shared_leases=None)
    async with again.open():
        await again.runner.resume()
        resumed = asyncio.create_task(again.runner.resumed())
        await again.settled()
        assert (await again.events(begun))[-1]["code"] == "interrupted"
        nodes.log.report_gap()
        async with asyncio.timeout(20):
            await resumed
    await again.check()


class SlowImages(InMemoryImages):
    """Images of which the edited one is stored once the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.saving, self.gate = asyncio.Event(), asyncio.Event()

    async def save(self, generation_id: str, picture: Picture, name: str | None = None) -> str:
        if picture.data == b"edited":
            self.saving.set()
            await self.gate.wait()
        return await super().save(generation_id, picture, name)


async def test_a_picture_that_is_being_stored_during_a_removal_is_removed(log: WholeLog, clock: SteppableClock) -> None:
    images = SlowImages()
    here = InMemoryBackend(shared_log=log, clock=clock, images=images)
    there = replace(here, shared_leases=here.leases)
    async with here.open():
        begun = await there.start()
        await images.saving.wait()
        await remove_user(there, begun)
        await here.follower.until(lambda _: bool(here.follower.removed))
        images.gate.set()
        await here.settled()
    assert images.kept == {}
