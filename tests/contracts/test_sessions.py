"""The contract suite of the port Sessions, on every adapter of it."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Final
from unittest.mock import patch

import pytest

from adapters.memory.sessions import MemorySessions
from adapters.postgres import sessions as postgres_sessions
from adapters.sqlite.sessions import SqliteSessions
from domain.feed import Cursor
from domain.identity import Identity
from domain.ports.sessions import Session, Sessions
from support.builders import NOON, SteppableClock, temporary_database
from support.postgres import fresh_database, open_node

RETENTION: Final = timedelta(hours=1)
A_MOMENT: Final = 0.001


@asynccontextmanager
async def open_memory_sessions(retention: timedelta) -> AsyncIterator[Sessions]:
    yield MemorySessions(retention)


@asynccontextmanager
async def open_sqlite_sessions(retention: timedelta) -> AsyncIterator[Sessions]:
    async with temporary_database() as database:
        yield SqliteSessions(database, retention)


@asynccontextmanager
async def open_postgres_sessions(retention: timedelta) -> AsyncIterator[Sessions]:
    with patch.object(postgres_sessions, "PER_USER", 100):  # It costs some milliseconds to save one.
        async with fresh_database() as url, open_node(url, retention=retention) as storage:
            yield storage.sessions


OpenSessions = Callable[[timedelta], AbstractAsyncContextManager[Sessions]]
#: Every adapter of the port, by name.
STORES: Final[Mapping[str, OpenSessions]] = {
    "memory": open_memory_sessions,
    "sqlite": open_sqlite_sessions,
    "postgres": open_postgres_sessions,
}


def session(user: str = "ada", place: int = 7) -> Session:
    return Session(Identity(user, None, service=False), Cursor(place, 2**62 + place, place), place, "tag")


@pytest.fixture
def clock() -> SteppableClock:
    return SteppableClock()


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Sessions]:
    async with STORES[request.param](RETENTION) as store:
        yield store


@pytest.mark.parametrize(
    "kept",
    [
        session(),
        Session(Identity("ada", NOON + timedelta(microseconds=1), service=True), Cursor(10, 0, 10, (7, 9)), 12, None),
        Session(Identity("Ünï 🎨 : % * {}", None, service=False), Cursor(10**15 - 1, 2**63 - 1, 0), 0, ""),
    ],
)
async def test_a_saved_session_is_loaded_unchanged(store: Sessions, kept: Session) -> None:
    await store.save("pid", kept, at=NOON)
    assert await store.load("pid", at=NOON) == kept
    assert await store.load("pid", at=NOON) == kept  # Loading it does not use it up.


async def test_an_expired_session_is_not_restored_by_a_touch(store: Sessions) -> None:
    await store.save("pid", session(), at=NOON)
    await store.touch(["pid"], at=NOON + RETENTION)
    assert await store.load("pid", at=NOON + RETENTION) is None


@pytest.mark.parametrize("pid", ["never", "", "x" * 60_000, "a\x00b", "*", "p%d", "PID", "\ud800"])
async def test_an_unknown_pid_has_no_session_and_can_be_touched_and_ended(store: Sessions, pid: str) -> None:
    await store.save("pid", session(), at=NOON)
    assert await store.load(pid, at=NOON) is None
    await store.touch([pid], at=NOON)
    await store.end(pid)
    assert await store.load(pid, at=NOON) is None
    assert await store.load("pid", at=NOON) == session()


async def test_saving_a_pid_replaces_its_session_even_for_another_user(store: Sessions) -> None:
    await store.save("pid", session(place=1), at=NOON)
    await store.save("pid", session(place=2), at=NOON)
    assert await store.load("pid", at=NOON) == session(place=2)
    await store.save("pid", session("bob", 3), at=NOON)
    assert await store.load("pid", at=NOON) == session("bob", 3)
    await store.end("pid")
    assert await store.load("pid", at=NOON) is None


async def test_sessions_are_separate(store: Sessions) -> None:
    await store.save("one", session(place=1), at=NOON)
    await store.save("two", session(place=2), at=NOON)
    await store.save("three", session("bob", 3), at=NOON)
    await store.end("one")
    assert [await store.load(pid, at=NOON) for pid in ("one", "two", "three")] == [
        None,
        session(place=2),
        session("bob", 3),
    ]


async def test_a_session_is_kept_for_retention_after_it_was_saved(store: Sessions, clock: SteppableClock) -> None:
    await store.save("pid", session(), at=clock())
    clock.step(RETENTION.total_seconds() - A_MOMENT)
    assert await store.load("pid", at=clock()) == session()
    clock.step(A_MOMENT)  # Loading is no touch.
    assert await store.load("pid", at=clock()) is None


async def test_a_session_is_kept_for_retention_after_it_was_last_touched(
    store: Sessions, clock: SteppableClock
) -> None:
    for pid in ("touched", "left", "touched too"):
        await store.save(pid, session(), at=clock())
    for _ in range(5):
        clock.step(RETENTION.total_seconds() / 2)
        await store.touch(["touched", "gone", "touched too"], at=clock())
    clock.step(RETENTION.total_seconds() - A_MOMENT)
    assert await store.load("touched", at=clock()) == session()
    assert await store.load("touched too", at=clock()) == session()
    assert await store.load("left", at=clock()) is None
    clock.step(A_MOMENT)
    assert await store.load("touched", at=clock()) is None
    assert await store.load("touched too", at=clock()) is None


async def test_touching_an_expired_session_does_not_restore_it(store: Sessions, clock: SteppableClock) -> None:
    await store.save("pid", session(), at=clock())
    clock.step(RETENTION.total_seconds() + 1)
    assert await store.load("pid", at=clock()) is None
    await store.touch(["pid"], at=clock())
    assert await store.load("pid", at=clock()) is None


async def test_saving_again_is_a_touch(store: Sessions, clock: SteppableClock) -> None:
    await store.save("pid", session(), at=clock())
    await store.save("other", session(), at=clock.step(1))
    await store.save("pid", session(place=8), at=clock.step(1))
    clock.step(RETENTION.total_seconds() - 1)
    assert await store.load("other", at=clock()) is None
    assert await store.load("pid", at=clock()) == session(place=8)


async def test_touching_no_session_does_nothing(store: Sessions) -> None:
    await store.save("pid", session(), at=NOON)
    await store.touch([], at=NOON)
    await store.touch({"pid": 1}.keys(), at=NOON)
    assert await store.load("pid", at=NOON) == session()


async def test_a_user_with_too_many_sessions_loses_only_their_least_recently_used(
    store: Sessions, clock: SteppableClock
) -> None:
    await store.save("bobs", session("bob"), at=clock())
    await store.save("first", session(), at=clock())
    await store.save("second", session(), at=clock())
    await store.touch(["first"], at=clock.step())
    kept = 2
    while await store.load("second", at=clock()) is not None:
        assert kept < 5_000, "one user's sessions have no bound"
        await store.save(f"more {kept}", session(), at=clock())
        kept += 1
    assert kept >= 100, "a user with many devices loses some"
    assert await store.load("first", at=clock()) == session()
    assert await store.load("more 2", at=clock()) == session()
    assert await store.load("bobs", at=clock()) == session("bob")
    await store.save("more 2", session(), at=clock())  # Of those that are there, none is one more.
    assert await store.load("first", at=clock()) == session()


class TestMemorySessions:
    """What only this adapter can be asked: whether anything is left."""

    @pytest.fixture
    def store(self) -> MemorySessions:
        return MemorySessions(RETENTION)

    def left(self, store: MemorySessions) -> tuple[int, int]:
        assert sum(map(len, store._pids.values())) == len(store._sessions)
        return len(store._sessions), len(store._pids)

    async def test_ended_moved_and_expired_sessions_leave_nothing(
        self, store: MemorySessions, clock: SteppableClock
    ) -> None:
        for number in range(50):
            await store.save(f"{number}", session(f"user {number % 7}"), at=clock())
        assert self.left(store) == (50, 7)
        for number in range(50):
            await store.save(f"{number}", session("bob"), at=clock())
        assert self.left(store) == (50, 1)
        for number in range(25):
            await store.end(f"{number}")
        assert self.left(store) == (25, 1)
        clock.step(RETENTION.total_seconds())
        await store.save("new", session("eve"), at=clock())  # Nobody asks for the others any more.
        assert self.left(store) == (1, 1)
        await store.end("new")
        assert self.left(store) == (0, 0)

    async def test_the_limit_per_user_holds(self, store: MemorySessions) -> None:
        for number in range(3_000):
            await store.save(f"{number}", session(), at=NOON)
        sessions, users = self.left(store)
        assert users == 1
        assert sessions <= 1_000


async def test_all_sessions_of_a_user_end_at_once(store: Sessions, clock: SteppableClock) -> None:
    for pid, user in (("one", "ada"), ("two", "ada"), ("three", "bob")):
        await store.save(pid, session(user), at=clock())
    await store.end_all("ada")
    await store.end_all("nobody")
    await store.touch(["one", "two"], at=clock())
    assert [await store.load(pid, at=clock()) for pid in ("one", "two")] == [None, None]
    assert await store.load("three", at=clock()) == session("bob")
    await store.save("one", session("ada"), at=clock())
    assert await store.load("one", at=clock()) == session("ada")
