"""Where a device starts: cursors and sessions, without a server; `test_recovery` has the real client."""

from datetime import timedelta

import pytest

from adapters.memory.sessions import MemorySessions
from domain.feed import Cursor, feed_name
from domain.feed_sessions import FeedSessions, StartPosition
from domain.identity import Identity
from support.builders import SteppableClock
from support.doubles import InMemoryBackend

ADA = Identity("ada", None, service=False)
BOB = Identity("bob", None, service=False)


def feed_sessions(backend: InMemoryBackend) -> FeedSessions:
    return FeedSessions(backend.log, MemorySessions(timedelta(days=1)), backend.clock, new_tag=lambda: "tag")


async def open_session(sessions: FeedSessions, pid: str, identity: Identity = ADA) -> Cursor:
    """Open a session at the head, and return its base."""
    start = await sessions.open(identity, None)
    await sessions.save(pid, identity, start)
    return start.cursor


async def resumed_at(sessions: FeedSessions, pid: str, offset: object) -> Cursor | None:
    """Where ada's session continues; ``None`` if it cannot be resumed."""
    resumed = await sessions.resume(pid, offset)
    return None if resumed is None else resumed[1].cursor


def text(cursor: Cursor, user: str = "ada", tag: str | None = None) -> str:
    return cursor.text(feed_name("e1", user), tag)


@pytest.fixture
async def backend() -> InMemoryBackend:
    """With one generation of ada, and one of bob."""
    backend = InMemoryBackend()
    async with backend.open():
        await backend.make()
        await backend.make(user_id="bob")
    return backend


async def test_an_unusable_cursor_starts_at_the_head(backend: InMemoryBackend) -> None:
    sessions = feed_sessions(backend)
    cursor = await backend.log.head_cursor("ada")
    present = StartPosition(cursor, False, cursor.live, None)
    here = text(cursor)
    assert await sessions.open(ADA, here) == present._replace(resumed=True)
    earlier = Cursor(2, (await backend.log.feed("ada", after=1, anchor=2, limit=1)).entries[0].event_id, 2)
    assert await sessions.open(ADA, text(earlier)) == present._replace(cursor=earlier, resumed=True)
    assert await sessions.open(ADA, text(earlier, tag="other")) == present._replace(cursor=earlier, resumed=True)
    for bad in ("", here + "1", here.replace(".", ".1", 1), 7, None, {"cursor": here}, text(cursor, "bob")):
        assert await sessions.open(ADA, bad) == present


async def test_a_session_resumes_at_the_offset_that_its_client_had_reached(backend: InMemoryBackend) -> None:
    sessions = feed_sessions(backend)
    base = await open_session(sessions, "pid")
    assert await resumed_at(sessions, "pid", None) == base
    async with backend.open():
        await backend.make()
    after = await backend.log.head_cursor("ada")
    assert await resumed_at(sessions, "pid", text(after)) == after
    resumed = await sessions.resume("pid", text(after))
    assert resumed is not None
    await sessions.save("pid", *resumed)
    # From now on that is the base: everything before it has been seen.
    assert await resumed_at(sessions, "pid", text(base)) == after


async def test_an_offset_from_before_the_session_counts_as_the_base(backend: InMemoryBackend) -> None:
    """The session starts before a position that its client had reached."""
    sessions = feed_sessions(backend)
    head = await backend.log.head_cursor("ada")
    entries = (await backend.log.feed("ada", after=0, anchor=0, limit=3)).entries
    base, reached = (Cursor(entry.position, entry.event_id, entry.position) for entry in entries[:2])
    await sessions.save("pid", ADA, await sessions.open(ADA, text(base), fresh=True))
    for before in (text(reached), text(reached, tag="another"), text(head)):
        assert await resumed_at(sessions, "pid", before) == base
    assert await resumed_at(sessions, "pid", text(reached, tag="tag")) == reached
    async with backend.open():
        await backend.make()
    live = await backend.log.head_cursor("ada")
    assert await resumed_at(sessions, "pid", text(live)) == live


@pytest.mark.parametrize("offset", [None, "", 7, "e1.1.1.1"])
async def test_an_offset_that_is_not_of_this_feed_counts_as_the_base(backend: InMemoryBackend, offset: object) -> None:
    sessions = feed_sessions(backend)
    base = await open_session(sessions, "pid")
    assert await resumed_at(sessions, "pid", offset) == base
    bobs = text(await backend.log.head_cursor("bob"), "bob")
    assert await resumed_at(sessions, "pid", bobs) == base


async def test_an_offset_of_this_feed_that_the_log_does_not_know_makes_the_session_unusable(
    backend: InMemoryBackend,
) -> None:
    sessions = feed_sessions(backend)
    base = await open_session(sessions, "pid")
    assert await resumed_at(sessions, "pid", text(base._replace(event_id=base.event_id + 1))) is None
    assert await resumed_at(sessions, "pid", text(Cursor(99, 1, 99))) is None


async def test_a_session_is_not_resumed_for_another_user(backend: InMemoryBackend) -> None:
    sessions = feed_sessions(backend)
    await open_session(sessions, "pid")
    assert await sessions.resume("pid", None, "bob") is None
    assert await sessions.resume("pid", None, None, BOB) is None
    assert await sessions.resume("other", None, "ada", ADA) is None
    assert await sessions.resume("pid", None, "ada") is not None
    assert await sessions.resume("pid", None, "ada", ADA) is not None


async def test_a_session_expires_with_its_token_unless_it_is_renewed() -> None:
    backend = InMemoryBackend(clock=SteppableClock())
    sessions = feed_sessions(backend)
    soon = backend.clock.present + timedelta(seconds=10)
    await open_session(sessions, "pid", ADA._replace(expires_at=soon))
    await open_session(sessions, "renewed", ADA._replace(expires_at=soon))
    await sessions.renew("renewed", ADA._replace(expires_at=soon + timedelta(seconds=10)))
    backend.clock.step(10)
    assert await sessions.resume("pid", None) is None
    assert await sessions.resume("renewed", None) is not None


async def test_a_session_that_its_client_ended_cannot_be_resumed(backend: InMemoryBackend) -> None:
    sessions = feed_sessions(backend)
    for pid in ("cut", "over"):
        await open_session(sessions, pid)
    await sessions.close("cut", permanent=False)
    await sessions.close("over", permanent=True)
    assert await sessions.resume("cut", None) is not None
    assert await sessions.resume("over", None) is None
