"""The service with local stand-ins of the paid providers: what users see, and how often a call is paid for."""

import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adapters.providers.replicate import ReplicateFaceSwap
from api.app import create_service
from api.settings import Settings
from api.wiring import wire
from domain.ports.images import Picture
from support.doubles import advance_time
from support.harness import JSON, Running, running
from support.openai_server import KEY, OpenAIServer, data_of, error, in_base64, openai_server, pictures
from support.pictures import RED, THREADS, encoded, opened, solid
from support.provider_faults import Answer, as_json, drip, hang, head, raw, reset, then, whole
from support.replicate_server import TOKEN, Replicate

FACE = solid(RED, (120, 160), "PNG")


@pytest.fixture
async def openai() -> AsyncIterator[OpenAIServer]:
    async with openai_server() as server:
        yield server


@asynccontextmanager
async def with_openai(images: Path, openai: OpenAIServer, **rest: Any) -> AsyncIterator[Running]:
    key = {"openai_api_key": KEY, "openai_base_url": openai.base_url, "editor": "openai"}
    async with running(images, **{**key, **rest}) as service:
        yield service


async def made(service: Running, kind: str = "edit") -> list[JSON]:
    """The events of one generation as a device received them."""
    async with service.phone("ada") as phone:
        generation_id = await service.start(kind=kind)
        await phone.until_over(generation_id)
        assert phone.of(generation_id) == await service.events(generation_id)
        assert KEY not in str(phone.events)
        return phone.of(generation_id)


@pytest.mark.parametrize(("kind", "result"), [("edit", "editedImageUrl"), ("generate", "generatedImageUrl")])
async def test_previews_reach_the_client(tmp_path: Path, openai: OpenAIServer, kind: str, result: str) -> None:
    async with with_openai(tmp_path, openai) as service:
        events = await made(service, kind)
        previews = [event["previewUrl"] for event in events if "previewUrl" in event and event["status"] != "completed"]
        assert len(set(previews)) == 2
        progress = [event["progress"] for event in events]
        assert progress == sorted(set(progress))
        for url in (previews[0], events[-1][result]):
            answer = await service.http.get(f"/images/{url.rpartition('/')[2]}")
            assert answer.headers["content-type"].startswith("image/")
        assert opened(Picture(answer.content, answer.headers["content-type"])).size == (1024, 1536)
    assert len(openai.calls) == 1


