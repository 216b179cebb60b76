"""The event that the log keeps, the socket sends and HTTP returns.

Its JSON is made once, by `encode`; the same bytes are stored and sent. Only the log knows the balance at the append, so
``credit`` is the last key, which the log adds to the bytes with `with_credit`.
"""

import contextlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.alias_generators import to_camel

from domain.errors import FailureCode
from domain.requests import AspectRatio, Background, InputFidelity, Quality
from domain.stages import Kind

#: The Socket.IO event that carries a status; every other status is carried by `CONTINUE`.
NAMES: Final = {"started": "generation_started", "completed": "generation_completed", "failed": "generation_failed"}
CONTINUE: Final = "continue"

#: The event that tells the owner's devices that a generation was removed. It is not in the log.
GENERATION_REMOVED: Final = "generation_removed"

#: The event that tells the owner's devices the place in line of a generation. It is not in the log.
QUEUE_POSITION: Final = "queue_position"


class Wire(BaseModel):
    """Base of the models that clients see: camelCase keys, and no undeclared ones."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )


class FaceSwapError(Wire):
    """Why a generation completed without the requested face swap."""

    code: FailureCode
    message: Annotated[str, Field(min_length=1, max_length=500)]


class Input(Wire):
    """What a generation was asked for."""

    prompt: str
    images: Annotated[
        list[str],
        Field(description="URLs of the stored input images, in order; a generation that ends as `started` loses them"),
    ]
    image_urls: Annotated[list[str], Field(description="as given; they come after `images`")]
    quality: Quality
    background: Background
    aspect_ratio: AspectRatio
    input_fidelity: InputFidelity | None = None
    face_swap: Annotated[bool | None, Field(description="of an edit")] = None
    face: Annotated[
        int | None, Field(description="with a face swap: the index of the face among `images` and `imageUrls`")
    ] = None


class _Header(Wire):
    generation_id: str
    kind: Kind
    sequence: Annotated[int, Field(ge=1, description="1, 2, 3 … within one generation, without gaps")]
    status: str
    message: str
    progress: Annotated[int, Field(ge=0, le=100, description="percentage; it only increases")]
    occurred_at: Annotated[str, Field(description="RFC 3339 in UTC, to the millisecond")]
    metadata: dict[str, JsonValue] | None = None


class Images(Wire):
    """The URLs of the pictures of a generation."""

    input_image: str | None = None
    composition_url: str | None = None
    preview_url: str | None = None
    edited_image_url: str | None = None
    generated_image_url: str | None = None
    face_swap_url: str | None = None


URL_FIELDS: Final = tuple(Images.model_fields)


class Outcome(Images):
    """The results of a generation: its pictures, or why it failed."""

    face_swap_error: FaceSwapError | None = None
    error: Annotated[str | None, Field(description="a sentence for the owner")] = None
    code: FailureCode | None = None
    failed_stage: str | None = None
    retryable: bool | None = None


class Event(Outcome, _Header):  # The fields of the last base come first in the JSON, and ``credit`` last.
    """One transition of a generation. Absent values are omitted, never null."""

    input: Annotated[Input | None, Field(description="of `generation_started`")] = None
    credit: Annotated[int | None, Field(description="the owner's balance after this event")] = None


def event_name(status: str) -> str:
    """The Socket.IO event that carries this status."""
    return NAMES.get(status, CONTINUE)


def validated(fields: Mapping[str, object]) -> Event:
    """The event with these fields. Raises `pydantic.ValidationError`."""
    event: Event = Event.__pydantic_validator__.validate_python(fields, by_alias=False, by_name=True)
    return event


def encode(event: Event) -> bytes:
    """The event's JSON in UTF-8, without ``credit``."""
    return event.__pydantic_serializer__.to_json(event, by_alias=True, exclude_none=True)


def with_credit(encoded: bytes, credit: int) -> bytes:
    """The event's JSON with the balance as its last key."""
    return b'%b,"credit":%d}' % (encoded[:-1], credit)


def decode(encoded: bytes) -> Event:
    """The event with this stored JSON. Keys that a later version added are ignored. Raises `ValueError`."""
    return Event.model_validate_json(encoded, extra="ignore")


def failure_code(name: str, encoded: bytes) -> str | None:
    """The code of the failure, if the event with this name and JSON is one that can be read."""
    with contextlib.suppress(ValueError):
        return decode(encoded).code if name == NAMES["failed"] else None
    return None


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC, to the millisecond: ``2026-11-22T17:30:00.123Z``."""
    utc = moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    return utc.isoformat("T", "milliseconds")[:23] + "Z"
