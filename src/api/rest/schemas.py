"""The response models beside the generation, and their JSON."""

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from fastapi import Header, Response
from pydantic import BaseModel, Field, RootModel, StrictInt

from domain.events import CONTINUE, Event, Wire, event_name
from domain.feed import Logged
from domain.generation import Snapshot
from domain.stage_times import StageTimes
from domain.stages import FLOWS, GUARDS, Kind, moves

#: A number, sent as a string.
_Number = Annotated[str, Field(coerce_numbers_to_str=True)]


class GenerationPage(Wire):
    """The caller's generations, newest first."""

    generations: list[Snapshot]
    next: Annotated[_Number | None, Field(description="if there are more: `before` of the following page")] = None


class NamedEvent(Wire):
    """An event, and the name of the Socket.IO event that carries it."""

    event: Literal["generation_started", "continue", "generation_completed", "generation_failed"]
    data: Event


class EventPage(Wire):
    """One generation's events, in order."""

    generation_id: str
    status: Annotated[str, Field(description="the generation's status now")]
    events: list[NamedEvent]


class FeedPage(Wire):
    """The caller's events after a cursor; if it is not usable, the current generations."""

    recovered: Annotated[bool, Field(description="whether the cursor was usable, so that nothing was missed")]
    cursor: Annotated[str, Field(description="`after` of the next request")]
    events: Annotated[list[NamedEvent] | None, Field(description="if recovered")] = None
    generations: Annotated[
        list[Snapshot] | None,
        Field(description="if not recovered: the active ones and the last 20 finished, newest first"),
    ] = None


class CancelOutcome(Wire):
    """The outcome of a cancellation."""

    outcome: Literal["cancelled", "already_finished"]


class Account(Wire):
    """The caller and the balance."""

    user_id: str
    credit: Annotated[int | None, Field(description="absent if no balances are kept")] = None


class Grant(Wire):
    """A change of a balance."""

    amount: Annotated[StrictInt, Field(ge=-1_000_000_000, le=1_000_000_000, description="below 0: taken back")]


class StageView(Wire):
    """One stage of the table."""

    status: str
    progress: Annotated[int | None, Field(description="on entering; absent: as reached so far")] = None
    message: Annotated[str, Field(description="on entering")]
    event: Annotated[str, Field(description="the Socket.IO event that carries it", examples=[CONTINUE])]
    next: Annotated[list[str], Field(description="the statuses that may follow")]
    conditions: Annotated[
        dict[str, str] | None, Field(description="the conditions on which one may follow, by status")
    ] = None
    messages: Annotated[
        dict[str, str] | None, Field(description="the messages with which one follows, if they differ, by status")
    ] = None
    repeats: Annotated[bool, Field(description="whether it may follow itself with higher progress")]
    terminal: Annotated[bool, Field(description="whether no stage may follow")]
    typical_seconds: Annotated[
        float | None,
        Field(description="the median on this node since its start; absent if it has run less than five times"),
    ] = None


class Stages(RootModel[dict[Kind, list[StageView]]]):
    """The declared sequences, by kind."""


class Version(Wire):
    """The version of the running service."""

    version: Annotated[str, Field(examples=["1.0.0"])]


class Health(Wire):
    """The service answers."""

    status: Literal["live", "ready"]
    parts: Annotated[
        dict[str, str] | None,
        Field(description="of `ready`: every background task by name, `ok` or the code of what fails"),
    ] = None


def _stage_view(kind: Kind, status: str, times: StageTimes) -> StageView:
    stage = FLOWS[kind][status]
    onward = {move.status: move.via for move in moves(kind) if move.source == status != move.status}
    return StageView(
        status=status,
        progress=stage.progress,
        message=stage.message,
        event=event_name(status),
        next=list(onward),
        conditions={to: GUARDS[via.guard].condition for to, via in onward.items() if via.guard} or None,
        messages={to: via.message for to, via in onward.items() if via.message} or None,
        repeats=stage.repeats,
        terminal=stage.terminal,
        typical_seconds=times.typical(kind, status),
    )


def stages(times: StageTimes) -> Stages:
    """The declared sequences, and how long their stages take."""
    return Stages({kind: [_stage_view(kind, status, times) for status in flow] for kind, flow in FLOWS.items()})


#: What OpenAPI says of a route that also answers with an event stream: its content, and the header of a reconnect.
STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "the events; with `Accept: text/event-stream` also those to come",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "headers": {"Vary": {"description": "Accept", "schema": {"type": "string"}}},
    }
}
LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", description="of a stream: the `id` of the last event; it comes before `after`"),
]
#: A header of the JSON of such a route.
VARY: Final = (b"vary", b"Accept")


def named(entries: Iterable[Logged]) -> bytes:
    """The JSON of these as `NamedEvent`, comma-separated, around the events' own bytes."""
    return b",".join(
        b'{"event":"%b","data":%b}' % (entry.name.encode(), entry.event) for entry in entries if entry.event
    )


class Json(Response):
    """JSON that is bytes already, with its headers as ASGI has them."""

    background = None

    def __init__(self, body: bytes, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
        self.body = body
        self.status_code = status
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json"), *headers]


def json_response(content: BaseModel, status: int = 200, *headers: tuple[bytes, bytes]) -> Response:
    """The model's JSON without absent values."""
    return Json(content.__pydantic_serializer__.to_json(content, by_alias=True, exclude_none=True), status, *headers)
