"""The cases of the reliability promises that need real sockets: what is done, what is expected, and the figures.

Each case is an async function in the registry `CASES`, in two sizes: the quick one belongs to the test suite, the long
one to ``benchmarks/reliability.py``. A case tells its figures to its `Trial`, raises where the promise is broken, and
ends with the invariants. To add one, write the function below `@case`; sizes are its keyword arguments.
"""

import asyncio
import contextlib
import json
import math
import os
import random
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from support.case_server import Process, Served
from support.faults import JSON, Fault, Kind, Proxy, Refused, Way, Wire, allow_sockets, frame, hang_up, parse, together
from support.node import Browser, browsers

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

    process: Process
    folder: Path
    #: Whether times are judged, or only told.
    timed: bool
    figures: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @asynccontextmanager
    async def serve(self, *, sockets: int = 100, inside: JSON | None = None, **settings: Any) -> AsyncIterator[Served]:
        """A service for this case, with so many sockets at once. In the end nothing may be left of them."""
        allow_sockets(2 * sockets)
        settings = {"credits": 1_000_000, "starts_per_minute": "off", "max_lag_ms": "off", **settings}
        async with self.process.serve(self.images, inside=inside, **settings) as served:
            yield served
            self.tell("tables empty after", await _took(served.until(lambda figures: figures.idle)), "s")
        self.check_logged(self.process)

    def check_logged(self, process: Process) -> None:
        """I9, of what the service has logged."""
        for line in process.logged:
            assert not any(word in line for word in ("Traceback", "ERROR", SECRET, str(self.folder))), line

    def tell(self, name: str, value: float | str, unit: str = "") -> None:
        """Keep a figure."""
        text = value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else _short(value)
        self.figures[name] = f"{text} {unit}".strip()

    def at_most(self, name: str, value: float, most: float, unit: str = "", *, time: bool = False) -> None:
        """Keep a figure that must not be larger. What depends on `time` is judged only where times are."""
        self.tell(name, value, unit)
        if value > most and (self.timed or not time):
            self.failures.append(f"{name}: {self.figures[name]}, more than {most:g}")


async def attempt(each: Case, size: Size, folder: Path, process: Process | None = None) -> Outcome:
    """Try a case, in this process where one is given and the case does not want one of its own."""
    if process is None or each.alone:
        async with Process.start() as process:
            return await _attempt(each, size, folder, process)
    return await _attempt(each, size, folder, process)


async def _attempt(each: Case, size: Size, folder: Path, process: Process) -> Outcome:
    trial = Trial(process, folder, size == "long")
    try:
        await each.run(trial, **each.sizes[size])
    except Exception as error:
        trial.failures.append(f"{type(error).__name__}: {error}")
    return Outcome(each, each.does.format(**each.sizes[size]), trial.figures, trial.failures)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


async def _took(doing: Awaitable[Any]) -> float:
    began = time.monotonic()
    await doing
    return time.monotonic() - began


# --- what several cases do ---------------------------------------------------------------------------------


async def check(served: Served, wires: Iterable[Wire]) -> None:
    """The invariants. These sockets are aborted on the way; no others may be left.

    I4 and I5, of each socket whose user had generations: it is told the last event there is; of every generation
    that it was told of, it was told what the log has, in order, without a gap, nothing twice, and to the end. Then,
    inside, I1 to I3, I6 and I8.
    """
    wires = list(wires)
    last = {user: generation_id for generation_id, user in served.owners.items()}
    histories = dict[str, list[JSON]]()
    for wire in wires:
        assert not wire.sent_away, "a DISCONNECT was sent"
        if wire.user not in last:
            assert wire.told == [], "was told of somebody else"
            continue
        await wire.until_end_of(last[wire.user])
        events = dict[str, list[JSON]]()
        for event in wire.events:
            events.setdefault(event["generationId"], []).append(event)
        for generation_id, got in events.items():
            if generation_id not in histories:
                assert served.owners[generation_id] == wire.user, "was told of somebody else"
                histories[generation_id] = await served.events(generation_id, wire.user)
            assert got == histories[generation_id][got[0]["sequence"] - 1 :], "was told another history"
    await hang_up(wires)
    await served.check(*last)


async def caught_up(wires: Iterable[Wire], count: int) -> None:
    """Wait until each of them was told so many events."""
    for wire in wires:
        await wire.until_told(count)


@asynccontextmanager
async def flowing(served: Served, *users: str, rate: float, count: int = 10) -> AsyncIterator[None]:
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


def files_in(folder: Path) -> list[Path]:
    """All files in it and below, while others may come and go. The mark of an image folder does not count."""
    return [Path(path, name) for path, _, names in os.walk(folder) for name in names if name != ".stagecast"]


def free_port() -> int:
    """One that nobody is given by chance while the service is dead."""
    while True:
        port = random.randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


# --- the cases ---------------------------------------------------------------------------------------------

_WAYS: Final = {"websocket": ["websocket"], "upgrade": ["polling", "websocket"], "polling": ["polling"]}


