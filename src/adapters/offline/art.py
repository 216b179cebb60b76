"""Drawing for the offline pictures: pseudo-random numbers, palettes, gradients, shapes and shadows."""

import hashlib
import math
from collections.abc import Callable, Iterator

from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


class Chance:
    """Pseudo-random numbers, seeded by a text."""

    def __init__(self, text: str) -> None:
        self._bytes: Iterator[int] = iter(hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(1024))

    def between(self, low: float, high: float) -> float:
        """The next number in this range, out of 65,536 possible ones."""
        return low + (high - low) * (next(self._bytes) * 256 + next(self._bytes)) / 65_535


class Palette:
    """Matching colours around a random hue."""

    def __init__(self, chance: Chance) -> None:
        hue = chance.between(0, 360)
        #: A neighbouring hue, or one from the other side of the colour wheel.
        other = hue + (45, -45, 150, 180)[int(chance.between(0, 3.99))]
        self.ink = oklch(0.24, 0.055, hue)
        self.deep = oklch(0.38, 0.10, hue)
        self.middle = oklch(0.62, 0.135, hue)
        self.soft = oklch(0.80, 0.085, hue)
        self.accent = oklch(0.70, 0.16, other)
        self.glow = oklch(0.86, 0.09, other)
        self.paper = oklch(0.975, 0.012, other)


def oklch(lightness: float, chroma: float, hue: float) -> Colour:
    """The sRGB colour of OKLCH coordinates: lightness 0 to 1, chroma, hue in degrees."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        _gamma(4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short),
        _gamma(-1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short),
        _gamma(-0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short),
    )


def _gamma(linear: float) -> int:
    linear = min(1.0, max(0.0, linear))
    return round(255 * (12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055))


def mesh(size: tuple[int, int], colours: list[Colour]) -> Image.Image:
    """A gradient between the colours of a 3 by 3 grid, given row by row."""
    image = Image.new("RGB", (3, 3))
    for index, colour in enumerate(colours):
        image.putpixel((index % 3, index // 3), colour)
    # It is so smooth that half the resolution is enough.
    return image.resize((size[0] // 2, size[1] // 2), Image.Resampling.BICUBIC).resize(size, Image.Resampling.NEAREST)


def mask(size: tuple[int, int], draw: Callable[[ImageDraw.ImageDraw, int], None]) -> Image.Image:
    """An antialiased mask. `draw` draws in 255, at the scale of its second argument."""
    image = Image.new("L", (size[0] * 2, size[1] * 2))
    draw(ImageDraw.Draw(image), 2)
    return image.reduce(2)


def rounded(size: tuple[int, int], box: Box, radius: float) -> Image.Image:
    """The mask of a rectangle with rounded corners."""
    return mask(size, lambda draw, k: draw.rounded_rectangle([side * k for side in box], radius * k, fill=255))


def oval(size: tuple[int, int], box: Box) -> Image.Image:
    """The mask of an ellipse."""
    return mask(size, lambda draw, k: draw.ellipse([side * k for side in box], fill=255))


def tint(page: Image.Image, colour: Colour, shape: Image.Image, at: tuple[int, int] = (0, 0)) -> None:
    """Paint the shape on the page, with its upper left corner at `at`."""
    # Pillow pastes an image three times as fast as a colour.
    page.paste(Image.new(page.mode, shape.size, colour), at, shape)


def disc(page: Image.Image, colour: Colour, centre: tuple[float, float], radius: float, opacity: float = 1) -> None:
    """Paint a disc with this opacity (0 to 1)."""
    left, top, side = math.floor(centre[0] - radius), math.floor(centre[1] - radius), math.ceil(2 * radius) + 2
    x, y = centre[0] - left, centre[1] - top
    shape = oval((side, side), (x - radius, y - radius, x + radius, y + radius))
    tint(page, colour, faded(shape, opacity), (left, top))


def inset(box: Box, by: float) -> Box:
    """The box, smaller by `by` on each side."""
    return box[0] + by, box[1] + by, box[2] - by, box[3] - by


def faded(image: Image.Image, opacity: float) -> Image.Image:
    """The mask times this factor."""
    return image if opacity == 1 else image.point(lambda value: value * opacity)


def shadow(shape: Image.Image, softness: float, opacity: float, down: int) -> Image.Image:
    """The mask of a shape's drop shadow, `down` pixels below it."""
    small = faded(shape.reduce(4).filter(ImageFilter.GaussianBlur(softness / 4)), opacity)
    return ImageChops.offset(small.resize(shape.size, Image.Resampling.BICUBIC), 0, down)
