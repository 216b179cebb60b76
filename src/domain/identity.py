"""User ids, and the identity that a token proves."""

import re
from contextvars import ContextVar
from datetime import datetime
from typing import Final, NamedTuple

from domain.errors import Refusal

_MAX_LENGTH: Final = 128
#: No control characters, and no surrogates.
_USER_ID: Final = re.compile(rf"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{{1,{_MAX_LENGTH}}}")

#: The user for whom the current task works. Shared resources are divided between users by it.
WORKING_FOR: Final = ContextVar("WORKING_FOR", default="")


class Identity(NamedTuple):
    """An authenticated user."""

    user_id: str
    #: When its token expires; ``None``: never.
    expires_at: datetime | None
    #: Whether it may make service calls and act for any user.
    service: bool


class Unauthenticated(Refusal, code="unauthenticated"):
    """This needs a token."""


class InvalidToken(Refusal, code="invalid_token"):
    """The token is not valid."""


class TokenExpired(Refusal, code="token_expired"):
    """The token has expired."""


class KeysUnavailable(Refusal, code="unavailable"):
    """Tokens cannot be checked at the moment. Please try again shortly."""


class InvalidUserId(Refusal, code="invalid_user_id"):
    """A user id is a string of 1 to 128 characters without control characters, or an integer."""


def user_id(value: object) -> str:
    """The text of the user id that a client gave as a string or an integer. Raises `InvalidUserId`."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 4 * _MAX_LENGTH:
        value = str(value)
    if not isinstance(value, str) or not _USER_ID.fullmatch(value):
        raise InvalidUserId
    return value
