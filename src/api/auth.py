"""Authenticates callers: by token where a key is configured; in open mode by the user id that they give."""

from contextvars import ContextVar
from typing import Annotated, Any, Final, Protocol

from fastapi import Depends, Header, Query, Request
from fastapi.security import HTTPBearer

from domain.errors import Refusal
from domain.identity import Identity, TokenExpired, Unauthenticated, user_id
from domain.ports.system import Clock

DEFAULT_USER: Final = "demo"
_ANYBODY: Final = Identity(DEFAULT_USER, None, service=True)

#: The caller of the HTTP request that the current task answers, once authenticated.
CALLER: Final = ContextVar("CALLER", default="")


class Forbidden(Refusal, code="forbidden"):
    """This needs a token with the scope stagecast:service."""


class UserMismatch(Refusal, code="user_mismatch"):
    """The token belongs to another user."""


class TokenVerifier(Protocol):
    """Checks tokens: `adapters.tokens.jwt_tokens`."""

    async def verify(self, token: object) -> Identity:
        """The identity in the token. Raises `InvalidToken`, `TokenExpired`, `KeysUnavailable`."""


class Authenticator:
    """Authenticates HTTP requests and sockets."""

    def __init__(self, tokens: TokenVerifier | None, clock: Clock) -> None:
        """Without `tokens`, the service is in open mode."""
        self._tokens = tokens
        self._clock = clock

    async def of_request(self, authorization: str | None, acting_for: str | None) -> Identity:
        """The caller of an HTTP request, by its headers ``Authorization`` and ``X-User-Id``. Sets `CALLER`.

        Raises:
            Unauthenticated, InvalidToken, TokenExpired, KeysUnavailable
            Forbidden: it names a user, and its token has not the scope for that.
            InvalidUserId: the user that it names is not valid.
        """
        if self._tokens is None:
            identity = _ANYBODY
        else:
            scheme, _, token = (authorization or "").partition(" ")
            if scheme.lower() != "bearer" or not token.strip():
                raise Unauthenticated
            identity = await self._tokens.verify(token.strip())
            CALLER.set(identity.user_id)  # Also where the next line refuses.
        if acting_for is not None:
            require_service(identity)
            identity = Identity(user_id(_decoded(acting_for)), identity.expires_at, service=True)
        CALLER.set(identity.user_id)
        return identity

    async def of_socket(self, user: object, token: object, known: Identity | None) -> Identity:
        """The user of a socket. Without a token, the identity that it has already proved, `known`, is used.

        Raises:
            Unauthenticated, InvalidToken, TokenExpired, KeysUnavailable
            UserMismatch: the token belongs to another user.
            InvalidUserId
        """
        if self._tokens is None:
            return Identity(user_id(user), None, service=False)
        if token is not None:
            known = await self._tokens.verify(token)
        if known is None:
            raise Unauthenticated
        if known.expires_at is not None and known.expires_at <= self._clock():
            raise TokenExpired
        if user is not None and user_id(user) != known.user_id:
            raise UserMismatch
        return known


def _decoded(header: str) -> str:
    """A header, which ASGI servers decode as Latin-1, decoded as UTF-8 if it is valid."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeDecodeError:
        return header


_bearer = HTTPBearer(auto_error=False, description="A JWT. Not needed in open mode.")


_ActingFor = Annotated[
    str | None, Header(description=f"the user: in open mode (default: {DEFAULT_USER}), or with a service token")
]


_Authorization = Annotated[str | None, Header(include_in_schema=False)]  # `_bearer` documents it.


async def _identity(
    request: Request,
    _: Annotated[Any, Depends(_bearer)] = None,
    authorization: _Authorization = None,
    x_user_id: _ActingFor = None,
) -> Identity:
    authenticator: Authenticator = request.app.state.service.authenticator
    return await authenticator.of_request(authorization, x_user_id)


async def _stream_identity(
    request: Request,
    _: Annotated[Any, Depends(_bearer)] = None,
    authorization: _Authorization = None,
    access_token: Annotated[
        str | None, Query(description="a JWT, for an EventSource, which cannot send headers; a header comes first")
    ] = None,
    user: Annotated[str | None, Query(alias="userId", description="as `X-User-Id`, which comes first")] = None,
    x_user_id: _ActingFor = None,
) -> Identity:
    if authorization is None and access_token:
        authorization = f"Bearer {access_token}"
    if x_user_id is None and user is not None:
        x_user_id = user.encode().decode("latin-1")  # As a header arrives.
    return await _identity(request, None, authorization, x_user_id)


def _caller(identity: Annotated[Identity, Depends(_identity)]) -> str:
    return identity.user_id


def require_service(identity: Annotated[Identity, Depends(_identity)]) -> None:
    """Raise `Forbidden` unless this caller may act for any user."""
    if not identity.service:
        raise Forbidden


#: The codes of the problems that a route with a caller may return.
PROBLEMS: Final = (
    "unauthenticated",
    "invalid_token",
    "token_expired",
    "forbidden",
    "invalid_user_id",
    "unavailable",
    "log_unavailable",
)

#: The identity of the caller.
Identified = Annotated[Identity, Depends(_identity)]
#: The caller of a route that an EventSource may use: its query may hold what headers cannot.
StreamIdentity = Annotated[Identity, Depends(_stream_identity)]
#: The id of the calling user.
Caller = Annotated[str, Depends(_caller)]
#: For `dependencies`: only a service may call.
service_only = Depends(require_service)
