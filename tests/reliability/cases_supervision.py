"""Cases 35 to 37: background tasks that fail, shutdown while starts are accepted, and what readiness tells."""

import asyncio
import contextlib
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from adapters.memory.leases import MemoryLeases
from adapters.system import now
from domain.errors import LogUnavailable
from domain.feed import Logged
from domain.ports.log import Append, History
from domain.supervisor import Supervisor
from reliability.cases import Trial, case
from reliability.cases_disk_and_clock import no_room
from support.builders import OpenLog, WholeLog, memory_storage, open_memory_log, open_sqlite_log
from support.deployment import Deployment, Life, RetryingClient, parts
from support.doubles import ForwardingLog
from support.harness import PHOTO, running
from support.pictures import RED, solid
from support.processes import until_handled
from support.wire import Wire

# --- 35: background tasks fail ----------------------------------------------------------------------------

_LOGS: Final[dict[str, OpenLog]] = {"memory": open_memory_log, "sqlite": open_sqlite_log}
_ERRORS: Final = (OSError, MemoryError, LogUnavailable, asyncio.CancelledError)


class Failing(ForwardingLog):
    """A log of which every method that only background tasks call fails now and then."""

    def __init__(self, log: WholeLog, chance: random.Random) -> None:
        super().__init__(log)
        self.chance = chance
        self.failures = 0
        #: Appends to these are refused in a way that nobody expects.
        self.poisonous: set[str] = set()

    def strike(self) -> None:
        if self.chance.random() < 0.5:
            self.failures += 1
            raise self.chance.choice(_ERRORS)

    async def append(self, entry: Append) -> Logged:
        if entry.generation_id in self.poisonous and entry.sequence > 1 and b'"internal"' not in entry.event:
            raise self.chance.choice((OSError, MemoryError, asyncio.CancelledError))
        return await super().append(entry)

    async def unfinished(self) -> Sequence[History]:
        if self.poisonous:  # Not while the service starts.
            self.strike()
        return await super().unfinished()

    async def finished_before(self, *given: Any) -> Sequence[str]:
        self.strike()
        return await super().finished_before(*given)

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        self.strike()
        return await super().claim_undelivered(limit)


