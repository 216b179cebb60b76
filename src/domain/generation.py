"""One generation: the fold of its events. The `transitions` machine of its flow decides which event may follow."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, Final

from pydantic import Field, JsonValue
from transitions import Machine

from domain.errors import Failure, IllegalTransition, InvalidEventField
from domain.events import Event, FaceSwapError, Input, Outcome, Wire, timestamp, validated
from domain.requests import GenerationRequest
from domain.stages import FAILED, FLOWS, GUARDS, INITIAL, STARTED, Kind, Via, ceiling, moves


def _machine(kind: Kind) -> Machine:
    """The rules for one kind, shared by all its generations. A move's trigger is the status it leads to."""
    return Machine(
        model=None,
        states=[INITIAL, *FLOWS[kind]],
        initial=INITIAL,
        transitions=[
            {"trigger": to, "source": source, "dest": to, "conditions": via.guard} for source, to, via in moves(kind)
        ],
        auto_transitions=False,
        model_attribute="status",
    )


#: No fields, or no pictures.
NONE: Final[Mapping[str, Any]] = MappingProxyType({})

_MACHINES: Final[Mapping[Kind, Machine]] = {kind: _machine(kind) for kind in FLOWS}
#: How its machine reaches one status from another.
_VIAS: Final = {kind: {(source, to): via for source, to, via in moves(kind)} for kind in FLOWS}

#: The fields of an event that `Generation.outcome` keeps.
_OUTCOME: Final = frozenset(Outcome.model_fields)


@cache
def _allows(kind: Kind, source: str, status: str, guards: bool) -> bool:
    """Whether the machine makes this move if its guards hold, or do not. It remembers nothing, so it is asked once."""
    model = SimpleNamespace(status=source, **{guard: lambda: guards for guard in GUARDS})
    return bool(_MACHINES[kind].events[status].trigger(model))


class _Header(Wire):
    generation_id: str
    user_id: str
    kind: Kind
    status: str
    progress: int
    message: str
    sequence: int
    created_at: str
    updated_at: str
    expires_at: str | None = None
    queue_position: Annotated[
        int | None, Field(ge=1, description="while it waits for a worker: its place in line over all users; 1 is next")
    ] = None
    metadata: dict[str, JsonValue] | None = None


class Snapshot(Outcome, _Header):
    """A generation as it is now: the fold of its events."""

    input: Annotated[
        Input | None,
        Field(description="absent in the feed, in acks, and for generations of earlier versions"),
    ] = None


