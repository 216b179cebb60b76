"""The PostgreSQL database of the log: its connections, what it must guarantee, and its migrations.

A statement is never cancelled: with a synchronous standby, a cancelled commit is visible although no standby has it.
One that takes too long is given up by closing its connection, and its caller gets `LogUnavailable`.
"""

import asyncio
import contextlib
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Final, TypeAlias

import asyncpg

from domain.errors import LogUnavailable
from domain.ports.storage import StorageRefused

logger = logging.getLogger(__name__)

Connection: TypeAlias = asyncpg.Connection

#: Seconds after which a statement or a connection attempt is given up.
TIMEOUT: Final = 1.5

#: Connections besides those of the follower and of heartbeats.
_CONNECTIONS: Final = 4
#: Seconds that are left for a statement at least, once it has waited for a connection.
_AT_LEAST: Final = 0.3

#: The oldest PostgreSQL: `pg_current_snapshot`.
_OLDEST: Final = 13

#: Those that end the connection. `AttributeError`: it was terminated between two messages of a statement.
_LOST: Final = (
    AttributeError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)

#: Everything that goes wrong between us and the database.
FAILURES: Final = (asyncpg.PostgresError, TimeoutError, *_LOST)

#: Each step migrates from the version of its index to the next.
SCHEMA: Final[Sequence[str]] = tuple(
    file.read_text()
    for file in sorted(resources.files(__package__).joinpath("schema").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".sql")
)

#: Held while the schema is migrated.
_MIGRATION_LOCK: Final = 0x53746167  # "Stag"


