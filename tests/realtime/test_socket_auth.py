"""Authentication over Socket.IO by tokens, until they expire."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio
import websockets

from adapters.memory.log import MemoryLog
from adapters.realtime import engineio_socket
from adapters.system import now
from domain.events import timestamp
from domain.feed import Cursor
from support.builders import NOON, SteppableClock, memory_storage
from support.doubles import Pause, ScriptedEditor
from support.guarded import BAD, EXPIRED, GOOD, MISSING, FrameClient, guarded, token, wire
from support.harness import JSON, Running

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with guarded(tmp_path_factory.mktemp("images")) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def service(shared: Running) -> AsyncIterator[Running]:
    """The service of all these tests. Each leaves it idle."""
    yield shared
    await shared.until_all_disconnected()
    await shared.service.leases.drain()


@pytest.fixture
def clock() -> SteppableClock:
    return SteppableClock()


# --- sockets: the handshake ------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [{}, {"userId": "ada"}, {"userId": None}])
async def test_a_token_in_the_handshake_authenticates(service: Running, user: JSON) -> None:
    async with wire(service, {"token": token("ada"), **user}) as bare:
        await bare.next()
        [[name, welcome, *_]] = bare.events()
        assert (name, welcome["ok"], welcome["userId"]) == ("authenticated", True, "ada")
        assert welcome["expiresAt"] == timestamp(datetime.fromtimestamp(GOOD, NOON.tzinfo))
        generation_id = await service.start("ada")
        await bare.until_over(generation_id)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("nonsense", "invalid_token"),
        ("", "invalid_token"),
        (7, "invalid_token"),
        ([token("ada")], "invalid_token"),
        ({"token": token("ada")}, "invalid_token"),
        BAD["over"],
    ],
)
@pytest.mark.parametrize("user", [{}, {"userId": "ada"}, {"userId": True}])
async def test_a_bad_token_refuses_the_connection_with_a_code(
    service: Running, bad: object, code: str, user: JSON
) -> None:
    async with wire(service, hello=False) as bare:
        answer = await bare.hello({"token": bad, **user})
        assert answer.startswith("44{")
        refusal = json.loads(answer[2:])
        assert refusal["data"] == {"code": code}
        assert set(refusal) == {"message", "data"}
        assert refusal["message"].endswith(".")
        # A client may try again on the same transport.
        assert (await bare.hello({"token": token()})).startswith('40{"sid"')


@pytest.mark.parametrize(
    "auth",
    [
        None,
        {},
        {"userId": "ada"},
        {"userId": "ada", "token": None},
        {"userId": True},
        {"junk": "x"},
        [],
        "ada",
        7,
        True,
    ],
)
async def test_other_handshakes_connect_unauthenticated(service: Running, auth: object) -> None:
    async with wire(service, auth) as bare:
        nack = await bare.call("subscribe_to_generation", {"generationId": MISSING})
        assert nack["code"] == "unauthenticated"
        assert bare.events() == []
        assert service.service.hub.rooms == {}
        assert (await bare.authenticate(token=token("ada")))["userId"] == "ada"


@pytest.mark.parametrize(
    ("user", "code"), [("bob", "user_mismatch"), ("", "bad_request"), (True, "bad_request"), ({}, "bad_request")]
)
async def test_a_handshake_that_contradicts_its_token_is_answered_with_an_error_and_is_unauthenticated(
    service: Running, user: object, code: str
) -> None:
    async with wire(service, {"userId": user, "token": token("ada")}) as bare:
        nack = await bare.call("subscribe_to_generation", {"generationId": MISSING})
        assert nack["code"] == "unauthenticated"
        [(name, answer)] = bare.events()
        assert (name, answer["ok"], answer["code"], set(answer)) == ("authenticated", False, code, {*nack})
        assert service.service.hub.rooms == {}
        assert (await bare.authenticate(token=token("ada")))["userId"] == "ada"


# --- sockets: authenticate -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sub", "argument", "user"),
    [("ada", {}, "ada"), ("ada", {"userId": "ada"}, "ada"), (123, {"userId": "123"}, "123"), ("1", {"userId": 1}, "1")],
)
async def test_the_token_determines_the_user(service: Running, sub: object, argument: JSON, user: str) -> None:
    async with wire(service) as bare:
        ack = await bare.authenticate(token=token(sub), **argument)
        assert (ack["ok"], ack["userId"]) == (True, user)
        assert ack["expiresAt"] == timestamp(datetime.fromtimestamp(GOOD, NOON.tzinfo))


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ({}, "unauthenticated"),
        ({"userId": "ada"}, "unauthenticated"),
        ({"userId": "ada", "token": None}, "unauthenticated"),
        ({"userId": "ada", "token": 7}, "invalid_token"),
        ({"userId": "ada", "token": "nonsense"}, "invalid_token"),
        ({"userId": "ada", "token": EXPIRED}, "token_expired"),
        ({"userId": "bob", "token": token("ada")}, "user_mismatch"),
        ({"userId": "ADA", "token": token("ada")}, "user_mismatch"),
        ({"userId": "", "token": token("ada")}, "bad_request"),
        ({"userId": True, "token": token("ada")}, "bad_request"),
        ("ada", "bad_request"),
    ],
)
async def test_an_authentication_without_proof_is_refused_with_a_code(
    service: Running, argument: object, code: str
) -> None:
    async with wire(service) as bare:
        nack = await bare.call("authenticate", argument)
        assert (nack["ok"], nack["code"], set(nack)) == (False, code, {"ok", "code", "message"})
        assert service.service.hub.rooms == {}
        assert (await bare.authenticate())["code"] == "unauthenticated"


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ({"userId": "bob"}, "user_mismatch"),
        ({"userId": "ada", "token": token("bob")}, "user_mismatch"),
        ({"userId": "bob", "token": "nonsense"}, "invalid_token"),
        ({"token": token("bob", exp=1)}, "token_expired"),
        ({"token": 7}, "invalid_token"),
        ({"userId": ""}, "bad_request"),
    ],
)
async def test_a_failed_authentication_changes_nothing(service: Running, argument: JSON, code: str) -> None:
    async with wire(service, {"token": token("ada")}) as bare:
        assert (await bare.authenticate(**argument))["code"] == code
        ack = await bare.authenticate()
        assert (ack["userId"], ack["expiresAt"]) == ("ada", timestamp(datetime.fromtimestamp(GOOD, NOON.tzinfo)))
        mine, theirs = await service.start("ada"), await service.start("bob")
        await bare.until_over(mine)
        assert bare.sequences(mine) == [1, 2, 3, 4, 5, 6]
        assert bare.sequences(theirs) == []


async def test_a_valid_token_need_not_be_sent_again(service: Running) -> None:
    async with wire(service) as bare:
        first = await bare.authenticate(userId="ada", token=token("ada"))
        for argument in ({}, {"userId": "ada"}, {"userId": "ada", "token": None}):
            assert await bare.authenticate(**argument) == first


async def test_a_disconnect_ends_the_authentication_of_a_socket(service: Running) -> None:
    async with wire(service, {"token": token("ada")}) as bare:
        await bare.connection.send("41")
        await bare.connection.send("40")
        while not (await bare.next()).startswith('40{"sid"'):
            pass
        assert (await bare.authenticate(userId="ada"))["code"] == "unauthenticated"


# --- sockets: expiry of a token -------------------------------------------------------------------------

#: Seconds until a short token expires. The service's clock is stopped, so that the token is always valid on arrival.
SHORT: Final = 0.4


def short(sub: str = "ada", seconds: float = SHORT) -> str:
    return token(sub, exp=NOON.timestamp() + seconds)


@asynccontextmanager
async def soon_over(service: Running, *asked: JSON) -> AsyncIterator[tuple[FrameClient, list[JSON], float]]:
    """A client whose token expires in so many seconds, and the acks of its authentications before that.

    Where the machine was too slow for it, it tries once more, with more time.
    """
    for seconds in (SHORT, 10 * SHORT):
        async with wire(service, {"token": short(seconds=seconds)}) as bare:
            try:
                acks = [await bare.authenticate(**argument) for argument in asked]
            except websockets.ConnectionClosed:
                continue
            yield bare, acks, seconds
            return
    pytest.fail("the transport was closed before the acks came")


class TestWithTokensThatEnd:
    """While a provider works."""

    @pytest.fixture
    def pause(self) -> Pause:
        return Pause()

    @pytest_asyncio.fixture(loop_scope="module")
    async def service(self, tmp_path: Path, pause: Pause) -> AsyncIterator[Running]:
        overrides = {"editor": ScriptedEditor(pause), "clock": SteppableClock()}
        async with guarded(tmp_path, overrides=overrides) as service:
            yield service

    @pytest.mark.parametrize("door", ["handshake", "authenticate"])
    async def test_at_expiry_the_client_is_notified_and_the_transport_closed(self, service: Running, door: str) -> None:
        begun = asyncio.get_running_loop().time()
        async with wire(service, {"token": short()} if door == "handshake" else None) as bare:
            if door == "authenticate":
                ack = await bare.authenticate(token=short())
                assert ack["expiresAt"] == timestamp(datetime.fromtimestamp(NOON.timestamp() + SHORT, NOON.tzinfo))
            await bare.closed()
            assert asyncio.get_running_loop().time() - begun >= SHORT - 0.1, "too early"
            assert bare.frames[-1] == '42["authentication_expired",{"code":"token_expired"}]'
            assert service.service.hub.rooms == {}

    async def test_over_polling_the_close_follows_in_a_separate_answer(
        self, service: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engineio_socket, "CLOSE_GRACE", 60.0)  # The next poll is awaited for so long.
        address = "/socket.io/?EIO=4&transport=polling"
        for seconds in (SHORT, 10 * SHORT):
            opened = await service.http.get(address)
            client = f"{address}&sid={json.loads(opened.text[1:])['sid']}"
            await service.http.post(client, content=f"40{json.dumps({'token': short(seconds=seconds)})}")
            text = ""
            while "authentication_expired" not in text and (answer := await service.http.get(client)).is_success:
                text += answer.text
            if answer.is_success:
                break  # Otherwise a slow machine let it happen between two polls.
        assert text.endswith('42["authentication_expired",{"code":"token_expired"}]')
        assert "\x1e41" not in text
        assert (await service.http.get(client)).text == "6"
        assert (await service.http.get(client)).status_code == 400

    async def test_nothing_follows_the_notice_until_a_fresh_token_arrives(self, service: Running, pause: Pause) -> None:
        generation_id = await service.start("ada")
        await pause.reached.wait()
        async with wire(service, {"token": token()}) as bare:
            await bare.until(generation_id, 4)
            await bare.authenticate(token=short())
            await bare.closed()
            assert bare.sequences(generation_id) == [1, 2, 3, 4]
            assert bare.events()[-1][0] == "authentication_expired"
            cursor = [each[2] for each in bare.events() if len(each) == 3][-1]
        pause.released.set()
        async with wire(service, {"token": token(), "cursor": cursor}) as bare:
            await bare.until_over(generation_id)
            assert bare.sequences(generation_id) == [5, 6]

    async def test_a_fresh_token_before_expiry_continues_without_loss_or_duplicates(
        self, service: Running, pause: Pause
    ) -> None:
        generation_id = await service.start("ada")
        await pause.reached.wait()
        async with soon_over(service, {"token": token()}) as (bare, [ack], seconds):
            assert ack["expiresAt"] == timestamp(datetime.fromtimestamp(GOOD, NOON.tzinfo))
            await asyncio.sleep(seconds + 0.2)  # Nothing may happen.
            pause.released.set()
            await bare.until_over(generation_id)
            assert bare.sequences(generation_id) == [1, 2, 3, 4, 5, 6]

    async def test_authenticating_without_a_fresh_token_does_not_extend_the_session(self, service: Running) -> None:
        async with soon_over(service, {"userId": "ada"}, {"token": "nonsense"}) as (bare, acks, _):
            assert [ack["ok"] for ack in acks] == [True, False]
            await bare.closed()
            assert bare.events()[-1] == ["authentication_expired", {"code": "token_expired"}]

    async def test_only_the_expiry_of_the_current_user_applies(self, service: Running, pause: Pause) -> None:
        generation_id = await service.start("bob")
        await pause.reached.wait()
        async with (
            soon_over(service, {"token": token("bob")}) as (stays, [ack], seconds),
            wire(service, {"token": token("ada")}) as goes,
        ):
            assert ack["userId"] == "bob"
            assert (await goes.authenticate(token=short("bob", seconds)))["userId"] == "bob"
            await goes.closed()
            assert goes.events()[-1] == ["authentication_expired", {"code": "token_expired"}]
            pause.released.set()
            await stays.until_over(generation_id)
            assert stays.sequences(generation_id) == [1, 2, 3, 4, 5, 6]


async def test_a_token_that_expired_meanwhile_must_be_replaced(tmp_path: Path, clock: SteppableClock) -> None:
    async with (
        guarded(tmp_path, overrides={"clock": clock}) as service,
        wire(service, {"token": token(exp=NOON.timestamp() + 60)}) as bare,
    ):
        clock.step(61)
        assert (await bare.authenticate(userId="ada"))["ok"] is False


# --- sockets: one user after the other -------------------------------------------------------------------


class GatedLog(MemoryLog):
    """Returns the head of a user's feed only once that user's gate is open."""

    def __init__(self) -> None:
        super().__init__(epoch="e", credits=100, clock=now)
        self.asked = dict[str, asyncio.Event]()
        self.gates = dict[str, asyncio.Event]()

    def gate(self, user: str) -> asyncio.Event:
        self.asked[user] = asyncio.Event()
        return self.gates.setdefault(user, asyncio.Event())

    async def head_cursor(self, user_id: str) -> Cursor:
        if user_id in self.gates:
            self.asked[user_id].set()
            await self.gates[user_id].wait()
        return await super().head_cursor(user_id)


class TestOneUserAfterTheOther:
    """While a provider works for both."""

    @pytest.fixture
    def pause(self) -> Pause:
        return Pause()

    @pytest.fixture
    def log(self) -> GatedLog:
        return GatedLog()

    @pytest_asyncio.fixture(loop_scope="module")
    async def service(self, tmp_path: Path, pause: Pause, log: GatedLog) -> AsyncIterator[Running]:
        async with guarded(
            tmp_path, overrides={"editor": ScriptedEditor(pause), "storage": memory_storage(log)}
        ) as service:
            yield service

    @pytest_asyncio.fixture(loop_scope="module")
    async def ids(self, service: Running) -> dict[str, str]:
        """A running generation of each user."""
        ids = {user: await service.start(user) for user in ("ada", "bob")}
        for user, generation_id in ids.items():
            while (await service.get(f"/generations/{generation_id}", user))["sequence"] < 4:
                await asyncio.sleep(0.01)
        return ids

    @pytest.mark.parametrize("order", [["ada", "bob"], ["bob", "ada"], ["ada", "bob", "ada"], ["bob", "bob", "ada"]])
    @pytest.mark.parametrize("waiting", [True, False], ids=["waiting for acks", "pipelined"])
    async def test_the_last_authentication_wins(
        self, service: Running, pause: Pause, ids: dict[str, str], order: list[str], waiting: bool
    ) -> None:
        async with wire(service) as bare:
            beginnings = []
            for user in order:
                beginnings.append(await bare.say("authenticate", {"userId": user, "token": token(user)}))
                if waiting:
                    await bare.ack(beginnings[-1])
                    await bare.until(ids[user], 4)
            acks = [await bare.ack(beginning) for beginning in beginnings]
            assert [ack["userId"] for ack in acks] == order
            last = order[-1]
            switched = next(n for n, frame in enumerate(bare.frames) if frame.startswith(beginnings[-1]))
            assert set(service.service.hub.rooms) == {last}
            pause.released.set()
            await bare.until_over(ids[last])
            await self.settle(service, bare)
            sent = [each[1].get("generationId") for each in bare.events(bare.frames[switched:])]
            assert set(sent) == {ids[last]}
            if last not in order[:-1]:
                assert bare.sequences(ids[last]) == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize(("slow", "quick"), [("ada", "bob"), ("bob", "ada")])
    async def test_the_last_authentication_wins_even_if_the_log_answers_the_first_one_later(
        self, service: Running, pause: Pause, ids: dict[str, str], log: GatedLog, slow: str, quick: str
    ) -> None:
        gate = log.gate(slow)
        async with wire(service) as bare:
            first = await bare.say("authenticate", {"token": token(slow)})
            await log.asked[slow].wait()
            second = await bare.say("authenticate", {"token": token(quick)})
            await asyncio.sleep(0.05)  # So that the second one overtakes the first, if it can.
            gate.set()
            assert (await bare.ack(first))["userId"] == slow
            assert (await bare.ack(second))["userId"] == quick
            switched = next(n for n, frame in enumerate(bare.frames) if frame.startswith(second))
            assert set(service.service.hub.rooms) == {quick}
            pause.released.set()
            await bare.until_over(ids[quick])
            await self.settle(service, bare)
            assert bare.sequences(ids[quick]) == [1, 2, 3, 4, 5, 6]
            sent = {each[1].get("generationId") for each in bare.events(bare.frames[switched:])}
            assert sent == {ids[quick]}

    @pytest.mark.parametrize(("slow", "quick"), [("ada", "bob"), ("bob", "ada")])
    async def test_a_client_that_disconnects_during_authentication_leaves_no_state(
        self, service: Running, log: GatedLog, slow: str, quick: str
    ) -> None:
        gate = log.gate(slow)
        async with AsyncExitStack() as stack:
            bare = await stack.enter_async_context(wire(service, {"token": token(quick)}))
            await bare.say("authenticate", {"token": token(slow)})
            await log.asked[slow].wait()
        gate.set()
        await service.until_all_disconnected()

    async def settle(self, service: Running, bare: FrameClient) -> None:
        """Wait until all generations have ended and all events are sent."""
        await service.service.leases.drain()
        await service.service.hub.flushed()
        await bare.call("nothing", {})
