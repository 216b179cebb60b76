"""The OpenAI editor: the real SDK against a local server that speaks OpenAI's image edit endpoint."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import cycle, islice, product
from typing import Any, Final, get_args

import jsonschema_rs
import pytest
from openai.types import ImageModel
from PIL import Image

from adapters.providers.openai import DEFAULT_MODEL, OpenAIEditor
from domain.ports.images import Picture
from domain.requests import AspectRatio, Background, InputFidelity, Options, Quality
from providers import openai_description
from support.doubles import InMemoryBackend, start_arguments
from support.openai_editor import (
    DEADLINE,
    FETCHER,
    NO_TRUSTED_CAS,
    PROMPT,
    RESULT,
    SHEET,
    SKETCH,
    Reports,
    edited,
    editor_at,
    failing,
)
from support.openai_server import (
    KEY,
    Call,
    OpenAIServer,
    completed,
    data_of,
    error_body,
    event,
    in_base64,
    openai_server,
    partial,
    picture,
    pictures,
    stream,
)
from support.pictures import ORANGE, THREADS, encoded, opened
from support.provider_faults import Answer, closed_port, hang, raw, then

SIZES: Final = {"2:3": (1024, 1536), "1:1": (1024, 1024), "3:2": (1536, 1024)}

both = pytest.mark.parametrize("kind", ["edit", "generate"])


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


# --- what we send ----------------------------------------------------------------------------------------


@both
async def test_sheet_is_sent_as_a_file_with_its_media_type(server: OpenAIServer, kind: str) -> None:
    await getattr(editor_at(server.base_url), kind)(SHEET, PROMPT, Options(), Reports())
    [call] = server.calls
    assert call.files == {"image": ("sheet.jpeg", SHEET.data, "image/jpeg")}
    assert call.fields["model"] == DEFAULT_MODEL


async def test_edit_sends_the_prompt_unchanged(server: OpenAIServer) -> None:
    await edited(server)
    assert server.calls[0].fields["prompt"] == PROMPT


async def test_generate_sends_the_prompt_after_an_instruction(server: OpenAIServer) -> None:
    await editor_at(server.base_url).generate(SHEET, PROMPT, Options(), Reports())
    ours, users, rest = server.calls[0].fields["prompt"].partition(PROMPT)
    assert (users, rest) == (PROMPT, "")
    assert "new picture" in ours
    assert "sheet" in ours


@both
@pytest.mark.parametrize("ratio", get_args(AspectRatio))
async def test_size_follows_the_aspect_ratio(server: OpenAIServer, kind: str, ratio: AspectRatio) -> None:
    options = Options(aspect_ratio=ratio)
    made = await getattr(editor_at(server.base_url), kind)(SHEET, PROMPT, options, Reports())
    assert opened(made).size == SIZES[ratio]


async def test_auto_options_are_not_sent(server: OpenAIServer) -> None:
    await edited(server)
    assert set(server.calls[0].fields) == {"model", "prompt", "size", "output_format", "stream", "partial_images"}


async def test_quality_and_background_are_sent_with_a_format_that_supports_transparency(
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
async def test_input_fidelity_is_sent_only_to_models_that_support_it(
    server: OpenAIServer, model: str, fidelities: list[str]
) -> None:
    server.answer(pictures(picture("64x64")))
    editor = editor_at(server.base_url, model)
    for fidelity in (None, *get_args(InputFidelity)):
        await editor.edit(SHEET, PROMPT, Options(input_fidelity=fidelity), Reports())
    sent = [call.fields["input_fidelity"] for call in server.calls if "input_fidelity" in call.fields]
    assert sent == fidelities


#: From the SDK's documentation.
RETIRED: Final = {"gpt-image-1", "dall-e-2", "dall-e-3"}
CURRENT: Final = sorted({*get_args(ImageModel)} - RETIRED)


def conforms(call: Call) -> None:
    """Check a form against OpenAI's description of the endpoint.

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
    # From the text of the description.
    assert 1 <= len(call.fields["prompt"]) <= 32_000
    assert call.fields.get("background") != "transparent" or call.fields["output_format"] in ("png", "webp")
    assert call.files["image"].media_type in ("image/png", "image/webp", "image/jpeg")


def every_option() -> Iterator[Options]:
    """Each value of each option, combined with several values of the others."""
    qualities, backgrounds = cycle(get_args(Quality)), cycle(get_args(Background))
    for ratio, fidelity in product(get_args(AspectRatio), (None, *get_args(InputFidelity))):
        yield Options(
            quality=next(qualities), background=next(backgrounds), aspect_ratio=ratio, input_fidelity=fidelity
        )


@pytest.mark.parametrize("model", CURRENT)
async def test_requests_match_openais_description(server: OpenAIServer, model: str) -> None:
    server.answer(pictures(picture("64x64")))
    editor, long = editor_at(server.base_url, model), "x" * 4000
    calls = [(editor.edit, options) for options in islice(every_option(), None if model == DEFAULT_MODEL else 3)]
    calls += [(editor.generate, Options(quality="high", background="transparent", input_fidelity="high"))]
    await asyncio.gather(*[make(SHEET, long, options, Reports()) for make, options in calls])
    assert len(server.calls) == len(calls)
    for call in server.calls:
        conforms(call)


