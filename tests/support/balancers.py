"""Real balancers in front of nodes, configured as in the examples."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from support.builders import IN_MEMORY
from support.deployment import free_port
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


@asynccontextmanager
async def balancer(nodes: Sequence[int], name: str, algorithm: str) -> AsyncIterator[str]:
    """The URL of this balancer in front of the nodes on these three ports."""
    program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None and "CI" not in os.environ:
        pytest.skip(f"needs {name}: install it")
    assert program is not None, f"{name} is not installed"
    file = EXAMPLES / ("haproxy.cfg" if name == "haproxy" else "nginx.conf")
    port = free_port()
    ports = {"8080": port} | {f"300{number}": node for number, node in enumerate(nodes, 1)}
    text = re.sub(r"(?<=127\.0\.0\.1:)\d+", lambda found: str(ports[found[0]]), file.read_text())
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
