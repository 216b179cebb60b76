"""The terminal events that the webhook has not received."""

from collections.abc import Sequence
from typing import Final, Protocol

from domain.feed import Logged

#: Seconds after which another node may claim an event: longer than one attempt to deliver it takes.
CLAIM: Final = 60.0


class WebhookOutbox(Protocol):
    """Terminal events that wait for the webhook. Every method may raise `LogUnavailable`."""

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        """Claim undelivered terminal events that no other node has claimed, and return them, oldest first.

        Those that this node has claimed before are claimed again. A claim lasts `CLAIM` seconds. There are none where
        the log was opened without an outbox. A removed generation's event is not delivered any more.
        """

    async def receiver_gone(self) -> None:
        """The receiver wants nothing any more. As long as this node runs, no other one claims anything."""

    async def delivered(self, generation_id: str) -> None:
        """The terminal event of this generation has been delivered."""
