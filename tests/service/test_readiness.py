"""Ready means that the service can take a start: each part fails for real, is named, and works again by itself."""

import asyncio
import os
import re
import sqlite3
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from adapters.images.folder import ImageFolder
from adapters.memory.leases import MemoryLeases
from adapters.memory.log import MemoryLog
from adapters.memory.quotas import MemoryQuotas
from adapters.system import now
from domain.errors import LogUnavailable
from domain.housekeeping import Housekeeping
from domain.ports.log import Deliver
from domain.stored_images import StoredImages
from support.builders import memory_storage
from support.documents import ROOT
from support.doubles import ForwardingLog
from support.harness import JSON, Running, running

#: Seconds in which a failure has to show.
SOON = 6


async def ready(service: Running) -> tuple[int, JSON]:
    answer = await service.http.get("/health/ready")
    return answer.status_code, answer.json()


async def until(service: Running, status: int) -> JSON:
    async with asyncio.timeout(SOON):
        while (answer := await ready(service))[0] != status:
            await asyncio.sleep(0.05)
        return answer[1]


async def fails_with(service: Running, code: str, part: str) -> None:
    problem = await until(service, 503)
    assert (problem["code"], problem["parts"][part] != "ok") == (code, True), problem


async def test_every_background_task_is_listed(tmp_path: Path) -> None:
    async with running(tmp_path, webhook_url="http://127.0.0.1:9/") as service:
        status, body = await ready(service)
        assert (status, body["status"]) == (200, "ready")
        table = (ROOT / "docs/http.md").read_text().partition("| part | |\n")[2].partition("\n\n")[0]
        names = set(re.findall("`([a-z]+)`", table)) - {"starts", "tail", "heartbeat", "lines", "devices"}
        assert body["parts"].keys() == names
        assert set(body["parts"].values()) == {"ok"}


async def test_a_check_for_stalled_readers_that_fails_is_retried(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        sockets, supervisor = service.service.sockets.eio.sockets, service.service.supervisor
        sockets["broken"] = None  # type: ignore[assignment]
        await service.until(lambda: supervisor.parts["sockets"] == "internal")
        del sockets["broken"]
        await service.until(lambda: supervisor.parts["sockets"] == "ok")


async def test_an_unwritable_image_folder_fails_and_recovers(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    async with running(folder) as service:
        assert (await ready(service))[0] == 200
        before = set(folder.iterdir())
        elsewhere = folder.rename(tmp_path / "elsewhere")
        folder.write_text("in the way")
        await fails_with(service, "storage_failed", "images")
        folder.unlink()
        elsewhere.rename(folder)
        assert (await until(service, 200))["parts"]["images"] == "ok"
        assert set(folder.iterdir()) == before


async def test_a_write_lock_of_another_process_fails_and_recovers(tmp_path: Path) -> None:
    async with running(tmp_path / "images", log=f"sqlite:///{tmp_path}/log.db") as service:
        assert (await ready(service))[0] == 200
        other = sqlite3.connect(tmp_path / "log.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        await fails_with(service, "log_unavailable", "log")
        other.execute("ROLLBACK")
        other.close()
        await until(service, 200)


async def test_a_log_file_that_is_gone_fails(tmp_path: Path) -> None:
    file = tmp_path / "log.db"
    async with running(tmp_path / "images", log=f"sqlite:///{file}") as service:
        assert (await ready(service))[0] == 200
        file.rename(tmp_path / "elsewhere.db")
        await fails_with(service, "log_unavailable", "log")
        file.write_bytes(b"")
        await fails_with(service, "log_unavailable", "log")
        (tmp_path / "elsewhere.db").replace(file)
        await until(service, 200)


async def test_a_stuck_thread_pool_fails_without_using_more_threads(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        release = threading.Event()
        pool = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(pool)
        pool.submit(release.wait)
        try:
            await fails_with(service, "storage_failed", "images")
            await asyncio.sleep(1.1)
            await fails_with(service, "storage_failed", "images")
            assert pool._work_queue.qsize() == 1, "checks pile up"
        finally:
            release.set()
        await until(service, 200)


class Unfollowed(ForwardingLog):
    """A log that cannot be followed."""

    broken = True

    def follow(self, deliver: Deliver) -> AbstractAsyncContextManager[None]:
        return self._follow(deliver)

    @asynccontextmanager
    async def _follow(self, deliver: Deliver) -> AsyncIterator[None]:
        if self.broken:
            raise LogUnavailable
        async with self.inner.follow(deliver):
            yield


async def test_a_log_that_cannot_be_followed_fails_and_recovers_without_missing_events(tmp_path: Path) -> None:
    log = Unfollowed(MemoryLog(epoch="e1", credits=100, clock=now))
    async with running(tmp_path, overrides={"storage": memory_storage(log)}) as service, service.phone("ada") as phone:
        await fails_with(service, "unavailable", "follower")
        generation_id = await service.start()
        log.broken = False
        assert (await until(service, 200))["parts"]["follower"] == "ok"
        await phone.until_over(generation_id)


class Unclaimed(MemoryLeases):
    """Leases that nothing can be claimed from."""

    broken = True

    async def claim(self, *, fetching: bool = False) -> str:
        if self.broken:
            raise OSError
        return await super().claim(fetching=fetching)


async def test_a_runner_that_cannot_claim_work_fails_and_recovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leases = Unclaimed()
    async with (
        running(tmp_path, overrides={"storage": memory_storage(leases=leases)}) as service,
        service.phone("ada") as phone,
    ):
        await fails_with(service, "unavailable", "runner")
        generation_id = await service.start()
        leases.broken = False
        await until(service, 200)
        await phone.until_over(generation_id)
        assert [record.getMessage() for record in caplog.records if record.name == "domain.supervisor"] == [
            "runner fails with storage_failed (OSError) and is tried again",
            "runner works again",
        ]


async def test_concurrent_readiness_requests_share_one_check(tmp_path: Path) -> None:
    class Counting(ImageFolder):
        checks = 0

        async def probe(self) -> None:
            self.checks += 1
            await super().probe()

    images = Counting(tmp_path, log="memory", epoch="e1")
    async with running(tmp_path, overrides={"images": images}) as service:
        began = asyncio.get_running_loop().time()
        for _ in range(5):
            assert {status for status, _ in await asyncio.gather(*(ready(service) for _ in range(20)))} == {200}
        assert images.checks <= 1 + int(asyncio.get_running_loop().time() - began)


async def test_files_of_a_killed_check_are_swept(tmp_path: Path) -> None:
    left = tmp_path / f".probe-{'0' * 16}"
    left.write_bytes(bytes(4096))
    os.utime(left, (0, 0))
    log = MemoryLog(epoch="e1", credits=None, clock=now)
    images = StoredImages(ImageFolder(tmp_path, log="memory", epoch="e1"), MemoryQuotas())
    await Housekeeping(log, log, images).sweep(now=now())
    assert not left.exists()
