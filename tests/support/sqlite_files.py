"""Lives of a log's file, and other processes that use it."""

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from adapters.sqlite.database import Database
from adapters.sqlite.files import SCHEMA
from adapters.sqlite.log import SqliteLog
from adapters.sqlite.sessions import SqliteSessions
from support.builders import NOON, EventRecorder, SteppableClock

RETENTION: Final = timedelta(days=1)


@dataclass
class Opened:
    """One life of a file."""

    database: Database
    log: SqliteLog
    recorder: EventRecorder
    sessions: SqliteSessions


@asynccontextmanager
async def opened(
    path: Path, *, epoch: str = "e1", credits: int | None = 100, outbox: bool = False, schema: Any = SCHEMA
) -> AsyncIterator[Opened]:
    database = Database(path, epoch=epoch, schema=schema)
    clock = SteppableClock()
    log = SqliteLog(database, credits=credits, clock=clock, outbox=outbox)
    try:
        yield Opened(database, log, EventRecorder(log, clock), SqliteSessions(database, RETENTION))
    finally:
        await database.close()


def rows(query: str) -> Callable[[sqlite3.Connection], list[Any]]:
    return lambda connection: connection.execute(query).fetchall()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Another connection holds the write lock: other writers wait, as for a slow disk."""
    with closing(sqlite3.connect(path, isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        yield


async def image(log: SqliteLog, *user_ids: str) -> object:
    """Everything that a log has of these users."""
    return [
        (
            await log.feed(user_id, after=0, anchor=0, limit=10_000),
            (await log.standing(user_id)).credit,
            await log.generations(user_id, limit=1_000),
            await log.head_cursor(user_id),
            await log.find_by_idempotency_key(user_id, "k"),
        )
        for user_id in user_ids
    ] + [await log.unfinished(), await log.claim_undelivered(100), await log.finished_before(NOON + RETENTION, 100)]


async def python(program: str, path: Path) -> asyncio.subprocess.Process:
    arguments = (sys.executable, "-c", program, str(path), str(Path(__file__).parent.parent))
    return await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)


def content(path: Path) -> bytes:
    return path.read_bytes()
