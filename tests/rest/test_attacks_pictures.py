"""Hostile pictures against the real service: refused as documented or harmless."""

import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image, PngImagePlugin

from support.attacks import FILE, MEGABYTE, PROMPT, AttackedService, Table, expect, form, names_in, part, served
from support.harness import PHOTO
from support.pictures import encoded, quarters, raw_png

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


async def test_decompression_bombs_are_rejected_or_harmless(attacked: AttackedService) -> None:
    table: Table = {}
    for name, expected, data in _bombs():
        body = form(PROMPT, part("images", data, b"a.png"))
        table[name] = expected, attacked.outcome(body)
        if len(data) < MEGABYTE:
            table[f"{name}, to generate"] = expected, attacked.outcome(body, kind="generate")
    await attacked.aftermath(accepted=await expect(table))


async def test_other_image_types_are_rejected_under_any_name(attacked: AttackedService) -> None:
    table: Table = {}
    for name, data in _other_types():
        file = part("images", data, b"photo.jpg", b"Content-Type: image/jpeg")
        table[name] = "415 unsupported_image_type", attacked.outcome(form(PROMPT, file))
        table[f"{name}, second"] = "415 unsupported_image_type", attacked.outcome(form(PROMPT, FILE, file))
    assert await expect(table) == 0
    await attacked.aftermath()


async def test_image_type_is_taken_from_the_content(attacked: AttackedService) -> None:
    names = (b"a.svg", b"image/svg+xml"), (b"a.html", b"text/html"), (b"a.php\0.jpg", b"x"), (b"a", b"image/png\0")
    for name, content_type in names:
        file = part("images", JPEG, name, b"Content-Type: " + content_type)
        answer = await attacked.send(form(PROMPT, file))
        assert answer.status_code == 202, answer.text
        for picture in await served(attacked, answer.json()["generationId"]):
            assert picture.headers["content-type"] in ("image/png", "image/jpeg", "image/webp")
            assert picture.headers["x-content-type-options"] == "nosniff"
    await attacked.aftermath(accepted=len(names))


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


async def test_metadata_of_uploaded_images_is_never_served(attacked: AttackedService) -> None:
    for name, data in _polyglots():
        answer = await attacked.send(form(PROMPT, part("images", data, b"a")))
        assert answer.status_code == 202, name
        generation_id = answer.json()["generationId"]
        shown = [picture.content for picture in await served(attacked, generation_id)]
        stored = [path.read_bytes() for path in (attacked.images / generation_id).iterdir()]
        assert len(stored) >= len(shown)
        for content in shown + stored:
            for trace in (b"SECRET", b"Exif", b"GPS", b"PK\x03\x04", b"<script", b"acTL", b"ANIM"):
                assert trace not in content, name
            with Image.open(BytesIO(content)) as image:
                assert dict(image.getexif()) == {}
                assert getattr(image, "n_frames", 1) == 1
    await attacked.aftermath(accepted=len(list(_polyglots())))


# --- names -------------------------------------------------------------------------------------------------


async def test_file_names_of_uploads_are_not_used(attacked: AttackedService, tmp_path: Path) -> None:
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
    attacks = {name: attacked.outcome(form(PROMPT, part("images", PHOTO, file))) for name, file in names.items()}
    table: Table = {name: ("202", attack) for name, attack in attacks.items()}
    table["10 kB"] = "400 bad_request", attacked.outcome(form(PROMPT, part("images", PHOTO, b"a" * 10_000)))
    accepted = await expect(table)
    await attacked.aftermath(accepted=accepted)
    assert names_in(tmp_path) == ["images", "temp"]
    for path in attacked.images.rglob("*"):
        assert re.fullmatch(r"\.stagecast|[a-z0-9_]+(-[0-9a-f]{32}\.(png|jpg|webp))?", path.name), path
