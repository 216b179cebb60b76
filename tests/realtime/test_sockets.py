"""Socket.IO as its clients see it: a real server, python-socketio's client, and bare WebSockets."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import websockets

from adapters.memory.log import MemoryLog
from adapters.realtime import send_buffer
from adapters.system import now
from domain.errors import LogUnavailable
from domain.feed import Cursor, feed_name
from support.builders import IN_MEMORY, memory_storage
from support.doubles import Pause, ScriptedEditor
from support.harness import Running, flood, frames_until_close, running, stalled_device

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["memory", "sqlite"])
async def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    with TemporaryDirectory(dir=IN_MEMORY) as folder:
        log = "memory://" if request.param == "memory" else f"sqlite:///{folder}/log.db"
        async with running(tmp_path_factory.mktemp("images"), log=log) as service:
            yield service


@pytest_asyncio.fixture(loop_scope="module")
async def service(shared: Running) -> AsyncIterator[Running]:
    """Shared by all these tests. Each leaves it idle."""
    yield shared
    await shared.until_all_disconnected()
    await shared.service.leases.drain()


@pytest_asyncio.fixture(loop_scope="module")
async def own_service(tmp_path: Path, log_setting: str) -> AsyncIterator[Running]:
    """A service that nobody else has used."""
    async with running(tmp_path, log=log_setting) as service:
        yield service


async def test_a_device_is_sent_every_stage_in_order(service: Running) -> None:
    async with service.phone("ada") as phone:
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)
        assert [name for name, _ in phone.events] == ["generation_started", *["continue"] * 4, "generation_completed"]
        assert [data["status"] for data in phone.of(generation_id)] == [
            "started",
            "composition",
            "composition_completed",
            "openai_editing",
            "openai_editing_completed",
            "completed",
        ]
        assert phone.of(generation_id) == await service.events(generation_id)


async def test_an_event_reaches_all_devices_of_its_user_and_no_others(service: Running) -> None:
    async with service.phone("ada") as phone, service.phone("ada") as laptop, service.phone("bob") as other:
        mine, his = await service.start("ada"), await service.start("bob", "generate", images=2)
        await asyncio.gather(phone.until_over(mine), laptop.until_over(mine), other.until_over(his))
        assert phone.events == laptop.events
        assert phone.cursors == laptop.cursors
        assert {data["generationId"] for _, data in other.events} == {his}


@pytest.mark.parametrize("transports", [["polling"], ["websocket"], ["polling", "websocket"]])
async def test_every_transport_delivers_the_same_events(service: Running, transports: list[str]) -> None:
    async with service.phone("ada", transports=transports) as phone:
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)
        assert phone.of(generation_id) == await service.events(generation_id)


async def test_the_ack_of_authenticate_has_user_cursor_and_generations(service: Running) -> None:
    done = await service.start("123")
    await service.service.leases.drain()
    async with service.phone() as phone:
        ack = await phone.authenticate("123")
        assert ack["userId"] == "123"
        assert ack["recovered"] is False
        assert Cursor.parse(ack["cursor"], feed_name(service.service.log.epoch, "123")) is not None
        assert [item["generationId"] for item in ack["generations"]] == [done]
        listed = await service.get(f"/generations/{done}", "123")
        del listed["input"]
        assert ack["generations"] == [listed]
        assert set(ack) == {"ok", "userId", "cursor", "recovered", "generations"}


async def test_a_number_and_its_text_are_the_same_user(service: Running) -> None:
    async with service.phone() as phone:
        ack = await phone.call("authenticate", {"userId": 123})
        phone.user = "123"
        assert ack["userId"] == "123"
        generation_id = await service.start("123")
        await phone.until_over(generation_id)


@pytest.mark.parametrize(
    "argument", [None, "ada", 7, [], {}, {"userId": ""}, {"userId": True}, {"userId": 1.5}, {"userId": "a\x00"}]
)
async def test_authenticate_with_an_invalid_user_is_a_bad_request_and_changes_nothing(
    service: Running, argument: Any
) -> None:
    async with service.phone("ada") as phone:
        nack = await phone.call("authenticate", argument)
        assert (nack["ok"], nack["code"]) == (False, "bad_request")
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)


async def test_the_handshake_can_authenticate_and_is_answered_by_the_first_event(service: Running) -> None:
    async with service.phone(userId="ada") as phone:
        phone.user = "ada"
        await phone.until(lambda: bool(phone.notices))
        assert phone.notices[0][0] == "authenticated"
        assert phone.notices[0][1]["userId"] == "ada"
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)


@pytest.mark.parametrize("auth", [{"x": 1}, {"userId": None}, {"token": "t"}])
async def test_a_handshake_without_a_user_connects_unauthenticated(service: Running, auth: Any) -> None:
    async with service.phone(**auth) as phone:
        nack = await phone.call("subscribe_to_generation", {"generationId": "edit_1_x"})
        assert nack["code"] == "unauthenticated"
        assert phone.notices == []


async def test_a_handshake_with_an_invalid_user_is_answered_with_an_error(service: Running) -> None:
    async with service.phone(userId="") as phone:
        await phone.until(lambda: bool(phone.notices))
        [(name, answer)] = phone.notices
        assert (name, answer["ok"], answer["code"]) == ("authenticated", False, "bad_request")
        assert (await phone.call("authenticate", {"userId": "ada"}))["ok"]


class TestWithWorkHeldUp:
    """While a provider works."""

    @pytest.fixture
    def pause(self) -> Pause:
        return Pause()

    @pytest_asyncio.fixture(loop_scope="module")
    async def service(self, tmp_path: Path, log_setting: str, pause: Pause) -> AsyncIterator[Running]:
        async with running(tmp_path, log=log_setting, overrides={"editor": ScriptedEditor(pause)}) as service:
            yield service
            await service.service.leases.drain()

    async def test_a_late_device_gets_earlier_events_and_then_live_ones(self, service: Running, pause: Pause) -> None:
        generation_id = await service.start("ada")
        await pause.reached.wait()
        async with service.phone("ada") as phone:
            await phone.until(lambda: len(phone.events) == 4)
            pause.released.set()
            await phone.until_over(generation_id)
            assert phone.of(generation_id) == await service.events(generation_id)

    async def test_finished_generations_are_in_the_ack_and_not_replayed(self, service: Running, pause: Pause) -> None:
        pause.released.set()
        async with service.phone("ada") as phone:
            over = await service.start("ada")
            await phone.until_over(over)
            pause.released.clear()
            pause.reached.clear()
            active = await service.start("ada")
            await pause.reached.wait()
            async with service.phone("ada") as late:
                await late.until(lambda: len(late.events) == 4)
                assert late.sequences(over) == []
                pause.released.set()
                await late.until_over(active)

    async def test_authenticating_again_sends_nothing_again(self, service: Running, pause: Pause) -> None:
        generation_id = await service.start("ada")
        await pause.reached.wait()
        async with service.phone("ada") as phone:
            await phone.until(lambda: len(phone.events) == 4)
            ack = await phone.authenticate("ada")
            assert ack["cursor"] == phone.cursors[-1]
            pause.released.set()
            await phone.until_over(generation_id)
            assert phone.sequences(generation_id) == [1, 2, 3, 4, 5, 6]

    async def test_subscribing_after_authenticating_does_not_show_two_bars(
        self, service: Running, pause: Pause
    ) -> None:
        generation_id = await service.start("ada")
        await pause.reached.wait()
        async with service.phone() as phone:
            phone.user = "ada"
            await phone.client.emit("authenticate", {"userId": "ada"})
            ack = await phone.call("subscribe_to_generation", {"generationId": generation_id})
            assert (ack["ok"], ack["generationId"], ack["status"]) == (True, generation_id, "openai_editing")
            pause.released.set()
            await phone.until_over(generation_id)
            assert phone.sequences(generation_id) == [1, 2, 3, 4, 5, 6]

    async def test_authenticating_as_another_user_replaces_the_first(self, service: Running, pause: Pause) -> None:
        adas, bobs = await service.start("ada"), await service.start("bob")
        await pause.reached.wait()
        async with service.phone("ada") as phone:
            await phone.until(lambda: len(phone.of(adas)) == 4)
            phone.events.clear()
            await phone.authenticate("bob")
            pause.released.set()
            await phone.until_over(bobs)
            assert phone.sequences(adas) == []
            assert phone.sequences(bobs) == [1, 2, 3, 4, 5, 6]

    async def test_a_device_continues_from_its_cursor(self, service: Running, pause: Pause) -> None:
        async with service.phone("ada") as phone:
            generation_id = await service.start("ada")
            await pause.reached.wait()
            await phone.until(lambda: len(phone.events) == 4)
            cursor = phone.cursors[1]
        pause.released.set()
        async with service.phone() as phone:
            ack = await phone.authenticate("ada", cursor=cursor)
            assert ack["recovered"] is True
            await phone.until_over(generation_id)
            assert phone.sequences(generation_id) == [3, 4, 5, 6]

    async def test_a_client_that_disconnects_stops_no_work(self, service: Running, pause: Pause) -> None:
        async with service.phone("ada"):
            generation_id = await service.start("ada")
            await pause.reached.wait()
        pause.released.set()
        async with service.phone("ada") as phone:
            await service.service.leases.drain()
            ack = await phone.authenticate("ada")
            assert ack["generations"][0]["status"] == "completed"
            assert ack["generations"][0]["generationId"] == generation_id


async def test_a_finished_generation_is_replayed_once_and_again_only_with_after(
    service: Running,
) -> None:
    generation_id = await service.start("ada")
    await service.service.leases.drain()
    async with service.phone("ada") as phone:
        await phone.call("subscribe_to_generation", {"generationId": generation_id})
        await phone.until_over(generation_id)
        await phone.call("subscribe_to_generation", {"generationId": generation_id})
        await phone.call("subscribe_to_generation", {"generationId": generation_id, "after": 4})
        await phone.until(lambda: len(phone.events) == 8)
        assert phone.sequences(generation_id) == [1, 2, 3, 4, 5, 6, 5, 6]
        assert len(set(phone.cursors)) == 1  # Out of feed order: the newest cursor, which never moves back.
        phone.events.clear()


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ({"generationId": "edit_1_0000000000000000"}, "not_found"),
        ({"generationId": 7}, "bad_request"),
        ({}, "bad_request"),
        ("edit_1_x", "bad_request"),
        ({"generationId": "edit_1_x", "after": -1}, "bad_request"),
        ({"generationId": "edit_1_x", "after": True}, "bad_request"),
    ],
)
async def test_an_invalid_subscription_is_refused(service: Running, argument: Any, code: str) -> None:
    async with service.phone("ada") as phone:
        nack = await phone.call("subscribe_to_generation", argument)
        assert (nack["ok"], nack["code"]) == (False, code)


async def test_another_users_generation_is_answered_like_an_unknown_one(service: Running) -> None:
    theirs = await service.start("bob")
    async with service.phone("ada") as phone:
        foreign = await phone.call("subscribe_to_generation", {"generationId": theirs})
        missing = await phone.call("subscribe_to_generation", {"generationId": "edit_1_0000000000000000"})
        assert foreign == missing


@pytest.mark.parametrize("name", ["connect", "disconnect", "message", "nonsense", "", "*", "__proto__"])
async def test_an_undeclared_name_reaches_no_handler_and_is_refused_in_the_ack(service: Running, name: str) -> None:
    async with service.phone("ada") as phone:
        nack = await phone.call(name, {"userId": "bob"})
        assert (nack["ok"], nack["code"]) == (False, "bad_request")
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)


async def test_the_wrong_number_of_arguments_is_a_bad_request(service: Running) -> None:
    async with service.phone("ada") as phone:
        for arguments in [(), ({"userId": "ada"}, 1), (1, 2, 3)]:
            nack = await phone.call("authenticate", *arguments)
            assert (nack["ok"], nack["code"]) == (False, "bad_request")


@pytest.mark.parametrize(
    "hello",
    [
        pytest.param(['40{"userId":"eve-1","recovery":false}'], id="in the handshake that authenticates"),
        pytest.param(['40{"recovery":false}', '42["authenticate",{"userId":"eve-2"}]'], id="in the handshake"),
        pytest.param(["40", '42["authenticate",{"userId":"eve-3","recovery":false}]'], id="in authenticate"),
    ],
)
async def test_a_device_without_recovery_gets_one_argument_with_the_cursor_in_it(
    service: Running, hello: list[str]
) -> None:
    connection = await service.raw()
    for frame in hello:
        await connection.send(frame)
    await service.until(lambda: bool(service.service.hub.rooms))
    [user] = service.service.hub.rooms
    await service.start(user)
    seen: list[Any] = []
    while not seen or seen[-1][0] != "generation_completed":
        text = str(await connection.recv())
        if text.startswith(('42["continue"', '42["generation_')):
            seen.append(json.loads(text[2:]))
    await connection.close()
    assert all(len(event) == 2 for event in seen)
    cursors = [Cursor.parse(event[1]["cursor"], feed_name(service.service.log.epoch, user)) for event in seen]
    assert [cursor and cursor.seen for cursor in cursors] == list(range(1, 7))


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param("451-[{}]", id="binary event"),
        pytest.param('451-["x",{"_placeholder":true,"num":0}]', id="binary event with a placeholder"),
        pytest.param("461-1[{}]", id="binary ack"),
        pytest.param(b"\x00\x01", id="binary message"),
        pytest.param("42", id="event without data"),
        pytest.param("42[]", id="event without a name"),
        pytest.param("42{}", id="event that is an object"),
        pytest.param("42[7]", id="event with a number for a name"),
        pytest.param("42[", id="broken JSON"),
        pytest.param("42" + "[" * 30_000, id="deep JSON"),
        pytest.param('4{"a":1}', id="engine message that is JSON"),
        pytest.param("4", id="empty message"),
        pytest.param("44{}", id="connect error from a client"),
        pytest.param("48", id="unknown packet type"),
        pytest.param("40", id="second CONNECT"),
        pytest.param("", id="empty frame"),
        pytest.param("x", id="not Engine.IO"),
        pytest.param("4" + "2" * 70_000, id="too large"),
    ],
)
async def test_protocol_abuse_closes_the_transport_and_nothing_else(
    service: Running, frame: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with service.phone("ada") as neighbour:
        connection = await service.raw()
        await connection.send('40{"userId":"ada"}')
        assert str(await connection.recv()).startswith('40{"sid"')
        await connection.send(frame)
        assert not [each for each in await frames_until_close(connection) if each.startswith("41")], (
            "DISCONNECT was sent"
        )
        generation_id = await service.start("ada")
        await neighbour.until_over(generation_id)
    assert not any("Traceback" in record.getMessage() or record.exc_info for record in caplog.records)


async def test_an_event_before_connect_closes_the_transport(service: Running) -> None:
    connection = await service.raw()
    await connection.send('42["authenticate",{"userId":"ada"}]')
    assert await frames_until_close(connection) == []


async def test_an_unknown_namespace_is_refused_and_the_default_one_stays_usable(service: Running) -> None:
    connection = await service.raw()
    await connection.send("40/admin,")
    assert str(await connection.recv()) == '44/admin,{"message":"Invalid namespace"}'
    await connection.send("40")
    assert str(await connection.recv()).startswith('40{"sid"')
    await connection.close()


async def test_an_unrequested_ack_is_ignored(service: Running) -> None:
    async with service.phone("ada") as phone:
        await phone.client._send_packet(phone.client.packet_class(3, data=["x"], id=5))
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)


async def test_a_socket_that_never_connects_is_closed(tmp_path: Path) -> None:
    async with running(tmp_path, overrides={"auth_timeout": 0.1}) as service:
        connection = await service.raw()
        assert await frames_until_close(connection) == []


async def test_a_socket_that_never_authenticates_is_notified_and_closed(tmp_path: Path) -> None:
    async with running(tmp_path, overrides={"auth_timeout": 0.1}) as service:
        frames = list[str]()
        while not any(frame.startswith("40") for frame in frames):  # A machine may be too slow to connect in time.
            connection = await service.raw()
            with contextlib.suppress(websockets.ConnectionClosed):
                await connection.send("40")
            frames = await frames_until_close(connection)
        assert '42["authentication_required",{"code":"unauthenticated"}]' in frames
        assert not any(frame.startswith("41") for frame in frames)


async def test_a_socket_that_authenticates_in_time_stays_open(tmp_path: Path) -> None:
    async with running(tmp_path, overrides={"auth_timeout": 0.2}) as service:
        frame = ""
        while not frame.startswith("430"):  # A machine may be too slow to do it in time.
            connection = await service.raw()
            with contextlib.suppress(websockets.ConnectionClosed):
                await connection.send("40")
                await connection.send('420["authenticate",{"userId":"ada"}]')
                while not frame.startswith("430"):
                    frame = str(await connection.recv())
        await asyncio.sleep(0.4)  # Longer than the timeout: nothing may happen.
        await service.start("ada")
        while not frame.startswith('42["generation_completed"'):
            frame = str(await connection.recv())
        await connection.close()


class BrokenLog(MemoryLog):
    """Fails, or does not answer, when a device joins."""

    error: Exception = RuntimeError("secret of /the/path")

    async def head_cursor(self, user_id: str) -> Cursor:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("secret of /the/path"), LogUnavailable()])
async def test_a_handler_that_fails_is_acknowledged_as_unavailable(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    log = BrokenLog(epoch="e", credits=100, clock=now)
    log.error = error
    async with running(tmp_path, overrides={"storage": memory_storage(log)}) as service, service.phone() as phone:
        nack = await phone.call("authenticate", {"userId": "ada"})
        assert (nack["ok"], nack["code"]) == (False, "unavailable")
        assert "secret" not in caplog.text
        assert "secret" not in json.dumps(nack)


@pytest.mark.parametrize("error", [RuntimeError("secret"), LogUnavailable()])
async def test_a_handshake_while_the_log_is_unavailable_closes_the_transport(tmp_path: Path, error: Exception) -> None:
    log = BrokenLog(epoch="e", credits=100, clock=now)
    log.error = error
    async with running(tmp_path, overrides={"storage": memory_storage(log)}) as service:
        connection = await service.raw()
        await connection.send('40{"userId":"ada"}')
        assert not [frame for frame in await frames_until_close(connection) if frame.startswith("4")]


#: Events of 2 kB each: more than the kernel buffers for a stalled reader and the service queues.
FLOOD = 1_000


@pytest.mark.parametrize(("letter", "filler", "count"), [("x", 1_900, FLOOD), ("🎩", 4_000, 200)])
async def test_a_stalled_reader_is_bounded_in_bytes_and_closed_and_slows_no_others(
    own_service: Running, monkeypatch: pytest.MonkeyPatch, letter: str, filler: int, count: int
) -> None:
    service = own_service
    monkeypatch.setattr(
        send_buffer, "STALL_TIMEOUT", 60.0
    )  # Not reached by any other client, however slow the machine.
    stalled = await stalled_device(service)
    [waiting] = service.service.sockets.eio.sockets.values()
    async with service.phone("ada") as neighbour:
        async for _ in flood(
            service.service.log, "ada", "edit_1_0000000000000000", count, filler=filler, letter=letter
        ):
            assert len(waiting.buffer) <= send_buffer.MAX_EVENTS + 2
            assert waiting.buffer.bytes <= send_buffer.MAX_BYTES + 1000
        assert waiting.buffer.bytes == sum(map(len, waiting.buffer._frames))
        await neighbour.until_over("edit_1_0000000000000000")
        assert neighbour.sequences("edit_1_0000000000000000") == list(range(1, count + 1))
        monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 0.3)
        await service.until(lambda: waiting.gone)
    stalled.transport.abort()


async def test_a_slow_reader_that_resumes_gets_every_event(
    own_service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = own_service
    monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 60.0)
    slow = await stalled_device(service)
    [waiting] = service.service.sockets.eio.sockets.values()
    async for _ in flood(service.service.log, "ada", "edit_1_0000000000000000", FLOOD):
        pass
    # Never happens if the kernel has accepted everything.
    await service.until(lambda: len(waiting.buffer) > send_buffer.MAX_EVENTS // 4)
    slow.transport.resume_reading()
    seen: list[int] = []
    while len(seen) < FLOOD:
        frame = str(await slow.recv())
        if frame.startswith("42") and "sequence" in frame:
            seen.append(json.loads(frame[2:])[1]["sequence"])
    assert seen == list(range(1, FLOOD + 1))
    await slow.close()


async def test_emit_and_rooms_of_the_library_are_not_available() -> None:
    from adapters.realtime.socketio_server import SocketServer

    server = SocketServer(SimpleNamespace(events={}), now)
    for attempt in (server.emit("x", {}, to=""), server.enter_room("sid", "user:")):
        with pytest.raises(NotImplementedError):
            await attempt
    assert logging.getLogger("socketio.server").handlers == []


async def test_a_client_that_reconnects_on_the_same_transport_is_unauthenticated(service: Running) -> None:
    connection = await service.raw()
    await connection.send('40{"userId":"ada"}')
    assert str(await connection.recv()).startswith('40{"sid"')
    await connection.send("41")
    await connection.send("40")
    frames = [str(await connection.recv()), str(await connection.recv())]
    assert frames[0].startswith('42["authenticated"')
    assert frames[1].startswith('40{"sid"')
    assert service.service.hub.rooms == {}
    await connection.close()


async def test_shutdown_notifies_devices_before_it_closes_their_sockets(tmp_path: Path) -> None:
    pause = Pause()
    async with running(tmp_path, overrides={"editor": ScriptedEditor(pause)}) as service:
        connection = await service.raw()
        await connection.send('40{"userId":"ada"}')
        assert str(await connection.recv()).startswith("40")
        await service.start("ada")
        await pause.reached.wait()
        service.server.begin_shutdown(now=True)
        frames = await frames_until_close(connection)
        failed = next(json.loads(frame[2:]) for frame in frames if "generation_failed" in frame)
        assert failed[1]["code"] == "interrupted"
        assert failed[1]["credit"] == 100
        assert not any(frame.startswith("41") for frame in frames)
        await service.until(lambda: service.server.should_exit)
