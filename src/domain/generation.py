"""One generation: folded from its events, and moved by the `transitions` machine of its flow."""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final, Self

from pydantic import JsonValue
from transitions import Machine, MachineError

from domain.errors import Failure, FailureCode, IllegalTransition, UnfitFact
from domain.events import URL_FIELDS, Event, FaceSwapError, Wire, event_name, timestamp
from domain.orders import Order
from domain.stages import BEGIN, FAILED, FLOWS, Kind, Move, ceiling, moves


def _machine(kind: Kind) -> Machine:
    """A rule book, shared by all generations of a kind: a move's trigger is the status it leads to."""
    return Machine(
        model=None,
        states=[BEGIN, *FLOWS[kind]],
        initial=BEGIN,
        transitions=[
            {"trigger": move.status, "source": move.source, "dest": move.status, "conditions": move.via.guard}
            for move in moves(kind)
        ],
        auto_transitions=False,
        model_attribute="status",
    )


_MACHINES: Final[Mapping[Kind, Machine]] = {kind: _machine(kind) for kind in FLOWS}
_MOVES: Final[Mapping[Kind, Mapping[tuple[str, str], Move]]] = {
    kind: {(move.source, move.status): move for move in moves(kind)} for kind in FLOWS
}

#: Which facts known so far an event carries, by the Socket.IO event that carries it; the others stay behind.
_KNOWN: Final = {
    "generation_started": ("input_image",),
    "continue": ("composition_url", "preview_url", "edited_image_url", "face_swap_url"),
    "generation_completed": ("composition_url", "edited_image_url", "generated_image_url", "face_swap_url"),
    "generation_failed": (),
}

#: What else an event may bring.
_BRINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "generation_completed": ("face_swap_error",),
    "generation_failed": ("error", "code"),
}
_ONLY: Final[Mapping[str, Kind]] = {
    "edited_image_url": "edit",
    "face_swap_url": "edit",
    "face_swap_error": "edit",
    "generated_image_url": "generate",
}
#: Which fact a guard asks for, and what it has to be.
_ASKED: Final = {
    "face_swap_failed": ("face_swap_error", "This says why there is no picture with the face"),
    "progress_rises": ("progress", "This has to rise, and to stay below that of the next stage"),
}


def facts_of(kind: Kind, status: str) -> tuple[str, ...]:
    """Which facts an event of this status may bring, by their names in `domain.events.Event`."""
    name = event_name(status)
    return tuple(fact for fact in (*_KNOWN[name], *_BRINGS.get(name, ())) if _ONLY.get(fact, kind) == kind)


class Snapshot(Wire):
    """A generation as it is now: the fold of its events."""

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
    input_image: str | None = None
    composition_url: str | None = None
    preview_url: str | None = None
    edited_image_url: str | None = None
    generated_image_url: str | None = None
    face_swap_url: str | None = None
    face_swap_error: FaceSwapError | None = None
    error: str | None = None
    code: FailureCode | None = None
    failed_stage: str | None = None
    retryable: bool | None = None


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
        return tuple(
            move.status
            for move in _MOVES[self.kind].values()
            if move.source == self.status and self._holds(move.via.guard, None)
        )

    def onward(self, facts: Mapping[str, Any]) -> str:
        """The status that comes next when these facts have been found and nothing failed."""
        for move in _MOVES[self.kind].values():
            if move.source == self.status and move.status not in (self.status, FAILED):
                event = self._draft(move, "", facts)
                if self._holds(move.via.guard, event):
                    return move.status
        raise IllegalTransition(self.status, "", self.allowed)

    def propose(self, status: str, at: datetime, **facts: Any) -> tuple[Event, "Generation"]:
        """The next event, and the generation as it will be once the log has taken it. Changes nothing.

        `facts` are further fields of `domain.events.Event`; `message` and `progress` are the table's unless given.

        Raises:
            IllegalTransition: the machine does not allow this status now.
            UnfitFact: it does not allow it with these facts.
        """
        move = _MOVES[self.kind].get((self.status, status))
        if move is None:
            raise IllegalTransition(self.status, status, self.allowed)
        self._check_progress(move, facts)
        event = self._draft(move, timestamp(at), facts)
        after = self._copy()
        try:
            moved = _MACHINES[self.kind].events[status].trigger(after, event)
        except MachineError:
            moved = False
        if not moved:
            if move.via.guard in _ASKED:
                raise UnfitFact(self.status, status, self.allowed, *_ASKED[move.via.guard])
            raise IllegalTransition(self.status, status, self.allowed)
        after.apply(event)
        return event, after

    def ending(self, failure: Failure) -> tuple[str, dict[str, Any]]:
        """How the generation ends now that its present stage has failed: the status, and its event's facts.

        Where the table lets the generation survive the failure of this stage, it does, unless its owner cancelled it.
        """
        for move in _MOVES[self.kind].values():
            if failure.code == "cancelled":
                break
            if move.source == self.status and move.via.guard == "face_swap_failed":
                error = FaceSwapError(code=failure.code, message=failure.sentence)
                return move.status, {"face_swap_error": error}
        return FAILED, self.failing(failure)

    def failing(self, failure: Failure) -> dict[str, Any]:
        """The facts of the event that ends the generation in ``failed``."""
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

    def _holds(self, guard: str | None, event: Event | None) -> bool:
        if guard is None:
            return True
        check: Callable[[Event | None], bool] = getattr(self, guard)
        return check(event)

    def _check_progress(self, move: Move, facts: Mapping[str, Any]) -> None:
        """Whoever says how far a stage has come on entering it stays within the stage. (A repeat has its guard.)"""
        if "progress" not in facts or move.source == move.status:
            return
        stage = FLOWS[self.kind][move.status]
        low = self.progress if stage.progress is None else stage.progress
        high = low if stage.terminal else ceiling(self.kind, move.status) - 1
        if not low <= facts["progress"] <= high:
            reason = f"This has to be {low}" if low == high else f"This has to be from {low} to {high}"
            raise UnfitFact(self.status, move.status, self.allowed, "progress", reason)

    def _draft(self, move: Move, occurred_at: str, facts: Mapping[str, Any]) -> Event:
        stage = FLOWS[self.kind][move.status]
        known = {name: self.urls[name] for name in _KNOWN[event_name(move.status)] if name in self.urls}
        return Event(
            **{
                "progress": self.progress if stage.progress is None else stage.progress,
                "message": move.via.message or stage.message,
                **known,
                **facts,
            },
            generation_id=self.generation_id,
            kind=self.kind,
            sequence=self.sequence + 1,
            status=move.status,
            occurred_at=occurred_at,
            metadata=self.metadata,
            failed_stage=self.status if move.status == FAILED else None,
        )

    def _copy(self) -> "Generation":
        copy = object.__new__(Generation)
        for name in Generation.__slots__:
            setattr(copy, name, getattr(self, name))
        return copy
