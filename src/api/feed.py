"""HTTP: the caller's feed, for clients that poll."""

from typing import Annotated, Final

from fastapi import APIRouter, Query, Response
from pydantic_core import to_json

from api.auth import PROBLEMS, Caller
from api.problems import documented
from api.schemas import FeedPage, json_response, named
from api.state import Feeds, UseCases

router: Final = APIRouter(tags=["generations"])


@router.get("/events", response_model=FeedPage, responses=documented("invalid_request", *PROBLEMS))
async def get_feed(
    caller: Caller,
    workflow: UseCases,
    feeds: Feeds,
    after: Annotated[str | None, Query(description="a cursor, of this route or of Socket.IO")] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 200,
) -> Response:
    """What has happened since a cursor, in all of the caller's generations. Without one: how things stand now."""
    stretch = None if after is None else await feeds.read(caller, after, limit)
    if stretch is None:
        cursor = await feeds.present(caller)  # Before the snapshots: what comes in between is told twice, not never.
        return json_response(FeedPage(recovered=False, cursor=cursor, generations=list(await workflow.recent(caller))))
    body = b'{"recovered":true,"cursor":%b,"events":[%b]}' % (to_json(stretch.cursor), named(stretch.events))
    return Response(body, media_type="application/json")
