"""Decodes and encodes pictures with Pillow.

Decoded images are ``RGB``, or ``RGBA`` if they have transparency.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Final

from PIL import Image, ImageFile, ImageMath

from domain.ports.images import Picture

FORMATS: Final = ("PNG", "JPEG", "WEBP")

#: Of a picture that is stored. Pillow opens pictures of up to twice its own limit.
MAX_PIXELS: Final = 25_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2

#: Bytes that Pillow encodes or decodes at a time. It keeps the GIL for as long while it encodes.
ImageFile.MAXBLOCK = 16 * 1024

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
        raise Unreadable(type(error).__name__) from error


def opened(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Read the header of an image. Raises `Unreadable`, also if it has more than `MAX_PIXELS`."""
    with reading():
        return Image.open(BytesIO(data), formats=formats)


def decoded(image: Image.Image, near: tuple[int, int] | None = None) -> Image.Image:
    """Decode an opened image. Raises `Unreadable`.

    `near`: the size at which it will be drawn. A much larger JPEG is decoded at a reduced size, not below that.
    """
    with reading():
        if near is not None:
            image.draft("RGB", near)
        image.load()
        return plain(image)


def plain(image: Image.Image) -> Image.Image:
    """The image as ``RGB``, or as ``RGBA`` if any pixel is transparent."""
    if image.mode == "I;16":
        samples, transparent = image, image.info.pop("transparency", None)
        # Pillow's own conversion clips at 255 instead of scaling, and ignores transparency.
        image = image.point(lambda value: value * (1 / 256)).convert("L")
        if transparent is not None:
            opaque = ImageMath.lambda_eval(lambda args: (args["it"] != transparent) * 255, it=samples.convert("I"))
            image.putalpha(opaque.convert("L"))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    if image.mode != mode:  # `convert` would copy it.
        image = image.convert(mode)
    # Unlike `getextrema`, the histogram releases the GIL.
    return image if mode == "RGB" or any(image.histogram()[768:1023]) else image.convert("RGB")


def encode(image: Image.Image, *, quality: int = 90, fine: bool = False, lossless: bool = False) -> Picture:
    """Encode as JPEG, or as PNG if the image has transparency, without metadata.

    `fine`: no chroma subsampling, for drawings. `lossless`: always a PNG.
    """
    if lossless or image.mode == "RGBA" or max(image.size) > _JPEG_SIDE:
        return saved(image, "PNG", compress_level=1)
    return saved(image, "JPEG", quality=quality, subsampling=0 if fine else 2)


def saved(image: Image.Image, kind: str, **options: int) -> Picture:
    """Encode in this format with Pillow's options, without metadata."""
    image.info.clear()
    file = BytesIO()
    image.save(file, kind, **options)
    return Picture(file.getvalue(), Image.MIME[kind])
