"""A PostgreSQL server that is killed, stopped, or cannot keep what the log promises."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg
import pytest

from adapters.postgres import appends as postgres_appends
from adapters.postgres import database as postgres_database
from adapters.postgres import log as postgres_log
from adapters.postgres import nodes as postgres_nodes
from adapters.postgres import storage as postgres_storage
from domain.errors import LogUnavailable, Refusal
from domain.ports.log import Append
from domain.ports.storage import StorageRefused
from support.builders import CountedEntropy, EventRecorder, RecordingFollower, SteppableClock
from support.postgres import Server, fresh_database, new_server, open_node

#: Seconds in which everything has to be as before.
SOON: Final = 20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with new_server() as server:
        yield server


async def execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


@asynccontextmanager
async def without_standby(server: Server) -> AsyncIterator[None]:
    """The server waits for a standby that does not exist, before it acknowledges a commit."""
    await execute(server.url(), "ALTER SYSTEM SET synchronous_standby_names = 'ghost'", "SELECT pg_reload_conf()")
    connection = await asyncpg.connect(server.url())
    try:
        with contextlib.suppress(TimeoutError):
            while True:  # It takes a moment until the server waits.
                await connection.execute("CREATE TABLE probe (); DROP TABLE probe", timeout=1)
        yield
    finally:
        connection.terminate()
        await execute(server.url(), "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")


@pytest.fixture
async def url(server: Server) -> str:
    name = f"log_{time.monotonic_ns()}"
    await execute(server.url(), f"CREATE DATABASE {name}")
    return server.url(name)


async def patiently(log: Any, append: Append) -> None:
    async with asyncio.timeout(SOON):
        while True:
            try:
                await log.append(append)
                return
            except LogUnavailable:
                await asyncio.sleep(0.05)


async def test_a_killed_server_loses_nothing_acknowledged_and_ends_no_lease(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_nodes, "BEAT", 0.1)
    monkeypatch.setattr(postgres_nodes, "LEASE", 1.0)
    monkeypatch.setattr(postgres_log, "_STALE", 0.5)
    acknowledged = dict[str, list[int]]()
    stopping = False

    async with open_node(url) as here, open_node(url) as there:
        log: Any = here.log

        async def write(number: int) -> None:
            recorder = EventRecorder(log, SteppableClock(), CountedEntropy(number), count=number * 1_000)
            user = f"user{number}"
            positions = acknowledged.setdefault(user, [])
            while not stopping:
                append, _ = recorder.prepare_start(user, max_unfinished=10_000)
                while True:
                    try:
                        positions.append((await log.append(append)).position)
                        break
                    except LogUnavailable:
                        await asyncio.sleep(0.02)
                    except Refusal:  # No credit is left.
                        return

        follower = RecordingFollower()
        async with there.log.follow(follower):
            await here.leases.offer("ada", "held")
            assert await here.leases.claim() == "held"
            writers = [asyncio.create_task(write(number)) for number in range(8)]
            await follower.until(lambda entries: len(entries) > 50)
            server.stop("immediate")
            async with asyncio.timeout(SOON):
                while True:
                    try:
                        await here.log.probe()
                        await asyncio.sleep(0.05)
                    except LogUnavailable:
                        break
            await asyncio.sleep(1.5)  # Longer than a lease.
            server.start()
            async with asyncio.timeout(SOON):
                while True:
                    try:
                        await here.log.probe()
                        break
                    except LogUnavailable:
                        await asyncio.sleep(0.05)
            await there.leases.abandoned()  # Ends the leases of dead nodes.
            assert await here.leases.renew(["held"]) == []
            stopping = True
            await asyncio.gather(*writers)
            count = sum(map(len, acknowledged.values()))
            await follower.until(lambda entries: len(entries) >= count)
        for user, positions in acknowledged.items():
            feed = await there.log.feed(user, after=0, anchor=0, limit=10_000)
            assert [entry.position for entry in feed.entries] == positions == list(range(1, len(positions) + 1))
            heard = [entry.position for entry in follower.entries if entry.user_id == user]
            assert heard == positions


async def test_appends_that_no_standby_confirms_leave_few_connections_behind(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_appends, "_MAX_UNREPLICATED", 2)
    async with open_node(url) as here:
        log: Any = here.log
        recorder = EventRecorder(log, SteppableClock())
        await recorder.start()
        appends = [recorder.prepare_start(f"user{number}")[0] for number in range(12)]
        async with without_standby(server):
            monkeypatch.setattr(postgres_database, "TIMEOUT", 0.3)
            for append in appends:
                with pytest.raises(LogUnavailable):
                    await log.append(append)
            admin = await asyncpg.connect(server.url())
            waiting = await admin.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%append_v1%'"
            )
            await admin.close()
            assert 1 <= waiting <= 3
        monkeypatch.undo()
        for append in appends:
            await patiently(log, append)


async def test_an_append_that_no_standby_has_is_not_acknowledged(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_database, "TIMEOUT", 0.5)
    async with open_node(url) as here:
        log: Any = here.log
        recorder = EventRecorder(log, SteppableClock())
        await recorder.start()
        append, _ = recorder.prepare_start()
        admin = await asyncpg.connect(server.url())
        async with without_standby(server):
            for _ in range(2):  # The retry waits for the standby, too.
                with pytest.raises(LogUnavailable):
                    await log.append(append)
                async with asyncio.timeout(SOON):
                    while await admin.fetchval(
                        "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                    ):
                        await asyncio.sleep(0.01)
            monkeypatch.setattr(postgres_database, "TIMEOUT", 20.0)
            waiting = asyncio.create_task(log.append(append))
            async with asyncio.timeout(SOON):
                while not await admin.fetchval(
                    "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                    " AND query LIKE '%append_v1%'"
                ):
                    await asyncio.sleep(0.01)
                with pytest.raises(LogUnavailable):  # The server says that it is committed, with a warning.
                    await waiting
        await admin.close()
        await patiently(log, append)
        assert (await log.feed("ada", after=0, anchor=0, limit=9)).head == 2


async def test_a_server_that_cannot_keep_the_promise_is_refused(server: Server, url: str) -> None:
    await execute(url, f"ALTER DATABASE {url.partition('///')[2].partition('?')[0]} SET synchronous_commit = off")
    with pytest.raises(StorageRefused, match="synchronous_commit"):
        async with open_node(url):
            pass
    with pytest.raises(StorageRefused, match="does not exist"):
        async with open_node(server.url("nowhere")):
            pass
    with pytest.raises(StorageRefused, match=r"^The log cannot be opened: Connection refused\.$"):
        async with open_node("postgresql://ada:secret@127.0.0.1:1/x"):
            pass
    for wrong in ("postgresql://ada:secret@[::1/x", "postgresql://ada:secret@host:port/x"):
        with pytest.raises(StorageRefused) as refused:
            async with open_node(wrong):
                pass
        assert "secret" not in str(refused.value)


async def test_unsafe_settings_of_the_server_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        """A connection to a server with these settings."""

        def __init__(self, **settings: str) -> None:
            self._settings = {"server_version_num": "150018", "fsync": "on", "synchronous_commit": "on", **settings}

        async def execute(self, _: str) -> None:
            pass

        async def fetchval(self, _: str, name: str) -> str:
            return self._settings.get(name, "")

    for settings, word in (({"fsync": "off"}, "fsync"), ({"server_version_num": "120022"}, "version 12")):
        with pytest.raises(StorageRefused, match=word):
            await postgres_database._check_server(Told(**settings))
    await postgres_database._check_server(Told(server_version_num="130000", synchronous_standby_names="s"))


async def test_a_schema_of_the_next_version_is_accepted_and_a_newer_one_refused() -> None:
    async with fresh_database() as url:
        async with open_node(url):
            pass
        try:
            known = len(postgres_database.SCHEMA)
            await execute(url, f"UPDATE stagecast.log SET version = {known + 1}")
            async with open_node(url):
                pass
            await execute(url, f"UPDATE stagecast.log SET version = {known + 2}")
            with pytest.raises(StorageRefused, match="newer Stagecast"):
                async with open_node(url):
                    pass
        finally:
            await execute(url, f"UPDATE stagecast.log SET version = {known}")


async def test_nodes_that_start_together_migrate_once(server: Server, url: str) -> None:
    async def start() -> str:
        async with open_node(url, epoch=f"e{time.monotonic_ns()}") as node:
            return node.log.epoch

    epochs = await asyncio.gather(*(start() for _ in range(4)))
    assert len(set(epochs)) == 1


async def test_a_role_that_may_not_create_gets_the_script_and_works_with_its_result(server: Server, url: str) -> None:
    name = f"role{time.monotonic_ns()}"
    await execute(url, f"CREATE ROLE {name} LOGIN")
    restricted = url.replace("user=stagecast", f"user={name}")
    with pytest.raises(StorageRefused, match="migrate --print"):
        async with open_node(restricted):
            pass
    script = await asyncio.to_thread(postgres_storage.migrate, restricted, "e7", only_print=True)
    grants = f"GRANT USAGE ON SCHEMA stagecast TO {name}; GRANT ALL ON ALL TABLES IN SCHEMA stagecast TO {name};"
    await execute(url, f"{script} {grants} GRANT ALL ON ALL SEQUENCES IN SCHEMA stagecast TO {name}")
    assert await asyncio.to_thread(postgres_storage.migrate, restricted, "e8", only_print=True) == ""
    async with open_node(restricted) as node:
        assert node.log.epoch == "e7"
        await EventRecorder(node.log, SteppableClock()).run_to_end()


async def test_a_statement_that_is_given_up_between_two_of_its_messages_is_unavailable(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = asyncpg.Connection._get_statement

    async def given_up(connection: Any, *arguments: Any, **options: Any) -> Any:
        statement = await prepare(connection, *arguments, **options)
        connection.terminate()
        return statement

    async with open_node(url) as node:
        log: Any = node.log
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Connection, "_get_statement", given_up)
            for _ in range(2):
                with pytest.raises(LogUnavailable):
                    await log._database.fetch("SELECT 1")
        assert await log._database.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("text", ["a\x00b", "\ud800"])
async def test_a_write_with_a_text_that_cannot_be_stored_fails_loudly(text: str) -> None:
    async with fresh_database() as url, open_node(url) as storage:
        database: Any = storage.log.__dict__["_database"]
        idle = database._idle[0]
        for write in (
            storage.quotas.add_stored("edit_1_a", 1, text),
            storage.quotas.admit_device(text, lambda: 1, 9),
            storage.sessions.end_all(text),
        ):
            with pytest.raises(ValueError, match="cannot store"):
                await write
        assert not idle.is_closed()  # The server is not to blame.
