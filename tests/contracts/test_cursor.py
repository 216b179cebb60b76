"""A cursor yields exactly the events still to be sent, or is unusable. Compared with a trivially correct reader."""

import asyncio
from collections.abc import Collection
from typing import NamedTuple

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from domain.feed import Cursor, Feed, Logged
from domain.generation import Generation
from support.builders import NOON, PROPERTY, EventRecorder, OpenLog, SteppableClock, WholeLog
from support.event_log import LOGS, examples_of

logs = pytest.mark.parametrize("open_log", list(LOGS.values()), ids=list(LOGS))


def entry(
    position: int, *, end: int | None = None, first: int = 1, event_id: int | None = None, gone: bool = False
) -> Logged:
    return Logged(
        "ada",
        position,
        position * 10 if event_id is None else event_id,
        "edit_1_x",
        1,
        "continue",
        None if gone else b"{}",
        first,
        end,
    )


def feed(
    *entries: Logged,
    upto: int,
    head: int | None = None,
    floor: int = 0,
    anchor_id: int | None = 0,
    deleted_spans: Collection[int] = (),
) -> Feed:
    return Feed(entries, upto, upto if head is None else head, floor, anchor_id, deleted_spans)


# --- text ------------------------------------------------------------------------------------------------

cursors = st.builds(
    lambda live, event_id, seen, tombstones: Cursor(max(live, seen), event_id, min(live, seen), tuple(tombstones)),
    st.integers(0, 10**15 - 1),
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**15 - 1),
    st.lists(st.integers(1, 10**15 - 1), max_size=3),
)
epochs = st.from_regex(r"\A[a-z0-9]{1,32}\Z")

#: Texts that resemble cursors.
near = st.from_regex(r"\A[a-z0-9]{0,3}[.]?0{0,3}[0-9]{0,17}[.]-?[0-9a-fA-F]{0,18}[.][0-9 _+٣]{0,5}\n?\Z")


@PROPERTY
@given(cursors, epochs)
def test_the_text_of_a_cursor_parses_to_the_same_cursor(cursor: Cursor, epoch: str) -> None:
    assert Cursor.parse(cursor.text(epoch), epoch) == cursor


@PROPERTY
@given(cursors, epochs, epochs)
def test_a_cursor_of_another_epoch_does_not_parse(cursor: Cursor, epoch: str, other: str) -> None:
    parsed = Cursor.parse(cursor.text(epoch), other)
    assert parsed == (cursor if epoch == other else None)


anything = st.one_of(
    st.text(),
    near,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(),
    st.lists(st.text(), max_size=3),
    st.dictionaries(st.text(), st.integers(), max_size=2),
)


@PROPERTY
@given(anything)
def test_parsing_never_raises(text: object) -> None:
    parsed = Cursor.parse(text, "e1")
    assert parsed is None or (isinstance(text, str) and text.startswith("e1."))


@PROPERTY
@given(cursors, st.data())
def test_a_changed_character_yields_another_cursor_or_none(cursor: Cursor, data: st.DataObject) -> None:
    text = cursor.text("e1")
    index = data.draw(st.integers(0, len(text) - 1))
    changed = text[:index] + data.draw(st.characters()) + text[index + 1 :]
    parsed = Cursor.parse(changed, "e1")
    if _canonical(changed):
        assert (parsed == cursor) == (changed == text)


def _canonical(text: str) -> bool:
    """Without leading zeros, which have a test of their own below."""
    return all(part == "0" or not part.startswith("0") for part in text.replace("-", ".").split("."))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "...",
        "e1",
        "e1.1.a",
        "e1.1.a.1.",
        "e1.1.a.1.A",
        "e1.1.a.1-",
        "e1.1.a.1-0",
        "e1.1.a.1-01",
        "e1.1.a.1" + 101 * "-1",
        "e1.1.a.1.a.a",
        "e1.-1.a.1",
        "e1.1.A.1",
        "e1.1.0xa.1",
        "e1.1.a.2",
        "e1.1.a.1 ",
        " e1.1.a.1",
        "e1.1.a.1\n",
        "e1.١.a.1",
        "e1.1_0.a.1",
        "e1." + "9" * 16 + ".a.1",
        "e1.1." + "f" * 17 + ".1",
        "E1.1.a.1",
        "e1.1..1",
        "e1.1.a.1\x00",
        "\ud800",
    ],
)
def test_a_malformed_text_does_not_parse(text: str) -> None:
    assert Cursor.parse(text, "e1") is None


