"""The terminal events that the webhook has not received."""

from collections.abc import Sequence
from typing import Protocol

from domain.feed import Logged


class WebhookOutbox(Protocol):
    """Terminal events on their way to the webhook. Every method may raise `LogUnavailable`."""

    async def undelivered(self, limit: int) -> Sequence[Logged]:
        """Terminal events that are yet to be told to the webhook, those that came first first.

        Always none where the log was opened without an outbox. What is removed is not told any more.
        """

    async def delivered(self, generation_id: str) -> None:
        """The terminal event of this generation has been told."""
