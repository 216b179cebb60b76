"""Responses of OpenAI-compatible gateways: the paid picture is found in each place and encoding that they use."""

import asyncio
import base64
import codecs
import gzip
import json
import ssl
import textwrap
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from io import BytesIO
from ipaddress import ip_address, ip_network
from typing import Any, Final
from urllib.parse import quote

import brotli
import pytest
from backports import zstd
from PIL import Image, ImageChops

from adapters.images.intake import PillowIntake
from adapters.outbound.url_fetcher import IPAddress, UrlFetcher
from adapters.providers.openai import DEFAULT_MODEL, OpenAIEditor
from domain.errors import Failure
from domain.ports.images import Picture
from domain.requests import Options
from support.openai_server import (
    KEY,
    OpenAIServer,
    completed,
    data_of,
    event,
    in_base64,
    partial,
    picture,
    stream,
)
from support.pictures import BLUE, ORANGE, RED, THREADS, encoded, opened, solid
from support.provider_faults import MEGABYTE, Answer, Origin, Request, as_json, head, listening, raw, reset, then, whole

SHEET: Final = solid(BLUE, (300, 424), "JPEG")
RESULT: Final = picture("256x384")
OTHER: Final = picture("256x384", RED)
SKETCH: Final = picture("256x384", BLUE)
ENCODED: Final = in_base64(RESULT)
DATA_URL: Final = f"data:image/png;base64,{ENCODED}"
NO_TRUSTED_CAS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

#: The public internet of these tests.
PUBLIC: Final = ip_address("127.0.0.2")


async def resolve(host: str) -> Sequence[IPAddress]:
    return {"cdn.test": [PUBLIC], "inside.test": [ip_address("127.0.0.1")]}.get(host, [])


FETCHER: Final = UrlFetcher(
    PillowIntake(THREADS), allow=[ip_network(PUBLIC)], resolve=resolve, trust=NO_TRUSTED_CAS, connect_timeout=30
)


class Gateway(OpenAIServer):
    """An OpenAI-compatible server that also serves files."""

    def __init__(self, origin: Origin) -> None:
        super().__init__(origin)
        self.files: dict[str, Answer | list[Answer]] = {}
        self.fetched: list[Request] = []

    def respond(self, request: Request) -> Answer:
        if request.method == "POST":
            return super().respond(request)
        self.fetched.append(request)
        answer = self.files.get(request.target, whole(b"Not Found", 404))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        return answer


async def gateway_at(stack: AsyncExitStack, host: str = "127.0.0.1") -> Gateway:
    origin = Origin(lambda request: gateway.respond(request))
    gateway = Gateway(origin)
    await stack.enter_async_context(listening(origin, host=host))
    gateway.files["/files/a.png"] = whole(RESULT, 200, "image/png")
    return gateway


@pytest.fixture
async def server() -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        yield await gateway_at(stack)


@pytest.fixture
async def cdn() -> AsyncIterator[Gateway]:
    """Another server, on the public internet."""
    async with AsyncExitStack() as stack:
        yield await gateway_at(stack, str(PUBLIC))


async def _ignore(fraction: float, message: str, preview: Picture | None = None) -> None:
    pass


def editor_for(server: OpenAIServer, model: str = DEFAULT_MODEL) -> OpenAIEditor:
    return OpenAIEditor(
        THREADS,
        FETCHER,
        api_key=KEY,
        base_url=server.base_url,
        model=model,
        deadline=60,
        backoff=0.01,
        trust=NO_TRUSTED_CAS,
    )


async def edited(server: Gateway, answer: Answer, model: str = DEFAULT_MODEL) -> Picture:
    """The picture in this response. Checks that there is one paid call, and that downloads are without the key."""
    server.answer(answer)
    try:
        return await editor_for(server, model).edit(SHEET, "Winter", Options(), _ignore)
    finally:
        assert len(server.calls) == 1
        for request in server.fetched:
            assert not {"authorization", "api-key", "cookie"} & request.headers.keys()
            assert KEY not in str(request)


async def unavailable(server: Gateway, answer: Answer) -> None:
    with pytest.raises(Failure) as caught:
        await edited(server, answer)
    assert (caught.value.code, caught.value.retryable) == ("provider_unavailable", True)


