"""What an append costs in the durable log, beside the log in memory.

    python benchmarks/durable_log.py [folder]

Each log takes appends from one writer, then from fifty at once, each in a generation of its own of eight events of some
500 bytes. The logs take turns, five times. Printed are the medians over the turns: percentiles of one append in
milliseconds, appends per second, and by how much the event loop was late for something due every 5 ms. The file of the
durable log lies in the folder, else among the temporary files: most of what is measured is its disk's time for a sync.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from adapters.memory.log import MemoryLog
from adapters.sqlite.database import Database
from adapters.sqlite.log import SqliteLog
from adapters.system import SystemEntropy, now
from domain.events import Event, encode
from domain.ports.log import Append, EventLog, Start
from domain.requests import GenerationRequest

REPETITIONS: Final = 5
SECONDS: Final = 1.5
TICK: Final = 0.005
ENTROPY: Final = SystemEntropy()
REQUEST: Final = GenerationRequest(prompt="a red hat").model_dump_json().encode()


class Figures(NamedTuple):
    """Of one turn, or the medians of several. In milliseconds, but for the rate."""

    p50: float
    p99: float
    per_second: float
    late_p50: float
    late_p99: float


EVENT: Final = encode(
    Event(
        generation_id=f"edit_1_{ENTROPY.token()}",
        kind="edit",
        sequence=4,
        status="openai_editing",
        message="OpenAI image editing started...",
        progress=60,
        occurred_at="2026-11-22T17:30:00.123Z",
        composition_url=f"http://localhost:3000/images/{'x' * 80}",
        preview_url=f"http://localhost:3000/images/{'x' * 80}",
    )
)


def appends(user_id: str) -> Iterator[Append]:
    """One generation, as a user's edit appends it."""
    generation_id, at = f"edit_1_{ENTROPY.token()}", now()
    start = Start("edit", REQUEST, generation_id, "same", 1_000)
    for sequence in range(1, 9):
        event_id = ENTROPY.event_id()
        if sequence == 1:
            name = "generation_started"
            yield Append(user_id, generation_id, 1, event_id, EVENT, name, at, credit=-1, start=start)
        elif sequence == 8:
            name = "generation_completed"
            yield Append(user_id, generation_id, 8, event_id, EVENT, name, at, credit=0, terminal=True)
        else:
            yield Append(user_id, generation_id, sequence, event_id, EVENT, "continue", at)


async def write(log: EventLog, user_id: str, end: float, taken: list[float]) -> None:
    """One writer, until the end."""
    while True:
        for append in appends(user_id):
            before = time.perf_counter()
            if before > end:
                return
            await log.append(append)
            taken.append(time.perf_counter() - before)
            await asyncio.sleep(0)


async def tick(late: list[float]) -> None:
    """Something that is due at equal times."""
    while True:
        due = time.perf_counter() + TICK
        await asyncio.sleep(TICK)
        late.append(time.perf_counter() - due)


async def turn(log: EventLog, writers: int) -> Figures:
    """So many writers on one log."""
    taken: list[float] = []
    late: list[float] = []
    ticking = asyncio.create_task(tick(late))
    begin = time.perf_counter()
    await asyncio.gather(*(write(log, f"user {n}", begin + SECONDS, taken) for n in range(writers)))
    elapsed = time.perf_counter() - begin
    ticking.cancel()
    return Figures(*percentiles(taken), len(taken) / elapsed, *percentiles(late))


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return cuts[49] * 1e3, cuts[98] * 1e3


async def measure(folder: Path) -> None:
    """Prints the table."""
    database = Database(folder / "log.db", epoch="benchmark")
    logs: dict[str, EventLog] = {
        "memory": MemoryLog(epoch="benchmark", credits=10**9, clock=now),
        "sqlite": SqliteLog(database, credits=10**9, clock=now),
    }
    turns: dict[tuple[int, str], list[Figures]] = {}
    for _ in range(REPETITIONS):
        for writers in (1, 50):
            for name, log in logs.items():
                turns.setdefault((writers, name), []).append(await turn(log, writers))
    await database.close()
    medians = {key: Figures(*map(statistics.median, zip(*each, strict=True))) for key, each in turns.items()}
    print("writers  log       p50 ms    p99 ms  appends/s   loop late p50   p99 ms")
    for (writers, name), row in medians.items():
        print(
            f"{writers:7}  {name:6} {row.p50:9.3f} {row.p99:9.3f} {row.per_second:10,.0f}"
            f" {row.late_p50:15.3f} {row.late_p99:8.3f}"
        )
    for writers in (1, 50):
        ratios = paired(turns[writers, "sqlite"], turns[writers, "memory"], lambda row: row.per_second)
        print(f"appends/s of sqlite by those of memory, {writers} writers, median of the turns' ratios: {ratios:.4f}")
    group = paired(turns[50, "sqlite"], turns[1, "sqlite"], lambda row: row.per_second)
    print(f"appends/s of sqlite with 50 writers by those with one: {group:.1f}")


def paired(ones: list[Figures], others: list[Figures], figure: Callable[[Figures], float]) -> float:
    """The median ratio of what was measured next to each other."""
    return statistics.median(figure(one) / figure(other) for one, other in zip(ones, others, strict=True))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        asyncio.run(measure(Path(folder)))
