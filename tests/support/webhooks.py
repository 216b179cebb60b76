"""A receiver of webhooks, and helpers that send them."""

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from adapters.outbound.webhook_sender import WebhookSender
from adapters.postgres.log import PostgresLog
from adapters.system import now
from domain.feed import Logged
from domain.generation import Generation
from domain.webhooks import Webhooks
from support.builders import WholeLog
from support.provider_faults import Answer, Origin, Request
from support.provider_faults import whole as answer_with

SECRET: Final = "whsec_" + base64.b64encode(bytes(range(32))).decode()


#: Without certificate authorities, because loading them is slow.
NO_TRUSTED_CAS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


TAKEN: Final = answer_with(b"")


def status(code: int, **headers: str) -> Answer:
    return answer_with(b"whatever", code, "text/plain", **headers)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()


@dataclass
class Receiver:
    """A server that accepts webhooks, unless another response is planned for the generation."""

    origin: Origin = field(init=False)
    #: By generation, the responses before its messages are accepted.
    plans: dict[str, list[Answer]] = field(default_factory=dict)
    #: By generation, the response to all its messages.
    always: dict[str, Answer] = field(default_factory=dict)
    #: The accepted requests.
    taken: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.origin = Origin(self.respond)

    def respond(self, request: Request) -> Answer:
        generation_id = request.headers["webhook-id"].partition(":")[0]
        if generation_id in self.always:
            return self.always[generation_id]
        plan = self.plans.get(generation_id)
        if plan:
            return plan.pop(0)
        self.taken.append(request)
        return TAKEN

    def posts(self, generation: Generation) -> list[Request]:
        """The requests for this generation."""
        prefix = f"{generation.generation_id}:"
        return [request for request in self.origin.requests if request.headers["webhook-id"].startswith(prefix)]

    @property
    def ids(self) -> list[str]:
        """The ids of the generations whose end was accepted."""
        return [request.headers["webhook-id"].partition(":")[0] for request in self.taken]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.005)


async def until_all_delivered(log: WholeLog) -> None:
    """Wait until the log has no undelivered event.

    PostgreSQL is not asked by a claim: those of the webhooks leave out what another one holds.
    """
    query = "SELECT 1 FROM stagecast.generations WHERE undelivered LIMIT 1"
    async with asyncio.timeout(60):
        while await (log._database.fetch(query) if isinstance(log, PostgresLog) else log.claim_undelivered(1)):
            await asyncio.sleep(0.005)


def ids(entries: Sequence[Logged]) -> list[str]:
    return [entry.generation_id for entry in entries]


def sender_to(origin: Origin, path: str = "/hook", secret: str | None = SECRET, **rest: Any) -> WebhookSender:
    return WebhookSender(
        origin.address + path, secret, **{"clock": now, "timeout": 60, "trust": NO_TRUSTED_CAS, **rest}
    )


def webhooks_for(log: WholeLog, poster: Any, *, backoff: float = 0.01, longest: float = 0.05) -> Webhooks:
    return Webhooks(log, log, poster, lambda: 0.5, backoff=backoff, longest=longest)


@asynccontextmanager
async def working(webhooks: Webhooks) -> AsyncIterator[None]:
    """Run the delivery loop. If it fails, so does the test."""
    running = asyncio.create_task(webhooks.run())
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
