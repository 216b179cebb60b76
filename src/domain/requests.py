"""What was ordered: everything that is needed to do the work, kept by the log beside the first event."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

AspectRatio = Literal["2:3", "1:1", "3:2"]
Quality = Literal["auto", "low", "medium", "high"]
Background = Literal["auto", "opaque", "transparent"]
InputFidelity = Literal["low", "high"]


class Options(BaseModel):
    """How the picture should be made; what a provider does not know it ignores."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    quality: Quality = "auto"
    background: Background = "auto"
    aspect_ratio: AspectRatio = "2:3"
    input_fidelity: InputFidelity | None = None


class Order(BaseModel):
    """One user's wish for one generation. Stored once, and never sent to a client."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    options: Options = Options()
    #: Names of stored uploads, in the order given.
    images: tuple[str, ...] = ()
    #: Fetched in ``composition``, and put on the sheet after the uploads. The first one is the face.
    image_urls: tuple[str, ...] = ()
    face_swap: bool = False
    metadata: dict[str, JsonValue] | None = None
    #: The work is done by a pipeline of the user's own, which reports it.
    external: bool = False
