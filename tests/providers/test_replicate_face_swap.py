"""The face swap with Replicate, against a local server with its API."""

import asyncio
import base64
import logging
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Coroutine
from datetime import UTC, datetime, timedelta
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from adapters.providers import replicate as replicate_face_swap
from adapters.providers.replicate import DEFAULT_MODEL, ReplicateFaceSwap
from domain.errors import Failure
from domain.ports.images import Picture
from domain.ports.providers import FaceSwapper
from support.doubles import advance_time
from support.pictures import BLUE, GREEN, RED, THREADS, alike, colour_at, opened, picture, raw_png, solid
from support.provider_faults import closed_port
from support.replicate_server import (
    MODELS,
    TOKEN,
    WORDS,
    Answer,
    Replicate,
    drip,
    flood,
    flood_with_length,
    hang,
    held,
    page,
    redirect,
    refusal,
    reset,
)

#: Without certificate authorities, because loading them is slow.
NO_TRUSTED_CAS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

EDITED, FACE = solid(RED), solid(GREEN, kind="JPEG")
SWAPPED: Final = solid(BLUE).data

HTML: Final = page(b"<!doctype html><title>Bad gateway</title>")
EMPTY: Final = page(b"", "application/json")


@pytest.fixture
async def replicate(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Replicate]:
    """Check after the test that the token was not logged, and was sent only to the API."""
    caplog.set_level(logging.DEBUG)
    async with Replicate(picture=SWAPPED).serving() as replicate:
        yield replicate
    assert TOKEN not in caplog.text
    assert not any("Authorization" in seen.headers for seen in replicate.asked("output"))


@pytest.fixture
async def canary() -> AsyncIterator[Replicate]:
    """A server that must get no request."""
    async with Replicate(picture=SWAPPED).serving() as canary:
        yield canary
    assert canary.seen == []


def swapper_at(replicate: Replicate, model: str = DEFAULT_MODEL, **options: Any) -> ReplicateFaceSwap:
    given: dict[str, Any] = {"deadline": 60, "grace": 60, "pace": 0.01, "trust": NO_TRUSTED_CAS} | options
    return ReplicateFaceSwap(THREADS, TOKEN, model, base_url=replicate.url, **given)


@pytest.fixture
def swapper(replicate: Replicate) -> ReplicateFaceSwap:
    return swapper_at(replicate)


class Reports:
    """`domain.ports.providers.Report`: records reports."""

    def __init__(self) -> None:
        self.received: list[tuple[float, str]] = []

    async def __call__(self, fraction: float, message: str, preview: Picture | None) -> None:
        assert preview is None
        self.received.append((fraction, message))

    @property
    def messages(self) -> list[str]:
        """The messages without repetitions."""
        return list(dict.fromkeys(message for _, message in self.received))


async def swapped(swapper: FaceSwapper, reports: Reports | None = None) -> None:
    """Swap, and check that the result is the server's picture."""
    result = await swapper.swap(EDITED, FACE, reports or Reports())
    assert alike(colour_at(opened(result), 0.5, 0.5), BLUE)


async def too_late(replicate: Replicate, what: str, times: int = 1, **options: Any) -> Failure:
    """The failure if the deadline passes after this many requests of this kind."""
    # Less than the timeout of one network operation, which must not be reached.
    failing = asyncio.create_task(failed(swapper_at(replicate, deadline=20, **options)))
    await replicate.until_asked(what, times)
    await advance_time(20)
    return await failing


async def failed(swapper: FaceSwapper, reports: Reports | None = None) -> Failure:
    """The failure of the swap. Checks that it has neither the provider's text nor the token."""
    with pytest.raises(Failure) as caught:
        await swapper.swap(EDITED, FACE, reports or Reports())
    failure = caught.value
    text = f"{failure} {failure.sentence} {failure.__cause__}"
    assert TOKEN not in text
    assert not any(word in text for word in (*WORDS.split(), "127.0.0.1") if len(word) > 2)
    return failure


def noise() -> Picture:
    """A PNG too large for a data URL."""
    return picture(Image.frombytes("RGB", (300, 300), random.Random(0).randbytes(3 * 300 * 300)))


def text_of(data_url: str) -> Picture:
    head, _, encoded = data_url.partition(";base64,")
    return Picture(base64.b64decode(encoded, validate=True), head.removeprefix("data:"))


# --- all goes well -----------------------------------------------------------------------------------------


