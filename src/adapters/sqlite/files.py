"""The file of the durable log: locked, opened, migrated, and examined."""

import contextlib
import fcntl
import os
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from adapters.sqlite import damage
from domain.ports.storage import Examined, StorageRefused

#: Each step migrates from the version of its index to the next. A released step is never changed.
SCHEMA: Final = tuple(file.read_text("utf-8") for file in sorted(Path(__file__).with_name("schema").glob("*.sql")))

#: Distinguishes our files from other SQLite files: "Stag".
_APPLICATION_ID: Final = 0x53746167

#: Seconds that a write waits for another process, such as SQLite's shell, that writes to the file.
BUSY_TIMEOUT: Final = 1.0

MALFORMED: Final = (
    "The log {} is damaged: its pages do not fit together. Restore it from a backup, or recover it with SQLite's shell."
)


class LogDamaged(StorageRefused):
    """The file is damaged beyond single rows."""


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
            with contextlib.closing(connect(name, uri=True)) as connection:
                examined = _examine(path, connection)
            if not untouched or not wal.exists():
                return examined
    except FileNotFoundError:
        return Examined()
    except (StorageRefused, OSError, RuntimeError, sqlite3.Error) as error:
        if isinstance(refusal := refused(path, error), LogDamaged):
            return Examined([str(refusal)])
        raise refusal from None


def _examine(path: Path, connection: sqlite3.Connection) -> Examined:
    connection.execute("BEGIN")
    version = _check_version(path, connection, len(SCHEMA))
    epoch = epoch_of(path, connection)
    if epoch is None:
        return Examined()
    with contextlib.closing(connect("")) as copy:  # A temporary file, which is removed when it is closed.
        connection.backup(copy)
        _migrate(copy, version)
        return Examined(damage.report(copy), epoch)


def connect(name: str, *, uri: bool = False) -> sqlite3.Connection:
    """A connection for one thread at a time, not always the one that created it."""
    return sqlite3.connect(name, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False, uri=uri)


def lock(file: str, refusal: str) -> int:
    """Lock the file, which is created if it is missing, until its descriptor is closed or the process ends.

    Child processes do not inherit the descriptor. flock does not interfere with SQLite's own locks.

    Raises:
        StorageRefused: another process has locked it.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StorageRefused(refusal) if isinstance(error, BlockingIOError) else error from None
    return descriptor


def _check_version(path: Path, connection: sqlite3.Connection, known: int) -> int:
    """Check that it is an intact log of a known version, and return the version."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id != _APPLICATION_ID and (application_id or version or objects):
        raise StorageRefused(f"{path} is not a log of Stagecast.")
    if version > known:
        raise StorageRefused(
            f"The log {path} was written by a newer Stagecast (schema {version}; this one knows {known})."
        )
    if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
        raise LogDamaged(MALFORMED.format(path))
    return int(version)


def prepare(path: Path, connection: sqlite3.Connection, schema: Sequence[str]) -> None:
    """Check the log, and migrate it to the current schema. A refused file is not changed."""
    version = _check_version(path, connection, len(schema))
    if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
        raise StorageRefused(f"The log {path} cannot be opened: its file system has no write-ahead logging.")
    _migrate(connection, version, schema)
    for pragma in ("synchronous = FULL", "secure_delete = ON", "foreign_keys = ON", "wal_autocheckpoint = 0"):
        connection.execute(f"PRAGMA {pragma}")


def _migrate(connection: sqlite3.Connection, version: int, schema: Sequence[str] = SCHEMA) -> None:
    for step, script in enumerate(schema[version:], version + 1):
        with connection:  # Rolls back what fails.
            connection.executescript(
                f"BEGIN IMMEDIATE; {script}; PRAGMA application_id = {_APPLICATION_ID};"
                f" PRAGMA user_version = {step}; COMMIT;"
            )


def epoch_of(path: Path, connection: sqlite3.Connection) -> str | None:
    """The epoch of the log; ``None`` if it has none yet."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'log'").fetchone():
        return None
    row = connection.execute("SELECT CAST(epoch AS BLOB) FROM log").fetchone()
    if row and not re.fullmatch(rb"[a-z0-9]{1,64}", row[0]):
        raise LogDamaged(f"The log {path} is damaged: its epoch cannot be read.")
    return row and str(row[0], "ascii")


def refused(path: Path, error: Exception) -> StorageRefused:
    """What to raise when SQLite or the file system does not let the log be opened."""
    if isinstance(error, StorageRefused):
        return error
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_CORRUPT:
        return LogDamaged(MALFORMED.format(path))
    if code == sqlite3.SQLITE_NOTADB:
        return StorageRefused(f"{path} is not a log of Stagecast.")
    return StorageRefused(f"The log {path} cannot be opened: {reason_of(error)}.")


def reason_of(error: Exception) -> str:
    """A reason that quotes no data."""
    if isinstance(error, sqlite3.Error) and not hasattr(error, "sqlite_errorcode"):
        return type(error).__name__
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
