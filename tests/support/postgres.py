"""A real PostgreSQL, shared by all workers of a test run: a server, its databases, and logs in them."""

import asyncio
import contextlib
import fcntl
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
import pytest

from adapters.postgres.storage import open_storage
from domain.ports.storage import Storage, StorageOptions
from domain.ports.system import Clock
from support.builders import IN_MEMORY, SteppableClock, WholeLog

#: Where Debian keeps the server's programs, besides the path.
_DEBIAN: Final = Path("/usr/lib/postgresql")

#: The server is held to its promises by the start check. A memory disk makes them cheap.
_SETTINGS: Final = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "off",
    "listen_addresses": "''",
    "max_connections": "400",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "autovacuum_naptime": "60s",
    "unix_socket_permissions": "0777",
}


def find_program(name: str) -> str | None:
    """The newest program of PostgreSQL with this name."""
    debian = sorted(_DEBIAN.glob(f"*/bin/{name}"), key=lambda path: int(path.parent.parent.name))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


def _as_user() -> dict[str, Any]:
    """Options of `subprocess`: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": ()}
    raise AssertionError("there is no user without privileges")


class Server:
    """A server with a folder of its own, on a Unix socket in it."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.data = folder / "data"
        self._settings = {**_SETTINGS, "unix_socket_directories": f"'{folder}'", **settings}

    def url(self, database: str = "postgres") -> str:
        return f"postgresql:///{database}?host={self.folder}&user=stagecast"

    def create(self) -> None:
        if options := _as_user():
            os.chown(self.folder, options["user"], options["group"])
        initdb = (find_program("initdb") or "", "-D", self.data, "-U", "stagecast", "-A", "trust", "-E", "UTF8")
        self._do(*initdb, "--no-locale", "--no-sync", "--no-instructions")
        lines = "".join(f"{name} = {value}\n" for name, value in self._settings.items())
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(lines)

    def start(self) -> None:
        self._control("start", "-w", "-l", self.folder / "server.log")

    def stop(self, mode: str = "immediate") -> None:
        self._control("stop", "-m", mode)

    def follow(self, primary: "Server") -> None:
        """Begin as a standby of this running server, which waits for it from now on."""
        if options := _as_user():
            os.chown(self.folder, options["user"], options["group"])
        self._do(
            find_program("pg_basebackup") or "", "-D", self.data, "-d", primary.url(), "-X", "stream", "-c", "fast"
        )
        (self.data / "standby.signal").touch()
        if options:
            os.chown(self.data / "standby.signal", options["user"], options["group"])
        with (self.data / "postgresql.auto.conf").open("a") as file:
            file.write(f"unix_socket_directories = '{self.folder}'\nsynchronous_standby_names = ''\n")
            file.write(f"primary_conninfo = 'host={primary.folder} user=stagecast application_name=standby'\n")
        self.start()
        primary.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        primary.execute("SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Become a primary that waits for nobody."""
        self._control("promote", "-w")

    def execute(self, statement: str) -> None:
        self.query(statement)

    def query(self, statement: str) -> str:
        """The one value that the statement returns."""
        return self._do(find_program("psql") or "", "-d", self.url(), "-Atc", statement, quiet=False).strip()

    def _control(self, command: str, *arguments: object) -> None:
        self._do(find_program("pg_ctl") or "", "-D", self.data, "-s", command, *arguments)

    def _do(self, *command: object, quiet: bool = True) -> str:
        done = subprocess.run(
            [str(each) for each in command], cwd=self.folder, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL if quiet else subprocess.PIPE, **_as_user(), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        return "" if quiet else done.stdout.decode()


@contextmanager
def new_server(**settings: str) -> Iterator[Server]:
    """A running server of one's own, which can be killed."""
    if find_program("initdb") is None:
        pytest.skip("PostgreSQL is not installed: initdb is neither on the path nor in /usr/lib/postgresql")
    with tempfile.TemporaryDirectory(dir=IN_MEMORY, prefix="stagecast-pg-") as name:
        server = Server(Path(name), **settings)
        server.create()
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(AssertionError):
                server.stop()


@contextmanager
def replicated_servers(count: int) -> Iterator[list[Server]]:
    """A running server, and others that can follow it, one after the other."""
    with new_server() as primary, ExitStack() as stack:
        servers = [primary]
        for _ in range(count - 1):
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=IN_MEMORY, prefix="stagecast-pg-"))
            servers.append(Server(Path(folder)))
            stack.callback(_stop, servers[-1])
        yield servers


def _stop(server: Server) -> None:
    with contextlib.suppress(AssertionError):
        server.stop()


def url_of(servers: Sequence[Server]) -> str:
    """The URL of whichever of these servers takes writes."""
    folders = ",".join(str(server.folder) for server in servers)
    return f"postgresql:///postgres?host={folders}&user=stagecast&target_session_attrs=read-write"


