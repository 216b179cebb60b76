"""The cases of connections: faults, stalled readers, storms, and changes of identity."""

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Final

from reliability.cases import SECRET, Trial, case, caught_up, check, flowing, seconds_of
from support.case_server import ServedService
from support.node import Browser, browsers
from support.processes import together
from support.proxy import Fault, Kind, Proxy, Way
from support.wire import JSON, Refused, Wire, hang_up, parse

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
        trial.report("faults", proxy.struck + silent.struck)
        trial.report("events to each client", len(feed))
        trial.report("recoveries", sum(len(_recoveries(client)) for client in official))
        trial.report("ping interval and timeout", f"{ping[0]:g} + {ping[1]:g} s")
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


async def _half_open(served: ServedService, proxy: Proxy, count: int, interval: float) -> float:
    """Let nothing pass any more on the lines of so many sockets, and notify neither end.

    After how many seconds the server has noticed all.
    """
    wires, there = list[Wire](), set[str]()
    # Those that did not answer a ping in time, as this process got no CPU time, are gone already.
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


async def _knows_all(served: ServedService, wire: Wire) -> Wire:
    """The device, once it was sent everything. It comes back where it did not answer a ping in time."""
    last = [generation_id for generation_id, user in served.owners.items() if user == wire.user][-1]
    while True:
        try:
            await wire.until_end_of(last)
        except ConnectionResetError:
            with contextlib.suppress(ConnectionResetError):
                wire = await served.reconnect(wire)
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
            before = await served.figures(reset=True)
            # New ones: for somebody who has read well the kernel buffers more and more.
            hogs = await together(lambda _: served.wire("hog", narrow=True), readers)
            await served.stall(stall)
            for hog in hogs:
                hog.transport.pause_reading()
            cutting = asyncio.create_task(seconds_of(served.until(lambda now: now.devices == sockets)))
            p99["stalled"].append(await _p99(served, crowd, others, seconds))
            cut_after.append(await cutting)
            grown.append(((await served.figures()).peak - before.rss) / 1_000)
            await hang_up(hogs)
            await served.stall()
        reading, stalled = (statistics.median(values) for values in p99.values())
        trial.at_most("cut after", max(cut_after), 7, "s", time=True)
        trial.at_most("memory", max(grown), 50, "MB")
        trial.report("p99 while they read", reading, "ms")
        trial.report("p99 while they do not", stalled, "ms")
        trial.at_most("ratio of the p99", stalled / reading, 1.2, time=True)
        await check(served, crowd)


#: Events a second, of 8 kB, of the user whose readers stall; and of all others together.
_HOG: Final = 150

_OTHERS: Final = 50


