"""The event loop of `stagecast serve`, with and without uvloop, and its garbage collection."""

import asyncio
import subprocess
import sys

import pytest

from adapters.serving.event_loop import run

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
