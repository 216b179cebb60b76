"""HTTP: what operators and their monitoring read. For services."""

from typing import Annotated, Final, Literal

from fastapi import Query, Request, Response

from api.auth import PROBLEMS, service_only
from api.rest import routes
from api.rest.generations import Before
from api.rest.metrics import render
from api.rest.problems import documented
from api.rest.schemas import GenerationPage, json_response
from api.rest.state import Overviews
from domain.errors import FailureCode
from domain.identity import user_id
from domain.overview import Numbers
from domain.ports.overview import Filter
from domain.stages import FLOWS, Kind

router: Final = routes.router("operations", dependencies=[service_only])

_STATUSES: Final = ("active", "finished", *dict.fromkeys(status for flow in FLOWS.values() for status in flow))


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **documented(*PROBLEMS),
    },
)
async def get_metrics(request: Request) -> Response:
    """The metrics of this node. For services."""
    return await render(request.app.state.service)


@router.get("/admin/overview", response_model=Numbers, responses=documented(*PROBLEMS))
async def get_overview(overview: Overviews) -> Response:
    """The nodes and their clients, the work, and the failures of the last hour. For services."""
    return json_response(await overview.numbers())


@router.get("/admin/generations", response_model=GenerationPage, responses=documented("invalid_request", *PROBLEMS))
async def list_all_generations(
    overview: Overviews,
    generation_id: Annotated[
        str | None, Query(alias="id", pattern="^[a-z0-9_]{1,128}$", description="only this one")
    ] = None,
    user: Annotated[str | None, Query(description="only those of this user")] = None,
    kind: Annotated[Kind | None, Query()] = None,
    status: Annotated[
        Literal[_STATUSES] | None,  # type: ignore[valid-type]  # made from the table
        Query(description="`active`, `finished`, or the status of a stage"),
    ] = None,
    code: Annotated[FailureCode | None, Query(description="only those that failed with this code")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Before = None,
) -> Response:
    """The generations of all users, newest first. For services."""
    wanted = Filter(generation_id, None if user is None else user_id(user), kind, status, code)
    page = await overview.page(wanted, before=before, limit=limit)
    return json_response(GenerationPage(**page._asdict()))
