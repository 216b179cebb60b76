"""The cases of the reliability promises that need real sockets: what is done, what is expected, and the figures.

Each case is an async function in the registry `CASES`, in two sizes: the quick one belongs to the test suite, the long
one to ``benchmarks/reliability.py``. A case tells its figures to its `Trial`, raises where the promise is broken, and
ends with the invariants. To add one, write the function below `@case`; sizes are its keyword arguments.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from support.case_server import HostProcess, ServedService
from support.processes import allow_sockets
from support.wire import JSON, Wire, hang_up

Size = Literal["quick", "long"]
Run = Callable[..., Awaitable[None]]

SECRET: Final = "a secret that is long enough for HS256"


# --- the registry ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    number: int
    #: What is done, with the sizes in braces, and what is expected.
    does: str
    expects: str
    run: Run
    sizes: Mapping[Size, Mapping[str, Any]]
    #: It measures what earlier cases in the same process would blur.
    alone: bool


class Outcome(NamedTuple):
    case: Case
    does: str
    figures: Mapping[str, str]
    #: What is not as expected.
    failures: Sequence[str]


CASES: Final[dict[int, Case]] = {}


def case(
    number: int, does: str, expects: str, *, quick: Mapping[str, Any], long: Mapping[str, Any], alone: bool = False
) -> Callable[[Run], Run]:
    """Register the function as this case."""

    def register(run: Run) -> Run:
        assert number not in CASES
        CASES[number] = Case(number, does, expects, run, {"quick": quick, "long": long}, alone)
        return run

    return register


@dataclass
class Trial:
    """One case being tried."""

    process: HostProcess
    folder: Path
    #: Whether times are judged, or only reported.
    timed: bool
    figures: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @asynccontextmanager
    async def serve(
        self, *, sockets: int = 100, inside: JSON | None = None, **settings: Any
    ) -> AsyncIterator[ServedService]:
        """A service for this case, with so many sockets at once. In the end nothing may be left of them."""
        allow_sockets(2 * sockets)
        settings = {"credits": 1_000_000, "starts_per_minute": "off", "max_lag_ms": "off", **settings}
        async with self.process.serve(self.images, inside=inside, **settings) as served:
            yield served
            self.report("tables empty after", await seconds_of(served.until(lambda figures: figures.idle)), "s")
        self.check_logged(self.process)

    def check_logged(self, process: HostProcess) -> None:
        """I9, of what the service has logged."""
        for line in process.logged:
            assert not any(word in line for word in ("Traceback", "ERROR", SECRET, str(self.folder))), line

    def report(self, name: str, value: float | str, unit: str = "") -> None:
        """Keep a figure."""
        text = value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else _short(value)
        self.figures[name] = f"{text} {unit}".strip()

    def at_most(self, name: str, value: float, most: float, unit: str = "", *, time: bool = False) -> None:
        """Keep a figure that must not be larger. What depends on `time` is judged only where times are."""
        self.report(name, value, unit)
        if value > most and (self.timed or not time):
            self.failures.append(f"{name}: {self.figures[name]}, more than {most:g}")


async def attempt(each: Case, size: Size, folder: Path, process: HostProcess | None = None) -> Outcome:
    """Try a case, in this process where one is given and the case does not want one of its own."""
    if process is None or each.alone:
        async with HostProcess.start() as process:
            return await _attempt(each, size, folder, process)
    return await _attempt(each, size, folder, process)


async def _attempt(each: Case, size: Size, folder: Path, process: HostProcess) -> Outcome:
    trial = Trial(process, folder, size == "long")
    try:
        await each.run(trial, **each.sizes[size])
    except Exception as error:
        trial.failures.append(f"{type(error).__name__}: {error}")
    return Outcome(each, each.does.format(**each.sizes[size]), trial.figures, trial.failures)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


async def seconds_of(doing: Awaitable[Any]) -> float:
    began = time.monotonic()
    await doing
    return time.monotonic() - began


# --- what several cases do ---------------------------------------------------------------------------------


async def check(served: ServedService, wires: Iterable[Wire]) -> None:
    """The invariants. These sockets are aborted on the way; no others may be left.

    I4 and I5, for each socket whose user had generations: it was sent the last event there is, and of each generation
    the events that the log has, in order, without gaps and duplicates, up to the end. Then I1 to I3, I6 and I8.
    """
    wires = list(wires)
    last = {user: generation_id for generation_id, user in served.owners.items()}
    histories = dict[str, list[JSON]]()
    for wire in wires:
        assert not wire.disconnected_by_server, "a DISCONNECT was sent"
        if wire.user not in last:
            assert wire.received == [], "was sent what belongs to another user"
            continue
        await wire.until_end_of(last[wire.user])
        events = dict[str, list[JSON]]()
        for event in wire.events:
            events.setdefault(event["generationId"], []).append(event)
        for generation_id, got in events.items():
            if generation_id not in histories:
                assert served.owners[generation_id] == wire.user, "was sent what belongs to another user"
                histories[generation_id] = await served.events(generation_id, wire.user)
            assert got == histories[generation_id][got[0]["sequence"] - 1 :], "was sent another history"
    await hang_up(wires)
    await served.check(*last)


async def caught_up(wires: Iterable[Wire], count: int) -> None:
    """Wait until each of them was sent so many events."""
    for wire in wires:
        await wire.until_received(count)


@asynccontextmanager
async def flowing(served: ServedService, *users: str, rate: float, count: int = 10) -> AsyncIterator[None]:
    """Meanwhile each of these users has one generation after the other, of so many events, `rate` a second."""
    over = asyncio.Event()

    async def flow(user: str) -> None:
        while not over.is_set():
            await served.flood(user, count, filler=200, rate=rate)

    flows = [asyncio.create_task(flow(user)) for user in users]
    try:
        yield
        over.set()
        await asyncio.gather(*flows)
    finally:
        for each in flows:
            each.cancel()
