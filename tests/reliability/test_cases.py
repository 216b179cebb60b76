"""Every case of `cases`: in its quick form, and in `make test-long` in its long one."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from reliability.all_cases import CASES
from reliability.cases import Case, Size, attempt
from support.case_server import HostProcess
from support.harness import running
from support.node import ROOT, needs_node

#: The service's process tells its memory as Linux does.
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory: needs Linux's /proc"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def process() -> AsyncIterator[HostProcess]:
    async with HostProcess.start() as process:
        yield process


#: Those of several nodes take longer than three seconds in either form. `tests/storage` has what is quick of them.
MARKS = {number: pytest.mark.long for number in CASES if number > 100} | {8: needs_node}


@pytest.mark.parametrize("size", ["quick", pytest.param("long", marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{number}: {case.run.__name__}", marks=MARKS.get(number, ()))
        for number, case in sorted(CASES.items())
    ],
)
async def test_the_reliability_case_holds(case: Case, size: Size, process: HostProcess, tmp_path: Path) -> None:
    outcome = await attempt(case, size, tmp_path, process if size == "quick" else None)
    assert not outcome.failures, "\n".join([*outcome.failures, str(outcome.figures)])


async def test_the_benchmark_program_starts() -> None:
    program = ROOT / "benchmarks" / "reliability.py"
    process = await asyncio.create_subprocess_exec(sys.executable, program, "--help", stdout=asyncio.subprocess.PIPE)
    assert b"--quick" in (await process.communicate())[0]
    assert process.returncode == 0


async def test_sockets_have_tcp_nodelay(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.http.get("/health/live")
        [connection] = service.server.server_state.connections
        assert connection.transport is not None
        client = connection.transport.get_extra_info("socket")
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
