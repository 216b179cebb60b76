"""What only the durable log promises: its file outlives the process, which alone has it, and the loop never waits."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Final

import pytest

from adapters.sqlite.batch_thread import BatchThread
from adapters.sqlite.database import Database
from adapters.sqlite.files import SCHEMA
from adapters.sqlite.log import SqliteLog
from domain.errors import LogUnavailable
from domain.identity import Identity
from domain.ports.sessions import Session
from domain.ports.storage import StorageRefused
from support.builders import NOON, RecordingFollower, bodies, statuses
from support.sqlite_files import RETENTION, content, held, image, opened, python, rows

# --- what is there again ---------------------------------------------------------------------------------


async def test_a_reopened_log_is_unchanged(path: Path) -> None:
    async with opened(path, outbox=True) as first:
        recorder = first.recorder
        await recorder.run_to_end("ada", key="k", face_swap=True)
        gone, purged = await recorder.start_and_fail("ada"), await recorder.start_and_fail("ada")
        running = await recorder.move(await recorder.start("ada"), "composition")
        await recorder.start("bob", key="k", fingerprint="bobs")
        sent = await recorder.start_and_fail("Ünï 🎨 '")
        await first.log.delivered(sent.generation_id)
        await first.log.remove(purged.generation_id, retention=True)
        await first.log.remove(gone.generation_id, retention=False)
        cursor = await first.log.head_cursor("ada")
        assert await first.log.grant("cy", 5, key="g", at=NOON, until=NOON + RETENTION) == 105
        session = Session(Identity("ada", NOON + RETENTION, service=True), cursor, cursor.live, "tag")
        await first.sessions.save("pid", session, at=NOON)
        before = await image(first.log, "ada", "bob", "cy", "Ünï 🎨 '", "nobody")
    async with opened(path, epoch="e2", outbox=True) as again:
        assert again.log.epoch == "e1"
        assert await image(again.log, "ada", "bob", "cy", "Ünï 🎨 '", "nobody") == before
        assert cursor.usable(await again.log.feed("ada", after=cursor.seen, anchor=cursor.live, limit=0))
        assert await again.sessions.load("pid", at=NOON) == session
        assert await again.log.grant("cy", 5, key="g", at=NOON, until=NOON + RETENTION) == 105
        again.recorder.entropy.event_id()
        await again.recorder.finish(running)
        history = await again.log.generation(running.generation_id)
        assert statuses(history)[-1] == "completed"
        assert history is not None
        assert history.events[-1].position == cursor.live + 4


async def test_an_append_whose_reply_was_lost_with_the_process_is_recognised(path: Path) -> None:
    async with opened(path) as first:
        append, generation = first.recorder.prepare_start(key="k", not_after=NOON)
        logged = await first.log.append(append)
    async with opened(path) as again:
        again.recorder.clock.step(3_600)
        assert await again.log.append(append) == logged
        assert (await again.log.standing("ada")).credit == 99
        assert statuses(await again.log.generation(generation.generation_id)) == ["started"]


async def test_the_epoch_is_stored_in_the_file(tmp_path: Path) -> None:
    async with opened(tmp_path / "one.db", epoch="one") as one, opened(tmp_path / "two.db", epoch="two") as two:
        assert (one.log.epoch, two.log.epoch) == ("one", "two")
        assert one.log.durable


async def test_the_credits_setting_applies_to_new_users(path: Path) -> None:
    async with opened(path, credits=3) as first:
        await first.recorder.start("ada")
    async with opened(path, credits=50) as again:
        assert [(await again.log.standing(user_id)).credit for user_id in ("ada", "new")] == [2, 50]


async def test_a_user_from_before_balances_gets_the_initial_credits(path: Path) -> None:
    """I6 over a change of the setting: what was not reserved is not given back."""
    async with opened(path, credits=None) as first:
        free = await first.recorder.start("ada")
    async with opened(path, credits=10) as again:
        again.recorder.count = 10
        assert (await again.log.standing("ada")).credit == 10
        await again.recorder.move(free, "failed")
        assert bodies(await again.log.generation(free.generation_id))[-1]["credit"] == 10
        await again.recorder.start("ada")
        assert (await again.log.standing("ada")).credit == 9


async def test_a_reserved_credit_is_refunded_while_balances_are_off(path: Path) -> None:
    async with opened(path, credits=10) as first:
        paid = await first.recorder.start("ada")
    async with opened(path, credits=None) as off:
        off.recorder.count = 10
        await off.recorder.move(paid, "failed")
        assert "credit" not in bodies(await off.log.generation(paid.generation_id))[-1]
        await off.recorder.start("ada")
        assert (await off.log.standing("ada")).credit is None
    async with opened(path, credits=50) as again:
        assert (await again.log.standing("ada")).credit == 10


async def test_ends_from_before_the_outbox_are_not_delivered(path: Path) -> None:
    async with opened(path, outbox=True) as first:
        kept = await first.recorder.start_and_fail()
    async with opened(path) as without:
        without.recorder.count = 10
        await without.recorder.start_and_fail()
        assert list(await without.log.claim_undelivered(10)) == []
    async with opened(path, outbox=True) as again:
        assert [entry.generation_id for entry in await again.log.claim_undelivered(10)] == [kept.generation_id]


# --- a killed process ------------------------------------------------------------------------------------

#: Appends in eight tasks for ever, and prints what was acknowledged.
_APPENDING: Final = """
import asyncio, itertools, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from adapters.sqlite.database import Database
from adapters.sqlite.log import SqliteLog
from adapters.system import SystemEntropy
from support.builders import CountedEntropy, EventRecorder, SteppableClock, path_of

