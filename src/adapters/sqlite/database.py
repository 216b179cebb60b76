"""The SQLite database of the durable log: locking, migrations, and threads for writing and reading.

One thread writes. It runs all pending operations in one transaction with one fsync (group commit); a failed operation
undoes only its own changes. A second thread reads snapshots, and is not blocked by writes (WAL mode). The event loop
never waits for the disk.

A write returns after fsync: it survives a killed process, and a power failure if the disk honours the sync.

Deleted data is overwritten with zeros in the database, and in the WAL after a second without writes or at its size
limit. SQLite moves rows within pages; about one deleted generation in a thousand leaves a copy until its page is
reused. The file never shrinks, but reuses free pages.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from adapters.sqlite import files
from adapters.sqlite.batch_thread import BatchThread
from adapters.sqlite.damage import DamageChecker, log_damage
from domain.errors import LogUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

#: Operations in one transaction: the first of them waits for the last.
_WRITES: Final = 256
_READS: Final = 16

#: Seconds that a checkpoint waits for readers of the WAL, so that it can truncate it.
_CHECKPOINT_TIMEOUT: Final = 0.1

#: Bytes of the WAL at which it is checkpointed, if the writer thread has not been idle before.
_WAL_LIMIT: Final = 4_000_000


class _HalfDone(Exception):
    """An operation has changed something, and then raised the exception in `args`."""


class Database:
    """An open database file, used from one event loop and by no other process."""

    def __init__(self, path: Path, *, epoch: str, schema: Sequence[str] = files.SCHEMA) -> None:
        """Open the file, or create it and its folder. `epoch`: for a new log. `schema`: the migration steps.

        Raises:
            StorageRefused: the file is in use, is not a log, has a newer version, or cannot be opened.
        """
        with contextlib.ExitStack() as opened:
            try:
                # Without symbolic links, so that the file has one lock.
                path = path.resolve()
                path.parent.mkdir(parents=True, exist_ok=True)
                # The file may be replaced while it is open, and have several hard links: a lock on a file beside it
                # holds for its name, and one on itself for each of its names.
                # Closed after the connections: closing any descriptor of a file drops SQLite's own locks on it.
                for file, by in ((f"{path}-lock", ""), (str(path), ", by this or another name")):
                    self._file = files.lock(file, f"The log {path} is in use by another process{by}.")
                    opened.callback(os.close, self._file)
                # Closing the last connection checkpoints the WAL.
                self._writer = opened.enter_context(contextlib.closing(files.connect(str(path))))
                files.prepare(path, self._writer, schema)
                self.epoch = files.epoch_of(path, self._writer) or epoch
                self._writer.execute("INSERT INTO log SELECT ? WHERE NOT EXISTS (SELECT 1 FROM log)", (epoch,))
                self.checker = DamageChecker()
                with self._writer:
                    self._writer.execute("BEGIN IMMEDIATE")
                    found = self.checker.begin(self._writer)
                log_damage(found)
                reader = files.connect(f"{path.as_uri()}?mode=ro", uri=True)
                self._reader = opened.enter_context(contextlib.closing(reader))
            except (OSError, RuntimeError, sqlite3.Error) as error:  # A loop of symbolic links is a RuntimeError.
                raise files.refused(path, error) from error
            self._opened = opened.pop_all()
        #: The last error that was logged, until a write succeeds.
        self._reason = ""
        self._path, self._wal, self._shm = path, Path(f"{path}-wal"), Path(f"{path}-shm")
        self._files = {name: name.stat() for name in (path, self._wal, self._shm)}
        self._wal_size, self._wal_limit, self._lost = 0, _WAL_LIMIT, False
        #: Bytes of the main file after the last checkpoint. One that was cut short by a kill or a full disk leaves it
        #: shorter than its header says, and the rest in the WAL.
        self._size = _size(path)
        self._writing: BatchThread[Operation[Any]] = BatchThread(
            "log-writer", self._write, most=_WRITES, afterwards=self._write_back
        )
        read = partial(self._run, self._reader, "BEGIN")
        self._reading: BatchThread[Operation[Any]] = BatchThread("log-reader", read, most=_READS)
        for thread in (self._writing, self._reading):  # Closed in reverse, and before the connections.
            self._opened.callback(thread.close)
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

    async def execute(self, query: str, *parameters: object) -> None:
        """Write one statement. Raises `LogUnavailable`."""
        await self.write(lambda connection: connection.execute(query, parameters))

    async def close(self) -> None:
        """Finish pending operations and close the file."""
        self._closed = True
        await asyncio.to_thread(self._opened.close)

    def _write(self, operations: Sequence[Operation[Any]]) -> Sequence[object]:
        if not self._intact():
            return [LogUnavailable() for _ in operations]
        outcomes = self._run(self._writer, "BEGIN IMMEDIATE", operations)
        if not any(isinstance(outcome, LogUnavailable) for outcome in outcomes):
            self._reason = ""
        self._wal_size = _size(self._wal)
        return outcomes

    def _run(
        self, connection: sqlite3.Connection, begin: str, operations: Sequence[Operation[Any]]
    ) -> Sequence[object]:
        """Run the operations in one transaction: their results, or what they raise.

        A savepoint for each takes a tenth of an append. So they are set only once an operation has raised after it had
        changed something.
        """

        def transaction(run: Callable[[sqlite3.Connection, Operation[Any]], object]) -> Sequence[object]:
            with connection:
                connection.execute(begin)
                return [run(connection, operation) for operation in operations]

        try:
            try:
                return transaction(self._attempt)
            except _HalfDone:
                return transaction(self._attempt_undoably)
        except sqlite3.Error as error:
            return [self._unavailable(error) for _ in operations]

    def _attempt(self, connection: sqlite3.Connection, operation: Operation[Any]) -> object:
        """The operation's result, or what it raises. Raises `_HalfDone` if there is something to undo."""
        before = connection.total_changes
        try:
            return operation(connection)
        except Exception as error:
            if not connection.in_transaction:
                raise  # SQLite has undone the whole transaction.
            outcome = self._unavailable(error) if isinstance(error, sqlite3.Error) else error
            if connection.total_changes != before:
                raise _HalfDone(outcome) from error
            return outcome

    def _attempt_undoably(self, connection: sqlite3.Connection, operation: Operation[Any]) -> object:
        connection.execute("SAVEPOINT operation")
        try:
            outcome = self._attempt(connection, operation)
        except _HalfDone as half:
            connection.execute("ROLLBACK TO operation")
            outcome = half.args[0]
        connection.execute("RELEASE operation")
        return outcome

    def _write_back(self, idle: bool) -> None:
        """Checkpoint and truncate the WAL, if the thread is idle or the WAL has reached its limit."""
        try:
            due = idle or self._wal_size >= self._wal_limit
            if not due or not self._intact() or not self._wal_size:
                return
            self._writer.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_TIMEOUT * 1000:.0f}")
            try:
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                self._size = _size(self._path)
                self._writer.execute(f"PRAGMA busy_timeout = {files.BUSY_TIMEOUT * 1000:.0f}")
            # Not empty if another process still reads it; then it may grow further.
            self._wal_size = _size(self._wal)
            self._wal_limit = self._wal_size + _WAL_LIMIT
        except Exception as error:  # The thread must survive.
            logger.error("the log cannot be written back: %s", files.reason_of(error))

    def _intact(self) -> bool:
        """Whether the paths still lead to the open files, and these are not truncated. Logs when that changes.

        Writes to a removed, replaced or truncated file would be lost with this process.
        """
        whole = intact = False
        with contextlib.suppress(OSError, sqlite3.Error):
            whole = self._same(self._path) and self._whole()
            intact = whole and self._same(self._wal, self._shm) and self._wal_whole()
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
        size = min(pages * page_size, self._size)
        return header.startswith(b"SQLite format 3\0") and os.fstat(self._file).st_size >= size

    def _wal_whole(self) -> bool:
        if (size := _size(self._wal)) < self._wal_size:
            # Another process has checkpointed it, which leaves nothing to write back, or has truncated it.
            _, frames, written = self._writer.execute("PRAGMA wal_checkpoint").fetchone()
            if written != frames:
                return False
            self._wal_size = size
        return True

    def _unavailable(self, error: sqlite3.Error) -> LogUnavailable:
        """The outcome of an operation. Logs a new reason once, unless `_intact` has logged it."""
        if not self._lost and (reason := files.reason_of(error)) != self._reason:
            self._reason = reason
            logger.error("the log is unavailable: %s", reason)
        return LogUnavailable()


def _size(file: Path) -> int:
    return file.stat().st_size