@case(
    8,
    "{clients} official clients of each transport and {wires} bare sockets behind a proxy: RST, close, half-open, "
    "stall, jitter, and cuts after n bytes both ways, {cuts} of each",
    "each client's events equal the log, each return is a recovery; noticed within ping times + 1 s",
    quick={"clients": 1, "wires": 20, "cuts": 2, "ping": (0.4, 0.8), "pause": 0.2, "count": 30},
    long={"clients": 4, "wires": 300, "cuts": 60, "ping": (25, 20), "pause": 3, "count": 200},
)
async def faults_between_client_and_server(
    trial: Trial, clients: int, wires: int, cuts: int, ping: tuple[float, float], pause: float, count: int
) -> None:
    async with (
        trial.serve(sockets=wires, inside={"ping": ping}) as served,
        browsers() as everybody,
        Proxy.open(served.port) as proxy,
        Proxy.open(served.port) as silent,
    ):
        witness = await served.wire("ada")
        beginning = witness.notices[0][1]["cursor"]
        proxy.plan.extend(Fault("reset", way, after) for way in _DIRECTIONS for after in (1, 90, 300))
        proxy.jitter = 0.01
        # Nothing of ours ends its wait for a handshake that got stuck, which is 20 s unless told otherwise.
        official = [
            everybody.open(proxy.url, transports=way, auth={"userId": "ada"}, timeout=2_000)
            for way in _WAYS.values()
            for _ in range(clients)
        ]
        async with flowing(served, "ada", rate=60, count=count):
            for client in official:
                await client.connected()
            await _cut(proxy, official, cuts)
            proxy.strike("stall")
            await asyncio.sleep(pause)
            proxy.resume()
            await _told_more(official)
            proxy.strike("half_open")
            noticed = await _half_open(served, silent, wires, ping[0])
            await _told_more(official)
        feed = await served.feed("ada", beginning)
        for client in official:
            await _until_last(client, feed[-1])
            got = [event for _, event in client.events]
            assert got == feed[len(feed) - len(got) :], "a client's events are not the log's"
            assert all(_recoveries(client)), "a client that came back was not recovered"
        await everybody.forget_all()
        trial.tell("faults", proxy.struck + silent.struck)
        trial.tell("events to each client", len(feed))
        trial.tell("recoveries", sum(len(_recoveries(client)) for client in official))
        trial.tell("ping interval and timeout", f"{ping[0]:g} + {ping[1]:g} s")
        trial.at_most("half-open noticed after", noticed, sum(ping) + 1, "s", time=True)
        await check(served, [await _knows_all(served, witness)])


_DIRECTIONS: Final[tuple[Way, Way]] = ("up", "down")
#: How, in which direction, and after how many bytes, at least and at most. The client does not notice that a line
#: was closed right behind the answer to its upgrade.
_CUTS: Final[tuple[tuple[Kind, Way, int, int], ...]] = (
    *(("reset", "up", 0, 900), ("reset", "down", 0, 4_000)),
    *(("close", "up", 0, 900), ("close", "down", 700, 4_000)),
)


async def _cut(proxy: Proxy, clients: Sequence[Browser], cuts: int) -> None:
    """Cut their lines, and those that they come back by, after so many bytes: in handshakes, upgrades, frames."""
    chance = random.Random(8)
    for kind, way, least, most in _CUTS:
        proxy.plan.extend(Fault(kind, way, chance.randrange(least, most)) for _ in range(cuts))
        proxy.strike(kind)
        async with asyncio.timeout(120):
            while proxy.plan:
                await asyncio.sleep(0.01)
        await _told_more(clients)


async def _half_open(served: Served, proxy: Proxy, count: int, interval: float) -> float:
    """Let nothing pass any more on the lines of so many sockets, and nobody know.

    After how many seconds the server has noticed all.
    """
    wires, there = list[Wire](), set[str]()
    # Whoever did not answer a ping in time, since this process was not given any, is gone already.
    while not there:
        for number in range(count):
            # One after the other, so that at any time some have just answered a ping.
            await asyncio.sleep(interval / count)
            with contextlib.suppress(ConnectionResetError):
                wires.append(await served.wire("ada" if number % 2 else f"user-{number}", port=proxy.port))
        there = {wire.sid for wire in wires} & await served.sids()
    began = time.monotonic()
    proxy.strike("half_open")
    async with asyncio.timeout(120):
        while there & await served.sids():
            await asyncio.sleep(0.02)
    noticed = time.monotonic() - began
    await hang_up(wires)
    return noticed


async def _knows_all(served: Served, wire: Wire) -> Wire:
    """The device, once it was told everything. It comes back where it did not answer a ping in time."""
    last = [generation_id for generation_id, user in served.owners.items() if user == wire.user][-1]
    while True:
        try:
            await wire.until_end_of(last)
        except ConnectionResetError:
            with contextlib.suppress(ConnectionResetError):
                wire = await served.again(wire)
        else:
            return wire


async def _told_more(clients: Sequence[Browser]) -> None:
    """Wait until each of them is told something that comes from now on, or nearly so."""
    counts = [len(client.events) for client in clients]
    async with asyncio.timeout(120):
        for client, count in zip(clients, counts, strict=True):
            while len(client.events) < count + 3:
                await asyncio.sleep(0.01)


async def _until_last(client: Browser, event: JSON) -> None:
    await client.until(lambda: client.events[-1][1] == event)