async def live(recorder, user, life):
    for number in itertools.count():
        append, generation = recorder.prepare_start(user, generation_id=f"edit_1_{life}{user}{number}")
        for status in path_of("edit")[1:4 + number % 3] + ("failed",) * (number % 2):
            logged = await recorder.log.append(append)
            print(logged.user_id, logged.position, logged.event_id, flush=True)
            if generation.finished:
                break
            append, generation = recorder.prepare(generation, status)

async def main():
    database = Database(Path(sys.argv[1]), epoch="e1")
    log = SqliteLog(database, credits=100_000, clock=SteppableClock())
    recorder = EventRecorder(log, SteppableClock(), SystemEntropy())
    life = recorder.entropy.token()
    print("ready", flush=True)
    await asyncio.gather(*(live(recorder, f"user{number % 3}", f"{life}{number}") for number in range(8)))

asyncio.run(main())
"""


@asynccontextmanager
async def another_process(path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """It has the log open, and appends to it. Killed at the end."""
    process = await python(_APPENDING, path)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_acknowledged_appends_survive_kill_9(path: Path) -> None:
    acknowledged: list[tuple[str, int, int]] = []
    for round_ in range(3):
        async with another_process(path) as process:
            assert process.stdout is not None
            for _ in range(100 + 37 * round_):
                user_id, position, event_id = (await process.stdout.readline()).decode().split()
                acknowledged.append((user_id, int(position), int(event_id)))
            process.kill()
            rest = (await process.stdout.read()).decode().rpartition("\n")[0].splitlines()
            acknowledged += [(user, int(position), int(event)) for user, position, event in map(str.split, rest)]
        async with opened(path, credits=100_000) as again:
            await check(again.log, acknowledged)
            assert await again.database.read(rows("PRAGMA integrity_check")) == [("ok",)]
            assert await again.database.read(rows("PRAGMA foreign_key_check")) == []


async def check(log: SqliteLog, acknowledged: list[tuple[str, int, int]]) -> None:
    for user_id in {user_id for user_id, _, _ in acknowledged}:
        feed = await log.feed(user_id, after=0, anchor=0, limit=100_000)
        ids = {entry.position: entry.event_id for entry in feed.entries}
        assert list(ids) == list(range(1, feed.head + 1))
        mine = {position: event_id for owner, position, event_id in acknowledged if owner == user_id}
        assert {position: ids.get(position) for position in mine} == mine
        histories = await log.generations(user_id, limit=100_000)
        for summary in histories:
            history = await log.generation(summary.generation_id)
            assert history is not None
            assert [entry.sequence for entry in history.events] == list(range(1, len(history.events) + 1))
        failed = sum(statuses(history)[-1] == "failed" for history in histories)
        assert (await log.standing(user_id)).credit == 100_000 - len(histories) + failed


# --- who may open it -------------------------------------------------------------------------------------


async def test_a_second_process_is_refused_until_the_first_has_ended(path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    async with another_process(path) as process:
        for name in (path, link):
            with pytest.raises(StorageRefused, match=r"stagecast\.db is in use by another process\.$"):
                Database(name, epoch="e1")
        process.kill()
        await process.wait()
        async with opened(link):
            with pytest.raises(StorageRefused, match="in use"):
                Database(path, epoch="e1")


async def test_the_folder_is_created_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "a folder?mode=memory#%41" / "ünï" / "log.db"
    async with opened(path) as first:
        await first.recorder.start()
        assert (await first.log.standing("ada")).credit == 99
    assert path.is_file()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def foreign(path: Path, script: str) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda path: written(path, b"a diary\n"),
        lambda path: written(path, b"x" * 100_000),
        lambda path: foreign(path, "CREATE TABLE users (id)"),
        lambda path: foreign(path, "PRAGMA application_id = 7; CREATE TABLE t (id)"),
        lambda path: foreign(path, "PRAGMA user_version = 1; PRAGMA journal_mode = WAL"),
    ],
)
def test_a_file_that_is_not_a_log_is_refused_and_left_unchanged(path: Path, make: Callable[[Path], Path]) -> None:
    before = content(make(path))
    for _ in range(2):  # The refusal leaves it unlocked.
        with pytest.raises(StorageRefused, match=r"stagecast\.db is not a log of Stagecast\.$"):
            Database(path, epoch="e1")
    assert content(path) == before


@pytest.mark.parametrize("where", ["folder", "folder/file/log.db", "loop/log.db"])
def test_a_log_that_cannot_be_opened_is_refused_with_a_sentence(tmp_path: Path, where: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StorageRefused, match=r"^The log .* cannot be opened: .*[^.]\.$"):
        Database(tmp_path / where, epoch="e1")


async def test_an_empty_file_is_initialised_as_a_log(path: Path) -> None:
    written(path, b"")
    async with opened(path) as first:
        await first.recorder.start()


# --- versions of the schema ------------------------------------------------------------------------------

#: What a next version may do: add a column with a meaning, and another table.
_LATER: Final = (
    *SCHEMA,
    "ALTER TABLE users ADD COLUMN note TEXT NOT NULL DEFAULT ''; UPDATE users SET note = 'was ' || user_id",
    "CREATE TABLE notes AS SELECT note FROM users",
)


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        return int(version)


@pytest.mark.parametrize("steps", [1, 2])
async def test_a_log_of_an_older_version_is_migrated_with_all_its_data(path: Path, steps: int) -> None:
    async with opened(path) as older:
        generation = await older.recorder.start_and_fail()
        before = await image(older.log, "ada")
    assert version(path) == len(SCHEMA)
    schema = _LATER[: len(SCHEMA) + steps]
    for _ in range(2):  # The steps are gone once.
        async with opened(path, schema=schema) as newer:
            assert await image(newer.log, "ada") == before
            assert await newer.database.read(rows("SELECT note FROM users")) == [("was ada",)]
        assert version(path) == len(schema)
    async with opened(path, schema=schema) as newer:
        assert await newer.log.remove(generation.generation_id, retention=True)


async def test_a_failed_migration_step_keeps_the_old_version(path: Path) -> None:
    async with opened(path) as older:
        await older.recorder.start_and_fail()
        before = await image(older.log, "ada")
    broken = (*_LATER, "CREATE TABLE more (id); DROP TABLE users; SELECT no FROM where_there_is_none")
    with pytest.raises(StorageRefused, match="cannot be opened: no such table"):
        Database(path, epoch="e1", schema=broken)
    assert version(path) == len(_LATER)
    async with opened(path, schema=_LATER) as again:
        assert await image(again.log, "ada") == before


async def test_a_log_of_a_newer_version_is_refused_and_left_unchanged(path: Path) -> None:
    async with opened(path, schema=_LATER) as newer:
        await newer.recorder.start_and_fail()
    before = content(path)
    sentence = rf"was written by a newer Stagecast \(schema {len(_LATER)}; this one knows {len(SCHEMA)}\)\.$"
    with pytest.raises(StorageRefused, match=sentence):
        Database(path, epoch="e1")
    assert content(path) == before


# --- a disk that is slow, or full ------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
async def test_reads_and_the_event_loop_go_on_while_a_write_waits_for_the_disk(path: Path) -> None:
    async with opened(path) as here:
        generation = await here.recorder.start()
        append, _ = here.recorder.prepare(generation, "composition")
        with held(path):
            waiting = asyncio.create_task(here.log.append(append))
            for _ in range(50):
                assert (await here.log.feed("ada", after=0, anchor=0, limit=10)).head == 1
            assert not waiting.done()
        assert (await waiting).position == 2


@pytest.mark.usefixtures("patient")
async def test_operations_that_wait_for_the_disk_share_one_transaction(path: Path) -> None:
    """One commit, and so one wait for the disk, for many who append at the same time."""
    async with opened(path) as here:
        done: list[str] = []
        await here.database.write(lambda connection: connection.set_trace_callback(done.append))
        with held(path):
            appends = [asyncio.create_task(here.recorder.start(f"user {n}")) for n in range(100)]
            await asyncio.sleep(0)
        await asyncio.gather(*appends)
        assert 1 <= done.count("COMMIT") <= 3
        assert sum(statement.strip().startswith("INSERT INTO events") for statement in done) == 100


@pytest.mark.usefixtures("patient")
async def test_a_refusal_in_a_batch_does_not_undo_the_others(path: Path) -> None:
    follower = RecordingFollower()
    async with opened(path, credits=1) as here, here.log.follow(follower):
        first, generation = here.recorder.prepare_start()
        second, _ = here.recorder.prepare(generation, "composition")
        with held(path):
            poor, bobs = here.recorder.prepare_start()[0], here.recorder.prepare_start("bob")[0]
            appends = (first, poor, second, second, bobs)
            attempts = [asyncio.create_task(here.log.append(append)) for append in appends]
            await asyncio.sleep(0)
        results = await asyncio.gather(*attempts, return_exceptions=True)
        assert [type(result).__name__ for result in results] == [
            "Logged", "InsufficientCredit", "Logged", "Logged", "Logged"
        ]  # fmt: skip
        assert follower.entries == [results[0], results[2], results[4]]


@pytest.mark.usefixtures("patient")
async def test_a_failed_operation_changes_nothing(path: Path) -> None:
    def break_off(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE users SET credit = 0")
        raise ZeroDivisionError

    def make_no_sense(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE users SET credit = 0")
        connection.execute("no SQL")

    async with opened(path) as here:
        await here.recorder.start()
        with held(path):
            first = asyncio.create_task(here.recorder.start())
            attempts = [asyncio.create_task(here.database.write(each)) for each in (break_off, make_no_sense)]
            last = asyncio.create_task(here.recorder.start())
            await asyncio.sleep(0)
        results = await asyncio.gather(*attempts, return_exceptions=True)
        assert [type(result) for result in results] == [ZeroDivisionError, LogUnavailable]
        await asyncio.gather(first, last)
        assert (await here.log.standing("ada")).credit == 97
        for broken in (break_off, make_no_sense):
            with pytest.raises((ZeroDivisionError, LogUnavailable)):
                await here.database.read(broken)
        assert (await here.log.standing("ada")).credit == 97


class Dawdling:
    """An operation that keeps the writing thread in its transaction until it is told to go on."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.going_on = threading.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, _: sqlite3.Connection) -> None:
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.going_on.wait(20)


