"""Real nodes, `stagecast serve` on one PostgreSQL, and real balancers in front of them, as in the examples."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncpg
import pytest

from support.builders import IN_MEMORY
from support.deployment import Deployment, Life, free_port
from support.node import ROOT

EXAMPLES: Final = ROOT / "examples" / "cluster"

#: Of each balancer: what its configuration says in place of round robin.
ALGORITHMS: Final[Mapping[str, Mapping[str, tuple[str, str]]]] = {
    "haproxy": {name: ("balance roundrobin", f"balance {name}") for name in ("roundrobin", "leastconn", "random")},
    "nginx": {
        "roundrobin": ("", ""),
        "leastconn": ("    upstream nodes {", "    upstream nodes { least_conn;"),
        "random": ("    upstream nodes {", "    upstream nodes { random;"),
    },
}


@dataclass
class Node:
    """One node, in the life that it has at present."""

    deployment: Deployment
    life: Life
    _stack: AsyncExitStack

    @property
    def port(self) -> int:
        return self.deployment.port

    async def kill(self) -> None:
        await self._stack.aclose()

    async def stop(self) -> None:
        """By SIGTERM."""
        self.life.send(signal.SIGTERM)
        assert await self.life.ended() == 0
        await self.kill()

    async def revive(self) -> None:
        self._stack = AsyncExitStack()
        self.life = await self._stack.enter_async_context(self.deployment.serving())


@dataclass
class NodeCluster:
    """Nodes that share a database and an image folder."""

    log: str
    nodes: list[Node] = field(default_factory=list)

    async def until_known(self) -> None:
        """Wait until each node knows all others."""
        connection = await asyncpg.connect(self.log)
        async with asyncio.timeout(30):
            while await connection.fetchval("SELECT count(*) FROM stagecast.nodes") < len(self.nodes):
                await asyncio.sleep(0.05)
        await connection.close()
        await asyncio.sleep(1.1)  # The next heartbeat of each.

    def failures(self) -> list[str]:
        """What the nodes have logged that no outage explains."""
        lines = [line for node in self.nodes for line in node.life.logged]
        return [line for line in lines if "Traceback" in line or "Exception" in line]


@asynccontextmanager
async def node_cluster(log: str, folder: Path, count: int = 3, **flags: object) -> AsyncIterator[NodeCluster]:
    """So many nodes on the database of this URL."""
    (folder / "images").mkdir()
    variables = {"STAGECAST_SHARED_IMAGES": "true", "STAGECAST_TRUSTED_PROXIES": "127.0.0.1"}
    deployments = [
        Deployment(folder / f"node{number}", {"log": log, "images": folder / "images", **flags}, variables)
        for number in range(1, count + 1)
    ]
    stacks = [AsyncExitStack() for _ in deployments]
    try:
        cluster = NodeCluster(log)
        lives = [await stack.enter_async_context(each.life()) for stack, each in zip(stacks, deployments, strict=True)]
        await asyncio.gather(*(life.ready() for life in lives))
        cluster.nodes = [Node(*each) for each in zip(deployments, lives, stacks, strict=True)]
        await cluster.until_known()
        yield cluster
    finally:
        for stack in [node._stack for node in cluster.nodes] or stacks:
            await stack.aclose()


@asynccontextmanager
async def balancer(cluster: NodeCluster, name: str, algorithm: str) -> AsyncIterator[str]:
    """The URL of this balancer in front of the nodes."""
    program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None and "CI" not in os.environ:
        pytest.skip(f"needs {name}: install it")
    assert program is not None, f"{name} is not installed"
    file = EXAMPLES / ("haproxy.cfg" if name == "haproxy" else "nginx.conf")
    port = free_port()
    ports = {"8080": port} | {f"300{number}": node.port for number, node in enumerate(cluster.nodes, 1)}
    text = re.sub(r"(?<=127\.0\.0\.1:)\d+", lambda found: str(ports.pop(found[0])), file.read_text())
    assert not ports
    old, new = ALGORITHMS[name][algorithm]
    assert old in text
    text = text.replace(old, new, 1)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        configuration = f"{folder}/{file.name}"
        Path(configuration).write_text(text)  # noqa: ASYNC240 - it is short
        arguments = ["-f", configuration] if name == "haproxy" else ["-p", folder, "-c", configuration, "-e", "stderr"]
        process = await asyncio.create_subprocess_exec(program, *arguments, stderr=subprocess.DEVNULL)
        try:
            await _accepting(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            await process.wait()


async def _accepting(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.02)