class FailingLeases(MemoryLeases):
    """Leases that cannot be claimed now and then."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance

    async def claim(self, *, fetching: bool = False) -> str:
        if self.chance.random() < 0.2:
            raise self.chance.choice(_ERRORS)
        return await super().claim(fetching=fetching)


@case(
    35,
    "every second call that a background task makes fails ({starts} starts on each log, every fourth of which cannot "
    "be worked on): OSError, MemoryError, no answer, cancelled",
    "those that cannot be worked on end in internal, refunded; all others complete and are removed; all parts work in "
    "the end",
    quick={"starts": 4},
    long={"starts": 200},
)
async def background_tasks_fail(trial: Trial, starts: int) -> None:
    async with asyncio.TaskGroup() as group:
        for name in _LOGS:
            group.create_task(_tasks_fail(trial, name, starts))


async def _tasks_fail(trial: Trial, name: str, starts: int) -> None:
    chance = random.Random(35)
    async with _LOGS[name](credits=starts, clock=now) as inner:
        log = Failing(inner, chance)
        overrides = {"storage": memory_storage(log, leases=FailingLeases(chance))}
        folder = trial.folder / name
        async with running(folder, overrides=overrides, retention=0.5, max_per_user=starts) as service:
            async with service.phone("ada") as phone:
                ids = []
                for number in range(starts):
                    ids.append(await service.start())
                    if number % 4 == 0:
                        log.poisonous.add(ids[-1])
                await phone.until_over(*ids)
                ends = {each: phone.of(each)[-1].get("code", "completed") for each in ids}
                for each, end in ends.items():
                    # What had gone on before its appends began to fail may have completed.
                    assert end == "completed" or (each in log.poisonous and end == "internal"), (each, end)
                spent = sum(end == "completed" for end in ends.values())
                assert (await service.get("/me"))["credit"] == starts - spent
                phone.events.clear()
            while (await service.get("/generations"))["generations"]:
                await asyncio.sleep(0.02)
            assert _is_empty(folder), "pictures go before the history"
            log.strike = lambda: None  # type: ignore[method-assign]
            began = time.monotonic()
            await service.until(partial(_all_work, service.service.supervisor))
            trial.at_most(f"{name}: all parts work again after", time.monotonic() - began, 7, "s", time=True)
            trial.report(f"{name}: failures of background tasks", log.failures)
            trial.report(f"{name}: ended in internal", starts - spent)


def _is_empty(folder: Path) -> bool:
    """Whether no generation has pictures there: each has a folder of its own."""
    return not any(each.is_dir() for each in folder.iterdir())


def _all_work(supervisor: Supervisor) -> bool:
    return set(supervisor.parts.values()) == {"ok"}


# --- 36: shutdown while starts are accepted ---------------------------------------------------------------

_STARTS: Final = 4
_SIGNALS: Final[Sequence[Sequence[signal.Signals]]] = (
    [signal.SIGTERM],
    [signal.SIGINT],
    [signal.SIGTERM, signal.SIGTERM],
)


@case(
    36,
    "{rounds} times SIGTERM, SIGINT or two signals at a random moment of starts that arrive, are decoded and are "
    "appended; as often a signal before the service listens",
    "no connection is cut: each start is answered 202 or 503 draining, whole; the owner of each 202 hears its end, or "
    "the next start of the service takes it up; exit 0, nothing logged",
    quick={"rounds": 2, "pixels": 1_000},
    long={"rounds": 60, "pixels": 5_000},
)
async def stopped_while_starts_arrive(trial: Trial, rounds: int, pixels: int) -> None:
    chance = random.Random(36)
    picture = solid(RED, (pixels, pixels), "JPEG").data
    answers: dict[str, int] = {}
    turns = asyncio.Semaphore(2)

    async def one(number: int, durable: bool, signals: Sequence[signal.Signals], after: float, early: float) -> None:
        async with turns:
            deployment = Deployment(trial.folder / f"starts-{number}", durable=durable)
            for answer in await _stop_starts(deployment, picture, signals, after):
                answers[answer] = answers.get(answer, 0) + 1
            async with deployment.life(fresh=True) as life:
                await until_handled(life.pid.result(), signal.SIGTERM)
                await asyncio.sleep(early)
                life.send(signals[0])
                assert await life.ended() == 0
                assert life.logged == []

    async with asyncio.TaskGroup() as group:
        for number in range(rounds):
            moments = chance.uniform(0, 1 if trial.timed else 0.5), chance.uniform(0, 1)
            group.create_task(one(number, number % 2 == 1, _SIGNALS[number % 3], *moments))
    for answer, count in sorted(answers.items()):
        trial.report(f"answered {answer}", count)


async def _stop_starts(
    deployment: Deployment, picture: bytes, signals: Sequence[signal.Signals], after: float
) -> list[str]:
    """What four starts were answered that were on their way when the signals came."""
    async with RetryingClient.open(deployment.url) as caller, deployment.serving() as life:
        wire = await Wire.open(deployment.port)
        await wire.connect(userId="ada")
        sent = asyncio.Semaphore(0)

        async def trace(event: str, _: object) -> None:
            if event == "http11.send_request_headers.complete":
                sent.release()

        # On connections that the service has: what waits to be accepted is not its own yet.
        await asyncio.gather(*(caller.once("GET", "/health/live", "ada") for _ in range(_STARTS)))
        form: dict[str, Any] = {"files": parts("x", picture), "extensions": {"trace": trace}}
        starts = [asyncio.create_task(caller.once("POST", "/generations/edit", "ada", **form)) for _ in range(_STARTS)]
        for _ in starts:
            await sent.acquire()
        await asyncio.sleep(after)
        for number in signals:
            life.send(number)
            await asyncio.sleep(0.05)
        outcomes = await asyncio.gather(*starts)
        assert await life.ended() == 0
        assert life.logged == []
        await wire.until_gone()
        accepted, answers = list[str](), list[str]()
        for outcome in outcomes:
            answers.append(str(outcome.status_code))
            if outcome.status_code == 202:
                accepted.append(outcome.json()["generationId"])
            else:
                assert (outcome.status_code, outcome.json()["code"]) == (503, "draining"), outcome.text
    heard = {each["generationId"] for each in wire.events if each["status"] in ("completed", "failed")}
    left = set(accepted) - heard
    assert not left or deployment.durable, "a request got 202, and nothing more"
    if left:
        async with deployment.serving(), RetryingClient.open(deployment.url) as caller:
            for each in left:
                while (await caller.get(f"/generations/{each}", "ada"))["status"] not in ("completed", "failed"):
                    await asyncio.sleep(0.02)
    return answers


# --- 37: readiness ----------------------------------------------------------------------------------------

Fault = Callable[[Deployment, Life], contextlib.AbstractAsyncContextManager[None]]


@asynccontextmanager
async def _disk_full(_: Deployment, life: Life) -> AsyncIterator[None]:
    with no_room(life, 0):
        yield


@asynccontextmanager
async def _write_lock(deployment: Deployment, _: Life) -> AsyncIterator[None]:
    with contextlib.closing(sqlite3.connect(deployment.log, isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        yield


@asynccontextmanager
async def _log_gone(deployment: Deployment, _: Life) -> AsyncIterator[None]:
    elsewhere = deployment.log.with_name("elsewhere.db")
    deployment.log.rename(elsewhere)
    yield
    elsewhere.rename(deployment.log)


@asynccontextmanager
async def _folder_lost(deployment: Deployment, _: Life) -> AsyncIterator[None]:
    deployment.images.rename(deployment.folder / "elsewhere")
    deployment.images.write_text("in the way")
    yield
    deployment.images.unlink()
    (deployment.folder / "elsewhere").rename(deployment.images)


_FAULTS: Final[dict[str, tuple[Fault, str]]] = {
    "disk full": (_disk_full, "log"),
    "write lock held": (_write_lock, "log"),
    "log file gone": (_log_gone, "log"),
    "image folder lost": (_folder_lost, "images"),
}


@case(
    37,
    "{rounds} times: disk full, the log's write lock held by another process, the log's file gone, the image folder "
    "lost, while {askers} ask for readiness all the time",
    "503 with the part within 6 s, starts refused meanwhile; 200 again by itself",
    quick={"rounds": 1, "askers": 1},
    long={"rounds": 5, "askers": 50},
)
async def readiness_tells(trial: Trial, rounds: int, askers: int) -> None:
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in _FAULTS}

    async def one(name: str, number: int) -> None:
        fault, part = _FAULTS[name]
        deployment = Deployment(trial.folder / f"{name.replace(' ', '-')}-{number}")
        async with RetryingClient.open(deployment.url) as caller, deployment.serving() as life:
            async with _asked_by(caller, askers):
                await _until(caller, 200)
                began = time.monotonic()
                async with fault(deployment, life):
                    await _until(caller, 503, part)
                    red = time.monotonic() - began
                    answer = await caller.once("POST", "/generations/edit", "ada", files=parts("x", PHOTO))
                    assert name == "log file gone" or answer.status_code == 503, answer.text
                    began = time.monotonic()
                await _until(caller, 200)
                figures[name].append((red, time.monotonic() - began))
            life.send(signal.SIGINT)
            assert await life.ended() == 0

    for number in range(rounds):
        async with asyncio.TaskGroup() as group:
            for name in _FAULTS:
                group.create_task(one(name, number))
    for name, took in figures.items():
        trial.at_most(f"{name}: red after", max(red for red, _ in took), 6, "s", time=True)
        trial.at_most(f"{name}: green after", max(green for _, green in took), 6, "s", time=True)


@asynccontextmanager
async def _asked_by(caller: RetryingClient, askers: int) -> AsyncIterator[None]:
    """So many ask for readiness, each once it has been answered."""

    async def ask() -> None:
        while True:
            await caller.once("GET", "/health/ready", "ada")
            await asyncio.sleep(0.05)

    asking = [asyncio.create_task(ask()) for _ in range(askers)]
    try:
        yield
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def _until(caller: RetryingClient, status: int, failing: str | None = None) -> None:
    """Wait until readiness answers so, and this part fails."""
    async with asyncio.timeout(30):
        while True:
            answer = await caller.once("GET", "/health/ready", "ada")
            if answer.status_code == status and (failing is None or answer.json()["parts"][failing] != "ok"):
                return
            await asyncio.sleep(0.02)
