"""The SQLite database of the durable log: locking, migrations, and threads for writing and reading.

One thread writes. It runs all pending operations in one transaction with one fsync (group commit); each has a
savepoint, so a failed operation undoes only its own changes. A second thread reads snapshots, and is not blocked by
writes (WAL mode). The event loop never waits for the disk.

A write returns after fsync: it survives a killed process, and a power failure if the disk honours the sync.

Deleted data is overwritten with zeros in the database, and in the WAL after a second without writes or at its size
limit. SQLite moves rows within pages; about one deleted generation in a thousand leaves a copy until its page is
reused. The file never shrinks, but reuses free pages.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from adapters.sqlite import damage as sqlite_damage
from adapters.sqlite.batch_thread import BatchThread
from domain.errors import LogUnavailable
from domain.ports.storage import Examined, StorageRefused

logger = logging.getLogger(__name__)

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

#: Distinguishes our files from other SQLite files: "Stag".
_APPLICATION_ID: Final = 0x53746167

#: Operations in one transaction: the first of them waits for the last.
_WRITES: Final = 256
_READS: Final = 16

#: Seconds that a write waits for another process, such as SQLite's shell, that writes to the file.
_BUSY_TIMEOUT: Final = 1.0

#: Seconds that a checkpoint waits for readers of the WAL, so that it can truncate it.
_CHECKPOINT_TIMEOUT: Final = 0.1

#: Bytes of the WAL at which it is checkpointed, if the writer thread has not been idle before.
_WAL_LIMIT: Final = 4_000_000

#: Each step migrates from the version of its index to the next. A released step is never changed.
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
    sqlite_damage.SCHEMA,
    """
    ALTER TABLE generations ADD COLUMN free INTEGER NOT NULL DEFAULT 0;  -- the work of its present stage costs nothing
    """,
    # USER is a reserved word of PostgreSQL. The images of an event were only in the URLs of its JSON.
    """
    ALTER TABLE generations RENAME COLUMN user TO owner;
    ALTER TABLE events RENAME COLUMN user TO owner;
    ALTER TABLE grants RENAME COLUMN user TO owner;
    ALTER TABLE damaged_generations RENAME COLUMN user TO owner;
    ALTER TABLE damaged_events RENAME COLUMN user TO owner;
    ALTER TABLE sessions RENAME COLUMN untold TO open_tombstones;
    ALTER TABLE events ADD COLUMN images TEXT;  -- JSON: the names of its pictures by field; NULL: it has none
    ALTER TABLE damaged_events ADD COLUMN images;
    UPDATE events SET images = found.images FROM (
        SELECT events.id,
            json_group_object(field, substr(url.value, instr(url.value, '/' || generation_id || '-') + 1)) AS images
        FROM events
        JOIN generations ON generations.id = events.generation
        JOIN json_each(iif(json_valid(CAST(event AS TEXT)), CAST(event AS TEXT), '{}')) AS url
        JOIN (
            SELECT 'compositionUrl' AS key, 'composition_url' AS field UNION ALL
            SELECT 'previewUrl', 'preview_url' UNION ALL
            SELECT 'editedImageUrl', 'edited_image_url' UNION ALL
            SELECT 'generatedImageUrl', 'generated_image_url' UNION ALL
            SELECT 'faceSwapUrl', 'face_swap_url'
        ) AS fields ON fields.key = url.key
        WHERE event IS NOT NULL AND url.type = 'text' AND url.value GLOB '*/' || generation_id || '-*'
        GROUP BY events.id
    ) AS found WHERE found.id = events.id;
    """,
)

_HEADER: Final = b"SQLite format 3\0"


_MALFORMED: Final = (
    "The log {} is damaged: its pages do not fit together. Restore it from a backup, or recover it with SQLite's shell."
)


class LogDamaged(StorageRefused):
    """The file is damaged beyond single rows."""


class Database:
    """An open database file, used from one event loop and by no other process."""

    def __init__(self, path: Path, *, epoch: str, schema: Sequence[str] = SCHEMA) -> None:
        """Open the file, or create it and its folder. `epoch`: for a new log. `schema`: the migration steps.

        Raises:
            StorageRefused: the file is in use, is not a log, has a newer version, or cannot be opened.
        """
        with contextlib.ExitStack() as undo:
            try:
                # Without symbolic links, so that the file has one lock.
                path = path.resolve()
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = undo.enter_context(contextlib.closing(_lock(path)))
                # Closed after the connections: closing any descriptor of a file drops SQLite's own locks on it.
                self._file = _lock_file(path)
                undo.callback(os.close, self._file)
                self._writer = undo.enter_context(contextlib.closing(_connect(str(path))))
                _prepare(path, self._writer, schema)
                self.epoch = _epoch(path, self._writer) or epoch
                self._writer.execute("INSERT INTO log SELECT ? WHERE NOT EXISTS (SELECT 1 FROM log)", (epoch,))
                self.checker = sqlite_damage.DamageChecker(self.epoch)
                _set_damage_aside(self._writer, self.checker)
                self._reader = undo.enter_context(contextlib.closing(_connect(f"{path.as_uri()}?mode=ro", uri=True)))
            except (OSError, RuntimeError, sqlite3.Error) as error:  # A loop of symbolic links is a RuntimeError.
                if _is_corrupt(error):
                    raise LogDamaged(_MALFORMED.format(path)) from None
                raise StorageRefused(f"The log {path} cannot be opened: {_reason(error)}.") from error
            undo.pop_all()
        #: The last error that was logged, until a write succeeds.
        self._reason = ""
        self._wal = Path(f"{path}-wal")
        self._wal_limit = _WAL_LIMIT
        self._files = {name: name.stat() for name in (path, self._wal, Path(f"{path}-shm"))}
        self._path, self._wal_size, self._lost = path, 0, False
        self._writing: BatchThread[Operation[Any]] = BatchThread(
            "log-writer", self._write, most=_WRITES, afterwards=self._write_back
        )
        self._reading: BatchThread[Operation[Any]] = BatchThread("log-reader", self._read, most=_READS)
        self._closed = False

    async def write(self, operation: Operation[T], then: Callable[[T], None] | None = None) -> T:
        """Run the operation on the writer thread, in a transaction that it must not end; return after fsync.

        If the operation raises, its changes are undone, and the exception is raised here. `then` is called first with
        its result, on the event loop, in the order of operations, even if the caller was cancelled meanwhile.

        Raises:
            LogUnavailable: nothing could be written, and nothing was changed.
        """
        if self._closed:
            raise LogUnavailable
        return cast(T, await self._writing.submit(operation, then))

    async def read(self, query: Operation[T]) -> T:
        """Run the query on the reader thread, in one snapshot. Raises `LogUnavailable`."""
        if self._closed:
            raise LogUnavailable
        return cast(T, await self._reading.submit(query))

    async def probe(self) -> None:
        """Commit one row and read it. Raises `LogUnavailable`."""
        await self.write(self._probe)
        await self.read(lambda connection: connection.execute("SELECT epoch FROM log").fetchone())

    def _probe(self, connection: sqlite3.Connection) -> None:
        # Not an update to the same value, which SQLite would not write.
        connection.execute("INSERT INTO log (epoch) VALUES ('')")
        connection.execute("DELETE FROM log WHERE epoch = ''")

    async def close(self) -> None:
        """Finish pending operations and close the file."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._reading.close()
        self._writing.close()
        # Closing the last connection checkpoints the WAL.
        self._reader.close()
        self._writer.close()
        os.close(self._file)
        self._lock.close()

    def _write(self, operations: Sequence[Operation[Any]]) -> Sequence[object]:
        """Run the operations in one transaction."""
        if not self._intact():
            return [LogUnavailable() for _ in operations]
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
        self._wal_size = _size(self._wal)
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
        """Run the queries in one snapshot."""
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

    def _write_back(self, idle: bool) -> None:
        """Checkpoint and truncate the WAL, if the thread is idle or the WAL has reached its limit."""
        try:
            if not self._intact() or not ((idle and self._wal_size) or self._wal_size >= self._wal_limit):
                return
            self._writer.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_TIMEOUT * 1000:.0f}")
            try:
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                self._writer.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT * 1000:.0f}")
            # Not empty if another process still reads it; then it may grow further.
            self._wal_size = _size(self._wal)
            self._wal_limit = self._wal_size + _WAL_LIMIT
        except Exception as error:  # The thread must survive.
            logger.error("the log cannot be written back: %s", _reason(error) or type(error).__name__)

    def _intact(self) -> bool:
        """Whether the paths still lead to the open files, and these are not truncated. Logs when that changes.

        Writes to a removed, replaced or truncated file would be lost with this process.
        """
        whole = intact = False
        with contextlib.suppress(OSError, sqlite3.Error):
            whole = self._same(self._path) and self._whole()
            intact = whole and self._same(self._wal, Path(f"{self._path}-shm")) and self._wal_whole()
        if intact == self._lost:
            self._lost = not intact
            state = "is back" if intact else "was removed, replaced or cut off; nothing is appended until it is back"
            logger.error("the file of the log %s", state)
            if whole and not intact:
                # Move the committed data into the main file, which may outlive the WAL.
                with contextlib.suppress(sqlite3.Error):
                    self._writer.execute("PRAGMA wal_checkpoint")
        return intact

    def _same(self, *names: Path) -> bool:
        return all(os.path.samestat(self._files[name], name.stat()) for name in names)

    def _whole(self) -> bool:
        header = os.pread(self._file, 32, 0)
        pages, page_size = int.from_bytes(header[28:32]), int.from_bytes(header[16:18])
        return header.startswith(_HEADER) and os.fstat(self._file).st_size >= pages * page_size

    def _wal_whole(self) -> bool:
        if (size := _size(self._wal)) < self._wal_size:
            # Another process has checkpointed it, which leaves nothing to write back, or has truncated it.
            _, frames, written = self._writer.execute("PRAGMA wal_checkpoint").fetchone()
            if written != frames:
                return False
            self._wal_size = size
        return True

    def _unavailable(self, error: sqlite3.Error, count: int = 1) -> Sequence[LogUnavailable]:
        """The outcomes of `count` operations. Logs a new reason once, unless `_intact` has logged it."""
        if not self._lost and (reason := _reason(error)) != self._reason:
            self._reason = reason
            logger.error("the log is unavailable: %s", reason)
        return [LogUnavailable() for _ in range(count)]


