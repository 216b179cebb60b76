"""Pictures into Pillow and out of it: one way to decode, one way to encode.

In here an image is ``RGB``, or ``RGBA`` where it can be seen through.
"""

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO, Final

from PIL import Image, ImageChops

from domain.ports import Picture

FORMATS: Final = ("PNG", "JPEG", "WEBP")

#: The longest side that a JPEG can have.
_JPEG_SIDE: Final = 65_500

_IN_PILLOW: Final = r"PIL\."


class Unreadable(Exception):
    """These bytes cannot be decoded."""


@contextmanager
def reading() -> Iterator[None]:
    """Whatever Pillow finds wrong in here becomes `Unreadable`, and what it only warns of is not said.

    It raises nearly everything over hostile bytes: SyntaxError, struct.error, OverflowError, MemoryError.
    """
    # A filter for good: `warnings.catch_warnings` is not safe in threads. Looked at each time, since whoever
    # runs us (pytest does, for each test) may have put other filters before it.
    if [module for *_, module, _ in warnings.filters[:1]] != [re.compile(_IN_PILLOW)]:
        warnings.filterwarnings("ignore", module=_IN_PILLOW)
    try:
        yield
    except Exception as error:
        raise Unreadable from error


def opened(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image of which only the header has been read. Raises `Unreadable`."""
    with reading():
        return Image.open(BytesIO(data), formats=formats)


def decoded(image: Image.Image, near: tuple[int, int] | None = None) -> Image.Image:
    """The pixels of what was opened. Raises `Unreadable`.

    `near`: the size it is going to be drawn at. A JPEG much larger than that is decoded smaller, never
    smaller than that.
    """
    with reading():
        if near is not None:
            image.draft("RGB", near)
        load(image)
        return plain(image)


def load(image: Image.Image) -> None:
    """Decode the image. Raises what Pillow raises."""
    # Into memory that is there: Pillow clears its own while holding the interpreter lock, 30 ms for 12 megapixels.
    # These two decoders would take the image for decoded already.
    if image.format not in ("ICNS", "ICO"):
        image.im = blank(image.mode, image.size).im
    image.load()


def blank(mode: str, size: tuple[int, int], colour: str | int = 0) -> Image.Image:
    """An image of one colour, made without the interpreter lock."""
    return Image.new(mode, (1, 1), colour).resize(size, Image.Resampling.NEAREST)


def plain(image: Image.Image, transparent_sample: int | None = None) -> Image.Image:
    """The image as ``RGB``, or as ``RGBA`` where it has any transparency.

    `transparent_sample`: the value of 16-bit greyscale that stands for it.
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
    if not image.has_transparency_data:
        return _converted(image, "RGB")
    image = _converted(image, "RGBA")
    # The histogram, unlike `getextrema`, gives up the interpreter lock.
    return image if any(image.histogram()[768:1023]) else image.convert("RGB")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    # Converted to the mode that it has, an image is copied.
    return image if image.mode == mode else image.convert(mode)


def encode(image: Image.Image, *, quality: int = 90, fine: bool = False, lossless: bool = False) -> Picture:
    """A JPEG, or a PNG where it can be seen through, with nothing in it but the pixels.

    `fine` keeps colour at full resolution: for what was drawn rather than photographed. `lossless`: always a PNG.
    """
    image.info.clear()
    # Into a real file Pillow encodes without the interpreter lock; into a BytesIO it holds on to it.
    with scratch() as file:
        if lossless or image.mode == "RGBA" or max(image.size) > _JPEG_SIDE:
            media_type = "image/png"
            image.save(file, "PNG", compress_level=1)
        else:
            media_type = "image/jpeg"
            image.save(file, "JPEG", quality=quality, subsampling=0 if fine else 2)
        file.seek(0)
        return Picture(file.read(), media_type)


def scratch() -> IO[bytes]:
    """A file without a name, in memory where the system has such files."""
    if sys.platform == "linux":
        return open(os.memfd_create("picture"), "w+b")  # noqa: PTH123 (a descriptor, not a path)
    return tempfile.TemporaryFile()