class Database:
    """The connections of one node. `open` it, and `close` it."""

    def __init__(self, url: str, *, pooled: bool, epoch: str, local_host: str = "") -> None:
        self.epoch = epoch
        #: The address of this machine from which the server is reached.
        self.local_host = local_host
        #: This node; new at each start.
        self.node = secrets.token_hex(3)
        #: Of its connections, in PostgreSQL's views.
        self.name = f"stagecast {self.node}"
        self._url = url
        #: Behind a pooler in transaction mode, which gives each transaction another connection of its own.
        self.pooled = pooled
        self._slots, self._urgent_slot = asyncio.Semaphore(_CONNECTIONS), asyncio.Semaphore(1)
        self._idle: list[Connection] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        #: The last reason that was logged, until a statement succeeds.
        self._reason = ""
        #: How far the server's clock is ahead of the event loop's.
        self._clock_offset: float = 0
        self._to_notify: set[str] = set()
        self._notifying: asyncio.Task[Any] | None = None
        self._closed = False

    @classmethod
    async def open(cls, url: str, *, epoch: str) -> "Database":
        """Check the server, and migrate the schema. `epoch`: for a new log.

        Raises:
            StorageRefused: it cannot be reached, or cannot keep what the log promises.
        """
        async with _connected(url) as (connection, pooled):
            await _check_server(connection)
            kept = await _migrate(connection, epoch)
            local = connection._transport.get_extra_info("sockname")
        # A Unix socket has a path.
        return cls(url, pooled=pooled, epoch=kept, local_host=local[0] if isinstance(local, tuple) else "127.0.0.1")

    async def directly(self, url: str) -> "Database":
        """The same database by a URL past the pooler. Raises `StorageRefused`."""
        async with _connected(url) as (connection, pooled), transaction(connection):
            epoch, _ = await _state(connection)
        if epoch != self.epoch:
            raise StorageRefused("STAGECAST_LOG_DIRECT leads to another database than STAGECAST_LOG.")
        return Database(url, pooled=pooled, epoch=self.epoch)

    async def fetch(self, query: str, *arguments: object) -> Sequence[asyncpg.Record]:
        """Run one statement. It goes on if the caller is cancelled.

        Raises:
            LogUnavailable: it may or may not have been committed.
            ValueError: PostgreSQL cannot store an argument.
        """
        return await asyncio.shield(self.start(query, *arguments))

    async def matching(self, query: str, *arguments: object) -> Sequence[asyncpg.Record]:
        """As `fetch`, for texts that only choose rows: one that cannot be stored matches none."""
        storable = all(is_text(value) for value in arguments if isinstance(value, str))
        return await self.fetch(query, *arguments) if storable else []

    async def fetchval(self, query: str, *arguments: object) -> Any:
        """The first value of `fetch`; ``None``: there is no row."""
        return next((row[0] for row in await self.fetch(query, *arguments)), None)

    async def rows(self, function: str, *arguments: object) -> Sequence[asyncpg.Record]:
        """What one of our functions returns."""
        places = ", ".join(f"${number}" for number in range(1, len(arguments) + 1))
        return await self.fetch(f"SELECT * FROM stagecast.{function}({places})", *arguments)

    async def call(self, function: str, *arguments: object) -> Any:
        """The one value that one of our functions returns."""
        return (await self.rows(function, *arguments))[0][0]

    def start(self, query: str, *arguments: object, urgent: bool = False) -> asyncio.Task[Sequence[asyncpg.Record]]:
        """Start one statement. Nobody has to wait for it. `urgent`: it waits for no other than such statements."""
        task = asyncio.create_task(self._fetch(self._urgent_slot if urgent else self._slots, query, *arguments))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def notify(self, channel: str) -> None:
        """Wake the other nodes that listen, without a wait: in a transaction of its own, one at a time.

        In the transaction of an append it would hold a lock of the whole server until that is flushed.
        """
        self._to_notify.add(channel)
        if self._notifying is None or self._notifying.done():
            query = "SELECT pg_notify(channel, $2) FROM unnest($1::text[]) AS channel"
            self._notifying = self.start(query, sorted(self._to_notify), self.node)
            self._notifying.add_done_callback(self._notified)
            self._to_notify.clear()

    def _notified(self, _: object) -> None:
        if self._to_notify:
            self.notify(self._to_notify.pop())

    @property
    def now(self) -> datetime:
        """The server's time, or a little less."""
        return datetime.fromtimestamp(asyncio.get_running_loop().time() + self._clock_offset, UTC)

    def set_clock(self, server: datetime) -> None:
        """Note the server's time, as it has just said."""
        self._clock_offset = server.timestamp() - asyncio.get_running_loop().time()

    async def connect(self, seconds: float = TIMEOUT) -> Connection:
        """A connection of the caller's own, within so many seconds. Raises `FAILURES`."""
        return await _connect(self._url, seconds, pooled=self.pooled, name=self.name)

    async def close(self) -> None:
        """Finish pending statements, and close the connections."""
        self._closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=TIMEOUT)
        while self._idle:
            with contextlib.suppress(*FAILURES):
                await self._idle.pop().close(timeout=TIMEOUT)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # The caller may have been cancelled.

    async def _fetch(self, slots: asyncio.Semaphore, query: str, *arguments: object) -> Sequence[asyncpg.Record]:
        if self._closed:
            raise LogUnavailable
        loop = asyncio.get_running_loop()
        give_up = loop.time() + TIMEOUT
        try:
            async with asyncio.timeout_at(give_up - _AT_LEAST):
                await slots.acquire()
        except TimeoutError:
            raise LogUnavailable from None
        connection = watchdog = None
        try:
            self._idle = [each for each in self._idle if not each.is_closed()]
            connection = self._idle.pop() if self._idle else await self.connect(give_up - loop.time())
            watchdog = loop.call_at(give_up, connection.terminate)
            async with transaction(connection, needed=self.pooled):
                rows: Sequence[asyncpg.Record] = await connection.fetch(query, *arguments)
            if connection.is_closed():  # See `_on_message`.
                raise asyncpg.ConnectionDoesNotExistError
            self._reason = ""
            return rows
        except asyncpg.DataError:
            raise ValueError("PostgreSQL cannot store an argument") from None
        except FAILURES as error:
            if (reason := reason_of(error)) != self._reason:
                self._reason = reason
                logger.error("the log is unavailable: %s", reason)
            if connection is not None and isinstance(error, _LOST):
                # The server stops, or has failed over: the other connections are no better.
                for each in (connection, *self._idle):
                    each.terminate()
            raise LogUnavailable from None
        finally:
            if watchdog is not None:
                watchdog.cancel()
            if connection is not None:
                self._idle.append(connection)
            slots.release()


@asynccontextmanager
async def transaction(connection: Connection, *, needed: bool = True) -> AsyncIterator[None]:
    """A transaction, if it is needed. A client that is paused in it does not keep its locks."""
    if not needed:
        yield
        return
    await connection.execute("BEGIN; SET LOCAL idle_in_transaction_session_timeout = '2s'")
    try:
        yield
    except BaseException:
        with contextlib.suppress(*FAILURES):
            await connection.execute("ROLLBACK")
        raise
    await connection.execute("COMMIT")


async def _connect(url: str, seconds: float = TIMEOUT, *, pooled: bool, name: str = "stagecast") -> Connection:
    connection = await asyncpg.connect(
        url,
        timeout=max(seconds, 0.1),
        target_session_attrs="read-write",
        server_settings={"application_name": name},
        # The statements that one connection of the pooler has prepared are unknown to the others.
        statement_cache_size=0 if pooled else 100,
    )
    connection.add_log_listener(_on_message)
    return connection