# --- where the picture is ----------------------------------------------------------------------------------


def entry(**fields: object) -> dict[str, Any]:
    return {"created": 1763829000, "data": [fields]}


@pytest.mark.parametrize(
    "document",
    [
        entry(url=DATA_URL),
        entry(b64_json=DATA_URL),
        entry(b64_json=None, url=DATA_URL),
        entry(b64_json=ENCODED, url="http://127.0.0.1:1/gone.png"),
        entry(b64_json="", url=DATA_URL),
        entry(b64_json="broken", url=DATA_URL),
        entry(url=ENCODED),
        entry(image_url=DATA_URL),
        entry(image_url={"url": DATA_URL}),
        {"data": [None, {}, {"b64_json": None}, {"b64_json": ENCODED}]},
        {"data": [{"b64_json": in_base64(RESULT[:200])}, {"b64_json": ENCODED}]},
        {"data": [{"b64_json": ENCODED}, {"b64_json": in_base64(OTHER)}]},
        {"data": {"b64_json": ENCODED}},
        {"data": ENCODED},
        {"data": [DATA_URL]},
        {"b64_json": ENCODED},
        [{"b64_json": ENCODED}],
        {"images": [ENCODED]},
        {"images": [{"url": DATA_URL}]},
        {"output": [{"type": "image_generation_call", "status": "completed", "result": ENCODED}]},
        {"choices": [{"message": {"content": "", "images": [{"type": "image_url", "image_url": {"url": DATA_URL}}]}}]},
        {"output": {"results": [{"url": DATA_URL}]}},
        {"output": {"choices": [{"message": {"content": [{"text": "Here:"}, {"image": DATA_URL}]}}]}},
        {"success": True, "result": {"image": ENCODED}},
        {"artifacts": [], "images": [{"base64": ENCODED}]},
        {"error": None, **entry(b64_json=ENCODED)},
    ],
    ids=lambda document: json.dumps(document).replace(ENCODED, "…")[:80],
)
async def test_picture_is_found_in_each_known_json_shape(server: Gateway, document: object) -> None:
    assert await edited(server, as_json(document)) == Picture(RESULT, "image/png")


@pytest.mark.parametrize(
    "events",
    [
        [event("image_edit.completed", url=DATA_URL)],
        [event("image_edit.completed", b64_json=DATA_URL)],
        [event("image_edit.completed", data=[{"b64_json": ENCODED}])],
        [event("image_generation.completed", b64_json=ENCODED)],
        [event("image_edit.partial_succeeded", url=DATA_URL, image_index=0), event("image_edit.completed", usage={})],
        [event("response.output_item.done", item={"result": ENCODED}), event("response.completed", response={})],
        [event("response.image_generation_call.completed"), event("response.completed", output=[{"result": ENCODED}])],
        [event("response.completed", response={"output": [{"type": "message"}, {"result": ENCODED}]})],
        [f"event: image_edit.completed\ndata: {json.dumps({'b64_json': ENCODED})}\n\n".encode()],
        [f"data: {json.dumps(data_of(ENCODED))}\n\ndata: [DONE]\n\n".encode()],
        [partial(0, SKETCH), b"data: not JSON\n\n", completed(RESULT)],
        [partial(0, SKETCH), completed(RESULT).rstrip(b"\n")],
        [completed(RESULT).replace(b"\n", b"\r\n")],
        [codecs.BOM_UTF8, completed(RESULT)],
        [b": waiting\n\n: still waiting\n\n", completed(RESULT)],
        [b"\n\n", completed(RESULT)],
    ],
)
async def test_picture_is_found_in_streams_with_any_event_names(server: Gateway, events: list[bytes]) -> None:
    assert (await edited(server, stream(*events))).data == RESULT
    # The same for a model without streaming.
    server.calls.clear()
    assert (await edited(server, stream(*events), "flux-kontext")).data == RESULT


async def test_received_picture_is_kept_if_the_stream_breaks_afterwards(server: Gateway) -> None:
    succeeded = event("image_edit.partial_succeeded", b64_json=ENCODED)
    for ending in (raw(), reset, raw(event("error", error={"message": "It broke."}))):
        server.calls.clear()
        assert (await edited(server, then(stream(succeeded), ending))).data == RESULT