async def test_both_pictures_are_sent_and_the_result_is_returned(
    replicate: Replicate, swapper: ReplicateFaceSwap
) -> None:
    await swapped(swapper)
    [create] = replicate.asked("create")
    assert create.path == "/v1/predictions"
    assert create.json["version"] == MODELS["cdingram/face-swap"][0]
    assert {name: text_of(sent) for name, sent in create.json["input"].items()} == {
        "input_image": EDITED,
        "swap_image": FACE,
    }
    assert replicate.count("poll") == 2
    assert replicate.count("cancel") == 0


async def test_progress_rises_with_a_message_per_phase(replicate: Replicate, swapper: ReplicateFaceSwap) -> None:
    replicate.statuses = [*repeat("starting", 4), *repeat("processing", 4), "starting", "processing", "succeeded"]
    reports = Reports()
    await swapped(swapper, reports)
    fractions = [fraction for fraction, _ in reports.received]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) >= 9
    assert 0 < fractions[0] < fractions[-1] < 1
    assert reports.messages == [
        "Waiting for the face swap to begin...",
        "Swapping the face...",
        "Fetching the picture...",
    ]


async def test_finished_prediction_is_not_polled(replicate: Replicate, swapper: ReplicateFaceSwap) -> None:
    replicate.statuses = ["succeeded"]
    await swapped(swapper)
    assert replicate.count("poll") == 0


@pytest.mark.parametrize("shape", ["list", "object", "data"])
async def test_usual_output_shapes_are_accepted(replicate: Replicate, swapper: ReplicateFaceSwap, shape: str) -> None:
    url = f"{replicate.origin}/output/out.png"
    replicate.output = {
        "list": [url, f"{replicate.origin}/nothing"],
        "object": {"code": 200, "image": url, "msg": "succeed", "status": "succeed"},
        "data": f"data:image/png;base64,{base64.b64encode(SWAPPED).decode()}",
    }[shape]
    await swapped(swapper)


async def test_large_pictures_are_uploaded_as_files(replicate: Replicate, swapper: ReplicateFaceSwap) -> None:
    limit = 256 * 1024
    large, small = (Picture(noise().data[:size], "image/png") for size in (limit + 1, limit))
    await swapper.swap(large, small, Reports())
    [(url, (media_type, data))] = replicate.uploads.items()
    assert Picture(data, media_type) == large
    [create] = replicate.asked("create")
    assert create.json["input"]["input_image"] == url
    assert text_of(create.json["input"]["swap_image"]) == small


@pytest.mark.parametrize("fault", [refusal(429, Retry_After="0"), refusal(500), reset, HTML])
async def test_failed_upload_is_retried(replicate: Replicate, swapper: ReplicateFaceSwap, fault: Answer) -> None:
    replicate.will("upload", fault, fault)
    await swapper.swap(EDITED, noise(), Reports())
    assert replicate.count("upload") == 3
    assert replicate.count("create") == 1


async def test_rejected_upload_creates_no_prediction(replicate: Replicate, swapper: ReplicateFaceSwap) -> None:
    replicate.will("upload", refusal(413))
    with pytest.raises(Failure) as caught:
        await swapper.swap(EDITED, noise(), Reports())
    assert caught.value.code == "provider_rejected"
    assert replicate.count("upload") == 1
    assert replicate.count("create") == 0


async def test_cancel_after_is_sent_with_the_prediction(replicate: Replicate) -> None:
    clock = asyncio.get_running_loop().time
    begun = clock()
    await swapped(swapper_at(replicate, deadline=90))
    [create] = replicate.asked("create")
    assert 95 - (clock() - begun) <= int(create.headers["Cancel-After"].removesuffix("s")) <= 95
    # With `Prefer: wait`, the id needed to cancel would only arrive with the result.
    assert "Prefer" not in create.headers


# --- models ------------------------------------------------------------------------------------------------


async def test_each_model_gets_its_own_input_names(replicate: Replicate) -> None:
    for name, (version, _) in MODELS.items():
        await swapped(swapper_at(replicate, f"{name}:{version}" if version else name))
    paths = [create.path for create in replicate.asked("create")]
    assert paths == ["/v1/predictions", "/v1/predictions", "/v1/models/someone/official-swap/predictions"]


