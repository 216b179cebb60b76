"""One owner for everything that a process writes to or deletes from: the image folder and the file of the log."""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest

from adapters.images.folder import ImageFolder
from adapters.memory.storage import open_storage
from adapters.sqlite.database import Database
from api.settings import SettingsError, load_settings
from api.wiring import wire
from domain.errors import Failure, LogUnavailable
from domain.ports.images import ImagesRefused, Picture
from domain.ports.storage import StorageOptions, StorageRefused
from support.deployment import Deployment, Life, RetryingClient, parts
from support.harness import PHOTO, running

PNG: Final = Picture(b"the bytes of a PNG", "image/png")
ID: Final = "edit_1763829000123_k3v9x2ab4c6d8e0f"
OLD: Final = f"{ID}-{'0' * 32}.png"


def mark(folder: Path) -> object:
    return json.loads((folder / ".stagecast").read_text())


def later() -> datetime:
    return datetime.now(UTC) + timedelta(minutes=1)


def old_folder(folder: Path, *, log: str | None = None, epoch: str = "e1") -> Path:
    """A folder with one picture, and the mark of such a log."""
    (folder / ID).mkdir(parents=True)
    (folder / ID / OLD).write_bytes(b"old")
    os.utime(folder / ID / OLD, (1, 1))
    if log is not None:
        (folder / ".stagecast").write_text(json.dumps({"log": log, "epoch": epoch}))
    return folder


# --- the image folder ------------------------------------------------------------------------------------


async def test_a_folder_is_marked_with_the_log_and_held_until_it_is_closed(tmp_path: Path) -> None:
    first = ImageFolder(tmp_path / "images", log="sqlite", epoch="e1")
    assert mark(tmp_path / "images") == {"log": "sqlite", "epoch": "e1"}
    (tmp_path / "link").symlink_to("images")
    for name in ("images", "link"):
        with pytest.raises(ImagesRefused, match="is in use by another process"):
            ImageFolder(tmp_path / name, log="sqlite", epoch="e1")
    await first.close()
    await ImageFolder(tmp_path / "link", log="sqlite", epoch="e1").close()


@pytest.mark.parametrize(
    ("log", "epoch", "removable"),
    [(None, "", False), ("memory", "e0", True), ("sqlite", "e1", True)],
    ids=["no mark: kept", "a dead memory log: emptied", "its own: swept"],
)
async def test_old_pictures_are_removable_only_if_the_folder_belongs_to_the_log(
    tmp_path: Path, log: str | None, epoch: str, removable: bool
) -> None:
    folder = old_folder(tmp_path / "images", log=log, epoch=epoch)
    for _ in range(2):  # The second time, the mark is there.
        store = ImageFolder(folder, log="sqlite", epoch="e1")
        assert mark(folder) == {"log": "sqlite", "epoch": "e1"}
        new = await store.save(ID, PNG)
        assert set((await store.names(older_than=later()))[ID]) == ({OLD, new} if removable else {new})
        await store.discard(new)
        await store.close()
        removable = True


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"log": "sqlite", "epoch": "e2"}\n', "belongs to another log"),
        ('{"log": "postgresql", "epoch": "e1"}\n', "belongs to another log"),
        ("{}", "is damaged"),
        ("[1, 2]", "is damaged"),
        ("\0\xff", "is damaged"),
    ],
)
@pytest.mark.parametrize("log", ["memory", "sqlite"])
async def test_a_folder_of_another_durable_log_is_refused_and_left_as_it_was(
    tmp_path: Path, text: str, reason: str, log: str
) -> None:
    folder = old_folder(tmp_path / "images")
    (folder / ".stagecast").write_text(text)
    with pytest.raises(ImagesRefused, match=reason) as refused:
        ImageFolder(folder, log=log, epoch="e1")
    assert "\n" not in str(refused.value)
    assert (folder / ".stagecast").read_text() == text
    assert (folder / ID / OLD).exists()


