"""``stagecast check``: the settings in effect and what is damaged, told without changing anything."""

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from support.command_line import run_main, stagecast
from support.harness import Running, running
from support.postgres import fresh_database
from support.provider_faults import closed_port
from support.s3 import S3

SECRET: Final = "a secret that is long enough for HS256"
PROMPT: Final = "a prompt that nobody may read"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Running]:
    """With one generation that is done."""
    async with running(tmp_path / "images", log=f"sqlite:///{tmp_path}/log.db") as service:
        await service.start("ada", prompt=PROMPT)
        await service.service.leases.drain()
        yield service


def stores(folder: Path) -> dict[str, Any]:
    return {"STAGECAST_LOG": f"sqlite:///{folder}/log.db", "STAGECAST_IMAGES": f"{folder}/images"}


def image(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """All files there, and when and to which size they were written."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
    return {path: (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in files}


async def test_check_of_a_running_service_finds_nothing_and_changes_nothing(service: Running, tmp_path: Path) -> None:
    before = image(tmp_path)
    done = await run_main("check", **stores(tmp_path))
    assert (done.code, done.errors) == (0, "")
    assert done.output.endswith("No damage was found.\n")
    assert image(tmp_path) == before
    await service.start("ada")
    await service.service.leases.drain()


async def test_check_of_missing_files_creates_nothing(tmp_path: Path) -> None:
    done = await run_main("check", **stores(tmp_path))
    assert done.code == 0
    assert image(tmp_path) == {}


async def test_check_prints_the_settings_in_effect_without_their_secrets(tmp_path: Path) -> None:
    secrets: dict[str, Any] = {
        "STAGECAST_JWT_SECRET": SECRET,
        "STAGECAST_WEBHOOK_URL": "https://hook:s3cr@t@example.com/x?token=t0k3n&a=1",
        "STAGECAST_WEBHOOK_SECRET": f"whsec_{'A' * 40}",
        "OPENAI_API_KEY": "sk-very-secret",
        "OPENAI_BASE_URL": "http://s3cret@127.0.0.1:1/v1",
        "REPLICATE_API_TOKEN": "r8_very-secret",
    }
    done = await run_main("check", "--port", "4000", STAGECAST_CREDITS="off", **secrets, **stores(tmp_path))
    assert done.code == 0, done.errors
    sent = dict(line.split(maxsplit=1) for line in done.output.splitlines() if "_" in line.partition(" ")[0])
    assert (sent["STAGECAST_PORT"], sent["STAGECAST_CREDITS"], sent["STAGECAST_DRAIN"]) == ("4000", "off", "25")
    assert sent["STAGECAST_OPENAI_MODEL"] == "gpt-image-2.5-flare"
    assert (sent["STAGECAST_JWKS_URL"], sent["STAGECAST_MAX_SOCKETS_PER_USER"]) == ("none", "off")
    assert sent["STAGECAST_PUBLIC_URL"] == "http://localhost:4000"
    assert sent["STAGECAST_WEBHOOK_URL"] == "https://hook:********@example.com/x?token=********&a=1"
    for name in ("STAGECAST_JWT_SECRET", "STAGECAST_WEBHOOK_SECRET", "OPENAI_API_KEY", "REPLICATE_API_TOKEN"):
        assert sent[name] == "********"
    for secret in (SECRET, "s3cr", "t0k3n", "AAAA", "very-secret"):
        assert secret not in done.output + done.errors


async def test_check_exits_with_1_and_lists_damaged_generations_and_disputed_credit(
    service: Running, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "log.db")) as stranger:
        [(generation_id, event)] = stranger.execute(
            "SELECT generation_id, event FROM generations JOIN events ON generation = generations.id WHERE sequence = 2"
        ).fetchall()
        stranger.execute("UPDATE events SET event = x'7b' WHERE sequence = 2")
        stranger.commit()
        before = image(tmp_path)
        done = await run_main("check", **stores(tmp_path))
        assert (done.code, done.errors) == (1, "stagecast: damage was found: 1 finding.\n")
        assert f"generation {generation_id} of user ada is damaged; a person has to decide" in done.output
        assert PROMPT not in done.output
        assert image(tmp_path) == before
        stranger.execute("UPDATE events SET event = ? WHERE sequence = 2", (event,))
        stranger.commit()
    assert (await run_main("check", **stores(tmp_path))).code == 0


async def test_check_exits_with_2_for_an_invalid_setting() -> None:
    assert "STAGECAST_PORT" in (await run_main("check", STAGECAST_PORT="http")).sentence(2)
    done = await run_main("check", OPENAI_API_KEY="not a key")
    assert (done.code, "OPENAI_API_KEY must be" in done.errors, "not a key" in done.errors) == (2, True, False)


@pytest.mark.parametrize("what", ["no log", "a folder", "another log's folder"])
async def test_check_exits_with_3_if_a_store_cannot_be_opened(tmp_path: Path, what: str) -> None:
    if what == "no log":
        (tmp_path / "log.db").write_text("a text file that is longer than the header of an SQLite file" * 10)
    elif what == "a folder":
        (tmp_path / "log.db").mkdir()
    else:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / ".stagecast").write_text('{"log": "sqlite", "epoch": "e9"}\n')
    done = await run_main("check", **stores(tmp_path))
    assert done.code == 3
    assert done.errors.count("\n") == 1


async def test_check_reads_the_files_of_a_killed_service(tmp_path: Path) -> None:
    (tmp_path / "left").mkdir()
    async with running(tmp_path / "images", log=f"sqlite:///{tmp_path}/log.db") as service:
        await service.start("ada")
        await service.service.leases.drain()
        for name in ("log.db", "log.db-wal"):
            shutil.copy(tmp_path / name, tmp_path / "left" / name)
    left = image(tmp_path / "left")
    assert (await run_main("check", **stores(tmp_path / "left"))).code == 0
    assert image(tmp_path / "left") == left


async def test_check_reads_a_log_in_postgresql_and_images_in_s3_beside_a_running_service(s3: S3) -> None:
    images = s3.bucket()
    async with fresh_database() as url, running(images, log=url) as service:
        async with service.phone("ada") as phone:
            await phone.until_over(await service.start("ada", prompt=PROMPT))
        stored = await service.get("/generations")
        done = await run_main("check", STAGECAST_LOG=url, STAGECAST_IMAGES=images)
        assert (done.code, done.errors) == (0, "")
        assert done.output.endswith("No damage was found.\n")
        assert await service.get("/generations") == stored
    async with fresh_database("e2") as other, running(s3.bucket(), log=other):
        refused = await run_main("check", STAGECAST_LOG=other, STAGECAST_IMAGES=images)
        assert (refused.code, "another log" in refused.errors) == (3, True)


@pytest.mark.long
async def test_check_of_a_bucket_out_of_reach_exits_with_3(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    with closed_port() as port:
        unreachable: dict[str, Any] = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "id"}
        unreachable |= {"AWS_SECRET_ACCESS_KEY": "secret", "STAGECAST_IMAGES": "s3://bucket/prefix"}
        # Several: a thread of the client that outlives Python aborts the process only now and then.
        for done in await asyncio.gather(*(stagecast("check", folder=tmp_path, **unreachable) for _ in range(3))):
            assert (done.code, "the service cannot be reached" in done.errors) == (3, True), done