@pytest.mark.parametrize("text", ["e1.01.a.1", "e1.1.0a.1", "e1.1.a.01", "e1.00.a.0"])
def test_only_the_exact_text_parses(text: str) -> None:
    assert Cursor.parse(text, "e1") is None


# --- usable, wants, advance ------------------------------------------------------------------------------


def test_a_cursor_is_usable_if_its_event_id_matches_and_nothing_wanted_is_lost() -> None:
    cursor = Cursor(5, 50, 2)
    assert cursor.usable(feed(upto=5, anchor_id=50))
    assert cursor.usable(feed(upto=5, anchor_id=50, floor=5))
    assert not cursor.usable(feed(upto=9, anchor_id=50, floor=6))
    assert not cursor.usable(feed(upto=5, anchor_id=51))
    assert not cursor.usable(feed(upto=5, anchor_id=None))
    assert not cursor.usable(feed(upto=5, anchor_id=50, deleted_spans=[3]))


def test_a_reader_that_never_saw_a_deleted_generation_goes_on() -> None:
    cursor = Cursor(5, 50, 5, (2, 3))
    assert cursor.usable(feed(upto=5, anchor_id=50, deleted_spans=[3]))
    assert cursor.usable(feed(upto=5, anchor_id=50, deleted_spans=[3, 2]))
    assert not cursor.usable(feed(upto=5, anchor_id=50, deleted_spans=[2, 3, 4]))


def test_a_tombstone_is_open_from_its_first_position_to_its_last() -> None:
    places = [entry(2, first=2, end=5, gone=True), entry(3, first=3), entry(4, first=4, end=6, gone=True)]
    cursor = Cursor(1, 10, 1)
    tombstones = []
    for each in (*places, entry(5, first=2, end=5, gone=True), entry(6, first=4, end=6, gone=True)):
        cursor = cursor.advanced_past(each)
        tombstones.append(cursor.open_tombstones)
    assert tombstones == [(2,), (2,), (2, 4), (4,), ()]
    assert Cursor(2, 20, 2).advanced_past(entry(3, first=2, end=5, gone=True)).open_tombstones == ()


def test_retention_below_live_leaves_a_cursor_usable() -> None:
    assert Cursor(5, 50, 0).usable(feed(upto=9, anchor_id=50, floor=4))


@pytest.mark.parametrize(
    ("position", "end", "gone", "wanted"),
    [
        (3, None, False, True),
        (3, 8, False, True),
        (3, 5, False, False),
        (3, 3, False, False),
        (5, 5, False, False),
        (6, 6, False, True),
        (6, None, False, True),
        (6, 7, True, False),
        (3, None, True, False),
    ],
)
def test_up_to_live_only_unfinished_generations_are_wanted_and_after_it_everything(
    position: int, end: int | None, gone: bool, wanted: bool
) -> None:
    assert Cursor(5, 50, 2).wants(entry(position, end=end, gone=gone)) is wanted


def test_up_to_live_only_seen_advances_and_after_it_both() -> None:
    cursor = Cursor(5, 50, 2)
    assert cursor.advanced_past(entry(3)) == Cursor(5, 50, 3)
    assert cursor.advanced_past(entry(5)) == Cursor(5, 50, 5)
    assert cursor.advanced_past(entry(6)) == Cursor(6, 60, 6)


def test_advancing_returns_each_wanted_event_with_the_cursor_after_it() -> None:
    cursor = Cursor(5, 50, 2)
    read = feed(entry(3), entry(4, end=4), entry(5, end=7), entry(6, gone=True), entry(7, end=7), upto=7, anchor_id=50)
    wanted, behind = cursor.advance(read)
    assert [(sent.position, after) for sent, after in wanted] == [
        (3, Cursor(5, 50, 3)),
        (5, Cursor(5, 50, 5)),
        (7, Cursor(7, 70, 7)),
    ]
    assert behind == Cursor(7, 70, 7)


def test_advancing_passes_purged_and_unwanted_positions() -> None:
    cursor = Cursor(5, 50, 0)
    assert cursor.advance(feed(upto=3, head=9, anchor_id=50)) == ([], Cursor(5, 50, 3))
    assert cursor.advance(feed(entry(4, end=4), upto=4, head=9, anchor_id=50)) == ([], Cursor(5, 50, 4))
    assert cursor.advance(feed(upto=5, head=5, anchor_id=50)) == ([], Cursor(5, 50, 5))


def test_tombstones_after_live_are_skipped() -> None:
    assert Cursor(5, 50, 5).advance(feed(entry(6, gone=True), upto=6, anchor_id=50)) == ([], Cursor(6, 60, 6))