async def test_nodes_of_one_log_share_a_folder_and_remove_old_pictures_only_by_age(tmp_path: Path) -> None:
    folder = old_folder(tmp_path / "images", log="memory", epoch="e0")
    nodes = [ImageFolder(folder, log="postgresql", epoch="e1", shared=True) for _ in range(3)]
    assert mark(folder) == {"log": "postgresql", "epoch": "e1"}
    name = await nodes[0].save(ID, PNG)
    for node in nodes:
        assert await node.load(name) == PNG
        assert await node.names(older_than=datetime.now(UTC) - timedelta(hours=1)) == {ID: [OLD]}
        await node.probe()
    with pytest.raises(ImagesRefused, match="is in use by another process"):
        ImageFolder(folder, log="postgresql", epoch="e1")
    with pytest.raises(ImagesRefused, match="belongs to another log"):
        ImageFolder(folder, log="postgresql", epoch="e2", shared=True)
    for node in nodes:
        await node.close()
    await ImageFolder(folder, log="postgresql", epoch="e1").close()


async def test_nodes_that_share_a_new_folder_may_start_at_the_same_time(tmp_path: Path) -> None:
    opened = partial(ImageFolder, tmp_path / "images", log="postgresql", epoch="e1", shared=True)
    nodes = await asyncio.gather(*(asyncio.to_thread(opened) for _ in range(8)))
    assert mark(tmp_path / "images") == {"log": "postgresql", "epoch": "e1"}
    for node in nodes:
        await node.probe()
        await node.close()


async def test_a_shared_folder_held_by_a_memory_log_is_not_taken_over_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.images.folder._MARKING", 0.2)
    first = ImageFolder(tmp_path, log="memory", epoch="e1", shared=True)
    with pytest.raises(ImagesRefused, match="is in use by another process"):
        ImageFolder(tmp_path, log="memory", epoch="e2", shared=True)
    await first.close()
    await ImageFolder(tmp_path, log="memory", epoch="e2", shared=True).close()


async def test_a_folder_of_one_node_is_refused_while_others_use_the_log(tmp_path: Path) -> None:
    async def has_other_nodes() -> bool:
        return True

    options = StorageOptions("e1", 100, lambda: datetime.now(UTC), timedelta(days=1))
    storage = replace(await open_storage("memory://", options), has_other_nodes=has_other_nodes)
    with pytest.raises(SettingsError, match="STAGECAST_SHARED_IMAGES=true: other nodes use this log"):
        await wire(load_settings({"images": tmp_path / "own"}), storage=storage)
    assert not (tmp_path / "own").exists()
    made = await wire(load_settings({"images": tmp_path, "shared_images": True}), storage=storage)
    await made.images.close()


async def test_a_file_system_without_locks_is_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(ImagesRefused, match="No locks available"):
        ImageFolder(tmp_path, log="memory", epoch="e1")


def _a_file(path: Path) -> None:
    path.write_text("a file")


def _a_loop(path: Path) -> None:
    path.symlink_to(path)


def _a_mark_that_is_a_link(path: Path) -> None:
    path.mkdir()
    (path / ".stagecast").symlink_to("../victim")


@pytest.mark.parametrize("make", [_a_file, _a_loop, _a_mark_that_is_a_link])
async def test_a_folder_that_cannot_be_used_is_refused_with_a_sentence(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "images")
    with pytest.raises(ImagesRefused, match="cannot be used"):
        ImageFolder(tmp_path / "images", log="memory", epoch="e1")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("replaced", [False, True])
async def test_nothing_is_stored_in_or_removed_from_another_folder_at_the_same_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, replaced: bool
) -> None:
    store = ImageFolder(tmp_path / "images", log="memory", epoch="e1")
    name = await store.save(ID, PNG)
    (tmp_path / "images").rename(tmp_path / "away")
    if replaced:
        old_folder(tmp_path / "images")
    for _ in range(2):
        with pytest.raises(Failure) as failure:
            await store.save(ID, PNG)
        assert failure.value.code == "storage_failed"
        assert await store.names(older_than=later()) == {}
        await store.discard(OLD)
        await store.remove(ID)
    assert (tmp_path / "images" / ID / OLD).exists() is replaced
    assert caplog.text.count("removed or replaced; nothing") == 1
    shutil.rmtree(tmp_path / "images", ignore_errors=True)
    (tmp_path / "away").rename(tmp_path / "images")
    assert await store.load(name) == PNG
    await store.save(ID, PNG)
    await store.close()


