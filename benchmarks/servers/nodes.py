"""One node of a log in PostgreSQL, or what it is compared with; and a cluster of whole nodes behind HAProxy.

    python -m benchmarks.servers.nodes server            a new PostgreSQL; answers with its URL
    python -m benchmarks.servers.nodes node URL          a node, which obeys the commands below
    python -m benchmarks.servers.nodes cluster SOCKETS   connects through HAProxy, and a node that is killed

``appends FIRST WRITERS SECONDS``: appends per second of so many writers at once. ``rows FIRST WRITERS SECONDS``: the
same rows, written to the same tables without any check, in the same batches. ``single COUNT``: the time of one append
after the other. ``send PER_SECOND COUNT``: appends that say when they began. ``receive COUNT``: how long those of
another node took to be delivered here.
"""

import asyncio
import contextlib
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "tests"))

import asyncpg
import httpx2

from adapters.postgres.storage import open_storage
from adapters.system import now
from benchmarks.servers import control
from benchmarks.servers.stored import appends
from domain.feed import Logged
from domain.ports.log import Notice
from domain.ports.storage import Storage, StorageOptions
from support.deployment import free_port
from support.harness import PHOTO
from support.node_processes import Cluster
from support.postgres import Server, new_server
from support.wire import Wire, hang_up

#: Appends in one call of the log, and calls at once.
BATCH: Final = 64
CALLS: Final = 2

_ROWS: Final = """
    WITH entry AS (
        SELECT * FROM unnest(
            $1::bigint[], $2::bigint[], $3::bigint[], $4::integer[], $5::bigint[], $6::text[], $7::bytea[], $8::text[]
        ) AS entry (owner, position, generation, sequence, event_id, name, event, generation_id)
    ), of_users AS (
        UPDATE stagecast.users SET head = entry.position FROM entry WHERE users.id = entry.owner
    ), begun AS (
        INSERT INTO stagecast.generations (
            id, generation_id, owner, kind, request_json, fingerprint, external, reserved, free, last, first_position
        ) OVERRIDING SYSTEM VALUE
        SELECT generation, generation_id, owner, 'edit', $9, '', false, true, false, 1, position
        FROM entry WHERE sequence = 1
    ), moved AS (
        UPDATE stagecast.generations SET last = entry.sequence,
            end_position = CASE WHEN entry.name IN ('generation_completed') THEN entry.position END
        FROM entry WHERE generations.id = entry.generation AND entry.sequence > 1
    )
    INSERT INTO stagecast.events (owner, position, generation, sequence, event_id, name, event)
    SELECT owner, position, generation, sequence, event_id, name, event FROM entry
"""


async def serve() -> None:
    """A PostgreSQL on the disk of the temporary folder, until stdin ends."""
    server = Server(Path(tempfile.mkdtemp()), full_page_writes="on")
    server.folder.chmod(0o755)
    server.create()
    server.start()
    try:
        control.say(url=server.url())
        await asyncio.to_thread(sys.stdin.read)
    finally:
        server.stop("fast")
        shutil.rmtree(server.folder)


class Node:
    """The storage of one node, and its commands."""

    def __init__(self, url: str, storage: Storage) -> None:
        self._url = url
        self._storage = storage
        #: From the append on one node to the delivery here, in ms.
        self._took: list[float] = []

    async def appends(self, first: int, writers: int, seconds: float) -> dict[str, float]:
        """Append with so many writers at once."""
        count, began, end = 0, time.process_time(), time.monotonic() + seconds

        async def write(user_id: str) -> None:
            nonlocal count
            for entry in appends(user_id):
                if time.monotonic() > end:
                    return
                await self._storage.log.append(entry)
                count += 1

        await asyncio.gather(*(write(f"u{user}") for user in range(first, first + writers)))
        return {"per_second": count / seconds, "cpu": 1e6 * (time.process_time() - began) / max(count, 1)}

    async def rows(self, first: int, writers: int, seconds: float) -> dict[str, float]:
        """Write the same rows without checks."""
        count, end = 0, time.monotonic() + seconds
        connections = [await asyncpg.connect(self._url) for _ in range(CALLS)]
        await connections[0].execute(
            "INSERT INTO stagecast.users (user_id, floor_id, credit) SELECT 'row' || number, 0, 1000"
            " FROM generate_series($1::integer, $2::integer) AS number",
            first,
            first + writers - 1,
        )
        query = "SELECT id FROM stagecast.users WHERE user_id LIKE 'row%' ORDER BY id DESC LIMIT $1"
        owners = [row["id"] for row in await connections[0].fetch(query, writers)]
        numbers = itertools.count(10**12 + first * 10**9)

        async def write(connection: asyncpg.Connection, owners: Sequence[int]) -> None:
            nonlocal count
            writers = [appends(f"row{owner}") for owner in owners]
            heads, generations = dict.fromkeys(owners, 0), dict.fromkeys(owners, 0)
            for begin in itertools.cycle(range(0, len(owners), BATCH)):
                if time.monotonic() > end:
                    return
                columns: list[tuple[Any, ...]] = []
                for owner, writer in list(zip(owners, writers, strict=True))[begin : begin + BATCH]:
                    entry = next(writer)
                    heads[owner] += 1
                    if entry.start:
                        generations[owner] = next(numbers)
                        request = entry.start.request
                    columns.append(
                        (
                            *(owner, heads[owner], generations[owner], entry.sequence, entry.event_id, entry.name),
                            *(entry.event, entry.generation_id),
                        )
                    )
                await connection.execute(_ROWS, *map(list, zip(*columns, strict=True)), request)
                count += len(columns)

        parts = [owners[each::CALLS] for each in range(CALLS)]
        await asyncio.gather(*(write(*each) for each in zip(connections, parts, strict=True)))
        for connection in connections:
            await connection.close()
        return {"per_second": count / seconds}

    async def single(self, count: int) -> dict[str, float]:
        """Append one after the other."""
        took, writer = list[float](), appends(f"single{os.getpid()}")
        for _ in range(count):
            entry, began = next(writer), time.perf_counter()
            await self._storage.log.append(entry)
            took.append(1e3 * (time.perf_counter() - began))
        return {"p50": statistics.median(took)}

    async def send(self, per_second: float, count: int) -> dict[str, float]:
        """Append what says when it began."""
        writers = [appends(f"sent{os.getpid()} {number}") for number in range(50)]
        begin = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                await asyncio.sleep(begin + number / per_second - time.monotonic())
                entry = next(writers[number % len(writers)])
                event = entry.event.replace(b"OpenAI image editing started...", b"@%d@" % time.monotonic_ns())
                tasks.create_task(self._storage.log.append(entry._replace(event=event)))
        return {"sent": count}

    async def receive(self, count: int) -> dict[str, float]:
        """Time what another node sends."""
        took, done = list[float](), asyncio.Event()

        def take(entry: Notice) -> None:
            if isinstance(entry, Logged) and entry.event is not None and entry.user_id.startswith("sent"):
                took.append((time.monotonic_ns() - int(entry.event.split(b"@")[1])) / 1e6)
                if len(took) >= count:
                    done.set()

        async with self._storage.log.follow(take), asyncio.timeout(60):
            control.say(following=True)
            await done.wait()
        took.sort()
        return {"p50": statistics.median(took), "p99": took[int(0.99 * len(took))]}


