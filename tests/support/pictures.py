"""Makes pictures for tests, and looks at them."""

import struct
import zlib
from collections.abc import Iterable
from io import BytesIO

from PIL import Image, ImageChops

from adapters.images.threads import ImageThreads
from domain.ports.images import Load, Picture

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

RED, GREEN, BLUE, ORANGE, BLACK = (220, 30, 30), (30, 170, 60), (40, 60, 220), (250, 150, 20), (10, 10, 10)
COLOURS: tuple[Colour, ...] = (RED, GREEN, BLUE, ORANGE, BLACK)
WHITE: Colour = (255, 255, 255)

#: For everything under test that works on images.
THREADS = ImageThreads()

_MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(image: Image.Image, kind: str = "PNG", **options: object) -> Picture:
    return Picture(encoded(image, kind, **options), _MEDIA_TYPES[kind])


def loads(pictures: Iterable[Picture]) -> list[Load]:
    """What loads each of them."""

    def load(picture: Picture) -> Load:
        async def give() -> Picture:
            return picture

        return give

    return [load(picture) for picture in pictures]


def solid(colour: Colour, size: tuple[int, int] = (60, 40), kind: str = "PNG") -> Picture:
    return picture(Image.new("RGB", size, colour), kind)


def quarters(size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Red and green above blue and orange."""
    image = Image.new("RGB", (2, 2))
    for place, colour in enumerate((RED, GREEN, BLUE, ORANGE)):
        image.putpixel((place % 2, place // 2), colour)
    return image.resize(size, Image.Resampling.NEAREST)


def raw_png(size: tuple[int, int], depth: int, colour_type: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: the compressed `pixels` have a filter byte before each row; `chunks` come before them."""
    header = struct.pack(">2I5B", *size, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def opened(picture: Picture) -> Image.Image:
    image = Image.open(BytesIO(picture.data))
    image.load()
    assert _MEDIA_TYPES[image.format or ""] == picture.media_type
    return image


def colour_at(image: Image.Image, across: float, down: float) -> Colour:
    """The colour at that fraction of width and height."""
    red, green, blue = image.convert("RGB").getpixel((int(across * image.width), int(down * image.height)))  # type: ignore[misc]
    return red, green, blue


def alike(one: Colour, other: Colour, tolerance: int = 12) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))


def differing(one: Image.Image, other: Image.Image, tolerance: int) -> Image.Image:
    """255 wherever the two differ by more than that in any channel."""
    bands = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).split()
    largest = ImageChops.lighter(ImageChops.lighter(bands[0], bands[1]), bands[2])
    return largest.point([255 * (value > tolerance) for value in range(256)])


def box_of(image: Image.Image, colour: Colour, tolerance: int = 30) -> Box | None:
    """Where this colour is; `None` where it is nowhere."""
    found: Box | None = ImageChops.invert(differing(image, Image.new("RGB", image.size, colour), tolerance)).getbbox()
    return found


def disjoint(boxes: Iterable[Box]) -> bool:
    boxes = list(boxes)
    return all(
        a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for place, a in enumerate(boxes)
        for b in boxes[place + 1 :]
    )
