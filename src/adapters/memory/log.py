"""The event log in memory. It is lost with the process, and each process has an epoch of its own.

No method yields to the event loop, so each is atomic. A generation's events are kept in columns, and a user's feed is a
list of generations by position. Once a generation has ended, an event takes less than 1.5 times its JSON.
"""

import bisect
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, islice, takewhile
from typing import Any, NamedTuple

from domain.append_rules import Known, decide
from domain.errors import CreditsOff, IdempotencyMismatch, NotFinished
from domain.events import CONTINUE, NAMES, decode, failure_code
from domain.feed import NO_IMAGES, Cursor, Feed, Logged, zero_id
from domain.followers import Followers
from domain.ports.ledger import Standing
from domain.ports.log import Append, Deliver, History, IdempotencyRecord, Removed, Start, UserRemoved
from domain.ports.overview import Filter, Listing
from domain.ports.system import Clock


@dataclass(slots=True, eq=False)
class _Record:
    """One generation."""

    user: "_User"
    generation_id: str
    start: Start
    #: The JSON of each event; once the generation has ended, all in one object, a line each.
    events: list[bytes] | bytes = field(default_factory=list)
    #: Each change of the events' images: from which index on, and the fields and names in turn. A dict would be larger.
    images: tuple[tuple[Any, ...], ...] = ()
    #: The position and the id of each event, in turn.
    places: "array[int]" = field(default_factory=lambda: array("Q"))
    ended_at: datetime | None = None
    end_name: str = ""
    #: Its rank among all starts, and the code of its failure.
    number: int = 0
    code: str | None = None
    free: bool = False

    @property
    def deleted(self) -> bool:
        """Whether only its tombstones are left."""
        return not self.events

    @property
    def first(self) -> int:
        return self.places[0]

    @property
    def last(self) -> int:
        return self.places[-2]

    @property
    def end(self) -> int | None:
        return None if self.ended_at is None else self.last

    def json(self) -> list[bytes]:
        """The JSON of each event; nothing if the generation is deleted."""
        return self.events.splitlines() if isinstance(self.events, bytes) else self.events

    def entries(self, indexes: Iterable[int], events: Sequence[bytes]) -> list[Logged]:
        """The entries at these indexes; `events` is what `json` returns."""
        places, end, user_id = self.places, self.end, self.user.user_id
        return [
            Logged(
                user_id, position := places[2 * index], places[2 * index + 1], self.generation_id, index + 1,
                self.end_name if position == end else CONTINUE if index else NAMES["started"],
                events[index] if events else None,
                places[0], end, self.images_at(index) if self.images else NO_IMAGES,
            )
            for index in indexes
        ]  # fmt: skip

    def images_at(self, index: int) -> Mapping[str, str]:
        for start, *names in reversed(self.images):
            if start <= index:
                return dict(zip(names[::2], names[1::2], strict=True))
        return NO_IMAGES

    def index_at(self, position: int) -> int:
        return bisect.bisect_left(range(len(self.places) // 2), position, key=lambda index: self.places[2 * index])

    def at(self, position: int, events: Sequence[bytes]) -> Logged:
        """The entry at this position; `events` is what `json` returns."""
        return self.entries([self.index_at(position)], events)[0]

    def matches(self, wanted: Filter) -> bool:
        stated = self.generation_id, self.user.user_id, self.start.kind, wanted.status, self.code
        if any(value not in (None, own) for value, own in zip(wanted, stated, strict=True)):
            return False
        if wanted.status in (None, "active", "finished"):
            return wanted.status in (None, "active" if self.ended_at is None else "finished")
        if self.ended_at is not None:
            return NAMES.get(wanted.status) == self.end_name
        return decode(self.json()[-1]).status == wanted.status

    def history(self, *, summary: bool = True) -> History:
        events = self.json()
        count = len(events)
        indexes = sorted({0, max(count - 2, 0), count - 1}) if summary else range(count)
        entries = self.entries(indexes, events)
        return History(self.user.user_id, self.generation_id, self.start.kind, self.start.request, entries, self.free)


@dataclass(slots=True, eq=False)
class _User:
    """One user: feed, balance, idempotency keys."""

    user_id: str
    floor_id: int
    credit: int
    floor: int = 0
    #: The generation at each position from `base` + 1 on; ``None`` if retention has purged it.
    feed: list[_Record | None] = field(default_factory=list)
    base: int = 0
    #: In order of their first positions.
    generations: list[_Record] = field(default_factory=list)
    active: dict[str, _Record] = field(default_factory=dict)
    #: Deleted generations with tombstones above the floor.
    deleted: list[_Record] = field(default_factory=list)
    #: No key is ``None``.
    keys: dict[str | None, IdempotencyRecord] = field(default_factory=dict)

    @property
    def head(self) -> int:
        return self.base + len(self.feed)

    def id_at(self, position: int) -> int | None:
        if position == self.floor:
            return self.floor_id
        if not self.floor < position <= self.head:
            return None
        record = self.feed[position - self.base - 1]
        return None if record is None else record.places[2 * record.index_at(position) + 1]

    def forget_below_floor(self) -> list[_Record]:
        """Drop and return the deleted generations below the floor, and trim the empty start of the feed."""
        passed = [record for record in self.deleted if record.last <= self.floor]
        for record in passed:
            self.deleted.remove(record)
            for position in record.places[::2]:
                if position > self.base:
                    self.feed[position - self.base - 1] = None
        empty = next((i for i, kept in enumerate(self.feed) if kept is not None), len(self.feed))
        del self.feed[:empty]
        self.base += empty
        return passed


class _Grant(NamedTuple):
    """The result recorded for an idempotency key, and when it expires."""

    amount: int
    credit: int
    until: datetime


class MemoryLog:
    """The ports `EventLog`, `Ledger`, `Retention`, `Overview` and `WebhookOutbox` in memory."""

    durable = False

    def __init__(self, *, epoch: str, credits: int | None, clock: Clock, outbox: bool = False) -> None:
        """`credits`: a new user's balance; ``None``: no balances. `outbox`: record ends as undelivered webhooks."""
        self.epoch = epoch
        self._credits = credits
        self._clock = clock
        self._users: dict[str, _User] = {}
        self._records: dict[str, _Record] = {}
        self._starts = 0
        self._unfinished: dict[str, _Record] = {}
        #: In order of their ends, with deleted ones until retention purges them.
        self._finished: dict[str, _Record] = {}
        #: By user and idempotency key.
        self._grants: dict[tuple[str, str], _Grant] = {}
        self._outbox = outbox
        self._undelivered: dict[str, _Record] = {}
        self._followers = Followers()

    async def append(self, entry: Append) -> Logged:
        user = self._users.get(entry.user_id) or self._new_user(entry.user_id)
        record = self._records.get(entry.generation_id)
        accepted = decide(entry, self._known(entry, user, record), credits=self._credits, clock=self._clock)
        if accepted is None:
            assert record is not None
            return record.entries([entry.sequence - 1], record.json())[0]
        user.credit = accepted.credit or 0
        if record is None:
            assert entry.start is not None
            self._starts += 1
            record = _Record(user, entry.generation_id, entry.start, number=self._starts)
            self._users[user.user_id] = user
            self._records[entry.generation_id] = record
            user.generations.append(record)
            self._unfinished[entry.generation_id] = user.active[entry.generation_id] = record
            if entry.start.key is not None:
                user.keys[entry.start.key] = IdempotencyRecord(entry.generation_id, entry.start.fingerprint)
        user.feed.append(record)
        position, index, end = user.base + len(user.feed), entry.sequence - 1, None
        if (entry.images or record.images) and entry.images != record.images_at(index):
            record.images += ((index, *chain(*entry.images.items())),)
        assert isinstance(record.events, list)
        record.events.append(accepted.event)
        record.places.extend((position, entry.event_id))
        record.free = entry.free
        if entry.terminal:
            end = position
            record.ended_at, record.end_name = entry.at, entry.name
            record.code = failure_code(entry.name, entry.event)
            record.events = b"\n".join(record.events)
            del self._unfinished[entry.generation_id], user.active[entry.generation_id]
            self._finished[entry.generation_id] = record
            if self._outbox:
                self._undelivered[entry.generation_id] = record
        logged = Logged(
            entry.user_id, position, entry.event_id, entry.generation_id, entry.sequence, entry.name, accepted.event,
            record.places[0], end, entry.images,
        )  # fmt: skip
        self._followers.deliver(logged)
        return logged

    async def mark_paid(self, generation_id: str) -> None:
        if record := self._records.get(generation_id):
            record.free = False

    async def find_by_idempotency_key(self, user_id: str, key: str) -> IdempotencyRecord | None:
        user = self._users.get(user_id)
        return user.keys.get(key) if user else None

    async def generation(self, generation_id: str) -> History | None:
        record = self._records.get(generation_id)
        return record.history(summary=False) if record else None

    async def summary(self, generation_id: str) -> History | None:
        record = self._records.get(generation_id)
        return record.history() if record else None

    async def generations(
        self, user_id: str, *, active: bool | None = None, before: int | None = None, limit: int
    ) -> Sequence[History]:
        user = self._users.get(user_id)
        if user is None:
            return []
        records = reversed(user.active.values() if active else user.generations)
        older = (each for each in records if before is None or each.first < before)
        wanted = (each for each in older if active is not False or each.ended_at is not None)
        return [record.history() for record in islice(wanted, limit)]

    async def unfinished(self) -> Sequence[History]:
        return [record.history() for record in self._unfinished.values()]

    async def listing(self, wanted: Filter, *, before: int | None = None, limit: int) -> Listing:
        user = self._users.get(wanted.user_id or "")
        records = self._records.values() if wanted.user_id is None else user.generations if user else ()
        older = (each for each in reversed(records) if before is None or each.number < before)
        found = list(islice((each for each in older if each.matches(wanted)), limit + 1))
        following = found[limit - 1].number if len(found) > limit else None
        return Listing([record.history() for record in found[:limit]], following)

    async def failures(self, since: datetime) -> Mapping[str, int]:
        recent = takewhile(lambda each: each.ended_at and each.ended_at >= since, reversed(self._finished.values()))
        return Counter(each.code for each in recent if each.code is not None and not each.deleted)

    async def images(self, generation_id: str) -> Collection[str]:
        record = self._records.get(generation_id)
        return {name for change in record.images for name in change[2::2]} if record else ()

    async def set_aside(self, generation_id: str) -> bool:
        return False

    async def finished_before(self, moment: datetime, limit: int) -> Sequence[str]:
        oldest = islice(self._finished.values(), limit)
        return [each.generation_id for each in oldest if each.ended_at is not None and each.ended_at < moment]

    async def head_cursor(self, user_id: str) -> Cursor:
        user = self._users.get(user_id)
        if user is None:
            return Cursor(0, zero_id(self.epoch, user_id), 0)
        oldest = next(iter(user.active.values()), None)
        return Cursor(user.head, user.id_at(user.head) or 0, oldest.first - 1 if oldest else user.head)

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        user = self._users.get(user_id)
        if user is None:
            return Feed([], 0, 0, 0, zero_id(self.epoch, user_id) if anchor == 0 else None, ())
        entries: list[Logged] = []
        events: dict[_Record, list[bytes]] = {}
        position = max(after, user.base)
        while position < user.head and len(entries) < limit:
            position += 1
            if (record := user.feed[position - user.base - 1]) is not None:
                if record not in events:
                    events[record] = record.json()
                entries.append(record.at(position, events[record]))
        spans = [(record.first, record.last) for record in user.deleted]
        deleted_spans = [first for first, last in spans if first <= anchor < last]
        return Feed(entries, position, user.head, user.floor, user.id_at(anchor), deleted_spans)

    def follow(self, deliver: Deliver) -> AbstractAsyncContextManager[None]:
        return self._followers.follow(deliver)

    async def standing(self, user_id: str) -> Standing:
        user = self._users.get(user_id)
        credit = self._credits if user is None or self._credits is None else user.credit
        return Standing(credit, len(user.active) if user else 0)

    async def grant(self, user_id: str, amount: int, *, key: str | None, at: datetime, until: datetime) -> int:
        if self._credits is None:
            raise CreditsOff
        for known, grant in list(self._grants.items()):
            if grant.until > at:
                break  # Grants expire in order of insertion.
            del self._grants[known]
        if key is not None and (before := self._grants.get((user_id, key))) and before.until > at:
            if before.amount != amount:
                raise IdempotencyMismatch
            return before.credit
        user = self._users.setdefault(user_id, self._new_user(user_id))
        user.credit = max(0, user.credit + amount)
        if key is not None:
            self._grants[user_id, key] = _Grant(amount, user.credit, until)
        return user.credit

    async def remove(self, generation_id: str, *, retention: bool) -> bool:
        if generation_id in self._unfinished:
            raise NotFinished
        record = self._finished.get(generation_id)
        if record is None or (record.deleted and not retention):
            return False
        user = record.user
        if not record.deleted:
            del self._records[generation_id]
            user.generations.remove(record)
            if record.start.key is not None:
                del user.keys[record.start.key]
            self._undelivered.pop(generation_id, None)
            record.events = b""
            record.images = ()
            record.start = record.start._replace(request=b"")
            user.deleted.append(record)
            self._followers.deliver(Removed(user.user_id, generation_id))
        if retention and record.last > user.floor:
            user.floor, user.floor_id = record.last, record.places[-1]
        for passed in user.forget_below_floor():
            del self._finished[passed.generation_id]
        return True

    async def remove_user(self, user_id: str) -> Sequence[str]:
        user = self._users.get(user_id)
        if user is None:
            return []
        if user.active:
            raise NotFinished
        kept, deleted = ([record.generation_id for record in records] for records in (user.generations, user.deleted))
        for generation_id in (*kept, *deleted):
            for records in (self._records, self._finished, self._undelivered):
                records.pop(generation_id, None)
        self._grants = {known: grant for known, grant in self._grants.items() if known[0] != user_id}
        del self._users[user_id]
        for generation_id in kept:
            self._followers.deliver(Removed(user_id, generation_id))
        self._followers.deliver(UserRemoved(user_id))
        return [*kept, *deleted]

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        return [record.at(record.last, record.json()) for record in islice(self._undelivered.values(), limit)]

    async def receiver_gone(self) -> None:
        pass

    async def delivered(self, generation_id: str) -> None:
        self._undelivered.pop(generation_id, None)

    async def probe(self) -> None:
        """Memory cannot fail."""

    def _known(self, entry: Append, user: _User, record: _Record | None) -> Known:
        known = record or self._finished.get(entry.generation_id)  # A deleted one is no longer in `_records`.
        sequence = len(record.places) // 2 if record else 0
        return Known(
            known is not None,
            known is not None and known.ended_at is not None,
            sequence,
            record.places[2 * entry.sequence - 1] if record and 0 < entry.sequence <= sequence else None,
            user.keys.get(entry.start.key) if entry.start else None,
            len(user.active),
            user.credit if self._credits is not None else None,
            self._credits is not None,
        )

    def _new_user(self, user_id: str) -> _User:
        return _User(user_id, zero_id(self.epoch, user_id), self._credits or 0)
