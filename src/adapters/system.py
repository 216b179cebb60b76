"""The clock, randomness and limits of the operating system."""

import resource
import secrets
import string
import sys
from datetime import UTC, datetime

_ALPHABET = string.ascii_lowercase + string.digits


def now() -> datetime:
    """The current time in UTC, with time zone."""
    return datetime.now(UTC)


class SystemEntropy:
    """`domain.ports.system.Entropy` from the operating system."""

    def token(self) -> str:
        number, token = secrets.randbelow(len(_ALPHABET) ** 16), ""
        for _ in range(16):
            number, digit = divmod(number, len(_ALPHABET))
            token += _ALPHABET[digit]
        return token

    def event_id(self) -> int:
        return secrets.randbits(63)


def descriptors() -> int:
    """How many file descriptors this process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