@pytest.mark.parametrize("model", ["someone/unknown", "someone/unknown:" + "0" * 64, "lucataco/faceswap"])
async def test_unknown_model_is_provider_rejected(replicate: Replicate, model: str) -> None:
    failure = await failed(swapper_at(replicate, model))
    assert failure.code == "provider_rejected"
    assert replicate.count("create") == 1


@pytest.mark.parametrize("model", ["", "face-swap", "a/b/c", "a/b:", "a/b:c/d", "../x", "a/..", "a/b?c", "a/b:c\n"])
def test_malformed_model_name_is_a_value_error(model: str) -> None:
    with pytest.raises(ValueError, match="owner/name"):
        ReplicateFaceSwap(THREADS, TOKEN, model, trust=NO_TRUSTED_CAS)


# --- the create fails --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code", "retryable"),
    [
        (refusal(400), "provider_rejected", False),
        (refusal(401), "provider_rejected", False),
        (refusal(402), "provider_rejected", False),
        (refusal(403), "provider_rejected", False),
        (refusal(404), "provider_rejected", False),
        (refusal(422), "provider_rejected", False),
        (refusal(500), "provider_unavailable", True),
        (refusal(502), "provider_unavailable", True),
        (refusal(503), "provider_unavailable", True),
        (HTML, "provider_unavailable", True),
        (EMPTY, "provider_unavailable", True),
        (page(b"[" * 100_000), "provider_unavailable", True),
        (page(b'{"id": "../files", "status": "starting"}', "application/json"), "provider_unavailable", True),
        (page(b'{"id": "x"}', "application/json"), "provider_unavailable", True),
        (flood_with_length, "provider_unavailable", True),
        (flood, "provider_unavailable", True),
        (redirect("/v1/predictions/p0rediction"), "provider_unavailable", True),
        (reset, "provider_unavailable", True),
    ],
)
async def test_failed_create_is_not_retried(
    replicate: Replicate, swapper: ReplicateFaceSwap, fault: Answer, code: str, retryable: bool
) -> None:
    replicate.will("create", fault)
    failure = await failed(swapper)
    assert (failure.code, failure.retryable) == (code, retryable)
    assert [seen.what for seen in replicate.seen] == ["create"]


async def test_api_error_is_logged(
    replicate: Replicate, swapper: ReplicateFaceSwap, caplog: pytest.LogCaptureFixture
) -> None:
    replicate.will("create", refusal(422))
    await failed(swapper)
    [line] = [record for record in caplog.records if record.name == "adapters.providers.attempts"]
    assert line.levelno == logging.WARNING
    assert "POST predictions was answered with 422" in line.getMessage()
    assert WORDS in line.getMessage()


async def test_rejected_token_is_not_revealed(replicate: Replicate, caplog: pytest.LogCaptureFixture) -> None:
    token = "nobody'5 k3y"
    swapper = ReplicateFaceSwap(THREADS, token, base_url=replicate.url, trust=NO_TRUSTED_CAS)
    assert (await failed(swapper)).code == "provider_rejected"
    assert "401" in caplog.text
    assert token not in caplog.text


@pytest.mark.parametrize("fault", [refusal(429), refusal(429, Retry_After="0"), refusal(503, Retry_After="0")])
async def test_declined_create_is_retried(replicate: Replicate, swapper: ReplicateFaceSwap, fault: Answer) -> None:
    replicate.will("create", fault, fault)
    reports = Reports()
    await swapped(swapper, reports)
    assert replicate.count("create") == 3
    assert len(replicate.predictions) == 1
    assert all("trying again" in message for _, message in reports.received[:2])


async def test_create_that_is_always_declined_is_provider_rate_limited(
    replicate: Replicate, swapper: ReplicateFaceSwap
) -> None:
    replicate.acts["create"] = repeat(refusal(429))
    failure = await failed(swapper)
    assert (failure.code, failure.retryable) == ("provider_rate_limited", True)
    assert replicate.count("create") == 4
    assert replicate.count("cancel") == 0


async def test_refused_connection_is_retried() -> None:
    reports = Reports()
    with closed_port() as port:
        failure = await failed(swapper_at(Replicate(port=port)), reports)
    assert failure.code == "provider_unavailable"
    assert len(reports.received) == 3


