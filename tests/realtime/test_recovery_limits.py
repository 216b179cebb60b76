"""Recovery while the log is unavailable, without recovery, by tokens, after restarts and for slow readers."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest

from adapters.memory.log import MemoryLog
from adapters.realtime import engineio_socket, send_buffer
from adapters.system import now
from domain.errors import LogUnavailable
from domain.events import timestamp
from domain.feed import Feed
from domain.ports.log import History
from support.builders import SteppableClock, memory_storage
from support.harness import TIMEOUT
from support.node import needs_node
from support.recovery import SECRET, WAITS, RecoveryHarness, both_ways, has_ended, other_service, session, wire

pytestmark = [needs_node, pytest.mark.asyncio(loop_scope="module")]


class SilentLog(MemoryLog):
    """Does not answer these calls."""

    silent: tuple[str, ...] = ()

    async def generations(
        self, user_id: str, *, active: bool | None = None, before: int | None = None, limit: int
    ) -> Sequence[History]:
        if "generations" in self.silent:
            raise LogUnavailable
        return await super().generations(user_id, active=active, before=before, limit=limit)

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        if "feed" in self.silent:
            raise LogUnavailable
        return await super().feed(user_id, after=after, anchor=anchor, limit=limit)


@both_ways
async def test_a_client_reconnects_until_the_log_is_available_and_is_recovered(
    shared_harness: RecoveryHarness, tmp_path: Path, way: str
) -> None:
    log = SilentLog(epoch="e1", credits=100, clock=now)
    async with other_service(shared_harness, tmp_path, {"storage": memory_storage(log)}) as harness:
        client = harness.open("eve", way)
        await client.ack()
        await harness.recorder.start("eve")
        await client.until(lambda: len(client.events) == 1)
        log.silent = ("feed",)
        client.do("cut")
        await client.disconnected(3)
        assert len(client.on("connect")) == 1
        await harness.recorder.run_to_end("eve")
        log.silent = ()
        assert (await client.connected(2))["recovered"] is True
        await harness.complete("eve", client)
        # Over polling the client reports each failed attempt; a refusal would have a code.
        assert not any("data" in each for each in client.on("refused"))


async def test_an_authenticate_that_fails_on_the_log_does_not_change_the_session(
    shared_harness: RecoveryHarness, tmp_path: Path
) -> None:
    log = SilentLog(epoch="e1", credits=100, clock=now)
    async with other_service(shared_harness, tmp_path, {"storage": memory_storage(log)}) as harness:
        client = harness.open("eve", **WAITS)
        await client.ack()
        log.silent = ("generations",)
        assert (await client.call("authenticate", {"userId": "bob"}))["code"] == "unavailable"
        log.silent = ()
        client.do("cut")
        await client.disconnected()
        client.do("connect")
        assert (await client.connected(2))["recovered"] is True
        assert list(harness.service.service.hub.rooms) == ["eve"]


@pytest.mark.parametrize("where", ["handshake", "authenticate"])
async def test_a_client_without_recovery_gets_the_cursor_as_a_key_and_continues_from_it(
    harness: RecoveryHarness, where: str
) -> None:
    user, received = harness.user(), list[dict[str, Any]]()
    news = asyncio.Event()

    def one_argument(data: dict[str, Any]) -> None:
        received.append(data)
        news.set()

    def listen(client: Any) -> None:
        for name in ("generation_started", "continue", "generation_completed"):
            client.on(name, one_argument)

    async def until(count: int) -> None:
        async with asyncio.timeout(TIMEOUT):
            while len(received) < count:
                news.clear()
                await news.wait()

    handshake = {"recovery": False} if where == "handshake" else {"x": 1}
    said = {"recovery": False} if where == "authenticate" else {}
    async with harness.service.phone(**handshake) as phone:
        listen(phone.client)
        assert (await phone.authenticate(user, **said))["recovered"] is False
        running = await harness.recorder.move(await harness.recorder.start(user), "composition")
        await until(2)
    assert [data["cursor"] for data in received] == [await harness.cursor(user, 1), await harness.cursor(user, 2)]
    await harness.recorder.finish(running)
    async with harness.service.phone(**handshake) as phone:
        listen(phone.client)
        ack = await phone.authenticate(user, cursor=received[-1]["cursor"], **said)
        assert ack["recovered"] is True
        await until(6)
        await harness.recorder.run_to_end(user)
        await until(12)
    events = [{key: value for key, value in data.items() if key != "cursor"} for data in received]
    assert events == [data for _, data in await harness.feed(user)]


async def test_a_client_without_recovery_has_no_usable_pid(harness: RecoveryHarness) -> None:
    user = harness.user()
    async with wire(harness, recovery=False) as client:
        assert client.pid is None
    async with wire(harness, recovery=False, userId=user) as client:
        assert client.pid is None
        assert (await client.next())[0] == "authenticated"
    pid = await session(harness, user, recovery=False)
    async with wire(harness, pid=pid) as client:
        assert client.pid != pid
    pid = await session(harness, user)
    async with wire(harness, recovery=False, pid=pid) as client:
        assert client.pid is None


async def test_recovery_may_also_be_refused_once_the_handshake_has_named_the_user(harness: RecoveryHarness) -> None:
    user = harness.user()
    async with wire(harness, userId=user) as client:
        assert (await client.next())[0] == "authenticated"
        running = await harness.recorder.start(user)
        assert len(await client.next()) == 3  # With the cursor as an argument of its own.
        assert (await client.authenticate(userId=user, recovery=False))["ok"] is True
        await harness.recorder.move(running, "composition")
        _, event = await client.next()
        assert event["cursor"] == await harness.cursor(user, 2)
        pid = client.pid
    async with wire(harness, pid=pid) as client:
        assert client.pid != pid


@both_ways
async def test_a_requested_replay_is_not_resumed_and_does_not_move_the_cursor_back(
    harness: RecoveryHarness, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engineio_socket, "MAX_BATCH", 1)
    user = harness.user()
    old = await harness.recorder.run_to_end(user)
    line = await harness.line()
    client = harness.open(user, way, line=line, **WAITS)
    await client.ack()
    running = await harness.recorder.start(user)
    await client.until(lambda: len(client.events) == 1)
    line.falls.append(3)
    client.do("emit", ref="never", name="subscribe_to_generation", args=[{"generationId": old.generation_id}])
    await client.disconnected()
    assert [data["sequence"] for _, data in client.events] == [1, 1, 2, 3]
    await harness.recorder.move(running, "composition")
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await client.until(lambda: len(client.events) == 5)
    assert client.events[4][1]["generationId"] == running.generation_id
    again = await client.call("subscribe_to_generation", {"generationId": old.generation_id})
    assert again["ok"] is True  # It is before the cursor, so it counts as sent.
    await client.call("subscribe_to_generation", {"generationId": old.generation_id, "after": 3})
    await client.until(lambda: len(client.events) == 8)
    assert [data["sequence"] for _, data in client.events[5:]] == [4, 5, 6]
    # Each replayed event carried the cursor that the feed had reached.
    place = await harness.cursor(user, 7)
    assert [further for [further] in client.further[:4]] == [place] * 4
    assert [further for [further] in client.further[5:]] == [await harness.cursor(user, 8)] * 3
    await harness.complete(user, client, after=8, skip=8)


async def test_replays_during_live_events_do_not_move_the_cursor_back(harness: RecoveryHarness) -> None:
    user = harness.user()
    old = [await harness.recorder.run_to_end(user) for _ in range(5)]
    line = await harness.line(30, 60, 20, 200)
    client = harness.open(user, line=line)
    await client.ack()
    pouring = asyncio.create_task(harness.pour(user, 400))
    asked = 0
    while not pouring.done():
        client.do("emit", ref="any", name="subscribe_to_generation", args=[
            {"generationId": old[asked % 5].generation_id, "after": asked % 6}
        ])  # fmt: skip
        asked += 1
        await asyncio.sleep(0.002)
    await pouring
    last = await harness.recorder.start_and_fail(user)
    await client.until(lambda: has_ended(client, last))
    names = {each.generation_id for each in old}
    by_itself = [event for event in client.events if event[1]["generationId"] not in names]
    assert by_itself == (await harness.feed(user))[30:]
    assert all(each["recovered"] for each in client.on("connect")[1:])


def token(clock: SteppableClock, user: str, minutes: float) -> str:
    return jwt.encode({"sub": user, "exp": clock().timestamp() + minutes * 60}, SECRET, "HS256")


@pytest.fixture
def clock() -> SteppableClock:
    return SteppableClock(now())


@asynccontextmanager
async def keyed(shared_harness: RecoveryHarness, images: Path, clock: SteppableClock) -> AsyncIterator[RecoveryHarness]:
    async with other_service(shared_harness, images, {"clock": clock}, jwt_secret=SECRET) as harness:
        yield harness
        harness.service.phones.clear()
        harness.service.server.begin_shutdown(now=True)  # The checks at the end would need a token.
        await harness.service.until(lambda: harness.service.server.should_exit)


async def test_a_pid_is_valid_until_its_token_expires(
    shared_harness: RecoveryHarness, tmp_path: Path, clock: SteppableClock
) -> None:
    async with keyed(shared_harness, tmp_path, clock) as harness:
        clients = [
            harness.open(None, first={"token": token(clock, "eve", 60)}, **WAITS),
            harness.open(None, "polling", first={"token": token(clock, "eve", 60)}, **WAITS),
            harness.open(None, auth={"token": token(clock, "eve", 600), "cursor": ""}, **WAITS),
        ]
        for client in clients:
            await client.connected()
        await harness.service.until(lambda: len(harness.service.service.hub.rooms.get("eve", ())) == 3)
        # The last one sends a token in each handshake; the second one renews its own.
        running = await harness.recorder.start("eve")
        ack = await clients[1].call("authenticate", {"token": token(clock, "eve", 120)})
        assert (ack["ok"], ack["recovered"]) == (True, False)
        assert ack["expiresAt"] == timestamp(clock() + timedelta(minutes=120))
        for client in clients:
            await client.until(lambda client=client: len(client.events) == 1)  # type: ignore[misc]
            client.do("cut")
            await client.disconnected()
        clock.step(59 * 60)
        await harness.recorder.move(running, "composition")
        for client in clients:
            client.do("connect")
            assert (await client.connected(2))["recovered"] is True
            await client.until(lambda client=client: len(client.events) == 2)  # type: ignore[misc]
            client.do("cut")
            await client.disconnected(2)
        clock.step(60)
        await harness.recorder.run_to_end("eve")
        for client, good in zip(clients, (False, True, True), strict=True):
            client.do("connect")
            assert (await client.connected(3))["recovered"] is good
        # It authenticates again, and has missed nothing.
        assert (await clients[0].call("authenticate", {"userId": "eve"}))["code"] == "unauthenticated"
        ack = await clients[0].call("authenticate", {"token": token(clock, "eve", 60)})
        assert ack["recovered"] is True
        await harness.complete("eve", *clients)


@both_ways
async def test_a_socket_closed_when_its_token_expires_is_notified_and_continues_with_a_fresh_one(
    shared_harness: RecoveryHarness, tmp_path: Path, clock: SteppableClock, way: str
) -> None:
    async with keyed(shared_harness, tmp_path, clock) as harness:
        await harness.recorder.start("eve")
        client = harness.open(None, way, first={"token": token(clock, "eve", 1 / 60)}, **WAITS)
        await client.ack()
        assert await client.disconnected() == {"polling": "transport error", "websocket": "transport close"}[way]
        assert client.notices == [["authentication_expired", {"code": "token_expired"}]]
        clock.step(1)
        await harness.recorder.run_to_end("eve")
        client.do("connect")
        assert (await client.connected(2))["recovered"] is False
        ack = await client.call("authenticate", {"token": token(clock, "eve", 60)})
        assert ack["recovered"] is True
        await harness.complete("eve", client)


async def test_a_handshake_with_a_token_of_another_user_does_not_resume_the_pid(
    shared_harness: RecoveryHarness, tmp_path: Path, clock: SteppableClock
) -> None:
    async with keyed(shared_harness, tmp_path, clock) as harness:
        pid = await session(harness, "eve", token=token(clock, "eve", 60))
        async with wire(harness, pid=pid, token=token(clock, "bob", 60)) as client:
            assert client.pid != pid
            assert (await client.next())[1]["userId"] == "bob"
        for given in ({"userId": "bob"}, {"userId": ""}, {"userId": "bob", "token": token(clock, "eve", 60)}):
            async with wire(harness, pid=pid, **given) as client:
                assert client.pid != pid
        async with wire(harness, pid=pid, token=token(clock, "eve", 30)) as client:
            assert client.pid == pid
            name, hello = await client.next()
            assert (name, hello["userId"], hello["recovered"]) == ("authenticated", "eve", True)
            assert hello["expiresAt"] == timestamp(clock() + timedelta(minutes=30))


async def test_a_session_is_kept_while_it_is_connected_and_for_retention_after_that(
    shared_harness: RecoveryHarness, tmp_path: Path, clock: SteppableClock
) -> None:
    async with other_service(shared_harness, tmp_path, {"clock": clock}, retention=1) as harness:
        sessions = harness.service.service.sessions
        client = harness.open("eve", **WAITS)
        await client.ack()
        pid = (await client.connected())["pid"]
        touch, touched = sessions.touch, list[Any]()

        async def recorded(pids: Any, *, at: Any) -> None:
            await touch(pids, at=at)
            touched.append((set(pids), at))

        sessions.touch = recorded  # type: ignore[method-assign]
        await harness.recorder.start("eve")
        for _ in range(3):  # Housekeeping runs ten times per retention.
            clock.step(0.9)
            await harness.service.until(lambda: ({pid}, clock()) in touched)
        clock.step(0.5)
        client.do("cut")
        await client.disconnected()
        await harness.service.until(lambda: ({pid}, clock()) in touched and harness.service.service.sockets.idle)
        clock.step(0.9)
        await harness.recorder.start("eve")
        client.do("connect")
        assert (await client.connected(2))["recovered"] is True
        await client.until(lambda: len(client.events) == 2)
        client.do("cut")
        await client.disconnected(2)
        await harness.service.until(lambda: harness.service.service.sockets.idle)
        clock.step(1)
        client.do("connect")
        assert (await client.connected(3))["recovered"] is False
        # Its generations still run, so its offset is still usable: nothing was lost.
        assert (await client.call("authenticate", {"userId": "eve"}))["recovered"] is True
        await harness.complete("eve", client)


@both_ways
async def test_after_a_restart_with_a_memory_log_nothing_is_recovered_and_events_continue(
    shared_harness: RecoveryHarness, tmp_path: Path, way: str
) -> None:
    line = await shared_harness.line()
    async with other_service(shared_harness, tmp_path / "one") as harness:
        line.target = harness.service.port
        client = harness.open(None, way, line=line, always={"userId": "eve"})
        await client.ack("always")
        await harness.recorder.run_to_end("eve")
        await client.until(lambda: len(client.events) == 6)
        cursor = client.further[-1][0]
        pid = (await client.connected())["pid"]
        line.down = True
        line.fall()
        del harness.browsers.open_browsers[client.id]  # So that the harness does not close it at its end.
    async with other_service(shared_harness, tmp_path / "two") as harness:
        harness.browsers.open_browsers[client.id] = client
        await harness.recorder.start("eve")
        count = len(client.on("connect"))
        line.target, line.down = harness.service.port, False
        again = await client.connected(count + 1)
        assert again["recovered"] is False
        assert again["pid"] != pid
        ack = await client.ack("always", len(client.on("connect")))
        assert ack["recovered"] is False
        await harness.complete("eve", client, skip=6)
        async with wire(harness) as other:
            assert (await other.authenticate(userId="eve", cursor=cursor))["recovered"] is False


async def test_a_slow_reader_recovers_thousands_of_events_and_is_not_disconnected_while_it_reads(
    harness: RecoveryHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 3.0)
    # A file log takes long to write each event. They are read by pages, whatever their number.
    count = 1_500 if harness.service.service.log.durable else 5_000
    user = harness.user()
    line = await harness.line()
    client = harness.open(user, line=line, **WAITS)
    await client.ack()
    line.fall()
    await client.disconnected()
    await harness.pour(user, count, filler=300)
    line.pace = count * 150
    began = asyncio.get_running_loop().time()
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await harness.complete(user, client)
    assert asyncio.get_running_loop().time() - began > 3
    assert len(client.on("disconnect")) == 1


async def test_a_stalled_reader_is_disconnected_and_recovers_later(
    harness: RecoveryHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 0.5)
    user = harness.user()
    client = harness.open(user)
    await client.ack()
    server = harness.service.service.sockets
    client.do("pause")
    await client.until(lambda: bool(client.on("paused")))
    await harness.pour(user, 1_500, filler=1_900)
    await harness.service.until(lambda: user not in harness.service.service.hub.rooms)
    monkeypatch.undo()
    assert server.pids == set()
    client.do("resume")
    assert (await client.connected(2))["recovered"] is True
    await harness.complete(user, client)


async def test_of_many_sockets_that_resume_one_pid_at_once_one_remains(harness: RecoveryHarness) -> None:
    user = harness.user()
    pid = await session(harness, user)
    await harness.recorder.run_to_end(user)
    connections = await asyncio.gather(*(harness.service.raw() for _ in range(8)))
    await asyncio.gather(*(each.send("40" + json.dumps({"pid": pid})) for each in connections))
    server, rooms = harness.service.service.sockets, harness.service.service.hub.rooms
    await harness.service.until(lambda: len(rooms.get(user, ())) == len(server.sessions) == 1)
    await harness.recorder.start_and_fail(user)
    assert list(server.pids) == [pid]
    for each in connections:
        each.transport.abort()


async def test_a_recovered_socket_need_not_authenticate(
    shared_harness: RecoveryHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with other_service(shared_harness, tmp_path) as harness:
        client = harness.open("eve")
        await client.ack()
        # It reconnects by itself, and tries again if a slow machine is late.
        monkeypatch.setattr(harness.service.service.sockets, "_auth_timeout", 0.3)
        client.do("cut")
        assert (await client.connected(2))["recovered"] is True
        await asyncio.sleep(0.6)  # Longer than the timeout: nothing may happen.
        assert len(client.on("disconnect")) == 1
        await harness.complete("eve", client)


@pytest.mark.parametrize("back", ["by a user who comes back", "by a cursor that is given"])
async def test_a_session_restarted_by_authenticate_is_recovered_despite_an_older_offset(
    harness: RecoveryHarness, back: str
) -> None:
    """The connection is lost before the first event of a replay of events that the client once got."""
    ada, bob = harness.user(), harness.user()
    line = await harness.line()
    client = harness.open(ada, line=line, **WAITS)
    await client.ack()
    await harness.recorder.move(await harness.recorder.start(ada), "composition", "composition_completed")
    await client.until(lambda: len(client.events) == 3)
    if back == "by a user who comes back":
        await client.call("authenticate", {"userId": bob})
        line.falls.append(0)
        client.do("emit", ref="again", name="authenticate", args=[{"userId": ada}])
    else:
        client.do("disconnect")
        await client.disconnected()
        client.do("connect")
        await client.connected(2)
        line.falls.append(0)
        cursor = (await client.ack())["cursor"]
        client.do("emit", ref="again", name="authenticate", args=[{"userId": ada, "cursor": cursor}])
    fallen = len(client.on("disconnect"))
    connected = len(client.on("connect"))
    await client.ack("again")
    await client.disconnected(fallen + 1)
    client.do("connect")
    assert (await client.connected(connected + 1))["recovered"] is True
    await harness.complete(ada, client, skip=3)
