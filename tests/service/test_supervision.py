"""Background tasks that fail: real adapters that raise now and then, on each log."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest

from adapters.images.folder import ImageFolder
from adapters.memory.leases import MemoryLeases
from adapters.system import now
from domain.errors import LogUnavailable
from domain.feed import Logged
from domain.ports.leases import Leases
from domain.ports.log import Append, Deliver, History
from domain.supervisor import Supervisor
from support.builders import WholeLog, memory_storage, open_memory_log, open_sqlite_log
from support.doubles import ForwardingLog, Pause, ScriptedEditor
from support.harness import JSON, TIMEOUT, Running, running

FAULTS = [OSError, MemoryError, LogUnavailable, asyncio.CancelledError]


class Faulty(ForwardingLog):
    """A log whose methods raise what is listed for them, and that damages events of one generation."""

    def __init__(self, log: WholeLog, **errors: list[BaseException]) -> None:
        super().__init__(log)
        self.errors = errors
        #: Called with each append.
        self.on_append: Callable[[Append], None] = lambda entry: None
        self.poisonous = ""

    def strike(self, method: str) -> None:
        if errors := self.errors.get(method):
            raise errors.pop(0)

    def seen(self, entry: Any) -> Any:
        if isinstance(entry, Logged) and entry.generation_id == self.poisonous and entry.sequence == 2:
            return entry._replace(event=b"\xff")
        return entry

    async def append(self, entry: Append) -> Logged:
        self.on_append(entry)
        return await super().append(entry)

    async def unfinished(self) -> Sequence[History]:
        self.strike("unfinished")
        return await super().unfinished()

    async def finished_before(self, moment: datetime, limit: int) -> Sequence[str]:
        self.strike("finished_before")
        return await super().finished_before(moment, limit)

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        self.strike("claim_undelivered")
        return [
            entry._replace(event=b"{}") if entry.generation_id == self.poisonous else entry
            for entry in await super().claim_undelivered(limit)
        ]

    def follow(self, deliver: Deliver) -> AbstractAsyncContextManager[None]:
        return self.inner.follow(lambda entry: deliver(self.seen(entry)))


@asynccontextmanager
async def faulty(
    tmp_path: Path,
    log: str,
    *,
    leases: Leases | None = None,
    overrides: JSON | None = None,
    errors: JSON | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[Running, Faulty]]:
    opening: Any = open_memory_log if log == "memory" else open_sqlite_log
    async with opening(credits=100, clock=now, outbox="webhook_url" in settings) as inner:
        between = Faulty(inner, **(errors or {}))
        replaced = {"storage": memory_storage(between, leases=leases), **(overrides or {})}
        async with running(tmp_path / "images", overrides=replaced, **settings) as service:
            yield service, between


async def ended(service: Running, generation_id: str, user: str = "ada") -> JSON:
    async with asyncio.timeout(20):
        while (snapshot := await service.get(f"/generations/{generation_id}", user))["status"] not in (
            "completed",
            "failed",
        ):
            await asyncio.sleep(0.02)
        return snapshot


async def parts(service: Running) -> JSON:
    return dict((await service.http.get("/health/ready")).json()["parts"])


both_logs = pytest.mark.parametrize("log", ["memory", "sqlite"])


@both_logs
@pytest.mark.parametrize("error", FAULTS)
async def test_retention_that_fails_is_logged_once_and_goes_on(
    tmp_path: Path, log: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    errors = {"finished_before": [error() for _ in range(3)]}
    async with faulty(tmp_path, log, errors=errors, retention=0.3) as (service, between):
        generation_id = await service.start()
        await ended(service, generation_id)
        await service.until(lambda: not (tmp_path / "images" / generation_id).exists())
        assert not between.errors["finished_before"]
        await service.until(lambda: service.service.supervisor.parts["retention"] == "ok")
        said = [record.getMessage() for record in caplog.records if "retention" in record.getMessage()]
        assert [line.split()[1] for line in said] == ["fails", "works"], said


@both_logs
async def test_retention_sets_aside_what_cannot_be_removed(tmp_path: Path, log: str) -> None:
    class Stuck(ImageFolder):
        stuck = ""

        async def remove(self, generation_id: str) -> None:
            if generation_id == self.stuck:
                raise OSError
            await super().remove(generation_id)

    images, pause = Stuck(tmp_path / "images", log="memory", epoch="e1"), Pause()
    editor = ScriptedEditor(pause, pause)
    async with faulty(tmp_path, log, overrides={"images": images, "editor": editor}, retention=0.5) as (service, _):
        images.stuck, other = await service.start(), await service.start()
        await service.until(lambda: len(editor.calls) == 2)
        pause.released.set()
        async with asyncio.timeout(TIMEOUT):
            while (await service.get("/generations"))["generations"]:
                await asyncio.sleep(0.02)
        await service.until(lambda: not (tmp_path / "images" / other).exists())


async def test_an_unreadable_waiting_order_ends_its_own_generation(tmp_path: Path) -> None:
    pause, file = Pause(), tmp_path / "log.db"
    settings: JSON = {"log": f"sqlite:///{file}", "max_running": 1}
    editor = ScriptedEditor(pause)
    async with running(tmp_path / "images", overrides={"editor": editor}, **settings) as service:
        first, bad, last = [await service.start() for _ in range(3)]
        await pause.reached.wait()
        damage(file, bad)
        pause.released.set()
        assert (await ended(service, last))["status"] == (await ended(service, first))["status"] == "completed"
        await until_internal(service, bad)
        assert (await service.get("/me"))["credit"] == 98
        assert set((await parts(service)).values()) == {"ok"}


@both_logs
@pytest.mark.parametrize("error", [OSError, MemoryError, asyncio.CancelledError])
async def test_an_append_that_fails_ends_its_own_generation(
    tmp_path: Path, log: str, error: type[BaseException]
) -> None:
    async with faulty(tmp_path, log) as (service, between), service.phone("ada") as phone:
        failed: list[str] = []

        def on_append(entry: Append) -> None:
            if entry.terminal and b'"internal"' not in entry.event and not failed:
                failed.append(entry.generation_id)
                raise error

        between.on_append = on_append
        ids = [await service.start(), await service.start()]
        await phone.until_over(*ids)
        ends = {each: phone.of(each)[-1] for each in ids}
        assert {end.get("code") for each, end in ends.items() if each in failed} == {"internal"}
        assert [end["status"] for each, end in ends.items() if each not in failed] == ["completed"]
        assert set((await parts(service)).values()) == {"ok"}


@pytest.mark.parametrize("error", FAULTS)
async def test_a_failing_lease_renewal_does_not_stop_work(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("domain.runner._RENEW", 0.05)

    class Unrenewed(MemoryLeases):
        errors: ClassVar = [error(), error()]

        async def renew(self, generation_ids: Any) -> Any:
            if self.errors:
                raise self.errors.pop()
            return await super().renew(generation_ids)

    leases, pause = Unrenewed(), Pause()
    async with faulty(tmp_path, "memory", leases=leases, overrides={"editor": ScriptedEditor(pause)}) as (service, _):
        generation_id = await service.start()
        await pause.reached.wait()
        await service.until(lambda: not leases.errors)
        pause.released.set()
        assert (await ended(service, generation_id))["status"] == "completed"


@both_logs
async def test_an_event_that_cannot_be_sent_ends_its_own_generation_and_others_are_sent(
    tmp_path: Path, log: str
) -> None:
    pause = Pause()
    editor = ScriptedEditor(pause)
    async with faulty(tmp_path, log, overrides={"editor": editor}) as (service, between):
        between.on_append = lambda entry: (
            setattr(between, "poisonous", entry.generation_id) if not between.poisonous else None
        )
        phone, other = service.phone("ada"), service.phone("ada")
        async with phone as one, other as two:
            bad = await service.start()
            assert (await ended(service, bad))["code"] == "internal"
            pause.released.set()
            good = await service.start()
            for device in (one, two):
                await device.until_over(good)
                assert device.sequences(good) == list(range(1, len(await service.events(good)) + 1))
            assert (await parts(service))["follower"] == "ok"
            for device in (one, two):
                device.events[:] = [(name, data) for name, data in device.events if data["generationId"] == good]


def damage(file: Path, generation_id: str) -> None:
    """What was ordered can no longer be read."""
    with contextlib.closing(sqlite3.connect(file)) as other, other:
        other.execute("UPDATE generations SET order_json = x'7b' WHERE generation_id = ?", (generation_id,))


async def started_elsewhere(service: Running) -> str:
    """A generation whose work its user's own pipeline does."""
    files, who = {"prompt": (None, b"a red hat")}, {"X-User-Id": "ada"}
    answer = await service.http.post("/generations/generate?runner=external", files=files, headers=who)
    return str(answer.json()["generationId"])


