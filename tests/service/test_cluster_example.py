"""The example of a cluster on one machine."""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from support.builders import IN_MEMORY
from support.deployment import free_port
from support.node import ROOT
from support.postgres import find_program

EXAMPLE = ROOT / "examples" / "cluster"


async def test_the_programs_of_the_cluster_start() -> None:
    for name in ("run.py", "kill_a_node.py"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, EXAMPLE / name, "--help", stdout=asyncio.subprocess.PIPE
        )
        assert b"--folder" in (await process.communicate())[0]
        assert process.returncode == 0


@pytest.mark.long
@pytest.mark.skipif(find_program("initdb") is None, reason="PostgreSQL is not installed")
@pytest.mark.skipif(
    shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="HAProxy is not installed"
)
@pytest.mark.timeout(300)
async def test_two_devices_miss_nothing_when_a_node_of_the_cluster_is_killed() -> None:
    first = free_port()
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        Path(name).chmod(0o755)  # noqa: ASYNC240 - PostgreSQL may run as another user
        ports = ("--port", str(free_port()), "--first", str(first))
        cluster = await asyncio.create_subprocess_exec(
            sys.executable, EXAMPLE / "run.py", "--folder", name, *ports, stdout=asyncio.subprocess.PIPE
        )
        assert cluster.stdout is not None
        try:
            async with asyncio.timeout(120):
                while b"Three nodes are ready" not in (line := await cluster.stdout.readline()):
                    assert line, "it has ended"
            killing = await asyncio.create_subprocess_exec(
                sys.executable,
                EXAMPLE / "kill_a_node.py",
                "--folder",
                name,
                "--count",
                "4",
                stdout=asyncio.subprocess.PIPE,
            )
            async with asyncio.timeout(150):
                output = (await killing.communicate())[0].decode()
            assert killing.returncode == 0, output
            assert output.count("each event once, in order") == 2
        finally:
            cluster.send_signal(signal.SIGTERM)
            rest = (await asyncio.wait_for(cluster.communicate(), 60))[0]
        assert b"is started again" in rest
        assert json.loads(Path(name, "cluster.json").read_text())["pids"]  # noqa: ASYNC240