async def test_wait_for_a_rate_limited_provider_is_visible(tmp_path: Path, openai: OpenAIServer) -> None:
    openai.answer(error(429, "rate_limit_exceeded", "rate_limit_exceeded", retry_after="0"), openai.draw)
    async with with_openai(tmp_path, openai) as service:
        events = await made(service)
    assert events[-1]["status"] == "completed"
    [wait] = [event for event in events if event["message"].startswith("The image service is busy; trying again in")]
    assert (wait["status"], 60 < wait["progress"] < 80) == ("openai_editing", True)
    assert len(openai.calls) == 2


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (error(500, "server_error", None), "provider_unavailable"),
        (error(400, "image_generation_user_error", "moderation_blocked"), "provider_rejected"),
        (error(401, "invalid_request_error", "invalid_api_key"), "provider_rejected"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"), "provider_unavailable"),
        (reset, "provider_unavailable"),
    ],
    ids=["500", "refused", "key", "html", "reset"],
)
async def test_each_provider_answer_has_its_code_and_is_paid_for_at_most_once(
    tmp_path: Path, openai: OpenAIServer, answer: Answer, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    openai.answer(answer)
    async with with_openai(tmp_path, openai) as service:
        failed = (await made(service))[-1]
        assert (failed["status"], failed["failedStage"], failed["code"]) == ("failed", "openai_editing", code)
        assert failed["credit"] == 100
    assert len(openai.calls) == 1
    assert KEY not in caplog.text


RESULT = solid(RED, (256, 384), "PNG").data
BLACK = Image.new("RGB", (256, 384))


@pytest.mark.parametrize(
    ("answer", "media_type"),
    [
        (as_json({"data": [{"url": "/files/a.png"}]}), "image/png"),
        (as_json({"data": [{"url": f"data:image/png;base64,{in_base64(RESULT)}"}]}), "image/png"),
        (whole(gzip.compress(json.dumps(data_of(in_base64(RESULT))).encode()), Content_Encoding="gzip"), "image/png"),
        (pictures(encoded(BLACK, "GIF")), "image/png"),
        (pictures(encoded(BLACK, "MPO", save_all=True, append_images=[BLACK])), "image/png"),
    ],
    ids=["url", "data", "gzip", "GIF", "MPO"],
)
async def test_gateway_pictures_are_stored_in_a_browser_format(
    tmp_path: Path, openai: OpenAIServer, answer: Answer, media_type: str
) -> None:
    respond = openai.origin.respond
    file = whole(RESULT, 200, "image/png")
    openai.origin.respond = lambda request: file if request.target == "/files/a.png" else respond(request)
    openai.answer(answer)
    async with with_openai(tmp_path, openai) as service:
        last = (await made(service))[-1]
        assert last["status"] == "completed"
        image = await service.http.get(f"/images/{last['editedImageUrl'].rpartition('/')[2]}")
        assert image.headers["content-type"] == media_type
        assert opened(Picture(image.content, media_type)).size == (256, 384)
    assert len(openai.calls) == 1


@pytest.mark.parametrize("answer", [hang, then(raw(head(length=100_000)), drip(b" "))], ids=["hang", "drip"])
async def test_slow_provider_ends_as_provider_timeout_before_the_deadline(
    tmp_path: Path, openai: OpenAIServer, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    openai.answer(answer)
    async with with_openai(tmp_path, openai, deadline=300) as service:
        generation_id = await service.start()
        await openai.origin.reached.wait()
        # Without connected clients, whose pings would be late.
        await advance_time(271)
        await openai.origin.left.wait()
        await service.service.leases.drain()
        failed = (await service.events(generation_id))[-1]
        assert (failed["failedStage"], failed["code"]) == ("openai_editing", "provider_timeout")
        assert failed["credit"] == 100
    assert len(openai.calls) == 1
    assert KEY not in caplog.text


async def test_cancel_closes_only_its_own_provider_connection(tmp_path: Path, openai: OpenAIServer) -> None:
    openai.answer(hang, openai.draw)
    async with with_openai(tmp_path, openai) as service, service.phone("ada") as phone:
        doomed = await service.start()
        await openai.origin.reached.wait()
        neighbour = await service.start()
        answer = await service.http.post(f"/generations/{doomed}/cancel", headers={"X-User-Id": "ada"})
        assert answer.json() == {"outcome": "cancelled"}
        await openai.origin.left.wait()
        await phone.until_over(doomed, neighbour)
        assert phone.of(doomed)[-1]["code"] == "cancelled"
        assert phone.of(neighbour)[-1]["status"] == "completed"
        again = await service.http.post(f"/generations/{doomed}/cancel", headers={"X-User-Id": "ada"})
        assert again.json() == {"outcome": "already_finished"}
    assert len(openai.calls) == 2


class _Faces:
    """`domain.ports.images.ImageFetcher`: returns a face for every URL."""

    async def fetch(self, url: str) -> Any:
        return FACE


@pytest.mark.parametrize("broken", [False, True], ids=["made", "failed"])
async def test_failed_face_swap_keeps_the_paid_edit(tmp_path: Path, openai: OpenAIServer, broken: bool) -> None:
    async with Replicate(picture=FACE.data).serving() as replicate:
        if broken:
            replicate.statuses = ["failed"]
        swapper = ReplicateFaceSwap(THREADS, TOKEN, base_url=replicate.url, deadline=60, pace=0.01)
        overrides = {"face_swapper": swapper, "fetcher": _Faces()}
        async with with_openai(tmp_path, openai, overrides=overrides) as service, service.phone("ada") as phone:
            generation_id = await service.start(imageUrls="https://example.com/face.jpg")
            await phone.until_over(generation_id)
            last = phone.of(generation_id)[-1]
        assert (last["status"], last["credit"]) == ("completed", 99)
        assert ("faceSwapUrl" in last, "faceSwapError" in last) == (not broken, broken)
        if broken:
            assert last["message"] == "Image editing completed, but the face swap failed."
            assert last["faceSwapError"]["code"] == "provider_unavailable"
        assert (len(openai.calls), replicate.count("create")) == (1, 1)


async def test_keys_select_the_providers(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, images=tmp_path, openai_api_key=KEY, replicate_api_token=TOKEN)
    service, _ = create_service(await wire(settings))
    assert type(service.runner.editor).__name__ == "OpenAIEditor"
    assert type(service.runner.face_swapper).__name__ == "ReplicateFaceSwap"
