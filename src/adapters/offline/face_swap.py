"""The face swap without an AI: the face as a labelled inset."""

from functools import partial
from typing import Final

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from adapters.images.codec import decoded, encode, opened
from adapters.offline.art import faded, inset, oval, rounded
from adapters.offline.stage import OfflineStage
from domain.ports.images import Picture
from domain.ports.providers import Report

LABEL: Final = "offline preview"

#: As fractions of the picture's shorter side: the inset's width, and its distance from the upper right corner.
WIDTH: Final = 0.3
MARGIN: Final = 0.045
#: As fractions of the inset's width: its height, and the softness of its edge.
_HEIGHT: Final = 1.3
_FEATHER: Final = 0.05

_MESSAGES: Final = ("Looking at the face...", "Cutting it out...", "Softening the edges...", "Putting it in...")


class LocalFaceSwap(OfflineStage):
    """`domain.ports.providers.FaceSwapper`: puts the face into the upper right corner."""

    async def swap(self, picture: Picture, face: Picture, report: Report) -> Picture:
        return await self.make(partial(_swapped, picture, face), _MESSAGES, report)


def _swapped(picture: Picture, face: Picture) -> Picture:
    image = decoded(opened(picture.data))
    side = min(image.size)
    size = max(1, round(WIDTH * side)), max(1, min(round(WIDTH * _HEIGHT * side), image.height))
    corner = max(0, image.width - size[0] - round(MARGIN * side)), min(round(MARGIN * side), image.height - size[1])

    feather = _FEATHER * size[0]
    soft = oval(size, inset((0, 0, *size), 2 * feather)).filter(ImageFilter.GaussianBlur(feather / 2))
    halo = oval(size, inset((0, 0, *size), feather)).filter(ImageFilter.GaussianBlur(feather / 2))
    image.paste("white", (*corner, corner[0] + size[0], corner[1] + size[1]), faded(halo, 0.75))
    image.paste(_portrait(face, size), corner, soft)
    _label(image, corner, size)
    return encode(image, fine=True)


def _portrait(face: Picture, size: tuple[int, int]) -> Image.Image:
    """The face on white, cropped to size, more at the bottom than at the top."""
    image = decoded(opened(face.data), near=size)
    portrait = Image.new("RGB", image.size, "white")
    portrait.paste(image, mask=image if image.mode == "RGBA" else None)
    return ImageOps.fit(portrait, size, Image.Resampling.BICUBIC, centering=(0.5, 0.35))


def _label(image: Image.Image, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """Write `LABEL` on a dark pill at the bottom of the inset."""
    width, height = max(1, round(0.74 * size[0])), max(1, round(0.125 * size[0]))
    left, top = corner[0] + (size[0] - width) // 2, corner[1] + size[1] - height
    pill = rounded((width, height), (0, 0, width - 1, height - 1), height / 2)
    image.paste((24, 24, 28), (left, top, left + width, top + height), faded(pill, 0.85))
    font = ImageFont.load_default(max(1, 0.088 * size[0]))
    ImageDraw.Draw(image).text((left + width / 2, top + height / 2), LABEL, fill="white", font=font, anchor="mm")
