"""Connection state recovery with the official client.

The tests append to the log themselves, so that each connection is lost at a known position. Most tests end with
`RecoveryHarness.complete`: after one more event, the client has received the whole feed, each event once and in order.
"""

import asyncio
import json
from typing import Literal

import pytest

from adapters.realtime import engineio_socket
from adapters.system import now
from support.harness import TIMEOUT
from support.node import needs_node
from support.proxy import UpgradeProxy
from support.recovery import WAITS, WAYS, RecoveryHarness, both_deaths, both_ways, every_way, wire

pytestmark = [needs_node, pytest.mark.asyncio(loop_scope="module")]


async def test_connect_carries_a_pid_and_only_events_of_the_feed_end_in_a_cursor(
    harness: RecoveryHarness,
) -> None:
    user = harness.user()
    clients = [harness.open(user, way) for way in WAYS] + [harness.open(None, auth={"userId": user})]
    for client in clients:
        await client.connected()
        await harness.service.until(lambda: len(harness.service.service.hub.rooms.get(user, ())) == len(clients))
    await harness.recorder.run_to_end(user)
    await harness.recorder.run_to_end(user, "generate")
    for client in clients:
        nack = await client.call("subscribe_to_generation", {"generationId": "no"})
        assert nack["ok"] is False
        hello = await client.connected()
        assert hello["recovered"] is False
        assert isinstance(hello["pid"], str)
        assert len(hello["pid"]) >= 32
        assert hello["pid"] != hello["sid"]
    await harness.complete(user, *clients)
    due = [await harness.cursor(user, position) for position in range(1, 14)]
    for client in clients:
        assert [further for [further] in client.further] == due
    assert len({(await client.connected())["pid"] for client in clients}) == len(clients)


@every_way
@pytest.mark.parametrize("end", ["cut", "close"])
async def test_a_client_that_reconnects_gets_all_missed_events(harness: RecoveryHarness, way: str, end: str) -> None:
    user = harness.user()
    client = harness.open(user, way, **WAITS)
    before = await client.ack()
    assert before["recovered"] is False
    if way == "upgrade":
        await client.until(lambda: bool(client.on("upgrade")))
    running = await harness.recorder.move(await harness.recorder.start(user), "composition")
    await client.until(lambda: len(client.events) == 2)
    client.do(end)
    await client.disconnected()
    await harness.recorder.finish(running)
    for kind in ("edit", "generate"):
        await harness.recorder.run_to_end(user, kind)
    await harness.recorder.start(user)
    client.do("connect")
    again, first = await client.connected(2), await client.connected()
    assert again["recovered"] is True
    assert again["pid"] == first["pid"]
    assert again["sid"] != first["sid"]
    await harness.complete(user, client)
    assert client.notices == []
    assert len(client.on("ack")) == 1


@every_way
async def test_a_connection_lost_before_the_first_event_is_recovered(harness: RecoveryHarness, way: str) -> None:
    user = harness.user()
    client = harness.open(user, way, **WAITS)
    await client.ack()
    client.do("cut")
    await client.disconnected()
    for _ in range(2):  # The second time, nothing has happened since the first.
        client.do("connect")
        assert (await client.connected(len(client.on("connect")) + 1))["recovered"] is True
        client.do("cut")
        await client.disconnected(len(client.on("disconnect")) + 1)
    await harness.recorder.run_to_end(user)
    client.do("connect")
    await harness.complete(user, client)


