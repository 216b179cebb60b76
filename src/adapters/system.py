"""The clock, randomness and limits of the operating system."""

import base64
import resource
import secrets
import sys
from array import array
from datetime import UTC, datetime


def now() -> datetime:
    """The current time in UTC, with time zone."""
    return datetime.now(UTC)


class SystemEntropy:
    """`domain.ports.system.Entropy` from the operating system."""

    def __init__(self) -> None:
        #: Numbers for event ids: 64 cost as much as one.
        self._numbers = array("Q")

    def token(self) -> str:
        return base64.b32encode(secrets.token_bytes(10)).decode().lower()

    def event_id(self) -> int:
        if not self._numbers:
            self._numbers.frombytes(secrets.token_bytes(512))
        return self._numbers.pop() >> 1


def descriptors() -> int:
    """How many file descriptors this process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