async def test_last_event_with_a_usable_url_wins(server: Gateway) -> None:
    server.files["/status"] = whole(b"working", 200, "text/plain")
    events = [
        event("image_edit.queued", url="/status"),
        event("image_edit.partial_succeeded", url="/files/a.png"),
        event("image_edit.completed", url="/status"),
    ]
    assert (await edited(server, stream(*events))).data == RESULT


async def test_preview_is_not_used_as_the_result(server: Gateway) -> None:
    await unavailable(server, stream(partial(0, SKETCH), event("image_edit.completed", usage={})))


@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8, b" \r\n\t\n" * 50, codecs.BOM_UTF8 + b"\n"])
@pytest.mark.parametrize("body", [json.dumps(data_of(ENCODED)).encode(), completed(RESULT)], ids=["JSON", "stream"])
async def test_response_kind_is_taken_from_its_first_bytes_not_its_media_type(
    server: Gateway, start: bytes, body: bytes
) -> None:
    for media_type in ("application/json", "text/plain; charset=latin-1", "text/event-stream", "garbage"):
        server.calls.clear()
        assert (await edited(server, raw(head(media_type=media_type), start, body))).data == RESULT


@pytest.mark.parametrize(
    "early",
    [
        event("image_edit.partial_image", b64_json=f"data:image/png;base64,{in_base64(SKETCH)}"),
        event("response.image_generation_call.partial_image", partial_image_b64=in_base64(SKETCH)),
        event("image_edit.partial_image", b64_json=in_base64(encoded(Image.new("RGB", (256, 384), BLUE), "GIF"))),
    ],
)
async def test_previews_are_decoded_like_results(server: Gateway, early: bytes) -> None:
    shown: list[Picture | None] = []

    async def report(fraction: float, message: str, preview: Picture | None = None) -> None:
        shown.append(preview)

    server.answer(stream(early, completed(RESULT)))
    made = await editor_for(server).edit(SHEET, "Winter", Options(), report)
    assert made.data == RESULT
    [preview] = shown
    assert preview is not None
    assert opened(preview).size == (256, 384)


async def test_credentials_in_the_base_url_are_not_sent_with_file_downloads(server: Gateway) -> None:
    answer, files = as_json(entry(url="/files/a.png")), server.origin.respond
    server.origin.respond = lambda request: answer if request.method == "POST" else files(request)
    base_url = server.base_url.replace("http://", "http://ada:secret@")
    editor = OpenAIEditor(THREADS, FETCHER, api_key=KEY, base_url=base_url, deadline=60, trust=NO_TRUSTED_CAS)
    assert (await editor.edit(SHEET, "Winter", Options(), _ignore)).data == RESULT
    [request] = server.fetched
    assert "authorization" not in request.headers


async def test_response_body_may_be_the_picture_itself(server: Gateway) -> None:
    assert (await edited(server, whole(RESULT, 200, "image/png"))).data == RESULT


async def test_json_may_use_any_unicode_encoding(server: Gateway) -> None:
    body = json.dumps(data_of(ENCODED)).encode("utf-16")
    assert (await edited(server, whole(body, 200, "application/json; charset=utf-16"))).data == RESULT


# --- how it is spelled -------------------------------------------------------------------------------------

#: Its base64 has all 64 characters, and padding.
ODD: Final = next(
    data
    for size in range(64, 90)
    if b"=" in base64.b64encode(data := encoded(Image.effect_noise((size, 64), 90)))
    and {"+", "/"} <= {*in_base64(data)}
)
PLAIN: Final = in_base64(ODD)
SAFE: Final = base64.urlsafe_b64encode(ODD).decode()


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.rstrip("="),
        PLAIN + "==",
        SAFE,
        SAFE.rstrip("="),
        "\n".join(textwrap.wrap(PLAIN, 76)) + "\n",
        "\r\n".join(textwrap.wrap(SAFE, 64)),
        f" \t{PLAIN}\n",
        f"data:image/png;base64,{PLAIN}",
        f"data:image/jpeg;base64,{PLAIN}",
        f"data:;base64,{PLAIN}",
        f"DATA:image/png;BASE64,{PLAIN}",
        f"data:image/png;charset=utf-8;base64,{PLAIN}",
        f"data:image/png;base64, {PLAIN}",
        f" data:image/png;base64,{SAFE.rstrip('=')}",
        f"data:image/png;base64,{quote(PLAIN, safe='')}",
        f"data:image/png,{quote(ODD)}",
        f"image/png;base64,{PLAIN}",
        f"base64,{PLAIN}",
    ],
    ids=lambda text: text.replace(PLAIN[:40], "…")[:40],
)
async def test_every_base64_variant_is_decoded(server: Gateway, text: str) -> None:
    assert (await edited(server, as_json(entry(b64_json=text)))).data == ODD
    server.calls.clear()
    assert (await edited(server, as_json(entry(url=text)))).data == ODD


