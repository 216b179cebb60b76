"""What is checked and reserved before a start is accepted, and what one user may take of what all share."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.memory import quotas as memory_quotas
from adapters.serving.loop_lag import LoopLag
from domain import admission
from domain.errors import (
    Failure,
    IdempotencyMismatch,
    InsufficientCredit,
    InvalidImage,
    Overloaded,
    TooManyGenerations,
)
from domain.generation import Snapshot
from support.doubles import (
    FACE_URL,
    ForwardingLog,
    InMemoryBackend,
    InMemoryUpload,
    Pause,
    ScriptedEditor,
    ScriptedFetcher,
    StartArguments,
    advance_time,
    start_arguments,
    swap_arguments,
)
from support.harness import running
from support.http_app import assert_problem, serve_api


def held(gate: asyncio.Event, data: bytes = b"one") -> tuple[StartArguments, InMemoryUpload]:
    """A start whose upload cannot be read before the gate opens."""
    file = InMemoryUpload(data, gate)
    return start_arguments(uploads=[file]), file


# --- reservations -----------------------------------------------------------------------------------------


async def test_a_start_whose_credit_is_reserved_by_another_waits_for_it_and_reads_nothing() -> None:
    backend, gate = InMemoryBackend(credits=1, line=ForwardingLog), asyncio.Event()
    first_wish, first_file = held(gate)
    first = asyncio.create_task(backend.start(first_wish))
    await first_file.awaited.wait()
    others = [held(gate) for _ in range(5)]
    waiting = [asyncio.create_task(backend.start(each)) for each, _ in others]
    done, _ = await asyncio.wait(waiting, timeout=0.05)
    assert not done
    gate.set()
    assert isinstance(await first, Snapshot)
    for each in waiting:
        with pytest.raises(InsufficientCredit):
            await each
    assert not any(file.awaited.is_set() for _, file in others)


async def test_a_refused_start_releases_its_reservation() -> None:
    backend, gate = InMemoryBackend(credits=1), asyncio.Event()
    bad, file = held(gate, b"bad")
    refused = asyncio.create_task(backend.start(bad))
    await file.awaited.wait()
    next_one = asyncio.create_task(backend.start())
    gate.set()
    with pytest.raises(InvalidImage):
        await refused
    assert isinstance(await next_one, Snapshot)
    assert await backend.workflow.credit("ada") == 0


async def test_a_start_waits_a_bounded_time_for_others_and_is_then_refused_with_retry_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "WAIT", 0.05)
    backend, gate = InMemoryBackend(credits=1), asyncio.Event()
    slow, file = held(gate)
    first = asyncio.create_task(backend.start(slow))
    await file.awaited.wait()
    with pytest.raises(Overloaded):
        await backend.start()
    gate.set()
    await first


async def test_reservations_are_separate_per_user() -> None:
    backend, gate = InMemoryBackend(credits=1), asyncio.Event()
    slow, file = held(gate)
    first = asyncio.create_task(backend.start(slow))
    await file.awaited.wait()
    assert isinstance(await backend.start(user_id="bob"), Snapshot)
    gate.set()
    await first


async def test_per_user_slots_are_reserved() -> None:
    backend, gate = InMemoryBackend(max_per_user=2, line=ForwardingLog), asyncio.Event()
    starts = [held(gate) for _ in range(4)]
    tasks = [asyncio.create_task(backend.start(each)) for each, _ in starts]
    for _, file in starts[:2]:
        await file.awaited.wait()
    assert not any(file.awaited.is_set() for _, file in starts[2:])
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Snapshot, Snapshot, TooManyGenerations, TooManyGenerations]


async def test_queue_slots_are_reserved_and_free_workers_are_used() -> None:
    gate = asyncio.Event()
    async with InMemoryBackend(max_waiting=1).open() as backend:
        starts = [held(gate) for _ in range(2)]
        tasks = [asyncio.create_task(backend.start(each, user_id=f"user{n}")) for n, (each, _) in enumerate(starts)]
        await starts[0][1].awaited.wait()
        assert not starts[1][1].awaited.is_set()
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await backend.settled()
    assert [type(result) for result in results] == [Snapshot, Snapshot]


async def test_a_repeat_waits_for_the_first_request_and_not_for_reservations() -> None:
    backend, gate = InMemoryBackend(credits=1), asyncio.Event()
    slow, file = held(gate)
    first = asyncio.create_task(backend.start(slow, key="k"))
    await file.awaited.wait()
    repeats = [asyncio.create_task(backend.start(held(gate)[0], key="k")) for _ in range(3)]
    other = asyncio.create_task(backend.start(start_arguments(uploads=[InMemoryUpload(b"other")]), key="k"))
    gate.set()
    begun = await first
    assert {(await each).generation_id for each in repeats} == {begun.generation_id}
    with pytest.raises(IdempotencyMismatch):
        await other


async def test_a_repeat_of_a_refused_request_is_decided_again() -> None:
    backend, gate = InMemoryBackend(), asyncio.Event()
    bad, file = held(gate, b"bad")
    first = asyncio.create_task(backend.start(bad, key="k"))
    await file.awaited.wait()
    repeat = asyncio.create_task(backend.start(key="k"))
    gate.set()
    with pytest.raises(InvalidImage):
        await first
    assert (await repeat).status == "started"


async def test_admission_keeps_no_state_of_finished_starts() -> None:
    backend = InMemoryBackend()
    async with backend.open():
        for number in range(20):
            await backend.start(user_id=f"user{number}", key="k")
        await backend.settled()
    assert not vars(backend.workflow)["_keys"]
    assert not vars(vars(backend.workflow)["admission"])["_reserved"]


# --- starts per minute ------------------------------------------------------------------------------------


async def test_more_starts_than_allowed_per_minute_are_refused_for_this_user_only() -> None:
    async with serve_api(starts_per_minute=3) as api:
        for _ in range(3):
            assert (await api.start()).status_code == 202
        for _ in range(2):
            refused = await api.start()
            assert_problem(refused, 429, "too_many_starts")
            assert 0 < int(refused.headers["retry-after"]) <= 60
        assert (await api.start(headers={"X-User-Id": "bob"})).status_code == 202


async def test_refused_starts_count_against_the_rate_limit_and_repeats_do_not() -> None:
    async with serve_api(starts_per_minute=2) as api:
        first = await api.start(headers={"Idempotency-Key": "k"})
        assert_problem(await api.start(pictures=[b"no picture"]), 415, "unsupported_image_type")
        assert_problem(await api.start(), 429, "too_many_starts")
        for _ in range(5):
            again = await api.start(headers={"Idempotency-Key": "k"})
            assert (again.status_code, again.headers["location"]) == (202, first.headers["location"])


async def test_a_start_over_the_rate_limit_is_refused_before_its_body_is_read() -> None:
    async with serve_api(starts_per_minute=1) as api:
        await api.started()
        answer = await api.raw(
            b"POST /generations/edit HTTP/1.1",
            b"Host: localhost",
            b"Connection: close",
            b"Content-Type: multipart/form-data; boundary=x",
            b"Content-Length: 1000000",
        )
        assert answer.startswith(b"HTTP/1.1 429 ")


async def test_starts_older_than_a_minute_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_quotas, "_MINUTE", 0.2)
    async with serve_api(starts_per_minute=1) as api:
        for number in range(20):
            assert (await api.start(headers={"X-User-Id": f"user{number}"})).status_code == 202
        await api.started()
        assert_problem(await api.start(), 429, "too_many_starts")
        await asyncio.sleep(0.25)
        await api.started()
        for _ in range(20):
            await asyncio.sleep(0.25 / 20)
            await api.start(headers={"X-User-Id": "bob"})
        assert len(vars(api.workflow.images.quotas)["_starts"]) <= 2


# --- stored images ----------------------------------------------------------------------------------------


def kept(backend: InMemoryBackend) -> int:
    return sum(len(picture.data) for picture in backend.images.kept.values())


async def test_stored_bytes_are_counted_as_images_come_and_go() -> None:
    backend, stored = InMemoryBackend(), 0
    async with backend.open():
        whole = await backend.make(swap_arguments())
        assert await backend.stored.quotas.stored("ada") == kept(backend) > 0
        pause = Pause()
        backend.fetcher.acts = [pause]
        cancelled = await backend.start(swap_arguments())
        await pause.reached.wait()
        await backend.cancel(cancelled)
        await backend.settled()
        assert await backend.stored.quotas.stored("ada") == kept(backend)
        backend.fetcher.acts = []
        backend.editor.result = backend.editor.result._replace(data=b"unstorable")
        backend.images.refused = {b"unstorable"}
        await backend.make()
        assert await backend.stored.quotas.stored("ada") == kept(backend)
        with pytest.raises(InvalidImage):
            await backend.start(start_arguments(uploads=[InMemoryUpload(b"good"), InMemoryUpload(b"bad")]))
        stored = kept(backend)
        assert await backend.stored.quotas.stored("ada") == stored
        await backend.workflow.delete("ada", whole.generation_id)
        assert await backend.stored.quotas.stored("ada") == kept(backend) < stored
        assert await backend.stored.quotas.stored("bob") == 0


async def test_beyond_the_limit_starts_are_refused_and_running_work_is_not(tmp_path: Path) -> None:
    async with running(tmp_path, max_stored_per_user=20_000, credits="off") as service, service.phone("ada") as phone:
        first = await service.start()
        await phone.until_over(first)
        assert [name for name, _ in phone.events if name.startswith("generation_")][-1] == "generation_completed"
        assert_problem(await service.post("ada", "edit"), 429, "storage_limit")
        async with service.phone("bob") as other:
            await other.until_over(await service.start("bob"))
        await service.service.leases.drain()
        await service.http.delete(f"/generations/{first}", headers={"X-User-Id": "ada"})
        assert await service.service.images.quotas.stored("ada") == 0
        await phone.until_over(await service.start())


async def test_stored_bytes_are_known_after_a_restart(tmp_path: Path, log_setting: str) -> None:
    images = tmp_path / "images"
    async with running(images, log=log_setting) as service, service.phone("ada") as phone:
        await phone.until_over(await service.start())
        await service.service.leases.drain()
        before = await service.service.images.quotas.stored("ada")
        on_disk = sum(file.stat().st_size for file in images.rglob("*") if file.is_file())
        assert 0 < before <= on_disk
    async with running(images, log=log_setting) as service:
        expected = before if service.service.log.durable else 0
        await service.until_stored("ada", expected)


# --- image URLs that take their time ----------------------------------------------------------------------


async def test_fetching_blocks_no_worker_and_waiting_for_a_worker_does_not_count_against_the_deadline() -> None:
    fetching, editing = Pause(), Pause()
    backend = InMemoryBackend(max_running=1, fetcher=ScriptedFetcher(fetching))
    async with backend.open():
        stuck = [await backend.start(swap_arguments()) for _ in range(5)]
        await fetching.reached.wait()
        quick = await backend.start(user_id="bob")
        await backend.reached(quick.generation_id, "completed")
        assert [(await backend.statuses(each))[-1] for each in stuck] == ["composition"] * 2 + ["started"] * 3
        backend.editor.acts = [editing]
        busy = await backend.start(user_id="bob")
        await editing.reached.wait()
        fetching.released.set()
        while (await backend.leases.count()).waiting < 5:
            await asyncio.sleep(0)
        # They have what they need, and wait for bob's.
        assert [(await backend.statuses(each))[-1] for each in stuck[:2]] == ["composition"] * 2
        assert await backend.cancel(stuck[0]) == "cancelled"
        editing.released.set()
        await backend.settled()
        ends = [(await backend.statuses(each))[-1] for each in (busy, *stuck)]
        assert ends == ["completed", "failed", *["completed"] * 4]
        await backend.check("ada", "bob")
        assert await backend.stored.quotas.stored("ada") + await backend.stored.quotas.stored("bob") == kept(backend)


async def test_waiting_for_a_worker_after_fetching_does_not_count_as_work() -> None:
    pause = Pause()
    backend = InMemoryBackend(max_running=1, editor=ScriptedEditor(pause))
    async with backend.open():
        overdue = await backend.start(user_id="bob")
        await pause.reached.wait()
        pause.reached.clear()
        patient = await backend.start(start_arguments(image_urls=(FACE_URL,)))
        await backend.reached(patient.generation_id, "composition")
        while not (await backend.leases.count()).waiting:
            await asyncio.sleep(0)
        await advance_time(backend.deadline)
        await pause.reached.wait()
        assert (await backend.statuses(overdue))[-1] == "failed"
        pause.released.set()
        await backend.settled()
        assert (await backend.statuses(patient))[-1] == "completed"
        await backend.check("ada", "bob")


async def test_a_failed_fetch_frees_its_slot() -> None:
    backend = InMemoryBackend(max_running=1)

    async def fail(report: object) -> None:
        raise Failure("image_fetch_failed")

    backend.fetcher.acts = [fail]
    async with backend.open():
        begun = [await backend.start(start_arguments(image_urls=(FACE_URL,))) for _ in range(6)]
        await backend.settled()
        assert {(await backend.statuses(each))[-1] for each in begun} == {"failed"}
        await backend.check()


# --- overload ---------------------------------------------------------------------------------------------


async def test_lag_over_the_limit_is_overload_and_a_single_pause_is_not() -> None:
    lag = LoopLag(0.02)
    measuring = asyncio.create_task(lag.run())
    try:
        await asyncio.sleep(0.06)
        time.sleep(0.3)  # noqa: ASYNC251 (the pause)
        await asyncio.sleep(0.12)
        assert not lag.overloaded
        async with asyncio.timeout(20):
            while not lag.overloaded:
                time.sleep(0.1)  # noqa: ASYNC251 (the load)
                await asyncio.sleep(0)
            while lag.overloaded:
                await asyncio.sleep(0.01)
    finally:
        measuring.cancel()


async def test_under_overload_starts_are_refused_and_everything_else_is_served(tmp_path: Path) -> None:
    async with running(tmp_path) as service, service.phone("ada") as phone:
        first = await service.post("ada", "edit", key="k")
        external = await service.http.post(
            "/generations/edit?runner=external", files=[("prompt", (None, "x"))], headers={"X-User-Id": "ada"}
        )
        lag: Any = service.service.lag
        lag.overloaded = True
        refused = await service.post("ada", "edit")
        assert_problem(refused, 503, "overloaded")
        assert (await service.post("ada", "edit", key="k")).headers["location"] == first.headers["location"]
        path = external.headers["location"]
        report = await service.http.post(
            f"{path}/transitions", json={"status": "composition"}, headers={"X-User-Id": "ada"}
        )
        assert report.status_code == 200
        cancelled = await service.http.post(f"{path}/cancel", headers={"X-User-Id": "ada"})
        assert cancelled.json() == {"outcome": "cancelled"}
        lag.overloaded = False
        await phone.until_over(first.json()["generationId"], await service.start())
