"""Requests for a session of another node: what is passed on, what the other node answers, and what nobody believes."""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import httpx2
import pytest
import pytest_asyncio
import websockets

from adapters.realtime import engineio_socket, peers, send_buffer
from adapters.realtime.peers import FORWARDED, WEBSOCKET, Peers
from support.doubles import InMemoryImages
from support.harness import RAW_OPTIONS, TIMEOUT, Running, flood, frames_until_close, running
from support.postgres import fresh_database

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH: Final = "/socket.io/?EIO=4&transport=polling"
UNKNOWN: Final = {"code": 1, "message": "Session ID unknown"}


@asynccontextmanager
async def cluster(count: int, folder: Any, **settings: Any) -> AsyncIterator[list[Running]]:
    """Nodes that know each other."""
    shared = {"images": InMemoryImages()}
    async with fresh_database() as url, AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(running(folder, log=url, overrides=shared, **settings))
            for _ in range(count)
        ]
        for node in nodes:
            await node.until(lambda node=node: len(directory(node).others) == count - 1)  # type: ignore[misc]
        yield nodes


def directory(node: Running) -> Any:
    return node.service.storage.nodes


def sessions(node: Running) -> dict[str, Any]:
    return node.service.sockets.eio.sockets


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[Running]]:
    async with cluster(2, tmp_path_factory.mktemp("images")) as nodes:
        yield nodes