async def test_child_processes_do_not_inherit_locks(tmp_path: Path) -> None:
    images, database = ImageFolder(tmp_path, log="memory", epoch="e1"), Database(tmp_path / "log.db", epoch="e1")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:  # noqa: ASYNC220
        await images.close()
        await database.close()
        assert child.poll() is None
        await ImageFolder(tmp_path, log="memory", epoch="e2").close()
        await Database(tmp_path / "log.db", epoch="e1").close()
        child.communicate(b"\n")


# --- two services ----------------------------------------------------------------------------------------


@asynccontextmanager
async def durable(folder: Path) -> AsyncIterator[tuple[Deployment, Life, RetryingClient]]:
    deployment = Deployment(folder)
    async with deployment.serving() as life, RetryingClient.open(deployment.url) as caller:
        yield deployment, life, caller


async def start(caller: RetryingClient) -> str:
    answer = await caller.once("POST", "/generations/edit", "ada", files=parts("x", PHOTO))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["generationId"])


async def completed(caller: RetryingClient, generation_id: str) -> list[str]:
    """Wait for its end; the paths of its pictures."""
    while (found := await caller.get(f"/generations/{generation_id}"))["status"] != "completed":
        await asyncio.sleep(0.01)
    return [found[key].partition("/images/")[2] for key in ("compositionUrl", "editedImageUrl")]


async def refused(life: Life, *words: str) -> None:
    assert await life.ended() == 3, life.lines
    [line] = life.lines
    assert line.startswith("stagecast: The "), line
    assert all(word in line for word in words), line


async def test_a_second_service_on_the_same_folder_or_file_is_refused_and_removes_nothing(tmp_path: Path) -> None:
    async with durable(tmp_path / "service") as (first, life, caller):
        pictures = await completed(caller, await start(caller))
        os.link(first.log, tmp_path / "hard.db")
        (tmp_path / "soft.db").symlink_to(first.log)
        others = {
            "memory://": "The image folder",
            f"sqlite:///{tmp_path}/other.db": "The image folder",
            f"sqlite:///{tmp_path}/hard.db": "by this or another name",
            f"sqlite:///{tmp_path}/soft.db": "The log",
        }
        for log, what in others.items():
            async with Deployment(tmp_path / "service").life(log=log) as second:
                await refused(second, "in use by another process", what)
        for picture in pictures:
            assert (await caller.once("GET", f"/images/{picture}", "ada")).status_code == 200
        life.send(signal.SIGKILL)
        await life.ended()
        async with Deployment(tmp_path / "service").life(log="memory://") as other:
            await refused(other, "belongs to another log")
        async with first.serving():
            for picture in pictures:
                assert (await caller.ask("GET", f"/images/{picture}", "ada")).status_code == 200


@pytest.mark.parametrize(
    "lost",
    [
        "removed",
        pytest.param("replaced", marks=pytest.mark.long),
        pytest.param("cut", marks=pytest.mark.long),
        "wal removed",
    ],
)
async def test_a_log_whose_file_is_lost_refuses_starts_and_logs_it_once(tmp_path: Path, lost: str) -> None:
    async with durable(tmp_path / "service") as (deployment, life, caller):
        generation_id = await start(caller)
        await completed(caller, generation_id)
        wal = deployment.log.with_name("log.db-wal")
        match lost:
            case "removed":
                deployment.log.unlink()
            case "replaced":
                deployment.log.unlink()
                deployment.log.write_bytes(b"")
            case "cut":
                os.truncate(deployment.log, 0)
            case _:
                wal.unlink()
        for _ in range(2):
            answer = await caller.once("POST", "/generations/generate", "ada", files=parts("x", PHOTO))
            assert (answer.status_code, answer.json()["code"]) == (503, "log_unavailable")
            ready = await caller.once("GET", "/health/ready", "ada")
            assert ready.status_code == 503
            if lost != "cut":
                assert (await caller.once("GET", f"/generations/{generation_id}", "ada")).status_code == 200
        said = [line for line in life.lines if "was removed, replaced or cut off" in line]
        assert len(said) == 1, life.lines
        assert str(tmp_path) not in said[0]
        life.send(signal.SIGKILL)
        await life.ended()
    if lost == "wal removed":  # All that was answered is in the file itself.
        async with deployment.serving(), RetryingClient.open(deployment.url) as caller:
            await completed(caller, generation_id)
    elif lost != "cut":
        async with deployment.life() as life:  # Another log: it must not remove the pictures of the lost one.
            await refused(life, "belongs to another log")


