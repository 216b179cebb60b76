"""Composes the sheet: all pictures of a generation on one white page."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import Final, NamedTuple

from PIL import Image

from adapters.images.codec import Unreadable, decoded, encode, opened
from adapters.images.threads import GLANCE, ImageThreads
from domain.errors import Failure
from domain.ports.images import Load, Picture

#: In pixels: A4 at 300 dots per inch, the margin, and the gap between pictures.
SHEET: Final = (2480, 3508)
MARGIN: Final = 96
GUTTER: Final = 48


class Box(NamedTuple):
    """The place of a picture, in pixels of the sheet."""

    left: int
    top: int
    right: int
    bottom: int


class PillowComposer:
    """`domain.ports.images.Composer`: arranges 1 to 5 pictures in rows, left to right and top to bottom."""

    def __init__(self, threads: ImageThreads) -> None:
        self._threads = threads

    async def compose(self, pictures: Sequence[Load]) -> Picture:
        # Load each picture twice, one at a time, so that none is in memory while this waits for a thread.
        try:
            async with self._threads.turn(GLANCE) as run:
                sizes = [(await run(opened, (await load()).data)).size for load in pictures]
            async with self._threads.turn(sum(width * height for width, height in sizes)) as run:
                sheet = await run(Image.new, "RGB", SHEET, "white")
                for load, box in zip(pictures, arrange(sizes), strict=True):
                    await run(_paste, sheet, await load(), box)
                return await run(encode, sheet)
        except Unreadable:
            raise Failure("invalid_image") from None


def _paste(sheet: Image.Image, picture: Picture, box: Box) -> None:
    size = box.right - box.left, box.bottom - box.top
    image = decoded(opened(picture.data), near=size)
    # For downscaling, Hamming is as good as bicubic in two thirds of the time.
    method = Image.Resampling.HAMMING if size[0] < image.width else Image.Resampling.BICUBIC
    fitted = image.resize(size, method, reducing_gap=2.0)
    sheet.paste(fitted, box, fitted if fitted.mode == "RGBA" else None)


#: The aspect ratios (width / height) of the pictures in each row.
_Rows = Sequence[Sequence[float]]


def arrange(sizes: Sequence[tuple[int, int]]) -> list[Box]:
    """A box for each picture (width, height), with the picture's aspect ratio.

    Of all ways to break the pictures into rows, this is the one with the largest product of their areas. Unlike the
    sum, the product does not favour layouts with a tiny picture.
    """
    shapes = [width / height for width, height in sizes]
    breaks = (cuts for count in range(len(shapes)) for cuts in combinations(range(1, len(shapes)), count))
    layouts = ([shapes[first:end] for first, end in pairwise((0, *cuts, len(shapes)))] for cuts in breaks)
    return list(_boxes(max(layouts, key=_score)))


def _score(rows: _Rows) -> tuple[float, bool]:
    """The logarithm of the product of the areas; among equals, prefer symmetry from top to bottom."""
    areas = (height * height * shape for row, height in zip(rows, _heights(rows), strict=True) for shape in row)
    lengths = [len(row) for row in rows]
    return round(sum(map(math.log, areas)), 6), lengths == lengths[::-1]


def _heights(rows: _Rows) -> list[float]:
    """Each row fills the width of the sheet, unless the sheet is not high enough: then high rows get a limit."""
    wanted = [(SHEET[0] - 2 * MARGIN - GUTTER * (len(row) - 1)) / sum(row) for row in rows]
    room: float = SHEET[1] - 2 * MARGIN - GUTTER * (len(rows) - 1)
    limit = math.inf
    for done, height in enumerate(sorted(wanted)):
        if height * (len(rows) - done) > room:
            limit = room / (len(rows) - done)
            break
        room -= height
    return [min(height, limit) for height in wanted]


def _boxes(rows: _Rows) -> Iterator[Box]:
    """The boxes, centred on the sheet."""
    heights = _heights(rows)
    top = (SHEET[1] - sum(heights) - GUTTER * (len(rows) - 1)) / 2
    for row, height in zip(rows, heights, strict=True):
        left = (SHEET[0] - sum(row) * height - GUTTER * (len(row) - 1)) / 2
        for shape in row:
            x, y = round(left), round(top)
            # At least one pixel wide and high.
            yield Box(x, y, max(x + 1, round(left + shape * height)), max(y + 1, round(top + height)))
            left += shape * height + GUTTER
        top += height + GUTTER
