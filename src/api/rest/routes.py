"""Routes that FastAPI documents, and that are found and called without its work for each request.

FastAPI analyses the signature of each endpoint once, for OpenAPI. Here the result is also used to call the endpoint, in
a fraction of the time that FastAPI takes for it. Parameters are single values in the path, the query or the headers;
endpoints return responses.
"""

from collections.abc import Callable, Iterator, Mapping
from inspect import iscoroutinefunction
from types import NoneType
from typing import Any, NamedTuple, get_args
from urllib.parse import parse_qsl

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security.base import SecurityBase
from pydantic.alias_generators import to_camel
from starlette.exceptions import HTTPException
from starlette.routing import Router
from starlette.types import Receive, Scope, Send


class Route(APIRoute):
    """One route. Its path begins with a fixed segment."""

    methods: set[str]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._steps = list(_steps(self.dependant))

    def accepts(self, scope: Scope) -> bool:
        """Whether this route answers such a request, and not a later one of the same path."""
        return True

    async def answer(self, request: Request) -> Response:
        """The response of the endpoint. Raises what it raises; `RequestValidationError`: a parameter is not valid."""
        scope = request.scope
        query = scope["query_string"]
        values: dict[str, Mapping[Any, Any]] = {
            "path": scope["path_params"],
            "query": dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True)) if query else {},
            "header": dict(reversed(scope["headers"])),
        }
        results: dict[Any, Any] = {}
        for function, asynchronous, dependencies, parameters, request_name in self._steps:
            arguments = {name: results[each] for name, each in dependencies}
            errors: list[Any] = []
            for name, source, key, alias, default, validate in parameters:
                value = values[source].get(key)
                if value is None:
                    value = default
                else:
                    if source == "header":
                        value = value.decode("latin-1")
                    if validate is not None:
                        value, invalid = validate(value, {}, loc=(alias,))
                        errors += invalid
                arguments[name] = value
            if errors:
                raise RequestValidationError(errors)
            if request_name is not None:
                arguments[request_name] = request
            result = function(**arguments)
            results[function] = await result if asynchronous else result
        response: Response = results[self.endpoint]
        return response


def router(*tags: str, route_class: type[Route] = Route, **options: Any) -> APIRouter:
    """A router of such routes."""
    return APIRouter(
        tags=[*tags],
        route_class=route_class,
        generate_unique_id_function=lambda route: to_camel(route.name),
        **options,
    )


class RouteTable:
    """All routes of an application: such ones by method and the first segment of their path, and others in order."""

    def __init__(self, http: FastAPI) -> None:
        own = [route for route in http.routes if isinstance(route, Route)]
        self._routes: dict[tuple[str, str], list[Route]] = {}
        for route in own:
            for method in route.methods:
                self._routes.setdefault((method, _first_segment(route.path)), []).append(route)
        self._own = own
        others = [route for route in http.routes if not isinstance(route, Route)]
        self._others = Router(others, redirect_slashes=False)
        self._other_segments = {"socket.io", *(_first_segment(str(getattr(route, "path", ""))) for route in others)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises what the endpoint raises; `HTTPException`: there is no such route."""
        path = scope["path"].removeprefix(scope["root_path"])
        for route in self._routes.get((scope["method"], _first_segment(path)), ()):
            if (match := route.path_regex.fullmatch(path)) and route.accepts(scope):
                scope["path_params"] = match.groupdict()
                response = await route.answer(Request(scope, receive, send))
                await response(scope, receive, send)
                return
        others = [route for route in self._own if route.path_regex.fullmatch(path)]
        if not others:
            await self._others(scope, receive, send)
            return
        methods = dict.fromkeys(each for route in others if route.path == others[0].path for each in route.methods)
        raise HTTPException(405, headers={"Allow": ", ".join(methods).replace("GET", "GET, HEAD")})

    def template(self, path: str) -> str:
        """The documented path of the route for this path, whatever the method; its first segment for other routes."""
        found = next((route.path_format for route in self._own if route.path_regex.fullmatch(path)), None)
        first = _first_segment(path)
        return found or (f"/{first}" if first in self._other_segments else "unknown")


def _first_segment(path: str) -> str:
    return path[1:].partition("/")[0]


class _Parameter(NamedTuple):
    """A value in the path, the query or the headers."""

    name: str
    source: str
    key: str | bytes
    #: Its name in errors.
    alias: str
    default: Any
    #: Returns the value and what is wrong with it. ``None``: any text is valid.
    validate: Callable[..., tuple[Any, list[Any]]] | None


def _parameter(field: Any) -> _Parameter:
    info = field.field_info
    source = info.in_.value
    assert source == "path" or not info.is_required()
    alias = field.name.replace("_", "-") if source == "header" and field.alias == field.name else field.alias
    key = alias.lower().encode() if source == "header" else alias
    any_text = not info.metadata and set(get_args(info.annotation) or [info.annotation]) <= {str, NoneType}
    return _Parameter(field.name, source, key, alias, field.default, None if any_text else field.validate)


class _Step(NamedTuple):
    """A call of a dependency, or at last of the endpoint."""

    function: Callable[..., Any]
    asynchronous: bool
    #: Its arguments, by name: results of earlier steps, parameters, and the request.
    dependencies: list[tuple[str, Callable[..., Any]]]
    parameters: list[_Parameter]
    request: str | None


def _steps(dependant: Dependant, known: set[Any] | None = None) -> Iterator[_Step]:
    """The dependencies of this one, each once and after its own, and itself. Security schemes are only documented."""
    known = set() if known is None else known
    assert dependant.call is not None
    assert not dependant.body_params
    assert not dependant.cookie_params
    dependencies = [each for each in dependant.dependencies if not isinstance(each.call, SecurityBase)]
    parameters = [*dependant.path_params, *dependant.query_params, *dependant.header_params]
    for each in dependencies:
        if each.call not in known:
            yield from _steps(each, known)
    known.add(dependant.call)
    yield _Step(
        dependant.call,
        iscoroutinefunction(dependant.call),
        [(each.name, each.call) for each in dependencies if each.name is not None and each.call is not None],
        [*map(_parameter, parameters)],
        dependant.request_param_name or dependant.http_connection_param_name,
    )
