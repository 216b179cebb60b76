"""The follower of a log in PostgreSQL: it waits for no transaction, misses nothing, and needs no notification."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import asyncpg
import pytest

from adapters.postgres import tail as postgres_tail
from adapters.postgres.appends import Appends
from adapters.postgres.database import Database
from domain.delivery import Hub
from domain.errors import LogUnavailable
from domain.feed import Logged
from domain.feed_sessions import StartPosition
from domain.ports.log import Append, Gap, Notice, Removed, UserRemoved
from domain.ports.storage import StorageRefused
from domain.quarantine import Quarantine
from support.builders import CountedEntropy, EventRecorder, RecordingFollower, SteppableClock
from support.doubles import plain_recorder
from support.postgres import fresh_database, open_node, pgbouncer


class Node(NamedTuple):
    recorder: EventRecorder
    follower: RecordingFollower
    log: Any
    url: str


@asynccontextmanager
async def node(url: str, number: int = 0, **options: Any) -> AsyncIterator[Node]:
    async with open_node(url, **options) as storage:
        log: Any = storage.log
        recorder = EventRecorder(log, SteppableClock(), CountedEntropy(number), count=number * 1_000)
        follower = RecordingFollower()
        async with log.follow(follower):
            yield Node(recorder, follower, log, url)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with fresh_database() as url:
        yield url


async def stranger_appends(connection: asyncpg.Connection, append: Append) -> None:
    """Append on a connection of one's own, in the transaction that is open there."""
    database = Database("", pooled=False, epoch="e1")
    appends = Appends(database, credits=100, clock=SteppableClock(), outbox=False, appended=lambda: None)
    arguments = appends._arguments([(append, asyncio.get_running_loop().create_future())], wait=True)
    row = await connection.fetchrow(
        f"SELECT * FROM stagecast.append_v1({', '.join(f'${number}' for number in range(1, 23))})", *arguments
    )
    assert row["r_outcome"] == "accepted"


def users(entries: list[Logged]) -> list[str]:
    return [entry.user_id for entry in entries]


async def test_events_of_other_nodes_arrive_once_and_in_order(url: str) -> None:
    async with node(url, 1) as one, node(url, 2) as two:
        generations = await asyncio.gather(
            *(each.recorder.run_to_end(user) for each in (one, two) for user in ("ada", "bob", "ada"))
        )
        for each in (one, two):
            entries = await each.follower.until(lambda entries: len(entries) == 6 * 6)
            assert {entry.generation_id for entry in entries} == {each.generation_id for each in generations}
            for user_id in ("ada", "bob"):
                positions = [entry.position for entry in entries if entry.user_id == user_id]
                assert positions == list(range(1, len(positions) + 1))
        assert one.follower.entries != []


async def test_nobody_waits_for_an_open_transaction_whose_event_arrives_when_it_ends(url: str) -> None:
    async with node(url) as here:
        holder, roller = await asyncpg.connect(url), await asyncpg.connect(url)
        await here.recorder.start("early")
        for connection, user_id in ((holder, "held"), (roller, "rolled back")):
            await connection.execute("BEGIN")
            await stranger_appends(connection, here.recorder.prepare_start(user_id)[0])
        await here.recorder.run_to_end("ada")
        await here.follower.until(lambda entries: len(entries) == 7)
        await roller.execute("ROLLBACK")
        await here.recorder.run_to_end("bob")
        await here.follower.until(lambda entries: len(entries) == 13)
        assert users(here.follower.entries) == ["early", *["ada"] * 6, *["bob"] * 6]
        await holder.execute("COMMIT")
        await here.follower.until(lambda entries: len(entries) == 14)
        assert users(here.follower.entries)[-1] == "held"
        for connection in (holder, roller):
            await connection.close()


