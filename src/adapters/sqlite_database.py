"""The file of the durable log: who may open it, and how it is written and read.

One thread writes. It takes all that has been asked for so far into one transaction, and so into one wait for the disk
(group commit); an operation that is refused undoes only what it did itself. A second thread reads, each time one
snapshot, and is never held up by the first (write-ahead log). The event loop waits for neither.

What a write returns has been synced: it survives a killed process, and a power cut as far as the disk tells the truth.

What is deleted is overwritten with zeros, in the write-ahead log too after a second without writes, at the latest when
that has grown to its limit. SQLite copies within its pages when it makes room; of about one generation in a thousand
such a copy stays until the page is used again. Freed pages are, so the file has the size of the most that it ever held.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from adapters.batch_thread import BatchThread
from domain.errors import LogUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

#: Tells our files from other SQLite files: "Stag".
_APPLICATION_ID: Final = 0x53746167

#: Operations in one transaction at most: those at its front wait for those at its end.
_WRITES: Final = 256
_READS: Final = 16

#: Seconds for which a write waits for a stranger, such as SQLite's shell, who writes to the file.
_PATIENCE: Final = 1.0

#: Seconds for which writes wait until nobody reads the write-ahead log, so that it can be emptied.
_PAUSE: Final = 0.1

#: The write-ahead log is written back into the file when the writing thread is idle, or at so many bytes.
_WAL_LIMIT: Final = 4_000_000

#: Each step takes a file from the schema of its index to the next. A step that was ever released is never changed.
SCHEMA: Final[tuple[str, ...]] = (
    """
    CREATE TABLE log (epoch TEXT NOT NULL);

    CREATE TABLE users (
        id INTEGER PRIMARY KEY,
        user_id TEXT NOT NULL UNIQUE,
        credit INTEGER,                     -- NULL: no balance has been kept
        head INTEGER NOT NULL,
        floor INTEGER NOT NULL,
        floor_id INTEGER NOT NULL
    );

    CREATE TABLE generations (
        id INTEGER PRIMARY KEY,             -- in order of their starts
        generation_id TEXT NOT NULL UNIQUE,
        user INTEGER NOT NULL REFERENCES users,
        kind TEXT NOT NULL,
        order_json BLOB NOT NULL,
        idempotency_key TEXT,
        fingerprint TEXT NOT NULL,
        reserved INTEGER NOT NULL,          -- whether its start took a credit, which a failure gives back
        first_position INTEGER NOT NULL,
        end_position INTEGER,               -- this and the next two: NULL while it runs
        ended_at INTEGER,                   -- microseconds since 1970
        end_event INTEGER,                  -- events.id, and so in order of the ends
        deleted INTEGER NOT NULL DEFAULT 0, -- nothing but its places is left
        undelivered INTEGER NOT NULL DEFAULT 0
    );
    CREATE UNIQUE INDEX generation_of_key ON generations (user, idempotency_key) WHERE idempotency_key IS NOT NULL;
    CREATE INDEX listed_generations ON generations (user, first_position) WHERE deleted = 0;
    CREATE INDEX active_generations ON generations (user, first_position) WHERE end_position IS NULL;
    CREATE INDEX deleted_generations ON generations (user, end_position, first_position) WHERE deleted = 1;
    CREATE INDEX ended_generations ON generations (ended_at, end_event) WHERE ended_at IS NOT NULL;
    CREATE INDEX undelivered_generations ON generations (end_event) WHERE undelivered = 1;

    CREATE TABLE events (
        id INTEGER PRIMARY KEY,             -- in order of the appends
        user INTEGER NOT NULL,
        position INTEGER NOT NULL,
        generation INTEGER NOT NULL REFERENCES generations ON DELETE CASCADE,
        sequence INTEGER NOT NULL,
        event_id INTEGER NOT NULL,
        name TEXT NOT NULL,
        event BLOB                          -- NULL: deleted, and the place is left
    );
    CREATE UNIQUE INDEX event_at_position ON events (user, position);
    CREATE UNIQUE INDEX event_of_sequence ON events (generation, sequence);

    CREATE TABLE grants (
        user INTEGER NOT NULL REFERENCES users,
        idempotency_key TEXT NOT NULL,
        amount INTEGER NOT NULL,
        credit INTEGER NOT NULL,
        until INTEGER NOT NULL,             -- microseconds since 1970
        PRIMARY KEY (user, idempotency_key)
    ) WITHOUT ROWID;
    CREATE INDEX expiring_grants ON grants (until);

    CREATE TABLE sessions (
        id INTEGER PRIMARY KEY,             -- in order of their last save
        pid TEXT NOT NULL UNIQUE,
        user_id TEXT NOT NULL,
        expires_at INTEGER,                 -- microseconds since 1970, as is touched_at
        service INTEGER NOT NULL,
        live INTEGER NOT NULL,
        event_id INTEGER NOT NULL,
        seen INTEGER NOT NULL,
        head INTEGER NOT NULL,
        tag TEXT,
        touched_at INTEGER NOT NULL
    );
    CREATE INDEX sessions_of_user ON sessions (user_id, touched_at);
    CREATE INDEX expiring_sessions ON sessions (touched_at);
    """,
    """
    ALTER TABLE sessions ADD COLUMN untold TEXT NOT NULL DEFAULT '[]';  -- in JSON
    """,
)


class LogRefused(Exception):
    """This file cannot be the log. Its text is one sentence, fit for whoever runs the service."""


class Database:
    """An open file. It is written and read from one event loop, and by no other process."""

    def __init__(self, path: Path, *, epoch: str, schema: Sequence[str] = SCHEMA) -> None:
        """Open the file; it is made, with its folder, where there is none.

        `epoch` becomes that of a new log. `schema` are the steps that lead to the schema that this code knows.

        Raises:
            LogRefused: it is in use, is no log, is one of a newer version, or cannot be opened.
        """
        with contextlib.ExitStack() as undo:
            try:
                # By whichever name it is opened, one file has one lock.
                path = path.resolve()
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = undo.enter_context(contextlib.closing(_lock(path)))
                self._writer = undo.enter_context(contextlib.closing(_connect(str(path))))
                _prepare(path, self._writer, schema)
                self.epoch = _epoch(self._writer, epoch)
                self._reader = undo.enter_context(contextlib.closing(_connect(f"{path.as_uri()}?mode=ro", uri=True)))
            except (OSError, RuntimeError, sqlite3.Error) as error:  # A loop of symbolic links is a RuntimeError.
                raise LogRefused(f"The log {path} cannot be opened: {_reason(error)}.") from error
            undo.pop_all()
        self._path, self._opened = path, path.stat()
        #: Why the log did not answer the last time, until it can be written again: logged once.
        self._reason = ""
        self._wal = Path(f"{path}-wal")
        self._wal_limit = _WAL_LIMIT
        self._writing: BatchThread[Operation[Any]] = BatchThread(
            "log-writer", self._write, most=_WRITES, afterwards=self._write_back
        )
        self._reading: BatchThread[Operation[Any]] = BatchThread("log-reader", self._read, most=_READS)
        self._closed = False

    async def write(self, operation: Operation[T], then: Callable[[T], None] | None = None) -> T:
        """What the operation returns, once what it did has been synced.

        An operation runs on the writing thread, in a transaction that it must not end. Where it raises, that is
        raised here, and it has changed nothing. `then` is told first what it returned, on the event loop and in the
        order of the operations, also where nobody waits any more.

        Raises:
            LogUnavailable: it could not be written, and has changed nothing.
        """
        if self._closed:
            raise LogUnavailable
        return cast(T, await self._writing.ask(operation, then))

    async def read(self, query: Operation[T]) -> T:
        """What the query, which runs on the reading thread, finds in one snapshot.

        Raises:
            LogUnavailable: it could not be read.
        """
        if self._closed:
            raise LogUnavailable
        return cast(T, await self._reading.ask(query))

    async def probe(self) -> None:
        """Commit one row and read it. Raises `LogUnavailable`, also where the file is not at its path any more."""
        await self.write(self._probe)
        await self.read(lambda connection: connection.execute("SELECT epoch FROM log").fetchone())

    def _probe(self, connection: sqlite3.Connection) -> None:
        try:
            same = os.path.samestat(self._path.stat(), self._opened)
        except FileNotFoundError:
            same = False
        if not same:
            raise sqlite3.OperationalError("the file has been removed or replaced")
        # A row that comes and goes: SQLite does not write what an update leaves as it was.
        connection.execute("INSERT INTO log (epoch) VALUES ('')")
        connection.execute("DELETE FROM log WHERE epoch = ''")

    async def close(self) -> None:
        """Do what has been asked for, and let go of the file."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._reading.close()
        self._writing.close()
        # The last connection to the file writes the write-ahead log back.
        self._reader.close()
        self._writer.close()
        self._lock.close()

    def _write(self, operations: Sequence[Operation[Any]]) -> Sequence[object]:
        """Do the operations in one transaction."""
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            outcomes = [self._write_one(operation) for operation in operations]
            self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._writer.rollback()
            return self._unavailable(error, len(operations))
        if not any(isinstance(outcome, LogUnavailable) for outcome in outcomes):
            self._reason = ""
        return outcomes

    def _write_one(self, operation: Operation[Any]) -> object:
        self._writer.execute("SAVEPOINT operation")
        try:
            outcome = operation(self._writer)
        except Exception as error:
            if not self._writer.in_transaction:
                raise  # SQLite has undone the whole transaction.
            self._writer.execute("ROLLBACK TO operation")
            [outcome] = self._unavailable(error) if isinstance(error, sqlite3.Error) else [error]
        self._writer.execute("RELEASE operation")
        return outcome

    def _read(self, queries: Sequence[Operation[Any]]) -> Sequence[object]:
        """Make the queries in one snapshot."""
        try:
            self._reader.execute("BEGIN")
            outcomes = [self._read_one(query) for query in queries]
            self._reader.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._reader.rollback()
            return self._unavailable(error, len(queries))
        return outcomes

    def _read_one(self, query: Operation[Any]) -> object:
        try:
            return query(self._reader)
        except Exception as error:
            [outcome] = self._unavailable(error) if isinstance(error, sqlite3.Error) else [error]
            return outcome

    def _unavailable(self, error: sqlite3.Error, count: int = 1) -> Sequence[LogUnavailable]:
        """What so many are told; the log of the service says why."""
        if (reason := _reason(error)) != self._reason:
            self._reason = reason
            logger.error("the log does not answer: %s", reason)
        return [LogUnavailable() for _ in range(count)]

    def _write_back(self, idle: bool) -> None:
        """Write the write-ahead log back into the file, and empty it, when there is time or need for it."""
        try:
            if idle or self._wal.stat().st_size >= self._wal_limit:
                self._writer.execute(f"PRAGMA busy_timeout = {_PAUSE * 1000:.0f}")
                try:
                    self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                finally:
                    self._writer.execute(f"PRAGMA busy_timeout = {_PATIENCE * 1000:.0f}")
                # Not empty where somebody still reads it. Then it grows on.
                self._wal_limit = self._wal.stat().st_size + _WAL_LIMIT
        except Exception as error:  # The thread has to live: everybody waits for it.
            logger.error("the log cannot be written back: %s", _reason(error) or type(error).__name__)


