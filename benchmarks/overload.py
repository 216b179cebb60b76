"""Overload: starts come twice as fast as they can be accepted, while connected devices get the events of other work."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final

from benchmarks.fanout import STAGECAST, clients
from benchmarks.measuring import Process, Row, Size, attempt, cores

USERS: Final = 300
#: Events per second of the work that goes on.
PER_SECOND: Final = 200
#: For the highest rate: each connection waits for its answer.
CONNECTIONS: Final = 64
_LIMITS: Final = {"STAGECAST_STARTS_PER_MINUTE": "off", "STAGECAST_MAX_PER_USER": "1000000"}


def measure(size: Size) -> dict[str, float]:
    """The figures of one repetition. Raises `BenchmarkError`."""
    users, seconds = size.many(USERS), size.seconds(4)
    server_core, client_core = cores()
    product = [sys.executable, "-m", "benchmarks.servers.product", str(users)]
    with ExitStack() as stack:
        server = stack.enter_context(Process(product, [server_core], env=_LIMITS))
        port = server.answer(60)["port"]
        driver = [sys.executable, "-m", "benchmarks.servers.starts", str(port)]
        starts = stack.enter_context(Process(driver, [client_core]))
        load = stack.enter_context(clients(STAGECAST, port, users, 1))
        load.answer(60)
        starts.ask(f"closed {CONNECTIONS} {seconds / 4}", 60)
        rate = starts.ask(f"closed {CONNECTIONS} {seconds}", 60)["202"] / seconds
        load.ask("arm", 30)
        with ThreadPoolExecutor(1) as threads:
            flood = threads.submit(starts.ask, f"open {2 * rate} {2.5 * seconds}", 20 * seconds + 60)
            late = [_p99(command, server, load, seconds) for command in ("rate", "paced")]
            answers = flood.result()
        total = sum(answers.values())
        return {
            "rate": rate,
            "delivered": late[0],
            "due": late[1],
            "overloaded": 100 * answers.get("overloaded", 0) / total,
            "others": 100 * (total - answers.get("202", 0) - answers.get("overloaded", 0)) / total,
        }


def _p99(command: str, server: Process, load: Process, seconds: float) -> float:
    """The p99 of the latencies of events that are made meanwhile, in ms."""
    sent = server.ask(f"{command} append {PER_SECOND} {seconds}", 20 * seconds + 30)["sent"]
    answer = load.ask(f"until {sent} 30", 40)
    if answer["count"] != sent or answer["lost"]:
        raise load.failed(f"{sent} events were emitted, {answer}")
    load.ask("arm", 30)
    return float(answer["p99"]) / 1e3


def run(size: Size) -> list[Row]:
    """All rows. Raises `BenchmarkError`."""
    found = [attempt(measure, size) for _ in range(size.repetitions)]

    def row(key: str, figure: str, unit: str, at_most: float | None = None, at_least: float | None = None) -> Row:
        values = [each[key] for each in found]
        return Row(figure=figure, unit=unit, values=values, at_most=at_most, at_least=at_least)

    return [
        row("rate", "highest rate of starts that is answered as fast as it comes", "per second"),
        row("delivered", "at twice that rate: p99 of events to devices, from the append", "ms", at_most=250),
        row("due", "… and from when the event was due", "ms"),
        row("overloaded", "… starts refused with `503 overloaded`", "%", at_least=1),
        row("others", "… starts that failed in another way", "%", at_most=0),
    ]
