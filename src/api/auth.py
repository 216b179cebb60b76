"""Who is calling."""

import unicodedata
from typing import Annotated, Final

from fastapi import Depends, Header

from domain.errors import Refusal

DEFAULT_USER: Final = "demo"

_MAX_LENGTH: Final = 128


class InvalidUserId(Refusal):
    """A user id is a string of 1 to 128 characters without control characters, or an integer."""

    code = "invalid_user_id"


def user_id(value: object) -> str:
    """The user id that a client gave, as the text it is compared and kept as. Raises `InvalidUserId`."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 4 * _MAX_LENGTH:
        value = str(value)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_LENGTH:
        raise InvalidUserId
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise InvalidUserId
    return value


async def _caller(
    x_user_id: Annotated[str, Header(description="who is calling: a user id, in UTF-8")] = DEFAULT_USER,
) -> str:
    sent = x_user_id.encode("latin-1")  # as ASGI has decoded it
    try:
        return user_id(sent.decode())
    except UnicodeDecodeError:
        return user_id(x_user_id)


Caller = Annotated[str, Depends(_caller)]