async def test_a_gap_is_given_up_only_once_its_transaction_is_over(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the open transaction is younger than every one that has ended."""
    monkeypatch.setattr(postgres_tail, "_GIVE_UP_EVERY", 0)
    async with node(url) as here:
        held, quick = await asyncpg.connect(url), await asyncpg.connect(url)
        await quick.execute("BEGIN")
        await quick.fetchval("SELECT pg_current_xact_id()::text")
        await held.execute("BEGIN")
        await stranger_appends(held, here.recorder.prepare_start("held")[0])
        await stranger_appends(quick, here.recorder.prepare_start("quick")[0])
        await quick.execute("COMMIT")
        await here.follower.until(lambda entries: users(entries) == ["quick"])
        for _ in range(5):
            await here.log._tail.caught_up()
        await held.execute("COMMIT")
        await here.follower.until(lambda entries: users(entries) == ["quick", "held"])
        rolled = await asyncpg.connect(url)
        await rolled.execute("BEGIN")
        await stranger_appends(rolled, here.recorder.prepare_start("rolled")[0])
        await rolled.execute("ROLLBACK")
        await here.recorder.start("ada")
        async with asyncio.timeout(20):
            while here.log._tail._gaps:
                await here.log._tail.caught_up()
        for connection in (held, quick, rolled):
            await connection.close()


async def test_an_event_that_was_open_when_the_node_started_arrives(url: str) -> None:
    async with node(url, 1) as earlier:
        holder = await asyncpg.connect(url)
        await holder.execute("BEGIN")
        await stranger_appends(holder, earlier.recorder.prepare_start("held")[0])
        await earlier.recorder.run_to_end("ada")
        async with node(url, 2) as later:
            await later.recorder.start("bob")
            await holder.execute("COMMIT")
            await later.follower.until(lambda entries: len(entries) == 2)
            assert sorted(users(later.follower.entries)) == ["bob", "held"]
        await holder.close()


async def test_a_follower_gets_only_what_is_appended_from_now_on(url: str) -> None:
    async with node(url) as here:
        for user_id in ("ada", "bob", "cy"):
            await here.recorder.start(user_id)
            follower = RecordingFollower()
            async with here.log.follow(follower):
                await here.recorder.start("next")
                await follower.until(lambda entries: bool(entries))
            assert users(follower.entries) == ["next"]


async def test_a_node_that_lost_its_connection_goes_on_where_it_was(url: str) -> None:
    async with node(url, 1) as one, node(url, 2) as two:
        await one.recorder.start("ada")
        await two.follower.until(lambda entries: len(entries) == 1)
        admin = await asyncpg.connect(url)
        for turn in range(3):
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            recorder = EventRecorder(one.log, SteppableClock(), CountedEntropy(9 + turn), count=9_000 + turn)
            append, _ = recorder.prepare_start("ada")
            await patiently(one.log, append)
        await two.follower.until(lambda entries: len(entries) == 4)
        assert [entry.position for entry in two.follower.entries] == [1, 2, 3, 4]
        await admin.close()


async def test_a_connection_that_falls_silent_before_it_listens_is_given_up(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(url) as here:
        await here.recorder.start("ada")
        await here.follower.until(lambda entries: len(entries) == 1)
        listener, silent = here.log._tail._listener, asyncio.Event()

        async def connect() -> asyncpg.Connection:
            connection = await listener.connect()
            if not silent.is_set():
                silent.set()
                connection._transport.pause_reading()
            return connection

        monkeypatch.setattr(here.log._tail, "_listener", SimpleNamespace(pooled=False, connect=connect))
        admin = await asyncpg.connect(url)
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1 AND query ~ 'read_v1'",
            listener.name,
        )
        await admin.close()
        await silent.wait()
        await here.recorder.start("ada")
        await here.follower.until(lambda entries: len(entries) == 2)


async def patiently(log: Any, append: Append) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await log.append(append)
                return
            except LogUnavailable:
                await asyncio.sleep(0.05)


async def test_a_log_that_lost_its_end_and_one_that_ran_ahead_are_read_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Notice] = []
    async with node(url) as here:
        await here.recorder.run_to_end("ada")
        await here.follower.until(lambda entries: len(entries) == 6)
        monkeypatch.setattr(postgres_tail, "_MAX_BACKLOG", 3)
        monkeypatch.setattr(postgres_tail, "_PAGE", 3)
        admin = await asyncpg.connect(url)
        async with here.log.follow(got.append):
            # As after a failover that lost the last event.
            await admin.execute("DELETE FROM stagecast.events WHERE id = (SELECT max(id) FROM stagecast.events)")
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            async with asyncio.timeout(20):
                while got != [Gap()]:
                    await asyncio.sleep(0.01)
            await admin.execute("BEGIN")
            for _ in range(9):
                await stranger_appends(admin, here.recorder.prepare_start("bob")[0])
            await admin.execute("COMMIT")
            async with asyncio.timeout(20):
                while len(got) < 2:
                    await asyncio.sleep(0.01)
            assert got == [Gap(), Gap()]
        await admin.close()


async def test_a_removed_event_that_was_not_read_yet_is_read_again(url: str) -> None:
    got: list[Notice] = []
    async with node(url) as here:
        admin = await asyncpg.connect(url)
        async with here.log.follow(got.append):
            await admin.execute("BEGIN")
            start, generation = here.recorder.prepare_start("ada")
            await stranger_appends(admin, start)
            await stranger_appends(admin, here.recorder.prepare(generation, "failed")[0])
            await admin.fetchval("SELECT stagecast.remove_v1($1, false)", generation.generation_id)
            await admin.execute("COMMIT")
            async with asyncio.timeout(20):
                while got.count(Gap()) < 2:
                    await asyncio.sleep(0.01)
        assert not any(isinstance(each, Logged) for each in got)
        await admin.close()


async def test_through_pgbouncer_in_transaction_mode_everything_works(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with pgbouncer(url) as pooled, node(pooled, 1) as one, node(pooled, 2) as two:
        assert "STAGECAST_LOG_DIRECT" in caplog.text
        caplog.clear()
        async with node(pooled, 3, direct=url) as three:
            await asyncio.gather(*(one.recorder.run_to_end(f"user{number}") for number in range(20)))
            for each in (two, three):
                await each.follower.until(lambda entries: len(entries) == 120)
            assert (await two.log.standing("user1")).credit == 99
        assert "STAGECAST_LOG_DIRECT" not in caplog.text


async def test_a_direct_url_of_another_log_is_refused(url: str) -> None:
    async with fresh_database("e2") as other, open_node(other, epoch="e2"), open_node(url):
        with pytest.raises(StorageRefused, match="STAGECAST_LOG_DIRECT"):
            async with open_node(url, direct=other):
                pass


async def test_removals_on_other_nodes_arrive_once_and_after_the_entries(url: str) -> None:
    got: list[Notice] = []
    async with node(url, 1) as one, node(url, 2) as two:
        earlier = await one.recorder.start_and_fail("bob")
        await one.log.remove(earlier.generation_id, retention=False)
        async with two.log.follow(got.append):
            generation = await one.recorder.start_and_fail("ada")
            assert await one.log.remove(generation.generation_id, retention=False)
            assert await one.log.remove(generation.generation_id, retention=True)
            async with asyncio.timeout(20):
                while Removed("ada", generation.generation_id) not in got:
                    await asyncio.sleep(0.01)
            await two.log._tail.caught_up()
            heard = [each for each in got if each != Gap()]  # If it was removed before its entries were read.
            assert heard[-1] == Removed("ada", generation.generation_id)
            assert [each for each in heard if isinstance(each, Removed)] == heard[-1:]


async def test_a_user_is_removed_before_the_entries_of_the_feed_that_begins_again(url: str) -> None:
    got: list[Notice] = []
    async with node(url, 1) as one, node(url, 2) as two:
        generation = await one.recorder.start_and_fail("ada")
        await two.follower.until(lambda entries: len(entries) == 2)
        async with two.log.follow(got.append):
            await one.log.remove_user("ada")
            await one.recorder.start_and_fail("ada")
            await two.log._tail.caught_up()
            assert got[:2] == [Removed("ada", generation.generation_id), UserRemoved("ada")]
            assert [each.position for each in got[2:] if isinstance(each, Logged)] == [1, 2]


@pytest.mark.parametrize("user_too", [False, True])
async def test_no_entry_follows_a_removal_between_two_reads(
    url: str, monkeypatch: pytest.MonkeyPatch, user_too: bool
) -> None:
    got: list[Notice] = []
    reading, appended = asyncio.Event(), asyncio.Event()
    async with node(url, 1) as one, node(url, 2) as two:
        ask = two.log._tail._ask

        async def ask_and_remove(connection: Any, query: str, *arguments: object) -> Any:
            if "read_v1" in query:
                reading.set()
                await appended.wait()
            rows = await ask(connection, query, *arguments)
            if "read_v1" in query:
                monkeypatch.undo()
                if user_too:
                    await one.log.remove_user("ada")
                else:
                    await one.log.remove(rows[0]["generation_id"], retention=False)
            return rows

        async with two.log.follow(got.append):
            monkeypatch.setattr(two.log._tail, "_ask", ask_and_remove)
            await reading.wait()
            generation = await one.recorder.start_and_fail("ada")
            appended.set()
            await two.log._tail.caught_up()
            assert [each.position for each in got[:2] if isinstance(each, Logged)] == [1, 2]
            assert got[2:] == [Removed("ada", generation.generation_id), *[UserRemoved("ada")] * user_too]


async def test_a_removal_arrives_although_the_connection_breaks_after_it_was_read(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(url, 1) as one, node(url, 2) as two:
        ask = two.log._tail._ask

        async def ask_and_break(connection: Any, query: str, *arguments: object) -> Any:
            rows = await ask(connection, query, *arguments)
            if "read_v1" in query and rows[0]["id"] is not None:
                connection.terminate()
                monkeypatch.undo()
            return rows

        generation = await one.recorder.start_and_fail("ada")
        await two.follower.until(lambda entries: len(entries) == 2)
        monkeypatch.setattr(two.log._tail, "_ask", ask_and_break)
        await one.log.remove(generation.generation_id, retention=False)
        await two.follower.until(lambda _: bool(two.follower.removed))
        await two.log._tail.caught_up()
        assert two.follower.removed == [Removed("ada", generation.generation_id)]


@asynccontextmanager
async def ada_being_removed(url: str) -> AsyncIterator[None]:
    """The user is removed in a transaction that is committed at the end."""
    admin = await asyncpg.connect(url)
    async with admin.transaction():
        await admin.fetchval("SELECT stagecast.remove_user_v1('ada')")
        yield
    await admin.close()


async def test_a_removal_arrives_however_late_it_is_committed(url: str) -> None:
    """As it waits for a synchronous standby that is down."""
    got: list[Notice] = []
    async with node(url) as here:
        generation = await here.recorder.start_and_fail("ada")
        await here.follower.until(lambda entries: len(entries) == 2)
        async with here.log.follow(got.append):
            async with ada_being_removed(url):
                await here.recorder.run_to_end("bob")
                await here.log._tail.caught_up()
            await here.recorder.start_and_fail("ada")
            await here.log._tail.caught_up()
            assert got[6:8] == [Removed("ada", generation.generation_id), UserRemoved("ada")]
            assert [each.position for each in got[8:] if isinstance(each, Logged)] == [1, 2]


async def test_the_removal_of_many_generations_is_no_backlog(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_tail, "_MAX_BACKLOG", 2)
    got: list[Notice] = []
    async with node(url) as here:
        generations = [(await here.recorder.start_and_fail("ada")).generation_id for _ in range(4)]
        await here.follower.until(lambda entries: len(entries) == 8)
        async with here.log.follow(got.append):
            async with ada_being_removed(url):
                await here.recorder.start("bob")
                await here.follower.until(lambda entries: entries[-1].user_id == "bob")
            await here.log._tail.caught_up()
        assert got[1:] == [*(Removed("ada", each) for each in generations), UserRemoved("ada")]
        assert isinstance(got[0], Logged)


async def test_removals_are_read_in_their_places_among_many_entries(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Notice] = []
    monkeypatch.setattr(postgres_tail, "_PAGE", 2)
    async with node(url) as here, here.log.follow(got.append):
        admin = await asyncpg.connect(url)
        await admin.execute("BEGIN")
        removed = []
        for _ in range(3):
            start, generation = here.recorder.prepare_start("ada")
            await stranger_appends(admin, start)
            await stranger_appends(admin, here.recorder.prepare(generation, "failed")[0])
            await admin.fetchval("SELECT stagecast.remove_v1($1, false)", generation.generation_id)
            removed.append(Removed("ada", generation.generation_id))
        await admin.execute("COMMIT")
        await admin.close()
        await here.log._tail.caught_up()
        assert got == [each for removal in removed for each in (Gap(), Gap(), removal)]


class Client:
    """The encoder and the send buffer of a client that reads at once: it keeps the positions that it was sent."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.ended = asyncio.Event()

    def event(self, entry: Logged, cursor: str) -> int:
        return entry.position

    def announcement(self, name: str, data: bytes) -> int:
        raise NotImplementedError

    def offer(self, frame: int) -> bool:
        self.positions.append(frame)
        return True

    async def drained(self) -> bool:
        return True

    async def flushed(self) -> None:
        """Nothing waits."""

    def finish(self) -> None:
        self.ended.set()

    def abort(self) -> None:
        self.ended.set()


async def test_a_device_whose_user_was_removed_in_a_long_break_of_the_follower_starts_fresh(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the removal is forgotten by then. A device that had been sent nothing is sent the new feed."""
    async with node(url, 1) as one, node(url, 2) as two, asyncio.timeout(20):
        await one.recorder.start_and_fail("ada")
        await one.recorder.start("bob")  # The last entry, by which the follower goes on, is another user's.
        await two.follower.until(lambda entries: len(entries) == 3)
        hub, clients = Hub(two.log, Quarantine(plain_recorder(two.log))), {"ada": Client(), "cy": Client()}
        for user_id, client in clients.items():
            cursor = await two.log.head_cursor(user_id)
            device = hub.join(user_id, client, client, StartPosition(cursor, False, cursor.live, None))
            device.start()
            await device.flushed()
        async with two.log.follow(hub.deliver):
            tail, back, admin = two.log._tail, asyncio.Event(), await asyncpg.connect(url)
            listener = tail._listener

            async def connect() -> asyncpg.Connection:
                await back.wait()
                return await listener.connect()

            monkeypatch.setattr(tail, "_listener", SimpleNamespace(pooled=False, connect=connect))
            monkeypatch.setattr(postgres_tail, "_MAX_BREAK", 0.5)
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", listener.name
            )
            while tail.age() < 1:
                await asyncio.sleep(0.01)
            await one.recorder.start_and_fail("cy")
            for user_id in clients:
                await one.log.remove_user(user_id)
                await one.recorder.start_and_fail(user_id)
            await admin.execute("DELETE FROM stagecast.removals")
            await admin.close()
            back.set()
            await clients["ada"].ended.wait()
            while clients["cy"].positions != [1, 2]:
                await asyncio.sleep(0.01)
            assert clients["ada"].positions == []
            assert not clients["cy"].ended.is_set()
