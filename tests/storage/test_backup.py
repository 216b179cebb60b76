"""Backups as docs/operations.md describes them: made while the service runs, and restored into a new one."""

import asyncio
import shutil
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from support.harness import JSON, Running, running
from support.postgres import find_program, fresh_database


async def finished(service: Running, count: int) -> dict[str, JSON]:
    """So many generations of ada's that have ended, by id."""
    async with service.phone("ada") as phone:
        await phone.until_over(*[await service.start("ada") for _ in range(count)])
    listed = await service.get("/generations?limit=100")
    return {each["generationId"]: each for each in listed["generations"]}


async def run_program(*arguments: Any) -> None:
    process = await asyncio.create_subprocess_exec(*map(str, arguments), stderr=subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


async def are_restored(service: Running, expected: dict[str, JSON], count: int, position: str, later: str) -> None:
    """What was in the backup is there with its pictures; a cursor from after it is not usable, and work goes on."""
    for generation_id, generation in expected.items():
        assert await service.get(f"/generations/{generation_id}") == generation
        name = generation["editedImageUrl"].rpartition("/")[2]
        assert (await service.http.get(f"/images/{name}")).status_code == 200
    assert (await service.get(f"/events?after={position}"))["recovered"] is True
    assert (await service.get(f"/events?after={later}"))["recovered"] is False
    assert len(await finished(service, 1)) == count + 1


async def test_a_log_in_sqlite_is_backed_up_while_it_is_written_and_restored(tmp_path: Path) -> None:
    log, images = tmp_path / "log.db", tmp_path / "images"
    same: dict[str, Any] = {"public_url": "http://localhost:3000", "credits": "off"}
    copy, pictures = tmp_path / "backup" / "log.db", tmp_path / "backup" / "images"
    copy.parent.mkdir()
    sqlite = shutil.which("sqlite3")
    if sqlite is None:
        pytest.skip("needs sqlite3: install it")
    async with running(images, log=f"sqlite:///{log}", **same) as service:
        expected = await finished(service, 2)
        position = (await service.get("/events"))["cursor"]
        writing = asyncio.create_task(finished(service, 3))
        await run_program(sqlite, log, f".backup {copy}")
        await writing
        later = (await service.get("/events"))["cursor"]
        shutil.copytree(images, pictures)  # After the log: what the log names is there.
        whole = await service.get("/generations?limit=100")
    async with running(pictures, log=f"sqlite:///{copy}", **same) as service:
        await service.service.leases.drain()
        # The backup is of one moment: of those that ran, as many as had begun.
        begun = (await service.get("/generations?limit=100"))["generations"]
        assert {each["generationId"] for each in begun} <= {each["generationId"] for each in whole["generations"]}
        assert expected.keys() <= {each["generationId"] for each in begun}
        await are_restored(service, expected, len(begun), position, later)


async def test_a_log_in_postgresql_is_dumped_while_nodes_run_and_restored(tmp_path: Path) -> None:
    images, dump = tmp_path / "images", tmp_path / "log.dump"
    same: dict[str, Any] = {"public_url": "http://localhost:3000", "credits": "off"}
    programs = [find_program(name) for name in ("pg_dump", "pg_restore")]
    if None in programs:
        pytest.skip("needs pg_dump and pg_restore: install PostgreSQL's client")
    async with AsyncExitStack() as stack:
        url, restored = [await stack.enter_async_context(fresh_database()) for _ in range(2)]
        async with running(images, log=url, **same) as service:
            expected = await finished(service, 2)
            position = (await service.get("/events"))["cursor"]
            await run_program(programs[0], "--format=custom", "--schema=stagecast", "--file", dump, url)
            await finished(service, 1)
            later = (await service.get("/events"))["cursor"]
        await run_program(programs[1], "--clean", "--if-exists", "--no-owner", "--dbname", restored, dump)
        async with running(images, log=restored, **same) as service:
            await are_restored(service, expected, len(expected), position, later)
