"""The event loop of `stagecast serve`, with and without uvloop, and its garbage collection."""

import asyncio
import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack

import pytest

from adapters.serving.connection_table import ConnectionTable
from adapters.serving.event_loop import run
from support.harness import TIMEOUT
from support.raw_http import serving, stream

#: Prints the module of the loop that runs.
PROGRAM = """
import asyncio, sys
if "without" in sys.argv:
    sys.modules["uvloop"] = None
from adapters.serving.event_loop import run
async def main():
    print(type(asyncio.get_running_loop()).__module__)
run(main)
"""


@pytest.mark.parametrize(("argument", "module"), [("with", "uvloop"), ("without", "asyncio.unix_events")])
def test_uvloop_is_used_where_it_is_installed(argument: str, module: str) -> None:
    if argument == "with":
        pytest.importorskip("uvloop")
    done = subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == module


def test_garbage_is_still_collected_after_the_start() -> None:
    program = """
import gc, weakref
from adapters.serving.event_loop import collect_less
collect_less()
class Cycle: pass
seen = []
for _ in range(50_000):
    cycle = Cycle()
    cycle.self = cycle
    weakref.finalize(cycle, seen.append, 1)
assert gc.get_freeze_count() > 0
assert len(seen) > 10_000, len(seen)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_the_service_raises_reaches_the_caller() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError

    with pytest.raises(LookupError):
        run(fails)


class PassCountingTable(ConnectionTable):
    """Notes in which pass of the event loop each connection is accepted."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = Counter[int]()
        self.count_pass()

    def count_pass(self, number: int = 0) -> None:
        self.current = number
        asyncio.get_running_loop().call_soon(self.count_pass, number + 1)

    def add(self, transport: asyncio.Transport, host: str) -> None:
        self.passes[self.current] += 1
        super().add(transport, host)


async def accept_sixteen() -> None:
    table = PassCountingTable()
    async with serving(stream, table=table) as port:
        with ExitStack() as stack:
            for _ in range(16):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            async with asyncio.timeout(TIMEOUT):
                while table.passes.total() < 16:
                    await asyncio.sleep(0)
    assert len(table.passes) <= 4


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_several_connections_are_accepted_in_one_pass(loop: str) -> None:
    """In a busy service each pass may take long."""
    pytest.importorskip(loop).run(accept_sixteen())