async def until_internal(service: Running, generation_id: str) -> None:
    """Wait until it has ended with ``internal``, refunded. Then forget it: nobody can read it."""
    async with asyncio.timeout(20):
        while (history := await service.service.log.generation(generation_id)) and history.events[-1].end is None:
            await asyncio.sleep(0.02)
    assert history is not None
    event = json.loads(history.events[-1].event or b"")
    assert (event["status"], event["code"]) == ("failed", "internal")
    await service.service.storage.log.remove(generation_id, retention=True)


async def test_an_external_generation_that_cannot_be_read_ends_and_others_keep_their_deadline(tmp_path: Path) -> None:
    file = tmp_path / "log.db"
    async with running(tmp_path / "images", log=f"sqlite:///{file}", deadline=0.5) as service:
        bad, good = await started_elsewhere(service), await started_elsewhere(service)
        damage(file, bad)
        await until_internal(service, bad)
        assert (await ended(service, good))["code"] == "deadline_exceeded"
        assert (await service.get("/me"))["credit"] == 100


async def test_an_external_generation_damaged_before_a_restart_is_set_aside_and_others_keep_their_deadline(
    tmp_path: Path,
) -> None:
    file = tmp_path / "log.db"
    async with running(tmp_path / "images", log=f"sqlite:///{file}") as service:
        bad, good = await started_elsewhere(service), await started_elsewhere(service)
    damage(file, bad)
    async with running(tmp_path / "images", log=f"sqlite:///{file}", deadline=0.5) as service:
        assert (await service.get_response(f"/generations/{bad}", "ada")).status_code == 404
        assert (await ended(service, good))["code"] == "deadline_exceeded"
        # What becomes of its credit is decided by a person.
        assert (await service.get("/me"))["credit"] == 99
        await service.http.post("/users/ada/credit", json={"amount": 1})


