"""Decodes and encodes pictures with Pillow.

Decoded images are ``RGB``, or ``RGBA`` if they have transparency.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO, Final

from PIL import Image, ImageChops

from domain.ports.images import Picture

FORMATS: Final = ("PNG", "JPEG", "WEBP")

#: Of a picture that is stored.
MAX_PIXELS: Final = 25_000_000

#: The longest side of a JPEG, in pixels.
_JPEG_SIDE: Final = 65_500

# For the whole process, as `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unreadable(Exception):
    """These bytes cannot be decoded."""


@contextmanager
def reading() -> Iterator[None]:
    """Turn exceptions inside the block into `Unreadable`.

    Pillow raises almost any type for malformed data: SyntaxError, struct.error, OverflowError, MemoryError.
    """
    try:
        yield
    except Exception as error:
        raise Unreadable from error


def opened(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Read the header of an image. Raises `Unreadable`."""
    with reading():
        return Image.open(BytesIO(data), formats=formats)


def decoded(image: Image.Image, near: tuple[int, int] | None = None) -> Image.Image:
    """Decode an opened image. Raises `Unreadable`.

    `near`: the size at which it will be drawn. A much larger JPEG is decoded at a reduced size, not below that.
    """
    with reading():
        if near is not None:
            image.draft("RGB", near)
        load(image)
        return plain(image)


def load(image: Image.Image) -> None:
    """Decode the image in place. Raises what Pillow raises."""
    # Into memory allocated here: Pillow would clear its own while it holds the GIL, 30 ms for 12 megapixels.
    # These two decoders would take the image for already decoded.
    if image.format not in ("ICNS", "ICO"):
        image.im = blank(image.mode, image.size).im
    image.load()


def blank(mode: str, size: tuple[int, int], colour: str | int = 0) -> Image.Image:
    """An image of one colour, filled without holding the GIL."""
    return Image.new(mode, (1, 1), colour).resize(size, Image.Resampling.NEAREST)


def plain(image: Image.Image, transparent_sample: int | None = None) -> Image.Image:
    """The image as ``RGB``, or as ``RGBA`` if any pixel is transparent.

    `transparent_sample`: the transparent value of a 16-bit greyscale image.
    """
    if image.mode == "I;16":
        if transparent_sample is None:
            # Pillow's own conversion clips at 255 instead of scaling.
            return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
        low, high = Image.frombytes("LA", image.size, image.tobytes()).split()
        matches = [
            band.point([255 * (value != wanted) for value in range(256)])
            for band, wanted in ((low, transparent_sample & 255), (high, transparent_sample >> 8))
        ]
        image = Image.merge("LA", (high, ImageChops.lighter(*matches)))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    if image.mode != mode:  # `convert` would copy it.
        image = image.convert(mode)
    # Unlike `getextrema`, the histogram releases the GIL.
    return image if mode == "RGB" or any(image.histogram()[768:1023]) else image.convert("RGB")


def encode(image: Image.Image, *, quality: int = 90, fine: bool = False, lossless: bool = False) -> Picture:
    """Encode as JPEG, or as PNG if the image has transparency, without metadata.

    `fine`: no chroma subsampling, for drawings. `lossless`: always a PNG.
    """
    image.info.clear()
    # Pillow releases the GIL only when it encodes into a real file.
    with scratch() as file:
        if lossless or image.mode == "RGBA" or max(image.size) > _JPEG_SIDE:
            media_type = "image/png"
            image.save(file, "PNG", compress_level=1)
        else:
            media_type = "image/jpeg"
            image.save(file, "JPEG", quality=quality, subsampling=0 if fine else 2)
        file.seek(0)
        return Picture(file.read(), media_type)


def encode_webp(image: Image.Image, *, quality: int) -> Picture:
    """Encode as WebP, without metadata."""
    image.info.clear()
    file = BytesIO()
    image.save(file, "WEBP", quality=quality)
    return Picture(file.getvalue(), "image/webp")


def scratch() -> IO[bytes]:
    """A temporary file without a name; on Linux in memory."""
    if sys.platform == "linux":
        return open(os.memfd_create("picture"), "w+b")  # noqa: PTH123 (a descriptor, not a path)
    return tempfile.TemporaryFile()
