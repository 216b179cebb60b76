"""Parses PNG and JPEG files, and separates the pixels from the metadata.

Pillow rejects pictures for damage in chunks that no viewer reads, and takes transparency, orientation and profiles from
text chunks. So it gets a file with the pixels only, and the metadata that affects the display is read here.
"""

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Final

from adapters.images.codec import Unreadable
from adapters.images.colour_profiles import from_chromaticities

#: Chunks of a PNG, segments of a JPEG, and stray bytes before the pixels of a JPEG. It limits the time of the parser.
_MAX_CHUNKS: Final = 20_000

#: Bytes of all decompressed profiles and texts of a PNG.
_MAX_EXPANDED: Final = 16_000_000

_PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOUR, _PALETTE = 0, 2, 3

_MARKER: Final = re.compile(rb"\xff[^\x00\xff]")
_AFTER_SCAN: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
#: Bytes of one search, which holds the GIL: a few milliseconds at worst.
_WINDOW: Final = 1 << 18
_EOI: Final = b"\xff\xd9"
#: Entropy-coded data that decodes to other pixels than the zeros which decoders substitute for missing data.
_FILLER: Final = bytes(range(254, 0, -1))
_END_OF_IMAGE, _START_OF_SCAN, _APP0, _APP1, _APP2, _APP14, _COMMENT = 0xD9, 0xDA, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE
_BARE: Final = {0x01, *range(0xD0, 0xD9)}
#: The markers of a baseline JPEG: its frame, its tables, the restart interval and the scan.
_BASELINE: Final = {0xC0, 0xC4, 0xDB, 0xDD, _START_OF_SCAN}
_APPLICATION: Final = range(_APP0, 0xF0)
_ICC: Final = b"ICC_PROFILE\0"


@dataclass(slots=True)
class PictureFile:
    """A file without metadata, and the metadata that affects its display."""

    data: bytes
    icc_profile: bytes = b""
    exif: bytes = b""
    #: A JPEG without end marker, with `_FILLER` after its data. It decodes to another image if pixels are missing.
    padded: bytes = b""
    #: Whether this is a JPEG of one scan with nothing but what it takes to decode it.
    baseline: bool = False
    #: The number of scans, each of which decodes all pixels.
    scans: int = 1


