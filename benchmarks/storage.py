"""The logs: memory per event, and appends per second of the log in a file beside the bare rows."""

import sys
from typing import Any

from benchmarks.measuring import Process, Row, Size, alternating, attempt, cores

EVENTS = 50_000
SECONDS = 3.0


def stored(what: str, amount: float) -> dict[str, Any]:
    """Run one measurement on both cores. Raises `BenchmarkError`."""
    command = [sys.executable, "-m", "benchmarks.servers.stored", what, str(amount)]
    with Process(command, cores()) as process:
        return process.answer(120)


def run(size: Size) -> list[Row]:
    """All rows. Raises `BenchmarkError`."""
    memory: list[dict[str, float]] = []
    per_second: dict[str, list[float]] = {"sqlite": [], "rows": []}
    for _, turns in alternating(tuple(per_second), size):
        memory.append(attempt(stored, "memory", size.count(EVENTS)))
        for what in turns:
            found = attempt(stored, what, size.seconds(SECONDS))
            per_second[what].append(found["per_second"])
    return [
        Row(
            figure="memory per logged event",
            unit="bytes",
            values=[each["memory"] for each in memory],
            peer="its JSON",
            peer_values=[each["json"] for each in memory],
            at_most=1.5,
        ),
        Row(
            figure="appends/s of the SQLite log, 128 writers",
            unit="per second",
            values=per_second["sqlite"],
            peer="bare rows",
            peer_values=per_second["rows"],
            at_least=0.5,
        ),
    ]
