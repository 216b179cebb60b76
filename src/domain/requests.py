"""What a user asks for: the same request from the form to the log."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue

AspectRatio = Literal["2:3", "1:1", "3:2"]
Quality = Literal["auto", "low", "medium", "high"]
Background = Literal["auto", "opaque", "transparent"]
InputFidelity = Literal["low", "high"]
Prompt = Annotated[str, Field(min_length=1, max_length=4000)]


class Options(BaseModel):
    """How the picture is made. A provider ignores options that it does not have."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    quality: Quality = "auto"
    background: Background = "auto"
    aspect_ratio: AspectRatio = "2:3"
    input_fidelity: InputFidelity | None = None


class GenerationRequest(BaseModel):
    """One user's request for one generation, stored with its first event.

    Stored requests stay readable: this is only extended, by optional fields. Uploads travel beside it until they are
    stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    prompt: Prompt
    options: Options = Options()
    #: Names of stored images, in order. Before the start: those to copy. Afterwards: its own, first the uploads.
    images: tuple[str, ...] = ()
    #: Fetched in ``composition`` and placed on the sheet after `images`.
    image_urls: tuple[str, ...] = ()
    face_swap: bool = False
    #: The index of the face among all images; ``None``: the first image URL.
    face: int | None = None
    metadata: dict[str, JsonValue] | None = None
    #: The owner's own pipeline does the work and reports it.
    external: bool = False

    @property
    def face_index(self) -> int:
        """The index of the face among all images, if a face swap is requested."""
        return len(self.images) if self.face is None else self.face

    @classmethod
    def decode(cls, stored: bytes) -> Self:
        """The request with this JSON. Fields that a later version added are ignored. Raises `ValueError`."""
        return cls.model_validate_json(stored, extra="ignore")
