"""Finds pictures in the responses of providers and gateways, in all the keys, encodings and formats that they use."""

import binascii
from collections.abc import Iterator
from typing import Final
from urllib.parse import unquote_to_bytes

from PIL import Image

from adapters.images.codec import FORMATS, Unreadable, decoded, encode, opened
from domain.ports.images import Picture

#: The formats that Pillow decodes by itself. EPS is excluded because it starts Ghostscript.
_FORMATS: Final = (
    *FORMATS, "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "ICNS", "ICO",
    "IM", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA",
    "TIFF", "XBM", "XPM",
)  # fmt: skip

#: The longer side of a preview, in pixels.
_PREVIEW: Final = 768

#: The keys of pictures (base64, data URL or URL), best first.
_KEYS: Final = ("b64_json", "url", "image_url", "image", "images", "base64", "data", "result", "output")
#: The keys of objects that contain a picture at some depth.
_WRAPPERS: Final = ("response", "item", "results", "choices", "message", "content")

_URL_SAFE: Final = str.maketrans("-_", "+/")


def candidates(value: object, key: str = "") -> Iterator[str]:
    """Every text in this JSON value that may be a picture, best first."""
    if isinstance(value, str) and value and key in _KEYS:
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from candidates(each, key)
    elif isinstance(value, dict):
        for inner in (*_KEYS, *_WRAPPERS):
            yield from candidates(value.get(inner), inner)


def inline(text: str) -> bytes:
    """Decode a data URL or base64, with either alphabet, and with or without line breaks and padding.

    Raises:
        Unreadable: it is neither.
    """
    head, comma, content = text.partition(",")
    in_base64 = head.rstrip().lower().endswith("base64")
    if comma and not (in_base64 or head.lstrip()[:5].lower() == "data:"):
        raise Unreadable("no base64")
    try:
        if comma:
            data = unquote_to_bytes(content)
            if not in_base64:
                return data
            text = data.decode("ascii")
        text = "".join(text.split()).translate(_URL_SAFE).rstrip("=")
        return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError:
        raise Unreadable("no base64") from None


def usable(data: bytes, min_side: int = 1) -> Picture:
    """The picture, validated by decoding it: unchanged if browsers show its format, else as a PNG.

    Raises:
        Unreadable: it is not a picture, too large, or its shorter side has fewer than `min_side` pixels.
    """
    image = opened(data, _FORMATS)
    if min(image.size) < min_side:
        raise Unreadable(f"an image of {image.width} × {image.height} pixels")
    flat = decoded(image)
    return Picture(data, Image.MIME[image.format]) if image.format in FORMATS else encode(flat, lossless=True)


def preview(data: bytes) -> Picture:
    """A smaller version of the picture. Raises `Unreadable`."""
    image = decoded(opened(data, _FORMATS), near=(_PREVIEW, _PREVIEW))
    image.thumbnail((_PREVIEW, _PREVIEW))
    return encode(image, quality=80)
