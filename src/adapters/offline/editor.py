"""The AI stage without an AI: pictures that are drawn locally, and labelled as such."""

from functools import partial
from random import Random
from typing import Final

from PIL import Image, ImageColor, ImageDraw, ImageOps

from adapters.images.codec import decoded, encode, opened
from adapters.offline.lettering import write
from adapters.offline.stage import OfflineStage
from domain.ports.images import Picture
from domain.ports.providers import Report
from domain.requests import Options

SIZES: Final = {"2:3": (1024, 1536), "1:1": (1024, 1024), "3:2": (1536, 1024)}

LABEL: Final = "Offline preview · no AI was called"

_EDITING: Final = ("Looking at the sheet...", "Mixing the colours...", "Painting...", "Adding the last touches...")
_GENERATING: Final = ("Sketching...", "Laying out the shapes...", "Painting...", "Adding the last touches...")

#: In pixels: the distance from the edges, and the height of the text below the picture.
_MARGIN: Final = 84
_TEXT: Final = 240


class LocalEditor(OfflineStage):
    """`domain.ports.providers.ImageEditor` without an AI. It is deterministic."""

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self.make(partial(_edited, sheet, prompt, options), _EDITING, report)

    async def generate(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self.make(partial(_generated, sheet, prompt, options), _GENERATING, report)


def _edited(sheet: Picture, prompt: str, options: Options) -> Picture:
    """The sheet in colours derived from the prompt, on light paper."""
    size = SIZES[options.aspect_ratio]
    hue = _seeded(prompt).randrange(360)
    dark, middle, paper = _hsl(hue, 20), _hsl(hue, 55), _hsl(hue + 150, 95)
    page = _gradient(size, _hsl(hue + 40, 75), _hsl(hue, 40))
    inner = (_MARGIN // 2, _MARGIN // 2, size[0] - _MARGIN // 2, size[1] - _MARGIN // 2)
    ImageDraw.Draw(page).rounded_rectangle(inner, 36, fill=paper)
    picture = _content(sheet, size)
    toned = ImageOps.colorize(picture.convert("L"), black=dark, mid=middle, white=paper)
    return _finished(page, Image.blend(toned, picture, 0.4), prompt, dark, options)


def _generated(sheet: Picture, prompt: str, options: Options) -> Picture:
    """A poster of discs derived from the prompt, with the sheet on it as a tilted card."""
    size = SIZES[options.aspect_ratio]
    chance = _seeded(prompt)
    hue = chance.randrange(360)
    page = _gradient(size, _hsl(hue + 150, 65), _hsl(hue, 12))
    draw = ImageDraw.Draw(page, "RGBA")
    for turn in (0, 40, 150, 180):
        x, y, radius = chance.randrange(size[0]), chance.randrange(size[1] - _TEXT), chance.randrange(120, 400)
        draw.circle((x, y), radius, fill=f"{_hsl(hue + turn, 60)}b0")
    card = ImageOps.expand(_content(sheet, size), 26, "white").convert("RGBA")
    tilted = card.rotate(chance.choice((-4, -3, 3, 4)), Image.Resampling.BILINEAR, expand=True)
    return _finished(page, tilted, prompt, "white", options)


def _seeded(prompt: str) -> Random:
    return Random(prompt.encode("utf-8", "surrogatepass"))  # noqa: S311 (no secret)


def _hsl(hue: int, lightness: int) -> str:
    """A colour of this hue (degrees) and lightness (percent), as ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(f"hsl({hue % 360}, 55%, {lightness}%)"))


def _gradient(size: tuple[int, int], top: str, bottom: str) -> Image.Image:
    return ImageOps.colorize(Image.linear_gradient("L"), black=top, white=bottom).resize(size)


def _content(sheet: Picture, size: tuple[int, int]) -> Image.Image:
    """The sheet without its white margin, scaled to fit above the text of a page of this size."""
    room = size[0] - 3 * _MARGIN, size[1] - _TEXT - 3 * _MARGIN
    image = decoded(opened(sheet.data), near=(min(room), min(room)))
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image if image.mode == "RGBA" else None)
    # On a small copy, which is faster.
    scale = max(1, max(page.size) // 400)
    inked = ImageOps.invert(page.reduce(scale).convert("L")).point(lambda value: 255 * (value > 8)).getbbox()
    if inked:
        left, top, right, bottom = (side * scale for side in inked)
        page = page.crop((left, top, min(right, page.width), min(bottom, page.height)))
    return ImageOps.contain(page, room, Image.Resampling.BICUBIC)


def _finished(page: Image.Image, picture: Image.Image, prompt: str, text: str, options: Options) -> Picture:
    """The page with the picture in its upper part, and the prompt below it."""
    left, right, bottom = _MARGIN, page.width - _MARGIN, page.height - _MARGIN
    room = bottom - _TEXT
    place = (page.width - picture.width) // 2, (room + _MARGIN - picture.height) // 2
    page.paste(picture, place, picture if picture.mode == "RGBA" else None)
    top = write(page, prompt, (left, right, bottom), 42, text, most=3)
    write(page, LABEL, (left, right, top - 12), 24, text)
    if options.background == "transparent":
        shape = Image.new("L", page.size)
        ImageDraw.Draw(shape).rounded_rectangle((8, 8, page.width - 9, page.height - 9), 56, fill=255)
        page.putalpha(shape)
    return encode(page, fine=True)
