"""Stored images as input of another generation: `imageNames`, and the index of the `face`."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from PIL import Image

from support.event_stream import of_generation, open_stream
from support.harness import JSON, Running, running
from support.pictures import BLUE, GREEN, RED, encoded, solid

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNKNOWN = "edit_1763829000123_0000000000000000-00000000000000000000000000000000.png"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    settings: JSON = {"public_url": "https://shop.example/ai", "max_stored_per_user": 2_000_000}
    async with running(tmp_path_factory.mktemp("images"), **settings) as service:
        yield service


async def send(
    service: Running,
    user: str,
    kind: str = "edit",
    *,
    files: tuple[bytes, ...] = (),
    external: bool = True,
    key: str | None = None,
    **fields: Any,
) -> httpx2.Response:
    """Start a generation; a list is a repeated field."""
    parts: list[tuple[str, Any]] = [("images", ("a.png", data)) for data in files]
    for name, given in {"prompt": "a red hat", **fields}.items():
        parts += [(name, (None, value)) for value in (given if isinstance(given, list) else [given])]
    headers = {"X-User-Id": user} | ({"Idempotency-Key": key} if key else {})
    query = "?runner=external" if external else ""
    return await service.http.post(f"/generations/{kind}{query}", files=parts, headers=headers)


async def started(service: Running, user: str, *args: Any, **rest: Any) -> JSON:
    answer = await send(service, user, *args, **rest)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def end(service: Running, user: str, *generations: JSON) -> None:
    for each in generations:
        await service.http.post(f"/generations/{each['generationId']}/cancel", headers={"X-User-Id": user})


async def finished(service: Running, user: str, **rest: Any) -> JSON:
    """One that has ended after it left `started`, so that it keeps its images."""
    generation = await started(service, user, **rest)
    path, headers = f"/generations/{generation['generationId']}", {"X-User-Id": user}
    for status in ("composition", "failed"):
        answer = await service.http.post(f"{path}/transitions", json={"status": status}, headers=headers)
        assert answer.status_code == 200, answer.text
    return await service.get(path, user)


async def until_over(service: Running, user: str, generation: JSON) -> JSON:
    async with open_stream(service, of_generation(generation["generationId"]), user) as stream:
        await stream.rest()
    return await service.get(f"/generations/{generation['generationId']}", user)


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


async def image(service: Running, url: str) -> httpx2.Response:
    return await service.http.get(f"/images/{name_of(url)}")


def refused_field(answer: httpx2.Response) -> str:
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    assert problem["code"] == "invalid_request"
    return str(problem["errors"][0]["field"])


RED_PNG, GREEN_PNG, BLUE_PNG = (solid(colour, (16, 40)).data for colour in (RED, GREEN, BLUE))


@pytest.mark.parametrize(
    "written",
    [
        "{url}",
        "{name}",
        "{url}?width=320",
        "{name}?width=320",
        "{url}#top",
        "/images/{name}",
        "http://other.example/any/path/{name}?a=/b/c",
        "https://shop.example/ai/images/" + "%65" + "{rest}",
        '["{url}"]',
    ],
)
async def test_an_own_image_is_named_by_its_url_or_the_last_segment_of_it(
    service: Running, eve: str, written: str
) -> None:
    source = await started(service, eve, files=(RED_PNG,))
    [url] = source["input"]["images"]
    assert url.startswith("https://shop.example/ai/images/edit_")
    text = written.format(url=url, name=name_of(url), rest=name_of(url)[1:])
    copy = await started(service, eve, imageNames=text)
    [own] = copy["input"]["images"]
    assert name_of(own).startswith(copy["generationId"])
    original, copied = await image(service, url), await image(service, own)
    assert (copied.status_code, copied.content) == (200, original.content)
    assert copied.headers["content-type"] == original.headers["content-type"]
    await end(service, eve, source, copy)


async def test_files_come_before_names_and_names_before_urls(service: Running, eve: str) -> None:
    source = await started(service, eve, files=(RED_PNG, GREEN_PNG))
    red, green = source["input"]["images"]
    for names in ([green, name_of(red)], f'["{green}", "{name_of(red)}"]'):
        found = await started(service, eve, files=(BLUE_PNG,), imageNames=names, imageUrls="https://a.test/1.png")
        contents = [(await image(service, url)).content for url in found["input"]["images"]]
        originals = [(await image(service, url)).content for url in (green, red)]
        assert contents[1:] == originals
        assert len(set(contents)) == 3
        assert (found["input"]["imageUrls"], found["input"]["face"]) == (["https://a.test/1.png"], 3)
        await end(service, eve, found)
    await end(service, eve, source)


async def test_every_picture_of_a_generation_is_used_as_input(service: Running, eve: str) -> None:
    source = await until_over(service, eve, await started(service, eve, files=(RED_PNG,), external=False))
    urls = [source["compositionUrl"], source["editedImageUrl"]]
    again = await started(service, eve, "generate", imageNames=urls)
    for copy, url in zip(again["input"]["images"], urls, strict=True):
        assert (await image(service, copy)).content == (await image(service, url)).content
    await end(service, eve, again)


async def test_an_image_of_another_user_and_an_unknown_one_are_the_same(service: Running, eve: str) -> None:
    foreign = await started(service, f"not-{eve}", files=(RED_PNG,))
    gone = await started(service, eve, files=(RED_PNG,))
    lost = await started(service, eve, files=(RED_PNG,))
    own = await started(service, eve, files=(RED_PNG,))
    await end(service, eve, gone, lost)  # Both have lost their uploads, and one is deleted as well.
    await service.http.delete(f"/generations/{gone['generationId']}", headers={"X-User-Id": eve})
    name = name_of(own["input"]["images"][0])
    names = [
        foreign["input"]["images"][0],
        name_of(foreign["input"]["images"][0]),
        gone["input"]["images"][0],
        lost["input"]["images"][0],
        UNKNOWN,
        name.upper(),
        name + "/",
        f"../{own['generationId']}/{name}x",
        f"{own['generationId']}%2F{name}",
        f"{name}%00",
        name.replace("-", "-0", 1),
        own["generationId"],
        "https://[not-a-url",
        "🎩",
        "x" * 5_000,
        '[""]',
    ]
    stored = await service.service.images.quotas.stored(eve)
    answers = [await send(service, eve, imageNames=each) for each in names]
    assert {answer.status_code for answer in answers} == {422}
    assert len({answer.content for answer in answers}) == 1
    problem = answers[0].json()
    assert (problem["code"], problem["errors"][0]["field"]) == ("unknown_image", "imageNames.0")
    second = await send(service, eve, files=(RED_PNG,), imageNames=[name, foreign["input"]["images"][0]])
    assert second.json()["errors"][0]["field"] == "imageNames.1"
    assert await service.service.images.quotas.stored(eve) == stored
    assert len((await service.get("/generations?status=active", eve))["generations"]) == 1
    await end(service, eve, own)
    await end(service, f"not-{eve}", foreign)


async def test_a_copy_belongs_to_the_new_generation_and_its_key_outlives_the_original(
    service: Running, eve: str
) -> None:
    source = await finished(service, eve, files=(RED_PNG,))
    [url] = source["input"]["images"]
    wanted: JSON = {"imageNames": url, "key": "again"}
    first = await finished(service, eve, **wanted)
    size = len((await image(service, url)).content)
    assert (await service.http.delete(f"/generations/{source['generationId']}", headers={"X-User-Id": eve})).is_success
    assert (await image(service, url)).status_code == 404
    assert len((await image(service, first["input"]["images"][0])).content) == size
    # The key is looked up first, and the name counts however it is written.
    for same in (url, name_of(url), f'["{url}?width=640"]'):
        repeated = await send(service, eve, **{**wanted, "imageNames": same})
        assert (repeated.status_code, repeated.json()) == (202, first)
        assert repeated.headers["location"] == f"/ai/generations/{first['generationId']}"
    for other in (UNKNOWN, "nonsense", [url, url]):
        answer = await send(service, eve, **{**wanted, "imageNames": other})
        assert answer.json()["code"] == "idempotency_mismatch"
    face = await send(service, eve, **wanted, face="0")
    assert face.json()["code"] == "idempotency_mismatch"
    assert (await send(service, eve, **{**wanted, "key": None})).json()["code"] == "unknown_image"


async def test_all_images_together_are_five_at_most(service: Running, eve: str) -> None:
    source = await started(service, eve, files=(RED_PNG,))
    [url] = source["input"]["images"]
    five = await started(
        service, eve, files=(RED_PNG, RED_PNG), imageNames=[url, url], imageUrls="https://a.test/1.png"
    )
    assert len(five["input"]["images"]) == 4
    too_many: list[JSON] = [
        {"files": (RED_PNG, RED_PNG), "imageNames": [url, url], "imageUrls": ["https://a.test/1", "https://a.test/2"]},
        {"imageNames": [url] * 5, "imageUrls": "https://a.test/1"},
    ]
    for fields in too_many:
        assert refused_field(await send(service, eve, **fields)) == "images"
    assert refused_field(await send(service, eve, imageNames=[url] * 6)) == "imageNames"
    for item in ("1", "null", f'["{url}"]'):
        answer = await send(service, eve, imageNames=f"[{item}]")
        assert refused_field(answer) == "imageNames.0"
        assert answer.json()["errors"][0]["message"] == "Input should be a valid string"
    assert refused_field(await send(service, eve, imageNames="[")) == "imageNames"
    none = await send(service, eve, imageNames="", external=False)
    assert refused_field(none) == "images"
    await end(service, eve, source, five)


async def test_copies_count_towards_the_storage_limit(service: Running, eve: str) -> None:
    noise = bytes(range(256)) * 1_800
    picture = encoded(Image.frombytes("RGB", (400, 384), noise))
    source = await started(service, eve, files=(picture,))
    [url] = source["input"]["images"]
    size = await service.service.images.quotas.stored(eve)
    assert size == len((await image(service, url)).content)
    fits = 2_000_000 // size - 1
    copies = []
    while fits >= 5:
        copies.append(await started(service, eve, imageNames=[url] * 5))
        fits -= 5
    answer = await send(service, eve, imageNames=[url] * (fits + 1))
    assert (answer.status_code, answer.json()["code"]) == (429, "storage_limit")
    await end(service, eve, source, *copies)
    assert await service.service.images.quotas.stored(eve) == 0


@pytest.mark.parametrize("face", ["2", "-1", "1.0", "+1", "one", "0x1", " 1", "1_0", "9" * 400, "١"])
async def test_a_face_that_is_no_index_of_an_image_is_refused(service: Running, eve: str, face: str) -> None:
    answer = await send(service, eve, files=(RED_PNG,), imageUrls="https://a.test/1.png", face=face)
    assert refused_field(answer) == "face"


async def test_a_face_without_a_face_swap_and_a_swap_without_a_face_are_refused(service: Running, eve: str) -> None:
    assert refused_field(await send(service, eve, files=(RED_PNG,), face="0", faceSwap="false")) == "face"
    assert refused_field(await send(service, eve, "generate", files=(RED_PNG,), face="0")) == "face"
    assert refused_field(await send(service, eve, files=(RED_PNG,), faceSwap="true")) == "faceSwap"
    empty = await started(service, eve, files=(RED_PNG,), face="")
    assert empty["input"]["faceSwap"] is False
    await end(service, eve, empty)


async def test_a_source_that_is_deleted_meanwhile_is_copied_whole_or_unknown(service: Running, eve: str) -> None:
    sources = [await finished(service, eve, files=(RED_PNG,)) for _ in range(10)]
    seen = set[int]()
    for source in sources:
        url = source["input"]["images"][0]
        path = f"/generations/{source['generationId']}"
        answer, _ = await asyncio.gather(
            send(service, eve, imageNames=[url] * 5), service.http.delete(path, headers={"X-User-Id": eve})
        )
        seen.add(answer.status_code)
        if answer.status_code == 202:
            for copy in answer.json()["input"]["images"]:
                assert (await image(service, copy)).status_code == 200
            await end(service, eve, answer.json())
        else:
            assert answer.json()["code"] == "unknown_image"
    assert seen <= {202, 422}
    assert await service.service.images.quotas.stored(eve) == 0
