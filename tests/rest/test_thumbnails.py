"""`GET /images/<name>?width=`: thumbnails over HTTP, and what becomes of them in the image folder."""

import asyncio
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from PIL import Image

from adapters.images.intake import PillowIntake
from adapters.memory.quotas import MemoryQuotas
from domain.housekeeping import Housekeeping
from domain.ports.images import Content, Picture
from domain.stored_images import StoredImages
from domain.thumbnails import Thumbnails
from support.doubles import InMemoryBackend, InMemoryImages, TrustingIntake, png
from support.harness import Running, running
from support.http_app import PNG, Api, assert_problem

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOLDER: Final[list[Path]] = []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    FOLDER[:] = [tmp_path_factory.mktemp("images")]
    async with running(FOLDER[0], credits="off") as service:
        yield service


async def finished(service: Running, user: str) -> tuple[str, str]:
    """A finished generation, and the path of its composition."""
    generation_id = await service.start(user)
    await service.service.leases.drain()
    url = (await service.get(f"/generations/{generation_id}", user))["compositionUrl"]
    return generation_id, url[url.index("/images/") :]


def files(generation_id: str) -> list[str]:
    return sorted(file.name for file in (FOLDER[0] / generation_id).glob("*"))


async def test_a_thumbnail_is_made_once_and_has_the_headers_of_the_image(service: Running, eve: str) -> None:
    generation_id, path = await finished(service, eve)
    original = await service.http.get(path)
    before = files(generation_id)
    for width, height in ((320, 453), (640, 905)):
        answers = [await service.http.get(f"{path}?width={width}") for _ in range(2)]
        assert answers[0].content == answers[1].content
        assert Image.open(BytesIO(answers[0].content)).size == (width, height)
        assert answers[0].headers["content-type"] == "image/webp"
        for header in ("cache-control", "content-disposition", "x-content-type-options", "vary"):
            assert answers[0].headers[header] == original.headers[header]
        head = await service.http.head(f"{path}?width={width}")
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(answers[0].content)))
    name = path.rpartition("/")[2]
    assert set(files(generation_id)) - set(before) == {f"{name}.320.webp", f"{name}.640.webp"}
    assert (await service.http.get(path)).content == original.content
    assert_problem(await service.http.get(f"{path}.320.webp"), 404, "not_found")


@pytest.mark.parametrize(
    "width", ["", "0", "-320", "321", "1280", "320.0", "0320", "+320", " 320", "3e2", "abc", "320,640"]
)
async def test_any_other_width_is_refused(service: Running, width: str) -> None:
    for name in ("nothing.png", f"edit_1_a-{'0' * 32}.png"):
        answer = await service.http.get(f"/images/{name}", params={"width": width})
        problem = assert_problem(answer, 422, "invalid_request")
        assert [error["field"] for error in problem["errors"]] == ["width"]
        assert_problem(await service.http.get(f"/images/{name}?width=320"), 404, "not_found")


