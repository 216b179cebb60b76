"""Every answer that is not a success: ``application/problem+json`` (RFC 9457), always with a stable ``code``.

HTTP statuses stand here and nowhere deeper. What a client sent is never sent back, and an unexpected exception
leaves only its type's name in the log.
"""

import logging
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from pydantic.alias_generators import to_camel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from domain.errors import Failure, IllegalTransition, ImageRefusal, InvalidEventField, Refusal

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"

#: Seconds after which a 429 or 503 is worth another try.
_RETRY_AFTER: Final = 5
_TEMPORARY: Final = (429, 503)

#: Every code that an answer may carry.
_STATUS: Final = {
    "bad_request": 400,
    "invalid_token": 401,
    "token_expired": 401,
    "unauthenticated": 401,
    "insufficient_credit": 402,
    "forbidden": 403,
    "host_not_allowed": 403,
    "origin_not_allowed": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "conflict": 409,
    "credits_off": 409,
    "illegal_transition": 409,
    "not_external": 409,
    "not_finished": 409,
    "content_too_large": 413,
    "unsupported_image_type": 415,
    "unsupported_media_type": 415,
    "idempotency_mismatch": 422,
    "image_too_large": 422,
    "invalid_image": 422,
    "invalid_request": 422,
    "invalid_user_id": 422,
    "storage_limit": 429,
    "too_many_generations": 429,
    "too_many_starts": 429,
    "internal": 500,
    "draining": 503,
    "log_unavailable": 503,
    "overloaded": 503,
    "queue_full": 503,
    "storage_failed": 503,
    "unavailable": 503,
}

#: What HTTP itself refuses, by status: the code, and what is said where nobody has said more.
_HTTP: Final = {
    400: ("bad_request", "The request could not be read."),
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address does not take this method."),
    413: ("content_too_large", "The request is too large."),
    415: ("unsupported_media_type", "The request has a content type that is not supported here."),
}


class InvalidField(BaseModel):
    """One field that was refused."""

    field: str
    message: str


class Problem(BaseModel):
    """What went wrong, by RFC 9457."""

    type: Annotated[str, Field(description="always about:blank: `code` tells one problem from another")]
    title: Annotated[str, Field(description="the HTTP status in words")]
    status: int
    detail: Annotated[str, Field(description="a sentence for people")]
    code: Annotated[str, Field(description="stable, for programs", examples=["not_found"])]
    errors: Annotated[list[InvalidField], Field(description="the fields that were refused")] = []
    allowed: Annotated[
        list[str], Field(description="of `illegal_transition`: the statuses that may follow the present one")
    ] = []


class ProblemResponse(JSONResponse):
    """A problem on its way out."""

    media_type = MEDIA_TYPE


def problem(code: str, detail: str, *, headers: Mapping[str, str] | None = None, **extra: Any) -> Response:
    """The answer that tells this problem; `extra` are further members of its JSON."""
    status = _STATUS[code]
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    usual = {"Retry-After": str(_RETRY_AFTER)} if status in _TEMPORARY else {}
    if status == HTTPStatus.UNAUTHORIZED:
        usual = {"WWW-Authenticate": "Bearer"}
    return ProblemResponse({**content, "code": code, **extra}, status, {**usual, **(headers or {})})


class Invalid(Exception):
    """These fields of the request, at least one, are not as they have to be."""

    def __init__(self, *errors: InvalidField) -> None:
        super().__init__(errors)
        self.errors = errors


def invalid_fields(errors: Iterable[Mapping[str, Any]], *, skip: int = 0) -> list[InvalidField]:
    """Pydantic's errors, without the values that caused them and the first `skip` steps to the fields."""
    return [InvalidField(field=".".join(map(str, error["loc"][skip:])), message=error["msg"]) for error in errors]


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of an operation that may end in these problems."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    responses: dict[int | str, dict[str, Any]] = {}
    for status in sorted({_STATUS[code] for code in codes}):
        own = [f"`{code}`" for code in codes if _STATUS[code] == status]
        responses[status] = {"description": ", ".join(own), "content": content}
        if status in _TEMPORARY:
            responses[status]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return {**responses, "default": {"description": "any other problem", "content": content}}


def install(app: FastAPI) -> None:
    """Let this application answer every failure with a problem, and document what one is."""
    app.add_exception_handler(Refusal, _refusal)
    app.add_exception_handler(Failure, _failure)
    app.add_exception_handler(Invalid, _invalid)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(_Unexpected)
    document = app.openapi

    def openapi() -> dict[str, Any]:
        schema = document()
        schema["components"]["schemas"] |= _schemas()
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI's own docs extend it


def _schemas() -> dict[str, Any]:
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs"), "Problem": schema}


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    if isinstance(error, ImageRefusal):
        field = InvalidField(field=f"images.{error.index}", message=str(error))
        return problem(error.code, f"{field.field}: {field.message}", errors=[field.model_dump()])
    if isinstance(error, InvalidEventField):
        return await _invalid(request, Invalid(InvalidField(field=to_camel(error.field), message=error.reason)))
    if isinstance(error, IllegalTransition):
        return problem(error.code, str(error), allowed=error.allowed)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return problem(error.code, str(error), headers=headers)


async def _failure(_: Request, error: Exception) -> Response:
    assert isinstance(error, Failure)
    return problem(error.code, error.sentence)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, Invalid)
    first = error.errors[0]
    detail = f"{first.field}: {first.message}" if first.field else first.message
    return problem("invalid_request", detail, errors=[field.model_dump() for field in error.errors])


async def _validation(request: Request, error: Exception) -> Response:
    """FastAPI's own checks, whose ``loc`` begins with the place: path, query, header."""
    assert isinstance(error, RequestValidationError)
    return await _invalid(request, Invalid(*invalid_fields(error.errors(), skip=1)))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, sentence = _HTTP[error.status_code]
    said = error.detail != HTTPStatus(error.status_code).phrase
    headers = dict(error.headers or {})
    if error.status_code == 405:
        # Starlette tells the methods of the first route with this path, not of all; and of its files none.
        route = request.scope.get("route")
        operations = route and request.app.openapi()["paths"].get(route.path)
        told = {"Allow": ", ".join(operations).upper().replace("GET", "GET, HEAD")} if operations else headers
        headers = {"Allow": "GET, HEAD"} | headers | told
    return problem(code, error.detail if said else sentence, headers=headers)


class _Unexpected:
    """Answers 500 for what nobody else has answered. (Starlette's own layer would raise it again.)"""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:
            return
        except Exception as error:
            # Behind a response that has begun nothing can be said: the server sees it unfinished, and hangs up.
            logger.error("%s: %s", scope["method"], type(error).__name__)
            if not started:
                detail = "Something went wrong on our side. Please try again."
                await problem("internal", detail)(scope, receive, send)
