"""Files as phones, cameras and tools write them are stored as Chromium displays them."""

import io
import struct
import zlib

import pytest
from PIL import Image, ImageChops, ImageCms

from adapters.images.intake import PillowIntake
from domain.errors import InvalidImage
from domain.ports.images import ImageIntake
from support.pictures import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    THREADS,
    Colour,
    alike,
    colour_at,
    encoded,
    opened,
    quarters,
    raw_png,
)

GREY: Colour = (128, 128, 128)
SIZE = (8, 8)
ROWS = (b"\0" + bytes(GREY) * 8) * 8
GREY_ROWS = (b"\0" + b"\x80" * 8) * 8
JPEG = encoded(quarters(), "JPEG", quality=95)
XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@pytest.fixture
def intake() -> ImageIntake:
    return PillowIntake(THREADS)


def png(*chunks: tuple[bytes, bytes], colour_type: int = 2, depth: int = 8, rows: bytes = ROWS) -> bytes:
    return raw_png(SIZE, depth, colour_type, rows, *chunks)


def with_bad_checksum(data: bytes, name: bytes) -> bytes:
    """The PNG with a wrong checksum after its first chunk of this name."""
    at = data.index(name)
    end = at + 4 + int.from_bytes(data[at - 4 : at])
    return data[:end] + bytes(byte ^ 255 for byte in data[end : end + 4]) + data[end + 4 :]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segments(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def tiff(orientation: int, kind: int = 3, order: str = ">") -> bytes:
    value = struct.pack(f"{order}HH", orientation, 0) if kind == 3 else struct.pack(f"{order}I", orientation)
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
    return (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


def linear_srgb(padding: int = 0) -> bytes:
    """The profile of sRGB, with "sRGB" in its name, but linear; `padding`: random bytes in a tag of their own."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * profile[131], 12)}
    (curve,) = struct.unpack_from(">I", profile, places[b"rTRC"] + 4)
    struct.pack_into(">5i", profile, curve + 12, 65536, 65536, 0, 0, 0)
    profile += bytes(range(1, 256)) * (padding // 255)
    struct.pack_into(">I", profile, 0, len(profile))
    return bytes(profile)


def icc(profile: bytes, name: bytes = b"ICC Profile") -> tuple[bytes, bytes]:
    # Incompressible, like a profile full of measurements.
    return b"iCCP", name + b"\0\0" + zlib.compress(profile, 0)


async def colour_of(intake: ImageIntake, data: bytes) -> Colour:
    return colour_at(opened(await intake.admit(data)), 0.5, 0.5)


LIGHT: Colour = (188, 188, 188)  # 128 where the curve is linear

COLOURS: dict[str, tuple[bytes, Colour]] = {
    "a linear profile named like sRGB": (png(icc(linear_srgb())), LIGHT),
    "a profile of 1.5 MB": (png(icc(linear_srgb(1_500_000))), LIGHT),
    "of two profiles the first": (png(icc(linear_srgb()), icc(b"")), LIGHT),
    "a profile and the sRGB chunk": (png((b"sRGB", b"\0"), icc(linear_srgb())), LIGHT),
    "a damaged profile": (png((b"iCCP", icc(linear_srgb())[1][:90])), GREY),
    "a profile with a wrong checksum": (with_bad_checksum(png(icc(linear_srgb())), b"iCCP"), GREY),
    "a profile packed in an unknown way": (png((b"iCCP", b"x\0\1" + zlib.compress(linear_srgb()))), GREY),
    "a profile without a name": (png(icc(linear_srgb(), b"")), GREY),
    "an empty profile chunk": (png((b"iCCP", b"")), GREY),
    "an RGB profile on grey": (png(icc(linear_srgb()), colour_type=0, rows=GREY_ROWS), LIGHT),
    "gAMA": (png((b"gAMA", struct.pack(">I", 100_000))), LIGHT),
    "gAMA on grey": (png((b"gAMA", struct.pack(">I", 100_000)), colour_type=0, rows=GREY_ROWS), LIGHT),
    "gAMA and the sRGB chunk": (png((b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100_000))), GREY),
    "gAMA and primaries on one line": (png((b"gAMA", struct.pack(">I", 45455)), (b"cHRM", b"\0\0\0\1" * 8)), GREY),
    "gAMA that is too short": (png((b"gAMA", b"\0")), GREY),
    "cICP and iCCP": (png((b"cICP", b"\1\x0d\0\1"), icc(linear_srgb())), LIGHT),
    "empty cHRM, sRGB, pHYs, tIME": (png((b"cHRM", b""), (b"sRGB", b""), (b"pHYs", b""), (b"tIME", b"")), GREY),
}


@pytest.mark.parametrize("name", COLOURS)
async def test_declared_colours_are_applied(intake: ImageIntake, name: str) -> None:
    data, expected = COLOURS[name]
    assert alike(await colour_of(intake, data), expected, tolerance=3)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
async def test_a_linear_profile_named_like_srgb_applies_in_every_format(intake: ImageIntake, kind: str) -> None:
    data = encoded(Image.new("RGB", SIZE, GREY), kind, icc_profile=linear_srgb())
    assert alike(await colour_of(intake, data), LIGHT, tolerance=3)


async def test_a_profile_applies_to_a_transparent_picture(intake: ImageIntake) -> None:
    rows = (b"\0" + b"\x80\x40" * 8) * 8
    image = opened(await intake.admit(png(icc(linear_srgb()), colour_type=4, rows=rows)))
    assert image.getpixel((4, 4)) == (188, 188, 188, 64)


BT709 = 64000, 33000, 30000, 60000, 15000, 6000
DISPLAY_P3 = 68000, 32000, 26500, 69000, 15000, 6000
BT2020 = 70800, 29200, 17000, 79700, 13100, 4600


@pytest.mark.parametrize(
    ("primaries", "expected"), [(BT709, (201, 57, 57)), (DISPLAY_P3, (219, 37, 49)), (BT2020, (249, 0, 50))]
)
async def test_a_wide_gamut_is_converted(intake: ImageIntake, primaries: tuple[int, ...], expected: Colour) -> None:
    rows = (b"\0" + bytes((200, 60, 60)) * 8) * 8
    corners = struct.pack(">8I", 31270, 32900, *primaries)
    got = await colour_of(intake, png((b"gAMA", struct.pack(">I", 45455)), (b"cHRM", corners), rows=rows))
    assert alike(got, expected, tolerance=3)


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("keyword", [b"transparency", b"icc_profile", b"bbox", b"interlace", b"gamma", b"exif"])
async def test_text_chunks_do_not_affect_the_display(intake: ImageIntake, name: bytes, keyword: bytes) -> None:
    content = zlib.compress(b"1")
    between = {b"tEXt": b"\0", b"zTXt": b"\0\0", b"iTXt": b"\0\1\0\0\0"}[name]
    image = opened(await intake.admit(png((name, keyword + between + content))))
    assert (image.mode, colour_at(image, 0.5, 0.5)) == ("RGB", GREY)


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"eXIf", b"gAMA", b"tRNS", b"abCd"])
async def test_damage_in_ancillary_chunks_is_ignored(intake: ImageIntake, name: bytes) -> None:
    data = with_bad_checksum(png((name, b"x" * 9)), name)
    assert alike(await colour_of(intake, data), GREY, tolerance=2)


async def test_a_long_text_chunk_is_ignored(intake: ImageIntake) -> None:
    text = zlib.compress(bytes(3_000_000))
    for chunk in ((b"zTXt", b"workflow\0\0" + text), (b"iTXt", b"workflow\0\1\0\0\0" + text)):
        assert await colour_of(intake, png(chunk)) == GREY


@pytest.mark.parametrize("name", [b"iCCP", b"zTXt", b"iTXt"])
async def test_chunks_that_expand_beyond_the_limit_are_refused(intake: ImageIntake, name: bytes) -> None:
    packed = (b"x\0\1\0\0\0" if name == b"iTXt" else b"x\0\0") + zlib.compress(bytes(9_000_000))
    with pytest.raises(InvalidImage):
        await intake.admit(png((name, packed), (name, packed)))


async def test_chunks_may_expand_exactly_to_the_limit(intake: ImageIntake) -> None:
    full = b"x\0\0" + zlib.compress(bytes(16_000_000))
    assert await colour_of(intake, png((b"zTXt", full))) == GREY
    with pytest.raises(InvalidImage):
        await intake.admit(png((b"zTXt", full), (b"zTXt", b"x\0\0" + zlib.compress(b"a"))))


# --- transparency ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
async def test_transparent_grey_works_at_every_bit_depth(intake: ImageIntake, depth: int) -> None:
    # Left half 1, right half 0; of 16 bits the two differ in the lower byte only.
    bits = ("1" * 4 + "0" * 4) if depth == 1 else "".join(f"{int(x < 4):0{depth}b}" for x in range(8))
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8)
    data = png((b"tRNS", b"\0\1"), colour_type=0, depth=depth, rows=row * 8)
    alpha = opened(await intake.admit(data)).getchannel("A")
    assert [alpha.getpixel((x, 4)) for x in (1, 6)] == [0, 255]


@pytest.mark.parametrize(("depth", "value"), [(1, 2), (2, 4), (4, 16)])
async def test_a_transparent_grey_out_of_range_is_ignored(intake: ImageIntake, depth: int, value: int) -> None:
    data = png((b"tRNS", struct.pack(">H", value)), colour_type=0, depth=depth, rows=(b"\0" + bytes(depth)) * 8)
    assert opened(await intake.admit(data)).mode == "RGB"


PALETTE = bytes(RED + GREEN)
LEFT_RIGHT = (b"\0" + b"\0" * 4 + b"\1" * 4) * 8

PALETTES: dict[str, tuple[list[tuple[bytes, bytes]], str]] = {
    "transparency behind the palette": ([(b"PLTE", PALETTE), (b"tRNS", b"\0")], "RGBA"),
    "transparency before the palette": ([(b"tRNS", b"\0"), (b"PLTE", PALETTE)], "RGB"),
    "transparency that is longer than any palette": ([(b"PLTE", PALETTE), (b"tRNS", bytes(257))], "RGB"),
    "of two transparencies the first": ([(b"PLTE", PALETTE), (b"tRNS", b"\xff"), (b"tRNS", b"\0")], "RGB"),
}


@pytest.mark.parametrize("name", PALETTES)
async def test_transparency_of_a_palette(intake: ImageIntake, name: str) -> None:
    chunks, mode = PALETTES[name]
    assert opened(await intake.admit(png(*chunks, colour_type=3, rows=LEFT_RIGHT))).mode == mode


async def test_an_index_beyond_the_palette_shows_its_last_colour(intake: ImageIntake) -> None:
    rows = (b"\0" + b"\x09" * 8) * 8
    assert alike(await colour_of(intake, png((b"PLTE", PALETTE), colour_type=3, rows=rows)), GREEN, tolerance=3)


async def test_a_palette_picture_without_a_valid_palette_is_invalid(intake: ImageIntake) -> None:
    for data in (png(colour_type=3, rows=LEFT_RIGHT), with_bad_checksum(png((b"PLTE", PALETTE)), b"PLTE")):
        with pytest.raises(InvalidImage):
            await intake.admit(data)


# --- orientation -----------------------------------------------------------------------------------------

EXIF = b"Exif\0\0"
SIDEWAYS = tiff(6)

ORIENTATIONS: dict[str, tuple[bytes, bool]] = {
    "EXIF": (with_segments(segment(0xE1, EXIF + SIDEWAYS)), True),
    "EXIF, little-endian": (with_segments(segment(0xE1, EXIF + tiff(6, order="<"))), True),
    "EXIF with another padding byte": (with_segments(segment(0xE1, b"Exif\0\xff" + SIDEWAYS)), True),
    "EXIF without its end": (with_segments(segment(0xE1, EXIF + SIDEWAYS[:-4])), True),
    "of two EXIF segments the first": (with_segments(*(segment(0xE1, EXIF + tiff(each)) for each in (1, 6))), False),
    "a number of the wrong type": (with_segments(segment(0xE1, EXIF + tiff(6, kind=4))), False),
    "EXIF in the wrong segment": (with_segments(segment(0xE2, EXIF + SIDEWAYS)), False),
    "XMP": (with_segments(segment(0xE1, XMP_HEAD + XMP)), False),
    "EXIF over XMP": (
        with_segments(segment(0xE1, EXIF + tiff(1)), segment(0xE1, XMP_HEAD + XMP)),
        False,
    ),
    "EXIF of a second picture": (JPEG + with_segments(segment(0xE1, EXIF + SIDEWAYS)), False),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
async def test_a_jpeg_is_rotated_by_its_own_exif_only(intake: ImageIntake, name: str) -> None:
    data, turned = ORIENTATIONS[name]
    assert opened(await intake.admit(data)).size == ((40, 60) if turned else (60, 40))


async def test_a_png_is_rotated_by_its_exif_chunk_only(intake: ImageIntake) -> None:
    raw = b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n%8d\n" % len(EXIF + SIDEWAYS) + SIDEWAYS.hex().encode()
    )
    chunks = {
        "eXIf": ((b"eXIf", SIDEWAYS), True),
        "XMP": ((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), False),
        "text of ImageMagick": ((b"zTXt", raw), False),
    }
    row = b"\0" + bytes(RED) * 4 + bytes(BLUE) * 4
    got = {
        name: colour_at(opened(await intake.admit(png(chunk, rows=row * 8))), 0.9, 0.1)
        for name, (chunk, _) in chunks.items()
    }
    assert {name: alike(colour, RED) for name, colour in got.items()} == {
        name: turned for name, (_, turned) in chunks.items()
    }


# --- the structure of JPEG files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail", [b"\xff\xda" * 3_000, b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08" * 5_000, JPEG], ids=len
)
async def test_data_after_the_end_of_a_jpeg_is_ignored(intake: ImageIntake, tail: bytes) -> None:
    photo = encoded(quarters((1000, 1000)), "JPEG", quality=30)
    assert opened(await intake.admit(photo + tail)).size == (1000, 1000)


async def test_scans_of_a_thumbnail_are_not_counted(intake: ImageIntake) -> None:
    thumbnail = segment(0xE1, EXIF + tiff(1) + b"\xff\xda" * 30_000)
    photo = encoded(quarters((1000, 1000)), "JPEG", quality=30)
    assert opened(await intake.admit(photo[:2] + thumbnail + photo[2:])).size == (1000, 1000)


SHORT = [
    (0xE0, b"JFIF\0"),
    (0xEE, b"Adobe"),
    (0xE2, b"ICC_PROFILE\0"),
    (0xED, b"Photoshop 3.0\08BIM\4\4"),
    (0xE2, b"MPF\0x"),
]


@pytest.mark.parametrize(("marker", "body"), SHORT)
async def test_short_application_segments_are_ignored(intake: ImageIntake, marker: int, body: bytes) -> None:
    image = opened(await intake.admit(with_segments(segment(marker, body))))
    assert alike(colour_at(image, 0.75, 0.75), ORANGE)


async def test_a_profile_in_segments_needs_all_of_them(intake: ImageIntake) -> None:
    profile = linear_srgb()
    first, second = (b"ICC_PROFILE\0" + bytes([n, 2]) + part for n, part in ((1, profile[:300]), (2, profile[300:])))
    photo = encoded(Image.new("RGB", SIZE, GREY), "JPEG")
    for pieces, expected in (([first, second], LIGHT), ([second, first], LIGHT), ([first], GREY), ([second], GREY)):
        data = photo[:2] + b"".join(segment(0xE2, piece) for piece in pieces) + photo[2:]
        assert alike(await colour_of(intake, data), expected, tolerance=3)


async def test_restart_markers_and_multiple_scans_are_kept(intake: ImageIntake) -> None:
    for options in ({"restart_marker_blocks": 1}, {"progressive": True}):
        image = opened(await intake.admit(encoded(quarters(), "JPEG", quality=95, **options)))
        assert alike(colour_at(image, 0.25, 0.75), BLUE)


@pytest.mark.parametrize("tail", [b"", b"\xff", b"\xff\xff", bytes(300)], ids=["none", "half", "fill", "zeros"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 0}], ids=str
)
async def test_a_complete_jpeg_needs_no_end_marker(
    intake: ImageIntake, options: dict[str, object], tail: bytes
) -> None:
    photo = encoded(quarters((301, 203)), "JPEG", quality=90, **options)
    stored = opened(await intake.admit(photo.removesuffix(b"\xff\xd9") + tail))
    difference = ImageChops.difference(stored, Image.open(io.BytesIO(photo))).tobytes()
    assert sum(difference) / len(difference) < 1


@pytest.mark.parametrize("missing", [5, 8, 20, 100])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 0}], ids=str
)
async def test_a_jpeg_without_its_last_pixels_is_invalid(
    intake: ImageIntake, options: dict[str, object], missing: int
) -> None:
    photo = encoded(Image.effect_noise((301, 203), 60), "JPEG", quality=90, **options)
    with pytest.raises(InvalidImage):
        await intake.admit(photo[:-missing])


@pytest.mark.parametrize("end", [b"\xff\xda", b"\xff\xda\0\x0c\3\1\0", b"\xff\xc4\0\x1f\0", b"\xff\xfe\0\x02"])
async def test_a_jpeg_that_ends_between_its_scans_is_invalid(intake: ImageIntake, end: bytes) -> None:
    with pytest.raises(InvalidImage):
        await intake.admit(JPEG.removesuffix(b"\xff\xd9") + end)


async def test_a_hidden_first_picture_of_an_animation_is_not_shown(intake: ImageIntake) -> None:
    frames = [Image.new("RGB", SIZE, colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], save_all=True, append_images=frames[1:], duration=100, default_image=True)
    assert alike(await colour_of(intake, data), GREEN)


# --- stored as it looks ----------------------------------------------------------------------------------


async def test_fine_patterns_are_preserved(intake: ImageIntake) -> None:
    source = Image.merge("RGB", [Image.effect_noise((64, 64), 60) for _ in range(3)])
    stored = opened(await intake.admit(encoded(source)))
    difference = [abs(a - b) for a, b in zip(source.tobytes(), stored.tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 3


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [30, 98])
async def test_an_upright_srgb_jpeg_keeps_its_pixels_and_nothing_else(
    intake: ImageIntake, quality: int, subsampling: int
) -> None:
    source = Image.merge("RGB", [Image.effect_noise((301, 203), 60) for _ in range(3)])
    photo = encoded(source, "JPEG", quality=quality, subsampling=subsampling)
    jfif = b"JFIF\0\1\1\0\0\1\0\1"
    assert jfif in photo
    secrets = [segment(0xE1, b"Exif\0\0secret"), segment(0xED, b"secret"), segment(0xFE, b"secret")]
    secrets += [segment(0xE0, jfif + b"\1\2secret"), segment(0xEE, b"Adobe\0\x64\0\0\0\0\1secret")]
    told = photo[:2] + b"".join(secrets) + photo[20:] + b"secret"
    stored = await intake.admit(told)
    assert b"secret" not in stored.data
    assert len(stored.data) <= len(photo) + 16
    assert opened(stored).tobytes() == Image.open(io.BytesIO(photo)).tobytes()


async def test_a_jpeg_with_an_unusual_segment_is_encoded_anew(intake: ImageIntake) -> None:
    # A decoder skips it: it is the number of lines, where the frame does not tell it.
    stored = await intake.admit(JPEG[:2] + segment(0xDC, b"secret") + JPEG[2:])
    assert b"secret" not in stored.data
    assert alike(colour_at(opened(stored), 0.25, 0.75), BLUE)


async def test_a_profile_with_an_expensive_pipeline_is_not_applied(intake: ImageIntake) -> None:
    # A pipeline of 2,000 steps in 50 kB; LittleCMS takes seconds over it, and minutes over 30,000.
    curve = b"curf\0\0\0\0" + struct.pack(">HH", 1, 0) + b"parf\0\0\0\0" + struct.pack(">HH4f", 0, 0, 2.2, 1, 0, 0)
    step = b"cvst\0\0\0\0" + struct.pack(">HH", 3, 3) + struct.pack(">II", 36, len(curve)) * 3 + curve
    steps = b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, 2_000)
    steps += struct.pack(">II", 16 + 8 * 2_000, len(step)) * 2_000 + step
    profile = linear_srgb()
    # Replaces a tag that is not needed.
    entry = profile.index(b"cprt")
    profile = profile[:entry] + b"D2B0" + struct.pack(">II", len(profile), len(steps)) + profile[entry + 12 :] + steps
    profile = struct.pack(">I", len(profile)) + profile[4:]
    assert alike(await colour_of(intake, png(icc(profile))), LIGHT, tolerance=3)