# --- what a file can hold --------------------------------------------------------------------------------

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def is_text(value: str) -> bool:
    """Whether it can be looked for. Half a surrogate pair, which JSON may bring, is in no file."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def microseconds(moment: datetime) -> int:
    """Since 1970: how moments are kept, exact and in order."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def moment(microseconds: int) -> datetime:
    """The moment that is kept as this number."""
    return _EPOCH + timedelta(microseconds=microseconds)


# --- opening ---------------------------------------------------------------------------------------------


def _connect(name: str, *, uri: bool = False) -> sqlite3.Connection:
    # Each connection is used by one thread at a time, but not always by the one that made it.
    return sqlite3.connect(name, timeout=_PATIENCE, isolation_level=None, check_same_thread=False, uri=uri)


def _lock(path: Path) -> sqlite3.Connection:
    """What keeps other processes out until it is closed, or its process ends, however it ends.

    A transaction on a file of its own: SQLite knows how to lock a file everywhere, and one log can then
    still be looked at with SQLite's shell.
    """
    lock = _connect(f"{path}-lock")
    try:
        lock.execute("PRAGMA busy_timeout = 0")
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise LogRefused(f"The log {path} is in use by another process.") from None
        raise
    return lock


def _prepare(path: Path, connection: sqlite3.Connection, schema: Sequence[str]) -> None:
    """See that it is a log, and bring it to the present schema. A file that is refused is left as it was."""
    try:
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            raise LogRefused(f"{path} is not a log of Stagecast.") from None
        raise
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id != _APPLICATION_ID and (application_id or version or objects):
        raise LogRefused(f"{path} is not a log of Stagecast.")
    if version > len(schema):
        raise LogRefused(
            f"The log {path} was written by a newer Stagecast (schema {version}; this one knows {len(schema)})."
        )
    if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
        raise LogRefused(f"The log {path} cannot be opened: its file system has no write-ahead logging.")
    for step, script in enumerate(schema[version:], version + 1):
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE; {script}; PRAGMA application_id = {_APPLICATION_ID};"
                f" PRAGMA user_version = {step}; COMMIT;"
            )
        except sqlite3.Error:
            connection.rollback()
            raise
    for pragma in ("synchronous = FULL", "secure_delete = ON", "foreign_keys = ON", "wal_autocheckpoint = 0"):
        connection.execute(f"PRAGMA {pragma}")


def _epoch(connection: sqlite3.Connection, new: str) -> str:
    connection.execute("INSERT INTO log SELECT ? WHERE NOT EXISTS (SELECT 1 FROM log)", (new,))
    (epoch,) = connection.execute("SELECT epoch FROM log").fetchone()
    return str(epoch)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