def _recoveries(client: Browser) -> list[bool]:
    """Of each connection after the first event, whether it was recovered."""
    first = next(n for n, line in enumerate(client.lines) if line["on"] == "event" and line["name"] == "continue")
    return [line["recovered"] for line in client.lines[first:] if line["on"] == "connect"]


@case(
    9,
    "{readers} readers stop reading while 200 events/s flow to {sockets} healthy sockets, {rounds} times",
    "cut within 7 s, memory at most +50 MB, the others' p99 within 20 %",
    quick={"readers": 4, "sockets": 50, "rounds": 1, "seconds": 0.9, "stall": 0.8},
    long={"readers": 20, "sockets": 500, "rounds": 5, "seconds": 8, "stall": 5},
)
async def stalled_readers(trial: Trial, readers: int, sockets: int, rounds: int, seconds: float, stall: float) -> None:
    others = [f"user-{number}" for number in range(min(49, sockets // 2))]
    async with trial.serve(sockets=sockets + readers) as served:
        # Some of the healthy are devices of the same user: they get all that the stalled ones do not take.
        crowd = await together(lambda n: served.wire("hog" if n % 50 == 0 else others[n % len(others)]), sockets)
        p99: dict[str, list[float]] = {"reading": [], "stalled": []}
        cut_after, grown = list[float](), list[float]()
        for _ in range(rounds):
            hogs = await together(lambda _: served.wire("hog", narrow=True), readers)
            looking = asyncio.create_task(served.until(lambda _: False))  # As below, so that both cost the same.
            p99["reading"].append(await _p99(served, crowd, others, seconds))
            looking.cancel()
            await caught_up(hogs, int(_HOG * seconds))
            await hang_up(hogs)
            before = await served.figures(afresh=True)
            # New ones: for somebody who has read well the kernel buffers more and more.
            hogs = await together(lambda _: served.wire("hog", narrow=True), readers)
            await served.stall(stall)
            for hog in hogs:
                hog.transport.pause_reading()
            cutting = asyncio.create_task(_took(served.until(lambda now: now.devices == sockets)))
            p99["stalled"].append(await _p99(served, crowd, others, seconds))
            cut_after.append(await cutting)
            grown.append(((await served.figures()).peak - before.rss) / 1_000)
            await hang_up(hogs)
            await served.stall()
        reading, stalled = (statistics.median(values) for values in p99.values())
        trial.at_most("cut after", max(cut_after), 7, "s", time=True)
        trial.at_most("memory", max(grown), 50, "MB")
        trial.tell("p99 while they read", reading, "ms")
        trial.tell("p99 while they do not", stalled, "ms")
        trial.at_most("ratio of the p99", stalled / reading, 1.2, time=True)
        await check(served, crowd)


#: Events a second, of 8 kB, of the user whose readers stall; and of all others together.
_HOG: Final = 150
_OTHERS: Final = 50


async def _p99(served: Served, crowd: Sequence[Wire], others: Sequence[str], seconds: float) -> float:
    """Have events flow for so long. The 99th percentile of what they take to all these sockets, in milliseconds."""
    before = [len(wire.told) for wire in crowd]
    each, hogs = max(2, int(_OTHERS * seconds / len(others))), int(_HOG * seconds)
    floods = await asyncio.gather(
        served.flood("hog", hogs, filler=8_000, rate=_HOG),
        *(served.flood(user, each, filler=200, rate=each / seconds) for user in others),
    )
    began, latencies = dict(floods), list[float]()
    for wire, count in zip(crowd, before, strict=True):
        await wire.until_told(count + (hogs if wire.user == "hog" else each))
        for told in wire.told[count:]:
            event = parse(told.text)[1]
            latencies.append((told.at - began[event["generationId"]][event["sequence"] - 1]) / 1e6)
    return statistics.quantiles(latencies, n=100)[98]


@case(
    10,
    "{sockets} idle authenticated sockets for {seconds} s; {comers} come and go beside a quarter, and all, of them",
    "at most 60 kB each, none dropped; what one costs does not grow with the number of others",
    quick={"sockets": 200, "seconds": 0.5, "comers": 20, "rounds": 2},
    long={"sockets": 3_000, "seconds": 120, "comers": 300, "rounds": 5},
    alone=True,
)
async def idle_sockets(trial: Trial, sockets: int, seconds: float, comers: int, rounds: int) -> None:
    async with trial.serve(sockets=sockets + comers) as served:
        await _come_and_go(served, comers, 1)  # What is made once is no cost of a socket.
        wires, costs = list[Wire](), list[tuple[float, float]]()
        before = await served.figures(afresh=True)
        for crowd in (sockets // 4, sockets):
            # Half of them are devices of one user, who is also the comers'.
            wires += await together(lambda n: served.wire("ada" if n % 2 else f"user-{n}"), crowd - len(wires))
            costs.append(await _come_and_go(served, comers, rounds))
        after = await served.figures(afresh=True)
        trial.at_most("memory each", (after.rss - before.rss) / sockets, 60, "kB")
        for name, few, many in zip(("connect", "disconnect"), *costs, strict=True):
            trial.tell(f"CPU per {name}", f"{few:,.0f} µs at {sockets // 4:,}, {many:,.0f} at {sockets:,}")
            trial.at_most(f"ratio per {name}", many / few, 1.5, time=True)
        _, staying = await asyncio.wait([asyncio.create_task(wire.gone.wait()) for wire in wires], timeout=seconds)
        trial.at_most("dropped", sockets - len(staying), 0)
        figures = await served.figures()
        assert figures.sockets == figures.devices == sockets
        trial.tell("lag of the event loop", figures.lag * 1_000, "ms")
        await check(served, wires)
        await asyncio.wait(staying)


async def _come_and_go(served: Served, comers: int, rounds: int) -> tuple[float, float]:
    """The server's CPU time per connect and per disconnect, in microseconds: of the best of these rounds."""
    there = (await served.figures()).sockets
    connect, disconnect = list[float](), list[float]()
    for _ in range(rounds):
        before = await served.figures()
        wires = await together(lambda _: served.wire("ada"), comers)
        between = await served.figures()
        await hang_up(wires)
        after = await served.until(lambda figures: figures.sockets == figures.devices == there)
        connect.append((between.cpu - before.cpu) / comers * 1e6)
        disconnect.append((after.cpu - between.cpu) / comers * 1e6)
    return min(connect), min(disconnect)


@case(
    11,
    "{sockets} sockets are aborted at once and come back at once while their users' generations go on, {rounds} times",
    "all caught up within 5 s; memory of the last round at most 1.1 × that of the second; tables empty",
    quick={"sockets": 100, "users": 10, "rounds": 3},
    long={"sockets": 1_000, "users": 100, "rounds": 5},
)
async def reconnect_storms(trial: Trial, sockets: int, users: int, rounds: int) -> None:
    per_round = 6
    async with trial.serve(sockets=sockets) as served:
        wires = await together(lambda n: served.wire(f"user-{n % users}"), sockets)
        took, memory, cpu = list[float](), list[float](), [(await served.figures()).cpu]
        for number in range(1, rounds + 1):
            began = time.monotonic()
            for wire in wires:
                wire.abort()
            floods = asyncio.gather(*(served.flood(f"user-{n}", per_round) for n in range(users)))
            wires = await asyncio.gather(*map(served.again, wires))
            await floods
            await caught_up(wires, per_round * number)
            took.append(time.monotonic() - began)
            cpu.append((await served.until(lambda figures: figures.sockets == figures.devices == sockets)).cpu)
            memory.append((await served.figures(afresh=True)).rss / 1_000)
        assert all(len(wire.told) == per_round * rounds for wire in wires)
        trial.at_most("all caught up after", max(took), 5, "s", time=True)
        trial.tell("the server's CPU time for it", max(b - a for a, b in pairwise(cpu)), "s")
        trial.tell("memory of each round", " ".join(f"{each:.0f}" for each in memory) + " MB")
        trial.at_most("last / second", memory[-1] / memory[1], 1.1)
        await check(served, wires)


@case(
    12,
    "{each} sockets that never send CONNECT, {each} that never authenticate, {each} that poll once and never again",
    "all closed within 20 s; health answers throughout",
    quick={"each": 40, "auth_timeout": 1},
    long={"each": 1_000, "auth_timeout": 15},
)
async def loiterers(trial: Trial, each: int, auth_timeout: float) -> None:
    async with trial.serve(sockets=3 * each, inside={"auth_timeout": auth_timeout}) as served:
        stays, answers, door, opened = list[float](), list[float](), asyncio.Semaphore(50), 0.0

        async def open_in_time(*, connect: bool) -> Wire:
            """One whose CONNECT comes well before the timeout ends, also where everybody is slow."""
            while True:
                began = time.monotonic()
                with contextlib.suppress(ConnectionResetError):
                    wire = await Wire.open(served.port)
                    if not connect:
                        return wire
                    await wire.connect()
                    if time.monotonic() < began + auth_timeout / 2:
                        return wire
                    await hang_up([wire])

        async def stay(number: int) -> None:
            nonlocal opened
            async with door:
                began = opened = time.monotonic()
                if number % 3 == 2:
                    opening = await served.http.get("/socket.io/?EIO=4&transport=polling")
                    assert opening.status_code == 200
                    return
                wire = await open_in_time(connect=bool(number % 3))
            await wire.until_gone()
            stays.append(time.monotonic() - began)
            assert wire.notices == [("authentication_required", {"code": "unauthenticated"})] * (number % 3)
            assert not wire.sent_away

        async def ask() -> None:
            while True:
                for path in ("/health/live", "/health/ready"):
                    began = time.monotonic()
                    assert (await served.http.get(path)).status_code == 200
                    answers.append((time.monotonic() - began) * 1_000)
                await asyncio.sleep(0.05)

        asking = asyncio.create_task(ask())
        await together(stay, 3 * each, at_once=3 * each)
        await served.until(lambda figures: figures.sockets == 0)
        trial.at_most("all gone after the last came", time.monotonic() - opened, 20, "s", time=True)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled(), "health did not answer"
        trial.tell("auth_timeout", auth_timeout, "s")
        trial.at_most("longest stay", max(stays), 20, "s", time=True)
        trial.tell("health answers", len(answers))
        trial.tell("slowest of them", max(answers), "ms")
        await check(served, [])


@case(
    13,
    "{sockets} sockets authenticate as A, then B, and the other way round, waiting for the acks or not; of {tokens} "
    "tokens half expire and half are renewed in time",
    "only the last user's events; closed at exp, and nothing is missed with a fresh token",
    quick={"sockets": 16, "tokens": 12},
    long={"sockets": 400, "tokens": 400},
)
async def changes_of_identity(trial: Trial, sockets: int, tokens: int) -> None:
    async with trial.serve(sockets=sockets) as served:
        async with flowing(served, "ada", "bob", rate=60, count=40):
            wires = await together(lambda number: _change(served, number), sockets)
        trial.tell("sockets of A and B", len(wires))
        await check(served, wires)
    async with trial.serve(sockets=tokens, jwt_secret=SECRET) as served:
        async with flowing(served, "ada", rate=20):
            ends = await together(lambda number: _expire(served, number), tokens, at_once=tokens)
        late = [seconds for _, seconds in ends if seconds is not None]
        assert min(late) > -0.05, "closed before its time"
        trial.tell("tokens that expired", len(late))
        trial.at_most("closed after exp, at the latest", max(late), 1, "s", time=True)
        await check(served, [wire for wire, _ in ends])


async def _change(served: Served, number: int) -> Wire:
    """A socket that is of A or B first, waits or does not, and changes once or again and again."""
    users = ["ada", "bob"] * (3 if number & 4 else 1)
    users = users if number & 1 else users[::-1]
    wire = await Wire.open(served.port)
    await wire.connect()
    for user in users:
        asked = wire.ask("authenticate", {"userId": user})
        if number & 2:
            await wire.until_asked(asked)
            await wire.until_told(wire.marks[asked] + 1)
    await wire.until_asked(len(users))
    wire.user = users[-1]
    await wire.until_told(wire.marks[len(users)] + 5)
    marks = [wire.marks[n] for n in range(1, len(users) + 1)]
    assert marks[0] == 0, "told something before it was anybody's"
    for user, start, end in zip(users, marks, [*marks[1:], len(wire.told)], strict=True):
        assert {served.owners[event["generationId"]] for event in wire.events[start:end]} <= {user}
    del wire.told[: marks[-1]]
    return wire


async def _expire(served: Served, number: int) -> tuple[Wire, float | None]:
    """A socket whose token has just been renewed, or has expired; how many seconds after that it was closed."""
    expired = ("authentication_expired", {"code": "token_expired"})
    renewed = number % 2 == 1
    while True:
        wire = await Wire.open(served.port)
        try:
            welcome = await wire.connect(token=served.token("ada", 0.8))
            if not renewed:
                break
            ack = await wire.call("authenticate", {"userId": "ada", "token": served.token("ada", 600)})
            assert (ack["ok"], ack["recovered"]) == (True, False)
            if expired not in wire.notices:
                await wire.until_told(1)
                return wire, None
        except Refused as refusal:
            if refusal.args[1] != "token_expired":
                raise
        except ConnectionResetError:
            assert expired in wire.notices, wire.notices
        # That was too late, on a machine that is slow: once more.
        await hang_up([wire])
    expires = datetime.fromisoformat(welcome["expiresAt"]).timestamp()
    await wire.until_gone()
    late = time.time() - expires
    assert wire.notices[1:] == [expired]
    assert not wire.sent_away
    other, offset = await Wire.open(served.port, told=wire.told), wire.offset
    again = await other.connect(token=served.token("ada", 600), **offset)
    assert again["recovered"] is ("offset" in offset), again
    await other.until_told(1)
    return other, late


#: What a client may be answered with where it does not get what it asks for.
_CODES: Final = {"unauthenticated", "invalid_token", "token_expired", "user_mismatch"} | {
    *("bad_request", "not_found", "unavailable")
}
_GOOD: Final = (
    '42{id}["authenticate",{"userId":"mallory"}]',
    '42{id}["authenticate",{"userId":"mallory","cursor":"7c6b789e7e26.1.1.1","recovery":false}]',
    '42{id}["subscribe_to_generation",{"generationId":"edit_1_0000000000000000","after":0}]',
)
_ODD: Final = (
    *("42[]", "42{}", "42", "42[7]", "42[", "40", "41", "43", "44{}", "45-", "48", "4", "", "x", "0{}", "1", "5", "6"),
    *('42{id}["connect",{}]', '42{id}["disconnect",1]', '42{id}["*",{}]', '42{id}["__proto__",{}]', "2probe"),
    *('42{id}["authenticate"]', '42{id}["authenticate",1,2,3]', '42{id}["authenticate",null]', '42{id}["",{}]'),
    *('42/admin,{id}["authenticate",{"userId":"ada"}]', "40/admin,", "41/admin,", "43/admin,7[]", "461-1[{}]"),
    *('451-["x",{"_placeholder":true,"num":0}]', '42{id}["message",{}]', '42{id}["authenticate",{"userId":[]}]'),
)
_LONG: Final = (
    *('42["authenticate",{"userId":' + "[" * 20_000, "42" + "[" * 30_000, '42["x",' + '{"a":' * 8_000),
    *('42{id}["authenticate",{"userId":"' + "a" * 60_000 + '"}]', "42" + "9" * 4_000 + '["x"]', "42" + "9" * 50_000),
)
_JUNK: Final = '[]{}",:0123456789-/eEtfn\\\x1e\x00é🎭 '


@case(
    14,
    "{frames} frames: reserved names, wrong arguments, other namespaces, deep JSON, and mutants of all; {large} of "
    "17 MB; {floods} floods of binary frames",
    "closed or a typed nack; memory at most +10 MB; tables empty, no path or traceback in any answer",
    quick={"frames": 250, "large": 4, "floods": 2},
    long={"frames": 10_000, "large": 40, "floods": 20},
)
async def frames_that_make_no_sense(trial: Trial, frames: int, large: int, floods: int) -> None:
    chance = random.Random(14)
    odd = [each.replace("{id}", "7") for each in _ODD + _LONG]
    odd += [_mutant(chance) for _ in range(frames - len(odd))]
    async with trial.serve() as served:
        neighbour = await served.wire("ada")
        await together(lambda _: _throw(served, _GOOD[0]), frames // 10, at_once=16)
        before = await served.figures(afresh=True)
        async with flowing(served, "ada", rate=50, count=max(10, frames // 100)):
            thrown = await together(lambda n: _throw(served, odd[n]), len(odd), at_once=16)
            await together(lambda n: _throw_large(served, n), large, at_once=4)
            await together(lambda _: _pour_binary(served), floods, at_once=4)
        after = await served.until(lambda figures: figures.devices == 1)
        nacks = 0
        for wire in thrown:
            assert not wire.sent_away
            told = repr((wire.acks, wire.refused, wire.notices))
            assert not any(word in told for word in ("Traceback", str(trial.folder), "/src/")), told
            for ack in wire.acks.values():
                nacks += ack["ok"] is not True
                assert ack["ok"] is True or (set(ack) == {"ok", "code", "message"} and ack["code"] in _CODES), ack
        trial.tell("sockets closed", sum(not wire.survived for wire in thrown))
        trial.tell("typed nacks", nacks)
        trial.at_most("memory", ((await served.figures(afresh=True)).rss - before.rss) / 1_000, 10, "MB")
        trial.at_most("memory at its peak", (after.peak - before.rss) / 1_000, 10, "MB")
        trial.tell("lag of the event loop", after.lag * 1_000, "ms")
        await check(served, [neighbour])


def _mutant(chance: random.Random) -> str:
    """A good frame, or an odd one, with something put in, left out or doubled."""
    text = chance.choice(_GOOD + _ODD).replace("{id}", str(chance.randrange(1_000)))
    for _ in range(chance.randint(1, 4)):
        at, end = sorted((chance.randrange(len(text) + 1), min(len(text), chance.randrange(len(text) + 8))))
        junk = "".join(chance.choices(_JUNK, k=chance.randrange(6)))
        text = chance.choice((text[:at] + junk + text[at:], text[:at] + text[end:], text[:end] + text[at:]))
    return text


async def _throw(served: Served, text: str) -> Wire:
    """Send a frame, as text or as binary, and then a good one: either that is answered, or the socket is closed."""
    wire = await served.wire("mallory")
    wire.send(text.encode() if len(text) % 20 == 7 else text, '42777777["authenticate",{"userId":"mallory"}]')
    with contextlib.suppress(ConnectionResetError):
        await wire.until_asked(777_777)
        wire.survived = True
    await hang_up([wire])
    return wire


async def _throw_large(served: Served, number: int) -> None:
    """17 MB: in one frame, text or binary, in many pieces, or in a polling request."""
    data = bytes(17_000_000)
    if number % 4 == 3:
        opening = await served.http.get("/socket.io/?EIO=4&transport=polling")
        sid = json.loads(opening.text[1:])["sid"]
        answer = await served.http.post(f"/socket.io/?EIO=4&transport=polling&sid={sid}", content=data)
        assert answer.status_code in (400, 413)
        assert len(answer.text) < 100, answer.text
        return
    wire = await served.wire("mallory")
    if number % 4 == 2:
        wire.write(frame(bytes(60_000), opcode=1, final=False), *[frame(bytes(60_000), opcode=0, final=False)] * 280)
    else:
        wire.write(frame(data, opcode=1 + number % 2))
    await wire.until_gone()


async def _pour_binary(served: Served) -> None:
    """Binary frames without end, announced as attachments."""
    wire = await served.wire("mallory")
    while not wire.gone.is_set():
        # No more than the line takes: what the server does not read would pile up in here.
        if wire.transport.get_write_buffer_size() < 1_000_000:
            wire.send('451-["authenticate",{"_placeholder":true,"num":0}]', *[bytes(60_000)] * 20)
        await asyncio.sleep(0.001)


@case(
    16,
    "from each of {events} cursors a socket attaches, and some without one, while the events flow",
    "no gap, no duplicate at the seam",
    quick={"events": 200, "rate": 250},
    long={"events": 1_000, "rate": 20},
)
async def attach_from_every_cursor(trial: Trial, events: int, rate: float) -> None:
    chance = random.Random(16)
    async with trial.serve(sockets=events) as served:
        reference = await served.wire("ada")
        beginning = reference.notices[0][1]["cursor"]

        async def flow() -> None:
            for _ in range(events // 10 - 1):
                await served.flood("ada", 10, filler=100, rate=rate)
            # Who comes without a cursor is told of what still runs or comes: it must not come after all of it.
            await asyncio.wait(comers[19::20])
            await served.flood("ada", 10, filler=100, rate=rate)

        async def attach(place: int) -> Wire:
            # Some come at the head, and some have a stretch to read first; all while more comes.
            await reference.until_told(min(place + chance.choice((0, 0, 1, 5, 40)), events - 10), 600)
            if place % 20 == 19:
                return await served.wire("ada")  # It wants what still runs, and what comes.
            wire = await served.wire("ada", cursor=reference.cursor_after(place) if place else beginning)
            assert wire.notices[0][1]["recovered"] is True
            return wire

        comers = [asyncio.create_task(attach(place)) for place in range(events - 10)]
        _, wires = await asyncio.gather(flow(), asyncio.gather(*comers))
        feed = await served.feed("ada", beginning)
        assert len(feed) == events
        for place, wire in enumerate([reference, *wires], -1):
            if place % 20 == 19:
                await wire.until_end_of(feed[-1]["generationId"])
                place = events - len(wire.told)
            await wire.until_told(events - max(place, 0))
            assert wire.events == feed[max(place, 0) :], f"a gap or a duplicate after the cursor at {place}"
        trial.tell("sockets", len(wires))
        trial.tell("events sent", sum(len(wire.told) for wire in wires))
        await check(served, [reference, *wires])


@case(
    23,
    "{rate} real generations a second for {seconds} s, kept {retention} s; meanwhile readers stop in mid-replay until "
    "what they replay is removed",
    "memory and disk flat; a replay has an honest end, never a hole",
    quick={"seconds": 2, "retention": 0.4, "rate": 4},
    long={"seconds": 240, "retention": 4, "rate": 4},
)
async def retention_under_load(trial: Trial, seconds: float, retention: float, rate: float) -> None:
    async with trial.serve(retention=retention, credits="off", max_per_user=1_000) as served:
        began = time.monotonic()
        samples, endings, started = list[tuple[float, int]](), list[str](), 0

        async def load() -> None:
            nonlocal started
            while time.monotonic() < began + seconds:
                await served.start(f"user-{started % 7}", ("edit", "generate")[started % 2])
                started += 1
                await asyncio.sleep(began + started / rate - time.monotonic())

        async def look() -> None:
            while time.monotonic() < began + seconds or len(samples) < 3:
                samples.append(((await served.figures()).rss / 1_000, len(files_in(trial.images))))
                await asyncio.sleep(seconds / 200)

        async def replay() -> None:
            while time.monotonic() < began + seconds or not set(endings) - {_TOO_LATE}:
                endings.append(await _replay_what_is_removed(served, f"reader-{len(endings)}"))

        await asyncio.gather(load(), look(), replay())
        await served.worked()
        async with asyncio.timeout(30 + 2 * retention):
            for user in set(served.owners.values()):
                while (await served.get("/generations", user))["generations"]:
                    await asyncio.sleep(0.05)
            while files_in(trial.images):
                await asyncio.sleep(0.05)
        third = len(samples) // 3
        parts = samples[third : 2 * third], samples[2 * third :]
        memory = [statistics.fmean(rss for rss, _ in part) for part in parts]
        files = [statistics.fmean(files for _, files in part) for part in parts]
        trial.tell("generations", started)
        trial.tell("memory, middle and last third", f"{memory[0]:.1f} and {memory[1]:.1f} MB")
        trial.at_most("last / middle", memory[1] / memory[0], 1.05, time=True)
        trial.tell("files, middle and last third", f"{files[0]:.1f} and {files[1]:.1f}")
        trial.at_most("last / middle of the files", files[1] / max(files[0], 1), 1.25, time=True)
        for ending in sorted(set(endings)):
            trial.tell(f"replays {ending}", endings.count(ending))
        await served.until(lambda figures: figures.idle)


#: How a replay ends that has not come to its middle.
_TOO_LATE: Final = "for which it was too late"


async def _replay_what_is_removed(served: Served, user: str) -> str:
    """Stop reading in the middle of a replay until retention has removed what is replayed. How it ended."""
    first = await served.wire(user)
    cursor = first.notices[0][1]["cursor"]
    await hang_up([first])
    generation_id, _ = await served.flood(user, 600, filler=2_000)
    wire = await served.wire(user, narrow=True, cursor=cursor)
    with contextlib.suppress(ConnectionResetError):
        await wire.until_told(20 if wire.notices[0][1]["recovered"] else 0)
    if len(wire.told) < 20:
        # On a machine that is slow. Nothing but the removal is an excuse.
        assert (await served.look(f"/generations/{generation_id}", user)).status_code == 404
        await hang_up([wire])
        return _TOO_LATE
    wire.transport.pause_reading()
    async with asyncio.timeout(60):
        while (await served.look(f"/generations/{generation_id}", user)).status_code != 404:
            await asyncio.sleep(0.05)
    wire.transport.resume_reading()
    with contextlib.suppress(ConnectionResetError):
        await wire.until_told(600)
    assert [event["sequence"] for event in wire.events] == list(range(1, len(wire.told) + 1)), "a hole"
    assert not wire.sent_away
    if len(wire.told) == 600:
        await hang_up([wire])
        return "read to the end"
    again = await served.wire(user, cursor=wire.cursor_after(len(wire.told)))
    assert again.notices[0][1]["recovered"] is False
    assert again.notices[0][1]["generations"] == []
    await hang_up([wire, again])
    return "told that the past is gone"


@case(
    24,
    "a socket that missed {events} events comes back and reads {pace} kB/s while more come; who takes nothing for "
    "{stall} s is cut",
    "recovered, everything once, never cut while it moves",
    quick={"events": 1_500, "pace": 2_000, "stall": 0.8},
    long={"events": 5_000, "pace": 300, "stall": 5},
)
async def slow_reader(trial: Trial, events: int, pace: float, stall: float) -> None:
    async with trial.serve() as served:
        first = await served.wire("ada")
        beginning = first.notices[0][1]["cursor"]
        await served.flood("ada", 5)
        await first.until_told(5)
        await hang_up([first])
        await served.until(lambda figures: figures.idle)
        for _ in range(10):
            await served.flood("ada", events // 10, filler=1_900)
        await served.stall(stall)
        before = await served.figures(afresh=True)
        began = time.monotonic()
        async with flowing(served, "ada", rate=10):
            slow = await _sip(served, first, pace, 5 + events, stall)
            took = time.monotonic() - began
        feed = await served.feed("ada", beginning)
        slow = await _sip(served, slow, pace, len(feed), stall)
        assert slow.events == feed
        trial.tell("events, each once", len(feed))
        trial.tell("read for", f"{took:.1f} s, {took / stall:.1f} × that time")
        trial.at_most("memory", ((await served.figures()).peak - before.rss) / 1_000, 10, "MB")
        await check(served, [slow])


async def _sip(served: Served, wire: Wire, pace: float, count: int, stall: float) -> Wire:
    """Read so many kB a second, a little at a time, until it was told so many events: this socket, or its successor.

    One that is gone comes back. While it reads, only that nothing was read for long, since this process was not given
    any time, is an excuse for cutting it.
    """
    longest, last = math.inf if wire.gone.is_set() else 0.0, time.monotonic()
    while len(wire.told) < count:
        if wire.gone.is_set():
            assert longest > stall / 2, "cut while it moved"
            longest, last = 0.0, time.monotonic()
            wire = await served.again(wire, narrow=True)
        taken = wire.taken
        wire.transport.resume_reading()
        while wire.taken == taken and not wire.gone.is_set():
            await asyncio.sleep(0.001)
        wire.transport.pause_reading()
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        await asyncio.sleep((wire.taken - taken) / pace / 1_000)
    wire.transport.resume_reading()
    return wire


@case(
    25,
    "{rounds} times the server is killed (SIGKILL) in the middle of {generations} generations, and another started on "
    "the same folder, with a log in memory",
    "every image that no event names is gone; every cursor and session says recovered: false",
    quick={"rounds": 1, "generations": 6},
    long={"rounds": 10, "generations": 16},
)
async def killed_with_a_log_in_memory(trial: Trial, rounds: int, generations: int) -> None:
    left, asked = list[int](), 0
    trial.images.mkdir()
    strangers = trial.images / "readme.txt"
    strangers.write_text("none of ours")
    for number in range(rounds):
        async with Process.start() as victim, victim.serve(trial.images, port=free_port()) as served:
            wires = [await served.wire("ada") for _ in range(3)]
            for _ in range(2):
                await asyncio.gather(*(served.start("ada") for _ in range(generations // 2)))
                await caught_up(wires, 6 * (generations // 2))
            await caught_up(wires, 6 * (generations // 2) + 1 + number % 6)  # Others are in the midst of it.
            await victim.kill()
            trial.check_logged(victim)
        left.append(len(files_in(trial.images)) - 1)
        assert left[-1] > 0, "there was nothing to be removed"
        async with trial.serve(port=served.port) as served:
            assert files_in(trial.images) == [strangers]
            returns = await _nothing_is_recovered(served, wires)
            asked += len(returns)
            generation_id = await served.start("ada")
            await caught_up(returns, 6)
            assert all({event["generationId"] for event in wire.events} == {generation_id} for wire in returns)
            await check(served, returns)
    trial.tell("images left by the killed", " ".join(map(str, left)))
    trial.tell("of those, left now", 0)
    trial.tell("cursors and sessions, none recovered", asked)


async def _nothing_is_recovered(served: Served, wires: Sequence[Wire]) -> list[Wire]:
    """The sockets that come back with every cursor and every session that these have had."""
    cursors = {wire.notices[0][1]["cursor"] for wire in wires}
    cursors |= {wire.cursor_after(place) for wire in wires for place in range(1, len(wire.told) + 1)}
    returns = []
    for cursor in cursors:
        page = await served.get(f"/events?after={cursor}", "ada")
        assert (page["recovered"], page["generations"]) == (False, [])
        returns.append(await served.wire("ada", cursor=cursor))
    for wire in wires:
        returns.append(await served.wire("ada", **wire.offset))
        assert returns[-1].pid != wire.pid
    assert not any(wire.notices[0][1]["recovered"] for wire in returns)
    return returns