async def test_requests_at_once_make_one_thumbnail(service: Running, eve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = await finished(service, eve)
    made = list[int]()
    make = PillowIntake.thumbnail

    async def counted(self: PillowIntake, content: Content, width: int) -> Picture:
        made.append(width)
        return await make(self, content, width)

    monkeypatch.setattr(PillowIntake, "thumbnail", counted)
    answers = await asyncio.gather(*(service.http.get(f"{path}?width=320") for _ in range(12)))
    assert len({answer.content for answer in answers}) == 1
    assert made == [320]


async def test_a_deleted_generation_has_no_thumbnails_and_they_no_longer_count(service: Running, eve: str) -> None:
    generation_id, path = await finished(service, eve)
    before = await service.service.images.quotas.stored(eve)
    small = (await service.http.get(f"{path}?width=640")).content
    assert await service.service.images.quotas.stored(eve) == before + len(small)
    deleted = await service.http.delete(f"/generations/{generation_id}", headers={"X-User-Id": eve})
    assert deleted.status_code == 204
    assert not (FOLDER[0] / generation_id).exists()
    assert_problem(await service.http.get(f"{path}?width=640"), 404, "not_found")
    assert await service.service.images.quotas.stored(eve) == 0


@pytest.mark.parametrize("content", [b"", b"no image", PNG], ids=["empty", "text", "cut off"])
async def test_a_damaged_image_has_no_thumbnail_and_the_reason_is_given(
    service: Running, eve: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    generation_id, path = await finished(service, eve)
    (FOLDER[0] / generation_id / path.rpartition("/")[2]).write_bytes(content)
    assert_problem(await service.http.get(f"{path}?width=320"), 503, "storage_failed")
    assert "Traceback" not in caplog.text
    assert not [name for name in files(generation_id) if name.endswith(".webp")]


async def test_a_thumbnail_that_cannot_be_stored_is_shown(api_app: Api) -> None:
    await api_app.started()
    (name,) = api_app.images.kept
    api_app.images.full = True
    answer = await api_app.client.get(f"/images/{name}?width=320")
    assert (answer.status_code, answer.content) == (200, b"320 wide: " + PNG)
    assert list(api_app.images.kept) == [name]
    api_app.images.full = False
    assert (await api_app.client.get(f"/images/{name}?width=320")).content == answer.content
    assert list(api_app.images.kept) == [name, f"{name}.320.webp"]


# --- removal -------------------------------------------------------------------------------------------------


class SlowRemoval(InMemoryImages):
    """Removes the folder of a generation file by file, and other tasks run between them."""

    def __init__(self) -> None:
        super().__init__()
        self.removing = asyncio.Event()
        self.go_on = asyncio.Event()

    async def remove(self, generation_id: str) -> None:
        found = [name for name in self.kept if name.startswith(f"{generation_id}-")]
        self.removing.set()
        await self.go_on.wait()
        for name in found:
            self.kept.pop(name, None)


class GatedIntake(TrustingIntake):
    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.released = asyncio.Event()

    async def thumbnail(self, content: Content, width: int) -> Picture:
        made = await super().thumbnail(content, width)
        self.reached.set()
        await self.released.wait()
        return made


@pytest.mark.parametrize("when", ["before it is stored", "while it is stored"])
@pytest.mark.parametrize("what", ["generation", "picture"])
async def test_a_removal_leaves_no_thumbnail_that_is_being_made(when: str, what: str) -> None:
    store, intake = SlowRemoval(), GatedIntake()
    images = StoredImages(store, MemoryQuotas())
    name = await images.save("edit_1_a", png("a"), user_id="ada")
    making = asyncio.create_task(Thumbnails(images, intake).load(name, 320))
    await intake.reached.wait()
    if what == "picture":
        await images.discard(name)
        intake.released.set()
        await making
    else:
        removing = asyncio.create_task(images.remove("edit_1_a"))
        await store.removing.wait()
        first, second = (
            (store.go_on, intake.released) if when == "before it is stored" else (intake.released, store.go_on)
        )
        first.set()
        await (removing if first is store.go_on else making)
        second.set()
        await asyncio.gather(removing, making)
    assert store.kept == {}
    assert await images.quotas.stored("ada") == 0


async def test_a_sweep_keeps_the_thumbnails_of_needed_pictures_and_no_others() -> None:
    backend = InMemoryBackend()
    async with backend.open():
        done = await backend.make()
        thumbnails = Thumbnails(backend.stored, TrustingIntake())
        for name in list(backend.images.kept):
            await thumbnails.load(name, 320)
        needed = dict(backend.images.kept)
        stray = await backend.images.save(done.generation_id, png("of a stage that was lost"))
        await thumbnails.load(stray, 320)
        lost = await backend.images.save(done.generation_id, png("gone"))
        await backend.images.save(done.generation_id, png("of a picture that is gone"), f"{lost}.640.webp")
        await backend.images.discard(lost)
        unknown = await backend.images.save("edit_1_0000000000000000", png("of a start that was lost"))
        await thumbnails.load(unknown, 320)
        await Housekeeping(backend.log, backend.log, backend.stored).sweep(now=backend.clock())
        assert backend.images.kept == needed
        assert any(name.endswith(".320.webp") for name in needed)


async def test_discarding_a_picture_discards_its_thumbnails() -> None:
    images = StoredImages(InMemoryImages(), MemoryQuotas())
    gone, kept = [await images.save("edit_1_a", png(text), user_id="ada") for text in "ab"]
    thumbnails = Thumbnails(images, TrustingIntake())
    for name in (gone, kept):
        for width in (320, 640):
            await thumbnails.load(name, width)
    await images.discard(gone)
    store: Any = images.store
    assert set(store.kept) == {kept, f"{kept}.320.webp", f"{kept}.640.webp"}
    assert await images.quotas.stored("ada") == sum(len(each.data) for each in store.kept.values())