@PROPERTY
@given(cursors, st.integers(0, 10), st.integers(0, 10))
def test_advancing_never_moves_back_or_beyond_the_read_positions(cursor: Cursor, count: int, step: int) -> None:
    positions = [cursor.seen + 1 + index * (step + 1) for index in range(count)]
    upto = max(positions, default=cursor.seen)
    _, behind = cursor.advance(feed(*map(entry, positions), upto=upto, anchor_id=cursor.event_id))
    assert behind.seen <= behind.live
    assert cursor.seen <= behind.seen <= max(upto, cursor.seen)
    assert behind.live == max(cursor.live, *positions, 0)


# --- the property: from any position, exactly the wanted events -------------------------------------------


class CursorHolder(NamedTuple):
    """A cursor that was handed out, the start of the reader that holds it, and what this reader has been sent."""

    cursor: Cursor
    attached_at: int
    position: int
    received: tuple[int, ...]


class World:
    """A log with one user, and a list of every event that was ever appended."""

    def __init__(self, log: WholeLog) -> None:
        self.log = log
        self.recorder = EventRecorder(log, SteppableClock(NOON))
        self.running: list[Generation] = []
        #: The generation of the event at each position.
        self.ids: list[str] = []
        self.ends: dict[str, int] = {}
        self.purged: set[str] = set()
        self.deleted: set[str] = set()
        self.handed_out: list[CursorHolder] = []
        self.delivered = 0
        self.refused = 0

    async def start(self, _: int) -> None:
        self.running.append(await self.recorder.start())
        self.ids.append(self.running[-1].generation_id)

    async def move(self, which: int) -> None:
        if not self.running:
            return
        index = which % len(self.running)
        generation = self.running.pop(index)
        status = "failed" if which % 3 == 0 or generation.status == "composition" else "composition"
        generation = await self.recorder.move(generation, status)
        self.ids.append(generation.generation_id)
        if status == "failed":
            self.ends[generation.generation_id] = len(self.ids)
        else:
            self.running.insert(index, generation)

    async def delete(self, which: int) -> None:
        there = [name for name in self.ends if name not in self.purged | self.deleted]
        if there:
            gone = there[which % len(there)]
            assert await self.log.remove(gone, retention=False)
            self.deleted.add(gone)

    async def purge(self, which: int) -> None:
        """Retention removes the generation that ended first; sometimes it skips one."""
        there = [name for name in self.ends if name not in self.purged | self.deleted]
        if there:
            gone = there[1 if which % 4 == 0 and len(there) > 1 else 0]
            assert await self.log.remove(gone, retention=True)
            self.purged.add(gone)

    async def attach(self, _: int) -> None:
        cursor = await self.log.head_cursor("ada")
        self.handed_out.append(CursorHolder(cursor, len(self.ids), 0, ()))

    async def read(self, which: int) -> None:
        """One page after a cursor, which may have been handed out long ago."""
        if self.handed_out:
            await self.page(self.handed_out[-1 - which % len(self.handed_out)], 1 + which % 5)

    @property
    def floor(self) -> int:
        return max((self.ends[name] for name in self.purged), default=0)

    def may_be_refused(self, holder: CursorHolder) -> bool:
        """The floor has passed the cursor, or it lies in a deleted generation whose start its reader has seen."""
        live = holder.cursor.live
        spans = [(self.ids.index(name) + 1, self.ends[name]) for name in self.deleted]
        return live < self.floor or any(
            first <= live < last and (first <= holder.attached_at or first in holder.received) for first, last in spans
        )

    def wanted(self, holder: CursorHolder) -> list[int]:
        """The events still to be sent: everything since the start, and all of what was unfinished then."""
        gone = self.purged | self.deleted
        return [
            position
            for position, name in enumerate(self.ids, 1)
            if position > holder.position
            and name not in gone
            and (position > holder.attached_at or self.ends.get(name, 1 << 60) > holder.attached_at)
        ]

    async def page(self, holder: CursorHolder, limit: int) -> CursorHolder | None:
        cursor = Cursor.parse(holder.cursor.text(self.log.epoch), self.log.epoch)
        assert cursor == holder.cursor
        read = await self.log.feed("ada", after=cursor.seen, anchor=cursor.live, limit=limit)
        assert len(read.entries) <= limit
        if not cursor.usable(read):
            assert self.may_be_refused(holder)
            self.refused += 1
            return None
        assert not self.may_be_refused(holder)
        sent, behind = cursor.advance(read)
        positions = [logged.position for logged, _ in sent]
        expected = [position for position in self.wanted(holder) if position <= read.upto]
        assert positions == expected
        assert [logged.generation_id for logged, _ in sent] == [self.ids[position - 1] for position in positions]
        assert read.upto > cursor.seen or read.upto == read.head
        self.delivered += len(sent)
        after = holder
        for logged, handed in sent:
            after = after._replace(cursor=handed, position=logged.position, received=(*after.received, logged.position))
            self.handed_out.append(after)
        after = after._replace(cursor=behind, position=read.upto)
        self.handed_out.append(after)
        del self.handed_out[:-60]
        return after

    async def catch_up(self, holder: CursorHolder, limit: int) -> None:
        """From any position to the head: every wanted event once, in order, or the cursor is unusable."""
        expected = [*holder.received, *self.wanted(holder)]
        present: CursorHolder | None = holder
        while present is not None:
            holder = present
            if holder.cursor.seen >= len(self.ids):
                assert list(holder.received) == expected
                return
            present = await self.page(holder, limit)


