"""Forms as clients really send them: their parts, field names, empty fields and charsets."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import httpx2
import pytest
import pytest_asyncio

from domain.requests import GenerationRequest
from support.http_app import PNG, Api, assert_problem, serve_api

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api() -> AsyncIterator[Api]:
    async with serve_api(credits=None, max_per_user=1_000) as api:
        yield api


def part(disposition: str, content: bytes | str, *headers: str) -> bytes:
    """One part, as written by a client that sends these headers."""
    data = content.encode() if isinstance(content, str) else content
    return "\r\n".join((f"Content-Disposition: form-data; {disposition}", *headers, "", "")).encode() + data


def text(name: str, content: bytes | str, *headers: str) -> bytes:
    return part(f'name="{name}"', content, *headers)


PROMPT: Final = text("prompt", "a red hat")
FILE: Final = part('name="images"; filename="a.png"', PNG, "Content-Type: image/png")
URL: Final = "https://example.com/a.png"


def form(*parts: bytes, before: bytes = b"", after: bytes = b"\r\n", padding: bytes = b"") -> bytes:
    line = b"--B" + padding + b"\r\n"
    return before + b"\r\n".join(line + each for each in parts) + b"\r\n--B--" + after


async def send(
    api: Api, body: bytes, kind: str = "edit", content_type: str = "multipart/form-data; boundary=B", **headers: str
) -> httpx2.Response:
    headers = {"Content-Type": content_type, **headers}
    return await api.client.post(f"/generations/{kind}", content=body, headers=headers)


async def order(api: Api, answer: httpx2.Response) -> GenerationRequest:
    """What was understood."""
    assert answer.status_code == 202, answer.text
    history = await api.log.generation(answer.json()["generationId"])
    assert history is not None
    return GenerationRequest.decode(history.request)


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disposition", "headers"),
    [
        ('name="images"', ["Content-Type: image/png"]),
        ('name="images"', ["Content-Type: application/octet-stream"]),
        ('name="images"', ["Content-Type: text/plain; charset=utf-8"]),
        ('name="images"', ["Content-Type: image/png; charset=binary"]),
        ('name="images"', []),
        ("name=images", ["Content-Type: image/png"]),
        ("name=images; filename=a.png; filename*=utf-8''a.png", ["Content-Type: image/png"]),
        ("name=\"images\"; filename*=UTF-8''%E5%9B%BE.png", ["Content-Type: image/png"]),
        ("filename*=UTF-8''a.png; name=images", []),
        ('filename="a.png"; name="images"', ["Content-Type: image/png"]),
        ('name="images"; filename="blob"', ["Content-Type: application/json"]),
        ('name="images"; filename=""', ["Content-Type: image/png"]),
        ('name="images"; filename="a;b=\\"c\\".png"', ["Content-Type: image/png"]),
        ('name="images"; filename="=?utf-8?B?5Zu+LnBuZw==?="', ["Content-Type: image/png"]),
        ('NAME="images"; FileName="a.png"', ["content-type: image/png"]),
        ('name = "images" ; filename = "a.png"', ["Content-Type:image/png"]),
        ('name="images"; filename="a.png"', ["Content-Type: image/png", "Content-Transfer-Encoding: binary"]),
        ('name="images"; filename="a.png"', ["CONTENT-TRANSFER-ENCODING: 8BIT", "Content-Length: 18"]),
        ('name="images"; filename="a.png"; size=18', ["Content-ID: <1>", "X-Other: y"]),
    ],
)
async def test_a_file_is_taken_whatever_headers_a_client_gives_it(
    api: Api, disposition: str, headers: list[str]
) -> None:
    answer = await send(api, form(PROMPT, part(disposition, PNG, *headers)))
    [name] = (await order(api, answer)).images
    assert api.images.kept[name].data == PNG


async def test_part_headers_may_come_in_any_case_and_order(api: Api) -> None:
    odd = b'CONTENT-TYPE: image/png\r\nx-y: z\r\ncontent-disposition: FORM-DATA; name="images"; filename="a"\r\n\r\n'
    assert len((await order(api, await send(api, form(PROMPT, odd + PNG)))).images) == 1


async def test_a_large_file_without_a_name_is_still_a_file(api: Api) -> None:
    large = PNG + bytes(3_000_000)
    unnamed = part('name="images"', large, "Content-Type: image/png")
    assert len((await order(api, await send(api, form(PROMPT, unnamed)))).images) == 1
    misnamed = part('name="images[]"', large, "Content-Type: image/png")
    problem = assert_problem(await send(api, form(PROMPT, misnamed)), 422, "invalid_request")
    assert problem["detail"] == "images[]: There is no such field; did you mean images?"


@pytest.mark.parametrize("webp", [b"RIFF\x24\x00\x00\x00WEBPVP8 ", b"RIFF\x24\x20\x20\x00WEBPVP8L"])
@pytest.mark.parametrize("headers", [[], ["Content-Type: image/webp"]])
async def test_every_format_is_a_file_without_a_name(api: Api, webp: bytes, headers: list[str]) -> None:
    # The intake of this application takes PNG alone, and is asked.
    for data in (webp, b"\xff\xd8\xff\xe0"):
        answer = await send(api, form(PROMPT, part('name="images"', data, *headers)))
        assert_problem(answer, 415, "unsupported_image_type")


@pytest.mark.parametrize("headers", [[], ["Content-Type: text/plain"], ["Content-Type: application/json"]])
async def test_a_text_in_place_of_a_file_is_refused_with_a_hint(api: Api, headers: list[str]) -> None:
    for value in (URL, "null", "[object File]", "çok güzel"):
        answer = await send(api, form(PROMPT, text("images", value, *headers)))
        problem = assert_problem(answer, 422, "invalid_request")
        assert problem["detail"] == "images.0: This must be a file; URLs belong in imageUrls"


# --- texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["", '; filename="blob"', "; filename*=UTF-8''a.json"])
@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=UTF-8"])
async def test_texts_may_be_json_parts_and_have_file_names(api: Api, file: str, media_type: str) -> None:
    values = {
        "prompt": '"a \\"red\\" hat"',
        "metadata": '{"a": [1, "ü"]}',
        "imageUrls": f'["{URL}"]',
        "faceSwap": "false",
        "quality": '"low"',
        "background": "opaque",
        "aspectRatio": '"1:1"',
    }
    parts = [part(f'name="{name}"{file}', value, f"Content-Type: {media_type}") for name, value in values.items()]
    understood = await order(api, await send(api, form(*parts, FILE)))
    assert understood.prompt == 'a "red" hat'
    assert understood.metadata == {"a": [1, "ü"]}
    assert understood.image_urls == (URL,)
    assert understood.face_swap is False
    options = understood.options
    assert (options.quality, options.background, options.aspect_ratio) == ("low", "opaque", "1:1")


@pytest.mark.parametrize(
    ("sent", "understood"),
    [
        ("a red hat", "a red hat"),
        ('"a red hat', '"a red hat'),
        ("123", "123"),
        ("null", "null"),
        ('{"a": 1}', '{"a": 1}'),
        ('  "a"\n', "a"),
        ('"\\ud800"', '"\\ud800"'),
        ('"caf\\u00e9"', "café"),
    ],
)
async def test_a_json_part_that_is_not_a_string_is_read_as_text(api: Api, sent: str, understood: str) -> None:
    prompt = part('name="prompt"; filename="blob"', sent, "Content-Type: application/json")
    assert (await order(api, await send(api, form(prompt, FILE)))).prompt == understood
    plain = text("prompt", sent, "Content-Type: text/plain")
    assert (await order(api, await send(api, form(plain, FILE)))).prompt == sent


async def test_image_urls_may_be_repeated_as_json_strings_or_one_array_of_any_layout(api: Api) -> None:
    as_json = "Content-Type: application/json"
    for urls in (
        [text("imageUrls", f'"{URL}"', as_json), text("imageUrls", f'"{URL}?b"', as_json)],
        [text("imageUrls", f'\n [\r\n"{URL}", "{URL}?b"]', as_json)],
        [text("imageUrls", f'["{URL}", "{URL}?b"]')],
        [text("imageUrls", URL), text("imageUrls", f"{URL}?b", "Content-Type: text/plain")],
    ):
        understood = await order(api, await send(api, form(PROMPT, *urls)))
        assert understood.image_urls == (URL, f"{URL}?b")


@pytest.mark.parametrize(
    ("charset", "content"),
    [
        ("ISO-8859-1", "café".encode("latin-1")),
        ("iso-8859-9", "çığ".encode("iso-8859-9")),
        ('"windows-1254"', "çığ".encode("cp1254")),
        ("utf8", "çığ".encode()),
        ("US-ASCII", "çığ".encode()),
        ("", "çığ".encode()),
    ],
)
async def test_a_text_is_read_in_its_charset(api: Api, charset: str, content: bytes) -> None:
    wanted = "café" if charset == "ISO-8859-1" else "çığ"
    own = text("prompt", content, f"Content-Type: text/plain; charset={charset}")
    assert (await order(api, await send(api, form(own, FILE)))).prompt == wanted
    of_form = f"multipart/form-data; boundary=B; charset={charset}"
    answer = await send(api, form(text("prompt", content), FILE), content_type=of_form)
    assert (await order(api, answer)).prompt == wanted


@pytest.mark.parametrize("charset", ["utf-7", "unicode_escape", "idna", "punycode", "hex", "rot13", "nonsense", "ü"])
async def test_an_unsupported_charset_is_rejected(api: Api, charset: str) -> None:
    body = form(text("prompt", "x", f"Content-Type: text/plain; charset={charset}"), FILE)
    assert_problem(await send(api, body), 415, "unsupported_media_type")


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable", "x-uuencode"])
async def test_a_transfer_encoding_is_refused_rather_than_taken_as_content(api: Api, encoding: str) -> None:
    for encoded in (
        form(text("prompt", "YQ==", f"Content-Transfer-Encoding: {encoding}"), FILE),
        form(PROMPT, part('name="images"; filename="a"', PNG, f"Content-Transfer-Encoding: {encoding}")),
    ):
        assert_problem(await send(api, encoded), 415, "unsupported_media_type")


# --- the frame ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        form(PROMPT, FILE, before=b"This is a multi-part message in MIME format.\r\n"),
        form(PROMPT, FILE, before=b"-- not a boundary\r\n--C\r\n\r\n"),
        form(PROMPT, FILE, before=b"\r\n"),
        form(PROMPT, FILE, before=b"\r\n\r\n -\r\n"),
        form(PROMPT, FILE, before=b"x" * 100_000 + b"\r\n"),
        form(PROMPT, FILE, after=b""),
        form(PROMPT, FILE, after=b"\r\nThe end.\r\n--B\r\n"),
        form(PROMPT, FILE, padding=b" \t "),
    ],
)
async def test_preamble_and_epilogue_are_skipped(api: Api, body: bytes) -> None:
    assert (await order(api, await send(api, body))).prompt == "a red hat"


async def test_a_preamble_is_skipped_in_any_chunking(api: Api) -> None:
    body = form(PROMPT, FILE, before=b"preamble --B\r\n")

    for size in (1, 7):
        pieces = [body[at : at + size] for at in range(0, len(body), size)]

        async def stream(pieces: Sequence[bytes] = pieces) -> Any:
            for piece in pieces:
                yield piece

        answer = await api.client.post(
            "/generations/edit", content=stream(), headers={"Content-Type": "multipart/form-data; boundary=B"}
        )
        understood = await order(api, answer)
        assert (understood.prompt, len(understood.images)) == ("a red hat", 1)


async def test_content_that_resembles_a_delimiter_is_kept_in_any_chunking(api: Api) -> None:
    content = PNG + b"\r\n--BX\r\n--B-X\r\r\n-\n--B--\r\n--"
    body = form(part('name="images"', content), PROMPT)
    for size in (1, 3, 50, len(body)):

        async def stream(size: int = size) -> AsyncIterator[bytes]:
            for at in range(0, len(body), size):
                yield body[at : at + size]

        headers = {"Content-Type": "multipart/form-data; boundary=B"}
        answer = await api.client.post("/generations/edit", content=stream(), headers=headers)
        [name] = (await order(api, answer)).images
        assert api.images.kept[name].data == content


@pytest.mark.parametrize(
    ("boundary", "parameter"),
    [
        ("----WebKitFormBoundaryABC123", "boundary=----WebKitFormBoundaryABC123"),
        ("a b:c=d", 'boundary="a b:c=d"'),
        ("=_Part_1_2.3", 'BOUNDARY="=_Part_1_2.3"; charset=UTF-8'),
        ("dart-http-boundary-+_.x", "boundary=dart-http-boundary-+_.x; type=x"),
    ],
)
async def test_boundaries_may_be_quoted_and_stand_among_other_parameters(
    api: Api, boundary: str, parameter: str
) -> None:
    body = form(PROMPT, FILE).replace(b"--B", b"--" + boundary.encode())
    answer = await send(api, body, content_type=f"Multipart/Form-Data; {parameter}")
    assert (await order(api, answer)).prompt == "a red hat"


# --- names and values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["images[]", "images[0]", "image", "Images", "file", "files", "upload", "photo", "img"]
)
async def test_a_file_in_an_unknown_field_is_answered_with_the_right_name(api: Api, name: str) -> None:
    for file in (f'name="{name}"; filename="a.png"', f'name="{name}"'):
        answer = await send(api, form(PROMPT, part(file, PNG, "Content-Type: image/png")))
        problem = assert_problem(answer, 422, "invalid_request")
        assert problem["errors"] == [{"field": name, "message": "There is no such field; did you mean images?"}]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((name, "imageUrls") for name in ("imageUrl", "image_urls", "image_url", "imageURLs", "imageUrls[]", "urls")),
        *((name, "imageUrls") for name in ("imageUrls[0]", "images[]", "image")),
        *((name, "faceSwap") for name in ("faceswap", "face_swap", "face-swap", "Face Swap")),
        *((name, "aspectRatio") for name in ("aspect_ratio", "aspectratio", "ratio")),
        *((name, "inputFidelity") for name in ("input_fidelity", "fidelity")),
        *((name, "prompt") for name in ("promt", "Prompt", "prompts")),
        ("meta_data", "metadata"),
    ],
)
async def test_a_text_in_an_unknown_field_is_answered_with_the_right_name(api: Api, name: str, meant: str) -> None:
    answer = await send(api, form(PROMPT, FILE, text(name, "x")))
    problem = assert_problem(answer, 422, "invalid_request")
    assert problem["errors"] == [{"field": name, "message": f"There is no such field; did you mean {meant}?"}]


@pytest.mark.parametrize("name", ["prompt", "metadata", "quality", "faceSwap"])
async def test_a_repeated_field_is_refused_as_such(api: Api, name: str) -> None:
    given = [] if name == "prompt" else [PROMPT]
    answer = await send(api, form(*given, FILE, text(name, "{}"), text(name, "{}")))
    errors = assert_problem(answer, 422, "invalid_request")["errors"]
    assert errors == [{"field": name, "message": "This field must not be repeated"}]


async def test_an_unknown_field_is_answered_with_all_field_names(api: Api) -> None:
    answer = await send(api, form(PROMPT, FILE, text("xyz", "x"), text("xyz", "y")), "generate")
    problem = assert_problem(answer, 422, "invalid_request")
    [error] = problem["errors"]
    assert error["field"] == "xyz"
    assert "prompt, images, imageNames, imageUrls, metadata" in error["message"]
    assert "faceSwap" not in error["message"]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *((value, True) for value in ("true", "True", "TRUE", "1", "on", "yes")),
        *((value, False) for value in ("false", "False", "FALSE", "0", "off", "no")),
    ],
)
async def test_booleans_are_taken_as_languages_print_them(api: Api, value: str, wanted: bool) -> None:
    for headers in ([], ["Content-Type: application/json"]):
        body = form(PROMPT, text("imageUrls", URL), text("faceSwap", value, *headers))
        assert (await order(api, await send(api, body))).face_swap is wanted


@pytest.mark.parametrize("value", ["maybe", "2", " ", "null", "None", "truetrue"])
async def test_an_invalid_boolean_is_rejected(api: Api, value: str) -> None:
    answer = await send(api, form(PROMPT, text("imageUrls", URL), text("faceSwap", value)))
    assert assert_problem(answer, 422, "invalid_request")["errors"][0]["field"] == "faceSwap"


# --- empty fields ------------------------------------------------------------------------------------------

OPTIONAL: Final = ("imageUrls", "metadata", "quality", "background", "aspectRatio", "inputFidelity")
NOTHING_CHOSEN: Final = part('name="images"; filename=""', "", "Content-Type: application/octet-stream")


@pytest.mark.parametrize("kind", ["edit", "generate"])
async def test_empty_optional_fields_count_as_not_given(api: Api, kind: str) -> None:
    names = (*OPTIONAL, "faceSwap")  # Which only an edit has.
    plain = [text(name, "") for name in names]
    blobs = [part(f'name="{name}"; filename="blob"', '""', "Content-Type: application/json") for name in names]
    key = {"Idempotency-Key": kind}
    first = await send(api, form(PROMPT, FILE), kind, **key)
    for parts in (plain, blobs, [*plain, *blobs], [NOTHING_CHOSEN, text("images", "")]):
        again = await send(api, form(PROMPT, *parts, FILE), kind, **key)
        assert again.status_code == 202, again.text
        assert again.headers["location"] == first.headers["location"]


@pytest.mark.parametrize("name", [*OPTIONAL, "faceSwap"])
async def test_a_blank_or_nul_is_not_empty(api: Api, name: str) -> None:
    for value in (" ", "\t", "\0"):
        answer = await send(api, form(PROMPT, FILE, text(name, value)))
        field = assert_problem(answer, 422, "invalid_request")["errors"][0]["field"]
        assert field.removesuffix(".0") == name


@pytest.mark.parametrize("value", ["true", "false", " "])
async def test_generate_has_no_face_swap(api: Api, value: str) -> None:
    answer = await send(api, form(PROMPT, FILE, text("faceSwap", value)), "generate")
    error = assert_problem(answer, 422, "invalid_request")["errors"][0]
    assert error["field"] == "faceSwap"
    assert error["message"].startswith("There is no such field")


async def test_an_empty_value_among_others_of_its_field_is_left_out(api: Api) -> None:
    body = form(PROMPT, text("imageUrls", ""), text("imageUrls", URL), text("quality", ""), text("quality", "low"))
    understood = await order(api, await send(api, body))
    assert (understood.image_urls, understood.options.quality) == ((URL,), "low")


async def test_an_empty_list_of_urls_is_no_url(api: Api) -> None:
    understood = await order(api, await send(api, form(PROMPT, FILE, text("imageUrls", "[]"))))
    assert (understood.image_urls, understood.face_swap) == ((), False)


async def test_an_empty_file_with_a_name_is_refused(api: Api) -> None:
    answer = await send(api, form(PROMPT, part('name="images"; filename="a.png"', "", "Content-Type: image/png")))
    assert answer.status_code in (415, 422)
    assert answer.json()["errors"][0]["field"] == "images.0"


async def test_without_a_file_an_empty_file_input_leaves_no_image(api: Api) -> None:
    answer = await send(api, form(PROMPT, NOTHING_CHOSEN))
    assert assert_problem(answer, 422, "invalid_request")["errors"][0]["field"] == "images"


@pytest.mark.parametrize("prompt", ["", " ", "\t\r\n", "\u3000\u2003", "\0", "a\0b"])
async def test_a_prompt_that_is_empty_blank_or_has_a_nul_is_refused(api: Api, prompt: str) -> None:
    for given in (text("prompt", prompt), text("prompt", json.dumps(prompt), "Content-Type: application/json")):
        answer = await send(api, form(given, FILE))
        assert assert_problem(answer, 422, "invalid_request")["errors"][0]["field"] == "prompt"
