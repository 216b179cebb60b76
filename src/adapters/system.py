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
        #: Tokens of 16 letters and digits, and numbers for event ids: 64 cost little more than one.
        self._tokens: list[str] = []
        self._numbers = array("Q")

    def token(self) -> str:
        if not self._tokens:
            text = base64.b32encode(secrets.token_bytes(640)).decode().lower()
            self._tokens = [text[at : at + 16] for at in range(0, len(text), 16)]
        return self._tokens.pop()

    def event_id(self) -> int:
        if not self._numbers:
            self._numbers.frombytes(secrets.token_bytes(512))
        return self._numbers.pop() >> 1


def descriptors() -> int:
    """How many file descriptors this process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
