"""What the service sends: the keys of its JSON as attributes in snake_case. Absent values are ``None``."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal, Self, TypedDict

Kind = Literal["edit", "generate"]
JSON = Mapping[str, Any]


@cache
def camel_case(name: str) -> str:
    """``face_swap_url`` as the service writes it: ``faceSwapUrl``."""
    first, *others = name.split("_")
    return first + "".join(map(str.title, others))


@dataclass(frozen=True, slots=True)
class _Model:
    @classmethod
    def from_json(cls, data: JSON) -> Self:
        """The object with this JSON. Keys that a newer service sends are ignored."""
        names = ((field.name, camel_case(field.name)) for field in fields(cls))
        return cls(**{name: _nested(key, data[key]) for name, key in names if key in data})


def _nested(key: str, value: Any) -> Any:
    model = _NESTED.get(key)
    return model.from_json(value) if model else value


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceSwapError(_Model):
    """Why an edit completed without the requested face swap."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Input(_Model):
    """What a generation was asked for. `images` are URLs."""

    prompt: str
    images: list[str]
    image_urls: list[str]
    quality: str
    background: str
    aspect_ratio: str
    input_fidelity: str | None = None
    face_swap: bool | None = None
    face: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Common(_Model):
    """The attributes that events and generations share."""

    generation_id: str
    kind: Kind
    sequence: int
    status: str
    message: str
    progress: int
    metadata: dict[str, Any] | None = None
    input: Input | None = None
    input_image: str | None = None
    composition_url: str | None = None
    preview_url: str | None = None
    edited_image_url: str | None = None
    generated_image_url: str | None = None
    face_swap_url: str | None = None
    face_swap_error: FaceSwapError | None = None
    error: str | None = None
    code: str | None = None
    failed_stage: str | None = None
    retryable: bool | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing follows."""
        return self.status in ("completed", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(_Common):
    """One transition of a generation. `cursor` is its position in the feed, if it comes from there."""

    occurred_at: str
    credit: int | None = None
    cursor: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation(_Common):
    """The state of a generation after its events. `queue_position` is its place in line while it waits: 1 is next."""

    user_id: str
    created_at: str
    updated_at: str
    expires_at: str | None = None
    queue_position: int | None = None

    def after(self, event: Event) -> "Generation":
        """The generation after its next event."""
        new = {name: value for name in _SHARED if (value := getattr(event, name)) is not None}
        return replace(self, **new, updated_at=event.occurred_at, queue_position=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account(_Model):
    """A user and the balance, which is ``None`` if the service keeps none."""

    user_id: str
    credit: int | None = None


_NESTED: dict[str, type[_Model]] = {"input": Input, "faceSwapError": FaceSwapError}
_SHARED = [field.name for field in fields(_Common)]


class Options(TypedDict, total=False):
    """The optional fields of a start."""

    image_names: list[str]
    face_swap: bool
    face: int
    metadata: dict[str, Any]
    quality: Literal["auto", "low", "medium", "high"]
    background: Literal["auto", "opaque", "transparent"]
    aspect_ratio: Literal["2:3", "1:1", "3:2"]
    input_fidelity: Literal["low", "high"]
    idempotency_key: str


class TransitionFields(TypedDict, total=False):
    """The optional fields of a transition."""

    sequence: int
    progress: int
    message: str
    composition_url: str
    preview_url: str
    edited_image_url: str
    generated_image_url: str
    face_swap_url: str
    face_swap_error: dict[str, str]
    error: str
    code: str