# --- while it runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        refusal(429, Retry_After="0"),
        refusal(500),
        refusal(503, Retry_After="0"),
        HTML,
        EMPTY,
        reset,
        flood,
    ],
)
async def test_failed_polls_are_repeated(replicate: Replicate, swapper: ReplicateFaceSwap, fault: Answer) -> None:
    replicate.will("poll", *repeat(fault, 4))
    await swapped(swapper)
    assert replicate.count("poll") == 6
    assert replicate.count("create") == 1
    assert replicate.count("cancel") == 0


@pytest.mark.parametrize("status", [401, 404])
async def test_rejected_poll_fails_the_swap_and_cancels_the_prediction(
    replicate: Replicate, swapper: ReplicateFaceSwap, status: int
) -> None:
    replicate.will("poll", refusal(status))
    assert (await failed(swapper)).code == "provider_rejected"
    assert replicate.count("poll") == 1
    assert replicate.count("cancel") == 1


async def test_poll_respects_retry_after(replicate: Replicate) -> None:
    replicate.will("poll", refusal(429, Retry_After="3600"))
    assert (await too_late(replicate, "poll")).code == "provider_timeout"
    assert replicate.count("poll") == 1


@pytest.mark.parametrize("fault", [None, hang, drip, refusal(500)])
async def test_prediction_is_cancelled_at_the_deadline(replicate: Replicate, fault: Answer | None) -> None:
    replicate.statuses = ["starting", "processing"]
    if fault is not None:
        replicate.acts["poll"] = repeat(fault)
    assert (await too_late(replicate, "poll")).code == "provider_timeout"
    assert replicate.count("create") == 1
    assert replicate.count("cancel") == 1


async def test_prediction_is_cancelled_even_if_its_id_arrives_after_the_deadline(replicate: Replicate) -> None:
    replicate.will("create", held(replicate, replicate.create))
    failing = asyncio.create_task(failed(swapper_at(replicate, deadline=20)))
    await replicate.until_asked("create")
    await advance_time(20)
    assert not failing.done()
    replicate.released.set()
    assert (await failing).code == "provider_timeout"
    assert replicate.count("create") == 1
    assert replicate.count("cancel") == 1


@pytest.mark.parametrize("fault", [hang, drip])
async def test_grace_period_limits_the_wait_for_the_create_response(
    replicate: Replicate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: Answer
) -> None:
    monkeypatch.setattr(replicate_face_swap, "_STEP", 300)
    replicate.will("create", fault)
    failing = asyncio.create_task(failed(swapper_at(replicate, deadline=60, grace=60)))
    await replicate.until_asked("create")
    await advance_time(60)
    assert not failing.done()
    await advance_time(60)
    assert (await failing).code == "provider_timeout"
    assert [seen.what for seen in replicate.seen] == ["create"]
    assert "may run on for a while" in caplog.text


@pytest.mark.parametrize("fault", [hang, refusal(500), reset, HTML])
async def test_failed_cancel_request_does_not_change_the_failure(replicate: Replicate, fault: Answer) -> None:
    replicate.statuses = ["processing"]
    replicate.will("cancel", fault)
    failing = asyncio.create_task(too_late(replicate, "poll", grace=20))
    await replicate.until_asked("cancel")
    await advance_time(20)
    assert (await failing).code == "provider_timeout"
    assert replicate.count("cancel") == 1


async def cancelled_when(happened: Awaitable[None], swapping: Coroutine[Any, Any, Picture]) -> None:
    """Cancel the swap when the condition holds, and check that it ends."""
    task = asyncio.create_task(swapping)
    await happened
    task.cancel()
    await asyncio.wait([task], timeout=30)
    assert task.cancelled()


async def test_cancelling_the_swap_cancels_the_prediction(
    replicate: Replicate, swapper: ReplicateFaceSwap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicate_face_swap, "_LINGER", 60)
    replicate.statuses = ["processing"]
    await cancelled_when(replicate.until_asked("poll"), swapper.swap(EDITED, FACE, Reports()))
    assert replicate.count("create") == 1
    assert replicate.count("cancel") == 1


async def test_cancelling_during_create_cancels_the_created_prediction(
    replicate: Replicate, swapper: ReplicateFaceSwap
) -> None:
    replicate.will("create", held(replicate, replicate.create))
    await cancelled_when(replicate.until_asked("create"), swapper.swap(EDITED, FACE, Reports()))
    assert replicate.count("cancel") == 0
    replicate.released.set()
    await replicate.until_asked("cancel")
    assert replicate.count("create") == 1


