"""HTTP: the reports of an owner's own pipeline."""

from typing import Annotated, Final

from fastapi import Request, Response
from pydantic import Field, JsonValue, StrictInt, StringConstraints

from api.auth import PROBLEMS, Caller, service_only
from api.rest import bodies, routes
from api.rest.forms import HttpUrl
from api.rest.generations import GenerationId
from api.rest.problems import documented
from api.rest.schemas import Json
from api.rest.state import UseCases
from domain.errors import FailureCode
from domain.events import Event, FaceSwapError, Wire
from domain.stages import FLOWS

router: Final = routes.router("generations")

_STATUSES: Final[list[JsonValue]] = list(dict.fromkeys(status for flow in FLOWS.values() for status in flow))
_Sentence = Annotated[str, StringConstraints(min_length=1, max_length=500)]


class Transition(Wire):
    """The next event of an external generation."""

    status: Annotated[str, Field(min_length=1, max_length=64, json_schema_extra={"enum": _STATUSES})]
    sequence: Annotated[
        StrictInt | None, Field(ge=1, description="the number that this event would get; another: `409 conflict`")
    ] = None
    progress: Annotated[
        StrictInt | None, Field(ge=0, le=100, description="within the stage; by default that of the table")
    ] = None
    message: Annotated[_Sentence | None, Field(description="by default that of the table")] = None
    composition_url: HttpUrl | None = None
    preview_url: HttpUrl | None = None
    edited_image_url: HttpUrl | None = None
    generated_image_url: HttpUrl | None = None
    face_swap_url: HttpUrl | None = None
    face_swap_error: FaceSwapError | None = None
    error: Annotated[_Sentence | None, Field(description="of `failed`: a sentence for the owner")] = None
    code: Annotated[FailureCode | None, Field(description="of `failed`; by default internal, not retryable")] = None


@router.post(
    "/generations/{generation_id}/transitions",
    response_model=Event,
    responses=documented(*bodies.PROBLEMS, "not_found", "conflict", "illegal_transition", "not_external", *PROBLEMS),
    dependencies=[service_only],
    openapi_extra=bodies.json_body(Transition),
)
async def report_transition(
    request: Request, generation_id: GenerationId, caller: Caller, workflow: UseCases
) -> Response:
    """Report a transition of a generation that was started with `runner=external`. A repeat returns the same event."""
    report = await bodies.read_json(request, Transition)
    given = {name: value for name, value in vars(report).items() if value is not None}
    status, sequence = given.pop("status"), given.pop("sequence", None)
    content = report.model_dump_json(exclude_none=True).encode()
    history = await workflow.summary(caller, generation_id)
    entry = await workflow.external.report(history, status, given, content=content, sequence=sequence)
    return Json(entry.event or b"")
