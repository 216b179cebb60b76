"""HTTP: the routes that need no caller: stages, images, version, health."""

import re
from typing import Annotated, Final, Literal

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse

from api.asyncapi import document
from api.rest import routes
from api.rest.problems import documented, problem
from api.rest.schemas import Health, Stages, Version, json_response, stages
from api.rest.state import Images, Times
from domain.errors import Draining, LogUnavailable, NotFound

router: Final = routes.router()

#: As `domain.ports.images.ImageStore.save` names images: the generation's id, 128 random bits, a suffix.
_NAME: Final = re.compile(r"[a-z0-9_]+-[A-Za-z0-9_-]+\.[a-z]+")

#: Why the service cannot take a start, by code. Any other reason is reported as `unavailable`.
_NOT_READY: Final = {
    Draining.code: str(Draining()),
    LogUnavailable.code: str(LogUnavailable()),
    "storage_failed": "The image store cannot be written. Please try again shortly.",
    "unavailable": "A part of the service does not work. Please try again shortly.",
}


@router.get("/stages", tags=["generations"], response_model=Stages, responses=documented())
async def get_stages(times: Times) -> Response:
    """The declared sequences of stages, and how long they typically take."""
    return json_response(stages(times))


@router.get(
    "/images/{name}",
    tags=["images"],
    response_class=Response,
    responses={
        200: {
            "description": "the image",
            "content": {
                media_type: {"schema": {"type": "string", "format": "binary"}}
                # The last is never sent. Several generators skip operations without a media type that they know.
                for media_type in ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
            },
        },
        **documented("not_found", "invalid_request", "storage_failed", "draining"),
    },
)
async def get_image(
    name: str,
    images: Images,
    width: Annotated[
        Literal["320", "640"] | None,
        Query(description="a WebP of at most this width; a smaller image keeps its size"),
    ] = None,
) -> Response:
    """A stored image. Anybody who knows its name may load it."""
    picture = await images.load(name, width and int(width)) if _NAME.fullmatch(name) else None
    if picture is None:
        raise NoSuchImage
    return Response(
        picture.data,
        media_type=picture.media_type,
        headers={
            "Cache-Control": "private, max-age=3600, immutable",
            "Content-Disposition": "inline",
            "X-Content-Type-Options": "nosniff",
        },
    )


class NoSuchImage(NotFound):
    """There is no such image."""


@router.get("/version", tags=["health"], response_model=Version, responses=documented())
async def get_version(request: Request) -> Response:
    """The version of the running service."""
    return json_response(Version(version=request.app.version))


@router.get("/asyncapi.json", include_in_schema=False)
async def get_asyncapi(request: Request) -> Response:
    """The events of Socket.IO and of streams."""
    return JSONResponse(document(request.app.version, request.app.state.service.settings.public_url))


@router.get("/health/live", tags=["health"], response_model=Health, responses=documented())
async def get_live() -> Response:
    """The process responds."""
    return json_response(Health(status="live"))


@router.get("/health/ready", tags=["health"], response_model=Health, responses=documented(*_NOT_READY))
async def get_ready(request: Request) -> Response:
    """Whether the service can take a start. `parts` lists every background task, in 200 and 503 alike."""
    reason, parts = await request.app.state.service.readiness()
    if reason is None:
        return json_response(Health(status="ready", parts=parts))
    code = reason if reason in _NOT_READY else "unavailable"
    return problem(code, _NOT_READY[code], parts=parts)
