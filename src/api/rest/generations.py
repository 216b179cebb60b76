"""HTTP: start, read, cancel and delete generations."""

import re
from functools import partial
from typing import Annotated, Any, Final, Literal

from fastapi import Header, Path, Query, Request, Response
from pydantic import AfterValidator
from pydantic_core import from_json, to_json

from api.auth import PROBLEMS, Caller, Identified, StreamIdentity, require_service
from api.rest import bodies, routes, schemas
from api.rest.forms import form_body, read_form
from api.rest.multipart import spool
from api.rest.problems import documented
from api.rest.state import UseCases
from domain.errors import NotFound
from domain.generation import Snapshot
from domain.identity import Identity
from domain.stages import Kind
from domain.workflow import Workflow

router: Final = routes.router("generations")

_ID: Final = re.compile(r"(edit|gen)_[0-9]{1,15}_[a-z0-9]{16,64}")
_MAX_INT: Final = 2**63 - 1


def _known_shape(generation_id: str) -> str:
    if _ID.fullmatch(generation_id) is None:
        raise NotFound
    return generation_id


GenerationId = Annotated[str, Path(examples=["edit_1763829000123_k3v9x2ab4c6d8e0f"]), AfterValidator(_known_shape)]
Before = Annotated[int | None, Query(ge=1, le=_MAX_INT, description="`next` of the page before")]
After = Annotated[int, Query(ge=0, le=_MAX_INT, description="only those with a higher sequence")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern="^[ -~]*$",
        description="a repeat of the request with the same key returns the generation that it started",
    ),
]

Runner = Annotated[
    Literal["external"] | None,
    Query(description="for services: your own pipeline does the work and reports it to `/transitions`"),
]

_ACCEPTED: Final[dict[int | str, dict[str, Any]]] = {
    202: {
        "description": "the generation has started, now or earlier with this Idempotency-Key",
        "headers": {"Location": {"description": "/generations/<id>", "schema": {"type": "string"}}},
    },
    **documented(
        *bodies.PROBLEMS,
        "insufficient_credit",
        "unsupported_media_type",
        "unsupported_image_type",
        "invalid_image",
        "image_too_large",
        "unknown_image",
        "idempotency_mismatch",
        "too_many_generations",
        "too_many_starts",
        "storage_limit",
        "queue_full",
        "overloaded",
        "draining",
        "storage_failed",
        *PROBLEMS,
    ),
}
_start_at: Final = partial(router.post, status_code=202, response_model=Snapshot, responses=_ACCEPTED)
_ONE: Final = documented("not_found", *PROBLEMS)


@_start_at("/generations/edit", openapi_extra=form_body("edit"))
async def start_edit(
    request: Request, identity: Identified, workflow: UseCases, key: IdempotencyKey = None, runner: Runner = None
) -> Response:
    """Start an edit: the images are placed on one sheet, edited, and given a face if requested."""
    return await _start(request, identity, workflow, key, runner, "edit")


@_start_at("/generations/generate", openapi_extra=form_body("generate"))
async def start_generate(
    request: Request, identity: Identified, workflow: UseCases, key: IdempotencyKey = None, runner: Runner = None
) -> Response:
    """Start a generation: the images are placed on one sheet, from which a new image is made."""
    return await _start(request, identity, workflow, key, runner, "generate")


async def _start(
    request: Request, identity: Identity, workflow: Workflow, key: str | None, runner: str | None, kind: Kind
) -> Response:
    if runner is not None:
        require_service(identity)
    with spool() as files:
        with await workflow.arriving(identity.user_id, key):
            wanted = await read_form(request, kind, files, external=runner is not None)
        snapshot = await workflow.start(identity.user_id, kind, *wanted, key)
    location = f"{request.scope['root_path']}/generations/{snapshot.generation_id}"
    return schemas.json_response(snapshot, 202, (b"location", location.encode()))


@router.get("/generations", response_model=schemas.GenerationPage, responses=documented("invalid_request", *PROBLEMS))
async def list_generations(
    caller: Caller,
    workflow: UseCases,
    status: Annotated[Literal["active", "finished"] | None, Query(description="only these")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Before = None,
) -> Response:
    """The caller's generations, newest first."""
    active = None if status is None else status == "active"
    page = await workflow.page(caller, active=active, before=before, limit=limit)
    return schemas.json_response(schemas.GenerationPage(**page._asdict()))


@router.get("/generations/{generation_id}", response_model=Snapshot, responses=_ONE)
async def get_generation(generation_id: GenerationId, caller: Caller, workflow: UseCases) -> Response:
    """The generation as it is now."""
    return schemas.json_response(await workflow.snapshot(caller, generation_id))


@router.get(
    "/generations/{generation_id}/events",
    response_model=schemas.EventPage,
    responses={
        **schemas.STREAM,
        204: {
            "description": "a stream was accepted, and there is nothing after the position: the generation has ended"
        },
        **documented("not_found", "invalid_request", *PROBLEMS),
    },
)
async def get_events(
    generation_id: GenerationId,
    identity: StreamIdentity,
    workflow: UseCases,
    after: After = 0,
    _: schemas.LastEventId = None,
) -> Response:
    """The generation's events, as they were sent live.

    With `Accept: text/event-stream`: a stream of these events and of those to come, which ends after the terminal one.
    """
    history = await workflow.history(identity.user_id, generation_id)
    status = from_json(history.events[-1].event or b"")["status"]
    body = b'{"generationId":%b,"status":%b,"events":[%b]}' % (
        to_json(generation_id),
        to_json(status),
        schemas.named(entry for entry in history.events if entry.sequence > after),
    )
    return schemas.Json(body, 200, schemas.VARY)


@router.post("/generations/{generation_id}/cancel", response_model=schemas.CancelOutcome, responses=_ONE)
async def cancel_generation(generation_id: GenerationId, caller: Caller, workflow: UseCases) -> Response:
    """End the generation unless it has ended, and refund the credit."""
    return schemas.json_response(schemas.CancelOutcome(outcome=await workflow.cancel(caller, generation_id)))


@router.delete(
    "/generations/{generation_id}",
    status_code=204,
    response_class=Response,
    responses=documented("not_found", "not_finished", *PROBLEMS),
)
async def delete_generation(generation_id: GenerationId, caller: Caller, workflow: UseCases) -> Response:
    """Remove a finished generation with its history and its images."""
    await workflow.delete(caller, generation_id)
    return Response(status_code=204)