async def test_second_cancellation_does_not_wait(
    replicate: Replicate, swapper: ReplicateFaceSwap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicate_face_swap, "_LINGER", 60)
    replicate.will("create", hang)
    swapping = asyncio.create_task(swapper.swap(EDITED, FACE, Reports()))
    await replicate.until_asked("create")
    swapping.cancel()
    await asyncio.sleep(0.01)
    assert not swapping.done()
    swapping.cancel()
    await asyncio.wait([swapping], timeout=30)
    assert swapping.cancelled()


async def test_cancelling_before_create_sends_no_cancel_request(
    replicate: Replicate, swapper: ReplicateFaceSwap
) -> None:
    replicate.will("upload", hang)
    await cancelled_when(replicate.until_asked("upload"), swapper.swap(noise(), FACE, Reports()))
    assert [seen.what for seen in replicate.seen] == ["upload"]


# --- how it ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [("failed", "provider_unavailable"), ("canceled", "provider_unavailable"), ("aborted", "provider_timeout")],
)
async def test_ended_prediction_is_not_cancelled(
    replicate: Replicate, swapper: ReplicateFaceSwap, caplog: pytest.LogCaptureFixture, status: str, code: str
) -> None:
    replicate.statuses = ["starting", "processing", status]
    replicate.error = f"{WORDS}: CUDA out of memory, no surface could be had"
    assert (await failed(swapper)).code == code
    assert replicate.count("create") == 1
    assert replicate.count("cancel") == 0
    assert ("CUDA out of memory" in caplog.text) == (status == "failed")


@pytest.mark.parametrize(
    "error",
    [
        "No face found",
        "no source faces were detected",
        "Could not find face in image. Try another!",
        "Face not detected in the target image",
        "'NoneType' object has no attribute 'kps'",
    ],
)
async def test_missing_face_is_explained_to_the_user(
    replicate: Replicate, swapper: ReplicateFaceSwap, error: str
) -> None:
    replicate.statuses = ["failed"]
    replicate.error = error
    failure = await failed(swapper)
    assert (failure.code, failure.retryable) == ("provider_rejected", False)
    assert failure.sentence == "No face was found in one of the pictures."


async def test_missing_face_is_recognised_in_the_output_too(replicate: Replicate, swapper: ReplicateFaceSwap) -> None:
    replicate.output = {"code": 500, "image": None, "msg": "no face", "status": "failed"}
    assert (await failed(swapper)).sentence == "No face was found in one of the pictures."


@pytest.mark.parametrize("output", [[], {}, 0, "", [None], [[SWAPPED.hex()]], {"image": 1}])
async def test_success_without_a_picture_is_provider_unavailable(
    replicate: Replicate, swapper: ReplicateFaceSwap, output: object
) -> None:
    replicate.output = output
    assert (await failed(swapper)).code == "provider_unavailable"
    assert replicate.count("create") == 1


# --- the output --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [refusal(429, Retry_After="0"), refusal(500), refusal(503), reset])
async def test_failed_output_download_is_retried(
    replicate: Replicate, swapper: ReplicateFaceSwap, fault: Answer
) -> None:
    replicate.will("output", fault, fault, redirect("/output/moved.png"))
    await swapped(swapper)
    assert [seen.path for seen in replicate.asked("output")] == [*repeat("/output/out.png", 3), "/output/moved.png"]
    assert replicate.count("create") == 1


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        (refusal(404), 1),
        (HTML, 1),
        (EMPTY, 1),
        (page(SWAPPED[:-30], "image/png"), 1),
        (page(raw_png((13_000, 13_000), 1, 0, b""), "image/png"), 1),
        (flood_with_length, 1),
        (flood, 1),
        (refusal(500), 4),
        (reset, 4),
    ],
)
async def test_output_that_is_not_a_picture_is_provider_unavailable(
    replicate: Replicate, swapper: ReplicateFaceSwap, fault: Answer, times: int
) -> None:
    replicate.acts["output"] = repeat(fault)
    assert (await failed(swapper)).code == "provider_unavailable"
    assert replicate.count("output") == times
    assert replicate.count("create") == 1
    assert replicate.count("cancel") == 0


@pytest.mark.parametrize("fault", [hang, drip])
async def test_hanging_output_download_ends_at_the_deadline(replicate: Replicate, fault: Answer) -> None:
    replicate.statuses = ["succeeded"]
    replicate.acts["output"] = repeat(fault)
    assert (await too_late(replicate, "output")).code == "provider_timeout"
    assert replicate.count("cancel") == 0


