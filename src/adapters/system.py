"""This machine's clock and randomness."""

import secrets
import string
from datetime import UTC, datetime

_ALPHABET = string.ascii_lowercase + string.digits


def now() -> datetime:
    """The present moment, with its zone."""
    return datetime.now(UTC)


class SystemEntropy:
    """`domain.ports.Entropy` from the operating system."""

    def token(self) -> str:
        return "".join(secrets.choice(_ALPHABET) for _ in range(16))

    def event_id(self) -> int:
        return secrets.randbits(63)
