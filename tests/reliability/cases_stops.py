"""The case of a service that is stopped whatever it is doing."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple

from reliability.cases import Trial, case
from support.deployment import ENDS, Deployment, ReconnectingDevice, RequestedGeneration, RetryingClient, task_group
from support.wire import JSON, Wire, hang_up

# --- 5: SIGTERM -------------------------------------------------------------------------------------------


class Stop(NamedTuple):
    """How a service is stopped in the middle of something."""

    #: What is going on.
    scene: "Callable[[Stopped], Awaitable[None]]"
    signals: Sequence[signal.Signals] = (signal.SIGTERM,)
    drain: float = 25
    local_seconds: float = 60
    #: Whether it waits for its work until the drain is over.
    waits: bool = False


class Stopped:
    """A service that is about to be stopped, and who uses it."""

    def __init__(self, deployment: Deployment, caller: RetryingClient, phone: ReconnectingDevice) -> None:
        self.deployment = deployment
        self.caller = caller
        self.phone = phone
        self.stack = contextlib.AsyncExitStack()
        #: Who has stopped reading, and how much there is to read.
        self.stalled: tuple[Wire, int] | None = None
        #: What waits, and what is worked on.
        self.waiting = self.running = ""

    async def idle(self) -> None:
        """A socket that says nothing, and one that does not even authenticate."""
        wire = await Wire.open(self.deployment.port)
        self.stack.push_async_callback(hang_up, [wire])

    async def stall(self) -> None:
        """A reader that has stopped reading in the middle of far more than fits into the line."""
        wire = await Wire.open(self.deployment.port, narrow=True)
        self.stack.push_async_callback(hang_up, [wire])
        await wire.connect(userId="hog")
        wire.transport.pause_reading()
        urls = {f"{name}Url": f"https://pictures.test/{'x' * 1_900}" for name in ("composition", "preview")}
        reports: list[JSON] = [{"status": "composition"}, {"status": "composition_completed", **urls}]
        reports += [{"status": "ai_generation", "progress": progress} for progress in range(60, 100)]
        reports += [{"status": "completed"}]  # Else it would be waited for.
        for number in range(2):
            order = RequestedGeneration(
                f"{number}", "generate", {"metadata": json.dumps({"x": "x" * 1_900})}, external=True
            )
            path = f"/generations/{await order.start(self.caller, 'hog')}/transitions"
            for report in reports:
                answer = await self.caller.ask("POST", path, "hog", json=report)
                assert answer.status_code == 200, answer.text
        self.stalled = wire, 2 * (1 + len(reports))

    async def upload(self) -> None:
        """An upload of which no more comes, and a long poll."""
        await self._say(
            b"POST /generations/edit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        opening = await self.caller.once("GET", "/socket.io/?EIO=4&transport=polling", "ada")
        sid = json.loads(opening.text[1:])["sid"]
        await self._say(
            f"GET /socket.io/?EIO=4&transport=polling&sid={sid} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )

    async def _say(self, data: bytes) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.deployment.port)
        self.stack.callback(writer.close)  # The writer is kept: with it the connection would go.
        writer.write(data)

    async def work(self) -> None:
        """One generation is with the offline editor, and another waits."""
        self.running = await RequestedGeneration("running", "edit", {}, external=False).start(self.caller, "ada")
        await self.phone.wire.until(lambda: self.phone.events[-1:] != [] and self.phone.events[-1]["progress"] >= 60)
        self.waiting = await RequestedGeneration("waiting", "edit", {}, external=False).start(self.caller, "ada")
        await self.phone.wire.until(lambda: any(each["generationId"] == self.waiting for each in self.phone.events))

    async def everything(self) -> None:
        for scene in (self.idle, self.stall, self.upload, self.work):
            await scene()

    async def check(self) -> None:
        """Afterwards: what was left was told to have ended, or is taken up by the next life of the service."""
        assert not self.phone.wire.disconnected_by_server
        if self.stalled is not None:
            wire, events = self.stalled
            wire.transport.resume_reading()
            await wire.until_gone()
            assert len(wire.received) < events, "it was not stalled"
        if not self.running:
            return
        if self.deployment.durable:
            assert not {event["status"] for event in self.phone.events} & set(ENDS), "not left as it was"
            async with self.deployment.serving() as life:
                await self.phone.back(self.deployment.port)
                await self.phone.wire.until(lambda: len(self._ends()) == 2)
                # The offline editor's work is free, and so it is done again.
                assert set(self._ends().values()) == {("completed", None)}
                assert await self.caller.feed("ada", self.phone.beginning) == self.phone.events
                assert (await self.caller.get("/me", "ada"))["credit"] == 98
                await hang_up([self.phone.wire])
                life.send(signal.SIGTERM)
                assert await life.ended() == 0
        else:
            assert set(self._ends().values()) == {("failed", "interrupted")}
            assert self.phone.events[-1]["credit"] == 100

    def _ends(self) -> dict[str, tuple[str, str | None]]:
        return {
            event["generationId"]: (event["status"], event.get("code"))
            for event in self.phone.events
            if event["status"] in ENDS
        }


_STOPS: Final[Mapping[str, Stop]] = {
    "idle sockets": Stop(Stopped.idle),
    "a stalled reader": Stop(Stopped.stall),
    "a slow upload, a long poll": Stop(Stopped.upload),
    "running work": Stop(Stopped.work, drain=0.5, waits=True),
    "all of it": Stop(Stopped.everything, drain=0.5, waits=True),
    "a second signal": Stop(Stopped.work, (signal.SIGTERM, signal.SIGTERM)),
    "SIGINT": Stop(Stopped.work, (signal.SIGINT,)),
}

#: What the quick form tries on one log only: whether that log is durable. "All of it", on both, includes the others.
_QUICK: Final[Mapping[str, Sequence[bool]]] = {
    "idle sockets": [False],
    "all of it": [False, True],
    "a second signal": [True],
    "SIGINT": [False],
}


@case(
    5,
    "SIGTERM with idle sockets, a stalled reader, a slow upload, a running generation; a second signal; SIGINT; on "
    "each log {rounds} times",
    "exit 0 within the drain + 1 s; in memory: interrupted, and told; in a file: left, and taken up by the next start",
    quick={"rounds": 1, "at_once": 4, "apart": False},
    long={"rounds": 5, "at_once": 1, "apart": True},
)
async def stopped(trial: Trial, rounds: int, at_once: int, apart: bool) -> None:
    stops = {name: each for name, each in _STOPS.items() if apart or name in _QUICK}
    logs = dict.fromkeys(_STOPS, (False, True)) if apart else _QUICK
    tries = [(name, durable) for name in stops for durable in logs[name] for _ in range(rounds)]
    took, turns = dict[int, float](), asyncio.Semaphore(at_once)

    async def stop(number: int) -> None:
        name, durable = tries[number]
        async with turns:
            took[number] = await _stop(Deployment(trial.folder / f"stop-{number}", durable=durable), stops[name])

    async with task_group() as group:
        for number in range(len(tries)):
            group.create_task(stop(number))
    for name, each in stops.items():
        worst = max(took[number] for number, each in enumerate(tries) if each[0] == name)
        trial.at_most(f"{name}: gone after", worst, each.drain * each.waits + 1, "s", time=True)


async def _stop(deployment: Deployment, stop: Stop) -> float:
    """After how many seconds it was gone."""
    flags = {"drain": stop.drain, "local_seconds": stop.local_seconds, "max_running": 1}
    async with RetryingClient.open(deployment.url) as caller, deployment.serving(**flags) as life:
        wire = await Wire.open(deployment.port)
        await wire.connect(userId="ada")
        here = Stopped(deployment, caller, ReconnectingDevice(wire))
        async with here.stack:
            await stop.scene(here)
            for number in stop.signals:
                began = time.monotonic()
                life.send(number)
                await asyncio.sleep(0.1)
            assert await life.ended(stop.drain * stop.waits + 30) == 0
            took = time.monotonic() - began
            assert life.logged == []
            await wire.until_gone()
            await here.check()
    return took
