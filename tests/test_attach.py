"""Where a socket begins: cursors and sessions, over the use cases alone; `test_recovery` has the real client."""

from datetime import timedelta

import pytest

from adapters.memory_sessions import MemorySessions
from builders import SteppableClock
from domain.attach import Attachments, Beginning
from domain.feed import Cursor, feed_name
from domain.identity import Identity
from doubles import Studio

ADA = Identity("ada", None, service=False)
BOB = Identity("bob", None, service=False)


def attachments(studio: Studio) -> Attachments:
    return Attachments(studio.log, MemorySessions(timedelta(days=1)), studio.clock)


async def begin(attach: Attachments, pid: str, identity: Identity = ADA) -> Cursor:
    """A session that begins at the present."""
    base, _ = await attach.begin(identity, None)
    await attach.keep(pid, identity, base)
    return base


def text(cursor: Cursor, user: str = "ada") -> str:
    return cursor.text(feed_name("e1", user))


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
    present = Beginning(await studio.log.present("ada"), False)
    here = text(present.cursor)
    assert await attach.begin(ADA, here) == (present.cursor, True)
    earlier = Cursor(2, (await studio.log.feed("ada", after=1, anchor=2, limit=1)).entries[0].event_id, 2)
    assert await attach.begin(ADA, text(earlier)) == (earlier, True)
    for bad in ("", here + "1", here.replace(".", ".1", 1), 7, None, {"cursor": here}, text(present.cursor, "bob")):
        assert await attach.begin(ADA, bad) == present


async def test_a_session_is_restored_at_the_offset_its_client_had_reached(studio: Studio) -> None:
    attach = attachments(studio)
    base = await begin(attach, "pid")
    assert await attach.recover("pid", None, None) == (ADA, (base, True))
    async with studio.open():
        await studio.make()
    after = await studio.log.present("ada")
    assert await attach.recover("pid", text(after), None) == (ADA, (after, True))
    await attach.keep("pid", ADA, after)
    # From now on that is the base: what lies before it has been seen.
    assert await attach.recover("pid", text(base), None) == (ADA, (after, True))


@pytest.mark.parametrize("offset", [None, "", 7, "e1.1.1.1"])
async def test_an_offset_that_is_none_of_the_feeds_counts_as_the_base(studio: Studio, offset: object) -> None:
    attach = attachments(studio)
    base = await begin(attach, "pid")
    assert await attach.recover("pid", offset, None) == (ADA, (base, True))
    bobs = text(await studio.log.present("bob"), "bob")
    assert await attach.recover("pid", bobs, None) == (ADA, (base, True))


async def test_an_offset_of_this_feed_that_the_log_does_not_know_makes_the_session_unusable(studio: Studio) -> None:
    attach = attachments(studio)
    base = await begin(attach, "pid")
    assert await attach.recover("pid", text(base._replace(event_id=base.event_id + 1)), None) is None
    assert await attach.recover("pid", text(Cursor(99, 1, 99)), None) is None


async def test_a_session_is_not_restored_for_somebody_else(studio: Studio) -> None:
    attach = attachments(studio)
    await begin(attach, "pid")
    assert await attach.recover("pid", None, BOB) is None
    assert await attach.recover("other", None, ADA) is None
    assert await attach.recover("pid", None, ADA) is not None


async def test_a_session_ends_with_its_proof_unless_that_is_renewed() -> None:
    studio = Studio(clock=SteppableClock())
    attach = attachments(studio)
    soon = studio.clock.present + timedelta(seconds=10)
    await begin(attach, "pid", ADA._replace(expires_at=soon))
    await begin(attach, "renewed", ADA._replace(expires_at=soon))
    await attach.renew("renewed", ADA._replace(expires_at=soon + timedelta(seconds=10)))
    studio.clock.step(10)
    assert await attach.recover("pid", None, None) is None
    assert await attach.recover("renewed", None, None) is not None


async def test_who_leaves_for_good_is_not_expected_back(studio: Studio) -> None:
    attach = attachments(studio)
    for pid in ("cut", "over"):
        await begin(attach, pid)
    await attach.leave("cut", for_good=False)
    await attach.leave("over", for_good=True)
    assert await attach.recover("cut", None, None) is not None
    assert await attach.recover("over", None, None) is None
