"""Validates uploaded pictures, and stores them in sRGB without metadata: re-encoded, unless a JPEG needs no change."""

import re
from collections.abc import Callable
from functools import partial
from io import BytesIO
from itertools import chain, product
from typing import Final

from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps

from adapters.images import codec
from adapters.images.codec import Unreadable, opened, plain, reading
from adapters.images.colour_profiles import SRGB
from adapters.images.file_structure import PictureFile, orientation, read_jpeg, read_png
from adapters.images.threads import GLANCE, ImageThreads
from domain.errors import ImageTooLarge, InvalidImage, UnsupportedImageType
from domain.ports.images import Content, Picture, read

#: Scans times pixels: a hundred scans of 25 megapixels; cameras make about ten. A scan costs a pass over the picture,
#: and may have as little as 64 bytes, so that ten megabytes could keep a core busy for an hour.
_MAX_SCANNED: Final = 2_500_000_000

_MAGIC: Final = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
}

#: The EXIF orientations that change the picture, and those that swap width and height.
_MOVED: Final = range(2, 9)
_TURNED: Final = range(5, 9)

#: The longest side of a WebP, in pixels.
_WEBP_SIDE: Final = 16_383

_READERS: Final = {"PNG": read_png, "JPEG": read_jpeg, "WEBP": PictureFile}

#: 729 colours, evenly spaced in the RGB cube.
_COLOURS: Final = Image.frombytes("RGB", (27, 27), bytes(chain.from_iterable(product(range(0, 256, 31), repeat=3))))


class PillowIntake:
    """`domain.ports.images.ImageIntake` for PNG, JPEG and WebP; of an animation, its first frame."""

    def __init__(self, threads: ImageThreads) -> None:
        self._threads = threads

    async def admit(self, content: Content) -> Picture:
        return await self._work(_admit, content)

    async def thumbnail(self, content: Content, width: int) -> Picture:
        return await self._work(partial(_thumbnail, width=width), content)

    async def _work(self, work: Callable[[bytes], Picture], content: Content) -> Picture:
        # Read twice, so that the data is not in memory while this waits for a thread.
        async with self._threads.turn(GLANCE) as run:
            cost = await run(_cost, await read(content))
        async with self._threads.turn(cost) as run:
            try:
                return await run(work, await read(content))
            except Unreadable:
                raise InvalidImage from None


def _cost(data: bytes) -> int:
    """Pixels times passes over them. Raises like `ImageIntake.admit`."""
    file, image = _opened(data)
    return max(1, file.scans) * image.width * image.height


def _opened(data: bytes) -> tuple[PictureFile, Image.Image]:
    """The file, and the image, not yet decoded. Raises like `ImageIntake.admit`."""
    kind = next((kind for kind, magic in _MAGIC.items() if magic.match(data)), None)
    if kind is None:
        raise UnsupportedImageType if data else InvalidImage
    try:
        with reading():
            file = _READERS[kind](data)
        image = opened(file.data, (kind,))
    except Unreadable as unreadable:
        bomb = isinstance(unreadable.__cause__, Image.DecompressionBombError)
        raise (ImageTooLarge if bomb else InvalidImage) from None
    if file.scans * image.width * image.height > _MAX_SCANNED:
        raise InvalidImage
    if kind == "WEBP":
        # Not left to Pillow, which raises where it cannot read them.
        file.exif = image.info.pop("exif", b"").removeprefix(b"Exif\0\0")
        image.info.pop("xmp", None)
        file.icc_profile = image.info.get("icc_profile", b"")
    return file, image


def _admit(data: bytes) -> Picture:
    file, image = _opened(data)
    with reading():
        still = _still(file, image, image.size)
        if still is image and file.baseline and orientation(file.exif) not in _MOVED:
            return Picture(file.data, "image/jpeg")
        return codec.encode(still, quality=97, fine=True)


def _thumbnail(data: bytes, width: int) -> Picture:
    file, image = _opened(data)
    with reading():
        still = _still(file, image, (1, width) if orientation(file.exif) in _TURNED else (width, 1))
        still.thumbnail((width, _WEBP_SIDE), Image.Resampling.LANCZOS)
        return codec.saved(still, "WEBP", quality=80)


def _still(file: PictureFile, image: Image.Image, near: tuple[int, int]) -> Image.Image:
    """The first frame, upright and in sRGB; of a JPEG, at a size that may be reduced to not below `near`."""
    image.draft("RGB", near)
    image.load()
    if file.padded and not _is_complete(image, file.padded, near):
        raise Unreadable
    still = _in_srgb(image, file)
    still.getexif()[ExifTags.Base.Orientation] = orientation(file.exif)
    ImageOps.exif_transpose(still, in_place=True)
    return still


def _is_complete(image: Image.Image, padded: bytes, near: tuple[int, int]) -> bool:
    """Whether the image has all its pixels, so that padding does not change them."""
    other = opened(padded, ("JPEG",))
    other.draft("RGB", near)
    other.load()
    return image.histogram() == other.histogram()


def _in_srgb(image: Image.Image, file: PictureFile) -> Image.Image:
    """The image as ``RGB`` or ``RGBA``, converted to sRGB if it has a usable profile."""
    flat = plain(image)
    if not file.icc_profile:
        return flat
    try:
        # Hide floating-point pipelines (D2Bx): LittleCMS may take minutes for them, and browsers ignore them too.
        profile = ImageCms.ImageCmsProfile(BytesIO(file.icc_profile.replace(b"D2B", b"\0\0\0")))
        space = profile.profile.xcolor_space.strip()
        is_grey = Image.getmodebase(image.mode) == "L"
        if (space == "CMYK") != (image.mode == "CMYK") or (space == "GRAY" and not is_grey):
            return flat
        source = {"CMYK": image, "GRAY": flat.getchannel(0)}.get(space, flat)
        mode = "RGBA" if source.mode == "RGBA" else "RGB"
        transform = ImageCms.buildTransform(profile, SRGB, source.mode, mode)
        if source is flat and _changes_nothing(transform, mode):
            return flat
        converted = transform.apply(source)
        if flat.mode == "RGBA" and mode == "RGB":
            converted.putalpha(flat.getchannel("A"))
        return converted
    except (ImageCms.PyCMSError, OSError):
        # The profile is malformed, or for another kind of image.
        return flat


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the transform is almost the identity. Most profiles are sRGB's, and conversion is slow."""
    before = _COLOURS.convert(mode)
    levels = ImageChops.difference(before, transform.apply(before)).histogram()
    return not any(count for index, count in enumerate(levels) if index % 256 > 2)
