"""The OpenAI editor when the provider is busy, rejects a request, breaks the connection, or does not finish."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Final

import pytest
from PIL import Image

from domain.errors import Failure, FailureCode
from domain.ports.images import Picture
from domain.requests import Options
from support.doubles import advance_time
from support.openai_editor import (
    DEADLINE,
    PROMPT,
    RESULT,
    SHEET,
    SKETCH,
    Reports,
    edited,
    editor_at,
    failing,
    warnings_of,
)
from support.openai_server import (
    KEY,
    REQUEST_ID,
    STREAM,
    OpenAIServer,
    completed,
    data_of,
    error,
    error_body,
    event,
    in_base64,
    openai_server,
    partial,
    picture,
    pictures,
    stream,
)
from support.pictures import encoded, raw_png
from support.provider_faults import (
    MEGABYTE,
    Answer,
    Flood,
    as_json,
    closed_port,
    drip,
    hang,
    head,
    raw,
    reset,
    then,
    whole,
)


@pytest.fixture(autouse=True)
def secret(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove proxies from the environment, and check afterwards that no log line has the key."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.get_records("setup") + caplog.get_records("call"):
        assert KEY not in f"{record.getMessage()} {record.__dict__}"


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with openai_server() as server:
        yield server


# --- refused, and asked again ----------------------------------------------------------------------------

BUSY: Final = error(429, "requests", "rate_limit_exceeded", "Rate limit reached", retry_after="0.01")

OVERLOADED: Final = error(503, "server_error", None, "Overloaded", retry_after="0.01")


@pytest.mark.parametrize(
    ("answer", "message"), [(BUSY, "is busy; trying again in"), (OVERLOADED, "cannot be reached; trying again in")]
)
async def test_rate_limited_call_is_retried_with_a_visible_message(
    server: OpenAIServer, answer: Answer, message: str
) -> None:
    server.answer(answer, answer, stream(partial(0, SKETCH), completed(RESULT)))
    reports = Reports()
    assert (await edited(server, reports)).data == RESULT
    assert len(server.calls) == 3
    assert [message in text for text in reports.messages] == [True, True, False]
    assert reports.fractions == sorted({*reports.fractions})
    assert len({call.files["image"].data for call in server.calls}) == 1


@pytest.mark.parametrize(("answer", "code"), [(BUSY, "provider_rate_limited"), (OVERLOADED, "provider_unavailable")])
async def test_rate_limited_call_fails_after_four_attempts(
    server: OpenAIServer, answer: Answer, code: FailureCode
) -> None:
    server.answer(answer)
    failure = await failing(editor_at(server.base_url))
    assert (failure.code, failure.retryable, len(server.calls)) == (code, True, 4)


async def test_no_retry_if_the_wait_exceeds_the_deadline(server: OpenAIServer) -> None:
    server.answer(error(429, "requests", "rate_limit_exceeded", retry_after="59"))
    reports = Reports()
    failure = await failing(editor_at(server.base_url, deadline=50), reports)
    assert (failure.code, len(server.calls), reports.messages) == ("provider_rate_limited", 1, [])


async def test_refused_connection_is_retried_and_then_fails() -> None:
    reports = Reports()
    with closed_port() as port:
        failure = await failing(editor_at(f"http://127.0.0.1:{port}/v1"), reports)
    assert (failure.code, failure.retryable, len(reports.messages)) == ("provider_unavailable", True, 3)


async def test_service_that_starts_between_retries_gets_one_call() -> None:
    servers: list[OpenAIServer] = []
    async with contextlib.AsyncExitStack() as stack:
        port = stack.enter_context(closed_port())

        async def report(fraction: float, message: str, preview: Picture | None) -> None:
            if not servers:
                servers.append(await stack.enter_async_context(openai_server(port)))

        made = await editor_at(f"http://127.0.0.1:{port}/v1").edit(SHEET, PROMPT, Options(), report)
    assert (made.data, len(servers[0].calls)) == (RESULT, 1)


# --- failed, and not asked again -------------------------------------------------------------------------


async def once(server: OpenAIServer, answer: Answer, *, too_late: bool = False) -> Failure:
    """The failure for this response, after one call, without any report.

    `too_late`: the time for a picture is over while it goes on.
    """
    server.answer(answer)
    reports = Reports()
    call = asyncio.create_task(failing(editor_at(server.base_url), reports))
    if too_late:
        await server.origin.reached.wait()
        await advance_time(DEADLINE)
    failure = await call
    assert len(server.calls) == 1
    assert reports.messages == []
    return failure


@pytest.mark.parametrize(
    ("answer", "code", "retryable"),
    [
        (error(400, "invalid_request_error", "invalid_value"), "provider_rejected", False),
        (error(403, "invalid_request_error", None), "provider_rejected", False),
        (error(404, "invalid_request_error", "model_not_found"), "provider_rejected", False),
        (error(409, None, None), "provider_rejected", True),
        (error(422, None, None), "provider_rejected", False),
        (error(500, "server_error", None), "provider_unavailable", True),
        (error(503, "server_error", None), "provider_unavailable", True),
        (whole(b"<h1>502 Bad Gateway</h1>", 502, "text/html"), "provider_unavailable", True),
        (whole(b"", 504), "provider_unavailable", True),
        (whole(b"", 307, Location="/v1/images/edits"), "provider_unavailable", True),
        (whole(b"[]", 400), "provider_rejected", False),
        (as_json({"error": [1]}, 400), "provider_rejected", False),
    ],
)
async def test_error_response_has_its_code_after_one_call(
    server: OpenAIServer, answer: Answer, code: FailureCode, retryable: bool
) -> None:
    failure = await once(server, answer)
    assert (failure.code, failure.retryable) == (code, retryable)


@pytest.mark.parametrize(("status", "code"), [(500, "provider_unavailable"), (429, "provider_rate_limited")])
async def test_status_takes_precedence_over_a_content_rules_code(server: OpenAIServer, status: int, code: str) -> None:
    server.answer(error(status, "image_generation_user_error", "moderation_blocked"))
    assert (await failing(editor_at(server.base_url))).code == code


IN_STREAM: Final = {"message": "Your request was rejected by the safety system.", "param": None}


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "image_generation_user_error", "moderation_blocked", "Your request was rejected"),
        error(400, "invalid_request_error", "content_policy_violation", "Your request was rejected"),
        stream(
            event("error", error={**IN_STREAM, "type": "image_generation_user_error", "code": "moderation_blocked"})
        ),
    ],
)
async def test_content_rules_error_tells_the_user_what_to_change(server: OpenAIServer, answer: Answer) -> None:
    failure = await once(server, answer)
    assert (failure.code, failure.retryable) == ("provider_rejected", False)
    assert failure.sentence == (
        "The image service declined this request because of its content rules. Please change the prompt or the images."
    )


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (error(429, "insufficient_quota", "insufficient_quota"), "provider_rate_limited"),
        (error(400, "image_generation_user_error", "billing_hard_limit_reached"), "provider_rejected"),
        (error(404, "invalid_request_error", "model_not_found"), "provider_rejected"),
    ],
)
async def test_account_errors_are_addressed_to_the_operator(
    server: OpenAIServer, answer: Answer, code: FailureCode
) -> None:
    failure = await once(server, answer)
    assert (failure.code, failure.retryable) == (code, False)
    assert "Please tell whoever runs it." in failure.sentence


async def test_wrong_key_is_rejected_and_not_revealed(server: OpenAIServer, caplog: pytest.LogCaptureFixture) -> None:
    wrong = "sk-proj-WRONG-9xLrWcKe2hNfYpGu8aJi3"
    failure = await failing(editor_at(server.base_url, api_key=wrong))
    assert (failure.code, len(server.calls)) == ("provider_rejected", 1)
    [line] = warnings_of(caplog)
    assert "invalid_api_key" in line
    # OpenAI quotes both ends of the key.
    assert "sk-proj" not in caplog.text
    assert wrong[-4:] not in caplog.text


@pytest.mark.parametrize("odd", ["", KEY + "\n", KEY + "\r\nX-More: yes", KEY + "…", " " + KEY])
def test_malformed_key_is_a_value_error_without_the_key(odd: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        editor_at("http://127.0.0.1:1/v1", api_key=odd)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        ("server_error", None, "provider_unavailable"),
        (None, None, "provider_unavailable"),
        ("requests", "rate_limit_exceeded", "provider_rate_limited"),
        ("image_generation_user_error", "invalid_image", "provider_rejected"),
    ],
)
async def test_error_event_in_a_stream_has_its_code_and_is_not_retried(
    server: OpenAIServer, kind: str | None, code: str | None, expected: FailureCode
) -> None:
    error_event = event("error", error={"message": "It broke.", "type": kind, "code": code})
    server.answer(stream(partial(0, SKETCH), error_event, completed(RESULT)))
    failure = await failing(editor_at(server.base_url))
    assert (failure.code, len(server.calls)) == (expected, 1)


HTML: Final = b"<!doctype html><title>Sign in</title>" + b"<p>Welcome to the hotel's network.</p>" * 100

BOMB: Final = raw_png((20_000, 20_000), 8, 2, b"")

TINY: Final = picture("8x8")


@pytest.mark.parametrize(
    "answer",
    [
        whole(HTML, 200, "text/html"),
        whole(HTML, 200),
        whole(b"", 200),
        whole(b"", 204),
        whole(b"null"),
        whole(b"[]"),
        whole(b'"text"'),
        whole(b"{" * 100_000),
        whole(b"[" * 100_000),
        whole(b"\xff\xfe\x00"),
        as_json({"created": 1}),
        as_json({"data": None}),
        as_json({"data": []}),
        as_json({"data": {}}),
        as_json({"data": [None]}),
        as_json({"data": ["text"]}),
        as_json({"data": [{"url": "http://127.0.0.1:1/picture.png"}]}),
        as_json({"error": {"message": "No."}}),
        as_json(error_body("invalid_request_error", "invalid_value")),
        as_json({"data": [{"b64_json": "data:image/png;base64,\ud800"}]}),
        as_json(data_of(None)),
        as_json(data_of("")),
        as_json(data_of(17)),
        as_json(data_of("not base64, §")),
        as_json(data_of(in_base64(RESULT)[:-3])),
        as_json(data_of("AAAA" + in_base64(RESULT))),
        pictures(b"not an image"),
        pictures(HTML),
        pictures(RESULT[: len(RESULT) // 2]),
        pictures(RESULT[:100]),
        pictures(BOMB),
        pictures(TINY),
        pictures(encoded(Image.new("RGB", (100, 100)), "GIF")[:40]),
        pictures(encoded(Image.new("RGB", (100, 100)), "TIFF")[:80]),
        stream(),
        stream(b"data: [DONE]\n\n"),
        stream(b"data: {\n\n"),
        stream(b"data: \xff\n\n"),
        stream(b"data: null\n\n"),
        stream(b"data: 17\n\n", b'data: "text"\n\n', b"data: []\n\n"),
        stream(b"data: " + b"[" * 100_000 + b"\n\n"),
        stream(event("image_edit.completed")),
        stream(event("image_edit.completed", b64_json="§")),
        stream(completed(TINY)),
        whole(STREAM, 200, "text/event-stream", Content_Encoding="gzip"),
        whole(b"\x1f\x8b", 200, Content_Encoding="gzip"),
        raw(b"HTTP/1.1 200 OK\r\nContent-Type"),
        raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"),
        raw(head(length=1_000), b'{"data": ['),
        then(raw(head(length=1_000), b'{"data": ['), reset),
        raw(),
        reset,
    ],
)
async def test_response_without_a_picture_is_provider_unavailable(server: OpenAIServer, answer: Answer) -> None:
    failure = await once(server, answer)
    assert (failure.code, failure.retryable) == ("provider_unavailable", True)


@pytest.mark.parametrize("ending", [raw(), reset, raw(completed(RESULT)[:5000]), then(raw(b"data: {"), reset)])
async def test_stream_that_breaks_after_a_preview_is_provider_unavailable(server: OpenAIServer, ending: Answer) -> None:
    server.answer(then(stream(partial(0, SKETCH)), ending))
    failure = await failing(editor_at(server.base_url))
    assert (failure.code, len(server.calls)) == ("provider_unavailable", 1)


# --- too much, and too slow ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        head() + b'{"data": [{"b64_json": "',
        STREAM + b'data: {"type": "image_edit.completed", "b64_json": "',
        head(500),
        head(length=100 * MEGABYTE),
    ],
)
async def test_endless_response_is_read_up_to_the_limit(
    server: OpenAIServer, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.providers.openai.MAX_ANSWER", 4 * MEGABYTE)
    flood = Flood(100, start)
    failure = await once(server, flood)
    assert failure.code == "provider_unavailable"
    await server.origin.left.wait()
    # The rest is in the buffers of both sockets.
    assert flood.taken < 60


async def test_endless_event_is_read_up_to_the_limit(server: OpenAIServer) -> None:
    flood = Flood(200, STREAM + b"data: ")
    assert (await once(server, flood)).code == "provider_unavailable"
    await server.origin.left.wait()
    assert flood.taken < 100


@pytest.mark.parametrize(
    "answer",
    [
        hang,
        then(raw(head(length=1_000)), hang),
        then(raw(STREAM), drip(b": keep-alive\n\n")),
        then(raw(head()), drip(b" ")),
        then(raw(b"HTTP/1.1 200 OK\r\n"), drip(b"x")),
    ],
    ids=["silence", "a head", "a stream", "a body", "a long head"],
)
async def test_hanging_or_dripping_response_ends_at_the_deadline(server: OpenAIServer, answer: Answer) -> None:
    failure = await once(server, answer, too_late=True)
    assert (failure.code, failure.retryable) == ("provider_timeout", True)
    await server.origin.left.wait()


async def test_abandoned_call_logs_its_request_id(server: OpenAIServer, caplog: pytest.LogCaptureFixture) -> None:
    server.answer(then(stream(partial(0, SKETCH)), hang))
    reports = Reports()
    call = asyncio.create_task(failing(editor_at(server.base_url), reports))
    await reports.received.wait()
    await advance_time(DEADLINE)
    assert (await call).code == "provider_timeout"
    assert warnings_of(caplog) == [f"OpenAI: 'gave up waiting' (request '{REQUEST_ID}'): ''"]


@pytest.mark.parametrize("answer", [hang, then(raw(STREAM, partial(0, SKETCH)), hang)], ids=["before", "after"])
async def test_cancelling_closes_the_connection(server: OpenAIServer, answer: Answer) -> None:
    server.answer(answer)
    task = asyncio.create_task(edited(server))
    await server.origin.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await server.origin.left.wait()
    assert len(server.calls) == 1


async def test_cancelling_one_call_does_not_affect_another(server: OpenAIServer) -> None:
    released = asyncio.Event()

    async def later(writer: asyncio.StreamWriter) -> None:
        await released.wait()
        await stream(completed(RESULT))(writer)

    server.answer(later)
    editor = editor_at(server.base_url)
    one, other = [asyncio.create_task(editor.edit(SHEET, PROMPT, Options(), Reports())) for _ in range(2)]
    while len(server.calls) < 2:
        await asyncio.sleep(0.005)
    one.cancel()
    await server.origin.left.wait()
    released.set()
    assert (await other).data == RESULT
    assert one.cancelled()


# --- the operator's log ----------------------------------------------------------------------------------


async def test_provider_message_is_logged(server: OpenAIServer, caplog: pytest.LogCaptureFixture) -> None:
    await once(server, error(400, "invalid_request_error", "invalid_value", "Bad\nsize\x1b[31m for " + KEY))
    [line] = warnings_of(caplog)
    assert line == (
        f"OpenAI: 'BadRequestError invalid_value' (request '{REQUEST_ID}'): "
        r"'Error code: 400 - Bad\nsize\x1b[31m for [key]'"
    )


async def test_start_of_an_unusable_response_is_logged(server: OpenAIServer, caplog: pytest.LogCaptureFixture) -> None:
    await once(server, whole(HTML, 200, "text/html", X_Request_Id=REQUEST_ID))
    [line] = warnings_of(caplog)
    assert REQUEST_ID in line
    assert "Sign in" in line
    assert len(line) < 700