async def node(url: str) -> None:
    """Obey commands until stdin ends."""
    options = StorageOptions(epoch="benchmark", credits=10**9, clock=now, retention=timedelta(days=1))
    storage = await open_storage(url, options)
    background = [asyncio.ensure_future(work()) for work in storage.background.values()]
    this = Node(url, storage)
    control.say(ready=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *arguments = line.split()
        try:
            control.say(**await getattr(this, command)(*(json_number(each) for each in arguments)))
        except Exception as error:
            control.say(error=repr(error))
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    await storage.close()


def json_number(text: str) -> float:
    """A whole number where it is one."""
    return float(text) if "." in text else int(text)


_HAPROXY: Final = """
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    timeout tunnel 60s
frontend clients
    bind 127.0.0.1:{port}
    default_backend nodes
backend nodes
    balance roundrobin
"""


async def cluster(sockets: int) -> None:
    """Connects through HAProxy, and the take-over of a killed node's work."""
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        control.say(error="HAProxy is not installed")
        return
    flags = {"credits": "off", "local_seconds": 30, "max_running": 1, "max_lag_ms": "off"}
    imports = ["asyncpg", "adapters.postgres.storage"]
    with new_server() as server, tempfile.TemporaryDirectory() as folder:
        async with Cluster.open(Path(folder), server.url(), flags=flags, imports=imports) as nodes:
            port = free_port()
            servers = [f"    server node{number} 127.0.0.1:{each}" for number, each in enumerate(nodes.ports)]
            text = _HAPROXY.format(port=port) + "\n".join(servers) + "\n"
            Path(folder, "haproxy.cfg").write_text(text)  # noqa: ASYNC240 - it is short
            balancer = await asyncio.create_subprocess_exec(program, "-f", f"{folder}/haproxy.cfg")
            try:
                async with asyncio.timeout(20):
                    while True:
                        with contextlib.suppress(OSError):
                            (await asyncio.open_connection("127.0.0.1", port))[1].close()
                            break
                        await asyncio.sleep(0.05)
                direct = await connects(nodes.ports, sockets)
                through = await connects([port], sockets)
            finally:
                balancer.terminate()
                await balancer.wait()
            control.say(direct=direct, through=through, taken_over=await taken_over(nodes))


async def connects(ports: Sequence[int], sockets: int) -> float:
    """The median time in ms of a WebSocket's connect with authentication, 16 at a time."""
    took, wires, room = list[float](), list[Wire](), asyncio.Semaphore(16)

    async def connect(number: int) -> None:
        async with room:
            began = time.perf_counter()
            wire = await Wire.open(ports[number % len(ports)])
            wires.append(wire)
            await wire.connect(userId=f"user{number % 50}")
            took.append(1e3 * (time.perf_counter() - began))

    await asyncio.gather(*map(connect, range(sockets)))
    await hang_up(wires)
    return statistics.median(took)


async def taken_over(nodes: Cluster) -> float:
    """Seconds after which what a killed node held is another one's."""
    node = nodes.nodes[0]
    await asyncio.sleep(10)  # A node takes work over only after it has watched the others for a lease.
    async with httpx2.AsyncClient(base_url=node.deployment.url, timeout=30) as http:
        for _ in range(6):
            await http.post("/generations/generate", files={"prompt": (None, "a red hat"), "images": ("a.jpg", PHOTO)})
            if await nodes.held_by(node.id):
                break
    await nodes.kill(node)
    return await nodes.seconds_until_taken_over(node.id)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "cluster":
        asyncio.run(cluster(int(arguments[0])))
    else:
        asyncio.run(serve() if what == "server" else node(arguments[0]))