@every_way
@both_deaths
async def test_a_connection_lost_after_any_event_of_a_replay_is_recovered(
    harness: RecoveryHarness, way: str, silently: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two generations run, interleaved; when the clients come back, one has ended and a third has come and gone."""
    monkeypatch.setattr(engineio_socket, "MAX_BATCH", 1)  # One event in each polling answer.
    user, recorder = harness.user(), harness.recorder
    one, two = await recorder.start(user), await recorder.start(user, "generate")
    for status, other in [("composition", "composition"), ("composition_completed", "composition_completed")]:
        one, two = await recorder.move(one, status), await recorder.move(two, other)
    one = await recorder.move(one, "openai_editing")
    replayed = len(await harness.feed(user))
    assert replayed == 7
    lines = [await harness.line(place) for place in range(replayed)]
    clients = []
    for line in lines:
        line.silently = silently
        clients.append(harness.open(user, way, line=line, **WAITS))
    for place, client in enumerate(clients):
        await client.disconnected()
        assert len(client.events) == place
    await recorder.finish(one)
    two = await recorder.move(two, "ai_generation")
    await recorder.run_to_end(user)
    for client in clients:
        client.do("connect")
    for client in clients:
        assert (await client.connected(2))["recovered"] is True
    # Connections whose loss the server had not noticed have been replaced.
    await harness.service.until(lambda: len(harness.service.service.hub.rooms[user]) == len(clients))
    await recorder.finish(two)
    await harness.complete(user, *clients)


@every_way
@both_deaths
async def test_a_connection_lost_repeatedly_during_live_events_is_recovered(
    harness: RecoveryHarness, way: str, silently: bool
) -> None:
    user = harness.user()
    falls: list[int | Literal["connect"]] = [0, 1, "connect", 0, 0, 17, "connect", "connect", 40, 5, 90]
    line = await harness.line(*falls)
    line.silently = silently
    client = harness.open(user, way, line=line)
    await client.ack()
    pouring = asyncio.create_task(harness.pour(user, 400, filler=300))
    await client.until(lambda: line.fallen == len(falls))
    line.down = True
    line.fall()
    fallen = len(client.on("disconnect"))
    await pouring
    await client.until(lambda: len(client.on("disconnect")) >= fallen)
    line.down = False
    await harness.complete(user, client)
    assert len(client.on("connect")) > 1
    assert {each["pid"] for each in client.on("connect")} == {(await client.connected())["pid"]}
    assert all(each["recovered"] for each in client.on("connect")[1:])


async def test_a_socket_that_changed_users_recovers_the_later_user(harness: RecoveryHarness) -> None:
    for way in WAYS:
        ada, bob = harness.user(), harness.user()
        adas = await harness.recorder.start(ada)
        client = harness.open(ada, way, **WAITS)
        await client.until(lambda client=client: len(client.events) == 1)  # type: ignore[misc]
        assert (await client.call("authenticate", {"userId": bob}))["userId"] == bob
        client.do("cut")  # Before bob's first event: the client sends ada's offset.
        await client.disconnected()
        adas = await harness.recorder.finish(adas)
        await harness.recorder.run_to_end(bob)
        client.do("connect")
        assert (await client.connected(2))["recovered"] is True
        await harness.recorder.start_and_fail(ada)
        hers = (await harness.feed(ada))[:1]
        await harness.complete(bob, client, skip=1)
        assert client.events[:1] == hers
        assert (await client.call("authenticate", {"userId": bob}))["recovered"] is True


async def test_a_socket_that_changed_users_twice_recovers_the_last_user(harness: RecoveryHarness) -> None:
    ada, bob = harness.user(), harness.user()
    client = harness.open(ada, **WAITS)
    await client.ack()
    await harness.recorder.run_to_end(ada)
    await client.until(lambda: len(client.events) == 6)
    await client.call("authenticate", {"userId": bob})
    await harness.recorder.run_to_end(ada)
    await client.call("authenticate", {"userId": ada})
    client.do("cut")  # Its last offset of ada is older than bob's turn.
    await client.disconnected()
    await harness.recorder.run_to_end(ada)
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await harness.complete(ada, client, after=12, skip=6)


async def test_after_a_change_of_user_without_recovery_the_former_user_is_not_recovered(
    harness: RecoveryHarness,
) -> None:
    ada, bob = harness.user(), harness.user()
    hers = await harness.recorder.start(ada)
    client = harness.open(ada, **WAITS)
    await client.until(lambda: len(client.events) == 1)
    pid = (await client.connected())["pid"]
    await client.call("authenticate", {"userId": bob, "recovery": False})
    client.do("cut")
    await client.disconnected()
    await harness.recorder.finish(hers)
    connection = await harness.service.raw()
    await connection.send("40" + json.dumps({"pid": pid}))
    hello = json.loads(str(await connection.recv())[2:])
    await connection.close()
    assert hello["pid"] != pid


@both_ways
async def test_a_disconnect_of_the_client_ends_the_pid_and_its_offset_is_the_next_cursor(
    harness: RecoveryHarness, way: str
) -> None:
    user = harness.user()
    client = harness.open(user, way)
    await client.ack()
    running = await harness.recorder.move(await harness.recorder.start(user), "composition")
    await client.until(lambda: len(client.events) == 2)
    client.do("disconnect")
    assert await client.disconnected() == "io client disconnect"
    running = await harness.recorder.finish(running)
    client.do("connect")
    again = await client.connected(2)
    assert again["recovered"] is False
    assert again["pid"] != (await client.connected())["pid"]
    sessions, ended = harness.service.service.sessions, (await client.connected())["pid"]
    async with asyncio.timeout(TIMEOUT):
        while await sessions.load(ended, at=now()) is not None:  # It has ended before that is stored.
            await asyncio.sleep(0.01)
    ack = await client.call("authenticate", {"userId": user})
    assert ack["recovered"] is True
    await client.until(lambda: len(client.events) == 6)
    client.do("cut")  # The new pid starts there.
    assert (await client.connected(3))["recovered"] is True
    await harness.complete(user, client)


async def test_an_offset_of_another_user_or_beside_a_cursor_is_ignored(harness: RecoveryHarness) -> None:
    ada, bob = harness.user(), harness.user()
    first, second = harness.open(ada), harness.open(ada)
    await first.ack()
    await second.ack()
    await harness.recorder.run_to_end(ada)
    for client in (first, second):
        await client.until(lambda client=client: len(client.events) == 6)  # type: ignore[misc]
        client.do("disconnect")
        await client.disconnected()
        client.do("connect")
        await client.connected(2)
    ack = await first.call("authenticate", {"userId": bob})
    assert ack["recovered"] is False
    await harness.complete(bob, first, skip=6)
    # A given cursor takes precedence, even if it is older or invalid.
    third = await harness.cursor(ada, 3)
    ack = await second.call("authenticate", {"userId": ada, "cursor": third})
    assert (ack["recovered"], ack["cursor"]) == (True, third)
    await harness.complete(ada, second, after=3, skip=6)
    second.do("disconnect")
    await second.disconnected(2)
    second.do("connect")
    await second.connected(3)
    assert (await second.call("authenticate", {"userId": ada, "cursor": ""}))["recovered"] is False


async def test_a_disconnect_ends_the_pid_before_the_next_packet_is_handled(harness: RecoveryHarness) -> None:
    user = harness.user()
    async with wire(harness, userId=user) as client:
        again = json.dumps({"pid": client.pid})
        await asyncio.gather(client.connection.send("41"), client.connection.send("40" + again))
        assert (await client.next("40"))["pid"] != client.pid
    http, path = harness.service.http, "/socket.io/?EIO=4&transport=polling"
    path += f"&sid={json.loads((await http.get(path)).text[1:])['sid']}"
    await http.post(path, content=f'40{{"userId":"{user}"}}')
    pid = json.loads((await http.get(path)).text.split("\x1e")[0][2:])["pid"]
    await http.post(path, content="41\x1e40" + json.dumps({"pid": pid}))
    answer = (await http.get(path)).text.split("\x1e")
    assert next(json.loads(each[2:]) for each in answer if each.startswith("40"))["pid"] != pid


@every_way
async def test_a_handshake_that_names_its_user_is_answered_first_and_duplicates_nothing(
    harness: RecoveryHarness, way: str
) -> None:
    user = harness.user()
    running = await harness.recorder.move(await harness.recorder.start(user), "composition")
    old = await harness.cursor(user, 1)
    clients = [harness.open(None, way, auth={"userId": user, **given}, **WAITS) for given in ({}, {"cursor": old})]
    for client, missed in zip(clients, (2, 1), strict=True):
        await client.until(lambda client=client, missed=missed: len(client.events) == missed)  # type: ignore[misc]
        client.do("cut")
        await client.disconnected()
    await harness.recorder.finish(running)
    for client in clients:  # A known pid takes precedence over the cursor, which is still the old one.
        client.do("connect")
        assert (await client.connected(2))["recovered"] is True
    for client, began, recovered in zip(clients, (0, 1), (False, True), strict=True):
        await harness.complete(user, client, after=began)
        order = [line.get("name", line["on"]) for line in client.lines if line["on"] in ("connect", "event")]
        places = [place for place, name in enumerate(order) if name == "connect"]
        assert [order[place + 1] for place in places] == ["authenticated"] * 2
        assert [(each[0], each[1]["userId"], each[1]["recovered"]) for each in client.notices] == [
            ("authenticated", user, recovered),
            ("authenticated", user, True),
        ]


@every_way
@pytest.mark.parametrize("given", ["nothing", "its newest cursor", "no cursor"])
async def test_a_connect_handler_that_authenticates_again_gets_a_fresh_ack_and_no_event_twice(
    harness: RecoveryHarness, way: str, given: str
) -> None:
    user = harness.user()
    running = await harness.recorder.start(user)
    extra = {"nothing": {}, "its newest cursor": {"cursor": await harness.cursor(user, 1)}, "no cursor": {"cursor": ""}}
    client = harness.open(None, way, always={"userId": user, **extra[given]}, **WAITS)
    ack = await client.ack("always")
    assert ack["recovered"] is (given == "its newest cursor")
    running = await harness.recorder.move(running, "composition")
    began = 1 if given == "its newest cursor" else 0
    await client.until(lambda: len(client.events) == 2 - began)
    client.do("cut")
    await client.disconnected()
    await harness.recorder.finish(running)
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    ack = await client.ack("always", 2)
    assert (ack["ok"], ack["recovered"], ack["userId"]) == (True, True, user)
    assert ack["generations"][0]["status"] == "completed"
    await harness.complete(user, client, after=began)


async def test_an_upgrade_that_fails_while_its_last_poll_ends_is_recovered_after_the_ping_times(
    harness: RecoveryHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the answer to its probe the official client pauses polling, and does not resume it if the WebSocket closes
    before the pending poll is answered. It has no connection then, until it misses a ping.
    """
    engine = harness.service.service.sockets.eio
    monkeypatch.setattr(engine, "ping_interval", 0.5)
    monkeypatch.setattr(engine, "ping_timeout", 0.5)
    user = harness.user()
    async with UpgradeProxy.open(harness.service.port) as proxy:
        client = harness.browsers.open(proxy.url, first={"userId": user})
        assert (await client.ack())["ok"] is True
        proxy.begun.set()
        await client.until(lambda: bool(client.on("upgrade_failed")))
        proxy.failed.set()
        await harness.complete(user, client)
        assert await client.disconnected() == "ping timeout"
        assert (await client.connected(2))["recovered"] is True
