"""The case of full disks and clocks that jump."""

import asyncio
import contextlib
import json
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import httpx2
from PIL import Image

from adapters.system import now
from domain.housekeeping import Housekeeping
from reliability.cases import Trial, case
from support.builders import LOGS
from support.deployment import (
    ENDS,
    Deployment,
    Life,
    ReconnectingDevice,
    RequestedGeneration,
    RetryingClient,
    parts,
    pictures_of,
    task_group,
)
from support.doubles import Pause, ScriptedEditor
from support.harness import PHOTO, running
from support.pictures import GREEN, encoded, solid
from support.provider_faults import Origin, listening, then, whole
from support.wire import JSON, Wire, hang_up

# --- 22: the disk is full; the clock jumps ----------------------------------------------------------------


@case(
    22,
    "{rounds} times no room for pictures, no room for the log, and a clock that jumps an hour forth and back twice, in "
    "the middle of generations",
    "503, nothing half-made; what runs fails with storage_failed, or waits and goes on; well again when there is room; "
    "order, sessions and retention unaffected by the clock",
    quick={"rounds": 1},
    long={"rounds": 10},
)
async def no_room_and_wrong_time(trial: Trial, rounds: int) -> None:
    for number in range(rounds):
        async with task_group() as group:
            pictures = Deployment(trial.folder / f"pictures-{number}")
            group.create_task(_no_room_for_pictures(trial, pictures))
            group.create_task(_no_room_for_the_log(trial, Deployment(trial.folder / f"log-{number}")))
            for name in LOGS:
                folder = trial.folder / f"clock-{name}-{number}"
                folder.mkdir()
                log = "memory://" if name == "memory" else f"sqlite:///{folder}/log.db"
                group.create_task(_the_clock_jumps(trial, folder / "images", log))