@pytest.fixture
def set_wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the seconds for which CONNECT waits for an upgrade."""
    return lambda seconds: monkeypatch.setattr(engineio_socket, "UPGRADE_WAIT", seconds)


async def opened(node: Running) -> str:
    """The id of a new polling session."""
    return str(json.loads((await node.http.get(PATH)).text[1:])["sid"])


async def close(node: Running, sid: str) -> None:
    await node.http.post(f"{PATH}&sid={sid}", content="1")


@asynccontextmanager
async def upgrading(node: Running, sid: str, **options: Any) -> AsyncIterator[websockets.ClientConnection]:
    """A WebSocket whose probe is answered."""
    url = f"ws://127.0.0.1:{node.port}/socket.io/?EIO=4&transport=websocket&sid={sid}"
    async with asyncio.timeout(TIMEOUT), websockets.connect(url, **RAW_OPTIONS, **options) as connection:
        await connection.send("2probe")
        assert await connection.recv() == "3probe"
        yield connection


# --- polling -----------------------------------------------------------------------------------------------


async def test_a_session_is_used_through_any_node(nodes: list[Running], set_wait: Any) -> None:
    set_wait(0)
    owner, other = nodes
    sid = await opened(owner)
    assert sid.startswith(f"{directory(owner).id}-")
    answer = await other.http.post(f"{PATH}&sid={sid}", content='40{"userId":"ada"}')
    assert (answer.status_code, answer.text) == (200, "ok")
    welcome = await other.http.get(f"{PATH}&sid={sid}")
    assert welcome.headers["content-type"] == "text/plain; charset=utf-8"
    assert welcome.text.startswith("40{")
    assert set(sessions(owner)) == {sid}
    assert sessions(other) == {}
    waiting = asyncio.create_task(other.http.get(f"{PATH}&sid={sid}&t=2"))
    await owner.until(lambda: sessions(owner)[sid]._polling)
    await owner.start("ada")
    assert "generation_started" in (await waiting).text
    await close(other, sid)
    assert sessions(owner) == {}


async def test_answers_are_compressed_once_and_have_one_set_of_cors_headers(
    nodes: list[Running], set_wait: Any
) -> None:
    set_wait(0)
    owner, other = nodes
    for _ in range(3):
        await owner.start("ada", prompt="x" * 2000)
    sid = await opened(owner)
    await other.http.post(f"{PATH}&sid={sid}", content='40{"userId":"ada"}')
    answer = await other.http.get(
        f"{PATH}&sid={sid}", headers={"Origin": "http://localhost:9", "Accept-Encoding": "gzip"}
    )
    assert answer.headers["content-encoding"] == "gzip"
    assert '"authenticated"' in answer.text
    assert answer.headers.get_list("access-control-allow-origin") == ["http://localhost:9"]
    await close(other, sid)


async def test_the_first_node_applies_its_rules(nodes: list[Running]) -> None:
    owner, other = nodes
    sid = await opened(owner)
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        assert (await other.http.get(f"{PATH}&sid={sid}", headers=headers)).status_code == 403
    await close(owner, sid)


@pytest.mark.parametrize(
    "body", ["4" * 70_000, "\x1e".join(["2"] * 300), "", "x"], ids=["long", "many", "empty", "malformed"]
)
async def test_a_malformed_post_closes_the_session_of_the_other_node(nodes: list[Running], body: str) -> None:
    owner, other = nodes
    sid = await opened(owner)
    answer = await other.http.post(f"{PATH}&sid={sid}", content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, 3)
    assert sessions(owner) == {}


async def test_two_polls_at_once_through_two_nodes_close_the_session(nodes: list[Running]) -> None:
    owner, other = nodes
    sid = await opened(owner)
    waiting = asyncio.create_task(other.http.get(f"{PATH}&sid={sid}"))
    await owner.until(lambda: sessions(owner)[sid]._polling)
    assert (await owner.http.get(f"{PATH}&sid={sid}")).status_code == 400
    assert (await waiting).text == "6"
    assert (await other.http.get(f"{PATH}&sid={sid}")).json() == UNKNOWN


async def test_a_poll_that_a_balancer_repeats_is_refused_because_its_first_answer_may_be_lost(
    nodes: list[Running], set_wait: Any
) -> None:
    set_wait(0)
    for first, second in (nodes, nodes[::-1], nodes[:1] * 2, nodes[1:] * 2):
        sid = await opened(nodes[0])
        await nodes[0].http.post(f"{PATH}&sid={sid}", content="40")
        assert (await first.http.get(f"{PATH}&sid={sid}&t=Pxyz1")).text.startswith("40")
        assert (await second.http.get(f"{PATH}&sid={sid}&t=Pxyz1")).status_code == 400
        assert sessions(nodes[0]) == {}


# --- the upgrade -------------------------------------------------------------------------------------------


async def test_an_upgrade_before_connect_was_handled_moves_the_session(nodes: list[Running], set_wait: Any) -> None:
    set_wait(60)
    owner, other = nodes
    sid = await opened(owner)
    waiting = asyncio.create_task(owner.http.get(f"{PATH}&sid={sid}"))
    await owner.http.post(f"{PATH}&sid={sid}", content='40{"userId":"ada"}')
    await owner.until(lambda: sessions(owner)[sid]._polling)
    async with upgrading(other, sid, subprotocols=["a", "b"]) as connection:
        assert connection.subprotocol == "a"
        assert (await waiting).text == "6"
        assert (await owner.http.get(f"{PATH}&sid={sid}")).text == "6"
        await connection.send("5")
        await connection.send('421["no such event"]')
        assert str(await connection.recv()).startswith("40{")
        assert '"authenticated"' in str(await connection.recv())
        while not (packet := str(await connection.recv())).startswith("431"):
            pass
        assert "bad_request" in packet
        assert (set(sessions(owner)), set(sessions(other))) == (set(), {sid})
        await other.start("ada")
        assert "generation_started" in str(await connection.recv())
    await other.until_all_disconnected()


async def test_an_upgrade_before_the_first_message_moves_the_session(nodes: list[Running]) -> None:
    owner, other = nodes
    sid = await opened(owner)
    async with upgrading(other, sid) as connection:
        await connection.send("5")
        await connection.send("40")
        assert str(await connection.recv()).startswith("40{")
        assert (set(sessions(owner)), set(sessions(other))) == (set(), {sid})
    await other.until_all_disconnected()


async def test_a_later_upgrade_is_relayed(nodes: list[Running], set_wait: Any) -> None:
    set_wait(0)
    owner, other = nodes
    sid = await opened(owner)
    await owner.http.post(f"{PATH}&sid={sid}", content='40{"userId":"bob"}')
    assert (await owner.http.get(f"{PATH}&sid={sid}")).text.startswith("40{")
    async with upgrading(other, sid) as connection:
        await connection.send("5")
        await connection.send('421["no such event"]')
        packets = [str(await connection.recv()) for _ in range(1)]
        assert packets[0].startswith("431[")
        assert (set(sessions(owner)), set(sessions(other))) == ({sid}, set())
        for _ in range(3):
            await owner.start("bob")
            while "generation_completed" not in str(await connection.recv()):
                pass
    await owner.until_all_disconnected()


async def test_a_relayed_websocket_ends_at_both_ends_with_its_session(nodes: list[Running], set_wait: Any) -> None:
    set_wait(0)
    owner, other = nodes
    for end in ("client", "owner", "abuse"):
        sid = await opened(owner)
        await owner.http.post(f"{PATH}&sid={sid}", content="40")
        assert (await owner.http.get(f"{PATH}&sid={sid}")).text.startswith("40{")
        async with upgrading(other, sid) as connection:
            await connection.send("5")
            await connection.send('421["x"]')
            await connection.recv()
            if end == "client":
                connection.transport.abort()
            elif end == "owner":
                sessions(owner)[sid].close()
            else:
                await connection.send(b"\x04binary")
            if end != "client":
                await frames_until_close(connection)
        await owner.until_all_disconnected()
        await other.until(lambda: not other.server.server_state.tasks)


@pytest.mark.parametrize("first", ["2", "40", "5"])
async def test_an_upgrade_that_fails_leaves_the_session_polling(
    nodes: list[Running], first: str, set_wait: Any
) -> None:
    set_wait(60)
    owner, other = nodes
    sid = await opened(owner)
    await owner.http.post(f"{PATH}&sid={sid}", content="40")
    url = f"ws://127.0.0.1:{other.port}/socket.io/?EIO=4&transport=websocket&sid={sid}"
    async with asyncio.timeout(TIMEOUT), websockets.connect(url, **RAW_OPTIONS) as connection:
        await connection.send(first)
        with pytest.raises(websockets.ConnectionClosed):
            await connection.recv()
    packets = ""
    while not packets.startswith("40{"):  # What was held back is handled now.
        packets = (await other.http.get(f"{PATH}&sid={sid}")).text
    await close(owner, sid)


async def test_messages_that_are_held_back_are_handled_in_order_and_without_an_upgrade_in_time(
    nodes: list[Running], set_wait: Any
) -> None:
    set_wait(0.05)
    owner, other = nodes
    sid = await opened(owner)
    posts = ['40{"userId":"ada"}', '421["a"]\x1e422["b"]', '423["c"]']
    for node, body in zip((owner, other, owner), posts, strict=True):
        assert (await node.http.post(f"{PATH}&sid={sid}", content=body)).text == "ok"
    packets = list[str]()
    while len(packets) < 5:
        packets += [each for each in (await other.http.get(f"{PATH}&sid={sid}")).text.split("\x1e") if each != "6"]
    assert [each[:3] for each in packets if not each.startswith("42[")] == ["40{", "431", "432", "433"]
    await close(owner, sid)


async def test_only_a_few_messages_are_held_back(nodes: list[Running], set_wait: Any) -> None:
    set_wait(60)
    sid = await opened(nodes[0])
    await nodes[0].http.post(f"{PATH}&sid={sid}", content="40")
    for number in range(20):
        await nodes[0].http.post(f"{PATH}&sid={sid}", content=f'42{number}["x"]')
    assert (await nodes[1].http.get(f"{PATH}&sid={sid}")).text.startswith("40{")
    await close(nodes[0], sid)


async def test_nothing_is_held_back_and_no_id_names_a_node_while_there_is_none_besides(
    tmp_path: Any, set_wait: Any
) -> None:
    set_wait(60)
    async with cluster(1, tmp_path / "a") as [alone], running(tmp_path / "b") as single:
        for node in (alone, single):
            sid = await opened(node)
            assert bool(re.match("[0-9a-f]{6}-", sid)) is (node is alone)
            await node.http.post(f"{PATH}&sid={sid}", content="40")
            assert (await node.http.get(f"{PATH}&sid={sid}")).text.startswith("40{")
            await close(node, sid)


# --- owners that are not there ----------------------------------------------------------------------------


def forged(*node_ids: str) -> list[str]:
    rest = "A" * 20
    return [f"{node}-{rest}" for node in node_ids] + [
        "127.0.0.1:80-" + rest, "-", "x", "../../x", "a" * 10_000, "http://evil.example/", f"abcdef-{rest}\r\nX: y",
        f"abcdef-{rest}%20GET", "００００００-" + rest, f"abcdef-{rest}@evil.example", "\x00",
    ]  # fmt: skip


async def test_ids_that_no_node_gave_out_are_unknown_everywhere(nodes: list[Running]) -> None:
    owner, other = nodes
    for sid in forged(directory(owner).id, directory(other).id, "abcdef", "ABCDEF"):
        for method, body in (("GET", None), ("POST", "40")):
            url = httpx2.URL(PATH).copy_merge_params({"sid": sid})
            answer = await other.http.request(method, url, content=body)
            assert (answer.status_code, answer.json()) == (400, UNKNOWN), sid
            assert "Accept-Encoding, Accept-Encoding" not in answer.headers["vary"]
    address = f"ws://127.0.0.1:{other.port}/socket.io/?EIO=4&transport=websocket&sid="
    for node in (directory(owner).id, "abcdef"):
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(f"{address}{node}-{'A' * 20}", **RAW_OPTIONS)
        assert refused.value.response.status_code == 400


async def test_a_node_that_started_a_moment_ago_is_known_at_once(nodes: list[Running], tmp_path: Any) -> None:
    url, images = nodes[0].service.settings.log, InMemoryImages()
    async with running(tmp_path, log=url, overrides={"images": images}) as third:
        sid = await opened(third)
        assert (await nodes[0].http.post(f"{PATH}&sid={sid}", content="1")).text == "ok"


async def test_a_node_that_ends_while_it_passes_requests_on_logs_no_failure(
    nodes: list[Running], set_wait: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    set_wait(0)
    owner = nodes[0]
    polling, relayed = await opened(owner), await opened(owner)
    for sid in (polling, relayed):
        await owner.http.post(f"{PATH}&sid={sid}", content='40{"userId":"eve"}')
        assert (await owner.http.get(f"{PATH}&sid={sid}")).text.startswith("40{")
    overrides = {"images": InMemoryImages()}
    async with running(tmp_path, log=owner.service.settings.log, overrides=overrides) as ending:
        poll = asyncio.create_task(ending.http.get(f"{PATH}&sid={polling}"))
        await owner.until(lambda: sessions(owner)[polling]._polling)
        async with upgrading(ending, relayed) as connection:
            await connection.send("5")
            await owner.until(lambda: sessions(owner)[relayed].upgraded)
            ending.server.begin_shutdown(now=True)
            await ending.until(lambda: not ending.server.server_state.tasks)
        with contextlib.suppress(httpx2.TransportError):
            assert (await poll).status_code == 400
    assert [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"] == []
    await close(owner, polling)
    await owner.until_all_disconnected()


@asynccontextmanager
async def in_place_of(node: Running, answer: Callable[..., Any] | int) -> AsyncIterator[str]:
    """A server, or a port, at the address of an invented node in the list of nodes: its id."""
    server = await asyncio.start_server(answer if callable(answer) else print, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1] if callable(answer) else answer
    known = directory(node)
    beats = known._beat

    async def beat() -> Any:
        address = f"127.0.0.1:{port}"
        seen = (await beats())[0]["r_now"]
        row = {"r_id": "abcdef", "r_address": address, "r_sockets": 0, "r_streams": 0, "r_seen": seen, "r_now": seen}
        return [*await beats(), row]

    known._beat = beat
    try:
        await known.beat()
        yield "abcdef"
    finally:
        known._beat = beats
        server.close()
        await known.beat()


async def test_an_owner_that_accepts_and_never_answers_counts_as_dead_once_it_does_not_beat(
    nodes: list[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_CHECK_INTERVAL", 0.05)
    heads = list[bytes]()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            await reader.read()
        writer.close()

    node = nodes[1]
    async with in_place_of(node, silent) as name:
        sid = f"{name}-{'A' * 20}"
        poll = asyncio.create_task(
            node.http.get(f"{PATH}&sid={sid}&t=a%20b%0d%0aX:y", headers={"Cookie": "a=b", "X-Forwarded-For": "1.2.3.4"})
        )
        await node.until(lambda: bool(heads))
        url = f"ws://127.0.0.1:{node.port}/socket.io/?EIO=4&transport=websocket&sid={sid}"
        with pytest.raises(websockets.InvalidStatus):  # A WebSocket has to be accepted at once.
            await websockets.connect(url, **RAW_OPTIONS)
        assert not poll.done()
        monkeypatch.setattr(type(directory(node)), "dead", [name])
        assert (await poll).json() == UNKNOWN
    # Nothing of the client's request but its session and the tag of its poll has been sent.
    head = heads[0].decode().lower()
    assert head.startswith("post / http/1.1\r\n")
    assert "cookie" not in head
    assert "1.2.3.4" not in head
    [line] = [line for line in head.split("\r\n") if line.startswith(FORWARDED)]
    assert line.split(" ")[2:5] == ["get", sid.lower(), "abx:y".replace(":", "")]


async def test_an_owner_that_beats_and_never_answers_is_given_up(
    nodes: list[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the network between two nodes drops all packets: even a poll is answered once a ping is due."""
    monkeypatch.setattr(peers, "_CHECK_INTERVAL", 0.05)
    monkeypatch.setattr(peers, "_TIMEOUT", peers._TIMEOUT.__class__(total=(peers._TIMEOUT.total or 3_600) / 200))
    given_up = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        given_up.set()
        writer.close()

    async with in_place_of(nodes[1], silent) as name, asyncio.timeout(10):
        assert (await nodes[1].http.get(f"{PATH}&sid={name}-{'A' * 20}")).json() == UNKNOWN
        await given_up.wait()


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"nonsense\r\n\r\n", b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
)  # fmt: skip
async def test_an_owner_that_answers_with_nonsense_is_no_owner(nodes: list[Running], answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with in_place_of(nodes[1], talk) as name, asyncio.timeout(TIMEOUT):
        for transport in ("polling", "websocket"):
            path = f"/socket.io/?EIO=4&transport={transport}&sid={name}-{'A' * 20}"
            if transport == "polling":
                assert (await nodes[1].http.get(path)).status_code == 400
            else:
                with pytest.raises(websockets.InvalidStatus) as refused:
                    await websockets.connect(f"ws://127.0.0.1:{nodes[1].port}{path}", **RAW_OPTIONS)
                assert refused.value.response.status_code == 400


async def test_an_id_of_an_earlier_life_at_the_same_address_is_unknown_and_causes_no_loop(
    nodes: list[Running],
) -> None:
    for target in nodes:  # Another node has the address now, or this one itself.
        async with in_place_of(nodes[1], target.port) as name:
            for method, body in (("GET", None), ("POST", "40")):
                answer = await nodes[1].http.request(method, f"{PATH}&sid={name}-{'A' * 20}", content=body)
                assert (answer.status_code, answer.json()) == (400, UNKNOWN)


# --- what nodes believe ------------------------------------------------------------------------------------


def header(node: Running, method: str, sid: str, **changes: Any) -> dict[str, str]:
    """What a node would send; `changes`: of its secret and of its clock."""

    class Changed:
        id, secret = "abcdef", changes.get("secret", directory(node).secret)
        time = directory(node).time + changes.get("seconds", 0)

    known: Any = Changed()
    signer = Peers(known)
    text = f"{known.time + 30} {method} {sid} "
    return {FORWARDED: f"{text} {signer._signature(text)}"}


async def test_only_a_valid_signature_of_the_same_request_is_believed(nodes: list[Running]) -> None:
    owner, other = nodes
    sid = await opened(owner)
    valid = header(owner, "POST", sid)
    assert (await owner.http.post("/", headers={"Host": "evil.example", **valid}, content="3")).text == "ok"
    text = valid[FORWARDED]
    wrong = [
        header(owner, "POST", sid, secret="another")[FORWARDED],
        header(owner, "POST", sid, seconds=-31)[FORWARDED],
        text.replace(sid, f"{sid[:-1]}{'A' if sid[-1] != 'A' else 'B'}"),
        text.replace("POST", "GET"),
        header(owner, WEBSOCKET, sid)[FORWARDED],
        *(text[:-1], text.upper(), "", "x", "é" * 64, "1 2 3 4", f"9e99 POST {sid}  {'0' * 64}"),
    ]
    for each in wrong:
        answer = await owner.http.post("/", headers=[(FORWARDED.encode(), each.encode("latin-1"))], content="1")
        assert answer.status_code == 405, each
    assert set(sessions(owner)) == {sid}
    # A node does not pass on what seems to come from another one, valid or not.
    for each in (header(other, "POST", sid)[FORWARDED], *wrong):
        answer = await other.http.post(
            f"{PATH}&sid={sid}", headers=[(FORWARDED.encode(), each.encode("latin-1"))], content="1"
        )
        assert (answer.status_code, answer.json()) == (400, UNKNOWN)
    assert set(sessions(owner)) == {sid}
    await close(owner, sid)


async def test_nodes_with_different_secrets_refuse_each_other_without_a_loop(
    nodes: list[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, other = nodes
    sid = await opened(owner)
    monkeypatch.setattr(directory(other), "secret", "another")
    began = time.monotonic()
    assert (await other.http.get(f"{PATH}&sid={sid}")).status_code == 400
    assert (await other.http.post(f"{PATH}&sid={sid}", content="1")).status_code == 400
    assert time.monotonic() - began < TIMEOUT
    assert set(sessions(owner)) == {sid}
    await close(owner, sid)


async def test_a_client_that_reads_nothing_through_a_relay_is_disconnected_and_fills_no_buffer(
    nodes: list[Running], monkeypatch: pytest.MonkeyPatch, set_wait: Any
) -> None:
    monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 1.0)
    set_wait(0)
    owner, other = nodes
    sid = await opened(owner)
    await owner.http.post(f"{PATH}&sid={sid}", content='40{"userId":"eve"}')
    assert (await owner.http.get(f"{PATH}&sid={sid}")).text.startswith("40{")
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
    line.connect(("127.0.0.1", other.port))
    async with upgrading(other, sid, sock=line) as connection:
        await connection.send("5")
        await owner.until(lambda: sessions(owner)[sid].upgraded)
        connection.transport.pause_reading()
        async for _ in flood(owner.service.log, "eve", "edit_1_aaaaaaaaaaaaaaaa", 300, filler=9_000):
            pass
        await owner.until(lambda: sid not in sessions(owner))
        connection.transport.abort()
    await owner.until_all_disconnected()