def examine(path: Path) -> Examined:
    """Look for damage in the log without changing it; a service may have it open.

    Raises:
        StorageRefused: the file is not a log, has a newer version, or cannot be opened.
    """
    try:
        path = path.resolve()
        path.stat()
        wal = Path(f"{path}-wal")
        while True:
            # While no process has the file open there is no WAL, and SQLite must not create one.
            untouched = not wal.exists()
            name = f"{path.as_uri()}?mode=ro{'&immutable=1' if untouched else ''}"
            with contextlib.closing(_connect(name, uri=True)) as connection:
                examined = _examine(path, connection)
            if not untouched or not wal.exists():
                return examined
    except FileNotFoundError:
        return Examined([])
    except LogDamaged as damaged:
        return Examined([str(damaged)])
    except (OSError, RuntimeError, sqlite3.Error) as error:
        if _is_corrupt(error):
            return Examined([_MALFORMED.format(path)])
        raise StorageRefused(f"The log {path} cannot be opened: {_reason(error)}.") from None


def _examine(path: Path, connection: sqlite3.Connection) -> Examined:
    connection.execute("BEGIN")
    version = _check_version(path, connection, len(SCHEMA))
    epoch = _epoch(path, connection)
    if epoch is None:
        return Examined()
    if version == len(SCHEMA):
        return Examined(sqlite_damage.report(connection, epoch), epoch)
    with contextlib.closing(_connect("")) as copy:  # A temporary file, which is removed when it is closed.
        connection.backup(copy)
        _migrate(copy, version)
        return Examined(sqlite_damage.report(copy, epoch), epoch)