@pytest.mark.parametrize(
    "output",
    [
        "{canary}/output/out.png",
        "http://localhost:{port}/output/out.png",
        "http://user@127.0.0.1:{port}/output/out.png",
        "https://127.0.0.1:{port}/output/out.png",
        "/output/out.png",
        "//127.0.0.1:{port}/output/out.png",
        "file://{here}",
        "ftp://replicate.delivery/out.png",
        "http://replicate.delivery/out.png",
        "https://replicate.delivery.evil.test/out.png",
        "http://[",
        "data:image/png;base64,?",
        "data:image/png,nothing",
    ],
)
async def test_output_on_a_foreign_host_is_not_fetched(
    replicate: Replicate, canary: Replicate, swapper: ReplicateFaceSwap, output: str
) -> None:
    replicate.output = output.format(canary=canary.origin, port=replicate.port, here=__file__)
    assert (await failed(swapper)).code == "provider_unavailable"
    assert replicate.count("output") == 0


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://replicate.delivery/a/out.png", True),
        ("https://pbxt.replicate.delivery/a/out.png", True),
        ("https://api.replicate.com/v1/files/x/download", True),
        ("https://api.replicate.com:8443/v1/files/x/download", False),
        ("http://api.replicate.com/v1/files/x/download", False),
        ("https://replicate.com/out.png", False),
        ("https://evilreplicate.delivery/out.png", False),
        ("https://replicate.delivery@evil.test/out.png", False),
        ("https://user:password@replicate.delivery/out.png", False),
        ("http://replicate.delivery/out.png", False),
    ],
)
def test_only_replicates_hosts_are_allowed_for_outputs(url: str, allowed: bool) -> None:
    assert ReplicateFaceSwap(THREADS, TOKEN, trust=NO_TRUSTED_CAS).may_download(httpx2.URL(url)) is allowed


async def test_redirects_of_outputs_are_limited(replicate: Replicate, swapper: ReplicateFaceSwap) -> None:
    replicate.acts["output"] = repeat(redirect("/output/out.png"))
    assert (await failed(swapper)).code == "provider_unavailable"
    assert replicate.count("output") == 4


async def test_redirect_of_an_output_to_a_foreign_host_is_not_followed(
    replicate: Replicate, canary: Replicate, swapper: ReplicateFaceSwap
) -> None:
    replicate.will("output", redirect(f"{canary.origin}/output/out.png"))
    assert (await failed(swapper)).code == "provider_unavailable"
    assert replicate.count("output") == 1


async def test_urls_in_api_responses_are_not_used_for_requests(
    replicate: Replicate, canary: Replicate, swapper: ReplicateFaceSwap
) -> None:
    replicate.elsewhere = canary.url
    await swapped(swapper)
    replicate.statuses = ["processing"]
    assert (await too_late(replicate, "poll", replicate.count("poll") + 1)).code == "provider_timeout"
    assert replicate.count("cancel") == 1


async def test_proxy_of_the_environment_is_used_with_the_configured_token(
    replicate: Replicate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", replicate.origin)
    monkeypatch.setenv("REPLICATE_API_TOKEN", "r8_another")
    replicate.output = "http://replicate.test/output/out.png"
    await swapped(ReplicateFaceSwap(THREADS, TOKEN, base_url="http://replicate.test/v1", deadline=60, pace=0.01))
    assert replicate.count("create") == 1


# --- TLS ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, pkcs8, bare = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(key.private_bytes(pem, pkcs8, bare) + signed.public_bytes(pem))
    return file


@pytest.mark.parametrize("trusted", [True, False])
async def test_output_is_fetched_from_another_host_by_https(
    replicate: Replicate, certificate: Path, trusted: bool
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    trust = ssl.create_default_context(cafile=str(certificate)) if trusted else NO_TRUSTED_CAS
    swapper = swapper_at(replicate, trust=trust, output_hosts=["localhost"])
    async with Replicate(picture=SWAPPED).serving(tls) as delivery:
        replicate.output = f"https://localhost:{delivery.port}/out.png"
        if trusted:
            await swapped(swapper)
            [fetched] = delivery.seen
            assert "Authorization" not in fetched.headers
        else:
            assert (await failed(swapper)).code == "provider_unavailable"
            assert delivery.seen == []
    assert replicate.count("create") == 1