@contextmanager
def no_room(life: Life, size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes, as if the disk were full."""
    pid = life.pid.result()
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def _refused(answer: httpx2.Response, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (503, code), answer.text
    assert "retry-after" in answer.headers


async def _phone(port: int, user: str = "ada") -> ReconnectingDevice:
    wire = await Wire.open(port)
    await wire.connect(userId=user)
    return ReconnectingDevice(wire)


async def _refuses_a_session(port: int) -> None:
    with contextlib.suppress(ConnectionResetError):
        await _phone(port)
        raise AssertionError("the service confirmed a session that it could not store")


async def _until_ended(phone: ReconnectingDevice, generation_id: str) -> JSON:
    def ends() -> list[JSON]:
        return [each for each in phone.events if each["generationId"] == generation_id and each["status"] in ENDS]

    await phone.wire.until(lambda: bool(ends()))
    return ends()[0]


#: Bytes that a file may have while there is no room for pictures.
_ROOM: Final = 500_000


def _noise() -> bytes:
    """A photo of less than `_ROOM` bytes, of which all that is made is larger. Progressive: it is encoded anew."""
    size = (1_000, 750)
    noise = Image.frombytes("RGB", size, random.Random(22).randbytes(3 * size[0] * size[1]))
    return encoded(noise, "JPEG", quality=40, progressive=True)


async def _no_room_for_pictures(trial: Trial, deployment: Deployment) -> None:
    photo, gate = _noise(), asyncio.Event()

    async def wait(_: asyncio.StreamWriter) -> None:
        await gate.wait()

    faces = Origin(lambda _: then(wait, whole(solid(GREEN).data, media_type="image/png")))
    async with (
        listening(faces),
        RetryingClient.open(deployment.url) as caller,
        deployment.serving(fetch_allow="127.0.0.0/8") as life,
    ):
        phone = await _phone(deployment.port)
        form = parts("x", photo)
        slow = parts("x", photo, imageUrls=f"{faces.address}/face.png", faceSwap="false")
        running = (await caller.ask("POST", "/generations/edit", "ada", files=slow)).json()["generationId"]
        await phone.wire.until(lambda: phone.events[-1:] != [] and phone.events[-1]["status"] == "composition")
        before = deployment.pictures
        with no_room(life, _ROOM):
            for _ in range(2):
                _refused(await caller.once("POST", "/generations/edit", "ada", key="k", files=form), "storage_failed")
            assert deployment.pictures == before, "something was left of what was refused"
            assert len(await caller.generations("ada")) == 1
            assert (await caller.get("/me", "ada"))["credit"] == 99
            gate.set()
            end = await _until_ended(phone, running)
            assert (end["code"], end["failedStage"], end["credit"]) == ("storage_failed", "composition", 100)
            # There is still room for small ones.
            small = (await caller.ask("POST", "/generations/edit", "ada", files=parts("x", PHOTO))).json()
            assert (await _until_ended(phone, small["generationId"]))["status"] == "completed"
        again = (await caller.ask("POST", "/generations/edit", "ada", key="k", files=form)).json()["generationId"]
        assert (await _until_ended(phone, again))["status"] == "completed"
        await _all_is_well(deployment, caller, phone, life, spent=2)
        trial.report("no room for pictures", "2 starts refused, 1 failed and was refunded, then 1 completed")


async def _no_room_for_the_log(trial: Trial, deployment: Deployment) -> None:
    async with RetryingClient.open(deployment.url) as caller, deployment.serving(local_seconds=0.5, drain=0.5) as life:
        with contextlib.closing(sqlite3.connect(f"{deployment.log.as_uri()}?mode=ro", uri=True)) as stranger:
            # Somebody who reads keeps the write-ahead log from being emptied: pictures are smaller than it.
            stranger.execute("BEGIN")
            stranger.execute("SELECT count(*) FROM events").fetchall()
            phone = await _phone(deployment.port)
            filler = {"metadata": json.dumps({"x": "x" * 1_900})}
            external = [
                await RequestedGeneration(f"{number}", "generate", filler, external=True).start(caller, "pat")
                for number in range(12)
            ]
            running = await RequestedGeneration("running", "edit", {}, external=False).start(caller, "ada")
            await phone.wire.until(lambda: phone.events[-1:] != [] and phone.events[-1]["progress"] >= 60)
            wal = deployment.log.with_name("log.db-wal").stat().st_size
            assert wal > 300_000
            began = time.monotonic()
            with no_room(life, wal):
                calls = _writes(caller, external[0])
                connecting = asyncio.create_task(_refuses_a_session(deployment.port))
                for answer in await asyncio.gather(*(call() for call in calls)):
                    _refused(answer, "log_unavailable")
                trial.report(
                    "no room for the log", f"{len(calls)} calls refused after {time.monotonic() - began:.1f} s"
                )
                await connecting
                # What was appended when there was still room is told, and nothing else.
                kept = await caller.feed("ada", phone.beginning)
                await phone.wire.until(lambda: len(phone.events) >= len(kept))
                assert phone.events == kept
                assert not phone.wire.gone.is_set()
                assert [each["generationId"] for each in await caller.generations("ada")] == [running]
                assert (await caller.get("/me", "ada"))["credit"] == 99
            stranger.rollback()
        end = await _until_ended(phone, running)
        assert end["status"] == "completed", "what had been made was lost"
        for answer in [await call() for call in calls]:
            assert answer.status_code in (200, 202), answer.text
        [started] = [each["generationId"] for each in await caller.generations("ada") if each["kind"] == "generate"]
        assert (await _until_ended(phone, started))["status"] == "completed"
        assert [each["status"] for each in await caller.events(external[0], "pat")] == ["started", "composition"]
        assert (await caller.get("/me", "pat"))["credit"] == 100 - 12 - 1 + 5
        await _all_is_well(deployment, caller, phone, life, spent=2)


def _writes(caller: RetryingClient, external: str) -> list[Callable[[], Awaitable[httpx2.Response]]]:
    """Calls that the log has to keep, each of them to be made again in the same way."""
    transitions = f"/generations/{external}/transitions"
    return [
        lambda: caller.once("POST", "/generations/generate", "ada", key="k", files=parts("x", PHOTO)),
        lambda: caller.once("POST", "/generations/edit?runner=external", "pat", key="k", files=parts("x")),
        lambda: caller.once("POST", transitions, "pat", json={"status": "composition", "sequence": 2}),
        lambda: caller.once("POST", "/users/pat/credit", "pat", key="k", json={"amount": 5}),
    ]


async def _all_is_well(
    deployment: Deployment, caller: RetryingClient, phone: ReconnectingDevice, life: Life, *, spent: int
) -> None:
    """Afterwards: the devices, the log, the balance and the folder agree. Nothing was swept."""
    feed = await caller.feed("ada", phone.beginning)
    assert phone.events == feed
    assert (await caller.get("/me", "ada"))["credit"] == 100 - spent
    await hang_up([phone.wire])
    life.send(signal.SIGTERM)
    assert await life.ended() == 0  # Until then pictures that are not needed any more are being removed.
    names = pictures_of(feed, f"http://localhost:{deployment.port}/images/")
    assert deployment.pictures == names, "stray images"
    assert not any(word in line for line in life.logged for word in ("Traceback", str(deployment.folder)))


class JumpingClock:
    """`domain.ports.system.Clock`: the right time, but for what it has jumped."""

    def __init__(self) -> None:
        self.jumped = timedelta()

    def __call__(self) -> datetime:
        return now() + self.jumped

    def jump(self, hours: int) -> None:
        self.jumped += timedelta(hours=hours)


async def _the_clock_jumps(trial: Trial, images: Path, log: str) -> None:
    clock, pause = JumpingClock(), Pause()
    overrides = {"clock": clock, "editor": ScriptedEditor(pause)}
    async with running(images, log=log, overrides=overrides) as service:
        phone = await _phone(service.port)
        ids = [await service.start()]
        await pause.reached.wait()
        for hours in (1, -1, -1, 1):
            clock.jump(hours)
            ids.append(await service.start())
            # In mid-generation, and with a session from before the jump.
            phone.wire.abort()
            await phone.wire.until_gone()
            await phone.back(service.port)
            key = {"Idempotency-Key": "k"}
            granted = await service.http.post("/users/pat/credit", headers=key, json={"amount": 5})
            assert granted.json()["credit"] == 105, "granted twice"
            pause.released.set()
            for generation_id in ids:
                assert (await _until_ended(phone, generation_id))["status"] == "completed"
            keeper = Housekeeping(service.service.log, service.service.storage.log, service.service.images)
            await keeper.purge(ended_before=clock() - timedelta(days=1))
        page = await service.get(f"/events?after={phone.beginning}&limit=1000")
        assert (page["recovered"], [each["data"] for each in page["events"]]) == (True, phone.events)
        listed = (await service.get("/generations"))["generations"]
        assert [each["generationId"] for each in listed] == ids[::-1], "not in the order of their starts"
        times = [event["occurredAt"] for event in phone.events]
        assert times != sorted(times), "the clock did not go back"
        trial.report("events over four jumps, in order", len(times))
        await hang_up([phone.wire])
