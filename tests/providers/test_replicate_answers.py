"""Outputs of models on Replicate, in all the JSON shapes, encodings and image formats that they use."""

import base64
import codecs
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any, Final

import brotli
import pytest
from aiohttp import web
from PIL import Image

from adapters.providers.replicate import ReplicateFaceSwap
from domain.errors import Failure
from domain.ports.images import Picture
from support.pictures import BLUE, GREEN, RED, THREADS, alike, colour_at, encoded, opened, solid
from support.replicate_server import TOKEN, Replicate

EDITED: Final = solid(GREEN, (60, 40), "PNG")
FACE: Final = solid(RED, (30, 40), "PNG")
SWAPPED: Final = solid(BLUE, (60, 40), "PNG").data
ENCODED: Final = base64.b64encode(SWAPPED).decode()


@pytest.fixture
async def replicate() -> AsyncIterator[Replicate]:
    async with Replicate(picture=SWAPPED, statuses=["succeeded"]).serving() as server:
        yield server


async def _ignore(fraction: float, message: str, preview: Picture | None = None) -> None:
    pass


async def swapped(replicate: Replicate) -> Picture:
    """The result of a swap. Checks that it made one prediction."""
    swapper = ReplicateFaceSwap(THREADS, TOKEN, base_url=replicate.url, deadline=60, pace=0.01)
    made = await swapper.swap(EDITED, FACE, _ignore)
    assert replicate.count("create") == 1
    assert alike(colour_at(opened(made), 0.5, 0.5), BLUE)
    return made


@pytest.mark.parametrize(
    "output",
    [
        "URL",
        ["URL", "http://127.0.0.1:1/"],
        [None, "URL"],
        {"image": "URL"},
        {"images": ["URL"]},
        {"url": "URL"},
        [{"url": "URL"}],
        {"output": {"image": "URL"}},
        ENCODED,
        f"data:image/png;base64,{ENCODED}",
        f"DATA:image/png;charset=utf-8;base64,{base64.urlsafe_b64encode(SWAPPED).decode().rstrip('=')}",
        [base64.encodebytes(SWAPPED).decode()],
    ],
    ids=lambda output: str(output).replace(ENCODED, "…")[:50],
)
async def test_picture_is_found_in_each_known_output_shape(replicate: Replicate, output: Any) -> None:
    replicate.output = json.loads(json.dumps(output).replace("URL", f"{replicate.origin}/output/out.png"))
    assert await swapped(replicate) == Picture(SWAPPED, "image/png")


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG2000", "TIFF"])
async def test_output_in_another_format_is_converted_to_png(replicate: Replicate, kind: str) -> None:
    replicate.picture = encoded(Image.new("RGB", (60, 40), BLUE), kind)
    assert (await swapped(replicate)).media_type == "image/png"


@pytest.mark.parametrize("what", ["create", "output"])
@pytest.mark.parametrize("encoding", ["gzip", "br", "UTF-8"])
async def test_unrequested_compression_of_api_responses_is_decoded(
    replicate: Replicate, what: str, encoding: str
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if what == "output":
            body = SWAPPED
        else:
            await replicate.create(request)
            body = codecs.BOM_UTF8 + b"\n" + json.dumps(replicate.report(next(iter(replicate.predictions)))).encode()
        if encoding != "UTF-8":
            body = gzip.compress(body) if encoding == "gzip" else brotli.compress(body)
        return web.Response(body=body, headers={"Content-Encoding": encoding})

    replicate.will(what, answer)
    assert (await swapped(replicate)).data == SWAPPED


async def test_decompression_bomb_as_output_is_provider_unavailable(
    replicate: Replicate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.providers.replicate.MAX_OUTPUT", 2**20)

    async def bomb(request: web.Request) -> web.StreamResponse:
        return web.Response(body=gzip.compress(SWAPPED + bytes(2**24), 1), headers={"Content-Encoding": "gzip"})

    replicate.will("output", bomb)
    with pytest.raises(Failure) as caught:
        await swapped(replicate)
    assert caught.value.code == "provider_unavailable"
    assert replicate.count("create") == 1
