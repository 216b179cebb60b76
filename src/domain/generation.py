"""One generation: folded from its events, and moved by the `transitions` machine of its flow."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, Self, cast

from pydantic import JsonValue
from transitions import Machine, Transition

from domain.errors import Failure, IllegalTransition, InvalidEventField
from domain.events import URL_FIELDS, Event, FaceSwapError, Outcome, Wire, timestamp
from domain.requests import Order
from domain.stages import BEGIN, FAILED, FLOWS, GUARDS, Kind, Via, ceiling, moves


class _Transition(Transition):
    """A transition that knows its place in the table."""

    def __init__(self, *args: Any, via: Via, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.via = via


class _Machine(Machine):
    transition_cls = _Transition


def _machine(kind: Kind) -> Machine:
    """A rule book, shared by all generations of a kind: a move's trigger is the status it leads to."""
    return _Machine(
        model=None,
        states=[BEGIN, *FLOWS[kind]],
        initial=BEGIN,
        transitions=[
            {"trigger": to, "source": source, "dest": to, "conditions": via.guard, "via": via}
            for source, to, via in moves(kind)
        ],
        auto_transitions=False,
        model_attribute="status",
    )


_MACHINES: Final[Mapping[Kind, Machine]] = {kind: _machine(kind) for kind in FLOWS}


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
    metadata: dict[str, JsonValue] | None = None


class Snapshot(Outcome, _Header):
    """A generation as it is now: the fold of its events."""