async def _p99(served: ServedService, crowd: Sequence[Wire], others: Sequence[str], seconds: float) -> float:
    """Have events flow for so long. The 99th percentile of what they take to all these sockets, in milliseconds."""
    before = [len(wire.received) for wire in crowd]
    each, hogs = max(2, int(_OTHERS * seconds / len(others))), int(_HOG * seconds)
    floods = await asyncio.gather(
        served.flood("hog", hogs, filler=8_000, rate=_HOG),
        *(served.flood(user, each, filler=200, rate=each / seconds) for user in others),
    )
    began, latencies = dict(floods), list[float]()
    for wire, count in zip(crowd, before, strict=True):
        await wire.until_received(count + (hogs if wire.user == "hog" else each))
        for sent in wire.received[count:]:
            event = parse(sent.text)[1]
            latencies.append((sent.at - began[event["generationId"]][event["sequence"] - 1]) / 1e6)
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
        before = await served.figures(reset=True)
        for crowd in (sockets // 4, sockets):
            # Half of them are devices of one user, who is also the comers'.
            wires += await together(lambda n: served.wire("ada" if n % 2 else f"user-{n}"), crowd - len(wires))
            costs.append(await _come_and_go(served, comers, rounds))
        after = await served.figures(reset=True)
        trial.at_most("memory each", (after.rss - before.rss) / sockets, 60, "kB")
        for name, few, many in zip(("connect", "disconnect"), *costs, strict=True):
            trial.report(f"CPU per {name}", f"{few:,.0f} µs at {sockets // 4:,}, {many:,.0f} at {sockets:,}")
            trial.at_most(f"ratio per {name}", many / few, 1.5, time=True)
        _, staying = await asyncio.wait([asyncio.create_task(wire.gone.wait()) for wire in wires], timeout=seconds)
        trial.at_most("dropped", sockets - len(staying), 0)
        figures = await served.figures()
        assert figures.sockets == figures.devices == sockets
        trial.report("lag of the event loop", figures.lag * 1_000, "ms")
        await check(served, wires)
        await asyncio.wait(staying)


async def _come_and_go(served: ServedService, comers: int, rounds: int) -> tuple[float, float]:
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
            wires = await asyncio.gather(*map(served.reconnect, wires))
            await floods
            await caught_up(wires, per_round * number)
            took.append(time.monotonic() - began)
            cpu.append((await served.until(lambda figures: figures.sockets == figures.devices == sockets)).cpu)
            memory.append((await served.figures(reset=True)).rss / 1_000)
        assert all(len(wire.received) == per_round * rounds for wire in wires)
        trial.at_most("all caught up after", max(took), 5, "s", time=True)
        trial.report("the server's CPU time for it", max(b - a for a, b in pairwise(cpu)), "s")
        trial.report("memory of each round", " ".join(f"{each:.0f}" for each in memory) + " MB")
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
            assert not wire.disconnected_by_server

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
        trial.report("auth_timeout", auth_timeout, "s")
        trial.at_most("longest stay", max(stays), 20, "s", time=True)
        trial.report("health answers", len(answers))
        trial.report("slowest of them", max(answers), "ms")
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
        trial.report("sockets of A and B", len(wires))
        await check(served, wires)
    async with trial.serve(sockets=tokens, jwt_secret=SECRET) as served:
        async with flowing(served, "ada", rate=20):
            ends = await together(lambda number: _expire(served, number), tokens, at_once=tokens)
        late = [seconds for _, seconds in ends if seconds is not None]
        assert min(late) > -0.05, "closed before its time"
        trial.report("tokens that expired", len(late))
        trial.at_most("closed after exp, at the latest", max(late), 1, "s", time=True)
        await check(served, [wire for wire, _ in ends])


async def _change(served: ServedService, number: int) -> Wire:
    """A socket that is of A or B first, waits or does not, and changes once or again and again."""
    users = ["ada", "bob"] * (3 if number & 4 else 1)
    users = users if number & 1 else users[::-1]
    wire = await Wire.open(served.port)
    await wire.connect()
    for user in users:
        asked = wire.ask("authenticate", {"userId": user})
        if number & 2:
            await wire.until_asked(asked)
            await wire.until_received(wire.marks[asked] + 1)
    await wire.until_asked(len(users))
    wire.user = users[-1]
    await wire.until_received(wire.marks[len(users)] + 5)
    marks = [wire.marks[n] for n in range(1, len(users) + 1)]
    assert marks[0] == 0, "told something before it was anybody's"
    for user, start, end in zip(users, marks, [*marks[1:], len(wire.received)], strict=True):
        assert {served.owners[event["generationId"]] for event in wire.events[start:end]} <= {user}
    del wire.received[: marks[-1]]
    return wire


async def _expire(served: ServedService, number: int) -> tuple[Wire, float | None]:
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
                await wire.until_received(1)
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
    assert not wire.disconnected_by_server
    other, offset = await Wire.open(served.port, received=wire.received), wire.offset
    again = await other.connect(token=served.token("ada", 600), **offset)
    assert again["recovered"] is ("offset" in offset), again
    await other.until_received(1)
    return other, late
