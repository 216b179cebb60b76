"""Text on the offline pictures."""

import unicodedata
from contextlib import suppress
from functools import cache
from textwrap import wrap
from typing import Final

from PIL import Image, ImageDraw, ImageFont

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

#: System fonts with Latin, Greek and Cyrillic letters. Of these, Pillow's own font has ASCII.
_SYSTEM_FONTS: Final = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")
_SYSTEM_LETTERS: Final = {*range(0x530), *range(0x2010, 0x2027), ord("€")}
_PILLOW_LETTERS: Final = {*range(0x80), ord("·"), ord("…")}
#: Replacements for letters that Unicode does not decompose.
_SPELLINGS: Final = str.maketrans({"ı": "i", "ß": "ss", "æ": "ae", "ø": "o", "ł": "l", "đ": "d", "–": "-", "—": "-"})

_NO_LETTERS: Final = "Your prompt is written in letters that this preview cannot draw."

_LINE_HEIGHT: Final = 1.3


def font(size: float) -> _Font:
    """A system font, or Pillow's own if there is none; the size is in pixels."""
    path = _system_font()
    layout = ImageFont.Layout.BASIC  # The other one is slow, and may not be installed.
    return ImageFont.truetype(path, size, layout_engine=layout) if path else ImageFont.load_default(size)


def write(image: Image.Image, text: str, box: tuple[int, int, int], size: int, colour: str, most: int = 1) -> int:
    """Write the text in at most `most` lines, and return its top.

    Text that is too long is truncated; characters that cannot be drawn are spelled in others, or omitted.

    Args:
        box: left, right and bottom.
    """
    left, right, bottom = box
    face = font(size)
    lines = _wrapped(_drawable(text) or _NO_LETTERS, face, right - left, most)
    top = bottom - round(len(lines) * size * _LINE_HEIGHT)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((left, top + number * size * _LINE_HEIGHT), line, fill=colour, font=face)
    return top


def _drawable(text: str) -> str:
    letters = _SYSTEM_LETTERS if _system_font() else _PILLOW_LETTERS
    composed = unicodedata.normalize("NFC", text)
    spelled = (
        sign if ord(sign) in letters else unicodedata.normalize("NFKD", sign.translate(_SPELLINGS)) for sign in composed
    )
    drawn = (sign if sign.isprintable() else " " for sign in "".join(spelled) if ord(sign) in letters)
    return " ".join("".join(drawn).split())


def _wrapped(text: str, face: _Font, width: int, most: int) -> list[str]:
    columns = max(1, int(len(text) * width / max(1, face.getlength(text)) * 1.2))
    while True:
        lines = wrap(text, columns, max_lines=most, placeholder="…")
        if columns == 1 or all(face.getlength(line) <= width for line in lines):
            return lines
        columns -= 1


@cache
def _system_font() -> str | None:
    for name in _SYSTEM_FONTS:
        with suppress(OSError):
            return str(ImageFont.truetype(name).path)
    return None
