"""Connections: the memory of an idle authenticated socket, and the CPU of connecting one while many others connect."""

import resource
import time

from benchmarks import peers
from benchmarks.fanout import NODE, PYTHON, STAGECAST, clients, server
from benchmarks.measuring import BenchmarkError, Row, Size, alternating, attempt

SOCKETS = 3_000
IN_FLIGHT = 1_000
#: Seconds after the last connect.
SETTLE = 0.7


def measure(name: str, sockets: int) -> tuple[float, float]:
    """The memory of a socket in kB, and the CPU of its connect in µs. Raises `BenchmarkError`."""
    with server(name, sockets) as process:
        port = process.answer(60)["port"]
        with clients(name, port, 1, 1) as first:  # What is imported or built at the first connection does not count.
            first.answer(30)
        time.sleep(SETTLE)
        memory, cpu = process.memory(), process.cpu()
        with clients(name, port, sockets, 1, IN_FLIGHT) as load:
            answer = load.answer(150)
            if answer["joined"] != sockets:
                raise load.failed(f"of {sockets} sockets {answer}")
            connected = process.cpu()
            time.sleep(SETTLE)
            return (process.memory() - memory) / sockets, (connected - cpu) / sockets


def run(size: Size) -> list[Row]:
    """All rows. Raises `BenchmarkError`."""
    sockets = size.many(SOCKETS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < sockets + 200:
        raise BenchmarkError(f"{sockets:,} sockets need as many file descriptors; the limit is {hard:,} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < sockets + 200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (sockets + 200, hard))
    values: dict[str, list[tuple[float, float]]] = {}
    names = (STAGECAST, PYTHON) if peers.without_node() else (STAGECAST, NODE, PYTHON)
    for _, turns in alternating(names, size):
        for name in turns:
            values.setdefault(name, []).append(attempt(measure, name, sockets))

    def row(figure: str, unit: str, index: int, peer: str, goal: float | None) -> Row:
        return Row(
            figure=figure,
            unit=unit,
            values=[both[index] for both in values[STAGECAST]],
            peer=peer,
            peer_values=[both[index] for both in values.get(peer, ())],
            at_most=goal,
        )

    memory, connect = f"memory per idle socket, of {SOCKETS:,}", f"connect with authentication, {SOCKETS:,} sockets"
    return [
        row(memory, "kB", 0, PYTHON, 0.5),
        row(memory, "kB", 0, NODE, None),
        row(connect, "µs CPU", 1, NODE, 1.4),
        row(connect, "µs CPU", 1, PYTHON, None),
    ]