class SharedServer:
    """The server of a test run: the first worker that needs it starts it, and the last one stops it."""

    def __init__(self, run: str) -> None:
        self._folder = Path(IN_MEMORY or tempfile.gettempdir(), f"stagecast-pg-{run}")
        self._users = Path(f"{self._folder}.users")
        self._started = False

    def database_url(self, name: str) -> str:
        if (given := os.environ.get("TEST_POSTGRES_URL")) is not None:
            return urlsplit(given)._replace(path=f"/{name}").geturl()
        return Server(self._folder).url(name)

    def acquire(self) -> None:
        if self._started or "TEST_POSTGRES_URL" in os.environ:
            return
        if find_program("initdb") is None:
            pytest.skip("PostgreSQL is not installed: initdb is neither on the path nor in /usr/lib/postgresql")
        with self._count() as users:
            if not users:
                self._folder.mkdir()
                server = Server(self._folder)
                server.create()
                server.start()
            users.append(str(os.getpid()))
        self._started = True

    def release(self) -> None:
        if not self._started:
            return
        with self._count() as users:
            users.remove(str(os.getpid()))
            if not users:
                Server(self._folder).stop()
                shutil.rmtree(self._folder)

    @contextmanager
    def _count(self) -> Iterator[list[str]]:
        """The processes that use it, while no other one looks. The file is removed with the last one."""
        with ExitStack() as stack:
            while True:
                file = stack.enter_context(self._users.open("a+"))
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink:  # It was not removed while this process waited.
                    break
            file.seek(0)
            users = file.read().split()
            yield users
            file.truncate(0)
            file.write("\n".join(users))
            if not users:
                self._users.unlink()


#: The tables of a log, apart from those of the schema's state.
_TABLES: Final = (
    "events", "generations", "users", "grants", "sessions", "removals", "nodes", "leases", "chores",
    "starts", "devices", "stored_images",
)  # fmt: skip
_numbers: Final = itertools.count()
_free: list[str] = []
shared: Final = SharedServer(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())))


@asynccontextmanager
async def fresh_database(epoch: str = "e1") -> AsyncIterator[str]:
    """The URL of a database that nobody else uses, with an empty log of this epoch or none."""
    shared.acquire()
    name = _free.pop() if _free else None
    if name is None:
        name = f"stagecast_{os.getpid()}_{next(_numbers)}"
        connection = await asyncpg.connect(shared.database_url("postgres"))
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
    else:
        connection = await asyncpg.connect(shared.database_url(name))
        await connection.execute("UPDATE stagecast.log SET epoch = $1", epoch)
        await connection.close()
    try:
        yield shared.database_url(name)
    finally:
        connection = await asyncpg.connect(shared.database_url(name))
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        if await connection.fetchval("SELECT to_regclass('stagecast.events')") is not None:
            await connection.execute("; ".join(f"DELETE FROM stagecast.{table}" for table in _TABLES))
            _free.append(name)
        await connection.close()


@asynccontextmanager
async def running(storage: Storage) -> AsyncIterator[Storage]:
    """The storage with what it does in the background."""
    tasks = [asyncio.ensure_future(work()) for work in storage.background.values()]
    try:
        yield storage
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await storage.close()
        assert [each for each in outcomes if not isinstance(each, asyncio.CancelledError)] == []


@asynccontextmanager
async def open_node(url: str, clock: Clock | None = None, **options: Any) -> AsyncIterator[Storage]:
    """One node's storage."""
    chosen = {"epoch": "e1", "credits": 100, "retention": timedelta(days=1), **options}
    opened = await open_storage(url, StorageOptions(clock=clock or SteppableClock(), **chosen))
    async with running(opened) as storage:
        yield storage


@asynccontextmanager
async def open_postgres_log(
    *, clock: Clock, credits: int | None = 100, epoch: str = "e1", outbox: bool = False
) -> AsyncIterator[WholeLog]:
    async with (
        fresh_database(epoch) as url,
        open_node(url, clock, credits=credits, epoch=epoch, outbox=outbox) as storage,
    ):
        log: Any = storage.log
        yield log


@asynccontextmanager
async def pgbouncer(url: str, size: int = 3) -> AsyncIterator[str]:
    """The URL of a PgBouncer in transaction mode in front of this database, with so many connections to it."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    target = await asyncpg.connect(url)
    parameters, (host, port) = target._params, target._addr if isinstance(target._addr, tuple) else (target._addr, 5432)
    await target.close()
    host = str(Path(host).parent) if str(host).startswith("/") else host
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        folder = Path(name)
        options = _as_user()
        if options:
            os.chown(folder, options["user"], options["group"])
        (folder / "users.txt").write_text(f'"{parameters.user}" "{parameters.password or ""}"\n')
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={host} port={port}\n[pgbouncer]\nlisten_addr =\nunix_socket_dir = {folder}\n"
            f"unix_socket_mode = 0777\nauth_type = any\nauth_file = {folder}/users.txt\n"
            f"pool_mode = transaction\ndefault_pool_size = {size}\nmax_client_conn = 100\n"
        )
        if parameters.user:
            text = (folder / "pgbouncer.ini").read_text()
            text = text.replace("* = host", f"{parameters.database} = user={parameters.user} host")
            (folder / "pgbouncer.ini").write_text(text)
        process = await asyncio.create_subprocess_exec(
            program, str(folder / "pgbouncer.ini"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
        )
        try:
            async with asyncio.timeout(20):
                while not (folder / ".s.PGSQL.6432").exists():
                    await asyncio.sleep(0.02)
            yield f"postgresql:///{parameters.database}?host={folder}&port=6432&user={parameters.user}"
        finally:
            process.terminate()
            await process.wait()