@pytest.mark.parametrize(
    "text",
    ["", "A", "=", "data:", "data:,", "data:image/png;base64,", "data:image/png;base64,§", PLAIN[:40] + "=" + PLAIN],
)
async def test_invalid_base64_is_provider_unavailable(server: Gateway, text: str) -> None:
    await unavailable(server, as_json(entry(b64_json=text, url=text)))


# --- its format --------------------------------------------------------------------------------------------

DRAWING: Final = Image.merge(
    "RGB",
    [Image.linear_gradient("L").resize((96, 128)).rotate(turn, expand=False) for turn in (0, 180)]
    + [Image.new("L", (96, 128), 90)],
)


@pytest.mark.parametrize(
    ("kind", "lossless"),
    [
        *(
            (kind, True)
            for kind in ("BMP", "DDS", "DIB", "ICNS", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA", "TIFF")
        ),
        ("AVIF", False),
        ("GIF", False),
    ],
)
async def test_other_picture_formats_are_converted_to_png(server: Gateway, kind: str, lossless: bool) -> None:
    made = await edited(server, as_json(data_of(in_base64(encoded(DRAWING, kind)))))
    assert made.media_type == "image/png"
    image = opened(made)
    assert image.format == "PNG"
    drawing = DRAWING.resize(image.size)
    difference = ImageChops.difference(image.convert("RGB"), drawing)
    assert max(difference.convert("L").tobytes()) <= (0 if lossless else 40)


async def test_first_frame_of_a_multi_frame_picture_is_used(server: Gateway) -> None:
    first, second = Image.new("RGB", (96, 96), ORANGE), Image.new("RGB", (96, 96), BLUE)
    for kind in ("GIF", "TIFF", "MPO"):
        server.calls.clear()
        data = encoded(first, kind, save_all=True, append_images=[second])
        made = await edited(server, as_json(data_of(in_base64(data))))
        assert made.media_type == "image/png"
        pixel = opened(made).getpixel((40, 40))
        assert isinstance(pixel, tuple)
        assert all(abs(a - b) < 12 for a, b in zip(pixel, ORANGE, strict=True))


async def test_transparent_gif_stays_transparent(server: Gateway) -> None:
    data = encoded(Image.new("RGBA", (96, 96), (0, 0, 0, 0)), "GIF")
    made = await edited(server, as_json(data_of(in_base64(data))))
    assert opened(made).getpixel((5, 5)) == (0, 0, 0, 0)


async def test_postscript_is_not_executed(server: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", run)
    data = BytesIO()
    DRAWING.save(data, "EPS")
    await unavailable(server, as_json(data_of(in_base64(data.getvalue()))))


# --- compressed --------------------------------------------------------------------------------------------


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "gzip": lambda data: gzip.compress(data, 1),
    "x-gzip": gzip.compress,
    "deflate": lambda data: zlib.compress(data, 1),
    "Deflate": raw_deflate,
    "br": lambda data: brotli.compress(data, quality=5),
    "zstd": zstd.compress,
    "gzip, br": lambda data: brotli.compress(gzip.compress(data), quality=5),
    "identity, gzip, utf-8": gzip.compress,
}


@pytest.mark.parametrize("encoding", PACKERS)
@pytest.mark.parametrize("body", [json.dumps(data_of(ENCODED)).encode(), completed(RESULT)], ids=["JSON", "stream"])
async def test_unrequested_compression_is_decoded(server: Gateway, encoding: str, body: bytes) -> None:
    answer = whole(PACKERS[encoding](body), Content_Encoding=encoding)
    assert (await edited(server, answer)).data == RESULT


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, br", "utf-8", "none", "", "aws-chunked"])
@pytest.mark.parametrize("body", [json.dumps(data_of(ENCODED)).encode(), completed(RESULT)], ids=["JSON", "stream"])
async def test_uncompressed_body_is_read_despite_a_content_encoding_header(
    server: Gateway, encoding: str, body: bytes
) -> None:
    assert (await edited(server, whole(body, Content_Encoding=encoding))).data == RESULT


@pytest.mark.parametrize("encoding", ["compress", "exi", "gzip, gzip, gzip, gzip", "gzip", "br", "zstd", "deflate"])
async def test_undecodable_body_is_provider_unavailable(server: Gateway, encoding: str) -> None:
    await unavailable(server, whole(b"\x1f\x9d\x90garbage" * 100, Content_Encoding=encoding))


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, br", "br, gzip"])
async def test_decompression_stops_at_the_response_limit(
    server: Gateway, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.providers.openai.MAX_ANSWER", MEGABYTE)
    bomb = b'{"data": ["' + bytes(16 * MEGABYTE)
    for name in encoding.split(", "):
        bomb = PACKERS[name](bomb)
    assert len(bomb) < MEGABYTE
    await unavailable(server, whole(bomb, Content_Encoding=encoding))


async def test_decompression_bomb_with_empty_output_is_stopped(
    server: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty deflate blocks, which decompress to nothing after a lot of work."""
    monkeypatch.setattr("adapters.providers.openai.MAX_ANSWER", 2 * MEGABYTE)
    empty_blocks = b"\0\0\0\xff\xff" * (4 * MEGABYTE)
    seen = 0
    decompressobj = zlib.decompressobj

    class Counted:
        def __init__(self, wbits: int = 15) -> None:
            self._inner = decompressobj(wbits)

        def decompress(self, data: bytes, limit: int) -> bytes:
            nonlocal seen
            seen += len(data)
            return self._inner.decompress(data, limit)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    monkeypatch.setattr("zlib.decompressobj", Counted)
    answer = whole(gzip.compress(empty_blocks, 9), Content_Encoding="deflate, gzip")
    await unavailable(server, answer)
    assert seen < 4 * MEGABYTE


# --- somewhere else ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["{here}/files/a.png", "/files/a.png", "../../files/a.png", "//127.0.0.1:{port}/files/a.png"]
)
@pytest.mark.parametrize("form", ["url", "image_url", "stream"])
async def test_picture_on_the_api_host_is_fetched_even_if_private(server: Gateway, where: str, form: str) -> None:
    url = where.format(here=server.origin.address, port=server.origin.port)
    answer = stream(event("image_edit.completed", url=url)) if form == "stream" else as_json(entry(**{form: url}))
    assert (await edited(server, answer)).data == RESULT
    assert [request.target for request in server.fetched] == ["/files/a.png"]


async def test_picture_on_another_public_host_is_fetched(server: Gateway, cdn: Gateway) -> None:
    url = f"http://cdn.test:{cdn.origin.port}/files/a.png"
    assert (await edited(server, as_json(entry(url=url)))).data == RESULT
    [request] = cdn.fetched
    assert "authorization" not in request.headers
    assert KEY not in str(request)


async def test_redirect_to_a_public_host_is_followed(server: Gateway, cdn: Gateway) -> None:
    server.files["/files/a.png"] = whole(b"", 302, Location=f"http://cdn.test:{cdn.origin.port}/files/a.png")
    assert (await edited(server, as_json(entry(url="/files/a.png")))).data == RESULT
    assert KEY not in str(cdn.fetched)


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/files/a.png",
        "http://inside.test:{port}/files/a.png",
        "http://[::1]:{port}/a",
        "file:///etc/passwd",
    ],
)
@pytest.mark.parametrize("way", ["at once", "by a redirect", "by a redirect elsewhere"])
async def test_other_private_addresses_are_not_fetched(server: Gateway, cdn: Gateway, target: str, way: str) -> None:
    async with AsyncExitStack() as stack:
        canary = await gateway_at(stack)
        url = target.format(port=canary.origin.port)
        if way == "by a redirect":
            server.files["/moved"] = whole(b"", 307, Location=url)
            url = "/moved"
        elif way == "by a redirect elsewhere":
            cdn.files["/moved"] = whole(b"", 307, Location=url)
            url = f"http://cdn.test:{cdn.origin.port}/moved"
        await unavailable(server, as_json(entry(url=url)))
        assert canary.origin.requests == []


async def test_long_signed_url_is_fetched(server: Gateway, cdn: Gateway) -> None:
    target = f"/files/b.png?signature={'x' * 4000}"
    cdn.files[target] = whole(RESULT, 200)
    url = f"http://cdn.test:{cdn.origin.port}{target}"
    assert (await edited(server, as_json(entry(url=url)))).data == RESULT


async def test_redirect_back_to_the_api_host_is_checked_like_any_other(server: Gateway) -> None:
    server.files["/moved"] = whole(b"", 302, Location="/files/a.png")
    await unavailable(server, as_json(entry(url="/moved")))
    assert [request.target for request in server.fetched] == ["/moved"]


async def test_failed_download_is_retried_without_a_second_paid_call(server: Gateway) -> None:
    good = whole(RESULT, 200, "image/png")
    server.files["/files/a.png"] = [whole(b"", 503), reset, whole(b"", 429), good]
    assert (await edited(server, as_json(entry(url="/files/a.png")))).data == RESULT
    assert len(server.fetched) == 4


async def test_failed_download_from_another_host_is_retried(server: Gateway, cdn: Gateway) -> None:
    cdn.files["/files/a.png"] = [whole(b"", 503), reset, whole(RESULT, 200)]
    url = f"http://cdn.test:{cdn.origin.port}/files/a.png"
    assert (await edited(server, as_json(entry(url=url)))).data == RESULT
    assert len(cdn.fetched) == 3


@pytest.mark.parametrize(
    "first", ["/missing.png", "/page.html", "http://127.0.0.1:1/a.png", "http://[", "ftp://cdn.test/a"]
)
async def test_first_url_with_a_picture_wins(server: Gateway, first: str) -> None:
    server.files["/page.html"] = whole(b"<h1>Sign in</h1>", 200, "text/html")
    answer = as_json({"data": [{"url": first}, {"url": "/files/a.png"}]})
    assert (await edited(server, answer)).data == RESULT


async def test_downloaded_picture_may_be_compressed_and_in_another_format(server: Gateway) -> None:
    data = gzip.compress(encoded(DRAWING, "BMP"))
    server.files["/files/a.bmp"] = whole(data, 200, "image/bmp", Content_Encoding="gzip")
    made = await edited(server, as_json(entry(url="/files/a.bmp")))
    assert opened(made).getpixel((50, 50)) == DRAWING.getpixel((50, 50))


async def test_only_the_first_few_of_a_hundred_urls_are_tried(server: Gateway) -> None:
    await unavailable(server, as_json({"data": [{"url": f"/missing/{index}.png"} for index in range(100)]}))
    assert len(server.fetched) <= 8


async def test_cancelling_during_the_download_closes_the_connection(server: Gateway) -> None:
    async def hang(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    server.files["/files/a.png"] = hang
    task = asyncio.create_task(edited(server, as_json(entry(url="/files/a.png"))))
    while not server.fetched:
        await asyncio.sleep(0.005)
    server.origin.left.clear()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await server.origin.left.wait()


async def test_log_gives_the_reason_without_the_signed_url(server: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    await unavailable(server, as_json(entry(url="/missing.png?signature=secret")))
    lines = [record.getMessage() for record in caplog.records if record.name == "adapters.providers.attempts"]
    assert any("answered with 404" in line for line in lines)
    assert not any("secret" in line for line in lines)


async def test_log_lists_response_keys_without_the_prompt(server: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    answer = {"data": [{"b64_json": None, "revised_prompt": "Winter in Izmir"}], "error": {"message": "No worker."}}
    await unavailable(server, as_json(answer))
    [line] = [record.getMessage() for record in caplog.records if record.name == "adapters.providers.attempts"]
    assert "no picture in an answer with data, error. No worker." in line
    assert "Izmir" not in line
