"""The event log."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import NamedTuple, Protocol

from domain.feed import NO_IMAGES, Cursor, Feed, Logged
from domain.stages import Kind


class Start(NamedTuple):
    """What the first append of a generation carries besides its event."""

    kind: Kind
    #: JSON of `domain.requests.GenerationRequest`.
    request: bytes
    #: The caller's Idempotency-Key and the fingerprint of the whole request.
    key: str | None
    fingerprint: str
    #: How many unfinished generations this user may have, this one included.
    max_unfinished: int
    #: The owner's own pipeline does the work.
    external: bool = False


class Append(NamedTuple):
    """One event on its way into the log."""

    user_id: str
    generation_id: str
    #: The sequence this event is to get: one more than the last event in the log.
    sequence: int
    #: Random, below 2**63, drawn once per event. A retry carries the same one and is recognised by it.
    event_id: int
    #: JSON of `domain.events.Event`, without ``credit``.
    event: bytes
    #: The Socket.IO event that carries it.
    name: str
    at: datetime
    #: The change of the user's balance: -1, 0 or 1. ``None``: the event does not show the balance.
    credit: int | None = None
    terminal: bool = False
    start: Start | None = None
    #: The log refuses the append later than this.
    not_after: datetime | None = None
    #: The provider that works in this stage is free, so the work may be repeated after a crash.
    free: bool = False
    #: The names of the stored pictures that this event brings, by its field: ``{"composition_url": "edit_….png"}``.
    images: Mapping[str, str] = NO_IMAGES


class Gap(NamedTuple):
    """The follower missed entries and must read the log again."""


class Removed(NamedTuple):
    """A generation was removed whole. This is not stored."""

    user_id: str
    generation_id: str


class UserRemoved(NamedTuple):
    """A user was removed with all generations, and the positions of the feed begin again. This is not stored."""

    user_id: str


class History(NamedTuple):
    """One generation: one atomic read."""

    user_id: str
    generation_id: str
    kind: Kind
    #: JSON of `domain.requests.GenerationRequest`.
    request: bytes
    #: In order of sequence: all; in a summary the first and the last two, which suffice to derive its state.
    events: Sequence[Logged]
    #: `Append.free` of the last event, unless `mark_paid` has withdrawn it.
    free: bool


class IdempotencyRecord(NamedTuple):
    """What an idempotency key stands for."""

    generation_id: str
    fingerprint: str


Notice = Logged | Removed | UserRemoved | Gap
Deliver = Callable[[Notice], None]


class EventLog(Protocol):
    """A generation changes only here.

    Every method may raise `LogUnavailable`. `append` is one atomic step over everything it checks and
    changes: it happens whole or not at all.
    """

    @property
    def epoch(self) -> str:
        """Identifies this log's history, in ``[a-z0-9]``. A log that has lost its history gets another."""

    @property
    def durable(self) -> bool:
        """Whether entries outlive this process."""

    async def append(self, entry: Append) -> Logged:
        """Add the event, move the balance, and note the idempotency key.

        If its event id is already stored at its sequence, the append has succeeded before: it returns that entry and
        changes nothing.

        Raises in the order of `domain.append_rules.decide`:
            LogUnavailable: also if it is later than `entry.not_after`.
            IdempotencyMismatch, AlreadyStarted: the key belongs to another request, or to this one.
            Conflict: `entry.sequence` is not the next one, or the generation has ended.
            TooManyGenerations: the user already has `max_unfinished`.
            InsufficientCredit: the balance would fall below zero.
        """

    async def mark_paid(self, generation_id: str) -> None:
        """From now on the present stage of this generation may cost money: withdraw `Append.free` of its last event."""

    async def find_by_idempotency_key(self, user_id: str, key: str) -> IdempotencyRecord | None:
        """The generation that this user started with this key."""

    async def generation(self, generation_id: str) -> History | None:
        """One generation with all its events."""

    async def summary(self, generation_id: str) -> History | None:
        """One generation as a summary."""

    async def generations(
        self, user_id: str, *, active: bool | None = None, before: int | None = None, limit: int
    ) -> Sequence[History]:
        """Summaries of this user's generations, newest first.

        `active` keeps only unfinished (True) or finished (False) ones; `before`, only those whose first
        event lies before that position.
        """

    async def unfinished(self) -> Sequence[History]:
        """Summaries of all unfinished generations of all users, oldest first."""

    async def head_cursor(self, user_id: str) -> Cursor:
        """The cursor at the feed's head, after which come the past events of unfinished generations, and new events."""

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        """At most `limit` entries with a position above `after`, and what a cursor at `anchor` is compared with."""

    def follow(self, deliver: Deliver) -> AbstractAsyncContextManager[None]:
        """Deliver every entry appended from now on, in order of position per user, or `Gap`.

        Also delivers `Removed`, after the generation's entries, for every generation that is removed and had not been
        deleted before, and `UserRemoved` after those of the user's generations and before the entries of the feed that
        begins again. Removals on other nodes arrive as their entries do. Where they may have been missed, `Gap` is
        delivered.

        `deliver` must not block. What it raises is logged and undoes nothing.
        """

    async def probe(self) -> None:
        """Commit one row and read it, to find out whether the log can take an append. Raises `LogUnavailable`."""