def read_png(data: bytes) -> PictureFile:
    """Parse a PNG; of an animation, its first frame. Raises `Unreadable`."""
    header = data[8:33]
    if header[4:8] != b"IHDR" or len(header) < 25:
        raise Unreadable
    depth, colour_type = header[16:18]
    first: dict[bytes, bytes] = {}
    pixels: list[bytes] = []
    frames: list[tuple[bytes, list[bytes]]] = []
    at, expanded = 33, 0
    for _ in range(_MAX_CHUNKS):
        length, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if name in (b"IEND", b""):
            break
        body = data[at + 8 : at + 8 + length]
        if name == b"IDAT":
            pixels.append(body)
        elif data[at + 8 + length : at + 12 + length] == struct.pack(">I", zlib.crc32(body, zlib.crc32(name))):
            if name in (b"iCCP", b"zTXt", b"iTXt"):
                body = _expanded(name, body, _MAX_EXPANDED - expanded)
                expanded += len(body)
            if name == b"fcTL" and pixels:
                frames.append((body, []))
            elif name == b"fdAT" and frames:
                frames[-1][1].append(body[4:])
            # Metadata comes before the pixels, and transparency after the palette.
            if not pixels and not (name == b"tRNS" and colour_type == _PALETTE and b"PLTE" not in first):
                first.setdefault(name, body)
        elif name == b"PLTE":
            raise Unreadable
        at += 12 + length
    else:
        raise Unreadable
    animated = 0 < int.from_bytes(first.get(b"acTL", b"")[:4]) < 1 << 31
    if animated and b"fcTL" not in first and frames and frames[0][0][4:20] == header[8:16] + bytes(8):
        # IDAT is a fallback that is not part of the animation: take the first frame instead.
        pixels = frames[0][1] or pixels
    file = PictureFile(b"", _png_profile(first), first.get(b"eXIf", b""))
    chunks = [_PNG_MAGIC, header]
    if colour_type == _PALETTE:
        colours = first.get(b"PLTE", b"")[:768]
        colours = colours[: len(colours) // 3 * 3]
        if not colours:
            raise Unreadable
        # Repeat the last colour for indexes beyond the palette.
        chunks.append(_chunk(b"PLTE", colours + colours[-3:] * (256 - len(colours) // 3)))
    transparency = first.get(b"tRNS", b"")
    if colour_type == _PALETTE and len(transparency) <= 256:
        chunks.append(_chunk(b"tRNS", transparency))
    elif colour_type == _GREY and len(transparency) >= 2:
        # Pillow compares with samples expanded to 8 bits.
        sample, highest = int.from_bytes(transparency[:2]), (1 << depth) - 1
        if sample <= highest or depth == 8:
            expanded_sample = sample if depth == 16 else (sample & 255) * 255 // highest
            chunks.append(_chunk(b"tRNS", struct.pack(">H", expanded_sample)))
    elif colour_type == _COLOUR and len(transparency) >= 6:
        # Pillow keeps the upper 8 of 16 bits.
        samples = [sample >> (depth - 8) for sample in struct.unpack(">3H", transparency[:6])]
        chunks.append(_chunk(b"tRNS", struct.pack(">3H", *samples)))
    file.data = b"".join([*chunks, _chunk(b"IDAT", b"".join(pixels)), _chunk(b"IEND", b"")])
    return file


def _expanded(name: bytes, body: bytes, limit: int) -> bytes:
    """The text or profile in a chunk; empty if it is damaged. Raises `Unreadable` beyond `limit` bytes."""
    keyword, _, packed = body.partition(b"\0")
    if name == b"iTXt":
        compressed, packed = packed[:1] == b"\1", packed[2:].partition(b"\0")[2].partition(b"\0")[2]
        packed = packed if compressed else b""
    elif not 0 < len(keyword) < 80 or packed[:1] != b"\0":
        return b""
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(packed[name != b"iTXt" :], limit + 1)
    except zlib.error:
        return b""
    if len(content) > limit:
        raise Unreadable
    return content


def _png_profile(chunks: dict[bytes, bytes]) -> bytes:
    """The ICC profile from the first usable of iCCP, sRGB, and gAMA with cHRM; empty for sRGB."""
    if profile := chunks.get(b"iCCP", b""):
        return profile
    gamma = int.from_bytes(chunks.get(b"gAMA", b"")[:4])
    if chunks.get(b"sRGB") or not 1_000 <= gamma <= 1_000_000:
        return b""
    corners = chunks.get(b"cHRM", b"")
    xy = [each / 100_000 for each in struct.unpack(">8I", corners)] if len(corners) == 32 else None
    return from_chromaticities(100_000 / gamma, xy)


def _chunk(name: bytes, body: bytes) -> bytes:
    # Pillow does not verify the checksum of IDAT.
    checksum = 0 if name == b"IDAT" else zlib.crc32(body, zlib.crc32(name))
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def read_jpeg(data: bytes) -> PictureFile:
    """Parse a JPEG. Drops data after its end, such as a video or a second picture. Raises `Unreadable`."""
    view = memoryview(data)
    file = PictureFile(b"", scans=0)
    kept = [view[:2]]
    profile: dict[tuple[int, int], bytes] = {}
    at, stray, marker = 2, 0, 0
    unusual = False
    for _ in range(_MAX_CHUNKS):
        found = _search(_AFTER_SCAN if file.scans else _MARKER, data, at)
        start = found.start() if found else len(data)
        if file.scans:
            kept.append(view[at:start])
        else:
            stray += start - at
            if stray > _MAX_CHUNKS:
                raise Unreadable
        if found is None or found[0][1] == _END_OF_IMAGE:
            break
        marker, at = found[0][1], found.end()
        if marker in _BARE:
            continue
        end = at + max(2, int.from_bytes(view[at : at + 2]))
        body = data[at + 2 : end] if marker in _APPLICATION else b""
        at = end
        file.scans += marker == _START_OF_SCAN
        if marker == _APP1 and body.startswith(b"Exif\0") and not file.exif:
            file.exif = body[6:]
        elif marker == _APP2 and body.startswith(_ICC) and len(body) > 14:
            profile.setdefault((body[12], body[13]), body[14:])
        # The decoder reads only these two application segments. JFIF may have a thumbnail.
        if marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            kept.append(memoryview(b"\xff\xee\0\x0e" + body[:12]))
        elif marker == _APP0 and body.startswith(b"JFIF\0") and len(body) >= 14:
            kept.append(memoryview(b"\xff\xe0\0\x10" + body[:12] + bytes(2)))
        elif marker not in (*_APPLICATION, _COMMENT):
            kept.append(view[start:end])
            unusual |= marker not in _BASELINE
    else:
        raise Unreadable
    if found is None:
        if marker != _START_OF_SCAN or at >= len(data):
            raise Unreadable
        file.padded = b"".join(kept).rstrip(b"\xff") + _FILLER + _EOI
        file.scans *= 2
    file.baseline = not (unusual or file.padded) and file.scans == 1 and marker == _START_OF_SCAN
    kept.append(memoryview(_EOI))
    if sorted(profile) == [(number, len(profile)) for number in range(1, len(profile) + 1)]:
        file.icc_profile = b"".join(profile[key] for key in sorted(profile))
    file.data = b"".join(kept)
    return file


def _search(pattern: re.Pattern[bytes], data: bytes, at: int) -> re.Match[bytes] | None:
    windows = range(at, len(data), _WINDOW)
    return next(filter(None, (pattern.search(data, start, start + _WINDOW + 1) for start in windows)), None)


def orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 if none can be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is not None:
        try:
            (at,) = struct.unpack_from(f"{order}I", exif, 4)
            (count,) = struct.unpack_from(f"{order}H", exif, at)
            for entry in range(at + 2, at + 2 + 12 * count, 12):
                tag, kind, length, value = struct.unpack_from(f"{order}HHIH", exif, entry)
                if (tag, kind, length) == (0x0112, 3, 1):
                    return int(value)
        except struct.error:
            pass
    return 1
