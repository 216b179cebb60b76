"""``GET /events`` and ``GET /generations/<id>/events`` as event streams, for requests that accept one."""

import re
from typing import Annotated, Final

from fastapi import Query, Request, Response
from pydantic_core import to_json
from starlette.types import Scope

from api.auth import StreamIdentity
from api.realtime.sockets import welcome_of
from api.rest import headers, routes
from api.rest.generations import After, GenerationId
from api.rest.problems import is_temporary
from api.rest.schemas import LastEventId
from api.rest.state import Feeds, Streams, UseCases
from api.sse.blocks import CURSOR_AS_ID, SEQUENCE_AS_ID, block
from api.sse.streams import try_again
from api.wiring import BoundedSendBuffer
from domain.device import Device
from domain.errors import Refusal

#: An element of ``Accept`` that names the media type of event streams, without q=0.
_STREAM: Final = re.compile(r"\s*text/event-stream\s*(;(?!\s*q\s*=\s*0(\.0*)?\s*(;|$))[^;]*)*", re.IGNORECASE)
_SEQUENCE: Final = re.compile("[0-9]{1,18}")


class _StreamRoute(routes.Route):
    """Matches only requests that accept an event stream; the others go to the route of the same path."""

    def accepts(self, scope: Scope) -> bool:
        return any(map(_STREAM.fullmatch, ",".join(headers.values(scope, b"accept")).split(",")))

    async def answer(self, request: Request) -> Response:
        """The stream; an empty one, after which the client tries again, if the service refuses for a while."""
        try:
            return await super().answer(request)
        except Refusal as refusal:
            if not is_temporary(refusal.code):
                raise
            return try_again()


router: Final = routes.router(route_class=_StreamRoute, include_in_schema=False)


@router.get("/events")
async def stream_feed(
    identity: StreamIdentity,
    streams: Streams,
    workflow: UseCases,
    feeds: Feeds,
    after: Annotated[str | None, Query()] = None,
    last_event_id: LastEventId = None,
) -> Response:
    """Everything after a cursor, from all of the caller's generations. Without a cursor: as Socket.IO."""
    start = await feeds.open(identity, last_event_id or after)
    generations = await workflow.recent(identity.user_id)

    def join(buffer: BoundedSendBuffer[bytes]) -> Device[bytes]:
        device = streams.hub.join(identity.user_id, buffer, CURSOR_AS_ID, start)
        buffer.put(block("authenticated", to_json(welcome_of(device, identity, generations)), device.cursor))
        return device

    return await streams.response(identity, join)


@router.get("/generations/{generation_id}/events")
async def stream_generation(
    generation_id: GenerationId,
    identity: StreamIdentity,
    streams: Streams,
    workflow: UseCases,
    after: After = 0,
    last_event_id: LastEventId = None,
) -> Response:
    """The generation's events with a higher sequence, until the terminal one."""
    history = await workflow.history(identity.user_id, generation_id)
    if last_event_id and _SEQUENCE.fullmatch(last_event_id):
        after = int(last_event_id)
    last = history.events[-1]
    if last.position == last.end and after >= last.sequence:
        return Response(status_code=204, headers={"Cache-Control": "no-store", "Vary": "Accept"})

    def join(buffer: BoundedSendBuffer[bytes]) -> Device[bytes]:
        return streams.hub.join_generation(identity.user_id, buffer, SEQUENCE_AS_ID, generation_id, after)

    return await streams.response(identity, join)
