"""What operators see: the generations of all users, and what fails."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

from domain.ports.log import History
from domain.stages import Kind


class Filter(NamedTuple):
    """Which generations are listed. ``None``: all."""

    generation_id: str | None = None
    user_id: str | None = None
    kind: Kind | None = None
    #: ``active``, ``finished``, or the status of a stage.
    status: str | None = None
    #: Of the failure.
    code: str | None = None


class Listing(NamedTuple):
    """Summaries, newest first."""

    histories: Sequence[History]
    #: `before` of the next page; ``None`` if there is none.
    next: int | None


class Overview(Protocol):
    """Reads over all users, which stay quick however many generations there are. May raise `LogUnavailable`."""

    async def listing(self, wanted: Filter, *, before: int | None = None, limit: int) -> Listing:
        """At most `limit` generations of all users that these apply to."""

    async def failures(self, since: datetime) -> Mapping[str, int]:
        """How many generations have failed since then, by code."""
