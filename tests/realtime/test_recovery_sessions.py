"""Which `pid` and `offset` are usable, on a bare WebSocket."""

import json
from typing import Any

import pytest

from support.harness import frames_until_close
from support.node import needs_node
from support.recovery import WAITS, WAYS, RecoveryHarness, both_ways, session, wire

pytestmark = [needs_node, pytest.mark.asyncio(loop_scope="module")]


@pytest.mark.parametrize("pid", ["x", "", "x" * 60_000])
async def test_an_unknown_pid_is_unusable_and_the_offset_is_the_next_cursor(harness: RecoveryHarness, pid: Any) -> None:
    await _offset_counts_after(harness, pid)


@pytest.mark.parametrize("pid", [7, [], {"a": 1}, True])
async def test_a_pid_of_the_wrong_type_is_unusable_and_the_offset_is_the_next_cursor(
    harness: RecoveryHarness, pid: Any
) -> None:
    await _offset_counts_after(harness, pid)


async def _offset_counts_after(harness: RecoveryHarness, pid: Any) -> None:
    user = harness.user()
    await harness.recorder.run_to_end(user)
    offset = await harness.cursor(user, 2)
    async with wire(harness, pid=pid, offset=offset) as client:
        assert client.pid is not None
        assert client.pid != pid
        await client.connection.send("421" + json.dumps(["subscribe_to_generation", {"generationId": "x"}]))
        assert (await client.next("431"))[0]["code"] == "unauthenticated"
        # A failed one changes nothing: the offset still applies.
        assert (await client.authenticate(userId=""))["code"] == "bad_request"
        ack = await client.authenticate(userId=user)
        assert (ack["recovered"], ack["cursor"]) == (True, offset)
        assert await client.events(4) == (await harness.feed(user))[2:]
    async with wire(harness, pid=pid, offset=offset, userId=user) as client:
        name, hello = await client.next()
        assert (name, hello["recovered"], hello["cursor"]) == ("authenticated", True, offset)
        assert await client.events(4) == (await harness.feed(user))[2:]


async def test_a_pid_is_unusable_if_the_handshake_names_another_user(harness: RecoveryHarness) -> None:
    ada, bob = harness.user(), harness.user()
    await harness.recorder.run_to_end(ada)
    running = await harness.recorder.start(bob)
    pid = await session(harness, ada)
    async with wire(harness, pid=pid, offset=await harness.cursor(ada, 6), userId=bob) as client:
        assert client.pid != pid
        name, hello = await client.next()
        assert (name, hello["userId"], hello["recovered"]) == ("authenticated", bob, False)
        await harness.recorder.run_to_end(ada)
        await harness.recorder.finish(running)
        assert await client.events(6) == await harness.feed(bob)


@pytest.mark.parametrize("offset", ["", "x", 7, None, True, [], {}, "another's", "of another log", "older", "left out"])
async def test_an_offset_from_outside_the_session_counts_as_its_base(harness: RecoveryHarness, offset: Any) -> None:
    user, other = harness.user(), harness.user()
    await harness.recorder.run_to_end(user)
    await harness.recorder.run_to_end(other)
    base = await harness.cursor(user, 3)
    pid = await session(harness, user, cursor=base)
    real = {
        "another's": await harness.cursor(other, 5),
        "of another log": base.replace(base[0], "0" if base[0] == "1" else "1", 1),
        "older": await harness.cursor(user, 1),
    }
    given = {} if offset == "left out" else {"offset": real.get(offset, offset) if isinstance(offset, str) else offset}
    async with wire(harness, pid=pid, **given) as client:
        assert client.pid == pid
        assert await client.events(3) == (await harness.feed(user))[3:]


@pytest.mark.parametrize("fault", ["an id that never was", "a place that is not yet", "a generation deleted since"])
async def test_an_unusable_offset_makes_the_pid_unusable(harness: RecoveryHarness, fault: str) -> None:
    user = harness.user()
    pid = await session(harness, user)
    generation = await harness.recorder.run_to_end(user)
    feed, live, event_id, seen = (await harness.cursor(user, 4)).split(".")[:4]
    offset = {
        "an id that never was": f"{feed}.{live}.{int(event_id, 16) ^ 1:x}.{seen}",
        "a place that is not yet": f"{feed}.99.{event_id}.99",
    }.get(fault, f"{feed}.{live}.{event_id}.{seen}")
    if fault == "a generation deleted since":
        await harness.service.service.storage.log.remove(generation.generation_id, retention=False)
    async with wire(harness, pid=pid, offset=offset) as client:
        assert client.pid != pid
        ack = await client.authenticate(userId=user)
        assert ack["recovered"] is False
        await harness.recorder.run_to_end(user)
        assert await client.events(6) == (await harness.feed(user))[-6:]


