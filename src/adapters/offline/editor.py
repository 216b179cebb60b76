"""The AI stage without an AI: pictures that are drawn locally, and labelled as such."""

from functools import partial
from typing import Final

from PIL import Image, ImageChops, ImageOps

from adapters.images.codec import decoded, encode, opened
from adapters.offline.art import Box, Chance, Colour, Palette, disc, faded, inset, mesh, rounded, shadow, tint
from adapters.offline.lettering import letters, write
from adapters.offline.stage import OfflineStage
from domain.ports.images import Picture
from domain.ports.providers import Report
from domain.requests import Options

SIZES: Final = {"2:3": (1024, 1536), "1:1": (1024, 1024), "3:2": (1536, 1024)}

LABEL: Final = "Offline preview · no AI was called"
_NO_LETTERS: Final = "Your prompt is written in letters that this preview cannot draw."

_EDITING: Final = ("Looking at the sheet...", "Mixing the colours...", "Painting...", "Adding the last touches...")
_GENERATING: Final = ("Sketching...", "Laying out the shapes...", "Painting...", "Adding the last touches...")


class LocalEditor(OfflineStage):
    """`domain.ports.providers.ImageEditor` without an AI. It is deterministic."""

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self.make(partial(_edited, sheet, prompt, options), _EDITING, report)

    async def generate(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self.make(partial(_generated, sheet, prompt, options), _GENERATING, report)


def _edited(sheet: Picture, prompt: str, options: Options) -> Picture:
    """The sheet in colours derived from the prompt, on a panel with a caption."""
    size = SIZES[options.aspect_ratio]
    palette = Palette(Chance(prompt))
    panel = inset((0, 0, *size), 60)
    left, top, right, bottom = inset(panel, 48)
    if size[0] > size[1]:
        art, caption = (left, top, left + 800, bottom), (left + 848, top, right, bottom)
    else:
        art, caption = (left, top, right, bottom - 244), (left, bottom - 196, right, bottom)

    page = Image.new("RGBA", size) if options.background == "transparent" else _backdrop(size, palette)
    shape = rounded(size, panel, 40)
    tint(page, palette.ink, shadow(shape, softness=30, opacity=0.5, down=16))
    tint(page, palette.paper, shape)
    picture = _graded(_fitted(sheet, art), palette)
    page.paste(picture, _centred(picture, art))
    _caption(page, prompt, caption, palette.accent, palette.deep, palette.ink)
    return encode(page, fine=True)


def _generated(sheet: Picture, prompt: str, options: Options) -> Picture:
    """A poster of shapes derived from the prompt, with the sheet on it as a card."""
    size = SIZES[options.aspect_ratio]
    chance = Chance(prompt)
    palette = Palette(chance)
    wide = size[0] > size[1]
    page = _backdrop(size, palette)
    for colour in (palette.accent, palette.deep, palette.glow, palette.soft):
        centre = chance.between(0, size[0]), chance.between(0, size[1])
        disc(page, colour, centre, chance.between(0.12, 0.42) * min(size), chance.between(0.45, 0.9))
    # Darken the background of the text.
    gradient = Image.linear_gradient("L")
    tint(page, palette.ink, faded((gradient.rotate(90) if wide else gradient).resize(size), 0.85))

    art = (80, 80, 840, size[1] - 80) if wide else (120, 110, size[0] - 120, round(size[1] * 0.66))
    card = _card(_fitted(sheet, inset(art, 60)), chance.between(2, 6) * (1 if chance.between(-1, 1) > 0 else -1))
    place = _centred(card, art)
    shape = Image.new("L", size)
    shape.paste(card.getchannel("A"), place)
    tint(page, palette.ink, shadow(shape, softness=36, opacity=0.7, down=22))
    page.paste(card, place, card)
    left, top, right, bottom = inset((0, 0, *size), 84)
    caption = (900, top, right, bottom) if wide else (left, size[1] * 0.74, right, bottom)
    _caption(page, prompt, caption, palette.accent, palette.glow, palette.paper)
    if options.background == "transparent":
        page.putalpha(rounded(size, inset((0, 0, *size), 36), 56))
    return encode(page, fine=True)


def _backdrop(size: tuple[int, int], palette: Palette) -> Image.Image:
    p = palette
    return mesh(size, [p.soft, p.middle, p.deep, p.glow, p.soft, p.middle, p.accent, p.glow, p.soft])


def _fitted(sheet: Picture, box: Box) -> Image.Image:
    """The content of the sheet without its white margin, scaled to fit the box."""
    room = round(box[2] - box[0]), round(box[3] - box[1])
    image = decoded(opened(sheet.data), near=(room[0], room[1]))
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image if image.mode == "RGBA" else None)
    # On a small copy, which is faster.
    scale = max(1, max(page.size) // 400)
    inked = ImageOps.invert(page.reduce(scale).convert("L")).point(lambda value: 255 * (value > 8)).getbbox()
    if inked:
        left, top, right, bottom = (side * scale for side in inked)
        page = page.crop((left, top, min(right, page.width), min(bottom, page.height)))
    return ImageOps.contain(page, room, Image.Resampling.BICUBIC)


def _graded(image: Image.Image, palette: Palette) -> Image.Image:
    """The image toned in the palette's colours, blended with its own colours; white becomes the palette's paper."""
    black, mid, white = palette.ink, palette.middle, palette.paper
    toned = ImageOps.colorize(image.convert("L"), black=black, mid=mid, white=white, midpoint=118)
    return Image.blend(toned, ImageChops.multiply(image, Image.new("RGB", image.size, white)), 0.38)


def _card(image: Image.Image, degrees: float) -> Image.Image:
    """The image with a white border, rotated."""
    card = ImageOps.expand(image, 26, "white").convert("RGBA")
    return ImageOps.expand(card, 2, (0, 0, 0, 0)).rotate(degrees, Image.Resampling.BILINEAR, expand=True)


def _caption(page: Image.Image, prompt: str, box: Box, dot: Colour, label: Colour, text: Colour) -> None:
    """Write the prompt at the bottom of the box, and `LABEL` above it."""
    left, top, right, bottom = box
    words = letters(prompt) or _NO_LETTERS
    top = write(page, words, (left, top + 54, right, bottom), text, (64, 54, 46, 38, 32, 27)) - 22
    write(page, LABEL, (left + 32, top - 32, right, top), label, (24,))
    disc(page, dot, (left + 9, top - 17), 9)


def _centred(image: Image.Image, box: Box) -> tuple[int, int]:
    """The upper left corner of the image, centred in the box."""
    return round((box[0] + box[2] - image.width) / 2), round((box[1] + box[3] - image.height) / 2)
