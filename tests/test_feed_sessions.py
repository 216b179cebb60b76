"""Where a socket begins: cursors and sessions, over the use cases alone; `test_recovery` has the real client."""

from datetime import timedelta

import pytest

from adapters.memory_sessions import MemorySessions
from builders import SteppableClock
from domain.feed import Cursor, feed_name
from domain.feed_sessions import Attachments, Beginning
from domain.identity import Identity
from doubles import Studio

ADA = Identity("ada", None, service=False)
BOB = Identity("bob", None, service=False)


def attachments(studio: Studio) -> Attachments:
    return Attachments(studio.log, MemorySessions(timedelta(days=1)), studio.clock, new_tag=lambda: "tag")


async def begin(attach: Attachments, pid: str, identity: Identity = ADA) -> Cursor:
    """A session that begins at the present."""
    beginning = await attach.begin(identity, None)
    await attach.keep(pid, identity, beginning)
    return beginning.cursor


async def place(attach: Attachments, pid: str, offset: object) -> Cursor | None:
    """Where ada's session goes on; ``None`` where it does not."""
    recovered = await attach.recover(pid, offset)
    return None if recovered is None else recovered[1].cursor


def text(cursor: Cursor, user: str = "ada", tag: str | None = None) -> str:
    return cursor.text(feed_name("e1", user), tag)


@pytest.fixture
async def studio() -> Studio:
    """One in which ada has made one generation, and bob another."""
    studio = Studio()
    async with studio.open():
        await studio.make()
        await studio.make(user_id="bob")
    return studio


async def test_a_cursor_is_taken_where_it_is_usable_and_else_the_present_is_told(studio: Studio) -> None:
    attach = attachments(studio)
    present = Beginning(await studio.log.present("ada"), False, (await studio.log.present("ada")).live, None)
    here = text(present.cursor)
    assert await attach.begin(ADA, here) == present._replace(resumed=True)
    earlier = Cursor(2, (await studio.log.feed("ada", after=1, anchor=2, limit=1)).entries[0].event_id, 2)
    assert await attach.begin(ADA, text(earlier)) == present._replace(cursor=earlier, resumed=True)
    assert await attach.begin(ADA, text(earlier, tag="other")) == present._replace(cursor=earlier, resumed=True)
    for bad in ("", here + "1", here.replace(".", ".1", 1), 7, None, {"cursor": here}, text(present.cursor, "bob")):
        assert await attach.begin(ADA, bad) == present


async def test_a_session_is_restored_at_the_offset_its_client_had_reached(studio: Studio) -> None:
    attach = attachments(studio)
    base = await begin(attach, "pid")
    assert await place(attach, "pid", None) == base
    async with studio.open():
        await studio.make()
    after = await studio.log.present("ada")
    assert await place(attach, "pid", text(after)) == after
    recovered = await attach.recover("pid", text(after))
    assert recovered is not None
    await attach.keep("pid", *recovered)
    # From now on that is the base: what lies before it has been seen.
    assert await place(attach, "pid", text(base)) == after


async def test_an_offset_from_before_the_session_counts_as_the_base(studio: Studio) -> None:
    """The session begins at a place that its client had been beyond."""
    attach = attachments(studio)
    head = await studio.log.present("ada")
    entries = (await studio.log.feed("ada", after=0, anchor=0, limit=3)).entries
    base, reached = (Cursor(entry.position, entry.event_id, entry.position) for entry in entries[:2])
    await attach.keep("pid", ADA, await attach.begin(ADA, text(base), anew=True))
    for before in (text(reached), text(reached, tag="another"), text(head)):
        assert await place(attach, "pid", before) == base
    assert await place(attach, "pid", text(reached, tag="tag")) == reached
    async with studio.open():
        await studio.make()
    live = await studio.log.present("ada")
    assert await place(attach, "pid", text(live)) == live


@pytest.mark.parametrize("offset", [None, "", 7, "e1.1.1.1"])
async def test_an_offset_that_is_none_of_the_feeds_counts_as_the_base(studio: Studio, offset: object) -> None:
    attach = attachments(studio)
    base = await begin(attach, "pid")
    assert await place(attach, "pid", offset) == base
    bobs = text(await studio.log.present("bob"), "bob")
    assert await place(attach, "pid", bobs) == base


async def test_an_offset_of_this_feed_that_the_log_does_not_know_makes_the_session_unusable(studio: Studio) -> None:
    attach = attachments(studio)
    base = await begin(attach, "pid")
    assert await place(attach, "pid", text(base._replace(event_id=base.event_id + 1))) is None
    assert await place(attach, "pid", text(Cursor(99, 1, 99))) is None


async def test_a_session_is_not_restored_for_somebody_else(studio: Studio) -> None:
    attach = attachments(studio)
    await begin(attach, "pid")
    assert await attach.recover("pid", None, "bob") is None
    assert await attach.recover("pid", None, None, BOB) is None
    assert await attach.recover("other", None, "ada", ADA) is None
    assert await attach.recover("pid", None, "ada") is not None
    assert await attach.recover("pid", None, "ada", ADA) is not None


async def test_a_session_ends_with_its_proof_unless_that_is_renewed() -> None:
    studio = Studio(clock=SteppableClock())
    attach = attachments(studio)
    soon = studio.clock.present + timedelta(seconds=10)
    await begin(attach, "pid", ADA._replace(expires_at=soon))
    await begin(attach, "renewed", ADA._replace(expires_at=soon))
    await attach.renew("renewed", ADA._replace(expires_at=soon + timedelta(seconds=10)))
    studio.clock.step(10)
    assert await attach.recover("pid", None) is None
    assert await attach.recover("renewed", None) is not None


async def test_who_leaves_for_good_is_not_expected_back(studio: Studio) -> None:
    attach = attachments(studio)
    for pid in ("cut", "over"):
        await begin(attach, pid)
    await attach.leave("cut", for_good=False)
    await attach.leave("over", for_good=True)
    assert await attach.recover("cut", None) is not None
    assert await attach.recover("over", None) is None