class Generation:
    """The state of one generation. It changes only by `apply`, and only `propose` makes events for it."""

    __slots__ = (
        "created_at",
        "face_swap_error",
        "face_swap_wanted",
        "failure",
        "generation_id",
        "image_urls",
        "kind",
        "message",
        "metadata",
        "progress",
        "sequence",
        "status",
        "updated_at",
        "urls",
        "user_id",
    )

    def __init__(self, generation_id: str, kind: Kind, user_id: str, order: Order) -> None:
        self.generation_id = generation_id
        self.kind: Kind = kind
        self.user_id = user_id
        self.face_swap_wanted = order.face_swap
        self.image_urls = order.image_urls
        self.metadata = order.metadata
        self.status = BEGIN
        self.progress = 0
        self.sequence = 0
        self.message = ""
        self.created_at = ""
        self.updated_at = ""
        self.urls: dict[str, str] = {}
        self.face_swap_error: FaceSwapError | None = None
        #: The terminal ``failed`` event, where that is how it ended.
        self.failure: Event | None = None

    @property
    def needs_fetching(self) -> bool:
        """Whether the next work on it begins with fetching image URLs."""
        return bool(self.image_urls) and "composition_url" not in self.urls

    @classmethod
    def fold(cls, generation_id: str, kind: Kind, user_id: str, order: Order, events: Iterable[Event]) -> Self:
        """The generation that these events, from the first one on, have made."""
        generation = cls(generation_id, kind, user_id, order)
        for event in events:
            generation.apply(event)
        return generation

    @property
    def finished(self) -> bool:
        """Whether nothing may follow any more."""
        return self.status != BEGIN and FLOWS[self.kind][self.status].terminal

    @property
    def allowed(self) -> tuple[str, ...]:
        """The statuses that may follow the present one, in the order of the table."""
        return tuple(status for status in FLOWS[self.kind] if self._via(status) and self._after(status, None))

    def check_fields(self, status: str, names: Iterable[str]) -> None:
        """Refuse fields that the table does not declare for an event of this status. Raises as `propose`."""
        via = self._via(status)
        if via is None or self._after(status, None) is None:
            raise IllegalTransition(self.status, status, self.allowed)
        declared = {"message", "progress", *FLOWS[self.kind][status].fields, *via.fields}
        for name in names:
            if name not in declared:
                raise InvalidEventField(self.status, status, self.allowed, name, f"This is not told with {status}")

    def onward(self, fields: Mapping[str, Any]) -> str:
        """The status that comes next when the work of the stage brought these fields and did not fail."""
        for status in FLOWS[self.kind]:
            via = self._via(status)
            if via is None or status in (self.status, FAILED):
                continue
            if self._after(status, self._draft(status, via, "", fields)):
                return status
        raise IllegalTransition(self.status, "", self.allowed)

    def propose(self, status: str, at: datetime, **fields: Any) -> tuple[Event, "Generation"]:
        """The next event, and the generation as it will be once the log has taken it. Changes nothing.

        `fields` are further fields of `domain.events.Event`; `message` and `progress` are the table's unless given.

        Raises:
            IllegalTransition: the machine does not allow this status now.
            InvalidEventField: it does not allow it with these fields.
        """
        via = self._via(status)
        if via is None:
            raise IllegalTransition(self.status, status, self.allowed)
        if "progress" in fields and status != self.status:
            self._check_progress(status, fields["progress"])
        event = self._draft(status, via, timestamp(at), fields)
        after = self._after(status, event)
        if after is None:
            guard = GUARDS[via.guard] if via.guard else None
            if guard and guard.field:
                raise InvalidEventField(self.status, status, self.allowed, guard.field, guard.requirement)
            raise IllegalTransition(self.status, status, self.allowed)
        after.apply(event)
        return event, after

    def ending(self, failure: Failure) -> tuple[str, dict[str, Any]]:
        """How the generation ends now that its present stage has failed: the status, and its event's fields.

        Where the table lets the generation survive the failure of this stage, it does, unless its owner cancelled it.
        """
        for status in FLOWS[self.kind] if failure.code != "cancelled" else ():
            via = self._via(status)
            if via and via.guard == "face_swap_failed":
                return status, {"face_swap_error": FaceSwapError(code=failure.code, message=failure.sentence)}
        return FAILED, self.failing(failure)

    def failing(self, failure: Failure) -> dict[str, Any]:
        """The fields of the event that ends the generation in ``failed``."""
        return {"error": failure.sentence, "code": failure.code, "retryable": failure.retryable}

    def apply(self, event: Event) -> None:
        """Take an event that the log holds: the fold's one step. It never asks whether the event was legal."""
        if not self.created_at:
            self.created_at = event.occurred_at
        self.status = event.status
        self.progress = event.progress
        self.sequence = event.sequence
        self.message = event.message
        self.updated_at = event.occurred_at
        found = {name: url for name in URL_FIELDS if (url := getattr(event, name)) is not None}
        if found:
            self.urls = self.urls | found
        self.face_swap_error = event.face_swap_error or self.face_swap_error
        if event.status == FAILED:
            self.failure = event

    def snapshot(self, expires_at: str | None = None) -> Snapshot:
        """What `GET /generations/<id>` answers."""
        failure = self.failure
        return Snapshot(
            generation_id=self.generation_id,
            user_id=self.user_id,
            kind=self.kind,
            status=self.status,
            progress=self.progress,
            message=self.message,
            sequence=self.sequence,
            created_at=self.created_at,
            updated_at=self.updated_at,
            expires_at=expires_at,
            metadata=self.metadata,
            face_swap_error=self.face_swap_error,
            error=failure and failure.error,
            code=failure and failure.code,
            failed_stage=failure and failure.failed_stage,
            retryable=failure and failure.retryable,
            **self.urls,
        )

    # The guards of the table. Called by the machine with the proposed event, and with None to ask
    # whether such an event could exist at all.

    def face_swap_asked(self, event: Event | None) -> bool:
        """A face swap was asked for."""
        return self.face_swap_wanted

    def face_swap_not_asked(self, event: Event | None) -> bool:
        """No face swap was asked for."""
        return not self.face_swap_wanted

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
        event = _MACHINES[self.kind].events.get(status)
        found = event and event.transitions.get(self.status)
        return cast(_Transition, found[0]).via if found else None

    def _after(self, status: str, event: Event | None) -> "Generation | None":
        """A copy that the machine has moved to this status. ``None``: the guard does not hold."""
        after = self._copy()
        return after if _MACHINES[self.kind].events[status].trigger(after, event) else None

    def _check_progress(self, status: str, progress: int) -> None:
        """The percentage on entering a stage has to lie within it. (A repeat has its guard.)"""
        stage = FLOWS[self.kind][status]
        low = self.progress if stage.progress is None else stage.progress
        high = low if stage.terminal else ceiling(self.kind, status) - 1
        if not low <= progress <= high:
            reason = f"This has to be {low}" if low == high else f"This has to be from {low} to {high}"
            raise InvalidEventField(self.status, status, self.allowed, "progress", reason)

    def _draft(self, status: str, via: Via, occurred_at: str, fields: Mapping[str, Any]) -> Event:
        stage = FLOWS[self.kind][status]
        known = {name: self.urls[name] for name in stage.fields + via.fields if name in self.urls}
        return Event(
            **{
                "progress": self.progress if stage.progress is None else stage.progress,
                "message": via.message or stage.message,
                **known,
                **fields,
            },
            generation_id=self.generation_id,
            kind=self.kind,
            sequence=self.sequence + 1,
            status=status,
            occurred_at=occurred_at,
            metadata=self.metadata,
            failed_stage=self.status if status == FAILED else None,
        )

    def _copy(self) -> "Generation":
        copy = object.__new__(Generation)
        for name in Generation.__slots__:
            setattr(copy, name, getattr(self, name))
        return copy
