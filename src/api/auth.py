"""Who is calling: by token where a key is configured; in open mode, whoever they say."""

from typing import Annotated, Any, Final, Protocol

from fastapi import Depends, Header, Request
from fastapi.security import HTTPBearer

from domain.errors import Refusal
from domain.identity import Identity, InvalidToken, TokenExpired, Unauthenticated, user_id
from domain.ports.system import Clock

DEFAULT_USER: Final = "demo"


class Forbidden(Refusal):
    """This needs a token with the scope stagecast:service."""

    code = "forbidden"


class UserMismatch(Refusal):
    """The token belongs to another user."""

    code = "user_mismatch"


class TokenVerifier(Protocol):
    """Checks tokens: `adapters.tokens.jwt_tokens`."""

    async def verify(self, token: str) -> Identity:
        """Whom the token names. Raises `InvalidToken`, `TokenExpired`, `KeysUnavailable`."""


class Authenticator:
    """Tells who is calling."""

    def __init__(self, tokens: TokenVerifier | None, clock: Clock) -> None:
        """Without `tokens`: open mode."""
        self._tokens = tokens
        self._clock = clock

    async def of_request(self, authorization: str | None, acting_for: str | None) -> Identity:
        """The caller of an HTTP request, by its two headers.

        Raises:
            Unauthenticated, InvalidToken, TokenExpired, KeysUnavailable
            Forbidden: it acts for somebody, and its token does not allow that.
            InvalidUserId: it acts for nobody there can be.
        """
        if self._tokens is None:
            return Identity(DEFAULT_USER if acting_for is None else user_id(_as_sent(acting_for)), None, service=True)
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated
        identity = await self._tokens.verify(token.strip())
        if acting_for is None:
            return identity
        if not identity.service:
            raise Forbidden
        return identity._replace(user_id=user_id(_as_sent(acting_for)))

    async def of_socket(self, user: object, token: object, known: Identity | None) -> Identity:
        """Who a socket says it is. Where it gives no token, the proof it gave before, `known`, still holds.

        Raises:
            Unauthenticated, InvalidToken, TokenExpired, KeysUnavailable
            UserMismatch: the token is another user's.
            InvalidUserId
        """
        if self._tokens is None:
            return Identity(user_id(user), None, service=False)
        if token is not None:
            if not isinstance(token, str):
                raise InvalidToken
            known = await self._tokens.verify(token)
        if known is None:
            raise Unauthenticated
        if known.expires_at is not None and known.expires_at <= self._clock():
            raise TokenExpired
        if user is not None and user_id(user) != known.user_id:
            raise UserMismatch
        return known


def _as_sent(header: str) -> str:
    """A header as UTF-8, where it is; ASGI has decoded it as Latin-1."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeDecodeError:
        return header


_bearer = HTTPBearer(auto_error=False, description="A JWT. Not needed in open mode.")


async def _identity(
    request: Request,
    _: Annotated[Any, Depends(_bearer)],
    x_user_id: Annotated[
        str | None,
        Header(description=f"in open mode, who is calling (default: {DEFAULT_USER}); with a service token, for whom"),
    ] = None,
) -> Identity:
    authenticator: Authenticator = request.app.state.authenticator
    return await authenticator.of_request(request.headers.get("authorization"), x_user_id)


async def _caller(identity: Annotated[Identity, Depends(_identity)]) -> str:
    return identity.user_id


async def _service(identity: Annotated[Identity, Depends(_identity)]) -> None:
    require_service(identity)


def require_service(identity: Identity) -> None:
    """Raises `Forbidden` unless this caller may act for others."""
    if not identity.service:
        raise Forbidden


#: The codes of the problems that a route with a caller may end in.
PROBLEMS: Final = (
    "unauthenticated",
    "invalid_token",
    "token_expired",
    "forbidden",
    "invalid_user_id",
    "unavailable",
    "log_unavailable",
)

#: The caller, whole.
Identified = Annotated[Identity, Depends(_identity)]
#: The id of the calling user.
Caller = Annotated[str, Depends(_caller)]
#: For `dependencies`: only a service may call.
service_only = Depends(_service)
