"""Fan-out: what one event costs on its way to the sockets of its user, how long it takes, and under many live jobs.

Stagecast is measured from the decision (machine, event, append, delivery) and from the append; its peers from `emit`.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks import peers
from benchmarks.measuring import SERVERS, Process, Row, Size, alternating, attempt, cores

STAGECAST: Final = "Stagecast"
NODE: Final = "Node socket.io"
PYTHON: Final = "python-socketio"
PICOWS: Final = "picows"
#: The order in which they take turns.
NAMES: Final = (STAGECAST, NODE, PYTHON, PICOWS)

#: What Stagecast is measured from; its peers only from the first one.
MODES: Final = ("append", "decision")
#: How many generations are unfinished meanwhile.
LIVE: Final = (1_000, 100_000)

#: Deliveries per second for the latency.
RATE: Final = 1_000


class Shape(NamedTuple):
    """So many users with so many sockets each."""

    users: int
    devices: int
    #: The goals of the ratio to Node, from the append and from the decision.
    append: float
    decision: float

    def __str__(self) -> str:
        return f"{self.users:,} × {self.devices:,}"


SHAPES: Final = (Shape(1_000, 1, 0.8, 2.0), Shape(300, 3, 0.8, 1.2), Shape(1, 1_000, 1.0, 1.0))
#: The shape of the latency.
MIXED: Final = SHAPES[1]


def server(name: str, users: int, live: int = 0) -> Process:
    """Start this server on its core and wait until it is ready. Raises `BenchmarkError`."""
    if name == STAGECAST:
        command: list[str | Path] = [sys.executable, "-m", "benchmarks.servers.product", str(users), str(live)]
    elif name == NODE:
        command = ["node", SERVERS / "socketio_peer.cjs", peers.node_modules(), str(users)]
    else:
        module = "socketio_peer" if name == PYTHON else "picows_peer"
        command = [peers.python(), "-m", f"benchmarks.servers.{module}", str(users)]
    return Process(command, [cores()[0]])


def clients(name: str, port: int, users: int, devices: int, in_flight: int = 100) -> Process:
    """Start the load client on its core; it answers once all sockets are connected. Raises `BenchmarkError`."""
    protocol = {STAGECAST: "stagecast", PICOWS: "raw"}.get(name, "socketio")
    arguments = map(str, (port, users, devices, protocol, in_flight))
    return Process([peers.python(), "-m", "benchmarks.servers.load", *arguments], [cores()[1]])


class Connected:
    """A server with all sockets of a shape connected."""

    def __init__(self, stack: ExitStack, name: str, users: int, devices: int, live: int = 0) -> None:
        """Raises `BenchmarkError`: also if a socket could not be connected."""
        self._devices = devices
        self._server = stack.enter_context(server(name, users, live))
        port = self._server.answer(60 + live / 250)["port"]
        self._clients = stack.enter_context(clients(name, port, users, devices))
        self._clients.answer(120)

    def _sent(self, command: str, seconds: float) -> tuple[float, dict[str, Any]]:
        """Have the server emit; return its CPU per delivered event in µs, and what the clients tell."""
        self._clients.ask("arm", 60)
        before = self._server.cpu()
        emitted = self._server.ask(command, 10 * seconds + 30)["sent"] * self._devices
        answer = self._clients.ask(f"until {emitted} 30", 40)
        if answer["count"] != emitted or answer["lost"]:
            raise self._clients.failed(f"{emitted} events were emitted, {answer}")
        return (self._server.cpu() - before) / emitted, answer

    def cost(self, mode: str, seconds: float) -> float:
        """CPU per delivered event in µs, with events as fast as possible."""
        self._sent(f"flood {mode} {seconds / 4}", seconds)
        return self._sent(f"flood {mode} {seconds}", seconds)[0]

    def latency(self, mode: str, seconds: float) -> float:
        """The median latency in µs at `RATE` deliveries per second."""
        p50: float = self._sent(f"rate {mode} {RATE / self._devices} {seconds}", seconds)[1]["p50"]
        return p50


Key = tuple[object, ...]


def run(size: Size) -> list[Row]:
    """All rows. Raises `BenchmarkError`."""
    values: dict[Key, list[float]] = {}

    def note(key: Key, value: float) -> None:
        values.setdefault(key, []).append(value)

    def measure(name: str, shape: Shape) -> dict[Key, float]:
        with ExitStack() as stack:
            server = Connected(stack, name, size.many(shape.users), size.many(shape.devices))
            modes = MODES if name == STAGECAST else MODES[:1]
            found: dict[Key, float] = {(shape, mode, name): server.cost(mode, size.seconds(1.5)) for mode in modes}
            if shape is MIXED:
                found["latency", name] = server.latency("append", size.seconds(4))
            return found

    def measure_live() -> None:
        """Both servers run all the time: to start so many generations takes far longer than to measure."""
        users, devices, *_ = SHAPES[0]
        with ExitStack() as stack:
            counts = tuple(map(size.many, LIVE))
            servers = {live: Connected(stack, STAGECAST, size.many(users), size.many(devices), live) for live in counts}
            for _, turns in alternating(counts, size):
                for live in turns:
                    for mode in MODES:
                        note((live, mode, STAGECAST), servers[live].cost(mode, size.seconds(1.5)))

    names = tuple(name for name in NAMES if name != NODE or not peers.without_node())
    for _, turns in alternating(names, size):
        for shape in SHAPES:
            for name in turns:
                for key, value in attempt(measure, name, shape).items():
                    note(key, value)
    measure_live()
    return _rows(values, size)


def _rows(values: dict[Key, list[float]], size: Size) -> list[Row]:
    rows = []
    for mode in MODES:
        for shape in SHAPES:
            for peer in (NODE, PYTHON, PICOWS):
                if mode == "decision" and peer != NODE:
                    continue
                rows.append(
                    Row(
                        figure=f"{mode} → sockets, {shape}",
                        unit="µs CPU per delivery",
                        values=values[shape, mode, STAGECAST],
                        peer=peer,
                        peer_values=values.get((shape, "append", peer), ()),
                        at_most=getattr(shape, mode) if peer == NODE else None,
                    )
                )
    for peer in (NODE, PYTHON, PICOWS):
        rows.append(
            Row(
                figure=f"p50 latency at {RATE:,} events/s, {MIXED}",
                unit="µs",
                values=values["latency", STAGECAST],
                peer=peer,
                peer_values=values.get(("latency", peer), ()),
                at_most=1.1 if peer == NODE else None,
            )
        )
    for mode in MODES:
        rows.append(
            Row(
                figure=f"{mode} → sockets with {max(LIVE):,} live generations, {SHAPES[0]}",
                unit="µs CPU per delivery",
                values=values[size.many(max(LIVE)), mode, STAGECAST],
                peer=f"{min(LIVE):,} live",
                peer_values=values[size.many(min(LIVE)), mode, STAGECAST],
                at_most=1.2,
            )
        )
    return rows