def _on_message(connection: Any, message: asyncpg.PostgresLogMessage) -> None:
    """Give up a statement that ends with a warning: its commit has not waited for the synchronous standby."""
    if message.severity_en == "WARNING":
        connection.terminate()


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[tuple[Connection, bool]]:
    """A connection, and whether it goes through a pooler, which has process ids of its own. Raises `StorageRefused`."""
    try:
        connection = await _connect(url, pooled=True)
        try:
            async with transaction(connection):
                pid = await connection.fetchval("SELECT pg_backend_pid()")
            yield connection, pid != connection.get_server_pid()
        finally:
            connection.terminate()
    except asyncpg.InsufficientPrivilegeError:
        raise StorageRefused(
            "The log cannot be opened: its role may not create the schema; run the output of"
            " `stagecast migrate --print` as one that may."
        ) from None
    except FAILURES as error:
        raise StorageRefused(f"The log cannot be opened: {reason_of(error)}.") from None
    except ValueError:
        raise StorageRefused("The log cannot be opened: its URL is not valid.") from None


async def _check_server(connection: Connection) -> None:
    """Refuse a server that may lose what it has acknowledged."""
    names = ("server_version_num", "fsync", "synchronous_commit", "synchronous_standby_names")
    async with transaction(connection):
        found = {name: str(await connection.fetchval("SELECT current_setting($1)", name)) for name in names}
    version = int(found["server_version_num"]) // 10_000
    if version < _OLDEST:
        raise StorageRefused(f"The log needs PostgreSQL {_OLDEST} or later; the server is version {version}.")
    for name in ("fsync", "synchronous_commit"):
        if found[name] == "off":
            raise StorageRefused(f"The log needs a PostgreSQL with {name} on; otherwise it loses acknowledged events.")
    if not found["synchronous_standby_names"]:
        logger.warning("PostgreSQL has no synchronous standby: the log survives a killed server, but not a lost disk")


async def _migrate(connection: Connection, epoch: str) -> str:
    """Bring the schema to the present version, and return the epoch of the log."""
    async with transaction(connection):
        kept, version = await _state(connection)
    if kept is None or version < len(SCHEMA):
        async with transaction(connection):
            await connection.fetchval("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
            kept, version = await _state(connection)  # Another node may have been faster.
            if script := _script(kept, version, epoch):
                await connection.execute(script)
    # A newer node has migrated it by one version, and works together with this one.
    if version > len(SCHEMA) + 1:
        raise StorageRefused(
            f"The log was written by a newer Stagecast (schema {version}; this one knows {len(SCHEMA)})."
        )
    return kept or epoch


def _script(kept: str | None, version: int, epoch: str) -> str:
    """The SQL that brings a schema of this version to the present one; empty if it is there."""
    steps = "".join(SCHEMA[version:])
    if kept is None:
        return f"{steps}INSERT INTO stagecast.log (epoch, version) VALUES ('{epoch}', {len(SCHEMA)});\n"
    return f"{steps}UPDATE stagecast.log SET version = {len(SCHEMA)};\n" if steps else ""


async def _state(connection: Connection) -> tuple[str | None, int]:
    """The epoch and the version of the log; ``None`` and 0 where there is none."""
    # Not `to_regclass`, which may not see yet what another node has committed.
    query = "SELECT count(*) FROM pg_tables WHERE schemaname = 'stagecast' AND tablename = 'log'"
    if not await connection.fetchval(query):
        return None, 0
    return await connection.fetchrow("SELECT epoch, version FROM stagecast.log") or (None, 0)


async def migrate(url: str, epoch: str, *, only_print: bool) -> str:
    """Bring the schema to the present version. Return the SQL that does. Raises `StorageRefused`."""
    async with _connected(url) as (connection, _):
        async with transaction(connection):
            script = _script(*await _state(connection), epoch)
        if not only_print:
            await _migrate(connection, epoch)
        return script


async def read_epoch(url: str) -> str | None:
    """The epoch of the log, which is only read. Raises `StorageRefused`."""
    async with _connected(url) as (connection, _), transaction(connection):
        epoch, _ = await _state(connection)
        return epoch


async def woken(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for the event, at most so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def reason_of(error: Exception) -> str:
    """Why the database does not answer, for the operator. It quotes nothing that users sent."""
    if isinstance(error, asyncpg.InterfaceError | asyncpg.PostgresConnectionError | AttributeError):
        return "the connection was lost"
    if isinstance(error, asyncpg.PostgresError):
        startup = isinstance(error, asyncpg.InvalidAuthorizationSpecificationError | asyncpg.InvalidCatalogNameError)
        return str(error) if startup else f"{type(error).__name__} ({error.sqlstate})"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return "it does not answer in time" if isinstance(error, TimeoutError) else type(error).__name__


def is_text(value: str) -> bool:
    """Whether PostgreSQL can store the text: it has no NUL and no lone surrogate, as JSON strings may."""
    return re.search("[\0\ud800-\udfff]", value) is None