async def test_check_against_openais_description_detects_wrong_forms(server: OpenAIServer) -> None:
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


def test_responses_of_the_test_server_match_openais_description() -> None:
    jsonschema_rs.validate(openai_description.ANSWER, data_of(in_base64(RESULT)))
    for sent in (partial(0, SKETCH), completed(RESULT)):
        data = json.loads(sent.partition(b"\ndata: ")[2])
        jsonschema_rs.validate(openai_description.EVENT, data)
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(openai_description.EVENT, {**data, "b64_json": None})
    jsonschema_rs.validate(
        openai_description.ERROR, error_body("image_generation_user_error", "moderation_blocked")["error"]
    )


def test_default_model_is_a_current_one() -> None:
    assert DEFAULT_MODEL in CURRENT


async def test_other_models_get_only_parameters_that_every_edit_endpoint_has(server: OpenAIServer) -> None:
    options = Options(quality="high", background="transparent", input_fidelity="high")
    made = await editor_at(server.base_url, "flux-kontext").edit(SHEET, PROMPT, options, Reports())
    fields = server.calls[0].fields
    assert set(fields) == {"model", "prompt", "size", "response_format"}
    assert fields["response_format"] == "b64_json"
    assert made == Picture(RESULT, "image/png")


# --- the environment -------------------------------------------------------------------------------------


async def test_account_settings_of_the_environment_are_not_used(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
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


async def test_default_base_url_ignores_the_environment(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("HTTPS_PROXY", server.origin.address)
    await failing(OpenAIEditor(THREADS, FETCHER, api_key=KEY, deadline=DEADLINE, trust=NO_TRUSTED_CAS))
    [request] = server.origin.requests
    assert (request.method, request.target) == ("CONNECT", "api.openai.com:443")


async def test_proxy_of_the_environment_is_used(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.origin.address)
    made = await editor_at("http://openai.test/v1").edit(SHEET, PROMPT, Options(), Reports())
    assert server.calls[0].target == "http://openai.test/v1/images/edits"
    assert made.data == RESULT


def test_sdk_is_imported_on_first_use() -> None:
    program = "import sys, adapters.providers.openai; sys.exit('openai' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": "src"}, check=True, timeout=50)


# --- the picture -----------------------------------------------------------------------------------------


async def test_partial_images_are_reported_as_previews(server: OpenAIServer) -> None:
    server.answer(stream(partial(0, SKETCH), partial(1, SKETCH), completed(RESULT)))
    reports = Reports()
    made = await edited(server, reports)
    assert made == Picture(RESULT, "image/png")
    assert server.calls[0].fields["stream"] == "true"
    assert server.calls[0].fields["partial_images"] == "2"
    # Progress rises above the share for waits.
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
async def test_missing_or_broken_previews_do_not_fail_the_edit(
    server: OpenAIServer, answer: Answer, previews: int
) -> None:
    server.answer(answer)
    reports = Reports()
    assert (await edited(server, reports)).data == RESULT
    assert len(reports.previews) == previews
    assert reports.fractions == sorted({*reports.fractions})
    assert all(fraction < 1 for fraction in reports.fractions)


async def test_edit_returns_at_the_completed_event(
    server: OpenAIServer,
) -> None:
    server.answer(then(stream(completed(RESULT)), hang))
    assert (await edited(server)).data == RESULT
    await server.origin.left.wait()


async def test_connections_are_not_reused_for_paid_calls(server: OpenAIServer) -> None:
    body = json.dumps(data_of(in_base64(RESULT))).encode()
    kept_alive = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    server.answer(then(raw(kept_alive.encode(), body), hang))
    assert (await edited(server)).data == RESULT
    await server.origin.left.wait()


@pytest.mark.parametrize(("kind", "media_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")])
async def test_picture_bytes_are_unchanged_and_their_type_is_detected(
    server: OpenAIServer, kind: str, media_type: str
) -> None:
    data = encoded(Image.new("RGB", (640, 960), ORANGE), kind)
    server.answer(pictures(data))
    assert await edited(server) == Picture(data, media_type)


async def test_transparent_picture_stays_transparent(server: OpenAIServer) -> None:
    data = encoded(Image.new("RGBA", (640, 640), (0, 0, 0, 0)))
    server.answer(stream(partial(0, data), completed(data)))
    reports = Reports()
    assert (await edited(server, reports)).data == data
    assert reports.previews[0] is not None
    assert opened(reports.previews[0]).getpixel((5, 5)) == (0, 0, 0, 0)


async def test_generation_shows_each_preview_with_rising_progress(server: OpenAIServer) -> None:
    server.answer(stream(partial(0, SKETCH), partial(1, SKETCH), completed(RESULT)))
    backend = InMemoryBackend()
    backend.runner.editor = editor_at(server.base_url)
    async with backend.open():
        made = await backend.make(start_arguments())
    shown = [event for event in await backend.events(made) if event["status"] == "openai_editing"]
    assert [event["progress"] for event in shown] == [60, 70, 75]
    assert [("previewUrl" in event) for event in shown] == [False, True, True]
    assert made.status == "completed"
