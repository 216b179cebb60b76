"""The one event: what the log keeps, the socket sends and HTTP returns.

An event's JSON is made once, by `encode`, when the event is proposed. The same bytes then go to the log, to
every socket and into HTTP answers. Only the log knows the balance at the instant of the append; so
``credit`` is always the last key, and the log adds it to the finished bytes with `with_credit`.
"""

from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.alias_generators import to_camel

from domain.errors import FailureCode
from domain.stages import Kind

#: The Socket.IO event that carries a status; every other status is carried by `CONTINUE`.
NAMES: Final = {"started": "generation_started", "completed": "generation_completed", "failed": "generation_failed"}
CONTINUE: Final = "continue"


class Wire(BaseModel):
    """Base of everything clients read: camelCase keys, and no key that is not declared."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )


class FaceSwapError(Wire):
    """Why a generation completed without the face swap that was asked for."""

    code: FailureCode
    message: Annotated[str, Field(min_length=1, max_length=500)]


class _Header(Wire):
    generation_id: str
    kind: Kind
    sequence: Annotated[int, Field(ge=1, description="1, 2, 3 … within one generation, without a gap")]
    status: str
    message: str
    progress: Annotated[int, Field(ge=0, le=100, description="percentage; it only rises")]
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
    """What the work on a generation brings: pictures, and the reasons where it fails."""

    face_swap_error: FaceSwapError | None = None
    error: Annotated[str | None, Field(description="a sentence fit to show to the owner")] = None
    code: FailureCode | None = None
    failed_stage: str | None = None
    retryable: bool | None = None


class Event(Outcome, _Header):  # The fields of the last base come first in the JSON, and ``credit`` last.
    """One fact about a generation. Absent values are left out of the JSON, never null."""

    credit: Annotated[int | None, Field(description="the owner's balance after this event")] = None


def event_name(status: str) -> str:
    """The Socket.IO event that carries this status."""
    return NAMES.get(status, CONTINUE)


def encode(event: Event) -> bytes:
    """The event's JSON, UTF-8, without ``credit``: the bytes that are kept and sent."""
    return event.__pydantic_serializer__.to_json(event, by_alias=True, exclude_none=True)


def with_credit(encoded: bytes, credit: int) -> bytes:
    """The event's JSON with the balance as its last key."""
    return b'%b,"credit":%d}' % (encoded[:-1], credit)


def decode(encoded: bytes) -> Event:
    """The event that these bytes, kept by a log, stand for. A key that a later version added is left out."""
    return Event.model_validate_json(encoded, extra="ignore")


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC, to the millisecond: ``2026-11-22T17:30:00.123Z``."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
