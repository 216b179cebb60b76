"""The terminal events that the webhook has not received."""

from collections.abc import Sequence
from typing import Protocol

from domain.feed import Logged


class WebhookOutbox(Protocol):
    """Terminal events that wait for the webhook. Every method may raise `LogUnavailable`."""

    async def undelivered(self, limit: int) -> Sequence[Logged]:
        """Terminal events that are not delivered yet, oldest first. Those of removed generations are dropped.

        Always empty if the storage was opened without an outbox.
        """

    async def delivered(self, generation_id: str) -> None:
        """The terminal event of this generation has been delivered."""