# --- values --------------------------------------------------------------------------------

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def is_text(value: str) -> bool:
    """Whether SQLite can store the text: it has no lone surrogate, as JSON strings may."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970, as times are stored."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def moment(microseconds: int) -> datetime:
    """The time that is stored as this number of microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=microseconds)


# --- opening ---------------------------------------------------------------------------------------------


def _connect(name: str, *, uri: bool = False) -> sqlite3.Connection:
    # Each connection is used by one thread at a time, but not always by the one that created it.
    return sqlite3.connect(name, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False, uri=uri)


def _lock(path: Path) -> sqlite3.Connection:
    """Lock out other processes until the connection is closed or the process ends.

    The lock is a transaction on a separate file: SQLite's locks work on every platform, and SQLite's shell can still
    read the log.
    """
    lock = _connect(f"{path}-lock")
    try:
        lock.execute("PRAGMA busy_timeout = 0")
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise StorageRefused(f"The log {path} is in use by another process.") from None
        raise
    return lock


def _lock_file(path: Path) -> int:
    """Lock the file itself too: two hard links to it would each have their own ``-lock`` file.

    Child processes do not inherit the descriptor. flock does not interfere with SQLite's own locks.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise StorageRefused(f"The log {path} is in use by another process, by this or another name.") from None
    except BaseException:
        os.close(file)
        raise
    return file


def _check_version(path: Path, connection: sqlite3.Connection, known: int) -> int:
    """Check that it is an intact log of a known version, and return the version."""
    try:
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            raise StorageRefused(f"{path} is not a log of Stagecast.") from None
        raise
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id != _APPLICATION_ID and (application_id or version or objects):
        raise StorageRefused(f"{path} is not a log of Stagecast.")
    if version > known:
        raise StorageRefused(
            f"The log {path} was written by a newer Stagecast (schema {version}; this one knows {known})."
        )
    if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
        raise LogDamaged(_MALFORMED.format(path))
    return int(version)


def _prepare(path: Path, connection: sqlite3.Connection, schema: Sequence[str]) -> None:
    """Check the log, and migrate it to the current schema. A refused file is not changed."""
    version = _check_version(path, connection, len(schema))
    if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
        raise StorageRefused(f"The log {path} cannot be opened: its file system has no write-ahead logging.")
    _migrate(connection, version, schema)
    for pragma in ("synchronous = FULL", "secure_delete = ON", "foreign_keys = ON", "wal_autocheckpoint = 0"):
        connection.execute(f"PRAGMA {pragma}")


def _migrate(connection: sqlite3.Connection, version: int, schema: Sequence[str] = SCHEMA) -> None:
    for step, script in enumerate(schema[version:], version + 1):
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE; {script}; PRAGMA application_id = {_APPLICATION_ID};"
                f" PRAGMA user_version = {step}; COMMIT;"
            )
        except sqlite3.Error:
            connection.rollback()
            raise


def _epoch(path: Path, connection: sqlite3.Connection) -> str | None:
    """The epoch of the log; ``None`` if it has none yet."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'log'").fetchone():
        return None
    row = connection.execute("SELECT CAST(epoch AS BLOB) FROM log").fetchone()
    if row and not re.fullmatch(rb"[a-z0-9]{1,64}", row[0]):
        raise LogDamaged(f"The log {path} is damaged: its epoch cannot be read.")
    return row and str(row[0], "ascii")


def _set_damage_aside(connection: sqlite3.Connection, checker: sqlite_damage.DamageChecker) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        found = checker.begin(connection)
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise
    sqlite_damage.log_damage(found)


def _is_corrupt(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CORRUPT


def _size(file: Path) -> int:
    return file.stat().st_size


def _reason(error: Exception) -> str:
    if isinstance(error, sqlite3.Error) and not hasattr(error, "sqlite_errorcode"):
        return type(error).__name__  # The message may quote data.
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
