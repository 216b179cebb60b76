"""A log that is damaged: what cannot be read counts as deleted and is kept, and everybody else is served as before."""

import asyncio
import contextlib
import random
import re
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from adapters.sqlite.database import Database
from adapters.sqlite.files import LogDamaged, examine
from adapters.sqlite.log import SqliteLog
from adapters.sqlite.sessions import SqliteSessions
from domain.errors import IdempotencyMismatch
from domain.events import decode
from domain.feed import Cursor
from domain.identity import Identity
from domain.ports.sessions import Session
from domain.rehydrate import generation_of, request_of
from support.builders import NOON, CountedEntropy, EventRecorder, SteppableClock, WholeLog, fold
from support.harness import running

DAY: Final = timedelta(days=1)
SECRET: Final = "a prompt that nobody may read"
USERS: Final = ("ada", "bob", "cy")


class Life(EventRecorder):
    """One life of the log; `database` is what it is made on."""

    log: SqliteLog
    database: Database


@asynccontextmanager
async def opened(path: Path, *, count: int = 0) -> AsyncIterator[Life]:
    database = Database(path, epoch="e1")
    clock = SteppableClock()
    log = SqliteLog(database, credits=100, clock=clock, outbox=True)
    life = Life(log, clock, CountedEntropy(count), count)
    life.database = database
    try:
        yield life
    finally:
        await database.close()


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """A log with finished, running, waiting, removed and deleted generations of three users."""
    async with opened(tmp_path / "log.db") as life:
        for user in USERS:
            await life.run_to_end(user, key=f"key of {user}", face_swap=True, prompt=SECRET)
            await life.log.remove((await life.start_and_fail(user)).generation_id, retention=True)
            await life.log.remove((await life.start_and_fail(user)).generation_id, retention=False)
            await life.start_and_fail(user)
            await life.move(await life.start(user, prompt=SECRET), "composition")
            await life.start(user)
            await life.log.grant(user, 5, key="k", at=NOON, until=NOON + DAY)
    return tmp_path / "log.db"


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


async def shown(life: EventRecorder, user: str) -> list[tuple[str, int]]:
    """The user's generations, each of which has to be readable."""
    found = []
    for summary in await life.log.generations(user, limit=100):
        history = await life.log.generation(summary.generation_id)
        assert history is not None
        found.append(history)
        assert generation_of(summary).snapshot() == generation_of(history).snapshot()
        every = [decode(entry.event) for entry in history.events if entry.event is not None]
        whole = fold(history.generation_id, history.kind, user, request_of(history), every)
        assert whole.snapshot() == generation_of(history).snapshot()
        assert [event.sequence for event in every] == list(range(1, len(every) + 1))
    return [(history.generation_id, len(history.events)) for history in found]


#: What is done to one generation of ada, `{g}`, which has run to its end.
ONE: Final = {
    "its JSON is cut": "UPDATE events SET event = substr(event, 1, 40) WHERE generation = {g} AND sequence = 3",
    "text in place of bytes": "UPDATE events SET event = CAST(event AS TEXT) WHERE generation = {g} AND sequence = 2",
    "nothing in place of an event": "UPDATE events SET event = NULL WHERE generation = {g} AND sequence = 1",
    "an unknown status": 'UPDATE events SET event = CAST(replace(CAST(event AS TEXT), \'"status":"composition"\','
    ' \'"status":"banana"\') AS BLOB) WHERE generation = {g} AND sequence = 2',
    "an unknown kind": "UPDATE generations SET kind = 'banana' WHERE id = {g}",
    "the other kind": "UPDATE generations SET kind = 'generate' WHERE id = {g}",
    "a broken order": "UPDATE generations SET order_json = x'7b22' WHERE id = {g}",
    "invalid UTF-8 in an event": "UPDATE events SET event = x'ff' WHERE generation = {g} AND sequence = 2",
    "invalid UTF-8 in a name": "UPDATE events SET name = CAST(x'ff' AS TEXT) WHERE generation = {g} AND sequence = 2",
    "invalid UTF-8 in a key": "UPDATE generations SET idempotency_key = CAST(x'ff' AS TEXT) WHERE id = {g}",
    "a hole in the sequence": "DELETE FROM events WHERE generation = {g} AND sequence = 2",
    "no end": "DELETE FROM events WHERE generation = {g} AND sequence = 8",
    "no events": "DELETE FROM events WHERE generation = {g}",
    "events without their row": "DELETE FROM generations WHERE id = {g}",
    "a negative position": "UPDATE events SET position = -7 WHERE generation = {g} AND sequence = 2",
    "a position ahead": "UPDATE events SET position = 20 WHERE generation = {g} AND sequence = 8",
    "a position that is text": "UPDATE events SET position = 'x' WHERE generation = {g} AND sequence = 2",
    "a negative event id": "UPDATE events SET event_id = -7 WHERE generation = {g} AND sequence = 2",
    "another's event": "UPDATE events SET owner = 2, position = 90 WHERE generation = {g} AND sequence = 2",
    "an end that is none": "UPDATE generations SET end_position = NULL WHERE id = {g}",
    "an impossible moment": "UPDATE generations SET ended_at = 1 << 62 WHERE id = {g}",
    "invalid UTF-8 in a flag": "UPDATE generations SET free = CAST(x'ff' AS TEXT) WHERE id = {g}",
    "a flag that is none": "UPDATE generations SET reserved = 'x' WHERE id = {g}",
    "deleted with its events": "UPDATE generations SET deleted = 1 WHERE id = {g}",
}