@pytest.mark.parametrize("in_the_middle", [False, True])
async def test_a_cancelled_append_breaks_nothing(path: Path, in_the_middle: bool) -> None:
    """Neither before the transaction has begun nor in the middle of it."""
    follower, before, behind = RecordingFollower(), Dawdling(), Dawdling()
    async with opened(path) as here, here.log.follow(follower):
        appends = [here.recorder.prepare_start(f"user {n}")[0] for n in range(40)]
        first = asyncio.create_task(here.database.write(before))
        await before.begun.wait()
        tasks = [asyncio.create_task(here.log.append(append)) for append in appends]
        last = asyncio.create_task(here.database.write(behind))
        await asyncio.sleep(0)
        if in_the_middle:
            before.going_on.set()
            await behind.begun.wait()
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks[::2], return_exceptions=True)
        for dawdling in (before, behind):
            dawdling.going_on.set()
        await asyncio.gather(first, last)
        kept = await asyncio.gather(*tasks[1::2])
        assert len(follower.entries) == (40 if in_the_middle else 20)
        # Whoever gave up tries again, and finds out which of them it was.
        again = [await here.log.append(append) for append in appends[::2]]
        assert {entry.sequence for entry in (*kept, *again)} == {1}
        assert sorted(follower.entries) == sorted((*kept, *again))
        assert len(await here.log.unfinished()) == 40