command = st.tuples(
    st.sampled_from(["start", "start", "move", "move", "move", "move", "attach", "read", "read", "delete", "purge"]),
    st.integers(0, 30),
)


async def play(open_log: OpenLog, commands: list[tuple[str, int]], limits: list[int]) -> World:
    async with open_log(clock=SteppableClock(NOON), credits=None) as log:
        world = World(log)
        await world.attach(0)
        for name, which in commands:
            await getattr(world, name)(which)
        for turn, holder in enumerate(list(world.handed_out)):
            await world.catch_up(holder, limits[turn % len(limits)])
        attached = CursorHolder(await log.head_cursor("ada"), len(world.ids), 0, ())
        assert not world.may_be_refused(attached)
        await world.catch_up(attached, 1_000)
        return world


@pytest.mark.parametrize(("name", "examples"), examples_of({"memory": 100, "sqlite": 50, "postgres": 6}, 150))
def test_from_any_cursor_the_wanted_events_come_once_in_order_or_it_is_unusable(name: str, examples: int) -> None:
    limit = st.lists(st.integers(1, 9), min_size=1, max_size=4)

    @settings(PROPERTY, max_examples=examples)
    @given(commands=st.lists(command, min_size=5, max_size=60), limits=limit)
    def check(commands: list[tuple[str, int]], limits: list[int]) -> None:
        world = asyncio.run(play(LOGS[name], commands, limits))
        event(f"events told: {min(world.delivered, 40) // 10 * 10}")
        event(f"refused: {world.refused > 0}")

    check()


@logs
async def test_the_property_test_reaches_every_situation(open_log: OpenLog) -> None:
    commands = [("start", 0), ("start", 0), ("attach", 0), ("move", 1), ("read", 0), ("move", 4), ("move", 3)]
    world = await play(open_log, [*commands, ("purge", 0), ("start", 0), ("read", 3), ("attach", 0)], [1])
    assert world.delivered > 5
    assert world.refused > 0


@logs
async def test_another_users_cursor_does_not_parse(open_log: OpenLog) -> None:
    async with open_log(clock=SteppableClock()) as log:
        recorder = EventRecorder(log)
        for user_id in ("ada", "bob"):
            await recorder.run_to_end(user_id)
        for position in range(7):
            anchor_id = (await log.feed("ada", after=0, anchor=position, limit=0)).anchor_id
            assert anchor_id is not None
            cursor = Cursor(position, anchor_id, position)
            assert cursor.usable(await log.feed("ada", after=position, anchor=position, limit=10))
            assert not cursor.usable(await log.feed("bob", after=position, anchor=position, limit=10))
            assert not cursor.usable(await log.feed("cy", after=position, anchor=position, limit=10))


@logs
async def test_a_log_restored_in_an_older_state_is_detected(open_log: OpenLog) -> None:
    """The same epoch and positions, but other events: only the ids differ."""
    async with open_log(clock=SteppableClock()) as log, open_log(clock=SteppableClock()) as older:
        recorder, again = EventRecorder(log), EventRecorder(older)
        await recorder.run_to_end()
        again.entropy.event_id()
        await again.run_to_end()
        cursor = await log.head_cursor("ada")
        assert cursor.usable(await log.feed("ada", after=cursor.seen, anchor=cursor.live, limit=0))
        assert not cursor.usable(await older.feed("ada", after=cursor.seen, anchor=cursor.live, limit=0))
