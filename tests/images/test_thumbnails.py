"""Thumbnails: what `domain.ports.images.ImageIntake.thumbnail` makes of a picture, by Pillow."""

import asyncio
import threading
from io import BytesIO

import pytest
from PIL import Image

from adapters.images.intake import PillowIntake
from adapters.images.threads import ImageThreads
from domain.errors import ImageRefusal
from domain.ports.images import Picture
from support.pictures import BLUE, GREEN, ORANGE, RED, THREADS, alike, colour_at, encoded, opened, picture, quarters

INTAKE = PillowIntake(THREADS)


async def thumbnail(data: bytes, width: int = 320) -> Image.Image:
    made = await INTAKE.thumbnail(data, width)
    assert made.media_type == "image/webp"
    return opened(made)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("size", "width", "expected"),
    [
        ((2000, 1000), 320, (320, 160)),
        ((2000, 1000), 640, (640, 320)),
        ((321, 500), 320, (320, 498)),
        ((320, 500), 320, (320, 500)),
        ((100, 3000), 640, (100, 3000)),
        ((3000, 1), 320, (320, 1)),
    ],
)
async def test_a_thumbnail_has_at_most_the_width_and_the_same_shape(
    kind: str, size: tuple[int, int], width: int, expected: tuple[int, int]
) -> None:
    image = await thumbnail(encoded(quarters(size), kind), width)
    assert image.size == expected
    if size[1] > 1:
        colours = [colour_at(image, x, y) for y in (0.2, 0.8) for x in (0.2, 0.8)]
        assert all(alike(one, other, 30) for one, other in zip(colours, (RED, GREEN, BLUE, ORANGE), strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize(
    ("orientation", "first"),
    [(1, RED), (2, GREEN), (3, ORANGE), (4, BLUE), (5, RED), (6, BLUE), (7, ORANGE), (8, GREEN)],
)
async def test_a_thumbnail_is_upright(kind: str, orientation: int, first: tuple[int, int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = await thumbnail(encoded(quarters((1200, 600)), kind, exif=exif))
    assert image.size == ((320, 640) if orientation >= 5 else (320, 160))
    assert alike(colour_at(image, 0.2, 0.2), first, 30)


async def test_a_thumbnail_of_an_animation_is_its_first_frame_alone() -> None:
    frames = [Image.new("RGB", (640, 640), colour) for colour in (RED, GREEN, BLUE)]
    image = await thumbnail(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    assert getattr(image, "n_frames", 1) == 1
    assert alike(colour_at(image, 0.5, 0.5), RED)


async def test_transparency_is_kept_and_metadata_is_not() -> None:
    source = Image.new("RGBA", (1000, 1000), (*RED, 0))
    source.paste((*BLUE, 255), (500, 0, 1000, 1000))
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    image = await thumbnail(encoded(source, "PNG", exif=exif))
    assert [image.getpixel((x, 160))[3] for x in (20, 300)] == [0, 255]  # type: ignore[index]
    assert not set(image.info) & {"exif", "xmp", "icc_profile"}
    assert b"a secret" not in (await INTAKE.thumbnail(encoded(source, "PNG", exif=exif), 320)).data


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16"])
async def test_every_mode_has_a_thumbnail(mode: str) -> None:
    source = Image.new("RGB", (700, 700), RED).convert("L" if mode == "I;16" else mode)
    data = encoded(source.convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert (await thumbnail(data)).size == (320, 320)


async def test_a_picture_longer_than_a_webp_can_be_is_made_smaller() -> None:
    assert (await thumbnail(encoded(Image.new("RGB", (40, 32_766), RED)))).size == (20, 16_383)


@pytest.mark.parametrize("keep", [0, 3, 40, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_a_damaged_picture_is_refused(kind: str, keep: float) -> None:
    data = encoded(quarters((900, 900)).rotate(13), kind)
    with pytest.raises(ImageRefusal):
        await INTAKE.thumbnail(data[: int(keep if keep > 1 or not keep else keep * len(data))], 320)


async def test_no_more_pictures_are_in_memory_than_there_are_threads() -> None:
    threads = ImageThreads(1)
    intake, data = PillowIntake(threads), picture(quarters((1000, 1000)))
    occupied, released = threading.Event(), threading.Event()

    def occupy() -> None:
        occupied.set()
        released.wait(30)

    busy = asyncio.create_task(threads.run(occupy))
    await asyncio.to_thread(occupied.wait)
    loads = 0

    async def load() -> bytes:
        nonlocal loads
        loads += 1
        return data.data

    making = [asyncio.create_task(intake.thumbnail(load, 320)) for _ in range(20)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert loads == 0
    released.set()
    made = await asyncio.gather(busy, *making)
    assert all(isinstance(each, Picture) and len(Image.open(BytesIO(each.data)).size) == 2 for each in made[1:])
    threads.close()
