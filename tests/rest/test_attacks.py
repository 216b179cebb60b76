"""Hostile requests against the real service: refused as documented, and nothing is left of them.

Each test ends in `Siege.aftermath`: nothing in the folders, no credit spent, health answers, and a device of
another user has had its events all the while.
"""

import asyncio
import contextlib
import json
import os
import re
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
from PIL import Image, PngImagePlugin

from adapters.serving.uvicorn_server import HttpProtocol
from adapters.tokens.jwt_tokens import issue
from api.rest.forms import MAX_BODY
from support.harness import JSON, PHOTO, Phone, Running, running
from support.pictures import encoded, quarters, raw_png

SECRET: Final = "correct-horse-battery-staple-0123456789"
MEGABYTE: Final = 1024 * 1024
CRLF: Final = b"\r\n"
FORM: Final = "multipart/form-data; boundary=B"
#: Seconds after which something hangs, and is not slow: what is decoded stands back behind all others on a machine.
HANGS: Final = 60
LINUX: Final = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def token(user: str, *, service: bool = False) -> str:
    return issue(SECRET.encode(), user, service=service, ttl=timedelta(hours=1), now=datetime.now(UTC))


def part(name: str, content: bytes, file: bytes | None = None, *headers: bytes) -> bytes:
    name_of_file = b"" if file is None else b'; filename="' + file + b'"'
    disposition = b'Content-Disposition: form-data; name="' + name.encode() + b'"' + name_of_file
    return CRLF.join((disposition, *headers, b"", content))


def form(*parts: bytes, boundary: bytes = b"B") -> bytes:
    line = b"--" + boundary
    return b"".join(line + CRLF + each + CRLF for each in parts) + line + b"--" + CRLF


PROMPT: Final = part("prompt", b"a red hat")
FILE: Final = part("images", PHOTO, b"a.jpg")
GOOD: Final = form(PROMPT, FILE)


@dataclass
class Siege:
    """A service, mallory who attacks it, and bob who watches his own generations."""

    service: Running
    temp: Path
    images: Path
    bob: Phone
    headers: dict[str, dict[str, str]]
    #: How many generations of bob's have been watched.
    watched: int = 0
    over: bool = False
    watching: asyncio.Task[None] = field(init=False)

    async def send(
        self, content: bytes | AsyncIterator[bytes], content_type: str = FORM, *, kind: str = "edit", **headers: str
    ) -> httpx2.Response:
        headers = {"Content-Type": content_type, **self.headers["mallory"], **headers}
        path = f"/generations/{kind}"
        return await self.service.http.post(path, content=content, headers=headers, timeout=HANGS)

    async def outcome(self, content: bytes, content_type: str = FORM, **rest: Any) -> str:
        """The status, and the code of a problem: as a table of expectations has it."""
        return outcome(await self.send(content, content_type, **rest))

    def connect(self) -> "Wire":
        return Wire(self)

    async def watch(self) -> None:
        """One generation of bob's, whose device is sent all of it."""
        headers = {"Content-Type": FORM, **self.headers["bob"]}
        answer = await self.service.http.post("/generations/generate", content=GOOD, headers=headers, timeout=HANGS)
        assert answer.status_code == 202, answer.text
        generation_id = answer.json()["generationId"]
        await self.bob.until_over(generation_id)
        assert self.bob.sequences(generation_id) == list(range(1, len(self.bob.of(generation_id)) + 1))
        self.watched += 1

    async def keep_watching(self) -> None:
        # However long it takes, bob's credit lasts.
        while not self.over and self.watched < 80:
            await self.watch()
            await asyncio.sleep(0.5)

    async def aftermath(self, *, accepted: int = 0) -> None:
        """What has to hold when `accepted` of mallory's requests were."""
        self.over = True
        await self.watching
        await self.watch()
        async with asyncio.timeout(HANGS):
            await self.service.service.queue.settled()
        for path in ("/health/live", "/health/ready"):
            assert (await self.service.http.get(path)).status_code == 200
        account = (await self.service.http.get("/me", headers=self.headers["mallory"])).json()
        page = await self.service.http.get("/generations?limit=100", headers=self.headers["mallory"])
        generations = page.json()["generations"]
        assert len(generations) == accepted
        assert account["credit"] == 100 - sum(each["status"] == "completed" for each in generations)
        log = self.service.service.log
        told = b""
        for user in ("mallory", "bob"):
            for history in await log.generations(user, limit=1_000):
                told += b"".join(entry.event or b"" for entry in history.events)
        files = [path for path in self.images.rglob("*/*") if path.is_file()]
        assert [path for path in files if path.name.encode() not in told] == []
        await self.service.until(lambda: [*self.temp.iterdir(), *self._open()] == [])

    def _open(self) -> list[str]:
        """The temporary files that have no name any more, but are held open."""
        if sys.platform != "linux":
            return []
        found = []
        for descriptor in Path("/proc/self/fd").iterdir():
            try:
                target = descriptor.readlink()
            except OSError:
                continue
            if target.is_relative_to(self.temp):
                found.append(str(target))
        return found


