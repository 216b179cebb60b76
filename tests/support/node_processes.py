"""Nodes in processes of their own over one PostgreSQL: each can be killed, frozen, and started again."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg
import httpx2

from support.deployment import Deployment, Life, RetryingClient

#: What is in the address of every picture, whichever node has stored it.
PUBLIC_URL: Final = "http://stagecast.test"


class RoamingClient(RetryingClient):
    """Sends each request to any node."""

    def __init__(self, clients: Sequence[httpx2.AsyncClient]) -> None:
        super().__init__(clients[0])
        self._clients = clients

    @classmethod
    @asynccontextmanager
    async def to(cls, *urls: str) -> AsyncIterator["RoamingClient"]:
        async with AsyncExitStack() as stack:
            limits = httpx2.Limits(max_keepalive_connections=50)
            clients = [httpx2.AsyncClient(base_url=url, timeout=10, limits=limits) for url in urls]
            yield cls([await stack.enter_async_context(each) for each in clients])

    async def once(self, *arguments: Any, **rest: Any) -> httpx2.Response:
        self._http = random.choice(self._clients)
        return await super().once(*arguments, **rest)


@dataclass
class Node:
    """One place of a node, which has one life after the other."""

    deployment: Deployment
    life: Life
    #: Its id in the table of nodes.
    id: str
    #: Ends its life.
    stack: AsyncExitStack

    @property
    def port(self) -> int:
        return self.deployment.port


class Cluster:
    """Some nodes, all ready."""

    def __init__(self, folder: Path, log: str, database: Any, options: Mapping[str, Any]) -> None:
        self._folder = folder
        self._log = log
        self._options = options
        #: An observer's connections.
        self.database = database
        self.nodes: list[Node] = []
        #: What ended lives have logged.
        self.logged: list[str] = []

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        folder: Path,
        log: str,
        count: int = 3,
        *,
        links: Sequence[str] = (),
        flags: Mapping[str, object],
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> AsyncIterator["Cluster"]:
        """`links`: how each node reaches the log, if they do so differently. `options`: those of `Deployment`."""
        database = await asyncpg.create_pool(log, min_size=0, max_size=5)
        shared = {"images": folder / "images", "public_url": PUBLIC_URL, **flags}
        environment = {"STAGECAST_SHARED_IMAGES": "true", **(environment or {})}
        cluster = cls(folder, log, database, {"flags": shared, "environment": environment, **options})
        try:
            for number in range(count):
                await cluster.add(number, links[number] if links else log)
            yield cluster
        finally:
            for node in cluster.nodes:
                await node.stack.aclose()
            await cluster.database.close()

    @property
    def urls(self) -> list[str]:
        return [node.deployment.url for node in self.nodes]

    @property
    def ports(self) -> list[int]:
        return [node.port for node in self.nodes]

    async def add(self, number: int, log: str | None = None, **options: Any) -> Node:
        """One more node."""
        options = {**self._options, "shared_log": log or self._log, **options}
        node = await self._begin(Deployment(self._folder / f"node{number}", **options))
        self.nodes.append(node)
        return node

    async def start(self, node: Node) -> None:
        """Another life in the place of one that has ended."""
        new = await self._begin(node.deployment)
        node.life, node.id, node.stack = new.life, new.id, new.stack

    async def kill(self, node: Node) -> None:
        """As by ``kill -9``."""
        await node.stack.aclose()
        self.logged += node.life.logged

    async def stop(self, node: Node, seconds: float = 60) -> None:
        """As by a deployment."""
        node.life.send(signal.SIGTERM)
        assert await node.life.ended(seconds) == 0
        await self.kill(node)

    async def reconnect(self) -> None:
        """Observe again, after PostgreSQL has been away."""
        self.database.terminate()
        self.database = await asyncpg.create_pool(self._log, min_size=0, max_size=5)

    async def until_ready(self, status: int = 200, *nodes: Node) -> float:
        """Wait until these nodes, by default all, answer with this status. Return after how many seconds."""
        began = time.monotonic()
        async with httpx2.AsyncClient(timeout=5) as http, asyncio.timeout(60):
            for node in nodes or self.nodes:
                while True:
                    with contextlib.suppress(httpx2.TransportError):
                        if (await http.get(f"{node.deployment.url}/health/ready")).status_code == status:
                            break
                    await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def held_by(self, node_id: str) -> list[str]:
        """What this node holds."""
        rows = await self.database.fetch("SELECT generation_id FROM stagecast.leases WHERE holder = $1", node_id)
        return [row["generation_id"] for row in rows]

    async def seconds_until_taken_over(self, node_id: str, seconds: float = 60) -> float:
        """After which a dead node holds nothing any more."""
        began = time.monotonic()
        async with asyncio.timeout(seconds):
            while await self.held_by(node_id):
                await asyncio.sleep(0.1)
        return time.monotonic() - began

    async def check_log(self, credits: int) -> None:
        """I1, I2, I6 and feeds without a gap, at whatever moment."""
        for query in _NEVER:
            assert await self.database.fetch(query) == [], query
        for user, credit, reserved, refunded, granted in await self.database.fetch(_BALANCES):
            assert credit == credits + granted - reserved + refunded, f"the balance of {user}"

    async def _begin(self, deployment: Deployment) -> Node:
        stack, before = AsyncExitStack(), await self._ids()
        life = await stack.enter_async_context(deployment.serving())
        ids = await self._ids() - before
        assert len(ids) == 1
        return Node(deployment, life, ids.pop(), stack)

    async def _ids(self) -> set[str]:
        with contextlib.suppress(asyncpg.InvalidSchemaNameError, asyncpg.UndefinedTableError):
            return {row["id"] for row in await self.database.fetch("SELECT id FROM stagecast.nodes")}
        return set()


_NEVER: Final = (
    "SELECT generation FROM stagecast.events GROUP BY generation"
    " HAVING min(sequence) <> 1 OR max(sequence) <> count(*)",
    "SELECT users.id FROM stagecast.users JOIN stagecast.events ON owner = users.id GROUP BY users.id"
    " HAVING max(position) <> count(*) OR max(position) <> head",
    """SELECT generations.id FROM stagecast.generations JOIN stagecast.events ON generation = generations.id
        GROUP BY generations.id HAVING
        count(*) FILTER (WHERE name IN ('generation_completed', 'generation_failed')) <> (end_position IS NOT NULL)::int
        OR coalesce(end_position, max(position)) <> max(position)""",
    "SELECT users.id FROM stagecast.users WHERE active <>"
    " (SELECT count(*) FROM stagecast.generations WHERE owner = users.id AND end_position IS NULL)",
)
_BALANCES: Final = """
    SELECT user_id, credit,
        (SELECT count(*) FROM stagecast.generations WHERE owner = users.id AND reserved),
        (SELECT count(*) FROM stagecast.events WHERE owner = users.id AND name = 'generation_failed'),
        (SELECT coalesce(sum(amount), 0) FROM stagecast.grants WHERE owner = users.id)
    FROM stagecast.users WHERE credit IS NOT NULL
"""
