"""Several nodes on one PostgreSQL: appends of one and of three, delivery on another node, and a killed node."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.measuring import BenchmarkError, Process, Row, Size, alternating, attempt, cores
from benchmarks.servers.stored import WRITERS

SECONDS = 3.0
#: Appends per second, and how many of them, while their delivery on another node is timed.
PER_SECOND = 200
TIMED = 600
SOCKETS = 300

_COMMAND = [sys.executable, "-m", "benchmarks.servers.nodes"]


@contextmanager
def nodes(count: int) -> Iterator[list[Process]]:
    """So many nodes on a new PostgreSQL. All use both cores."""
    with ExitStack() as stack:
        server = stack.enter_context(_ending([*_COMMAND, "server"]))
        url = server.answer(60)["url"]
        processes = [stack.enter_context(_ending([*_COMMAND, "node", url])) for _ in range(count)]
        for process in processes:
            process.answer(60)
        yield processes


@contextmanager
def _ending(command: list[str]) -> Iterator[Process]:
    """A process that ends by itself once its stdin ends."""
    with Process(command, cores()) as process:
        yield process
        process.end(20)


def per_second(count: int, what: str, seconds: float) -> dict[str, float]:
    """What so many nodes do at once. Raises `BenchmarkError`."""
    with nodes(count) as processes:
        share = WRITERS // count
        for number, process in enumerate(processes):
            process.tell(f"{what} {number * share} {share} {seconds}")
        answers = [process.answer(60 + 5 * seconds) for process in processes]
        return {key: sum(each[key] for each in answers) for key in answers[0]}


def delivery(count: int) -> dict[str, float]:
    """From the append on one node to the delivery on another, in ms, and one append alone. Raises `BenchmarkError`."""
    with nodes(2) as (one, two):
        single = one.ask(f"single {count}", 60)
        two.ask(f"receive {count}", 30)
        one.ask(f"send {PER_SECOND} {count}", 120)
        return {"single": single["p50"], **two.answer(60)}


def cluster(sockets: int) -> dict[str, Any]:
    """Connects through HAProxy, and a killed node. Raises `BenchmarkError`."""
    with Process([*_COMMAND, "cluster", str(sockets)], cores()) as process:
        return process.answer(180)


def run(size: Size) -> list[Row]:
    """All rows. Raises `BenchmarkError`."""
    found: dict[str, list[dict[str, float]]] = {"one": [], "three": [], "rows": []}
    delivered: list[dict[str, float]] = []
    whole: list[dict[str, Any]] = []
    for repetition, turns in alternating(tuple(found), size):
        for what in turns:
            count = 3 if what == "three" else 1
            command = "rows" if what == "rows" else "appends"
            found[what].append(attempt(per_second, count, command, size.seconds(SECONDS)))
        delivered.append(attempt(delivery, size.count(TIMED)))
        if repetition == 0:
            whole.append(attempt(cluster, size.many(SOCKETS)))
    one, three, rows = ([each["per_second"] for each in found[what]] for what in found)
    if not all(rows):
        raise BenchmarkError("Nothing was appended.")
    return [
        Row(
            figure="appends/s of the PostgreSQL log, 128 writers",
            unit="per second",
            values=one,
            peer="bare rows",
            peer_values=rows,
            at_least=0.5,
        ),
        Row(figure="… at least, on two cores", unit="per second", values=one, at_least=5_000),
        Row(figure="… of three nodes", unit="per second", values=three, peer="one node", peer_values=one),
        Row(figure="… CPU of the node", unit="µs", values=[each["cpu"] for each in found["one"]]),
        Row(
            figure="append on one node → delivery on another, p50",
            unit="ms",
            values=[each["p50"] for each in delivered],
            peer="one append alone",
            peer_values=[each["single"] for each in delivered],
            at_most=4,
        ),
        Row(figure="… p99", unit="ms", values=[each["p99"] for each in delivered]),
        Row(
            figure="connect by WebSocket through HAProxy, p50",
            unit="ms",
            values=[each["through"] for each in whole],
            peer="to the nodes",
            peer_values=[each["direct"] for each in whole],
        ),
        Row(
            figure="work of a killed node is taken over after",
            unit="s",
            values=[each["taken_over"] for each in whole],
            at_most=15,
        ),
    ]
