"""What the intake admits, what it makes of it, and what it refuses."""

import io
import random
import struct
import zlib

import pytest
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin

from adapters.images.intake import PillowIntake
from domain.errors import ImageRefusal, ImageTooLarge, InvalidImage, UnsupportedImageType
from domain.ports.images import ImageIntake
from support.pictures import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    THREADS,
    WHITE,
    Colour,
    alike,
    colour_at,
    encoded,
    opened,
    quarters,
    raw_png,
)

KINDS = ("PNG", "JPEG", "WEBP")
ORIENTATION = 0x0112


@pytest.fixture
def intake() -> ImageIntake:
    return PillowIntake(THREADS)


def corners(image: Image.Image) -> tuple[Colour, ...]:
    return tuple(colour_at(image, x, y) for y in (0.25, 0.75) for x in (0.25, 0.75))


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, "JPEG", quality=95, subsampling=0, exif=exif)


# --- admitted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_valid_picture_keeps_its_appearance(intake: ImageIntake, kind: str) -> None:
    image = opened(await intake.admit(encoded(quarters(), kind, quality=95)))
    assert (image.size, image.mode) == ((60, 40), "RGB")
    assert all(map(alike, corners(image), (RED, GREEN, BLUE, ORANGE)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
async def test_transparency_is_kept(intake: ImageIntake, kind: str) -> None:
    source = quarters().convert("RGBA")
    source.paste((0, 0, 0, 0), (0, 0, 30, 20))
    image = opened(await intake.admit(encoded(source, kind, lossless=True)))
    assert image.mode == "RGBA"
    assert image.getchannel("A").getpixel((10, 10)) == 0
    assert image.getpixel((50, 30)) == (*ORANGE, 255)


async def test_an_opaque_alpha_channel_is_dropped(intake: ImageIntake) -> None:
    assert opened(await intake.admit(encoded(quarters().convert("RGBA")))).mode == "RGB"


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, (RED, GREEN, BLUE, ORANGE)),
        (2, (GREEN, RED, ORANGE, BLUE)),
        (3, (ORANGE, BLUE, GREEN, RED)),
        (4, (BLUE, ORANGE, RED, GREEN)),
        (5, (RED, BLUE, GREEN, ORANGE)),
        (6, (BLUE, RED, ORANGE, GREEN)),
        (7, (ORANGE, GREEN, BLUE, RED)),
        (8, (GREEN, ORANGE, RED, BLUE)),
        (99, (RED, GREEN, BLUE, ORANGE)),
    ],
)
async def test_a_picture_is_rotated_by_its_exif_orientation(
    intake: ImageIntake, orientation: int, expected: tuple[Colour, ...]
) -> None:
    image = opened(await intake.admit(turned(quarters(), orientation)))
    assert image.size == ((40, 60) if 5 <= orientation <= 8 else (60, 40))
    assert all(map(alike, corners(image), expected))


async def test_a_webp_is_rotated_by_its_exif_orientation(intake: ImageIntake) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = opened(await intake.admit(encoded(quarters(), "WEBP", lossless=True, exif=exif)))
    assert all(map(alike, corners(image), (BLUE, RED, ORANGE, GREEN)))


async def test_malformed_exif_is_ignored(intake: ImageIntake) -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40):
        assert opened(await intake.admit(encoded(quarters(), "JPEG", exif=exif))).size == (60, 40)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
