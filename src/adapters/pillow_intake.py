"""What strangers send, turned into pictures of ours."""

import mmap
import os
import re
import subprocess
import sys
from io import BytesIO
from typing import Final

from PIL import ExifTags, Image, ImageCms
from PIL.JpegImagePlugin import MARKER

from adapters.image_work import ImageThreads
from adapters.pillow_codec import Unreadable, encode, load, opened, plain, reading, scratch
from domain.errors import ImageTooLarge, InvalidImage, UnsupportedImageType
from domain.ports import Picture

MAX_PIXELS: Final = 25_000_000

#: Scans times pixels of a JPEG: a hundred scans of 25 megapixels. Cameras make about ten. Each costs a pass over
#: the whole picture and as little as 64 bytes, so that ten megabytes could keep a core busy for an hour.
_MAX_SCANNED: Final = 2_500_000_000
_SCAN: Final = b"\xff\xda"

#: Segments of a JPEG before its pixels, chunks of a PNG, and stray bytes between segments. Pillow takes each up
#: in Python, and holds the interpreter lock meanwhile: ten megabytes of empty ones are a minute.
_MAX_PIECES: Final = 20_000
_MARKER: Final = re.compile(rb"\xff[^\x00\xff]")
_START_OF_SCAN: Final = 0xFFDA

_MAGIC: Final = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
}

_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_SRGB: Final = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))

#: Run by a Python of its own: WebP on its input, bare pixels of the first frame on its output.
_DECODE_WEBP: Final = """
import sys
from PIL import Image
with Image.open(sys.stdin.buffer, formats=("WEBP",)) as image:
    sys.stdout.buffer.write(image.tobytes())
"""
_DECODE_SECONDS: Final = 60


class PillowIntake:
    """Admits PNG, JPEG and WebP; of an animation, its first frame."""

    def __init__(self, threads: ImageThreads) -> None:
        self._threads = threads

    async def admit(self, data: bytes) -> Picture:
        return await self._threads.run(_admit, data)


def _admit(data: bytes) -> Picture:
    kind = next((kind for kind, magic in _MAGIC.items() if magic.match(data)), None)
    if kind is None:
        raise UnsupportedImageType if data else InvalidImage
    if (kind == "PNG" and _shredded_png(data)) or (kind == "JPEG" and _shredded_jpeg(data)):
        raise InvalidImage
    try:
        image = opened(data, (kind,))
    except Unreadable as unreadable:
        bomb = isinstance(unreadable.__cause__, Image.DecompressionBombError)
        raise (ImageTooLarge if bomb else InvalidImage) from None
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ImageTooLarge
    if kind == "JPEG" and data.count(_SCAN) * pixels > _MAX_SCANNED:
        raise InvalidImage
    try:
        with reading():
            if kind == "WEBP":
                still = _webp(image, data)
            else:
                load(still := image)
            # A drawing has edges between colours that a photograph has not.
            return encode(_upright(_in_srgb(still), image), quality=92, fine=kind != "JPEG")
    except Unreadable:
        raise InvalidImage from None


def _shredded_png(data: bytes) -> bool:
    """Whether there are too many chunks."""
    at = 8
    for _ in range(_MAX_PIECES):
        if at >= len(data) or data[at + 4 : at + 8] == b"IEND":
            return False
        at += 12 + int.from_bytes(data[at : at + 4])
    return True


def _shredded_jpeg(data: bytes) -> bool:
    """Whether there are too many segments before the first scan, or too much between them; read as Pillow does."""
    at = 2
    stray = 0
    for _ in range(_MAX_PIECES):
        found = _MARKER.search(data, at)
        stray += (found.start() if found else len(data)) - at
        if stray > _MAX_PIECES:
            return True
        marker = int.from_bytes(found[0]) if found else _START_OF_SCAN
        if found is None or marker == _START_OF_SCAN:
            return False
        at = found.end()
        if marker in MARKER and MARKER[marker][2] is not None:
            at += max(2, int.from_bytes(data[at : at + 2]))
    return True


def _webp(image: Image.Image, data: bytes) -> Image.Image:
    """The pixels of a WebP, decoded by another process.

    Pillow decodes WebP without giving up the interpreter lock: in here, everybody's events would stand still
    for 200 ms over 12 megapixels. The other process is given nothing but the bytes, no environment either.
    """
    command = [sys.executable, "-S", "-P", "-W", "ignore", "-c", _DECODE_WEBP]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with scratch() as file:
        subprocess.run(  # noqa: S603 (our own program; the stranger's bytes are its input)
            command,
            input=data,
            stdout=file,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=_DECODE_SECONDS,
            check=True,
        )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as raw:
            pixels = Image.frombytes(image.mode, image.size, raw)
    pixels.info.update(image.info)
    return pixels


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image in our modes; its colours converted where a profile that came along says what they are."""
    profile = image.info.get("icc_profile")
    if not profile:
        return plain(image)
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return plain(image)
        bare = image.mode in ("CMYK", "L") and not image.has_transparency_data
        image = image if bare else plain(image)
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, source, _SRGB, outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError):
        # A profile that is broken, or of another kind of image.
        return plain(image)


def _upright(image: Image.Image, original: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(original.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Broken EXIF is no reason to refuse a picture that can be seen.
        return image
    return image if turn is None else image.transpose(turn)