async def test_a_file_that_comes_back_is_used_again(tmp_path: Path) -> None:
    async with running(tmp_path / "images", log=f"sqlite:///{tmp_path}/log.db") as service:
        (tmp_path / "log.db").rename(tmp_path / "away.db")
        assert (await service.post("ada", "edit")).status_code == 503
        (tmp_path / "away.db").rename(tmp_path / "log.db")
        await service.start("ada")
        await service.service.leases.drain()


@pytest.mark.parametrize("mode", ["TRUNCATE", "RESTART", "PASSIVE"])
async def test_a_checkpoint_by_another_process_does_not_disturb_the_service(tmp_path: Path, mode: str) -> None:
    async with running(tmp_path / "images", log=f"sqlite:///{tmp_path}/log.db") as service:
        await service.start("ada")
        await service.service.leases.drain()
        with contextlib.closing(sqlite3.connect(tmp_path / "log.db")) as stranger:
            stranger.execute(f"PRAGMA wal_checkpoint({mode})")
        await service.start("ada")
        await service.service.leases.drain()


async def test_a_write_ahead_log_that_is_cut_off_while_it_is_needed_refuses_writes(tmp_path: Path) -> None:
    database = Database(tmp_path / "log.db", epoch="e1")
    insert = "INSERT INTO users (user_id, head, floor, floor_id) VALUES (?, 0, 0, 0)"
    await database.write(lambda connection: connection.execute(insert, ("ada",)))
    os.truncate(tmp_path / "log.db-wal", 0)
    with pytest.raises(LogUnavailable):
        await database.write(lambda connection: connection.execute(insert, ("bob",)))
    await database.close()


async def test_an_idle_log_notices_its_lost_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = Database(tmp_path / "log.db", epoch="e1")
    (tmp_path / "log.db").unlink()
    async with asyncio.timeout(10):
        while "was removed, replaced or cut off" not in caplog.text:
            await asyncio.sleep(0.05)
    await database.close()


async def test_a_log_file_has_one_owner_under_any_name(tmp_path: Path) -> None:
    database = Database(tmp_path / "log.db", epoch="e1")
    os.link(tmp_path / "log.db", tmp_path / "hard.db")
    script = (
        "import sys, pathlib; from adapters.sqlite.database import *; Database(pathlib.Path(sys.argv[1]), epoch='e')"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path / "hard.db"), stderr=asyncio.subprocess.PIPE
    )
    _, errors = await child.communicate()
    assert StorageRefused.__name__ in errors.decode()
    await database.close()
    await Database(tmp_path / "hard.db", epoch="e1").close()


@pytest.mark.skipif(os.getuid() != 0, reason="gives up the rights of root")
@pytest.mark.parametrize(
    ("mode", "marked", "code", "sentence"),
    [
        (0o755, False, 2, "STAGECAST_IMAGES must be a folder that can be read and written."),
        (0o333, False, 2, "STAGECAST_IMAGES must be a folder that can be read and written."),
        (0o777, True, 3, "cannot be used: Permission denied."),
    ],
    ids=["owned by somebody else", "cannot be read", "marked by somebody else"],
)
async def test_a_folder_without_the_right_permissions_is_refused_with_a_sentence(
    mode: int, marked: bool, code: int, sentence: str
) -> None:
    with TemporaryDirectory() as name:  # Not below `tmp_path`, which is root's alone.
        deployment = Deployment(Path(name))
        deployment.prelude = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)"
        deployment.images.mkdir()
        if marked:
            (deployment.images / ".stagecast").touch(0o600)
        deployment.images.chmod(mode)
        deployment.folder.chmod(0o755)
        async with deployment.life(log="memory://") as life:
            assert await life.ended() == code
            [line] = life.lines
            assert line.endswith(sentence), line