class Wire:
    """One bare connection, for what no client would send."""

    def __init__(self, siege: Siege) -> None:
        self._siege = siege

    async def __aenter__(self) -> "Wire":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._siege.service.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def head(self, *headers: str, user: str | None = "mallory", path: str = "/generations/edit") -> None:
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {FORM}", *headers]
        if user is not None:
            lines += [f"{name}: {value}" for name, value in self._siege.headers[user].items()]
        await self.send("\r\n".join([*lines, "", ""]).encode())

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def answer(self) -> str:
        """The outcome of the next answer."""
        async with asyncio.timeout(HANGS):
            status = int((await self.reader.readline()).split()[1])
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            body = await self.reader.readexactly(int(length[1])) if length else b""
        problem = b"application/problem+json" in head
        return f"{status} {json.loads(body)['code']}" if problem else str(status)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def outcome(answer: httpx2.Response) -> str:
    if answer.status_code == 202:
        return "202"
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert len(answer.content) < 20_000
    return f"{answer.status_code} {problem['code']}"


@asynccontextmanager
async def besieged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, key: bool = False) -> AsyncIterator[Siege]:
    temp, images = tmp_path / "temp", tmp_path / "images"
    temp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    settings: JSON = {"jwt_secret": SECRET} if key else {}
    async with running(images, **settings) as service:
        headers = {user: {"X-User-Id": user} for user in ("mallory", "bob")}
        if key:
            headers = {user: {"Authorization": f"Bearer {token(user)}"} for user in headers}
            # For what the harness asks in the end.
            service.http.headers["Authorization"] = f"Bearer {token('harness', service=True)}"
        async with service.phone() as bob:
            await bob.authenticate("bob", **({"token": token("bob")} if key else {}))
            siege = Siege(service, temp, images, bob, headers)
            siege.watching = asyncio.create_task(siege.keep_watching())
            try:
                yield siege
            finally:
                siege.over = True
                await siege.watching


@pytest.fixture
async def siege(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Siege]:
    async with besieged(tmp_path, monkeypatch) as siege:
        yield siege


@pytest.fixture
async def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Siege]:
    """With a key configured."""
    async with besieged(tmp_path, monkeypatch, key=True) as siege:
        yield siege


Table = dict[str, tuple[str, Awaitable[str]]]


async def expect(table: Table) -> int:
    """Every attack ends as the table says. Return how many were accepted."""
    got = {name: await attack for name, (_, attack) in table.items()}
    assert got == {name: expected for name, (expected, _) in table.items()}
    return list(got.values()).count("202")


# --- pictures ----------------------------------------------------------------------------------------------

JPEG: Final = encoded(quarters(), "JPEG")
ROWS: Final = (b"\0" + bytes(12)) * 4
ZIP: Final = b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18)
SCRIPT: Final = b"<html><script>alert('SECRET')</script></html>"


def tiny(*chunks: tuple[bytes, bytes]) -> bytes:
    return raw_png((4, 4), 8, 2, ROWS, *chunks)


