"""The contract of `domain.ports.images.Composer`, checked by the colours on the sheet."""

import random

import pytest
from PIL import Image

from adapters.images.composer import MARGIN, SHEET, PillowComposer, arrange
from domain.errors import Failure
from domain.ports.images import Composer, Picture
from support.pictures import (
    BLUE,
    COLOURS,
    GREEN,
    ORANGE,
    RED,
    THREADS,
    WHITE,
    Box,
    alike,
    box_of,
    colour_at,
    differing,
    disjoint,
    encoded,
    loads,
    opened,
    picture,
    quarters,
    solid,
)

Size = tuple[int, int]

LANDSCAPE, PORTRAIT, SQUARE = (400, 300), (300, 400), (300, 300)


@pytest.fixture
def composer() -> Composer:
    return PillowComposer(THREADS)


def precedes(one: Box, other: Box) -> bool:
    """To the left of it in the same row, or in a row above."""
    return one[3] <= other[1] or (one[2] <= other[0] and one[1] < other[3])


def as_shaped(box: Box, size: Size) -> bool:
    """Whether the box has the proportions of that size, to a few pixels."""
    width, height = box[2] - box[0], box[3] - box[1]
    return abs(width * size[1] - height * size[0]) <= 4 * max(size)


def small(sheet: Picture) -> Image.Image:
    """The sheet at a quarter of its size, which is faster to examine."""
    image = opened(sheet)
    assert (image.size, image.mode) == ((2480, 3508), "RGB")
    return image.reduce(4)


@pytest.mark.parametrize(
    "sizes",
    [
        [LANDSCAPE],
        [PORTRAIT, PORTRAIT],
        [LANDSCAPE, PORTRAIT, SQUARE],
        [LANDSCAPE] * 4,
        [PORTRAIT, LANDSCAPE, SQUARE, (900, 200), (200, 900)],
        [(1, 1), (3, 2), (2000, 1500)],
    ],
    ids=lambda sizes: f"{len(sizes)} pictures",
)
async def test_every_picture_is_on_the_sheet_complete_and_in_order(composer: Composer, sizes: list[Size]) -> None:
    pictures = [solid(colour, size) for colour, size in zip(COLOURS, sizes, strict=False)]
    sheet = small(await composer.compose(loads(pictures)))

    boxes = [box for colour in COLOURS[: len(sizes)] if (box := box_of(sheet, colour))]
    assert len(boxes) == len(sizes)
    assert all(map(as_shaped, boxes, sizes))
    assert disjoint(boxes)
    assert all(precedes(one, other) for place, one in enumerate(boxes) for other in boxes[place + 1 :])

    # Everything around them is white.
    for left, top, right, bottom in boxes:
        sheet.paste(WHITE, (left - 3, top - 3, right + 3, bottom + 3))
    assert differing(sheet, Image.new("RGB", sheet.size, WHITE), 12).getbbox() is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_pictures_are_neither_cropped_nor_rotated(composer: Composer, kind: str) -> None:
    sheet = small(await composer.compose(loads([picture(quarters((1500, 1000)), kind)])))
    box = differing(sheet, Image.new("RGB", sheet.size, WHITE), 60).getbbox()
    assert box is not None
    assert as_shaped(box, (3, 2))
    found = sheet.crop(box)
    for x, y, colour in ((0.02, 0.02, RED), (0.98, 0.02, GREEN), (0.02, 0.98, BLUE), (0.98, 0.98, ORANGE)):
        assert alike(colour_at(found, x, y), colour)


async def test_transparent_pixels_become_white(composer: Composer) -> None:
    source = quarters((300, 200)).convert("RGBA")
    source.paste((0, 0, 0, 0), (0, 0, 150, 100))
    source.putpixel((0, 0), (255, 0, 0, 255))
    sheet = opened(await composer.compose(loads([picture(source)])))
    box = arrange([(300, 200)])[0]
    found = sheet.crop(box)
    assert alike(colour_at(found, 0.25, 0.25), WHITE)
    assert alike(colour_at(found, 0.75, 0.75), ORANGE)


async def test_a_picture_larger_than_the_sheet_is_scaled_down(composer: Composer) -> None:
    sheet = small(await composer.compose(loads([solid(RED, (6000, 4000), "JPEG"), solid(BLUE, (20_000, 400))])))
    boxes = [box_of(sheet, RED), box_of(sheet, BLUE)]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert as_shaped(boxes[0], (3, 2))
    assert disjoint([boxes[0], boxes[1]])


async def test_the_same_pictures_give_the_same_sheet(composer: Composer) -> None:
    pictures = [picture(quarters((500, 400)), "JPEG"), picture(quarters((300, 400)), "WEBP")]
    assert await composer.compose(loads(pictures)) == await composer.compose(loads(pictures))


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(quarters())[:60], encoded(quarters(), "GIF")])
async def test_an_unreadable_picture_fails_the_generation(composer: Composer, data: bytes) -> None:
    with pytest.raises(Failure) as failure:
        await composer.compose(loads([solid(RED), Picture(data, "image/png")]))
    assert failure.value.code == "invalid_image"


# --- the layout ------------------------------------------------------------------------------------------


def area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def test_pictures_do_not_overlap_and_stay_within_the_margins() -> None:
    chance = random.Random(1)
    for _ in range(500):
        sizes = [(chance.randint(1, 5000), chance.randint(1, 5000)) for _ in range(chance.randint(1, 5))]
        boxes = arrange(sizes)
        assert len(boxes) == len(sizes)
        assert all(map(as_shaped, boxes, sizes))
        assert disjoint(boxes)
        assert all(precedes(one, other) for place, one in enumerate(boxes) for other in boxes[place + 1 :])
        for left, top, right, bottom in boxes:
            assert MARGIN - 1 <= left < right <= SHEET[0] - MARGIN + 1
            assert MARGIN - 1 <= top < bottom <= SHEET[1] - MARGIN + 1


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SQUARE, (160, 90), (90, 160), (210, 297)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_pictures_of_one_shape_use_the_sheet_well_and_none_is_tiny(count: int, size: Size) -> None:
    areas = [area(box) for box in arrange([size] * count)]
    assert sum(areas) > 0.3 * SHEET[0] * SHEET[1]
    assert max(areas) < 6 * min(areas)


def test_the_thinnest_pictures_are_at_least_one_pixel_wide() -> None:
    boxes = arrange([(25_000_000, 1), (1, 25_000_000), (1, 1)])
    assert all(area(box) > 0 for box in boxes)
    assert disjoint(boxes)


def test_two_are_stacked_four_make_a_square_and_five_are_two_over_three() -> None:
    def rows(sizes: list[Size]) -> list[int]:
        tops = [box.top for box in arrange(sizes)]
        return [tops.count(top) for top in dict.fromkeys(tops)]

    assert rows([LANDSCAPE] * 2) == [1, 1]
    assert rows([SQUARE] * 3) == [1, 2]
    assert rows([PORTRAIT] * 4) == [2, 2]
    assert rows([PORTRAIT] * 5) == [2, 3]
