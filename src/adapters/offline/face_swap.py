"""The face swap without an AI: the face as a labelled inset."""

from functools import partial
from typing import Final

from PIL import Image, ImageDraw, ImageFilter, ImageOps

from adapters.images.codec import decoded, encode, opened
from adapters.offline.lettering import font
from adapters.offline.stage import OfflineStage
from domain.ports.images import Picture
from domain.ports.providers import Report

LABEL: Final = "offline preview"

#: As fractions of the picture's shorter side: the inset's width and height, and its distance from the corner.
_WIDTH: Final = 0.3
_HEIGHT: Final = 0.39
_MARGIN: Final = 0.045

_MESSAGES: Final = ("Looking at the face...", "Cutting it out...", "Softening the edges...", "Putting it in...")


class LocalFaceSwap(OfflineStage):
    """`domain.ports.providers.FaceSwapper`: puts the face into the upper right corner."""

    async def swap(self, picture: Picture, face: Picture, report: Report) -> Picture:
        return await self.make(partial(_swapped, picture, face), _MESSAGES, report)


def _swapped(picture: Picture, face: Picture) -> Picture:
    image = decoded(opened(picture.data))
    side = min(image.size)
    width, height, margin = max(1, round(_WIDTH * side)), max(1, round(_HEIGHT * side)), round(_MARGIN * side)
    left, top = max(0, image.width - width - margin), margin
    portrait = decoded(opened(face.data), near=(width, height)).convert("RGBA")
    portrait = ImageOps.fit(portrait, (width, height), Image.Resampling.BICUBIC, centering=(0.5, 0.35))
    oval = Image.new("L", (width, height))
    ImageDraw.Draw(oval).ellipse((width * 0.07, height * 0.05, width * 0.93, height * 0.95), fill=255)
    inset = Image.new("RGB", (width, height), "white")
    inset.paste(portrait, mask=portrait)
    image.paste(inset, (left, top), oval.filter(ImageFilter.GaussianBlur(width * 0.025)))

    middle, bottom = left + width / 2, top + height
    draw = ImageDraw.Draw(image)
    pill = (middle - 0.37 * width, bottom - 0.125 * width, middle + 0.37 * width, bottom)
    draw.rounded_rectangle(pill, 0.06 * width, fill=(24, 24, 28))
    draw.text((middle, bottom - 0.0625 * width), LABEL, fill="white", font=font(max(1, 0.08 * width)), anchor="mm")
    return encode(image, fine=True)
