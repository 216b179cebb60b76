"""The OpenAI editor: the real SDK against a local server that speaks OpenAI's image edit endpoint."""

import asyncio
import contextlib
import json
import logging
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import cycle, islice, product
from typing import Any, Final, get_args

import jsonschema_rs
import openai
import pytest
from openai.types import ImageModel
from PIL import Image

from adapters.images.intake import PillowIntake
from adapters.outbound.url_fetcher import UrlFetcher
from adapters.providers.openai import DEFAULT_MODEL, OpenAIEditor
from domain.errors import Failure, FailureCode
from domain.orders import AspectRatio, Background, InputFidelity, Options, Quality
from domain.ports import Picture
from providers import openai_description
from support.doubles import Studio, pass_time, wish
from support.openai_server import (
    KEY,
    REQUEST_ID,
    STREAM,
    Call,
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
from support.pictures import BLUE, ORANGE, THREADS, encoded, opened, raw_png, solid
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

SHEET: Final = solid(BLUE, (300, 424), "JPEG")
PROMPT: Final = 'Set it "in winter",\r\n\twith {snow} & a 雪だるま ☃ --boundary\n'
RESULT: Final = picture("1024x1536")
SKETCH: Final = picture("1024x1536", BLUE)

SIZES: Final = {"2:3": (1024, 1536), "1:1": (1024, 1024), "3:2": (1536, 1024)}

#: Seconds for a picture.
DEADLINE: Final = 60

#: Quickly made.
NOBODY: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

#: Public addresses only.
FETCHER: Final = UrlFetcher(PillowIntake(THREADS), trust=NOBODY)

both = pytest.mark.parametrize("kind", ["edit", "generate"])


@pytest.fixture(autouse=True)
def secret(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test has a proxy, and whatever it does, nothing that any library logs at any level holds the key."""
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


def editor_at(
    base_url: str, model: str = DEFAULT_MODEL, *, deadline: float = DEADLINE, api_key: str = KEY
) -> OpenAIEditor:
    return OpenAIEditor(
        THREADS, FETCHER, api_key=api_key, base_url=base_url, model=model, deadline=deadline, backoff=0.01, trust=NOBODY
    )


class Reports:
    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.messages: list[str] = []
        self.previews: list[Picture | None] = []
        #: Something has been reported.
        self.told = asyncio.Event()

    async def __call__(self, fraction: float, message: str, preview: Picture | None = None) -> None:
        self.fractions.append(fraction)
        self.messages.append(message)
        self.previews.append(preview)
        self.told.set()


async def edited(server: OpenAIServer, reports: Reports | None = None, model: str = DEFAULT_MODEL) -> Picture:
    return await editor_at(server.base_url, model).edit(SHEET, PROMPT, Options(), reports or Reports())


async def failing(editor: OpenAIEditor, reports: Reports | None = None) -> Failure:
    """The failure, which holds nothing of the provider's: no words, no key, no error of the SDK's."""
    with pytest.raises(Failure) as caught:
        await editor.edit(SHEET, PROMPT, Options(), reports or Reports())
    failure: BaseException | None = caught.value
    while failure is not None:
        assert not isinstance(failure, openai.OpenAIError)
        assert KEY not in f"{failure!r} {failure.__dict__}"
        failure = failure.__cause__ or failure.__context__
    assert "Error code" not in caught.value.sentence
    return caught.value


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "adapters.providers.attempts"]


# --- what we send ----------------------------------------------------------------------------------------


@both
async def test_the_sheet_is_sent_as_a_file_with_its_type_and_its_bytes(server: OpenAIServer, kind: str) -> None:
    await getattr(editor_at(server.base_url), kind)(SHEET, PROMPT, Options(), Reports())
    [call] = server.calls
    assert call.files == {"image": ("sheet.jpeg", SHEET.data, "image/jpeg")}
    assert call.fields["model"] == DEFAULT_MODEL


async def test_an_edit_is_asked_for_in_the_users_words_alone(server: OpenAIServer) -> None:
    await edited(server)
    assert server.calls[0].fields["prompt"] == PROMPT


async def test_a_new_picture_is_asked_for_in_the_users_words_inside_ours(server: OpenAIServer) -> None:
    await editor_at(server.base_url).generate(SHEET, PROMPT, Options(), Reports())
    ours, users, rest = server.calls[0].fields["prompt"].partition(PROMPT)
    assert (users, rest) == (PROMPT, "")
    assert "new picture" in ours
    assert "sheet" in ours


@both
@pytest.mark.parametrize("ratio", get_args(AspectRatio))
async def test_a_picture_has_the_size_of_the_aspect_ratio(server: OpenAIServer, kind: str, ratio: AspectRatio) -> None:
    options = Options(aspect_ratio=ratio)
    made = await getattr(editor_at(server.base_url), kind)(SHEET, PROMPT, options, Reports())
    assert opened(made).size == SIZES[ratio]


async def test_what_is_left_to_the_model_is_not_sent(server: OpenAIServer) -> None:
    await edited(server)
    assert set(server.calls[0].fields) == {"model", "prompt", "size", "output_format", "stream", "partial_images"}


async def test_quality_and_background_are_sent_as_chosen_and_a_transparent_one_gets_a_format_for_it(
    server: OpenAIServer,
) -> None:
    options = Options(quality="low", background="transparent")
    await editor_at(server.base_url).edit(SHEET, PROMPT, options, Reports())
    fields = server.calls[0].fields
    assert (fields["quality"], fields["background"], fields["output_format"]) == ("low", "transparent", "png")


@pytest.mark.parametrize(
    ("model", "fidelities"),
    [
        ("gpt-image-1.5", ["low", "high"]),
        ("gpt-image-1-mini", ["low"]),
        ("gpt-image-2", []),
        ("gpt-image-2.5-sunburst", []),
        (DEFAULT_MODEL, []),
        ("chatgpt-image-latest", []),
        ("flux-kontext", []),
    ],
)
async def test_input_fidelity_is_sent_to_the_models_that_know_it(
    server: OpenAIServer, model: str, fidelities: list[str]
) -> None:
    server.answer(pictures(picture("64x64")))
    editor = editor_at(server.base_url, model)
    for fidelity in (None, *get_args(InputFidelity)):
        await editor.edit(SHEET, PROMPT, Options(input_fidelity=fidelity), Reports())
    sent = [call.fields["input_fidelity"] for call in server.calls if "input_fidelity" in call.fields]
    assert sent == fidelities


#: As the SDK's notes on them say.
RETIRED: Final = {"gpt-image-1", "dall-e-2", "dall-e-3"}
CURRENT: Final = sorted({*get_args(ImageModel)} - RETIRED)


def conforms(call: Call) -> None:
    """Check a form against what OpenAI publishes of the endpoint.

    Of a text that may be any, as a size, only those that are named there will do; and of models those of the SDK.
    """
    assert {*call.files} == {"image"}
    form: dict[str, Any] = {**call.fields, "image": call.files["image"].name}
    assert form.keys() <= openai_description.FORM["properties"].keys()
    for name, text in call.fields.items():
        if openai_description.FORM["properties"][name]["type"] != "string":
            form[name] = json.loads(text)
    jsonschema_rs.validate(openai_description.FORM, form)
    assert call.fields["model"] in get_args(ImageModel)
    # What its prose says.
    assert 1 <= len(call.fields["prompt"]) <= 32_000
    assert call.fields.get("background") != "transparent" or call.fields["output_format"] in ("png", "webp")
    assert call.files["image"].media_type in ("image/png", "image/webp", "image/jpeg")


def every_option() -> Iterator[Options]:
    """Every value of every option, each with several values of the others."""
    qualities, backgrounds = cycle(get_args(Quality)), cycle(get_args(Background))
    for ratio, fidelity in product(get_args(AspectRatio), (None, *get_args(InputFidelity))):
        yield Options(
            quality=next(qualities), background=next(backgrounds), aspect_ratio=ratio, input_fidelity=fidelity
        )


@pytest.mark.parametrize("model", CURRENT)
async def test_everything_sent_is_as_openai_describes_it(server: OpenAIServer, model: str) -> None:
    server.answer(pictures(picture("64x64")))
    editor, long = editor_at(server.base_url, model), "x" * 4000
    calls = [(editor.edit, options) for options in islice(every_option(), None if model == DEFAULT_MODEL else 3)]
    calls += [(editor.generate, Options(quality="high", background="transparent", input_fidelity="high"))]
    await asyncio.gather(*[make(SHEET, long, options, Reports()) for make, options in calls])
    assert len(server.calls) == len(calls)
    for call in server.calls:
        conforms(call)


async def test_a_form_that_openai_does_not_describe_is_noticed(server: OpenAIServer) -> None:
    await edited(server)
    [call] = server.calls
    for wrong in ({"size": "1000x1000"}, {"quality": "best"}, {"partial_images": "4"}, {"stream": "1"}):
        with pytest.raises(jsonschema_rs.ValidationError):
            conforms(call._replace(fields={**call.fields, **wrong}))
    for wrong in ({"style": "vivid"}, {"model": "gpt-9"}):
        with pytest.raises(AssertionError):
            conforms(call._replace(fields={**call.fields, **wrong}))
    with pytest.raises(AssertionError):
        conforms(call._replace(files={}))


def test_what_these_tests_answer_is_as_openai_describes_it() -> None:
    jsonschema_rs.validate(openai_description.ANSWER, data_of(in_base64(RESULT)))
    for sent in (partial(0, SKETCH), completed(RESULT)):
        data = json.loads(sent.partition(b"\ndata: ")[2])
        jsonschema_rs.validate(openai_description.EVENT, data)
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(openai_description.EVENT, {**data, "b64_json": None})
    jsonschema_rs.validate(
        openai_description.ERROR, error_body("image_generation_user_error", "moderation_blocked")["error"]
    )


def test_the_default_model_is_a_current_one() -> None:
    assert DEFAULT_MODEL in CURRENT


async def test_of_a_model_that_is_not_openais_only_what_every_edit_endpoint_has_is_asked(server: OpenAIServer) -> None:
    options = Options(quality="high", background="transparent", input_fidelity="high")
    made = await editor_at(server.base_url, "flux-kontext").edit(SHEET, PROMPT, options, Reports())
    fields = server.calls[0].fields
    assert set(fields) == {"model", "prompt", "size", "response_format"}
    assert fields["response_format"] == "b64_json"
    assert made == Picture(RESULT, "image/png")


# --- the environment -------------------------------------------------------------------------------------


async def test_no_account_comes_from_the_environment(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "sk-somebody-elses"
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", other)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {other}\nX-Account: {other}\nX-Plain: yes")
    with closed_port() as port:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        await edited(server)
    headers = server.calls[0].headers
    assert headers["authorization"] == f"Bearer {KEY}"
    assert other not in str(headers)
    assert not {"openai-organization", "openai-project", "x-plain"} & headers.keys()


async def test_without_a_base_url_it_is_openais_whatever_the_environment_says(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("HTTPS_PROXY", server.origin.address)
    await failing(OpenAIEditor(THREADS, FETCHER, api_key=KEY, deadline=DEADLINE, trust=NOBODY))
    [request] = server.origin.requests
    assert (request.method, request.target) == ("CONNECT", "api.openai.com:443")


async def test_the_way_out_may_be_a_proxy_of_the_environment(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.origin.address)
    made = await editor_at("http://openai.test/v1").edit(SHEET, PROMPT, Options(), Reports())
    assert server.calls[0].target == "http://openai.test/v1/images/edits"
    assert made.data == RESULT


def test_the_sdk_is_not_imported_before_it_is_used() -> None:
    program = "import sys, adapters.providers.openai; sys.exit('openai' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": "src"}, check=True, timeout=50)


# --- the picture -----------------------------------------------------------------------------------------


async def test_a_model_that_streams_shows_the_picture_taking_shape(server: OpenAIServer) -> None:
    server.answer(stream(partial(0, SKETCH), partial(1, SKETCH), completed(RESULT)))
    reports = Reports()
    made = await edited(server, reports)
    assert made == Picture(RESULT, "image/png")
    assert server.calls[0].fields["stream"] == "true"
    assert server.calls[0].fields["partial_images"] == "2"
    # Progress rises, beyond what the waits for a busy service take.
    assert reports.fractions == [0.5, 0.75]
    assert len({*reports.messages}) == 2
    for preview in reports.previews:
        assert preview is not None
        assert opened(preview).size == (512, 768)
        assert len(preview.data) < len(SKETCH)


@pytest.mark.parametrize(
    ("answer", "previews"),
    [
        (pictures(RESULT), 0),
        (stream(completed(RESULT)), 0),
        (stream(partial(0, SKETCH), completed(RESULT)), 1),
        (stream(*[partial(index, SKETCH) for index in range(5)], completed(RESULT)), 5),
        (stream(event("image_edit.progress", percent=50), b": ping\n\n", completed(RESULT)), 0),
        (stream(partial(0, b"no picture"), partial(1, SKETCH[:5000]), completed(RESULT)), 0),
        (stream(event("image_edit.partial_image"), completed(RESULT)), 0),
    ],
)
async def test_previews_are_an_extra_without_which_nothing_breaks(
    server: OpenAIServer, answer: Answer, previews: int
) -> None:
    server.answer(answer)
    reports = Reports()
    assert (await edited(server, reports)).data == RESULT
    assert len(reports.previews) == previews
    assert reports.fractions == sorted({*reports.fractions})
    assert all(fraction < 1 for fraction in reports.fractions)


async def test_the_picture_is_there_as_soon_as_it_is_complete_and_the_rest_is_not_waited_for(
    server: OpenAIServer,
) -> None:
    server.answer(then(stream(completed(RESULT)), hang))
    assert (await edited(server)).data == RESULT
    await server.origin.left.wait()


async def test_no_connection_is_kept_on_which_the_next_paid_call_might_get_lost(server: OpenAIServer) -> None:
    body = json.dumps(data_of(in_base64(RESULT))).encode()
    kept_alive = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    server.answer(then(raw(kept_alive.encode(), body), hang))
    assert (await edited(server)).data == RESULT
    await server.origin.left.wait()


@pytest.mark.parametrize(("kind", "media_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")])
async def test_a_picture_is_kept_as_it_came_and_its_type_is_what_it_is(
    server: OpenAIServer, kind: str, media_type: str
) -> None:
    data = encoded(Image.new("RGB", (640, 960), ORANGE), kind)
    server.answer(pictures(data))
    assert await edited(server) == Picture(data, media_type)


async def test_a_transparent_picture_stays_transparent(server: OpenAIServer) -> None:
    data = encoded(Image.new("RGBA", (640, 640), (0, 0, 0, 0)))
    server.answer(stream(partial(0, data), completed(data)))
    reports = Reports()
    assert (await edited(server, reports)).data == data
    assert reports.previews[0] is not None
    assert opened(reports.previews[0]).getpixel((5, 5)) == (0, 0, 0, 0)


async def test_a_generation_shows_each_preview_with_rising_progress(server: OpenAIServer) -> None:
    server.answer(stream(partial(0, SKETCH), partial(1, SKETCH), completed(RESULT)))
    studio = Studio()
    studio.runner.editor = editor_at(server.base_url)
    async with studio.open():
        made = await studio.make(wish())
    shown = [event for event in await studio.events(made) if event["status"] == "openai_editing"]
    assert [event["progress"] for event in shown] == [60, 70, 75]
    assert [("previewUrl" in event) for event in shown] == [False, True, True]
    assert made.status == "completed"


# --- refused, and asked again ----------------------------------------------------------------------------

BUSY: Final = error(429, "requests", "rate_limit_exceeded", "Rate limit reached", retry_after="0.01")
OVERLOADED: Final = error(503, "server_error", None, "Overloaded", retry_after="0.01")


@pytest.mark.parametrize(
    ("answer", "message"), [(BUSY, "is busy; trying again in"), (OVERLOADED, "cannot be reached; trying again in")]
)
async def test_a_busy_service_is_asked_again_and_everybody_sees_it(
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
async def test_a_service_that_stays_busy_is_given_up_after_four_calls(
    server: OpenAIServer, answer: Answer, code: FailureCode
) -> None:
    server.answer(answer)
    failure = await failing(editor_at(server.base_url))
    assert (failure.code, failure.retryable, len(server.calls)) == (code, True, 4)


async def test_a_wait_that_goes_beyond_the_deadline_is_not_begun(server: OpenAIServer) -> None:
    server.answer(error(429, "requests", "rate_limit_exceeded", retry_after="59"))
    reports = Reports()
    failure = await failing(editor_at(server.base_url, deadline=50), reports)
    assert (failure.code, len(server.calls), reports.messages) == ("provider_rate_limited", 1, [])


async def test_where_nobody_listens_it_is_tried_again_and_then_given_up() -> None:
    reports = Reports()
    with closed_port() as port:
        failure = await failing(editor_at(f"http://127.0.0.1:{port}/v1"), reports)
    assert (failure.code, failure.retryable, len(reports.messages)) == ("provider_unavailable", True, 3)


async def test_a_service_that_comes_up_meanwhile_gets_one_call() -> None:
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
    """What this answer comes to, after one call that may have been paid for, and with nothing shown of it.

    `too_late`: the time for a picture is over while it goes on.
    """
    server.answer(answer)
    reports = Reports()
    call = asyncio.create_task(failing(editor_at(server.base_url), reports))
    if too_late:
        await server.origin.reached.wait()
        await pass_time(DEADLINE)
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
async def test_an_error_has_its_code_after_one_call(
    server: OpenAIServer, answer: Answer, code: FailureCode, retryable: bool
) -> None:
    failure = await once(server, answer)
    assert (failure.code, failure.retryable) == (code, retryable)


@pytest.mark.parametrize(("status", "code"), [(500, "provider_unavailable"), (429, "provider_rate_limited")])
async def test_the_status_counts_for_more_than_what_is_said_of_the_content_rules(
    server: OpenAIServer, status: int, code: str
) -> None:
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
async def test_a_request_against_the_content_rules_is_refused_with_something_to_do(
    server: OpenAIServer, answer: Answer
) -> None:
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
async def test_what_only_the_operator_can_help_is_said_to_be_so(
    server: OpenAIServer, answer: Answer, code: FailureCode
) -> None:
    failure = await once(server, answer)
    assert (failure.code, failure.retryable) == (code, False)
    assert "Please tell whoever runs it." in failure.sentence


async def test_a_wrong_key_is_refused_and_not_told_to_anybody(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "sk-proj-WRONG-9xLrWcKe2hNfYpGu8aJi3"
    failure = await failing(editor_at(server.base_url, api_key=wrong))
    assert (failure.code, len(server.calls)) == ("provider_rejected", 1)
    [line] = warnings_of(caplog)
    assert "invalid_api_key" in line
    # OpenAI quotes both ends of it.
    assert "sk-proj" not in caplog.text
    assert wrong[-4:] not in caplog.text


@pytest.mark.parametrize("odd", ["", KEY + "\n", KEY + "\r\nX-More: yes", KEY + "…", " " + KEY])
def test_what_is_no_key_is_refused_at_once_without_quoting_it(odd: str) -> None:
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
async def test_an_error_in_the_middle_of_a_stream_has_its_code_and_is_not_asked_about_again(
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
async def test_an_answer_without_a_picture_is_no_answer(server: OpenAIServer, answer: Answer) -> None:
    failure = await once(server, answer)
    assert (failure.code, failure.retryable) == ("provider_unavailable", True)


@pytest.mark.parametrize("ending", [raw(), reset, raw(completed(RESULT)[:5000]), then(raw(b"data: {"), reset)])
async def test_a_stream_that_breaks_off_after_a_preview_has_brought_nothing(
    server: OpenAIServer, ending: Answer
) -> None:
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
async def test_of_an_endless_answer_not_more_is_read_than_a_picture_can_have(
    server: OpenAIServer, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.providers.openai.MAX_ANSWER", 4 * MEGABYTE)
    flood = Flood(100, start)
    failure = await once(server, flood)
    assert failure.code == "provider_unavailable"
    await server.origin.left.wait()
    # What lies between us, in the buffers of both sides, is not held by us.
    assert flood.taken < 60


async def test_a_hundred_megabytes_are_not_taken(server: OpenAIServer) -> None:
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
async def test_who_hangs_or_drips_is_left_at_the_deadline(server: OpenAIServer, answer: Answer) -> None:
    failure = await once(server, answer, too_late=True)
    assert (failure.code, failure.retryable) == ("provider_timeout", True)
    await server.origin.left.wait()


async def test_a_call_that_is_given_up_leaves_its_request_id_for_the_bill(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer(then(stream(partial(0, SKETCH)), hang))
    reports = Reports()
    call = asyncio.create_task(failing(editor_at(server.base_url), reports))
    await reports.told.wait()
    await pass_time(DEADLINE)
    assert (await call).code == "provider_timeout"
    assert warnings_of(caplog) == [f"OpenAI: 'gave up waiting' (request '{REQUEST_ID}'): ''"]


@pytest.mark.parametrize("answer", [hang, then(raw(STREAM, partial(0, SKETCH)), hang)], ids=["before", "after"])
async def test_cancelling_hangs_up(server: OpenAIServer, answer: Answer) -> None:
    server.answer(answer)
    task = asyncio.create_task(edited(server))
    await server.origin.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await server.origin.left.wait()
    assert len(server.calls) == 1


async def test_cancelling_one_does_not_touch_its_neighbour(server: OpenAIServer) -> None:
    let_go = asyncio.Event()

    async def later(writer: asyncio.StreamWriter) -> None:
        await let_go.wait()
        await stream(completed(RESULT))(writer)

    server.answer(later)
    editor = editor_at(server.base_url)
    one, other = [asyncio.create_task(editor.edit(SHEET, PROMPT, Options(), Reports())) for _ in range(2)]
    while len(server.calls) < 2:
        await asyncio.sleep(0.005)
    one.cancel()
    await server.origin.left.wait()
    let_go.set()
    assert (await other).data == RESULT
    assert one.cancelled()


# --- the operator's log ----------------------------------------------------------------------------------


async def test_the_operator_reads_what_the_provider_said(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    await once(server, error(400, "invalid_request_error", "invalid_value", "Bad\nsize\x1b[31m for " + KEY))
    [line] = warnings_of(caplog)
    assert line == (
        f"OpenAI: 'BadRequestError invalid_value' (request '{REQUEST_ID}'): "
        r"'Error code: 400 - Bad\nsize\x1b[31m for [key]'"
    )


async def test_the_operator_reads_the_beginning_of_what_is_no_answer(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    await once(server, whole(HTML, 200, "text/html", X_Request_Id=REQUEST_ID))
    [line] = warnings_of(caplog)
    assert REQUEST_ID in line
    assert "Sign in" in line
    assert len(line) < 700
