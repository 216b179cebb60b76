"""The file log and its disk: full, held by others, synced, and erased."""

import asyncio
import re
import resource
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from domain.errors import AlreadyStarted, LogUnavailable
from domain.feed import Cursor
from domain.identity import Identity
from domain.ports.sessions import Session
from support.builders import NOON, RecordingFollower
from support.sqlite_files import RETENTION, Opened, content, held, image, opened, python, rows


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file grows over this size: the disk says no when the transaction is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@asynccontextmanager
async def no_room_for_bytes(here: Opened, path: Path) -> AsyncIterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as stranger:
        # Somebody who reads keeps the write-ahead log from being emptied, which would make room.
        stranger.execute("BEGIN")
        stranger.execute("SELECT count(*) FROM events").fetchall()
        with file_limit(path.with_name(f"{path.name}-wal").stat().st_size + 1_000):
            yield


@asynccontextmanager
async def no_room_for_pages(here: Opened, path: Path) -> AsyncIterator[None]:
    def limit(pages: int) -> Callable[[sqlite3.Connection], object]:
        return lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}")

    await here.database.write(limit(1))  # It never goes below the present size.
    yield
    await here.database.write(limit(2**30))


@pytest.mark.parametrize("no_room", [no_room_for_bytes, no_room_for_pages])
async def test_a_full_disk_refuses_appends_whole_and_recovers_when_there_is_room(
    path: Path, no_room: Callable[[Opened, Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    follower = RecordingFollower()
    async with opened(path) as here, here.log.follow(follower):
        generation = await here.recorder.start(prompt="x" * 4_000)
        before = await image(here.log, "ada", "bob")
        appends = [here.recorder.prepare_start(user_id, prompt="x" * 4_000)[0] for user_id in ("ada", "bob")]
        appends.append(here.recorder.prepare(generation, "composition", message="x" * 9_000)[0])
        async with no_room(here, path):
            for _ in range(2):
                results = await asyncio.gather(*map(here.log.append, appends), return_exceptions=True)
                assert [type(result) for result in results] == [LogUnavailable] * 3
            assert await image(here.log, "ada", "bob") == before
        assert caplog.records
        assert "xxx" not in caplog.text
        logged = [await here.log.append(append) for append in appends]
        assert [entry.sequence for entry in logged] == [1, 1, 2]
        assert follower.entries[1:] == logged
        whole = await image(here.log, "ada", "bob")
    async with opened(path) as again:
        assert await image(again.log, "ada", "bob") == whole


async def test_a_log_whose_checkpoint_was_cut_short_is_opened_and_completed(path: Path) -> None:
    """A process that dies while it writes the WAL back leaves the file shorter than its header says."""
    wal, left = path.with_name(f"{path.name}-wal"), path.with_name("left.db")
    async with opened(path) as here:
        short = len(content(path))
        generations = [await here.recorder.start(prompt="x" * 4_000) for _ in range(9)]
        unwritten = content(wal)
        with closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint")
        whole = content(path)
    assert len(whole) > short
    left.write_bytes(whole[:short])
    left.with_name("left.db-wal").write_bytes(unwritten)
    async with opened(left) as again:
        for generation in generations:
            await again.recorder.move(generation, "composition")
    assert len(content(left)) >= len(whole)


async def test_an_append_is_refused_after_waiting_for_another_writers_lock(path: Path) -> None:
    async with opened(path) as here:
        append, _ = here.recorder.prepare_start()
        with held(path), pytest.raises(LogUnavailable):
            await here.log.append(append)
        assert (await here.log.append(append)).position == 1


async def test_every_transaction_is_synced_before_it_is_answered(path: Path) -> None:
    """A power cut cannot be tried here. This is what SQLite says of how it writes; 2 is FULL."""
    async with opened(path) as here:
        assert await here.database.write(rows("PRAGMA synchronous")) == [(2,)]


# --- leaving ---------------------------------------------------------------------------------------------


async def test_closing_finishes_pending_operations_and_refuses_new_ones(path: Path) -> None:
    follower: list[Any] = []
    async with opened(path) as here, here.log.follow(follower.append):
        appends = [asyncio.create_task(here.recorder.start(f"user {n}")) for n in range(300)]
        await asyncio.sleep(0)
        await here.database.close()
        assert len(await asyncio.gather(*appends)) == len(follower) == 300
        for refused in (here.recorder.start(), here.log.standing("ada"), here.sessions.end("pid")):
            with pytest.raises(LogUnavailable):
                await refused
        await here.database.close()
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}-lock"}
    async with opened(path) as again:
        assert len(await again.log.unfinished()) == 300


#: Appends once, and comes to its end while another append is under way.
_FORGETTING: Final = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from adapters.sqlite.database import Database
from adapters.sqlite.log import SqliteLog
from support.builders import EventRecorder, SteppableClock

async def main():
    recorder = EventRecorder(SqliteLog(Database(Path(sys.argv[1]), epoch="e1"), credits=1, clock=SteppableClock()))
    await recorder.start()
    (await recorder.log.standing("ada")).credit
    global under_way
    under_way = asyncio.create_task(recorder.start("bob"))
    await asyncio.sleep(0)

asyncio.run(main())
"""


async def test_a_program_that_does_not_close_the_log_exits_and_loses_nothing(path: Path) -> None:
    process = await python(_FORGETTING, path)
    assert await process.wait() == 0
    async with opened(path) as again:
        assert (await again.log.standing("ada")).credit == 0


# --- what was deleted, and what it costs -----------------------------------------------------------------

_SECRET: Final = "a-secret-that-is-to-go"


def bytes_left(path: Path) -> int:
    """How often the secret is in any of the files."""
    return sum(content(file).count(_SECRET.encode()) for file in path.parent.iterdir())


@pytest.mark.parametrize("retention", [True, False])
async def test_removed_data_is_erased_from_the_file(path: Path, retention: bool) -> None:
    async with opened(path) as here:
        recorder = here.recorder
        secret = [await recorder.start(prompt=_SECRET, key=_SECRET)]
        others = [await recorder.start("bob", prompt="x" * 150 * n) for n in range(1, 21)]
        secret += [await recorder.start(prompt=_SECRET * 8 * n, metadata={"note": _SECRET * n}) for n in range(1, 21)]
        for generation in (*others, *secret):
            await recorder.move(generation, "composition", "failed")
        assert bytes_left(path) > 1_000
        for generation in secret:
            assert await here.log.remove(generation.generation_id, retention=retention)
        async with asyncio.timeout(20):
            while bytes_left(path):
                await asyncio.sleep(0.1)
        assert len(await here.log.generations("bob", limit=100)) == 20


async def test_the_file_does_not_grow_at_a_constant_amount_of_data(path: Path) -> None:
    async with opened(path) as here:

        async def turn_over(count: int) -> int:
            for _ in range(count):
                generations = [here.recorder.start_and_fail(prompt="x" * 3_000) for _ in range(20)]
                for generation in await asyncio.gather(*generations):
                    await here.log.remove(generation.generation_id, retention=True)
            [(pages,)] = await here.database.read(rows("PRAGMA page_count"))
            return int(pages)

        early = await turn_over(2)
        assert await turn_over(10) <= early + 5
        assert await here.database.read(rows("SELECT id FROM generations UNION ALL SELECT id FROM events")) == []


async def test_grants_and_sessions_that_have_expired_leave_nothing(path: Path) -> None:
    async with opened(path) as here:
        later = NOON + 2 * RETENTION
        for moment in (NOON, later):
            for number in range(150 if moment == NOON else 2):
                session = Session(Identity(f"user {number}", None, service=False), Cursor(0, 0, 0), 0, None)
                await here.sessions.save(f"{moment} {number}", session, at=moment)
                await here.log.grant("ada", 1, key=f"{moment} {number}", at=moment, until=moment + RETENTION)
        for table in ("sessions", "grants"):
            assert await here.database.read(rows(f"SELECT count(*) FROM {table}")) == [(2,)]


async def test_no_query_scans_a_whole_table(path: Path) -> None:
    """What a question costs depends on its answer, not on how many users and generations there are."""
    asked: list[str] = []
    async with opened(path, outbox=True) as here:
        for where in (here.database.write, here.database.read):
            await where(lambda connection: connection.set_trace_callback(asked.append))
        log, recorder = here.log, here.recorder
        for retention in (True, False):
            generation = await recorder.run_to_end(key="k")
            append, _ = recorder.prepare_start(key="k")
            with pytest.raises(AlreadyStarted):
                await log.append(append)
            append, _ = recorder.prepare(await recorder.start(), "composition")
            for _ in range(2):
                await log.append(append)
            await log.grant("ada", 5, key="k", at=NOON, until=NOON + RETENTION)
            for active in (None, True, False):
                await log.generations("ada", active=active, before=7, limit=5)
            await image(log, "ada")
            await log.delivered(generation.generation_id)
            await log.summary(generation.generation_id)
            await log.images(generation.generation_id)
            await log.remove(generation.generation_id, retention=retention)
            session = Session(Identity("ada", None, service=False), Cursor(0, 0, 0), 0, None)
            await here.sessions.save("pid", session, at=NOON)
            await here.sessions.load("pid", at=NOON)
            await here.sessions.touch(["pid"], at=NOON)
            await here.sessions.end("pid")

        def plans(connection: sqlite3.Connection) -> dict[str, str]:
            return {
                statement: "; ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}"))
                for statement in set(asked)
                if statement.strip().startswith(("SELECT", "UPDATE", "DELETE", "REPLACE", "INSERT"))
            }

        found = await here.database.read(plans)
    assert len(found) > 30
    scans = {scan for plan in found.values() for scan in re.findall(r"SCAN (?!json_each)\w+.*?(?=;|$)", plan)}
    # Three indexes hold nothing but what is asked for.
    assert scans <= {
        "SCAN CONSTANT ROW",
        "SCAN generations USING INDEX active_generations",
        "SCAN generations USING INDEX unfinished_generations",
        "SCAN generations USING INDEX undelivered_generations",
    }