@pytest.mark.parametrize("damage", ONE.values(), ids=list(ONE))
async def test_a_generation_that_cannot_be_read_counts_as_deleted_and_is_kept(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    [(generation, generation_id)] = rows(
        path, "SELECT id, generation_id FROM generations WHERE idempotency_key = 'key of ada'"
    )
    change(path, damage.format(g=generation))
    async with opened(path, count=100) as life:
        assert await life.log.generation(generation_id) is None
        assert await life.log.set_aside(generation_id) is ("DELETE FROM generations" not in damage)
        assert len(await shown(life, "ada")) == 3
        assert len(await shown(life, "bob")) == 4
        await life.log.examine()
        [said] = [record.getMessage() for record in caplog.records]
        assert "counts as deleted" in said
        assert SECRET not in said
        # Who comes with any cursor goes on, or is told that its past is gone.
        feed = await life.log.feed("ada", after=0, anchor=0, limit=1_000)
        assert [entry for entry in feed.entries if entry.generation_id == generation_id and entry.event] == []
        present = await life.log.head_cursor("ada")
        whole = await life.run_to_end("ada", key="key of ada")
        after = await life.log.feed("ada", after=present.live, anchor=present.live, limit=100)
        assert present.usable(after)
        assert [entry.sequence for entry in after.entries] == list(range(1, whole.sequence + 1))
        assert whole.finished
    assert rows(path, "SELECT count(*) FROM damaged_generations") == [(1,)]
    caplog.clear()
    [line] = examine(path).damage
    assert ("is damaged" in line, SECRET in line) == (True, False)
    async with opened(path) as life:
        assert caplog.records == []
        await forget(life)
    assert examine(path).damage == []
    assert rows(path, "SELECT count(*) FROM damaged_events") == [(0,)]


async def forget(life: Life) -> None:
    """Let retention remove all that has ended."""
    while expired := await life.log.finished_before(datetime(9000, 1, 1, tzinfo=UTC), 10):
        for generation_id in expired:
            await life.log.remove(generation_id, retention=True)


async def test_a_start_checks_only_what_is_unfinished_and_the_rest_is_checked_when_it_is_read_or_later(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for [generation] in rows(path, "SELECT id FROM generations WHERE idempotency_key LIKE 'key of %'"):
        change(path, ONE["a broken order"].format(g=generation))
    waiting = "(SELECT max(id) FROM generations WHERE owner = 1)"
    change(path, ONE["a broken order"].format(g=waiting))

    def said() -> int:
        return sum("counts as deleted" in record.getMessage() for record in caplog.records)

    async with opened(path) as life:
        assert said() == 1
        await shown(life, "ada")
        assert said() == 2
        assert await life.log.find_by_idempotency_key("bob", "key of bob") is None
        assert said() == 3
        await life.log.examine()
        assert said() == 4
        await life.log.examine()
        for user in USERS:
            await shown(life, user)
        assert said() == 4


READS: Final = {
    "the generation": lambda log, name: log.generation(name),
    "the list": lambda log, _: log.generations("ada", limit=10),
    "the finished": lambda log, _: log.generations("ada", active=False, limit=10),
    "the feed": lambda log, _: log.feed("ada", after=0, anchor=0, limit=100),
    "the key": lambda log, _: log.find_by_idempotency_key("ada", "key of ada"),
    "the outbox": lambda log, _: log.claim_undelivered(10),
    "the expired": lambda log, _: log.finished_before(datetime(9000, 1, 1, tzinfo=UTC), 10),
    "the removal": lambda log, name: log.remove(name, retention=False),
}


@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
async def test_rows_are_checked_when_they_are_read(
    path: Path, read: Callable[[WholeLog, str], Awaitable[object]], caplog: pytest.LogCaptureFixture
) -> None:
    [(generation, name)] = rows(path, "SELECT id, generation_id FROM generations WHERE idempotency_key = 'key of ada'")
    change(path, ONE["invalid UTF-8 in an event"].format(g=generation))
    async with opened(path) as life:
        assert caplog.records == []
        found = await read(life.log, name)
        # Of it the places stay, without their events.
        assert f'"generationId":"{name}"' not in repr(found)
        [record] = caplog.records
        assert name in record.getMessage()


async def test_the_pictures_of_a_damaged_generation_are_kept_until_retention_ends(tmp_path: Path) -> None:
    log = f"sqlite:///{tmp_path}/log.db"
    async with running(tmp_path / "images", log=log) as service:
        generation_id = await service.start("ada")
        await service.service.leases.drain()
    change(tmp_path / "log.db", "UPDATE generations SET order_json = x''")
    async with running(tmp_path / "images", log=log) as service:
        answer = await service.http.get(f"/generations/{generation_id}", headers={"X-User-Id": "ada"})
        assert answer.status_code == 404
        assert (await service.get("/generations"))["generations"] == []
        assert (tmp_path / "images" / generation_id).is_dir()
    async with running(tmp_path / "images", log=log, retention=0.01) as service:
        await service.until(lambda: not (tmp_path / "images" / generation_id).exists())


async def test_a_cursor_that_follows_a_damaged_generation_is_not_recovered(path: Path) -> None:
    async with opened(path) as life:
        cursor = await life.log.head_cursor("ada")
        feed = await life.log.feed("ada", after=0, anchor=0, limit=1_000)
        assert cursor.live == feed.head
        position, before = feed.entries[-2].position, feed.entries[-2].event_id
    change(
        path, "UPDATE events SET event = x'7b' WHERE owner = 1 AND sequence = 2 AND name = 'continue' AND position > 15"
    )
    async with opened(path) as life:
        for live, event_id in ((cursor.live, cursor.event_id), (position, before)):
            known = Cursor(live, event_id, live)
            assert not known.usable(await life.log.feed("ada", after=live, anchor=live, limit=0))
        fresh = await life.log.head_cursor("ada")
        assert fresh.usable(await life.log.feed("ada", after=fresh.seen, anchor=fresh.live, limit=0))


async def test_nobody_waits_for_generations_whose_user_id_is_not_utf_8(path: Path) -> None:
    change(path, "UPDATE users SET user_id = CAST(x'ff' AS TEXT) WHERE id = 1")
    async with opened(path, count=100) as life, asyncio.timeout(10):
        assert [len(await shown(life, user)) for user in USERS] == [0, 4, 4]
        await life.log.examine()
        assert await life.log.finished_before(datetime(9000, 1, 1, tzinfo=UTC), 100)
        await life.run_to_end("ada")


async def test_a_deleted_generation_with_names_of_pictures_that_cannot_be_read_does_not_end_the_feed(
    path: Path,
) -> None:
    change(path, "UPDATE events SET images = 'x' WHERE owner = 1 AND event IS NULL")
    async with opened(path, count=100) as life:
        assert len((await life.log.feed("ada", after=0, anchor=0, limit=1_000)).entries) > 8
        await forget(life)


@pytest.mark.parametrize("credit", ["-5", "'x'", "x'ff'", "1.5", "1 << 62"])
async def test_an_unreadable_balance_counts_as_0_until_a_grant(path: Path, credit: str) -> None:
    change(path, f"UPDATE users SET credit = {credit} WHERE id = 1")
    async with opened(path) as life:
        assert (await life.log.standing("ada")).credit == (await life.log.standing("ada")).credit == 0
        assert (await life.log.standing("bob")).credit == 102
        [line] = examine(path).damage
        assert "user ada: its balance cannot be read" in line
        assert await life.log.grant("ada", 7, key=None, at=NOON, until=NOON) == 7
    assert examine(path).damage == []


@pytest.mark.parametrize("bounds", ["head = 3", "head = 'x'", "head = 1 << 40", "floor = -1", "floor_id = x''"])
async def test_a_feed_with_damaged_bounds_continues_and_its_cursors_are_not_recovered(path: Path, bounds: str) -> None:
    async with opened(path) as life:
        before = await shown(life, "ada")
        old = (await life.log.feed("ada", after=0, anchor=0, limit=100)).entries[3]
    change(path, f"UPDATE users SET {bounds} WHERE id = 1")
    async with opened(path, count=100) as life:
        assert await shown(life, "ada") == before
        assert not Cursor(old.position, old.event_id, old.position).usable(
            await life.log.feed("ada", after=old.position, anchor=old.position, limit=0)
        )
        await life.run_to_end("ada")


async def test_an_unreadable_session_is_ignored(path: Path) -> None:
    async with opened(path) as life:
        sessions = SqliteSessions(life.database, DAY)
        damage = (
            "open_tombstones = '['",
            "open_tombstones = '{\"a\": 1}'",
            "expires_at = 1 << 62",
            "live = 'x'",
            "user_id = x'ff'",
            "seen = 99",
        )
        for number, assignment in enumerate(damage):
            session = Session(Identity("ada", NOON, service=False), Cursor(5, 7, 5), 5, None)
            await sessions.save(f"pid{number}", session, at=NOON)
            change(path, f"UPDATE sessions SET {assignment} WHERE pid = 'pid{number}'")
            assert await sessions.load(f"pid{number}", at=NOON) is None, assignment


def overwrite_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for page in range(2, len(content) // 4096):
        content[page * 4096 : page * 4096 + 60] = random.Random(page).randbytes(60)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["pages", "epoch"])
async def test_a_corrupt_file_is_refused_with_a_sentence(path: Path, kind: str) -> None:
    if kind == "epoch":
        change(path, "UPDATE log SET epoch = CAST(x'ff' AS TEXT)")
    else:
        overwrite_pages(path)
    [line] = examine(path).damage
    with pytest.raises(LogDamaged) as refused:
        Database(path, epoch="e1")
    assert str(refused.value) == line
    assert re.fullmatch(r"The log \S+ is damaged: .+\.", line)


# --- at random -------------------------------------------------------------------------------------------

_VALUES: Final = ("NULL", "-1", "0", "1", "7", "1 << 62", "'x'", "''", "x''", "x'ff'", "CAST(x'ff' AS TEXT)", "1.5")


def damage_at_random(path: Path, chance: random.Random, count: int) -> None:
    """Change or delete random columns of random rows, below the service and its rules."""
    with closing(sqlite3.connect(path)) as connection:
        for _ in range(count):
            table = chance.choice(["users", "generations", "events", "events", "grants", "sessions"])
            column = chance.choice([row[1] for row in connection.execute(f"PRAGMA table_info({table})")])
            where = (
                f"WHERE {'owner' if table == 'grants' else 'id'} = {chance.randint(1, 40 if table == 'events' else 15)}"
            )
            statement = f"UPDATE {table} SET {column} = {chance.choice(_VALUES)} {where}"
            try:
                connection.execute(f"DELETE FROM {table} {where}" if chance.random() < 0.1 else statement)
            except sqlite3.IntegrityError:
                continue  # That is a damage which the file itself does not take.
        connection.commit()


async def serves(path: Path, *, examined: bool) -> None:
    """Start, list, feed, work, grants and retention: all that a service does with a log."""
    async with opened(path, count=100) as life:
        if examined:
            await life.log.examine()
        for user in (*USERS, "new"):
            await shown(life, user)
            present = await life.log.head_cursor(user)
            assert present.usable(await life.log.feed(user, after=present.seen, anchor=present.live, limit=1_000))
            assert ((await life.log.standing(user)).credit or 0) >= 0
            with contextlib.suppress(IdempotencyMismatch):  # Another amount may be written there.
                await life.log.grant(user, 5, key="k", at=NOON, until=NOON + DAY)
            await life.log.grant(user, 5, key=None, at=NOON, until=NOON)
            generation = await life.run_to_end(user)
            feed = await life.log.feed(user, after=present.live, anchor=present.live, limit=100)
            wanted, _ = present._replace(seen=present.live).advance(feed)
            assert [entry.sequence for entry, _ in wanted if entry.generation_id == generation.generation_id] == list(
                range(1, generation.sequence + 1)
            )
        for history in await life.log.unfinished():
            await life.finish(generation_of(history))
        await life.log.claim_undelivered(100)
        await forget(life)
        kept = await life.database.read(
            lambda connection: connection.execute("SELECT * FROM damaged_generations").fetchall()
        )
        assert kept == []


@pytest.mark.parametrize(
    "seeds", [range(12), pytest.param(range(12, 1_000), marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
async def test_damage_in_one_place_does_not_stop_the_rest(path: Path, tmp_path: Path, seeds: range) -> None:
    found = 0
    for seed in seeds:
        chance = random.Random(seed)
        damaged = Path(shutil.copy(path, tmp_path / f"{seed}.db"))
        damage_at_random(damaged, chance, chance.choice([1, 2, 5, 10]))
        found += bool(examine(damaged).damage)
        await serves(damaged, examined=chance.random() < 0.5)
    assert found > len(seeds) / 2