def full_of(name: bytes, body: bytes) -> bytes:
    """A small PNG with 9 MB of this chunk before its pixels."""
    small = tiny((name, body))
    chunk = small[small.index(name) - 4 :][: len(body) + 12]
    return small.replace(chunk, chunk * (9_000_000 // len(chunk)))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (30, 30), (shade, 0, 0)) for shade in range(0, 250, 10)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=20, lossless=True)


def webp_that_says(width: int, height: int) -> bytes:
    data = encoded(quarters(), "WEBP", lossless=True)
    return data[:21] + struct.pack("<I", (width - 1) | (height - 1) << 14) + data[25:]


def webp_with_canvas(width: int, height: int) -> bytes:
    """A small animation, on a canvas that is said to be large."""
    data = bytearray(animated("WEBP"))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def located() -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "SECRET camera"
    exif.get_ifd(0x8825).update({1: "N", 2: (41.0, 0.0, 30.0), 3: "E", 4: (28.0, 58.0, 30.0), 29: "SECRET"})
    return encoded(quarters(), "JPEG", exif=exif, comment=b"SECRET comment")


def _bombs() -> Iterator[tuple[str, str, bytes]]:
    invalid, large = "422 invalid_image", "422 image_too_large"
    yield "169 megapixels in 100 bytes", large, raw_png((13_000, 13_000), 1, 0, b"")
    yield "four terapixels", large, raw_png((2**21, 2**21), 8, 2, b"")
    fifty = bytes(50_000_000)
    yield "pixels that never end", "202", raw_png((4, 4), 8, 2, fifty)
    packed = zlib.compress(fifty)
    yield "ICC of 50 MB", invalid, tiny((b"iCCP", b"x\0\0" + packed))
    yield "zTXt of 50 MB", invalid, tiny((b"zTXt", b"x\0\0" + packed))
    text = b"x\0\1\0\0\0" + zlib.compress(bytes(1_000_000))
    yield "a hundred iTXt of 1 MB", invalid, tiny(*[(b"iTXt", text)] * 100)
    entries = b"".join(struct.pack(">HHLL", tag, 7, 4_000_000, 8) for tag in range(5_000))
    exif = b"MM\0*\0\0\0\x08" + struct.pack(">H", 5_000) + entries + bytes(4_000_000)
    yield "EXIF that says it is 20 GB", "202", tiny((b"eXIf", exif))
    yield "an index that says it is 300 MB", "202", JPEG[:2] + segment(0xE2, b"MPF\0" + exif[:60_000]) + JPEG[2:]
    yield "10 MB of EXIF", "202", JPEG[:2] + segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 160 + JPEG[2:]
    for name, each in (
        ("comments", segment(0xFE, b"")),
        ("application segments", segment(0xE5, b"")),
        ("pieces of EXIF", segment(0xE1, b"Exif\0\0ab")),
        ("fill bytes", b"\xff"),
        ("stray bytes", b"\xff\0a"),
    ):
        yield f"9 MB of {name}", invalid, JPEG[:2] + each * (9_000_000 // len(each)) + JPEG[2:]
    yield "9 MB of chunks", invalid, full_of(b"prVt", b"")
    yield "9 MB of empty texts", invalid, full_of(b"tEXt", b"k\0")
    yield "a WebP that says it is huge", large, webp_that_says(16_383, 16_383)
    yield "an animated WebP that says it is huge", large, webp_with_canvas(16_383, 16_383)


def _other_types() -> Iterator[tuple[str, bytes]]:
    for kind in ("GIF", "TIFF", "BMP", "ICO", "PDF", "PPM", "TGA"):
        yield kind, encoded(quarters(), kind)
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'
    yield "SVG with XML", b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>'
    yield "HTML", SCRIPT
    yield "HTML before a JPEG", SCRIPT + JPEG
    yield "GIFAR", encoded(quarters(), "GIF") + ZIP
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    yield "AVIF", b"\0\0\0\x1cftypavif" + bytes(40)
    yield "zeroes", bytes(100)


async def test_bombs_are_refused_or_harmless(siege: Siege) -> None:
    table: Table = {}
    for name, expected, data in _bombs():
        body = form(PROMPT, part("images", data, b"a.png"))
        table[name] = expected, siege.outcome(body)
        if len(data) < MEGABYTE:
            table[f"{name}, to generate"] = expected, siege.outcome(body, kind="generate")
    await siege.aftermath(accepted=await expect(table))


async def test_other_types_are_refused_whatever_they_are_called(siege: Siege) -> None:
    table: Table = {}
    for name, data in _other_types():
        file = part("images", data, b"photo.jpg", b"Content-Type: image/jpeg")
        table[name] = "415 unsupported_image_type", siege.outcome(form(PROMPT, file))
        table[f"{name}, second"] = "415 unsupported_image_type", siege.outcome(form(PROMPT, FILE, file))
    assert await expect(table) == 0
    await siege.aftermath()


async def test_a_picture_is_what_its_bytes_are(siege: Siege) -> None:
    names = (b"a.svg", b"image/svg+xml"), (b"a.html", b"text/html"), (b"a.php\0.jpg", b"x"), (b"a", b"image/png\0")
    for name, content_type in names:
        file = part("images", JPEG, name, b"Content-Type: " + content_type)
        answer = await siege.send(form(PROMPT, file))
        assert answer.status_code == 202, answer.text
        for picture in await served(siege, answer.json()["generationId"]):
            assert picture.headers["content-type"] in ("image/png", "image/jpeg", "image/webp")
            assert picture.headers["x-content-type-options"] == "nosniff"
    await siege.aftermath(accepted=len(names))


async def served(siege: Siege, generation_id: str) -> list[httpx2.Response]:
    """Everything that is served of a generation, once it has ended."""
    await siege.service.service.queue.settled()
    path = f"/generations/{generation_id}/events"
    history = await siege.service.http.get(path, headers=siege.headers["mallory"])
    assert history.json()["status"] == "completed", history.text
    assert b"SECRET" not in history.content
    names = set(re.findall(rb"/images/[^\"]+", history.content))
    assert len(names) >= 2
    return [await siege.service.http.get(name.decode()) for name in names]


def _polyglots() -> Iterator[tuple[str, bytes]]:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Comment", "SECRET", zip=True)
    text.add_text("SECRET", SCRIPT.decode())
    yield "a place", located()
    yield "text", encoded(quarters(), pnginfo=text)
    yield "XMP", encoded(quarters(), "WEBP", xmp=SCRIPT, exif=b"Exif\0\0SECRET")
    yield "APNG", animated("PNG") + SCRIPT
    yield "animated WebP", animated("WEBP")
    yield "JPEG and ZIP", JPEG + ZIP + SCRIPT
    yield "JPEG and HTML", JPEG[:2] + segment(0xFE, SCRIPT) + JPEG[2:]
    yield "JPEG and JavaScript", JPEG[:2] + segment(0xE0, b"/*SECRET") + JPEG[2:] + b"*/=alert('SECRET')//"
    yield "PNG and HTML", encoded(quarters()) + SCRIPT
    yield "two pictures in one", JPEG + JPEG + SCRIPT


async def test_nothing_that_came_along_with_the_pixels_is_ever_served(siege: Siege) -> None:
    for name, data in _polyglots():
        answer = await siege.send(form(PROMPT, part("images", data, b"a")))
        assert answer.status_code == 202, name
        generation_id = answer.json()["generationId"]
        shown = [picture.content for picture in await served(siege, generation_id)]
        stored = [path.read_bytes() for path in (siege.images / generation_id).iterdir()]
        assert len(stored) >= len(shown)
        for content in shown + stored:
            for trace in (b"SECRET", b"Exif", b"GPS", b"PK\x03\x04", b"<script", b"acTL", b"ANIM"):
                assert trace not in content, name
            with Image.open(BytesIO(content)) as image:
                assert dict(image.getexif()) == {}
                assert getattr(image, "n_frames", 1) == 1
    await siege.aftermath(accepted=len(list(_polyglots())))


# --- names -------------------------------------------------------------------------------------------------


async def test_file_names_name_nothing(siege: Siege, tmp_path: Path) -> None:
    names = {
        "up": b"../../../../tmp/up.png",
        "up, Windows": b"..\\..\\up.png",
        "up, encoded": b"%2e%2e%2fup.png",
        "absolute": b"/etc/cron.d/absolute",
        "device": b"/dev/stdin",
        "drive": b"C:\\Windows\\a.png",
        "NUL": b"a.png\0.sh",
        "line break, encoded": b"a%0d%0aSet-Cookie: a=b",
        "shell": b"$(touch pwned);`id`|.png",
        "not UTF-8": b"\xff\xfe\xc0\xaf",
        "right to left": "gpj.\u202egnp".encode(),
        "quotes": b'a\\"; name=\\"prompt',
        "twice": b'a.png"; filename="../b.png',
        "extended": b"a.png\"; filename*=UTF-8''..%2Fc.png; x=\"",
        "4,000 characters": b"a" * 4_000,
    }
    attacks = {name: siege.outcome(form(PROMPT, part("images", PHOTO, file))) for name, file in names.items()}
    table: Table = {name: ("202", attack) for name, attack in attacks.items()}
    table["10 kB"] = "400 bad_request", siege.outcome(form(PROMPT, part("images", PHOTO, b"a" * 10_000)))
    accepted = await expect(table)
    await siege.aftermath(accepted=accepted)
    assert names_in(tmp_path) == ["images", "temp"]
    for path in siege.images.rglob("*"):
        assert re.fullmatch(r"\.stagecast|[a-z0-9_]+(-[0-9a-f]{32}\.(png|jpg|webp))?", path.name), path


async def test_line_breaks_in_a_part_reach_no_header(siege: Siege) -> None:
    inject = b"X\r\nSet-Cookie: stolen=1\r\nLocation: http://evil.example/"
    for content in (
        form(PROMPT, part("images", PHOTO, inject)),
        form(part("prompt", inject), FILE),
        form(PROMPT, FILE, part("quality", inject)),
        form(PROMPT, FILE, b'Content-Disposition: form-data; name="' + inject + b'"\r\n\r\nx'),
    ):
        answer = await siege.send(content)
        assert answer.status_code in (202, 400, 422)
        assert "set-cookie" not in answer.headers
        assert "evil" not in answer.headers.get("location", "")
        assert "stolen" not in answer.text
    await siege.aftermath(accepted=2)


# --- forms -------------------------------------------------------------------------------------------------


async def test_forms_that_are_none_are_refused(siege: Siege) -> None:
    bad, unsupported, invalid = "400 bad_request", "415 unsupported_media_type", "422 invalid_request"
    large = "413 content_too_large"
    inner = b"Content-Type: multipart/mixed; boundary=C\r\n" + CRLF + form(FILE, boundary=b"C")
    table = {
        "1,001 files": (large, form(PROMPT, *[part("images", b"x", b"a")] * 1_001), FORM),
        "1,001 fields": (large, form(FILE, *[part("prompt", b"x")] * 1_001), FORM),
        "1,001 unknown fields": (large, form(FILE, *(part(f"f{n}", b"x") for n in range(1_001))), FORM),
        "1,000 unknown fields": (invalid, form(*(part(f"f{n}", b"x") for n in range(1_000))), FORM),
        "six files": (invalid, form(PROMPT, *[FILE] * 6), FORM),
        "a form in a form": (invalid, form(PROMPT, part("images", form(FILE, boundary=b"C"))), FORM),
        "a form in a part": (invalid, form(PROMPT, b'Content-Disposition: form-data; name="images"\r\n' + inner), FORM),
        "a part that names nothing": (bad, form(PROMPT, b"Content-Type: image/png\r\n\r\nx"), FORM),
        "a part with 9 headers": (bad, form(PROMPT, part("images", PHOTO, b"a", *[b"X: y"] * 9)), FORM),
        "a header of 10 kB": (bad, form(PROMPT, part("images", PHOTO, b"a", b"X: " + b"y" * 10_000)), FORM),
        "a header without a name": (bad, form(PROMPT, part("images", PHOTO, b"a", b": y")), FORM),
        "a field of over 1 MB": (large, form(part("prompt", b"x" * (MEGABYTE + 1)), FILE), FORM),
        "a name that is not UTF-8": (
            invalid,
            form(PROMPT, FILE, b'Content-Disposition: form-data; name="\xff\xed\xa0\x80"\r\n\r\nx'),
            FORM,
        ),
        "no boundary": (bad, GOOD, "multipart/form-data"),
        "an empty boundary": (bad, GOOD, "multipart/form-data; boundary="),
        "another boundary": (bad, GOOD, "multipart/form-data; boundary=C"),
        "two boundaries": (bad, GOOD, "multipart/form-data; boundary=B; boundary=C"),
        "an extended boundary": (bad, GOOD, "multipart/form-data; boundary*=utf-8''B"),
        "a boundary of 300": (
            bad,
            form(PROMPT, FILE, boundary=b"B" * 300),
            "multipart/form-data; boundary=" + "B" * 300,
        ),
        "a boundary of 2,000": (bad, GOOD, "multipart/form-data; boundary=" + "B" * 2_000),
        "a content type of 50 kB": (bad, GOOD, FORM + ';"' * 25_000),
        "another charset": (unsupported, GOOD, FORM + "; charset=utf-7"),
        "a list of media types": (unsupported, GOOD, "multipart/form-data, text/plain; boundary=B"),
        "urlencoded": (unsupported, b"prompt=x&images=y", "application/x-www-form-urlencoded"),
        "mixed": (unsupported, GOOD, "multipart/mixed; boundary=B"),
        "JSON": (unsupported, b"[" * 100_000, "application/json"),
        "nothing": (bad, b"", FORM),
        "only the end": (invalid, b"--B--\r\n", FORM),
        "line breaks alone": (bad, b"\r\n" * MEGABYTE, FORM),
    }
    begun = time.process_time()
    attacks: Table = {
        name: (expected, siege.outcome(body, content_type)) for name, (expected, body, content_type) in table.items()
    }
    assert await expect(attacks) == 0
    assert time.process_time() - begun < 20
    await siege.aftermath()


async def test_a_form_that_stops_early_is_never_taken_for_a_whole_one(siege: Siege) -> None:
    whole = form(PROMPT, FILE, part("faceSwap", b"false"), part("quality", b"low"))
    end = len(b"--\r\n")
    cuts = [0, 1, 3, 20, 60, 90, 150, 300, *range(len(whole) - 190, len(whole) - end + 2, 6), len(whole) - end]
    for cut in cuts:
        assert await siege.outcome(whole[:cut]) == "400 bad_request", whole[max(0, cut - 30) : cut]
    # What only follows the end need not be there.
    assert await siege.outcome(whole[:-2]) == "202"
    await siege.aftermath(accepted=1)


async def test_json_in_fields_is_bounded(siege: Siege) -> None:
    digits = b"9" * 5_000
    url = b"http://127.0.0.1:1/a.png"
    table = {
        "deep": ("metadata", b'{"a":' * 500 + b"1" + b"}" * 500),
        "very deep": ("metadata", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "an unclosed depth": ("metadata", b"[" * 900_000),
        "a number of 5,000 digits": ("metadata", b'{"a":' + digits + b"}"),
        "a number out of bounds": ("metadata", b'{"a":1e99999}'),
        "a long fraction": ("metadata", b'{"a":0.' + digits + b"e-99999" + b"1" * 2_000 + b"}"[:0]),
        "not a number": ("metadata", b'{"a":NaN}'),
        "a lone surrogate": ("metadata", b'{"a":"\\udc00"}'),
        "a lone surrogate in a key": ("metadata", b'{"\\ud800":1}'),
        "an unfinished escape": ("metadata", b'{"a":"\\u00'),
        "a bare control character": ("metadata", b'{"a":"\0"}'),
        "not UTF-8": ("metadata", b'{"a":"\xed\xa0\x80"}'),
        "two": ("metadata", b"{}{}"),
        "a byte order mark": ("metadata", b"\xef\xbb\xbf{}"),
        "1 MB of spaces": ("metadata", b" " * 1_000_000),
        "1 MB of keys": ("metadata", b"{" + b",".join(b'"%d":0' % n for n in range(100_000)) + b"}"),
        "half a million URLs": ("imageUrls", b"[" + b"1," * 500_000 + b"1]"),
        "deep URLs": ("imageUrls", b"[" * 900_000),
        "a list of lists": ("imageUrls", b"[[[[[]]]]]"),
        "a URL with a NUL": ("imageUrls", b'["http://a\\u0000/"]'),
        "a URL with a line break": ("imageUrls", b'["http://a/\\r\\nHost: b"]'),
        "a URL with a surrogate": ("imageUrls", b'["http://a/\\ud800"]'),
        "a URL of a file": ("imageUrls", b'["file:///etc/passwd"]'),
        "a URL of 1 MB": ("imageUrls", b"http://" + b"a" * 1_000_000),
        "six URLs": ("imageUrls", b"[" + b",".join([b'"' + url + b'"'] * 6) + b"]"),
    }
    attacks: Table = {}
    for name, (where, value) in table.items():
        expected = "422 invalid_request"
        if name == "not UTF-8":
            expected = "202"  # Bytes that are no UTF-8 are read as Latin-1, as Starlette does.
        attacks[name] = expected, siege.outcome(form(PROMPT, FILE, part(where, value)))
    begun = time.process_time()
    accepted = await expect(attacks)
    assert time.process_time() - begun < 20
    await siege.aftermath(accepted=accepted)


async def test_odd_but_allowed_texts_come_back_as_they_were(siege: Siege) -> None:
    odd: JSON = {"a\0b": "\0\x1b[2J\u202e\U0001f600", "huge": int("9" * 1_900), "": [[[]]], "__proto__": {"x": 1}}
    for prompt, metadata, told in (
        ("\U0001f600" * 4_000, json.dumps(odd), odd),
        ("".join(map(chr, range(1, 32))) + "\x7f\x85\u2028\ufeff\ufffe", '{"a": 1, "a": 2}', {"a": 2}),
        ("{{7*7}}${jndi:ldap://a}' OR 1=1--<script>", '{"a": -0.0, "b": 1e308}', {"a": -0.0, "b": 1e308}),
    ):
        answer = await siege.send(form(part("prompt", prompt.encode()), FILE, part("metadata", metadata.encode())))
        assert answer.status_code == 202, answer.text
        assert answer.json()["metadata"] == told
        assert len(await served(siege, answer.json()["generationId"])) >= 2
    for prompt in ("\U0001f600" * 4_001, "x" * 1_000_000, "\0", "a\0b"):
        assert await siege.outcome(form(part("prompt", prompt.encode()), FILE)) == "422 invalid_request"
    await siege.aftermath(accepted=3)


# --- the wire ----------------------------------------------------------------------------------------------


async def test_a_wrong_length_starts_nothing(siege: Siege) -> None:
    async with siege.connect() as short:
        await short.head(f"Content-Length: {len(GOOD) - 20}")
        await short.send(GOOD)
        # The rest is taken for another request, which is refused before this one is read.
        assert await short.answer() == "400 bad_request"
    async with siege.connect() as long:
        await long.head(f"Content-Length: {len(GOOD) + 20}")
        await long.send(GOOD)
        long.writer.write_eof()
        async with asyncio.timeout(HANGS):
            assert await long.reader.read() == b""
    for lengths in (
        ["Content-Length: -1"],
        ["Content-Length: 1e3"],
        [f"Content-Length: {2**70}"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked, identity"],
    ):
        async with siege.connect() as wrong:
            await wrong.head(*lengths)
            await wrong.send(b"0\r\n\r\n")
            assert (await wrong.answer())[0] == "4"
    for broken in (b"zz\r\n", b"-1\r\n", b"fffffffffffffffff\r\n"):
        async with siege.connect() as chunked:
            await chunked.head("Transfer-Encoding: chunked")
            await chunked.send(broken)
            assert (await chunked.answer())[0] == "4"
    await siege.aftermath()


async def test_an_upload_that_breaks_off_leaves_nothing(siege: Siege) -> None:
    upload = form(PROMPT, part("images", bytes(5 * MEGABYTE), b"a"))
    for sent in (10, 100, 1_000, 2 * MEGABYTE, len(upload) - 1):
        async with siege.connect() as wire:
            await wire.head(f"Content-Length: {len(upload)}")
            await wire.send(upload[:sent])
            await asyncio.sleep(0.05)
    await siege.aftermath()


async def test_slow_uploads_hold_up_nobody(siege: Siege) -> None:
    async def drip(wire: Wire) -> None:
        await wire.head(f"Content-Length: {len(GOOD)}")
        for at in range(40):
            await wire.send(GOOD[at : at + 1])
            await asyncio.sleep(0.05)

    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(siege.connect()) for _ in range(50)]
        # Bob's generation is begun and watched to its end meanwhile.
        await asyncio.gather(siege.watch(), *map(drip, wires))
        await asyncio.gather(*(wire.send(GOOD[40:]) for wire in wires[:3]))
        assert [await wire.answer() for wire in wires[:3]] == ["202"] * 3
    await siege.aftermath(accepted=3)


async def test_a_body_without_a_length_is_cut_at_the_first_byte_beyond_the_limit(siege: Siege) -> None:
    head = b'--B\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    async with siege.connect() as wire:
        await wire.head("Transfer-Encoding: chunked")
        await wire.chunk(head)
        left = MAX_BODY - len(head)
        while left:
            size = min(left, MEGABYTE)
            await wire.chunk(bytes(size))
            left -= size
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wire.reader.readexactly(1), 1)
        await wire.chunk(b"x")
        assert await wire.answer() == "413 content_too_large"
    await siege.aftermath()


async def test_60_mb_of_tiny_parts_are_refused_at_the_first_too_many(siege: Siege) -> None:
    one = b"--B\r\n" + PROMPT + CRLF
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(60):
            yield one * (MEGABYTE // len(one))
            sent += 1

    assert outcome(await siege.send(endless())) == "413 content_too_large"
    await siege.aftermath()


@pytest.mark.parametrize("length", [True, False])
async def test_who_has_no_token_is_refused_before_the_body_is_read(
    locked: Siege, monkeypatch: pytest.MonkeyPatch, length: bool
) -> None:
    consumed = 0
    take = HttpProtocol.data_received

    def count(self: HttpProtocol, data: bytes) -> None:
        nonlocal consumed
        consumed += len(data) if b"\0" * 100 in data else 0
        take(self, data)

    monkeypatch.setattr(HttpProtocol, "data_received", count)
    begin = form(PROMPT, part("images", b"", b"a"))[:-9]
    async with locked.connect() as wire:
        await wire.head(f"Content-Length: {100 * MEGABYTE}" if length else "Transfer-Encoding: chunked", user=None)
        send = wire.send if length else wire.chunk
        await send(begin)
        answer = asyncio.create_task(wire.answer())
        sent = 0
        while not answer.done() and sent < 100 * MEGABYTE:
            await send(bytes(65_536))
            sent += 65_536
            await asyncio.sleep(0)
        assert await answer == "401 unauthenticated"
    assert 0 < consumed < MEGABYTE
    await locked.aftermath()


async def test_a_wrong_token_is_no_token(locked: Siege) -> None:
    for credential in ("Bearer x", "Bearer " + "a" * 60_000, "Basic YTpi", "Bearer \xff", "bearer"):
        async with locked.connect() as wire:
            await wire.head(f"Content-Length: {100 * MEGABYTE}", f"Authorization: {credential}", user=None)
            assert (await wire.answer()).startswith("401 "), credential[:20]
    await locked.aftermath()


async def test_100_mb_with_a_token_are_refused_by_their_length(locked: Siege) -> None:
    async with locked.connect() as wire:
        await wire.head(f"Content-Length: {100 * MEGABYTE}")
        assert await wire.answer() == "413 content_too_large"
    await locked.aftermath()


async def test_a_head_without_end_is_refused(locked: Siege) -> None:
    for line in (b"X-A: " + b"a" * 60_000, b"X-A: a\r\n" * 7_000):
        async with locked.connect() as wire:
            answer = b""
            # Who is hung up on while still sending may not come to read why.
            async with asyncio.timeout(HANGS):
                with contextlib.suppress(ConnectionError):
                    await wire.send(b"GET /me HTTP/1.1\r\nHost: localhost\r\n")
                    for _ in range(20):
                        await wire.send(line)
                    answer = await wire.reader.read(12)
            assert answer in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    await locked.aftermath()


# --- memory ------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """A service in a process of its own, and its memory."""

    pid: int
    http: httpx2.AsyncClient

    def _memory(self, name: str) -> int:
        """In MB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) // 1024

    def rest(self) -> int:
        """What is resident now; the peak is measured from here on."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self._memory("VmRSS")

    def peak(self) -> int:
        return self._memory("VmHWM")


@asynccontextmanager
async def measured(tmp_path: Path) -> AsyncIterator[Measured]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STAGECAST_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "api", "serve", "--port", "0", "--images", str(tmp_path / "images")),
        stdout=asyncio.subprocess.PIPE,
        env=environment | {"STAGECAST_JWT_SECRET": SECRET, "STAGECAST_LOCAL_SECONDS": "0", "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), HANGS)).decode()
        port = int(re.findall(r"http://localhost:(\d+)", line)[0])
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=HANGS) as http:
            yield Measured(process.pid, http)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _stream(begin: bytes, each: bytes) -> AsyncIterator[bytes]:
    yield begin
    for _ in range(100):
        yield each


@LINUX
async def test_memory_stays_bounded_whatever_is_sent(tmp_path: Path) -> None:
    mine = {"Content-Type": FORM, "Authorization": f"Bearer {token('mallory')}"}
    nobody = {"Content-Type": FORM}
    file = b'--B\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    field_of_1_mb = b"--B\r\n" + part("prompt", b"\xff" * (MEGABYTE - 10)) + CRLF
    file_of_1_mb = b"--B\r\n" + part("images", bytes(MEGABYTE - 10), b"a") + CRLF
    tiny_parts = (b"--B\r\n" + PROMPT + CRLF) * 10_000  # 0.6 MB
    floods = {
        "100 MB, nobody's": (401, nobody, b"", bytes(MEGABYTE)),
        "100 MB in a file": (413, mine, file, bytes(MEGABYTE)),
        "100 MB of fields": (413, mine, b"", field_of_1_mb),
        "100 MB of files that stay in memory": (413, mine, b"", file_of_1_mb),
        "60 MB of tiny parts": (413, mine, b"", tiny_parts),
    }
    async with measured(tmp_path) as service:
        warm = await service.http.post("/generations/edit", content=GOOD, headers=mine)
        assert warm.status_code == 202, warm.text
        # What is measured is the floods, and not the work on a picture.
        async with asyncio.timeout(HANGS):
            while (await service.http.get(warm.headers["Location"], headers=mine)).json()["status"] != "completed":
                await asyncio.sleep(0.05)
        grown = {}
        for name, (expected, headers, begin, each) in floods.items():
            before = service.rest()
            answer = await service.http.post("/generations/edit", content=_stream(begin, each), headers=headers)
            assert answer.status_code == expected, name
            grown[name] = service.peak() - before
        assert {name: growth for name, growth in grown.items() if growth >= 100} == {}
        assert (await service.http.get("/health/ready")).status_code == 200
    assert names_in(tmp_path) == ["images"]