async def test_an_animation_is_reduced_to_its_first_frame(intake: ImageIntake, kind: str) -> None:
    frames = [Image.new("RGB", (30, 30), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    image = opened(await intake.admit(data))
    assert getattr(image, "n_frames", 1) == 1
    assert alike(colour_at(image, 0.5, 0.5), RED)


async def test_an_animation_with_an_invalid_frame_count_is_admitted(intake: ImageIntake) -> None:
    rows = (b"\0" + bytes(RED) * 4) * 4
    for chunk in (struct.pack(">2I", 0, 0), struct.pack(">2I", 0xFFFFFFFF, 0)):
        image = opened(await intake.admit(raw_png((4, 4), 8, 2, rows, (b"acTL", chunk))))
        assert alike(colour_at(image, 0.5, 0.5), RED)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("kind", KINDS)
async def test_only_the_pixels_are_kept(intake: ImageIntake, kind: str, mode: str) -> None:
    source = quarters().convert("RGB" if kind == "JPEG" else mode)
    if source.mode == "RGBA":
        source.putalpha(128)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "SECRET")
    exif = Image.Exif()
    exif[0x010E] = "SECRET"
    options: dict[str, object] = {"exif": exif, "icc_profile": b"SECRET", "comment": b"SECRET"}
    options |= {"pnginfo": text} if kind == "PNG" else {"xmp": b"<x>SECRET</x>"}
    data = encoded(source, kind, **options) + b"<script>SECRET</script>PK\x03\x04"
    assert b"SECRET" in data
    admitted = await intake.admit(data)
    assert b"SECRET" not in admitted.data
    assert b"PK\x03\x04" not in admitted.data
    assert not {"exif", "icc_profile", "comment", "xmp", "Comment"} & opened(admitted).info.keys()


def _swapping_profile() -> bytes:
    """An sRGB profile in which red and green are swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = bytearray(profile.replace("sRGB".encode("utf-16-be"), "odd!".encode("utf-16-be")))
    places = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * profile[131], 12)}
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
async def test_an_embedded_profile_is_converted_to_srgb(intake: ImageIntake, mode: str) -> None:
    source = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    if mode == "RGBA":
        source.putalpha(128)
    image = opened(await intake.admit(encoded(source, icc_profile=_swapping_profile())))
    assert alike(colour_at(image, 0.5, 0.5), (0, 255, 0))
    assert (image.mode == "RGBA") == (mode == "RGBA")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
async def test_a_malformed_or_unsuitable_profile_is_ignored(intake: ImageIntake, mode: str) -> None:
    for profile in (_swapping_profile(), b"no profile", _swapping_profile()[:200]):
        data = encoded(Image.new("RGB", (8, 8), WHITE).convert(mode), "JPEG", icc_profile=profile)
        assert alike(colour_at(opened(await intake.admit(data)), 0.5, 0.5), WHITE)


async def test_cmyk_is_converted_to_rgb(intake: ImageIntake) -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert alike(colour_at(opened(await intake.admit(data)), 0.5, 0.5), (255, 0, 0))


async def test_sixteen_bits_are_reduced_to_eight(intake: ImageIntake) -> None:
    for value in (0x0000, 0x4000, 0x8000, 0xFFFF):
        grey = raw_png((4, 4), 16, 0, (b"\0" + struct.pack(">H", value) * 4) * 4)
        colour = raw_png((4, 4), 16, 2, (b"\0" + struct.pack(">3H", value, 0, 0xFFFF) * 4) * 4)
        assert alike(colour_at(opened(await intake.admit(grey)), 0.5, 0.5), (value >> 8,) * 3)
        assert alike(colour_at(opened(await intake.admit(colour)), 0.5, 0.5), (value >> 8, 0, 255))


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
async def test_transparency_of_a_palette_is_kept(intake: ImageIntake, transparency: int | bytes) -> None:
    source = Image.new("P", (8, 8), 1)
    source.putpalette([*RED, *GREEN])
    source.paste(0, (0, 0, 4, 8))
    image = opened(await intake.admit(encoded(source, transparency=transparency)))
    assert [image.getpixel((x, 4)) for x in (1, 6)] == [(*RED, 0), (*GREEN, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
async def test_every_common_mode_is_admitted(intake: ImageIntake, mode: str) -> None:
    image = opened(await intake.admit(encoded(Image.new("RGB", (8, 8), WHITE).convert(mode))))
    assert alike(colour_at(image, 0.5, 0.5), WHITE)


async def test_a_picture_longer_than_the_limit_of_jpeg_is_admitted(intake: ImageIntake) -> None:
    assert opened(await intake.admit(encoded(Image.new("RGB", (70_000, 1), RED)))).size == (70_000, 1)


# --- refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        encoded(quarters(), "GIF"),
        encoded(quarters(), "BMP"),
        encoded(quarters(), "TIFF"),
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"<!doctype html><title>hello</title>",
        b"hello",
        b"\0" * 100,
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"%PDF-1.7",
    ],
)
async def test_other_types_are_rejected_as_unsupported(intake: ImageIntake, data: bytes) -> None:
    with pytest.raises(UnsupportedImageType):
        await intake.admit(data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [12, 30, 0.5, 0.9])
async def test_a_truncated_picture_is_invalid(intake: ImageIntake, kind: str, keep: float) -> None:
    data = encoded(Image.effect_noise((200, 150), 80), kind)
    with pytest.raises(InvalidImage):
        await intake.admit(data[: int(keep if keep > 1 else keep * len(data))])


async def test_an_empty_file_is_invalid(intake: ImageIntake) -> None:
    with pytest.raises(InvalidImage):
        await intake.admit(b"")


async def test_a_picture_without_pixels_is_invalid(intake: ImageIntake) -> None:
    with pytest.raises(InvalidImage):
        await intake.admit(raw_png((0, 0), 8, 2, b""))


@pytest.mark.parametrize(
    "size", [(6000, 4334), (13_000, 13_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (25_000_001, 1)]
)
async def test_over_25_megapixels_is_too_large_before_anything_is_decoded(
    intake: ImageIntake, size: tuple[int, int]
) -> None:
    # It has no pixels: decoding it would make it invalid instead.
    with pytest.raises(ImageTooLarge):
        await intake.admit(raw_png(size, 1, 0, b""))


async def test_a_jpeg_with_a_huge_declared_size_is_too_large(intake: ImageIntake) -> None:
    data = encoded(quarters(), "JPEG")
    frame = data.index(b"\xff\xc0")
    with pytest.raises(ImageTooLarge):
        await intake.admit(data[: frame + 5] + struct.pack(">2H", 5001, 5001) + data[frame + 9 :])


async def test_a_webp_with_a_huge_declared_size_is_too_large(intake: ImageIntake) -> None:
    data = encoded(quarters(), "WEBP", lossless=True)
    bits = (5001 - 1) | (5001 - 1) << 14
    with pytest.raises(ImageTooLarge):
        await intake.admit(data[:21] + struct.pack("<I", bits) + data[25:])


async def test_exactly_25_megapixels_are_not_too_large(intake: ImageIntake) -> None:
    with pytest.raises(InvalidImage):
        await intake.admit(raw_png((5000, 5000), 1, 0, b""))


async def test_a_jpeg_with_too_many_scans_is_refused_before_it_is_decoded(
    intake: ImageIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(quarters((1000, 1000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert opened(await intake.admit(data)).size == (1000, 1000)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", pytest.fail)
    with pytest.raises(InvalidImage):
        await intake.admit(data[:-2] + scan * 2500 + b"\xff\xd9")


async def test_a_decompression_bomb_in_text_is_refused(intake: ImageIntake) -> None:
    bomb = b"Comment\0\0" + zlib.compress(b"a" * 50_000_000)
    with pytest.raises(InvalidImage):
        await intake.admit(raw_png((4, 4), 8, 2, (b"\0" + bytes(12)) * 4, (b"zTXt", bomb)))


@pytest.mark.parametrize(("kind", "times"), [("PNG", 150), ("JPEG", 150), ("WEBP", 8)])
async def test_damaged_bytes_are_either_admitted_or_refused(intake: ImageIntake, kind: str, times: int) -> None:
    chance = random.Random(kind)
    whole = encoded(quarters(), kind)
    for _ in range(times):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            opened(await intake.admit(bytes(data)))
        except ImageRefusal:
            continue


async def test_running_out_of_memory_is_a_refusal(intake: ImageIntake, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", exhausted)
    with pytest.raises(InvalidImage):
        await intake.admit(encoded(quarters()))


async def test_the_same_bytes_give_the_same_picture(intake: ImageIntake) -> None:
    data = io.BytesIO(encoded(quarters(), "JPEG")).getvalue()
    assert await intake.admit(data) == await intake.admit(data)