@both_logs
async def test_a_webhook_that_cannot_be_encoded_is_set_aside(tmp_path: Path, log: str) -> None:
    bodies: list[bytes] = []

    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split()[0])
        bodies.append(await reader.readexactly(length))
        writer.write(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
        writer.close()

    receiver = await asyncio.start_server(receive, "127.0.0.1", 0)
    port = receiver.sockets[0].getsockname()[1]
    errors = {"claim_undelivered": [OSError(), MemoryError()]}
    async with (
        receiver,
        faulty(tmp_path, log, errors=errors, webhook_url=f"http://127.0.0.1:{port}/") as (service, between),
    ):
        pause = Pause()
        between.on_append = lambda entry: (
            setattr(between, "poisonous", entry.generation_id) if not between.poisonous else None
        )
        bad, good = await service.start(), await service.start()
        assert between.poisonous == bad
        pause.released.set()
        await service.until(lambda: any(good.encode() in body for body in bodies))
        async with asyncio.timeout(10):
            while await between.inner.claim_undelivered(10):
                await asyncio.sleep(0.02)
        assert not any(bad.encode() in body for body in bodies)
        await service.until(lambda: service.service.supervisor.parts["webhooks"] == "ok")


async def test_the_supervisor_logs_each_failure_once_and_counts_a_steady_task_as_working(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("domain.supervisor._STEADY", 0.05)
    supervisor, tries = Supervisor(), 0
    steady = asyncio.Event()

    async def work() -> None:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise OSError(28, "No space left on device", "/home/secret")
        steady.set()
        await asyncio.get_running_loop().create_future()

    keeping = asyncio.create_task(supervisor.keep("work", work))
    await steady.wait()
    assert supervisor.parts == {"work": "storage_failed"}
    async with asyncio.timeout(10):
        while supervisor.parts != {"work": "ok"}:
            await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.wait([keeping])
    assert keeping.cancelled()
    assert [record.getMessage() for record in caplog.records] == [
        "work fails with storage_failed (OSError: No space left on device) and is tried again",
        "work works again",
    ]


async def test_two_tasks_of_a_part_fail_and_work_independently(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, rounds = Supervisor(), 0
    enough = asyncio.Event()

    async def fails() -> None:
        raise OSError(5, "Input/output error")

    async def works() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 20:
            enough.set()

    rounds_of = [supervisor.every(60, "part", fails), supervisor.every(0, "part", works)]
    tasks = [*map(asyncio.create_task, rounds_of)]
    await enough.wait()
    assert supervisor.parts == {"part": "storage_failed"}
    assert len(caplog.records) == 1
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
