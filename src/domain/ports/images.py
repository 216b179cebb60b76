"""Images: their store, and what decodes, fetches and arranges them."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Final, NamedTuple, Protocol


class Picture(NamedTuple):
    """An encoded image."""

    data: bytes
    #: ``image/png``, ``image/jpeg`` or ``image/webp``.
    media_type: str


#: The widths of thumbnails in pixels.
WIDTHS: Final = (320, 640)


def thumbnail_name(name: str, width: int) -> str:
    """The name under which the thumbnail of a stored picture is stored."""
    return f"{name}.{width}.webp"


def original_name(name: str) -> str:
    """The name of the picture of this thumbnail; the name itself if it is not a thumbnail's."""
    return ".".join(name.split(".")[:2])


class ImagesRefused(Exception):
    """An image store is in use, belongs to another log, or fails. The message is one sentence for the operator."""


class ImageStore(Protocol):
    """Stores pictures. A name begins with the id of its generation, and cannot be guessed."""

    async def save(self, generation_id: str, picture: Picture, name: str | None = None) -> str:
        """Store the picture whole or not at all, and return its name: the id, ``-``, 128 random bits, a suffix.

        `name`: that of a thumbnail, which may be stored already.

        Raises:
            Failure: ``storage_failed``.
        """

    async def load(self, name: str) -> Picture | None:
        """The picture of this name; ``None`` where there is none. Raises `Failure`: the store does not answer."""

    async def size(self, name: str) -> int:
        """How many bytes the picture of this name has; 0 where there is none. Raises as `load`."""

    async def discard(self, name: str) -> None:
        """Remove one picture, if it is there. What cannot be removed is left for the next sweep."""

    async def remove(self, generation_id: str) -> None:
        """Remove all pictures of one generation, as `discard` does."""

    async def names(self, *, older_than: datetime) -> dict[str, list[str]]:
        """The names of the pictures stored before that moment, by generation id.

        Those that a dead process has stored are included whatever their age, where that is known. Those that may belong
        to another log than the present one are left out. Raises as `load`.
        """

    async def close(self) -> None:
        """Release everything. Nothing may be called afterwards."""

    async def probe(self) -> None:
        """Store 4 kB and remove them again, to find out whether a picture can be stored.

        Raises:
            Failure: ``storage_failed``.
        """


#: Untrusted bytes, or a function that reads them, any number of times.
Content = bytes | Callable[[], Awaitable[bytes]]


async def read(content: Content) -> bytes:
    """The untrusted bytes."""
    return content if isinstance(content, bytes) else await content()


class ImageIntake(Protocol):
    """Turns untrusted bytes into a picture that is safe to keep."""

    async def admit(self, content: Content) -> Picture:
        """Decode within limits, apply the EXIF orientation, and encode again without metadata.

        Raises:
            UnsupportedImageType, ImageTooLarge, InvalidImage
        """

    async def thumbnail(self, content: Content, width: int) -> Picture:
        """A WebP of the first frame, upright, and at most so many pixels wide. Raises as `admit`."""


class ImageFetcher(Protocol):
    """Fetches a user's image URL."""

    async def fetch(self, url: str) -> Picture:
        """The picture at the URL, admitted by the intake.

        Raises:
            Failure: ``image_fetch_failed``.
        """


#: Loads one stored picture, any number of times.
Load = Callable[[], Awaitable[Picture]]


class Composer(Protocol):
    """Lays pictures out on one sheet."""

    async def compose(self, pictures: Sequence[Load]) -> Picture:
        """One A4 sheet with all pictures, each whole, in the order given.

        Raises:
            Failure: ``invalid_image``, and as `Load`.
        """
