"""Text on the offline pictures, in Pillow's font, or in a system font for characters that it lacks."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from textwrap import wrap
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from adapters.offline.art import Box, Colour

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

#: The characters of Pillow's font beside ASCII. It has no accented letters.
_SIGNS: Final = "«»‘’“”…‹›·°±©™"
#: Replacements for characters that Unicode does not decompose.
_SPELLINGS: Final = str.maketrans({
    "ı": "i", "ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d",
    "Đ": "D", "þ": "th", "Þ": "Th", "ð": "d", "–": "-", "—": "-", "‑": "-", "−": "-", "€": "EUR", "„": "“", "•": "·",
})  # fmt: skip

#: Common system fonts. Each covers at least Latin, Greek and Cyrillic: the letters below this code point.
_SYSTEM_FONTS: Final = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")
_SYSTEM_LETTERS: Final = 0x530

#: The distance between lines, as a multiple of the font size.
_LEADING: Final = 1.32


def letters(text: str) -> str:
    """The text in characters that can be drawn, without other accents and letters."""
    drawn = "".join(map(_drawable, unicodedata.normalize("NFC", text)))
    return " ".join("".join(sign if sign.isprintable() else " " for sign in drawn).split())


def write(image: Image.Image, text: str, box: Box, colour: Colour, sizes: Sequence[int]) -> float:
    """Write the text at the bottom of the box, in the first font size (pixels) that fits, and return its top.

    If not even the last size fits, the text is truncated.
    """
    for size in sizes:
        font, most = _font(text, size), max(1, int((box[3] - box[1]) / (size * _LEADING)))
        lines = _wrapped(text, font, box[2] - box[0], most + 1)
        if len(lines) <= most:
            break
    else:
        lines = _wrapped(text, font, box[2] - box[0], most)
    draw = ImageDraw.Draw(image)
    top = box[3] - len(lines) * size * _LEADING
    for index, line in enumerate(lines):
        draw.text((box[0], top + index * size * _LEADING), line, fill=colour, font=font)
    return top


def _wrapped(text: str, font: _Font, width: float, most: int) -> list[str]:
    """The text in lines of at most this width; only the first `most` lines, the last of which then ends in "…"."""
    columns = max(1, int(len(text) * width / font.getlength(text) * 1.2))
    while True:
        lines = wrap(text, columns, max_lines=most, placeholder="…")
        if columns == 1 or all(font.getlength(line) <= width for line in lines):
            return lines
        columns -= 1


def _drawable(sign: str) -> str:
    if sign.isascii() or sign in _SIGNS:
        return sign
    if ord(sign) < _SYSTEM_LETTERS and sign.isalpha() and _system_font():
        return sign
    if sign.isspace():
        return " "
    spelled = unicodedata.normalize("NFKD", sign.translate(_SPELLINGS))
    return "".join(part for part in spelled if part.isascii() or part in _SIGNS)


def _font(text: str, size: int) -> _Font:
    path = _system_font()
    if path is None or all(sign.isascii() or sign in _SIGNS for sign in text):
        return ImageFont.load_default(size)
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _system_font() -> str | None:
    for name in _SYSTEM_FONTS:
        try:
            return str(ImageFont.truetype(name).path)
        except OSError:
            continue
    return None
