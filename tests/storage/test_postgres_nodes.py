"""Nodes over one PostgreSQL: work, chores and webhooks are done by one of them, and taken over from a dead one."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest

from adapters.postgres import leases as postgres_leases
from adapters.postgres import nodes as postgres_nodes
from domain.errors import Conflict, LogUnavailable
from domain.ports.storage import Storage
from support.builders import CountedEntropy, EventRecorder, SteppableClock
from support.postgres import fresh_database, open_node


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_nodes, "LEASE", 0.6)
    monkeypatch.setattr(postgres_nodes, "BEAT", 0.1)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with fresh_database() as url:
        yield url


def recorder(storage: Storage) -> EventRecorder:
    log: Any = storage.log
    return EventRecorder(log, SteppableClock())


class Mortal:
    """A node that can be killed: nothing of it is released."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._opened = asyncio.Event()
        self._task = asyncio.create_task(self._live())
        self.storage: Storage

    async def _live(self) -> None:
        async with open_node(self._url, outbox=True) as self.storage:
            self._opened.set()
            try:
                await asyncio.Event().wait()
            finally:
                # Whatever it says at its end does not reach the database.
                log: Any = self.storage.log
                log._database._closed = True

    async def opened(self) -> Storage:
        await self._opened.wait()
        return self.storage

    async def kill(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


@asynccontextmanager
async def mortal(url: str) -> AsyncIterator[Mortal]:
    node = Mortal(url)
    await node.opened()
    try:
        yield node
    finally:
        await node.kill()


async def abandoned(storage: Storage, count: int) -> Collection[str]:
    async with asyncio.timeout(20):
        while len(found := await storage.leases.abandoned()) != count:
            await asyncio.sleep(0.05)
    return found


async def test_each_generation_is_claimed_by_one_node(url: str) -> None:
    async with open_node(url) as one, open_node(url) as two:
        claims = [asyncio.create_task(node.leases.claim()) for node in (one, two) for _ in range(10)]
        for number in range(20):
            await one.leases.offer(f"user{number % 3}", f"g{number}")
        async with asyncio.timeout(20):
            assert sorted(await asyncio.gather(*claims)) == sorted(f"g{number}" for number in range(20))
        assert await two.leases.count() == (0, 20)


async def test_what_was_fetched_for_is_worked_on_where_it_was_fetched(url: str) -> None:
    async with open_node(url) as one, open_node(url) as two:
        await one.leases.offer("ada", "a1", fetching=True)
        assert await one.leases.claim(fetching=True) == "a1"
        elsewhere = asyncio.create_task(two.leases.claim())
        assert await two.leases.offer("ada", "a1") is False
        assert await one.leases.offer("ada", "a1") is True
        async with asyncio.timeout(20):
            assert await one.leases.claim() == "a1"
        assert not elsewhere.done()
        elsewhere.cancel()


@pytest.mark.usefixtures("short_lease")
async def test_the_work_of_a_dead_node_is_abandoned_after_the_lease_and_that_of_others_is_not(url: str) -> None:
    async with open_node(url) as here, mortal(url) as node:
        there = await node.opened()
        running = [(await recorder(there).start("ada")).generation_id]
        mine = (await EventRecorder(here.log, SteppableClock(), count=50).start("bob")).generation_id
        await there.leases.offer("ada", running[0])
        await here.leases.offer("bob", mine)
        assert await there.leases.claim() == running[0]
        assert await here.leases.claim() == mine
        await asyncio.sleep(1)
        assert await here.leases.abandoned() == []
        await node.kill()
        assert await abandoned(here, 1) == running
        assert await here.leases.offer("ada", running[0])
        assert await here.leases.claim() == running[0]
        assert await here.leases.renew([running[0], mine]) == []


async def test_what_a_node_releases_or_leaves_at_its_end_is_abandoned_at_once(url: str) -> None:
    async with open_node(url) as here:
        async with open_node(url) as there:
            one, two = [await recorder(there).start("ada")], None
            two = await EventRecorder(there.log, SteppableClock(), count=9).start("ada")
            for generation in (*one, two):
                await there.leases.offer("ada", generation.generation_id)
                await there.leases.claim()
            await there.leases.release(two.generation_id)
            assert await here.leases.abandoned() == [two.generation_id]
        assert len(await here.leases.abandoned()) == 2


async def test_external_generations_are_not_abandoned(url: str) -> None:
    async with open_node(url) as here:
        append, _ = recorder(here).prepare_start()
        assert append.start is not None
        await here.log.append(append._replace(start=append.start._replace(external=True)))
        assert await here.leases.abandoned() == []


@pytest.mark.usefixtures("short_lease")
async def test_chores_and_webhooks_of_a_dead_node_are_taken_over(url: str) -> None:
    async with open_node(url, outbox=True) as here, mortal(url) as node:
        there = await node.opened()
        await recorder(there).start_and_fail()
        assert len(await there.log.claim_undelivered(9)) == 1
        assert len(await there.log.claim_undelivered(9)) == 1
        assert await there.leases.claim_chore("sweep", 60)
        assert await there.leases.claim_chore("sweep", 60)
        assert not await here.leases.claim_chore("sweep", 60)
        assert await here.leases.claim_chore("retention", 60)
        assert await here.log.claim_undelivered(9) == []
        await node.kill()
        async with asyncio.timeout(20):
            while not await here.leases.claim_chore("sweep", 60):
                await asyncio.sleep(0.05)
            await here.leases.abandoned()
            while not await here.log.claim_undelivered(9):
                await asyncio.sleep(0.05)


async def test_a_chore_that_is_over_is_for_anybody(url: str) -> None:
    async with open_node(url) as here, open_node(url) as there:
        assert await here.leases.claim_chore("sweep", 0.2)
        assert not await there.leases.claim_chore("sweep", 0.2)
        async with asyncio.timeout(20):
            while not await there.leases.claim_chore("sweep", 60):
                await asyncio.sleep(0.02)
        assert not await here.leases.claim_chore("sweep", 60)


@pytest.mark.usefixtures("short_lease")
async def test_a_pause_of_a_node_counts_no_more_than_a_slow_heartbeat(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_nodes, "LEASE", 20.0)
    async with open_node(url) as here:
        nodes: Any = here.nodes
        admin = await asyncpg.connect(url)
        await admin.execute("INSERT INTO stagecast.nodes VALUES ('ghost', 'x:1', now() - interval '1 hour')")
        await nodes.beat()
        for _ in range(2):
            # As after a pause of 15 seconds: the second one would end the lease.
            nodes._beat_at -= 15
            nodes._seen = {node: (seen, since - 15) for node, (seen, since) in nodes._seen.items()}
            assert nodes.dead == []
            await nodes.beat()
            assert nodes.dead == []
        monkeypatch.setattr(postgres_nodes, "LEASE", 0.2)
        async with asyncio.timeout(20):
            while nodes.dead != ["ghost"]:
                await asyncio.sleep(0.02)
        await admin.close()


async def test_a_draining_node_claims_nothing_and_waits_for_what_it_holds(url: str) -> None:
    async with open_node(url) as here, open_node(url) as there:
        await here.leases.offer("ada", "a1")
        assert await here.leases.claim() == "a1"
        drained = asyncio.create_task(here.leases.drain())
        waiting = asyncio.create_task(here.leases.claim())
        await asyncio.sleep(0)
        await here.leases.offer("ada", "a2")
        async with asyncio.timeout(20):
            assert await there.leases.claim() == "a2"
            assert not drained.done()
            await here.leases.release("a1")
            await drained
        assert not waiting.done()
        waiting.cancel()


async def test_a_draining_node_works_on_what_it_has_fetched_for(url: str) -> None:
    async with open_node(url) as here, open_node(url) as there, asyncio.timeout(20):
        await here.leases.offer("ada", "a1", fetching=True)
        assert await here.leases.claim(fetching=True) == "a1"
        drained = asyncio.create_task(here.leases.drain())
        await asyncio.sleep(0)
        await here.leases.offer("bob", "b1")
        assert await here.leases.offer("ada", "a1")
        assert await here.leases.claim() == "a1"
        assert await there.leases.claim() == "b1"
        await here.leases.release("a1")
        await drained


@pytest.mark.usefixtures("short_lease")
async def test_a_node_that_asks_more_than_the_database_answers_lives_and_gets_answers(url: str) -> None:
    async with open_node(url) as here, open_node(url) as there:
        nodes: Any = there.nodes
        log: Any = here.log
        asked = []
        for _ in range(30):
            asked += [log._database.start("SELECT pg_sleep(0.1)") for _ in range(10)]
            await asyncio.sleep(0.1)
            assert nodes.dead == []
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(not isinstance(each, LogUnavailable) for each in answers) > 80  # At most 40 a second can be.


async def test_a_stale_heartbeat_or_tail_fails_the_probe(url: str) -> None:
    async with open_node(url) as here:
        log: Any = here.log
        await here.log.probe()
        for part, attribute in ((log._nodes, "_beat_at"), (log._tail, "_read_at")):
            setattr(part, attribute, getattr(part, attribute) - 6)
            with pytest.raises(LogUnavailable):
                await here.log.probe()
            setattr(part, attribute, getattr(part, attribute) + 6)


@pytest.mark.usefixtures("short_lease")
async def test_a_node_knows_whether_others_live_before_it_has_watched_them(url: str) -> None:
    async with open_node(url) as here, mortal(url) as node:
        assert await here.has_other_nodes()
        await node.kill()
        assert not await here.has_other_nodes()
        async with open_node(url) as there:
            assert await there.has_other_nodes()
        assert not await here.has_other_nodes()


async def test_nodes_announce_where_they_are_reached(url: str) -> None:
    async with open_node(url, address="10.0.0.1:3000") as one, open_node(url, address=":7") as two:
        assert one.nodes is not None
        assert two.nodes is not None
        assert one.nodes.secret == two.nodes.secret != ""
        assert abs(one.nodes.time - two.nodes.time) < 1
        # It reaches the database by a Unix socket, so it is on the same machine.
        assert await one.nodes.address(two.nodes.id) == "127.0.0.1:7"
        assert await two.nodes.address(one.nodes.id) == "10.0.0.1:3000"
        assert await one.nodes.address("abcdef") is None


async def test_the_address_of_a_node_that_joins_during_a_heartbeat_is_found(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_node(url) as one:
        nodes: Any = one.nodes
        beat, seen, joined = nodes._beat, asyncio.Event(), asyncio.Event()

        async def beat_and_wait() -> Any:
            rows = await beat()
            seen.set()
            await joined.wait()
            return rows

        monkeypatch.setattr(nodes, "_beat", beat_and_wait)
        await seen.wait()
        async with open_node(url, address=":7") as two:
            assert two.nodes is not None
            address = asyncio.create_task(nodes.address(two.nodes.id))
            await asyncio.sleep(0)
            joined.set()
            assert await address == "127.0.0.1:7"


@pytest.mark.usefixtures("short_lease")
async def test_an_outage_of_the_database_ends_no_node_and_a_death_ends_one(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_node(url) as here, mortal(url) as node:
        there: Any = (await node.opened()).nodes
        nodes: Any = here.nodes
        assert await nodes.address(there.id)

        async def away() -> None:
            raise LogUnavailable

        with monkeypatch.context() as patch:
            patch.setattr(nodes, "_beat", away)
            async with asyncio.timeout(20):
                while nodes._seen:
                    await asyncio.sleep(0.02)
            await asyncio.sleep(1)  # Longer than a lease.
            assert nodes.others == {there.id}
        await node.kill()
        async with asyncio.timeout(20):
            while nodes.others:
                await asyncio.sleep(0.05)
        assert await nodes.address(there.id) is None


async def test_a_claim_that_postgres_has_lost_is_not_handed_out_twice_on_its_node(url: str) -> None:
    async with open_node(url) as here, open_node(url) as there:
        for fetching in (True, False):
            await here.leases.offer("ada", "a1", fetching=fetching)
            assert await here.leases.claim(fetching=fetching) == "a1"
        connection = await asyncpg.connect(url)
        # As after a crash, which loses the last commits that nobody had to wait for.
        await connection.execute("UPDATE stagecast.leases SET waiting = true, holder = NULL")
        again = [asyncio.create_task(here.leases.claim()) for _ in range(2)]
        await here.leases.offer("bob", "b1")
        async with asyncio.timeout(20):
            done, waiting = await asyncio.wait(again, return_when=asyncio.FIRST_COMPLETED)
        assert {each.result() for each in done} == {"b1"}
        assert await here.leases.renew(["a1", "b1"]) == []
        await here.leases.release("a1")
        assert await there.leases.count() == (0, 1)
        for each in waiting:
            each.cancel()
        await connection.close()


async def test_what_a_node_holds_without_knowing_it_goes_back_into_the_line(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_leases, "_LOST_AFTER", 0.2)
    async with open_node(url) as here, open_node(url) as there:
        log: Any = here.log
        await here.leases.offer("ada", "a1")
        connection = await asyncpg.connect(url)
        # The answer to this claim is lost.
        await connection.execute("SELECT stagecast.claim_v1($1, false, 1, 2, false)", log._nodes.id)
        await connection.close()
        claimed = asyncio.create_task(there.leases.claim())
        async with asyncio.timeout(20):
            while not claimed.done():
                await here.leases.renew([])
                await asyncio.sleep(0.05)
        assert await claimed == "a1"
        assert await here.leases.renew(["a1"]) == ["a1"]


async def test_what_a_node_holds_again_is_not_released_late(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has offered what it had fetched for, and neither the answer to that nor its release came through.

    The answer to its new claim comes after the renewal has begun.
    """
    async with open_node(url) as here, asyncio.timeout(20):
        leases: Any = here.leases
        generation_id = (await recorder(here).start("ada")).generation_id
        await leases.offer("ada", generation_id, fetching=True)
        assert await leases.claim(fetching=True) == generation_id
        assert await leases.offer("ada", generation_id)

        async def unavailable(*_: object) -> None:
            raise LogUnavailable

        with monkeypatch.context() as patch:
            patch.setattr(leases._database, "call", unavailable)
            await leases.release(generation_id)
        rows, claimed, answer = leases._database.rows, asyncio.Event(), asyncio.Event()

        async def slow(function: str, *arguments: object) -> Any:
            found = await rows(function, *arguments)
            if function == "claim_v1" and found:
                claimed.set()
                await answer.wait()
            return found

        monkeypatch.setattr(leases._database, "rows", slow)
        claim = asyncio.create_task(leases.claim())
        await claimed.wait()
        renewal = asyncio.create_task(leases.renew([]))
        await asyncio.wait([renewal], timeout=0.1)
        answer.set()
        assert await claim == generation_id
        assert await renewal == []
        for known in ([], [generation_id]):  # Its work begins once its history has been read.
            assert await leases.renew(known) == []
        assert await leases.abandoned() == []


async def test_counts_are_at_most_a_second_old_for_everybody_who_asks_at_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_leases, "_SEEN_FOR", 0.1)
    async with open_node(url) as one, open_node(url) as two:
        await one.leases.offer("ada", "edit_1_a")
        assert await two.leases.count() == (1, 0)
        assert await one.leases.withdraw("edit_1_a")
        await asyncio.sleep(0.2)
        assert await asyncio.gather(*(two.leases.count() for _ in range(3))) == [(0, 0)] * 3


async def test_of_fifty_appends_with_one_sequence_from_three_nodes_one_wins(url: str) -> None:
    async with open_node(url) as one, open_node(url) as two, open_node(url) as three:
        nodes: Any = [one, two, three]
        begun = await recorder(one).start("ada")
        recorders = [
            EventRecorder(node.log, SteppableClock(), CountedEntropy(1_000 * number))
            for number, node in enumerate(nodes, 1)
        ]
        outcomes = await asyncio.gather(
            *(recorders[number % 3].move(begun, "failed") for number in range(50)), return_exceptions=True
        )
        conflicts = [each for each in outcomes if isinstance(each, Conflict)]
        assert len(conflicts) == 49
        assert {(await node.log.standing("ada")).credit for node in nodes} == {100}
        history = await two.log.generation(begun.generation_id)
        assert history is not None
        assert [entry.sequence for entry in history.events] == [1, 2]


async def test_nodes_with_other_settings_keep_their_own_and_every_balance_holds(url: str) -> None:
    async with open_node(url, credits=5, outbox=True) as counts, open_node(url, credits=None) as does_not:
        one = EventRecorder(counts.log, SteppableClock(), CountedEntropy(1_000), count=10)
        two = EventRecorder(does_not.log, SteppableClock(), CountedEntropy(2_000), count=20)
        reserved, free = await one.start("ada"), await two.start("ada")
        assert [(await node.log.standing("ada")).credit for node in (counts, does_not)] == [4, None]
        await two.move(reserved, "failed")  # Whoever ends it, what its start has taken is given back.
        await one.move(free, "failed")
        assert (await counts.log.standing("ada")).credit == 5
        # What a node without a webhook ends, no node posts.
        assert [entry.generation_id for entry in await counts.log.claim_undelivered(9)] == [free.generation_id]
        assert await does_not.log.claim_undelivered(9) == []


async def test_a_node_that_joins_is_known_to_the_others_before_their_next_heartbeat(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_node(url) as here:
        assert here.nodes is not None
        monkeypatch.setattr(postgres_nodes, "BEAT", 10.0)
        await asyncio.sleep(1)  # The last heartbeat of before.
        async with open_node(url) as there, asyncio.timeout(5):
            assert there.nodes is not None
            while there.nodes.id not in here.nodes.others:
                await asyncio.sleep(0.01)
