"""Request bodies, read within limits. Routes read them last: once it is known who is calling."""

from typing import Any, Final, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Message

from api.problems import Invalid, invalid_fields

Model = TypeVar("Model", bound=BaseModel)

_MAX_JSON: Final = 64 * 1024


def limited(request: Request, size: int, sentence: str) -> Request:
    """The request, whose body may not grow beyond so many bytes, declared or not: 413, with this sentence."""
    too_large = HTTPException(413, sentence)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > size:
        raise too_large
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > size:
            raise too_large
        return message

    return Request(request.scope, receive)


async def read_json(request: Request, model: type[Model]) -> Model:
    """The body as this model. (FastAPI would read it, however large, before it asks who is calling.)

    Raises:
        Invalid: it is not as it has to be.
        HTTPException: 413.
    """
    body = await limited(request, _MAX_JSON, "The request may have 64 kB at most.").body()
    try:
        return model.model_validate_json(body, by_alias=True, by_name=False)
    except ValidationError as error:
        raise Invalid(*invalid_fields(error.errors())) from None


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The body as OpenAPI shows it."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # What a body is made of is part of an answer too, and so a component anyway.
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