@dataclass(slots=True, eq=False)
class Generation:
    """The state of one generation. Only `propose` makes its events, and `after` its next states."""

    generation_id: str
    kind: Kind
    user_id: str
    request: GenerationRequest
    status: str = INITIAL
    progress: int = 0
    sequence: int = 0
    message: str = ""
    created_at: str = ""
    updated_at: str = ""
    #: The latest value of each field of `Outcome` that its events had.
    outcome: Mapping[str, Any] = field(default_factory=dict)
    #: The names of its stored pictures, by the field that has the picture's URL.
    images: Mapping[str, str] = field(default_factory=dict)
    #: As its first event has it.
    input: Input | None = None

    @property
    def input_images(self) -> tuple[str, ...]:
        """The names of its stored input images. One that ended while it waited has lost them."""
        return () if self._ended_waiting else self.request.images

    @property
    def _ended_waiting(self) -> bool:
        return self.outcome.get("failed_stage") == STARTED

    @property
    def needs_fetching(self) -> bool:
        """Whether its next step fetches image URLs."""
        return bool(self.request.image_urls) and "composition_url" not in self.outcome

    @property
    def untouched(self) -> bool:
        """Whether it has only been started, and may wait for a worker."""
        return self.sequence == 1 and not self.request.external

    @property
    def finished(self) -> bool:
        """Whether no event may follow."""
        return self.status != INITIAL and FLOWS[self.kind][self.status].terminal

    @property
    def allowed(self) -> tuple[str, ...]:
        """The statuses that may follow, in the order of the table."""
        ways = ((status, self._via(status)) for status in FLOWS[self.kind])
        return tuple(status for status, via in ways if via and self._allows(status, via, None))

    def check_fields(self, status: str, names: Iterable[str]) -> None:
        """Refuse fields that the table does not declare for an event of this status. Raises as `propose`."""
        via = self._via(status)
        if via is None or not self._allows(status, via, None):
            raise IllegalTransition(self.allowed)
        declared = {"message", "progress", *FLOWS[self.kind][status].fields, *via.fields}
        for name in names:
            if name not in declared:
                raise InvalidEventField(name, f"This is not a field of {status}")

    def onward(self, fields: Mapping[str, Any]) -> str:
        """The status that follows once the work of the present stage has succeeded with these fields."""
        for status in FLOWS[self.kind]:
            via = self._via(status)
            if via is None or status in (self.status, FAILED):
                continue
            if self._allows(status, via, self._draft(status, via, "", fields)):
                return status
        raise IllegalTransition(self.allowed)

    def propose(
        self, status: str, at: datetime, images: Mapping[str, str] = NONE, **fields: Any
    ) -> tuple[Event, "Generation"]:
        """The next event, and the generation as it will be once the log has the event. Changes nothing.

        `images` names the stored pictures whose URLs are among `fields`; these are further fields of
        `domain.events.Event`. `message` and `progress` are the table's by default.

        Raises:
            IllegalTransition: the machine does not allow this status now.
            InvalidEventField: it does not allow it with these fields.
        """
        via = self._via(status)
        if via is None:
            raise IllegalTransition(self.allowed)
        if "progress" in fields and status != self.status:
            self._check_progress(status, fields["progress"])
        event = self._draft(status, via, timestamp(at), fields)
        if not self._allows(status, via, event):
            guard = GUARDS[via.guard] if via.guard else None
            if guard and guard.field:
                raise InvalidEventField(guard.field, guard.requirement)
            raise IllegalTransition(self.allowed)
        return event, self.after(event, images)

    def ending(self, failure: Failure) -> tuple[str, dict[str, Any]]:
        """The status in which the generation ends if its present stage fails, and the fields of that event.

        Where the table lets the generation survive the failure of this stage, it does, unless its owner cancelled it.
        """
        for status in FLOWS[self.kind] if failure.code != "cancelled" else ():
            via = self._via(status)
            if via and via.guard == "face_swap_failed":
                return status, {"face_swap_error": FaceSwapError(code=failure.code, message=failure.sentence)}
        return FAILED, failure.fields

    def after(self, event: Event, images: Mapping[str, str] = NONE) -> "Generation":
        """As it is after its next event, with the names of the pictures that this brings. Does not check either."""
        outcome = self.outcome
        if given := _OUTCOME & event.model_fields_set:
            outcome = {**outcome, **{name: value for name in given if (value := getattr(event, name)) is not None}}
        return Generation(
            self.generation_id, self.kind, self.user_id, self.request,
            event.status, event.progress, event.sequence, event.message,
            self.created_at or event.occurred_at, event.occurred_at,
            outcome, {**self.images, **images} if images else self.images, event.input or self.input,
        )  # fmt: skip

    def snapshot(self, expires_at: str | None = None, queue_position: int | None = None) -> Snapshot:
        """What clients get. `expires_at`: when a finished generation is removed."""
        given = self.input
        return Snapshot(
            **{name: getattr(self, name) for name in _SAME},
            expires_at=expires_at,
            queue_position=queue_position,
            metadata=self.request.metadata,
            input=given.model_copy(update={"images": []}) if given and self._ended_waiting else given,
            **self.outcome,
        )

    # The guards of the table: called with the proposed event, or with None to ask whether any event would do.

    def face_swap_requested(self, event: Event | None) -> bool:
        """A face swap was asked for."""
        return self.request.face_swap

    def face_swap_not_requested(self, event: Event | None) -> bool:
        """No face swap was asked for."""
        return not self.request.face_swap

    def face_swap_made(self, event: Event | None) -> bool:
        """The event brings no reason why there is no swapped picture."""
        return event is None or event.face_swap_error is None

    def face_swap_failed(self, event: Event | None) -> bool:
        """The event brings the reason why there is no swapped picture."""
        return event is None or event.face_swap_error is not None

    def progress_rises(self, event: Event | None) -> bool:
        """The event's percentage is higher, and below the next stage's."""
        limit = ceiling(self.kind, self.status)
        return self.progress < (limit - 1 if event is None else event.progress) < limit

    def _via(self, status: str) -> Via | None:
        """How this status is reached from the present one. ``None``: there is no such move."""
        return _VIAS[self.kind].get((self.status, status))

    def _allows(self, status: str, via: Via, event: Event | None) -> bool:
        """Whether the machine makes this move with this event."""
        guards = via.guard is None or getattr(self, via.guard)(event)
        return _allows(self.kind, self.status, status, guards)

    def _check_progress(self, status: str, progress: int) -> None:
        """The percentage on entering a stage has to lie within it. (A repeat has its guard.)"""
        stage = FLOWS[self.kind][status]
        low = self.progress if stage.progress is None else stage.progress
        high = low if stage.terminal else ceiling(self.kind, status) - 1
        if not low <= progress <= high:
            reason = f"This has to be {low}" if low == high else f"This has to be from {low} to {high}"
            raise InvalidEventField("progress", reason)

    def _draft(self, status: str, via: Via, occurred_at: str, fields: Mapping[str, Any]) -> Event:
        stage = FLOWS[self.kind][status]
        names = (*stage.fields, *via.fields)
        known = self.outcome and {name: value for name, value in self.outcome.items() if name in names}
        event = {
            "progress": self.progress if stage.progress is None else stage.progress,
            "message": via.message or stage.message,
            **known,
            **fields,
            "generation_id": self.generation_id,
            "kind": self.kind,
            "sequence": self.sequence + 1,
            "status": status,
            "occurred_at": occurred_at,
            "metadata": self.request.metadata,
        }
        if status == FAILED:
            event["failed_stage"] = self.status
        return validated(event)


#: What a `Snapshot` has just as its `Generation`.
_SAME: Final = tuple(name for name in _Header.model_fields if name in Generation.__slots__)
