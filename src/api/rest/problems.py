"""Error responses: ``application/problem+json`` (RFC 9457) with a stable ``code``.

This module alone maps codes to HTTP statuses. Values that a client sent are never echoed, and of an unexpected
exception only the name of its type is logged.
"""

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from pydantic.alias_generators import to_camel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from api.rest.routes import RouteTable
from domain.errors import Failure, IllegalTransition, ImageRefusal, InvalidEventField, Refusal

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"

#: The code of the problem that the current task answers with.
PROBLEM: Final = ContextVar("PROBLEM", default="")

#: Seconds after which a client may retry after 429 or 503.
_RETRY_AFTER: Final = 5
_TEMPORARY: Final = (429, 503)

#: Every code, and its HTTP status.
_STATUS: Final = {
    code: status
    for status, codes in {
        400: "bad_request",
        401: "invalid_token token_expired unauthenticated",
        402: "insufficient_credit",
        403: "forbidden host_not_allowed origin_not_allowed",
        404: "not_found",
        405: "method_not_allowed",
        408: "request_timeout",
        409: "conflict credits_off illegal_transition not_external not_finished",
        413: "content_too_large",
        415: "unsupported_image_type unsupported_media_type",
        422: "idempotency_mismatch image_too_large invalid_image invalid_request invalid_user_id unknown_image",
        429: "storage_limit too_many_generations too_many_starts",
        500: "internal",
        503: "draining log_unavailable overloaded queue_full storage_failed unavailable",
    }.items()
    for code in codes.split()
}

#: The code and the default detail of the errors that FastAPI and Starlette raise, by status.
_HTTP: Final = {
    400: ("bad_request", "The request could not be read."),
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address does not take this method."),
    413: ("content_too_large", "The request is too large."),
    415: ("unsupported_media_type", "The request has a content type that is not supported here."),
}


class InvalidField(BaseModel):
    """A field of the request that is not valid."""

    field: str
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: Annotated[str, Field(description="always about:blank; `code` identifies the problem")]
    title: Annotated[str, Field(description="the HTTP status in words")]
    status: int
    detail: Annotated[str, Field(description="a sentence suitable for display")]
    code: Annotated[str, Field(description="stable, for programs", examples=["not_found"])]
    errors: Annotated[list[InvalidField], Field(description="the fields that are not valid")] = []
    allowed: Annotated[list[str], Field(description="of `illegal_transition`: the statuses that may follow")] = []


def problem(code: str, detail: str, *, headers: Mapping[str, str] | None = None, **extra: Any) -> Response:
    """The response for this problem; `extra` are further members of its JSON."""
    PROBLEM.set(code)
    status = _STATUS[code]
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    usual = {"Retry-After": str(_RETRY_AFTER)} if status in _TEMPORARY else {}
    if status == HTTPStatus.UNAUTHORIZED:
        usual = {"WWW-Authenticate": "Bearer"}
    return JSONResponse({**content, "code": code, **extra}, status, {**usual, **(headers or {})}, MEDIA_TYPE)


def is_temporary(code: str) -> bool:
    """Whether the same request may succeed later."""
    return _STATUS[code] in _TEMPORARY


class Invalid(RequestValidationError):
    """A field of the request is not valid."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__([{"loc": (field,), "msg": message}])


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI responses of an operation that may return these problems."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    responses: dict[int | str, dict[str, Any]] = {}
    for status in sorted({_STATUS[code] for code in codes}):
        own = [f"`{code}`" for code in codes if _STATUS[code] == status]
        responses[status] = {"description": ", ".join(own), "content": content}
        if status in _TEMPORARY:
            responses[status]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return {**responses, "default": {"description": "any other problem", "content": content}}


class Problems:
    """Runs the routes of an application, and answers every exception with a problem.

    It takes the place of the layers that FastAPI puts around its routes, which take as long as a route.
    """

    def __init__(self, http: FastAPI) -> None:
        """Also adds the schema of problems to the application's OpenAPI."""
        self._app = http
        self._routes = RouteTable(http)
        document = http.openapi

        def openapi() -> dict[str, Any]:
            schema = document()
            own = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schema["components"]["schemas"] |= {**own.pop("$defs"), "Problem": own}
            return schema

        http.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI's own docs extend it
        self.template = self._routes.template

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await problem(*_HTTP[404])(scope, receive, send)
            return
        scope["app"] = self._app
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._routes(scope, receive, watch)
        except ClientDisconnect:
            return
        except Exception as error:
            response = None if started else _response(error)
            if response is None:
                logger.error("%s: %s", scope["method"], type(error).__name__)
                response = problem("internal", "Something went wrong on our side. Please try again.")
            # A response that has started cannot be replaced: the server sees it unfinished and closes the connection.
            if not started:
                await response(scope, receive, send)


def _response(error: Exception) -> Response | None:
    """The problem that an exception stands for; ``None`` if it is unexpected."""
    match error:
        case ImageRefusal():
            return _invalid(Invalid(f"{error.field}.{error.index}", str(error)), error.code)
        case InvalidEventField():
            return _invalid(Invalid(to_camel(error.field), error.reason))
        case IllegalTransition():
            return problem(error.code, str(error), allowed=error.allowed)
        case Refusal():
            headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
            return problem(error.code, str(error), headers=headers)
        case Failure():
            return problem(error.code, error.sentence)
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return _http_problem(error)
        case _:
            return None


def _invalid(error: RequestValidationError, code: str = "invalid_request") -> Response:
    """The problem, without the values that are not valid."""
    errors = [{"field": ".".join(map(str, each["loc"])), "message": each["msg"]} for each in error.errors()]
    field, message = errors[0].values()
    return problem(code, f"{field}: {message}" if field else message, errors=errors)


def _http_problem(error: HTTPException) -> Response:
    code, sentence = _HTTP[error.status_code]
    detail = sentence if error.detail == HTTPStatus(error.status_code).phrase else error.detail
    allowed = {"Allow": "GET, HEAD"} if error.status_code == 405 else {}  # of static files, where Starlette names none
    return problem(code, detail, headers=allowed | dict(error.headers or {}))
