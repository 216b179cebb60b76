"""The storage of one technology: its implementations of the ports that share data, opened and closed together."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple, Protocol

from domain.ports.leases import Leases
from domain.ports.ledger import Ledger
from domain.ports.log import EventLog
from domain.ports.nodes import Nodes
from domain.ports.overview import Overview
from domain.ports.quotas import Quotas
from domain.ports.retention import Retention
from domain.ports.sessions import Sessions
from domain.ports.system import Clock
from domain.ports.webhook_outbox import WebhookOutbox


class StorageOptions(NamedTuple):
    """How a storage is opened."""

    #: The epoch of a new log; an existing one keeps its own.
    epoch: str
    #: A new user's balance; ``None``: no balances are kept.
    credits: int | None
    clock: Clock
    #: How long sessions are kept after they were last used.
    retention: timedelta
    #: Record terminal events as undelivered webhooks.
    outbox: bool = False
    #: Another URL of the same database, past a pooler.
    direct: str | None = None
    #: ``host:port`` at which other nodes reach this one; ``:port``: at the address that the storage is reached from.
    address: str = ":3000"


async def _nothing() -> None:
    pass


class Log(EventLog, Overview, Ledger, Retention, WebhookOutbox, Protocol):
    """The event log, with everything that is derived from it."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """An open storage."""

    log: Log
    sessions: Sessions
    leases: Leases
    quotas: Quotas
    #: Checks, in the background, all that was stored before. What is damaged then counts as deleted.
    examine: Callable[[], Awaitable[None]] = _nothing
    #: What has to run as long as the storage is open, by name.
    background: Mapping[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    #: ``None``: this node is the only one.
    nodes: Nodes | None = None
    #: Seconds since the log was last read for its followers; a log in this process is followed as it is written.
    age: Callable[[], float] = lambda: 0.0
    #: Whether other nodes use this storage now. It may take seconds, and raise `StorageRefused`.
    has_other_nodes: Callable[[], Awaitable[object]] = _nothing
    #: Finishes pending operations and releases everything. Nothing may be called afterwards.
    close: Callable[[], Awaitable[None]] = _nothing


class StorageRefused(Exception):
    """The storage cannot be opened. The message is one sentence for the operator."""


class Examined(NamedTuple):
    """What was found in a storage that was only read."""

    #: A line for each damaged thing.
    damage: Sequence[str] = ()
    #: ``None`` if there is no log, or its epoch cannot be read.
    epoch: str | None = None
