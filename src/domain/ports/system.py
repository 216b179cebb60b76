"""Time and randomness."""

from collections.abc import Callable
from datetime import datetime
from typing import Protocol

Clock = Callable[[], datetime]


class Entropy(Protocol):
    """Where randomness comes from."""

    def token(self) -> str:
        """16 characters of ``[a-z0-9]``: 80 random bits."""

    def event_id(self) -> int:
        """63 random bits."""
