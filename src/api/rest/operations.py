"""HTTP: what operators and their monitoring read. For services."""

from typing import Final

from fastapi import Request, Response

from api.auth import PROBLEMS, service_only
from api.rest import routes
from api.rest.problems import documented

router: Final = routes.router("operations", dependencies=[service_only])


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
    response: Response = await request.app.state.metrics()
    return response
