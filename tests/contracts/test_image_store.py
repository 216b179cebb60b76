"""The contract of `domain.ports.images.ImageStore`: every adapter of it passes this suite."""

import asyncio
import errno
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from adapters.images.folder import ImageFolder
from adapters.s3.images import S3Images
from adapters.system import now
from domain.errors import Failure
from domain.ports.images import ImageStore, Picture, original_name, thumbnail_name
from support.s3 import S3

PNG = Picture(b"the bytes of a PNG", "image/png")
ID, OTHER_ID = "edit_1763829000123_k3v9x2ab4c6d8e0f", "gen_1763829000124_0000000000000000"


def folder(path: Path) -> ImageFolder:
    """A folder as it is usually found: with the mark of a memory log that has ended."""
    path.mkdir(exist_ok=True)
    (path / ".stagecast").write_text('{"log": "memory", "epoch": "e0"}\n')
    return ImageFolder(path, log="memory", epoch="e1")


def soon() -> datetime:
    return datetime.now(UTC) + timedelta(minutes=1)


@pytest.fixture(params=["folder", "shared folder", "s3"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> ImageStore:
    match request.param:
        case "folder":
            return folder(tmp_path / "images")
        case "shared folder":
            return ImageFolder(tmp_path / "images", log="postgresql", epoch="e1", shared=True)
        case _:
            s3: S3 = request.getfixturevalue("s3")
            return await S3Images.open(s3.bucket(), log="postgresql", epoch="e1")


@pytest.mark.parametrize(
    ("media_type", "suffix"), [("image/png", "png"), ("image/jpeg", "jpg"), ("image/webp", "webp")]
)
async def test_a_saved_picture_can_be_loaded(store: ImageStore, media_type: str, suffix: str) -> None:
    saved = Picture(bytes(range(256)), media_type)
    name = await store.save(ID, saved)
    assert await store.load(name) == saved
    assert re.fullmatch(rf"{ID}-[0-9a-f]{{32}}\.{suffix}", name)


async def test_each_save_of_a_picture_has_a_new_name(store: ImageStore) -> None:
    assert len({await store.save(ID, PNG) for _ in range(20)}) == 20


async def test_a_stored_picture_has_a_size_until_it_is_removed(store: ImageStore) -> None:
    name = await store.save(ID, PNG)
    assert await store.size(name) == len(PNG.data)
    await store.discard(name)
    assert [await store.size(each) for each in (name, "", "../secret.png")] == [0, 0, 0]


async def test_a_thumbnail_is_stored_under_its_own_name_as_often_as_asked(store: ImageStore) -> None:
    original = await store.save(ID, PNG)
    name = thumbnail_name(original, 320)
    small = Picture(b"a WebP", "image/webp")
    assert await asyncio.gather(*(store.save(ID, small, name) for _ in range(5))) == [name] * 5
    assert await store.load(name) == small
    assert (await store.load(original), await store.size(name)) == (PNG, 6)
    assert {key: sorted(names) for key, names in (await store.names(older_than=soon())).items()} == {
        ID: [original, name]
    }
    assert original_name(name) == original_name(original) == original
    await store.discard(original)
    assert await store.load(name) == small
    await store.remove(ID)
    assert await store.load(name) is None


async def test_an_unknown_name_loads_nothing(store: ImageStore) -> None:
    assert await store.load(f"{ID}-{'0' * 32}.png") is None
    name = await store.save(ID, PNG)
    assert await store.load(name.replace(".png", ".jpg")) is None
    assert await store.load(name.replace(ID, OTHER_ID)) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "secret.png",
        f"../{ID}-{'0' * 32}.png",
        f"{ID}/../../secret.png",
        f"..%2f{ID}-{'0' * 32}.png",
        f"{ID}-{'0' * 32}.png\n",
        f"{ID}-{'0' * 32}.png\0.jpg",
        f"{ID}-{'0' * 32}.svg",
        f"{ID}-{'A' * 32}.png",
        f"{ID}-{'0' * 31}.png",
        f".{ID}-{'0' * 32}.png.part",
        f"edit_1_{'a' * 5000}-{'0' * 32}.png",
        f"edit_١_a-{'0' * 32}.png",
        "/etc/passwd",
    ],
)
async def test_a_name_of_another_form_loads_nothing(store: ImageStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    await store.save(ID, PNG)
    assert await store.load(name) is None
    await store.discard(name)
    assert (tmp_path / "secret.png").exists()


async def test_discarding_a_picture_keeps_the_others(store: ImageStore) -> None:
    one, other = await store.save(ID, PNG), await store.save(ID, PNG)
    await store.discard(one)
    await store.discard(one)
    assert await store.load(one) is None
    assert await store.load(other) == PNG


async def test_removing_a_generation_removes_all_its_pictures_and_no_others(store: ImageStore) -> None:
    gone = [await store.save(ID, PNG) for _ in range(3)]
    stays = await store.save(OTHER_ID, PNG)
    await store.remove(ID)
    await store.remove(ID)
    assert [await store.load(name) for name in gone] == [None, None, None]
    assert await store.load(stays) == PNG
    assert await store.names(older_than=soon()) == {OTHER_ID: [stays]}


@pytest.mark.parametrize("generation_id", ["", ".", "..", "../images", "*", "edit_1_a/.."])
async def test_removing_an_unknown_generation_removes_nothing(
    store: ImageStore, tmp_path: Path, generation_id: str
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    name = await store.save(ID, PNG)
    await store.remove(generation_id)
    assert await store.load(name) == PNG
    assert (tmp_path / "mine.txt").exists()


async def test_names_are_listed_by_generation_and_age(store: ImageStore) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    assert await store.names(older_than=soon()) == {}
    names = [await store.save(ID, PNG) for _ in range(2)]
    other = await store.save(OTHER_ID, PNG)
    assert await store.names(older_than=before) == {}
    told = await store.names(older_than=soon())
    assert {generation_id: sorted(found) for generation_id, found in told.items()} == {
        ID: sorted(names),
        OTHER_ID: [other],
    }


async def test_concurrent_saves_do_not_interfere(store: ImageStore) -> None:
    async def come_and_go() -> None:
        for _ in range(10):
            name = await store.save(ID, PNG)
            assert await store.load(name) == PNG
            await store.discard(name)

    await asyncio.gather(*(come_and_go() for _ in range(8)))
    assert await store.names(older_than=soon()) == {}


# --- the folder alone ------------------------------------------------------------------------------------


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file() and file.name != ".stagecast"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
async def test_a_full_disk_fails_the_save_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = folder(tmp_path / "images")
    monkeypatch.setattr({"fsync": os, "replace": Path}[step], step, full)
    with pytest.raises(Failure) as failure:
        await store.save(ID, PNG)
    assert failure.value.code == "storage_failed"
    assert str(tmp_path) not in str(failure.value)
    assert files(tmp_path) == []


async def test_a_picture_is_visible_only_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = folder(tmp_path)
    told: list[dict[str, list[str]]] = []
    sync = os.fsync

    def look(descriptor: int) -> None:
        told.append(store._scan(soon().timestamp() - 3600))
        assert all(file.name.startswith(".") for file in files(tmp_path))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    name = await store.save(ID, PNG)
    assert told == [{}]
    assert [file.name for file in files(tmp_path)] == [name]


async def test_the_folder_of_a_generation_goes_with_its_last_picture(tmp_path: Path) -> None:
    store = folder(tmp_path)
    name = await store.save(ID, PNG)
    await store.discard(name)
    assert not (tmp_path / ID).exists()


async def test_a_folder_removed_during_a_save_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another thread discards its last picture just after mkdir has found the folder there."""
    store = folder(tmp_path)
    (tmp_path / ID).mkdir()
    is_dir = Path.is_dir

    def go_first(path: Path) -> bool:
        monkeypatch.undo()
        path.rmdir()
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", go_first)
    assert await store.load(await store.save(ID, PNG)) == PNG


async def test_the_sweep_removes_temporary_files_of_dead_writers_only(tmp_path: Path) -> None:
    store = folder(tmp_path)
    name = await store.save(ID, PNG)
    stale, fresh = (tmp_path / ID / f".{ID}-{digit * 32}.png.part" for digit in "01")
    foreign = [tmp_path / "notes.txt", tmp_path / "my_folder" / "a.png", tmp_path / ID / "notes.txt"]
    for file in (stale, fresh, *foreign):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    hour_ago = (datetime.now(UTC) - timedelta(hours=1)).timestamp()
    for file in (stale, *foreign, tmp_path / ID / name):
        os.utime(file, (hour_ago, hour_ago))
    assert await store.names(older_than=datetime.now(UTC) - timedelta(minutes=30)) == {ID: [name]}
    assert not stale.exists()
    assert all(file.exists() for file in (fresh, *foreign))


async def test_a_probe_of_a_writable_store_succeeds_and_leaves_no_file(store: ImageStore) -> None:
    for _ in range(2):
        await store.probe()
    assert await store.names(older_than=now() + timedelta(hours=1)) == {}


async def test_a_picture_that_cannot_be_read_is_a_failure_of_the_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = folder(tmp_path)
    name = await store.save(ID, PNG)
    (tmp_path / ID / name).unlink()
    (tmp_path / ID / name).mkdir()
    with pytest.raises(Failure, match="storage_failed"):
        await store.load(name)
    assert caplog.messages == [f"a picture of {ID} cannot be read: Is a directory"]
    await store.close()
