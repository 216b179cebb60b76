"""What a generation was asked for is in its record: `input`, and the images that were uploaded with it."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from domain.housekeeping import Housekeeping
from domain.webhooks import message_of
from support.doubles import Pause, ScriptedEditor
from support.event_stream import of_generation, open_stream
from support.harness import JSON, PHOTO, Running, running
from support.wire import Wire

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: Each character has four bytes in UTF-8, so that this is the longest prompt on the wire.
LONG_PROMPT = "🎩" * 4_000
DEFAULTS: JSON = {"imageUrls": [], "quality": "auto", "background": "auto", "aspectRatio": "2:3"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("images")) as service:
        yield service


async def started(service: Running, user: str, kind: str = "edit", **rest: object) -> JSON:
    """The snapshot in the answer."""
    answer = await service.post(user, kind, **rest)  # type: ignore[arg-type]
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def external(service: Running, user: str, kind: str = "edit", files: int = 1, **fields: str) -> JSON:
    """A generation that stays at `started`."""
    parts = [("images", (f"{n}.jpg", PHOTO)) for n in range(files)]
    texts = [(name, (None, value)) for name, value in {"prompt": "a red hat", **fields}.items()]
    path = f"/generations/{kind}?runner=external"
    answer = await service.http.post(path, files=[*parts, *texts], headers={"X-User-Id": user})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def post(service: Running, path: str, user: str) -> JSON:
    return dict((await service.http.post(path, headers={"X-User-Id": user})).json())


async def until_over(service: Running, user: str, generation: JSON) -> None:
    async with open_stream(service, of_generation(generation["generationId"]), user) as stream:
        await stream.rest()


async def test_the_first_event_and_the_snapshots_over_http_have_the_input(service: Running, eve: str) -> None:
    async with service.phone(eve) as phone:
        accepted = await started(service, eve, images=2, quality="high", inputFidelity="low")
        generation_id = accepted["generationId"]
        await phone.until_over(generation_id)
        live = phone.of(generation_id)
    found = accepted["input"]
    assert found == {
        **DEFAULTS,
        "prompt": "a red hat",
        "images": found["images"],
        "quality": "high",
        "inputFidelity": "low",
        "faceSwap": False,
    }
    assert len(set(found["images"])) == 2
    for url in found["images"]:
        image = await service.http.get(url.replace(url.partition("/images/")[0], service.url))
        assert image.status_code == 200
        assert image.headers["content-type"] == "image/jpeg"
    assert [event.get("input") for event in live] == [found] + [None] * (len(live) - 1)
    assert await service.events(generation_id, eve) == live
    [listed] = (await service.get("/generations", eve))["generations"]
    assert listed == await service.get(f"/generations/{generation_id}", eve)
    assert listed["input"] == found


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("generate", {}, {}),
        ("generate", {"imageUrls": "https://a.test/1.png"}, {"imageUrls": ["https://a.test/1.png"]}),
        ("edit", {}, {"faceSwap": False}),
        (
            "edit",
            {"imageUrls": '["https://a.test/1.png","https://a.test/2.png"]'},
            {"imageUrls": ["https://a.test/1.png", "https://a.test/2.png"], "faceSwap": True, "face": 1},
        ),
        (
            "edit",
            {"imageUrls": "https://a.test/1.png", "faceSwap": "false"},
            {"imageUrls": ["https://a.test/1.png"], "faceSwap": False},
        ),
        ("edit", {"face": "0"}, {"faceSwap": True, "face": 0}),
        (
            "edit",
            {"imageUrls": '["https://a.test/1.png","https://a.test/2.png"]', "face": "2", "faceSwap": "true"},
            {"imageUrls": ["https://a.test/1.png", "https://a.test/2.png"], "faceSwap": True, "face": 2},
        ),
        (
            "generate",
            {"background": "opaque", "aspectRatio": "3:2", "inputFidelity": "high", "metadata": '{"a":1}'},
            {"background": "opaque", "aspectRatio": "3:2", "inputFidelity": "high"},
        ),
    ],
)
async def test_the_input_is_what_was_asked_for(
    service: Running, eve: str, kind: str, fields: JSON, expected: JSON
) -> None:
    accepted = await external(service, eve, kind, **fields)
    found = accepted["input"]
    assert found == {**DEFAULTS, "prompt": "a red hat", "images": found["images"], **expected}
    assert len(found["images"]) == 1
    await post(service, f"/generations/{accepted['generationId']}/cancel", eve)


async def test_without_files_the_list_of_images_is_empty(service: Running, eve: str) -> None:
    accepted = await external(service, eve, files=0)
    assert accepted["input"] == {**DEFAULTS, "prompt": "a red hat", "images": [], "faceSwap": False}
    await post(service, f"/generations/{accepted['generationId']}/cancel", eve)


async def test_acks_the_feed_and_its_stream_omit_the_input(service: Running, eve: str) -> None:
    running_one = await external(service, eve)
    finished = await started(service, eve)
    async with service.phone(userId=eve) as phone:
        await phone.until(lambda: bool(phone.notices))
        ack = await phone.authenticate(eve)
        subscribed = await phone.call("subscribe_to_generation", {"generationId": finished["generationId"]})
        await phone.until_over(finished["generationId"])
    async with open_stream(service, user=eve) as stream:
        welcome = await stream.named("authenticated")
        # The event itself has it.
        assert (await stream.named("generation_started"))["input"] == running_one["input"]
    polled = await service.get("/events", eve)
    unusable = await service.get("/events?after=nonsense", eve)
    for each in (phone.notices[0][1], ack, welcome, polled, unusable):
        assert len(each["generations"]) == 2
        assert not any("input" in generation for generation in each["generations"])
    assert subscribed["ok"]
    assert "input" not in subscribed
    await post(service, f"/generations/{running_one['generationId']}/cancel", eve)


async def test_no_webhook_and_no_log_line_has_the_input(
    service: Running, eve: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    done = await started(service, eve, prompt="a secret wish")
    waiting = await external(service, eve, prompt="a secret wish")
    await post(service, f"/generations/{waiting['generationId']}/cancel", eve)
    await until_over(service, eve, done)
    for each in (done, waiting):
        history = await service.service.log.generation(each["generationId"])
        assert history is not None
        assert history.events[-1].end == history.events[-1].position
        assert "input" not in json.loads(message_of(history.events[-1])[1])["data"]
    assert "secret wish" not in caplog.text


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_generation_that_ends_while_it_waits_loses_its_uploads_at_once(
    service: Running, eve: str, how: str
) -> None:
    accepted = await external(service, eve, files=2)
    generation_id, images = accepted["generationId"], service.service.images
    assert await images.quotas.stored(eve) > 0
    if how == "cancelled":
        assert await post(service, f"/generations/{generation_id}/cancel", eve) == {"outcome": "cancelled"}
    else:
        report = await service.http.post(
            f"/generations/{generation_id}/transitions", json={"status": "failed"}, headers={"X-User-Id": eve}
        )
        assert report.status_code == 200, report.text
    assert await images.quotas.stored(eve) == 0
    for url in accepted["input"]["images"]:
        assert (await service.http.get(f"/images/{url.rpartition('/')[2]}")).status_code == 404
    shown = await service.get(f"/generations/{generation_id}", eve)
    assert shown["input"] == {**accepted["input"], "images": []}
    assert (await service.events(generation_id, eve))[0]["input"] == accepted["input"]


async def test_a_queued_generation_that_is_cancelled_loses_its_uploads_and_a_running_one_keeps_them(
    tmp_path: Path,
) -> None:
    pause = Pause()
    async with running(tmp_path, overrides={"editor": ScriptedEditor(pause)}, max_running=1) as service:
        working, queued = await started(service, "ada"), await started(service, "ada")
        await pause.reached.wait()
        for each in (queued, working):
            await post(service, f"/generations/{each['generationId']}/cancel", "ada")
        shown = {each["generationId"]: each for each in (await service.get("/generations"))["generations"]}
        assert shown[queued["generationId"]]["input"]["images"] == []
        assert shown[working["generationId"]]["input"] == working["input"]
        [kept] = working["input"]["images"]
        assert (await service.http.get(f"/images/{kept.rpartition('/')[2]}")).status_code == 200
        assert not (tmp_path / queued["generationId"]).exists()


async def test_uploads_survive_sweeps_and_a_restart_are_counted_and_go_with_their_generation(tmp_path: Path) -> None:
    settings: JSON = {"log": f"sqlite:///{tmp_path}/log.db"}
    async with running(tmp_path / "images", **settings) as service:
        accepted = await started(service, "ada")
        await until_over(service, "ada", accepted)
        counted = await service.service.images.quotas.stored("ada")
    async with running(tmp_path / "images", **settings) as service:
        images = service.service.images
        await service.until_stored("ada", counted)
        storage = service.service.storage
        await Housekeeping(storage.log, storage.log, images).sweep(now=service.service.clock())
        await service.until_stored("ada", counted)
        shown = await service.get(f"/generations/{accepted['generationId']}")
        [url] = shown["input"]["images"]
        upload = f"/images/{url.rpartition('/')[2]}"
        assert shown["input"] == accepted["input"]
        picture = await service.http.get(upload)
        assert picture.status_code == 200
        files = (tmp_path / "images" / accepted["generationId"]).iterdir()
        assert sum(file.stat().st_size for file in files) == counted
        path = f"/generations/{accepted['generationId']}"
        assert (await service.http.delete(path, headers={"X-User-Id": "ada"})).status_code == 204
        assert (await service.http.get(upload)).status_code == 404
        assert await images.quotas.stored("ada") == 0


async def test_the_ack_of_many_generations_with_long_prompts_is_small(service: Running, eve: str) -> None:
    async def twenty() -> list[JSON]:
        return await asyncio.gather(*(external(service, eve, files=0, prompt=LONG_PROMPT) for _ in range(20)))

    finished = await twenty()
    await asyncio.gather(*(post(service, f"/generations/{each['generationId']}/cancel", eve) for each in finished))
    active = await twenty()
    wire = await Wire.open(service.port)
    await wire.connect(userId=eve)
    ack = await wire.call("authenticate", {"userId": eve})
    assert len(ack["generations"]) == 40
    assert len(json.dumps(ack, ensure_ascii=False).encode()) < 64_000
    # The prompts come with the replay, whole.
    await wire.until(lambda: len(wire.events) == 20)
    assert {event["input"]["prompt"] for event in wire.events} == {LONG_PROMPT}
    wire.abort()
    await asyncio.gather(*(post(service, f"/generations/{each['generationId']}/cancel", eve) for each in active))
