"""What the offline AI stages share: they are slowed down, so that a person can watch their progress."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from PIL import ImageFilter

from adapters.images.codec import Unreadable, decoded, encode, opened
from adapters.images.threads import ImageThreads
from domain.errors import Failure
from domain.ports.images import Picture
from domain.ports.providers import Report

#: Seconds between two reports.
_INTERVAL: Final = 0.5
#: The longer side of a preview, in pixels.
_PREVIEW: Final = 320


@dataclass
class OfflineStage:
    """Makes pictures on image threads, each in at least `seconds`; 0 means without delay."""

    free = True

    threads: ImageThreads
    seconds: float

    async def make(self, render: Callable[[], Picture], messages: Sequence[str], report: Report) -> Picture:
        """Return the result of `render`, and report progress until the time is over, once with a preview.

        Raises:
            Failure: ``provider_rejected`` if an input is not a picture.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + self.seconds
        try:
            picture = await self.threads.run(render)
        except Unreadable:
            raise Failure("provider_rejected") from None
        if self.seconds <= 0:
            return picture
        preview = await self.threads.run(_preview, picture)
        steps = max(3, round(self.seconds / _INTERVAL))
        started = min(clock(), end)
        for step in range(1, steps):
            await asyncio.sleep(started + (end - started) * step / steps - clock())
            message = messages[step * len(messages) // steps]
            await report(step / steps, message, preview if step == steps // 2 else None)
        await asyncio.sleep(end - clock())
        return picture


def _preview(picture: Picture) -> Picture:
    """A small, blurred version of the picture."""
    image = decoded(opened(picture.data), near=(_PREVIEW, _PREVIEW))
    image.thumbnail((_PREVIEW, _PREVIEW))
    return encode(image.filter(ImageFilter.GaussianBlur(_PREVIEW / 64)), quality=75)