async def test_a_cancelled_read_breaks_nothing(path: Path) -> None:
    async with opened(path) as here:
        await here.recorder.start()
        tasks = [asyncio.create_task(here.log.standing("ada")) for _ in range(40)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        assert {standing.credit for standing in await asyncio.gather(*tasks[1::2])} == {99}


async def test_the_thread_survives_a_failed_operation() -> None:
    thread: BatchThread[int] = BatchThread("test", lambda works: [10 // work for work in works], most=9)
    with pytest.raises(ZeroDivisionError):
        await thread.submit(0)
    assert await thread.submit(5) == 2
    thread.close()


#: PostgreSQL's reserved words (as of version 18), which cannot name a column without quotes.
RESERVED: Final = """
    all analyse analyze and any array as asc asymmetric authorization binary both case cast check collate collation
    column concurrently constraint create cross current_catalog current_date current_role current_schema
    current_time current_timestamp current_user default deferrable desc distinct do else end except false fetch for
    foreign freeze from full grant group having ilike in initially inner intersect into is isnull join lateral
    leading left like limit localtime localtimestamp natural not notnull null offset on only or order outer overlaps
    placing primary references returning right select session_user similar some symmetric system_user table
    tablesample then to trailing true union unique user using variadic verbose when where window with
"""


def test_no_table_and_no_column_is_named_by_a_reserved_word() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        for step in SCHEMA:
            connection.executescript(step)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        columns = {row[1] for table in tables for row in connection.execute(f"PRAGMA table_info({table})")}
        assert (tables | columns).isdisjoint(RESERVED.split())
        for word in tables | columns:
            connection.execute(f"CREATE TABLE test_{word} ({word})")
