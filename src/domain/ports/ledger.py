"""The ledger: each user's credits."""

from datetime import datetime
from typing import NamedTuple, Protocol


class Standing(NamedTuple):
    """What limits a user's next start."""

    #: ``None`` where the log keeps no balances.
    credit: int | None
    #: How many generations of this user are unfinished.
    unfinished: int


class Ledger(Protocol):
    """Balances of credits. They change in `EventLog.append` and in `grant`.

    Every method may raise `LogUnavailable`.
    """

    async def standing(self, user_id: str) -> Standing:
        """What a start by this user is checked against: one atomic read."""

    async def grant(self, user_id: str, amount: int, *, key: str | None, at: datetime, until: datetime) -> int:
        """Change the user's balance by `amount`, to 0 at the least, and return it.

        A key that this user sends again before `until` returns the balance of the first time.

        Raises:
            IdempotencyMismatch: the key was sent with another amount.
            CreditsOff: this log keeps no balances.
        """
