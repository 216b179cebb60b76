"""HTTP: the caller's feed, for clients that poll."""

from typing import Annotated, Final

from fastapi import Query, Response
from pydantic_core import to_json

from api.auth import PROBLEMS, StreamIdentity
from api.rest import routes
from api.rest.problems import documented
from api.rest.schemas import STREAM, VARY, FeedPage, Json, LastEventId, json_response, named
from api.rest.state import Feeds, UseCases

router: Final = routes.router("generations")


@router.get(
    "/events",
    response_model=FeedPage,
    responses={**STREAM, **documented("invalid_request", *PROBLEMS)},
)
async def get_feed(
    identity: StreamIdentity,
    workflow: UseCases,
    feeds: Feeds,
    after: Annotated[str | None, Query(description="a cursor from this route or from Socket.IO")] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 200,
    _: LastEventId = None,
) -> Response:
    """The events of all of the caller's generations after a cursor. Without one: the current generations.

    With `Accept: text/event-stream`: a stream of these events, and of those to come.
    """
    caller = identity.user_id
    page = None if after is None else await feeds.read(caller, after, limit)
    if page is None:
        cursor = await feeds.head_cursor(caller)  # Before the snapshots, so that nothing in between is missed.
        present = FeedPage(recovered=False, cursor=cursor, generations=list(await workflow.recent(caller)))
        return json_response(present, 200, VARY)
    body = b'{"recovered":true,"cursor":%b,"events":[%b]}' % (to_json(page.cursor), named(page.events))
    return Json(body, 200, VARY)