@both_ways
async def test_an_offset_before_the_floor_is_not_recovered(harness: RecoveryHarness, way: str) -> None:
    user = harness.user()
    client = harness.open(user, way, **WAITS)
    await client.ack()
    running = await harness.recorder.start(user)
    await client.until(lambda: len(client.events) == 1)
    client.do("cut")
    await client.disconnected()
    gone = await harness.recorder.run_to_end(user)
    assert await harness.service.service.storage.log.remove(gone.generation_id, retention=True)
    running = await harness.recorder.move(running, "composition")
    client.do("connect")
    again = await client.connected(2)
    assert again["recovered"] is False
    assert again["pid"] != (await client.connected())["pid"]
    ack = await client.call("authenticate", {"userId": user})
    assert ack["recovered"] is False
    assert [(each["generationId"], each["sequence"]) for each in ack["generations"]] == [(running.generation_id, 2)]
    await harness.recorder.finish(running)
    # Running generations are replayed, then live events follow.
    await harness.complete(user, client, skip=1)


async def test_purging_a_finished_generation_keeps_the_offset_usable(harness: RecoveryHarness) -> None:
    user = harness.user()
    client = harness.open(user, **WAITS)
    await client.ack()
    gone = await harness.recorder.run_to_end(user)
    await harness.recorder.start(user)
    await client.until(lambda: len(client.events) == 7)
    client.do("cut")
    await client.disconnected()
    assert await harness.service.service.storage.log.remove(gone.generation_id, retention=True)
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await harness.complete(user, client, skip=6)


async def test_resuming_a_pid_closes_the_older_socket(harness: RecoveryHarness) -> None:
    for way in WAYS:
        user = harness.user()
        client = harness.open(user, way, **WAITS)
        pid = (await client.connected())["pid"]
        await client.ack()
        if way == "upgrade":
            await client.until(lambda client=client: bool(client.on("upgrade")))  # type: ignore[misc]
        await harness.recorder.run_to_end(user)
        await client.until(lambda client=client: len(client.events) == 6)  # type: ignore[misc]
        async with wire(harness, pid=pid, offset=client.further[3][0]) as newer:
            assert newer.pid == pid
            assert await newer.events(2) == (await harness.feed(user))[4:]
            assert "transport" in await client.disconnected()
            await harness.recorder.start_and_fail(user)
            assert await newer.events(2) == (await harness.feed(user))[6:]
            assert len(client.events) == 6
            assert len(harness.service.service.hub.rooms[user]) == 1
            client.do("connect")  # The first one gets it back in the same way.
            assert (await client.connected(2))["recovered"] is True
            assert not [frame for frame in await frames_until_close(newer.connection) if frame.startswith("41")]
        await harness.complete(user, client)


async def test_each_device_of_a_user_is_recovered_separately(harness: RecoveryHarness) -> None:
    user = harness.user()
    phone, laptop = harness.open(user, **WAITS), harness.open(user, "polling", **WAITS)
    await phone.ack()
    await laptop.ack()
    running = await harness.recorder.start(user)
    await phone.until(lambda: len(phone.events) == 1)
    phone.do("cut")
    await phone.disconnected()
    running = await harness.recorder.move(running, "composition")
    await laptop.until(lambda: len(laptop.events) == 2)
    laptop.do("cut")
    await laptop.disconnected()
    await harness.recorder.finish(running)
    for client in (laptop, phone):
        client.do("connect")
        assert (await client.connected(2))["recovered"] is True
    await harness.complete(user, phone, laptop)


@both_ways
async def test_a_failed_authenticate_does_not_affect_recovery(harness: RecoveryHarness, way: str) -> None:
    user = harness.user()
    client = harness.open(user, way, **WAITS)
    await client.ack()
    assert (await client.call("authenticate", {"userId": ""}))["ok"] is False
    client.do("cut")
    await client.disconnected()
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await harness.complete(user, client)
