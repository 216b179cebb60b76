"""Random commands on a log beside a model of it: two users, several writers each, two readers (reliability.md, case 1).

The invariants are those of reliability.md that a log alone can keep: I1, I2, I3, I4 and I6.
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from domain.errors import AlreadyStarted, Conflict, IdempotencyMismatch, InsufficientCredit, NotFinished
from domain.feed import Cursor, Logged
from domain.generation import Generation
from domain.ports.log import Append
from domain.rehydrate import generation_of
from domain.stages import FLOWS, Kind
from support.builders import (
    PROPERTY,
    CountedEntropy,
    EventRecorder,
    OpenLog,
    RecordingFollower,
    SteppableClock,
    body,
    from_another_writer,
    path_of,
)
from support.event_log import LOGS, examples_of

T = TypeVar("T")

CREDITS = 4
USERS = ("ada", "bob")
TERMINAL = ("completed", "failed")
FOREVER = 1 << 60


@dataclass
class Known:
    """What the model knows of one generation."""

    user_id: str
    generation: Generation
    positions: list[int]
    statuses: list[str]
    key: str | None
    fingerprint: str
    #: Older states of it that somebody may still hold.
    stale: list[Generation] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.statuses[-1] in TERMINAL

    @property
    def end(self) -> int:
        return self.positions[-1] if self.ended else FOREVER


class Place(NamedTuple):
    """Where a reader stands: a cursor, and what the model says its holder has been told."""

    cursor: Cursor
    attached_at: int
    upto: int
    received: tuple[int, ...]


class LogMachine(RuleBasedStateMachine):
    open_log: OpenLog

    @initialize()
    def open(self) -> None:
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.clock = SteppableClock()
        self.follower = RecordingFollower()
        self.log = self.run(self.stack.enter_async_context(self.open_log(clock=self.clock, credits=CREDITS)))
        self.run(self.stack.enter_async_context(self.log.follow(self.follower)))
        self.recorder = EventRecorder(self.log, self.clock, CountedEntropy())
        self.alive: dict[str, Known] = {}
        self.ever: dict[str, Known] = {}
        self.head = dict.fromkeys(USERS, 0)
        self.balance = dict.fromkeys(USERS, CREDITS)
        self.floor = dict.fromkeys(USERS, 0)
        self.severing: dict[str, list[tuple[int, int]]] = {user_id: [] for user_id in USERS}
        #: Appends whose reply was lost: the append, and the entry that it has made.
        self.lost: list[tuple[Append, Logged]] = []
        self.appended: list[Logged] = []
        self.places: dict[str, list[Place]] = {user_id: [] for user_id in USERS}
        for user_id in USERS:
            self.attach(user_id)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            try:
                self.catch_up()
            finally:
                self.run(self.stack.aclose())
                self.runner.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    # --- the model -------------------------------------------------------------------------------------

    def keyed(self, user_id: str, key: str | None) -> Known | None:
        if key is None:
            return None
        return next((known for known in self.alive.values() if (known.user_id, known.key) == (user_id, key)), None)

    def took(self, known: Known, append: Append, after: Generation, logged: Logged) -> None:
        user_id = known.user_id
        status = after.status
        self.head[user_id] += 1
        known.positions.append(self.head[user_id])
        known.statuses.append(status)
        known.generation = after
        self.balance[user_id] += {"started": -1, "failed": 1}.get(status, 0)
        assert logged.position == self.head[user_id]
        assert (logged.event_id, logged.sequence) == (append.event_id, len(known.statuses))
        assert (logged.generation_id, logged.user_id) == (after.generation_id, user_id)
        sent = body(logged)
        assert sent["status"] == status
        if status in ("started", *TERMINAL):
            assert sent["credit"] == self.balance[user_id]
        else:
            assert "credit" not in sent
        self.appended.append(logged)

    def running(self, index: int) -> Known | None:
        some = [known for known in self.alive.values() if not known.ended]
        return some[index % len(some)] if some else None

    # --- writers ---------------------------------------------------------------------------------------

    @rule(
        user_id=st.sampled_from(USERS),
        kind=st.sampled_from(["edit", "generate"]),
        face_swap=st.booleans(),
        key=st.sampled_from([None, None, "k", "l"]),
        fingerprint=st.sampled_from(["one", "one", "two"]),
        reply_lost=st.booleans(),
    )
    def start(
        self, user_id: str, kind: Kind, face_swap: bool, key: str | None, fingerprint: str, reply_lost: bool
    ) -> None:
        append, after = self.recorder.prepare_start(
            user_id, kind, key=key, fingerprint=fingerprint, face_swap=face_swap and kind == "edit"
        )
        same = self.keyed(user_id, key)
        expected: type[Exception] | None = None
        if same is not None:
            expected = AlreadyStarted if same.fingerprint == fingerprint else IdempotencyMismatch
        elif self.balance[user_id] == 0:
            expected = InsufficientCredit
        if expected is not None:
            with pytest.raises(expected) as refusal:
                self.run(self.log.append(append))
            if isinstance(refusal.value, AlreadyStarted):
                assert same is not None
                assert refusal.value.generation_id == same.generation.generation_id
            return
        logged = self.run(self.log.append(append))
        known = Known(user_id, after, [], [], key, fingerprint)
        self.alive[after.generation_id] = self.ever[after.generation_id] = known
        self.took(known, append, after, logged)
        if reply_lost:
            self.lost.append((append, logged))

    @rule(index=st.integers(0, 9), reply_lost=st.booleans(), fails=st.sampled_from([False, False, False, False, True]))
    def move(self, index: int, reply_lost: bool, fails: bool) -> None:
        known = self.running(index)
        if known is None:
            return
        generation = known.generation
        path = path_of(generation.kind, face_swap=generation.request.face_swap)
        status = "failed" if fails else path[path.index(generation.status) + 1]
        append, after = self.recorder.prepare(generation, status)
        logged = self.run(self.log.append(append))
        known.stale.append(generation)
        self.took(known, append, after, logged)
        if reply_lost:
            self.lost.append((append, logged))

    @rule(index=st.integers(0, 9))
    def repeat(self, index: int) -> None:
        known = self.running(index)
        if known is None or not FLOWS[known.generation.kind][known.generation.status].repeats:
            return
        generation = known.generation
        if generation.status not in generation.allowed:
            return
        append, after = self.recorder.prepare(generation, generation.status, progress=generation.progress + 1)
        logged = self.run(self.log.append(append))
        known.stale.append(generation)
        self.took(known, append, after, logged)

    @rule(index=st.integers(0, 9), which=st.integers(0, 9), cancels=st.booleans())
    def write_stale(self, index: int, which: int, cancels: bool) -> None:
        """Somebody goes on, or cancels, from a state that has passed."""
        some = [known for known in self.ever.values() if known.stale]
        if not some:
            return
        known = some[index % len(some)]
        generation = known.stale[which % len(known.stale)]
        path = path_of(generation.kind, face_swap=generation.request.face_swap)
        status = "failed" if cancels else path[path.index(generation.status) + 1]
        append, _ = self.recorder.prepare(generation, status)
        with pytest.raises(Conflict):
            self.run(self.log.append(append))

    @precondition(lambda self: self.lost)
    @rule(index=st.integers(0, 9), same_writer=st.booleans())
    def try_again(self, index: int, same_writer: bool) -> None:
        """An append whose reply was lost comes again; or one with equal bytes, by somebody else."""
        append, logged = self.lost[index % len(self.lost)]
        known = self.alive.get(append.generation_id)
        if known is None:
            if append.start is None:
                with pytest.raises(Conflict):
                    self.run(self.log.append(append))
            return
        if same_writer:
            end = known.end if known.ended else None
            assert self.run(self.log.append(append)) == logged._replace(end=end)
            return
        refused = (Conflict, AlreadyStarted) if append.start is not None else Conflict
        with pytest.raises(refused):
            self.run(self.log.append(from_another_writer(append, append.event_id ^ 1)))

    @rule(index=st.integers(0, 9), retention=st.booleans())
    def remove(self, index: int, retention: bool) -> None:
        some = list(self.alive.values())
        if not some:
            assert self.run(self.log.remove("edit_1_unknown", retention=retention)) is False
            return
        known = some[index % len(some)]
        generation_id, user_id = known.generation.generation_id, known.user_id
        if not known.ended:
            with pytest.raises(NotFinished):
                self.run(self.log.remove(generation_id, retention=retention))
            return
        assert self.run(self.log.remove(generation_id, retention=retention)) is True
        assert self.run(self.log.remove(generation_id, retention=retention)) is False
        del self.alive[generation_id]
        if retention:
            self.floor[user_id] = max(self.floor[user_id], known.end)
        else:
            self.severing[user_id].append((known.positions[0], known.end))

    # --- readers ---------------------------------------------------------------------------------------

    @rule(user_id=st.sampled_from(USERS))
    def attach(self, user_id: str) -> None:
        cursor = self.run(self.log.head_cursor(user_id))
        assert cursor.live == self.head[user_id]
        self.places[user_id].append(Place(cursor, self.head[user_id], 0, ()))

    @rule(user_id=st.sampled_from(USERS), back=st.sampled_from([0, 0, 0, 1, 2, 5, 9]), limit=st.integers(1, 7))
    def read(self, user_id: str, back: int, limit: int) -> None:
        """A reader reads a page, from where it is or from a place where it was when its connection fell."""
        places = self.places[user_id]
        self.page(user_id, places[max(0, len(places) - 1 - back)], limit)

    def unusable(self, user_id: str, place: Place) -> bool:
        """The floor has passed the place, or it lies in a deleted generation of which the reader knows."""
        live = place.cursor.live
        return live < self.floor[user_id] or any(
            first <= live < last and (first <= place.attached_at or first in place.received)
            for first, last in self.severing[user_id]
        )

    def wanted(self, user_id: str, place: Place) -> list[tuple[int, str, int]]:
        return sorted(
            (position, known.generation.generation_id, sequence)
            for known in self.alive.values()
            if known.user_id == user_id
            for sequence, position in enumerate(known.positions, 1)
            if position > place.upto and (position > place.attached_at or known.end > place.attached_at)
        )

    def page(self, user_id: str, place: Place, limit: int) -> Place | None:
        cursor = Cursor.parse(place.cursor.text(self.log.epoch), self.log.epoch)
        assert cursor is not None
        feed = self.run(self.log.feed(user_id, after=cursor.seen, anchor=cursor.live, limit=limit))
        assert (feed.head, feed.floor) == (self.head[user_id], self.floor[user_id])
        assert cursor.usable(feed) is not self.unusable(user_id, place)
        if not cursor.usable(feed):
            note(f"{cursor} is lost")
            return None
        sent, behind = cursor.advance(feed)
        expected = [wanted for wanted in self.wanted(user_id, place) if wanted[0] <= feed.upto]
        assert [(entry.position, entry.generation_id, entry.sequence) for entry, _ in sent] == expected
        assert feed.upto > cursor.seen or feed.upto == feed.head
        handed = place
        for entry, after in sent:
            handed = Place(after, place.attached_at, entry.position, (*handed.received, entry.position))
            self.places[user_id].append(handed)
        handed = handed._replace(cursor=behind, upto=feed.upto)
        self.places[user_id].append(handed)
        return handed

    def catch_up(self) -> None:
        """I4: whoever reads on to the head has been told all that was wanted, once and in order."""
        for user_id in USERS:
            attached = Place(self.run(self.log.head_cursor(user_id)), self.head[user_id], 0, ())
            for place in (attached, self.places[user_id][-1]):
                reader: Place | None = place
                every = [*place.received, *(position for position, *_ in self.wanted(user_id, place))]
                while reader is not None and reader.upto < self.head[user_id]:
                    reader = self.page(user_id, reader, 3)
                assert reader is not None or place is not attached
                if reader is not None:
                    assert list(reader.received) == every
                    assert len(set(every)) == len(every)

    # --- invariants ------------------------------------------------------------------------------------

    @invariant()
    def every_generation_is_contiguous_and_ends_once_and_folds_to_what_was_moved(self) -> None:
        for generation_id, known in self.ever.items():
            history = self.run(self.log.generation(generation_id))
            if generation_id not in self.alive:
                assert history is None
                continue
            assert history is not None
            sent = [body(entry) for entry in history.events]
            assert [event["sequence"] for event in sent] == list(range(1, len(known.statuses) + 1))  # I1
            assert [event["status"] for event in sent] == known.statuses
            assert not [status for status in known.statuses[:-1] if status in TERMINAL]  # I2
            assert [entry.position for entry in history.events] == known.positions
            folded, moved = generation_of(history), known.generation
            assert folded.snapshot() == moved.snapshot()  # I3
            assert (folded.allowed, folded.finished) == (moved.allowed, moved.finished)

    @invariant()
    def balances_are_what_was_not_reserved_or_came_back(self) -> None:
        for user_id in USERS:
            ever = [known for known in self.ever.values() if known.user_id == user_id]
            refunded = sum(known.statuses[-1] == "failed" for known in ever)
            assert self.run(self.log.standing(user_id)).credit == CREDITS - len(ever) + refunded  # I6

    @invariant()
    def lists_tell_who_is_there(self) -> None:
        for user_id in USERS:
            own = [known for known in self.alive.values() if known.user_id == user_id]
            own.sort(key=lambda known: -known.positions[0])
            for active in (None, True, False):
                listed = self.run(self.log.generations(user_id, active=active, limit=1_000))
                assert [history.generation_id for history in listed] == [
                    known.generation.generation_id for known in own if active in (None, not known.ended)
                ]
        unfinished = {history.generation_id for history in self.run(self.log.unfinished())}
        assert unfinished == {generation_id for generation_id, known in self.alive.items() if not known.ended}

    @invariant()
    def the_follower_heard_every_entry_once_in_order(self) -> None:
        count = len(self.appended)
        assert self.run(self.follower.until(lambda entries: len(entries) >= count)) == self.appended


@pytest.mark.parametrize(("name", "examples"), examples_of({"memory": 40, "sqlite": 12, "postgres": 2}, 40))
def test_any_sequence_of_operations_keeps_the_invariants_of_the_log(name: str, examples: int) -> None:
    machine = type("Machine", (LogMachine,), {"open_log": staticmethod(LOGS[name])})
    run_state_machine_as_test(machine, settings=settings(PROPERTY, max_examples=examples, stateful_step_count=40))
