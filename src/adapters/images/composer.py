"""Composes the sheet: all pictures of a generation on one white page."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import Final, NamedTuple

from PIL import Image

from adapters.images.codec import Unreadable, blank, decoded, encode, opened
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
                sizes = [await run(_size, await load()) for load in pictures]
            async with self._threads.turn(sum(width * height for width, height in sizes)) as run:
                sheet = await run(blank, "RGB", SHEET, "white")
                for load, box in zip(pictures, arrange(sizes), strict=True):
                    await run(_paste, sheet, await load(), box)
                composed: Picture = await run(encode, sheet)
                return composed
        except Unreadable:
            raise Failure("invalid_image") from None


def _size(picture: Picture) -> tuple[int, int]:
    return opened(picture.data).size


def _paste(sheet: Image.Image, picture: Picture, box: Box) -> None:
    size = box.right - box.left, box.bottom - box.top
    fitted = _resized(decoded(opened(picture.data), near=size), size)
    sheet.paste(fitted, box, fitted if fitted.mode == "RGBA" else None)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    # For downscaling, Hamming is as good as bicubic in two thirds of the time.
    smaller = size[0] < image.width
    return image.resize(size, Image.Resampling.HAMMING if smaller else Image.Resampling.BICUBIC, reducing_gap=2.0)


def arrange(sizes: Sequence[tuple[int, int]]) -> list[Box]:
    """A box for each picture (width, height), with the picture's aspect ratio.

    Of all ways to break the pictures into rows, this is the one with the largest product of their areas. Unlike the
    sum, the product does not favour layouts with a tiny picture.
    """
    shapes = [width / height for width, height in sizes]
    layouts = [_Layout(shapes, rows) for rows in _breaks(len(shapes))]
    # Among equals, prefer the one that is symmetric from top to bottom.
    best = max(layouts, key=lambda layout: (round(layout.score, 6), layout.symmetric))
    return list(best.boxes())


def _breaks(count: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every way to break `count` pictures into rows, as ranges (first, end) of indexes."""
    for cuts in range(count):
        for starts in combinations(range(1, count), cuts):
            yield tuple(pairwise((0, *starts, count)))


class _Layout:
    """Rows of pictures. Each row fills the width of the sheet, unless the sheet is not high enough for that."""

    def __init__(self, shapes: Sequence[float], rows: Sequence[tuple[int, int]]) -> None:
        width, height = SHEET[0] - 2 * MARGIN, SHEET[1] - 2 * MARGIN
        self._rows = [shapes[first:end] for first, end in rows]
        wanted = [(width - GUTTER * (len(row) - 1)) / sum(row) for row in self._rows]
        limit = _level(wanted, height - GUTTER * (len(rows) - 1))
        self._heights = [min(each, limit) for each in wanted]
        self.score = sum(
            math.log(height * height * shape)
            for row, height in zip(self._rows, self._heights, strict=True)
            for shape in row
        )
        lengths = [len(row) for row in self._rows]
        self.symmetric = lengths == lengths[::-1]

    def boxes(self) -> Iterator[Box]:
        """The boxes, centred on the sheet."""
        top = (SHEET[1] - sum(self._heights) - GUTTER * (len(self._rows) - 1)) / 2
        for row, height in zip(self._rows, self._heights, strict=True):
            left = (SHEET[0] - sum(row) * height - GUTTER * (len(row) - 1)) / 2
            for shape in row:
                x, y = round(left), round(top)
                # At least one pixel wide and high.
                yield Box(x, y, max(x + 1, round(left + shape * height)), max(y + 1, round(top + height)))
                left += shape * height + GUTTER
            top += height + GUTTER


def _level(wanted: Sequence[float], room: float) -> float:
    """The limit on the rows' heights with which they fill the room; infinite if they fit without one."""
    for done, height in enumerate(sorted(wanted)):
        share = room / (len(wanted) - done)
        if height > share:
            return share
        room -= height
    return math.inf
