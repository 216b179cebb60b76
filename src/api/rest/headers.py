"""The headers of a request, as ASGI has them: Starlette's class takes as long as the whole of a layer."""

from starlette.types import Scope


def values(scope: Scope, name: bytes) -> list[str]:
    """The values of a header, whose name is in lower case."""
    return [value.decode("latin-1") for each, value in scope["headers"] if each == name]


def value(scope: Scope, name: bytes) -> str:
    """The first value of a header, or an empty text."""
    return next(iter(values(scope, name)), "")
