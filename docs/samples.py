"""Draws the sample pictures of the page and the demo: ``python docs/samples.py``.

They are ours: nothing but shapes, gradients and shadows, the same on each run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from adapters.offline.art import Box, Chance, Colour, around, faded, mask, mesh, oklch

FOLDER: Final = Path(__file__).resolve().parent.parent / "src" / "api" / "web" / "static" / "samples"

#: Everything is drawn this much larger, and made smaller in the end: no edge shows its steps.
_SCALE: Final = 2

Point = tuple[float, float]
Shape = Image.Image


class Oval(NamedTuple):
    """One of many in a shape, and how strong it is."""

    box: Box
    strength: float = 1


class Canvas:
    """A picture being painted. Lengths are in pixels of the finished picture."""

    def __init__(self, size: tuple[int, int], paint: Colour | Image.Image) -> None:
        self.size = size
        self.image = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE))
        self.fill(Image.new("L", self.image.size, 255), paint)

    def polygon(self, points: Sequence[Point]) -> Shape:
        """What straight lines between the points enclose."""
        box = self._around(points)
        inner = [(x * _SCALE - box[0], y * _SCALE - box[1]) for x, y in points]
        return self._placed(box, lambda draw, k: draw.polygon([(x * k, y * k) for x, y in inner], fill=255))

    def outline(self, points: Sequence[Point]) -> Shape:
        """What a smooth line through the points encloses. A point given twice is a corner."""
        return self.polygon(_smooth(points, closed=True))

    def ovals(self, ovals: Sequence[Oval]) -> Shape:
        """All of them as one shape."""
        box = self._around([corner for oval in ovals for corner in (oval.box[:2], oval.box[2:])])
        left, top = box[:2]

        def draw(draw: ImageDraw.ImageDraw, k: int) -> None:
            for (x, y, u, v), strength in ovals:
                corners = (x * _SCALE - left, y * _SCALE - top, u * _SCALE - left, v * _SCALE - top)
                draw.ellipse([side * k for side in corners], fill=round(255 * strength))

        return self._placed(box, draw)

    def oval(self, left: float, top: float, right: float, bottom: float) -> Shape:
        """The oval in that box."""
        return self.ovals([Oval((left, top, right, bottom))])

    def circle(self, centre: Point, radius: float) -> Shape:
        """The circle around that point."""
        return self.ovals([Oval(around(centre, radius))])

    def stroke(self, points: Sequence[Point], width: float, taper: float = 0.6) -> Shape:
        """A smooth line through the points, thinner towards its ends."""
        return self.ovals(dots(points, width, taper=taper))

    def soft(self, shape: Shape, softness: float, move: Point = (0, 0)) -> Shape:
        """The shape without an edge, and moved."""
        small = shape.reduce(4).filter(ImageFilter.GaussianBlur(softness * _SCALE / 4))
        moved = Image.new("L", small.size)
        moved.paste(small, (round(move[0] * _SCALE / 4), round(move[1] * _SCALE / 4)))
        return moved.resize(shape.size, Image.Resampling.BICUBIC)

    def fill(self, shape: Shape, paint: Colour | Image.Image, share: float = 1) -> None:
        """Paint the shape, so strongly; a gradient spans what the shape takes."""
        box = shape.getbbox()
        if box is None:
            return
        part = shape.crop(box) if share == 1 else faded(shape.crop(box), share)
        if isinstance(paint, Image.Image):
            paint = paint.resize(part.size, Image.Resampling.BICUBIC)
        self.image.paste(paint, box, part)

    def within(self, shape: Shape, inner: Shape, paint: Colour | Image.Image, share: float = 1) -> None:
        """Fill what both shapes cover."""
        self.fill(ImageChops.multiply(shape, inner), paint, share)

    def side(self, shape: Shape, towards: Point, softness: float, paint: Colour, share: float) -> None:
        """Light or shade on one side of the shape."""
        rest = ImageChops.invert(self.soft(shape, softness, (-towards[0], -towards[1])))
        self.within(shape, rest, paint, share)

    def finished(self) -> Image.Image:
        """The picture in its own size."""
        return self.image.reduce(_SCALE)

    def _around(self, points: Sequence[Point]) -> tuple[int, int, int, int]:
        """What of the image the points lie in, and a little more."""
        xs, ys = [x * _SCALE for x, _ in points], [y * _SCALE for _, y in points]
        left, top = max(0, math.floor(min(xs)) - 2), max(0, math.floor(min(ys)) - 2)
        right, bottom = min(self.image.width, math.ceil(max(xs)) + 2), min(self.image.height, math.ceil(max(ys)) + 2)
        return left, top, max(left + 1, right), max(top + 1, bottom)

    def _placed(self, box: tuple[int, int, int, int], draw: Callable[[ImageDraw.ImageDraw, int], None]) -> Shape:
        shape = Image.new("L", self.image.size)
        shape.paste(mask((box[2] - box[0], box[3] - box[1]), draw), box[:2])
        return shape


def dots(
    points: Sequence[Point], width: float, *, gap: float = 0, taper: float = 0.6, strength: float = 1
) -> list[Oval]:
    """What `Canvas.stroke` is made of; with a gap, a dotted line."""
    line = _evenly(_smooth(points, closed=False) if len(points) > 2 else points, gap or width / 6)
    rise = [max(0.1, math.sin(math.pi * place / max(1, len(line) - 1))) ** taper for place in range(len(line))]
    return [Oval(around(point, width / 2 * thick), strength) for point, thick in zip(line, rise, strict=True)]


def _smooth(points: Sequence[Point], *, closed: bool, steps: int = 12) -> list[Point]:
    """A Catmull-Rom spline through the points."""
    whole = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
    line = []
    for a, b, c, d in zip(whole, whole[1:], whole[2:], whole[3:], strict=False):
        for step in range(steps if b != c else 0):
            t = step / steps
            line.append((_between(a[0], b[0], c[0], d[0], t), _between(a[1], b[1], c[1], d[1], t)))
    return line if closed else [*line, points[-1]]


def _evenly(line: Sequence[Point], gap: float) -> list[Point]:
    """Points along the line, that far from each other."""
    points, left = [line[0]], gap
    for (x, y), (u, v) in pairwise(line):
        length, done = math.hypot(u - x, v - y), 0.0
        while length - done >= left:
            done += left
            left = gap
            points.append((x + (u - x) * done / length, y + (v - y) * done / length))
        left -= length - done
    return points


def _between(a: float, b: float, c: float, d: float, t: float) -> float:
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t * t + (3 * b - a - 3 * c + d) * t**3)


def rows(*colours: Colour) -> Image.Image:
    """A gradient from top to bottom."""
    image = Image.new("RGB", (1, len(colours)))
    for place, colour in enumerate(colours):
        image.putpixel((0, place), colour)
    return image.resize((2, len(colours) * 16), Image.Resampling.BICUBIC)


# --- a lake ----------------------------------------------------------------------------------------------


_LAKE: Final = (900, 600)
_SHORE: Final = 396
_SUN: Final = (572.0, 268.0)


def lake() -> Image.Image:
    """Mountains at dusk, and a lake that shows them again."""
    width, _ = _LAKE
    canvas = Canvas(_LAKE, mesh((90, 60), [
        oklch(0.40, 0.09, 285), oklch(0.42, 0.09, 278), oklch(0.36, 0.08, 268),
        oklch(0.70, 0.12, 10), oklch(0.74, 0.12, 40), oklch(0.56, 0.11, 335),
        oklch(0.90, 0.10, 70), oklch(0.93, 0.10, 85), oklch(0.80, 0.11, 45),
    ]))  # fmt: skip
    for radius, share in ((300, 0.35), (170, 0.4), (90, 0.5)):
        canvas.fill(canvas.soft(canvas.circle(_SUN, radius * 0.6), radius * 0.3), oklch(0.95, 0.09, 85), share)
    canvas.fill(canvas.circle(_SUN, 37), oklch(0.985, 0.04, 95))
    canvas.fill(_clouds(canvas), oklch(0.92, 0.07, 50), 0.62)

    _range(canvas)
    hills = (352, 70, (0.56, 0.09, 345)), (374, 62, (0.45, 0.085, 318)), (397, 48, (0.33, 0.07, 292))
    for base, high, (light, strong, hue) in hills:
        chance = Chance(f"hills {base}")
        tops = [(x, base - chance.between(0.1, 1) * high) for x in range(-50, width + 100, 100)]
        line = _smooth(tops, closed=False, steps=5)
        colour, haze = oklch(light, strong, hue), oklch(light + 0.14, strong, hue + 30)
        canvas.fill(canvas.polygon(_craggy(f"hill {base}", line, 0.07)), rows(*[colour] * 6, *[haze] * 3))
        mist = canvas.oval(-200, base - 12, width + 200, base + 50)
        canvas.fill(canvas.soft(mist, 14), oklch(0.88, 0.07, 55), 0.3)
    _water(canvas)
    _pines(canvas)
    return canvas.finished()


def _range(canvas: Canvas) -> None:
    """The far mountains, lit by the sun on one side."""
    line = [
        (-40, 318), (20, 270), (58, 252), (92, 268), (128, 236), (158, 206), (176, 196), (206, 158), (226, 176),
        (244, 188), (262, 214), (284, 204), (304, 226), (330, 250), (352, 262), (384, 292), (430, 314), (520, 330),
        (640, 324), (690, 306), (726, 296), (760, 268), (782, 250), (806, 264), (838, 282), (872, 270), (940, 300),
    ]  # fmt: skip
    mountains = canvas.polygon(_craggy("peaks", line, 0.17))
    light = oklch(0.70, 0.085, 10), oklch(0.74, 0.09, 25), oklch(0.82, 0.09, 48)
    canvas.fill(mountains, rows(*[light[0]] * 3, *light, light[-1]))
    summits = ("a", (206, 150), 150), ("b", (58, 244), 40), ("c", (284, 196), 268), ("d", (782, 242), 742)
    for name, (x, y), foot in summits:
        # The line from a summit to the valley parts light and shade.
        ridge = _craggy(name, [(x, y), (x + 14, y + 34), (x - 4, y + 60), (x + 12, y + 92), (x - 8, y + 190)], 0.2)[:-2]
        shade = canvas.polygon([*ridge, (foot - 90, y + 190), (foot - 90, y + 90), (x - 2, y)])
        canvas.within(mountains, ImageChops.multiply(shade, canvas.soft(shade, 1)), oklch(0.50, 0.09, 320), 0.55)
    haze = canvas.oval(-200, 276, canvas.size[0] + 200, 420)
    canvas.within(mountains, canvas.soft(haze, 26), oklch(0.84, 0.09, 45), 0.75)


def _craggy(name: str, line: Sequence[Point], rough: float) -> list[Point]:
    """The line from left to right with peaks upon its peaks, and the land below it."""
    chance = Chance(name)
    for _ in range(4):
        finer = []
        for (x, y), (u, v) in pairwise(line):
            reach = rough * math.hypot(u - x, v - y)
            aside, up = chance.between(-reach, reach) / 3, chance.between(-reach, reach)
            finer += [(x, y), ((x + u) / 2 + aside, (y + v) / 2 + up)]
        line = [*finer, line[-1]]
        if len(line) > 120:
            break
    return [*line, (line[-1][0], _SHORE + 9), (line[0][0], _SHORE + 9)]


def _clouds(canvas: Canvas) -> Shape:
    """Long thin clouds, each of several, lit from below."""
    chance = Chance("clouds at dusk")
    clouds = []
    for _ in range(8):
        x, y, long = chance.between(-40, canvas.size[0]), chance.between(46, 226), chance.between(60, 150)
        for part in range(5):
            left, wide = x + chance.between(-0.9, 0.9) * long, long * chance.between(0.25, 0.8)
            high = wide / chance.between(22, 34)
            box = (left - wide, y + part * 2.4 - high, left + wide, y + part * 2.4 + high)
            clouds.append(Oval(box, chance.between(0.24, 0.75)))
    return canvas.soft(canvas.ovals(clouds), 2.6)


def _water(canvas: Canvas) -> None:
    (width, height), top = canvas.size, _SHORE * _SCALE
    above = canvas.image.crop((0, 2 * top - canvas.image.height, canvas.image.width, top))
    canvas.image.paste(ImageOps.flip(above).filter(ImageFilter.BoxBlur((10, 14))), (0, top))
    water = Image.new("L", canvas.image.size)
    water.paste(255, (0, top, *canvas.image.size))
    dark = [oklch(0.55, 0.09, 310)] * 5 + [oklch(0.40, 0.09, 285), oklch(0.26, 0.07, 278), oklch(0.20, 0.06, 275)]
    canvas.fill(water, rows(*dark), 0.5)
    chance = Chance("ripples")
    sun, gold, rose = _SUN[0], [], []
    for number in range(100):
        near = chance.between(0, 1) ** 1.5
        y, high = _SHORE + 5 + near * (height - _SHORE), 0.6 + 1.3 * near
        if number % 3 == 0:
            x, long = chance.between(0, width), (18 + 90 * near) * chance.between(0.4, 1)
            rose.append(Oval((x - long, y - high, x + long, y + high), chance.between(0.24, 0.66)))
        else:
            # The path that the sun lays on the water.
            x, long = sun + chance.between(-1, 1) * (20 + 60 * near), (10 + 42 * near) * chance.between(0.3, 1)
            gold.append(Oval((x - long, y - high, x + long, y + high), chance.between(0.55, 1)))
    wide, end = 95, height + 40
    glow = canvas.outline([(sun - 20, _SHORE), (sun + 20, _SHORE), (sun + wide, end), (sun - wide, end)])
    canvas.within(water, canvas.soft(glow, 26), oklch(0.90, 0.10, 70), 0.42)
    canvas.fill(canvas.soft(canvas.ovals(rose), 1), oklch(0.78, 0.09, 350), 0.45)
    canvas.fill(canvas.soft(canvas.ovals(gold), 0.8), oklch(0.96, 0.07, 85), 0.9)
    canvas.fill(canvas.soft(canvas.oval(-60, _SHORE - 2, width + 60, _SHORE + 2), 1.6), oklch(0.95, 0.07, 70), 0.55)


def _pines(canvas: Canvas) -> None:
    """Two dark banks with firs, which frame the view."""
    chance = Chance("firs on the banks")
    ink = rows(oklch(0.24, 0.05, 290), oklch(0.19, 0.045, 280), oklch(0.15, 0.04, 275))
    left = [(-60, 500), (40, 520), (120, 548), (190, 580), (250, 612), (250, 660), (-60, 660)]
    right = [(980, 470), (890, 500), (820, 536), (745, 566), (680, 604), (650, 660), (980, 660)]
    for bank in (left, right):
        canvas.fill(canvas.outline([*bank, bank[-1]]), ink)
    for x, foot, high in (
        (16, 545, 330), (62, 552, 262), (108, 566, 186), (150, 582, 128), (190, 592, 84),
        (884, 530, 352), (840, 548, 250), (796, 566, 172), (752, 582, 116), (712, 598, 70),
    ):  # fmt: skip
        canvas.fill(canvas.polygon(_fir(chance, x, foot, high)), ink)


def _fir(chance: Chance, x: float, foot: float, high: float) -> list[Point]:
    right, left = [], []
    tiers = 9 + round(high / 40)
    for tier in range(tiers):
        down = (tier + 1) / tiers
        wide, y = high * 0.19 * down**0.9, foot - high * (1 - down)
        reach = chance.between(0.8, 1.15)
        right += [(x + wide * reach, y + high * 0.012), (x + wide * 0.42, y - high * 0.012)]
        reach = chance.between(0.8, 1.15)
        left += [(x - wide * reach, y + high * 0.012), (x - wide * 0.42, y - high * 0.012)]
    return [(x, foot - high), *right, (x, foot + 20), *left[::-1]]


# --- a hat -----------------------------------------------------------------------------------------------


def hat() -> Image.Image:
    """A felt hat with a ribbon, on a table."""
    wall, table = oklch(0.86, 0.045, 195), oklch(0.90, 0.03, 85)
    canvas = Canvas((700, 700), mesh((70, 70), [
        oklch(0.90, 0.04, 190), oklch(0.84, 0.05, 195), oklch(0.74, 0.06, 200),
        wall, oklch(0.80, 0.05, 198), oklch(0.70, 0.06, 202),
        wall, wall, oklch(0.74, 0.055, 200),
    ]))  # fmt: skip
    canvas.fill(canvas.circle((330, 300), 236), oklch(0.92, 0.035, 185), 0.5)
    board = canvas.polygon([(0, 508), (700, 508), (700, 700), (0, 700)])
    canvas.fill(board, rows(*[table] * 8, table, oklch(0.88, 0.035, 80), oklch(0.80, 0.045, 70)))
    canvas.fill(canvas.soft(canvas.oval(60, 500, 700, 620), 26), oklch(0.38, 0.05, 60), 0.5)
    canvas.fill(canvas.soft(canvas.oval(90, 520, 630, 582), 9), oklch(0.28, 0.05, 50), 0.55)

    felt, dark, light = oklch(0.56, 0.145, 42), oklch(0.36, 0.11, 36), oklch(0.72, 0.13, 52)
    # The brim: its far edge, the crown that stands in it, its near edge.
    brim = canvas.outline([
        (42, 470), (62, 448), (130, 452), (220, 462), (350, 466), (480, 462), (570, 452), (638, 446), (658, 468),
        (634, 512), (560, 552), (460, 578), (350, 586), (240, 578), (140, 552), (66, 512),
    ])  # fmt: skip
    canvas.fill(brim, rows(*[dark] * 9, felt, felt, felt, oklch(0.48, 0.13, 40)))
    canvas.side(brim, (-60, -34), 16, light, 0.55)
    canvas.side(brim, (50, 30), 18, dark, 0.6)

    crown = canvas.outline([
        (176, 500), (176, 500), (182, 422), (196, 345), (216, 276), (246, 230), (292, 214), (330, 224), (360, 231),
        (392, 221), (432, 209), (470, 223), (494, 271), (508, 345), (520, 422), (526, 500), (526, 500), (440, 528),
        (350, 536), (262, 528),
    ])  # fmt: skip
    canvas.within(brim, canvas.soft(crown, 16, (10, 10)), oklch(0.24, 0.08, 35), 0.5)
    canvas.fill(crown, mesh((9, 9), [light, felt, felt, oklch(0.66, 0.145, 47), felt, dark, felt, felt, dark]))
    canvas.side(crown, (80, 10), 34, oklch(0.30, 0.10, 34), 0.75)
    canvas.side(crown, (-46, -16), 26, oklch(0.78, 0.12, 55), 0.6)
    # Two dents, where fingers take it.
    for points, share in (
        ([(330, 223), (318, 261), (326, 307), (352, 338), (380, 307), (384, 261), (372, 226), (350, 231)], 0.75),
        ([(236, 264), (228, 310), (240, 357), (262, 329), (268, 286), (256, 259)], 0.34),
        ([(470, 261), (456, 305), (466, 353), (488, 338), (494, 298), (486, 266)], 0.42),
    ):
        canvas.within(crown, canvas.soft(canvas.outline(points), 11), oklch(0.33, 0.105, 36), share)
    canvas.within(crown, canvas.soft(canvas.stroke([(300, 224), (296, 267), (312, 319)], 14), 6), light, 0.6)

    band = canvas.outline([
        (180, 436), (180, 436), (262, 466), (350, 474), (440, 466), (521, 436), (521, 436), (526, 500), (526, 500),
        (440, 528), (350, 536), (262, 528), (176, 500), (176, 500),
    ])  # fmt: skip
    canvas.fill(band, mesh((9, 9), [oklch(0.40, 0.06, 200), oklch(0.34, 0.06, 205), oklch(0.2, 0.04, 215)] * 3))
    canvas.side(band, (0, -7), 3, oklch(0.62, 0.06, 195), 0.55)
    canvas.side(band, (-30, 0), 16, oklch(0.56, 0.06, 195), 0.4)
    for lower in (15, 49):
        stitch = [(x, y + lower) for x, y in ((179, 436), (262, 466), (350, 474), (440, 466), (524, 436))]
        canvas.within(band, canvas.ovals(dots(stitch, 1.8, gap=4.6, taper=0)), oklch(0.85, 0.05, 85), 0.5)
    _feather(canvas)
    edge = [(46, 484), (110, 538), (240, 574), (350, 582), (460, 574), (590, 538), (654, 482)]
    canvas.within(brim, canvas.ovals(dots(edge, 4, gap=6.4)), light, 0.7)
    return canvas.finished()


def _feather(canvas: Canvas) -> None:
    """Tucked in the ribbon."""
    spine = [(462, 494), (476, 430), (504, 350), (548, 268)]
    blade = canvas.outline([
        (470, 452), (462, 402), (474, 338), (504, 288), (552, 252), (552, 252), (566, 310), (550, 368), (520, 416),
        (484, 454),
    ])  # fmt: skip
    canvas.fill(canvas.soft(blade, 6, (-10, 8)), oklch(0.25, 0.08, 35), 0.4)
    pale, dark = oklch(0.98, 0.02, 90), oklch(0.39, 0.065, 205)
    canvas.fill(blade, rows(pale, oklch(0.88, 0.06, 85), oklch(0.70, 0.10, 190), oklch(0.50, 0.08, 200)))
    canvas.side(blade, (18, 12), 8, dark, 0.45)
    for place in range(9):
        t = place / 9
        x, y = 474 + 66 * t**1.2, 432 - 150 * t
        canvas.within(blade, canvas.stroke([(x, y), (x + 30, y - 26), (x + 52, y - 58)], 1.6), dark, 0.4)
        canvas.within(blade, canvas.stroke([(x, y), (x - 16, y - 30), (x - 14, y - 58)], 1.6), pale, 0.5)
    canvas.fill(canvas.stroke(spine, 4.5), pale)


# --- people ----------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """The colours of a face, and how thick its brows are."""

    skin: Colour
    shade: Colour
    light: Colour
    blush: Colour
    lips: Colour
    iris: Colour
    brow: Colour
    brows: float


def _mirrored(points: Sequence[Point]) -> list[Point]:
    """An outline of which the right half is given, from top to bottom."""
    return [*points, *((600 - x, y) for x, y in reversed(points) if x != 300)]


def _neck(canvas: Canvas, look: Look, width: float, chin: float) -> None:
    edge = 300 + width
    half = [(300, 440), (edge, 460), (edge + 2, 560), (edge + 26, 612), (430, 650), (430, 720), (300, 730)]
    neck = canvas.outline(_mirrored(half))
    canvas.fill(neck, look.skin)
    canvas.side(neck, (50, 0), 18, look.shade, 0.7)
    under = canvas.outline(_mirrored([(300, 440), (390, 440), (380, chin), (300, chin + 46)]))
    canvas.within(neck, canvas.soft(under, 9, (6, 0)), _darker(look.shade), 0.75)


def _darker(colour: Colour) -> Colour:
    red, green, blue = colour
    return round(red * 0.78), round(green * 0.68), round(blue * 0.66)


def _face(canvas: Canvas, look: Look, *, ears: bool) -> Shape:
    if ears:
        for side in (-1, 1):
            ear = (110, 338), (130, 320), (144, 340), (138, 380), (122, 408), (108, 398)
            shape = canvas.outline([(300 + x * side, y) for x, y in ear])
            canvas.fill(shape, look.skin)
            canvas.side(shape, (6 * side, 4), 4, look.light, 0.4)
            canvas.within(shape, canvas.soft(canvas.circle((300 + 120 * side, 362), 14), 5), look.shade, 0.8)
    face = canvas.outline(_mirrored([
        (300, 176), (352, 184), (396, 216), (414, 272), (416, 330), (408, 392), (386, 452), (344, 502), (300, 518),
    ]))  # fmt: skip
    skin, shade, light = look.skin, look.shade, look.light
    canvas.fill(face, mesh((9, 9), [light, light, skin, light, light, skin, light, skin, skin]))
    canvas.side(face, (60, 0), 30, shade, 0.8)
    canvas.side(face, (10, 10), 12, shade, 0.45)
    for x in (222, 376):
        canvas.within(face, canvas.soft(canvas.circle((x, 406), 34), 16), look.blush, 0.5)
    for x in (238, 362):
        canvas.within(face, canvas.soft(canvas.oval(x - 52, 292, x + 52, 356), 12), shade, 0.36)
    canvas.within(face, canvas.soft(canvas.oval(282, 490, 316, 508), 7), light, 0.6)
    return face


def _features(canvas: Canvas, look: Look) -> None:
    for side in (-1, 1):
        _eye(canvas, look, side)
    shade = look.shade
    # The nose is made of its shade and its light.
    nose = canvas.outline([(307, 336), (323, 380), (331, 408), (314, 423), (305, 410)])
    canvas.fill(canvas.soft(nose, 7), shade, 0.85)
    canvas.fill(canvas.soft(canvas.stroke([(297, 316), (295, 370), (296, 404)], 12), 5), look.light, 0.9)
    nostrils = [(275, 408), (278, 418), (290, 418), (301, 424), (312, 418), (323, 418), (326, 407)]
    canvas.fill(canvas.stroke(nostrils, 4), _darker(shade), 0.8)
    canvas.fill(canvas.soft(canvas.oval(274, 422, 330, 438), 4), shade, 0.5)
    upper = canvas.outline([
        (248, 455), (248, 455), (272, 450), (290, 446), (300, 449), (310, 446), (328, 450), (352, 454), (352, 454),
        (326, 463), (300, 467), (274, 464),
    ])  # fmt: skip
    lower = canvas.outline([
        (256, 459), (256, 459), (278, 464), (300, 467), (324, 463), (345, 458), (345, 458), (328, 478), (300, 485),
        (273, 479),
    ])  # fmt: skip
    canvas.fill(canvas.soft(canvas.oval(266, 486, 334, 498), 5), shade, 0.55)
    canvas.fill(lower, look.lips)
    canvas.side(lower, (14, 4), 6, _darker(look.lips), 0.5)
    canvas.fill(canvas.soft(canvas.oval(280, 470, 308, 477), 3), (255, 255, 255), 0.4)
    canvas.fill(upper, look.lips)
    canvas.fill(upper, _darker(look.lips), 0.55)
    smile = [(243, 452), (250, 456), (274, 464), (300, 467), (326, 463), (350, 455), (357, 451)]
    canvas.fill(canvas.stroke(smile, 3.2), _darker(_darker(look.lips)), 0.9)


def _eye(canvas: Canvas, look: Look, side: int) -> None:
    def at(*points: Point) -> list[Point]:
        return [(300 + (62 + x) * side, 344 + y) for x, y in points]

    ink = oklch(0.22, 0.03, 40)
    lid = at((-34, 7), (-20, -9), (2, -16), (24, -10), (38, 3))
    under = at((24, 13), (0, 17), (-20, 14))
    eye = canvas.outline([lid[0], *lid, lid[-1], *under])
    canvas.fill(eye, oklch(0.97, 0.008, 80))
    centre = at((0, 0))[0]
    canvas.within(eye, canvas.circle(centre, 16.5), _darker(look.iris))
    canvas.within(eye, canvas.soft(canvas.circle((centre[0], centre[1] + 4), 11), 3), look.iris)
    canvas.within(eye, canvas.circle(centre, 7.5), oklch(0.15, 0.02, 40))
    canvas.within(eye, canvas.soft(canvas.stroke(lid, 16), 3, (0, 3)), ink, 0.45)
    canvas.fill(canvas.circle((centre[0] - 6, centre[1] - 6), 4.2), (255, 255, 255), 0.95)
    canvas.fill(canvas.circle((centre[0] + 5, centre[1] + 6), 2), (255, 255, 255), 0.5)
    canvas.fill(canvas.stroke(lid, 6.5, taper=0.4), ink)
    canvas.fill(canvas.stroke([lid[0], *under[::-1], lid[-1]], 2), look.shade, 0.9)
    canvas.fill(canvas.stroke([(x, y - 12) for x, y in lid], 3), _darker(look.shade), 0.55)
    brow = at((-36, -38), (-12, -50), (16, -53), (47, -41))
    canvas.fill(canvas.stroke(brow, look.brows, taper=0.5), look.brow)


def portrait() -> Image.Image:
    """A woman in a knitted pullover."""
    canvas = Canvas((600, 800), mesh((60, 80), [
        oklch(0.93, 0.05, 75), oklch(0.90, 0.07, 65), oklch(0.84, 0.09, 50),
        oklch(0.88, 0.08, 60), oklch(0.82, 0.11, 48), oklch(0.76, 0.12, 38),
        oklch(0.80, 0.11, 40), oklch(0.74, 0.13, 34), oklch(0.66, 0.14, 28),
    ]))  # fmt: skip
    canvas.fill(canvas.circle((318, 330), 262), oklch(0.95, 0.05, 85), 0.55)
    look = Look(
        skin=oklch(0.79, 0.075, 58), shade=oklch(0.62, 0.105, 42), light=oklch(0.87, 0.06, 68),
        blush=oklch(0.68, 0.14, 28), lips=oklch(0.60, 0.15, 22), iris=oklch(0.60, 0.09, 150),
        brow=oklch(0.28, 0.05, 45), brows=8.5,
    )  # fmt: skip
    dark, hair, gloss = oklch(0.21, 0.045, 32), oklch(0.31, 0.07, 38), oklch(0.56, 0.10, 52)
    back = canvas.outline(_mirrored([
        (300, 110), (380, 120), (448, 172), (478, 270), (486, 380), (492, 480), (480, 566), (420, 596), (300, 590),
    ]))  # fmt: skip
    canvas.fill(canvas.soft(back, 16, (16, 14)), oklch(0.45, 0.12, 30), 0.45)
    canvas.fill(back, dark)
    _neck(canvas, look, 60, chin=520)
    _pullover(canvas)
    face = _face(canvas, look, ears=False)
    _features(canvas, look)
    right = [
        (252, 148), (252, 148), (256, 186), (320, 232), (384, 262), (408, 318), (420, 420), (424, 510), (408, 588),
        (408, 588), (452, 606), (492, 580), (506, 480), (494, 360), (482, 256), (446, 164), (372, 112), (300, 102),
    ]  # fmt: skip
    left = [
        (254, 146), (254, 146), (250, 190), (212, 240), (192, 310), (180, 420), (176, 510), (192, 588), (192, 588),
        (148, 606), (108, 580), (94, 480), (108, 360), (120, 250), (156, 160), (222, 114), (290, 102),
    ]  # fmt: skip
    for lock, side in ((left, -1), (right, 1)):
        shape = canvas.outline(lock)
        canvas.within(face, canvas.soft(shape, 9, (5, 12)), _darker(look.shade), 0.6)
        canvas.fill(shape, rows(hair, hair, hair, dark))
        canvas.side(shape, (17, 0), 16, dark, 0.8)
        canvas.within(shape, canvas.soft(canvas.ovals(_strands(side)), 0.5), gloss, 0.75)
        shine = [(300 + x * side, y) for x, y in ((70, 190), (130, 240), (170, 262))]
        canvas.within(shape, canvas.soft(canvas.stroke(shine, 46), 14), gloss, 0.5 if side < 0 else 0.3)
    return canvas.finished()


def _strands(side: int) -> list[Oval]:
    chance = Chance(f"strands {side}")
    strands = []
    for _ in range(20):
        t = chance.between(0, 1)
        if side > 0:
            line = [
                (258 + 40 * t, 150 - 30 * t), (330 + 34 * t, 206 - 62 * t), (398 + 40 * t, 262 - 50 * t),
                (426 + 54 * t, 350), (432 + 62 * t, 470), (424 + 62 * t, 590),
            ]  # fmt: skip
        else:
            line = [
                (252 - 4 * t, 150 - 22 * t), (222 - 26 * t, 206 - 50 * t), (186 - 40 * t, 270 - 40 * t),
                (176 - 54 * t, 360), (168 - 60 * t, 470), (176 - 62 * t, 590),
            ]  # fmt: skip
        strands += dots(line, chance.between(1.6, 4.5), strength=chance.between(0.15, 0.7))
    return strands


def _pullover(canvas: Canvas) -> None:
    light, wool, dark = oklch(0.66, 0.08, 190), oklch(0.50, 0.085, 195), oklch(0.27, 0.06, 208)
    middle, cream = oklch(0.42, 0.08, 200), oklch(0.93, 0.03, 85)
    body = canvas.outline(_mirrored([
        (300, 668), (388, 622), (388, 622), (450, 640), (520, 672), (562, 728), (592, 840), (592, 840), (300, 860),
    ]))  # fmt: skip
    canvas.fill(body, mesh((9, 9), [wool, wool, middle] * 2 + [middle, middle, dark]))
    knit, pattern = [], []
    for row in range(24):
        for column in range(-40, 41):
            x, y = 300 + column * 8.0, 626 + row * 9 + (abs(column * 8) / 60) ** 2.2
            knit += dots([(x - 3.4, y - 4), (x, y + 2)], 2.4, gap=1.8, taper=0.2)
            knit += dots([(x + 3.4, y - 4), (x, y + 2)], 2.4, gap=1.8, taper=0.2)
            # A band of diamonds around the yoke.
            diamond = abs(row - 11) <= 3 and abs(column % 6 - 3) + abs(row - 11) in (1, 3)
            if diamond or (row in (6, 16) and column % 2):
                pattern.append(Oval((x - 3.6, y - 5, x + 3.6, y + 3.5)))
    canvas.within(body, canvas.ovals(pattern), cream, 0.92)
    canvas.within(body, canvas.ovals(knit), dark, 0.26)
    canvas.side(body, (44, 0), 30, dark, 0.6)
    collar = canvas.outline(_mirrored([
        (300, 606), (346, 598), (378, 576), (378, 576), (400, 618), (394, 650), (350, 676), (300, 682),
    ]))  # fmt: skip
    canvas.within(body, canvas.soft(collar, 9, (8, 12)), dark, 0.8)
    canvas.fill(collar, mesh((9, 9), [wool, wool, middle] * 3))
    ribs = [dot for rib in range(-9, 10) for dot in dots([(300 + rib * 9, 560), (300 + rib * 11, 690)], 3, taper=0)]
    canvas.within(collar, canvas.ovals(ribs), dark, 0.5)
    canvas.side(collar, (0, -9), 4, light, 0.45)
    canvas.side(collar, (38, 6), 16, dark, 0.75)


_BLACK: Final = oklch(0.19, 0.02, 40)
_CURL: Final = oklch(0.36, 0.035, 50)


def face() -> Image.Image:
    """A man with glasses and a beard, from near."""
    canvas = Canvas((600, 800), mesh((60, 80), [
        oklch(0.66, 0.08, 190), oklch(0.60, 0.09, 200), oklch(0.48, 0.09, 225),
        oklch(0.58, 0.09, 200), oklch(0.50, 0.09, 215), oklch(0.40, 0.09, 245),
        oklch(0.48, 0.09, 215), oklch(0.40, 0.09, 235), oklch(0.30, 0.08, 262),
    ]))  # fmt: skip
    canvas.fill(canvas.circle((292, 320), 250), oklch(0.80, 0.07, 185), 0.4)
    look = Look(
        skin=oklch(0.62, 0.085, 52), shade=oklch(0.44, 0.085, 38), light=oklch(0.71, 0.08, 62),
        blush=oklch(0.55, 0.12, 32), lips=oklch(0.54, 0.10, 25), iris=oklch(0.48, 0.07, 60),
        brow=oklch(0.20, 0.02, 40), brows=13,
    )  # fmt: skip
    _neck(canvas, look, 76, chin=556)
    shirt = canvas.outline(_mirrored([
        (300, 690), (392, 606), (392, 606), (470, 640), (560, 690), (600, 840), (600, 840), (300, 860),
    ]))  # fmt: skip
    canvas.fill(shirt, mesh((9, 9), [oklch(0.84, 0.11, 78), oklch(0.78, 0.13, 70), oklch(0.62, 0.13, 55)] * 3))
    canvas.side(shirt, (40, 0), 30, oklch(0.42, 0.10, 45), 0.5)
    chance = Chance("curls")
    curls = _curls(chance, 90, (300, 214), (138, 112), (22, 36))
    canvas.fill(canvas.soft(canvas.ovals(curls), 14, (14, 12)), oklch(0.25, 0.07, 260), 0.5)
    _hair(canvas, curls)
    shape = _face(canvas, look, ears=True)
    outline = canvas.outline(_mirrored([
        (300, 428), (318, 424), (352, 434), (380, 420), (398, 384), (408, 326), (421, 330), (422, 410), (402, 476),
        (356, 534), (300, 554),
    ]))  # fmt: skip
    mouth = canvas.outline(_mirrored([(300, 446), (330, 447), (354, 454), (330, 480), (300, 487)]))
    beard = ImageChops.subtract(outline, canvas.soft(mouth, 1.5))
    canvas.within(shape, canvas.soft(beard, 9), _BLACK, 0.5)
    canvas.fill(canvas.soft(beard, 1.6), _BLACK, 0.97)
    tufts = _curls(chance, 170, (300, 440), (124, 116), (7, 12))
    shine = canvas.ovals([dot for tuft in tufts for dot in _shine(tuft, 1.8)])
    canvas.within(beard, canvas.soft(shine, 0.5), _CURL, 0.75)
    _features(canvas, look)
    top = _curls(chance, 60, (300, 176), (116, 62), (20, 32))
    canvas.within(shape, canvas.soft(canvas.ovals(top), 8, (4, 14)), _darker(look.shade), 0.7)
    _hair(canvas, top)
    _glasses(canvas)
    return canvas.image.crop((140, 110, 1060, 1337)).resize((600, 800), Image.Resampling.LANCZOS)


def _curls(chance: Chance, count: int, centre: Point, reach: Point, sizes: tuple[float, float]) -> list[Oval]:
    curls = []
    for number in range(count):
        angle, far = math.tau * number * 0.381966, math.sqrt((number + 0.5) / count)
        x, y = centre[0] + reach[0] * far * math.cos(angle), centre[1] + reach[1] * far * math.sin(angle)
        curls.append(Oval(around((x, y), chance.between(*sizes))))
    return curls


def _hair(canvas: Canvas, curls: Sequence[Oval]) -> None:
    """One curl upon the other, each with its light."""
    canvas.fill(canvas.ovals(curls), _BLACK)
    canvas.fill(canvas.soft(canvas.ovals([dot for curl in curls for dot in _shine(curl, 3.2)]), 0.6), _CURL, 0.8)


def _shine(curl: Oval, width: float) -> list[Oval]:
    left, top, right, bottom = curl.box
    x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2 * 0.7
    angles = [2.6 + 0.35 * step for step in range(8)]
    return dots([(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles], width)


def _glasses(canvas: Canvas) -> None:
    gold = oklch(0.80, 0.11, 82)
    for side in (-1, 1):
        centre = 300 + 64 * side, 346.0
        lens = canvas.circle(centre, 50)
        rim = ImageChops.subtract(canvas.circle(centre, 53), canvas.circle(centre, 48))
        canvas.fill(canvas.soft(rim, 3, (2, 7)), oklch(0.2, 0.04, 40), 0.5)
        canvas.fill(lens, oklch(0.9, 0.03, 200), 0.1)
        glint = canvas.polygon([(centre[0] + x, y) for x, y in ((-44, 374), (4, 290), (26, 290), (-26, 390))])
        canvas.within(lens, glint, (255, 255, 255), 0.13)
        canvas.fill(rim, rows(oklch(0.90, 0.09, 90), gold, oklch(0.62, 0.11, 70)))
        canvas.fill(canvas.stroke([(300 + 116 * side, 338), (300 + 136 * side, 334)], 6, taper=0), gold)
    canvas.fill(canvas.stroke([(284, 340), (300, 331), (316, 340)], 5.5, taper=0.1), gold)


SAMPLES: Final[Mapping[str, Callable[[], Image.Image]]] = {"portrait": portrait, "hat": hat, "lake": lake, "face": face}


def main() -> None:
    """Write them all."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in SAMPLES.items():
        draw().save(FOLDER / f"{name}.webp", quality=86, method=6)


if __name__ == "__main__":
    main()
