"""The AI providers."""

from collections.abc import Awaitable, Callable
from typing import Protocol

from domain.ports.images import Picture
from domain.requests import Options

#: Reports progress: the fraction of the work that is done (0 to 1), a message, and a preview if there is one.
Report = Callable[[float, str, Picture | None], Awaitable[None]]


class ImageEditor(Protocol):
    """The AI stage: makes a picture from the sheet and the prompt. One attempt per call."""

    @property
    def free(self) -> bool:
        """Whether its work costs nothing. Free work is repeated after a crash; work that may be paid for never is."""

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        """The edited picture.

        Raises:
            Failure: with one of the ``provider_`` codes.
        """

    async def generate(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        """A new picture after the sheet. Raises as `edit`."""


class FaceSwapper(Protocol):
    """Puts a face into a finished picture. One attempt per call."""

    @property
    def free(self) -> bool:
        """As `ImageEditor.free`."""

    async def swap(self, picture: Picture, face: Picture, report: Report) -> Picture:
        """The picture with the face.

        Raises:
            Failure: with one of the ``provider_`` codes.
        """
