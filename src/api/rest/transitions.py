"""HTTP: what a pipeline of the user's own reports of its work."""

from typing import Annotated, Final

from fastapi import APIRouter, Request, Response
from pydantic import Field, JsonValue, StrictInt, StringConstraints

from api.auth import PROBLEMS, Caller, service_only
from api.rest.bodies import json_body, read_json
from api.rest.forms import HttpUrl
from api.rest.generations import GenerationId
from api.rest.problems import documented
from api.rest.state import UseCases
from domain.errors import FailureCode
from domain.events import Event, FaceSwapError, Wire
from domain.stages import FLOWS

router: Final = APIRouter(tags=["generations"])

_STATUSES: Final[list[JsonValue]] = list(dict.fromkeys(status for flow in FLOWS.values() for status in flow))
_Sentence = Annotated[str, StringConstraints(min_length=1, max_length=500)]


class Transition(Wire):
    """What comes next, and what has been found."""

    status: Annotated[str, Field(min_length=1, max_length=64, json_schema_extra={"enum": _STATUSES})]
    sequence: Annotated[
        StrictInt | None, Field(ge=1, description="the number that this event would get; another: `409 conflict`")
    ] = None
    progress: Annotated[
        StrictInt | None, Field(ge=0, le=100, description="within the stage; by default as the table has it")
    ] = None
    message: Annotated[_Sentence | None, Field(description="by default as the table has it")] = None
    composition_url: HttpUrl | None = None
    preview_url: HttpUrl | None = None
    edited_image_url: HttpUrl | None = None
    generated_image_url: HttpUrl | None = None
    face_swap_url: HttpUrl | None = None
    face_swap_error: FaceSwapError | None = None
    error: Annotated[_Sentence | None, Field(description="of `failed`: a sentence fit to show to the owner")] = None
    code: Annotated[FailureCode | None, Field(description="of `failed`; by default internal, not retryable")] = None


@router.post(
    "/generations/{generation_id}/transitions",
    response_model=Event,
    responses=documented(
        "bad_request",
        "not_found",
        "conflict",
        "request_timeout",
        "illegal_transition",
        "not_external",
        "content_too_large",
        "invalid_request",
        *PROBLEMS,
    ),
    dependencies=[service_only],
    openapi_extra=json_body(Transition),
)
async def report_transition(
    request: Request, generation_id: GenerationId, caller: Caller, workflow: UseCases
) -> Response:
    """Move a generation on that was started with `runner=external`. The same again answers the same event."""
    said = await read_json(request, Transition)
    fields = {name: getattr(said, name) for name in said.model_fields_set - {"status", "sequence"}}
    entry = await workflow.report(
        caller,
        generation_id,
        said.status,
        {name: value for name, value in fields.items() if value is not None},
        content=said.model_dump_json(exclude_none=True).encode(),
        sequence=said.sequence,
    )
    return Response(entry.event, media_type="application/json")
