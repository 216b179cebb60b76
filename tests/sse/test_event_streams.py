"""`GET /events` and `GET /generations/<id>/events` as event streams."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio

from adapters.memory.log import MemoryLog
from adapters.realtime import send_buffer
from adapters.system import now
from domain.errors import LogUnavailable
from domain.feed import Cursor
from support.builders import IN_MEMORY, EventWriter, SteppableClock, memory_storage
from support.doubles import Pause, ScriptedEditor
from support.event_stream import ACCEPT, of_generation, open_stream
from support.harness import JSON, Running, flood, running
from support.raw_http import exchange

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["memory", "sqlite"])
async def service(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    with TemporaryDirectory(dir=IN_MEMORY) as folder:
        log = "memory://" if request.param == "memory" else f"sqlite:///{folder}/log.db"
        async with running(tmp_path_factory.mktemp("images"), log=log) as service:
            yield service


@pytest.fixture(scope="module")
def writer(service: Running) -> EventWriter:
    return EventWriter(service.service.log, SteppableClock(now()))


async def history(service: Running, user: str, *generation_ids: str) -> list[JSON]:
    return [event for each in generation_ids for event in await service.events(each, user)]


async def test_the_feed_begins_with_authenticated_and_goes_on_with_every_event(
    service: Running, writer: EventWriter, eve: str
) -> None:
    finished = await writer.run_to_end(eve)
    unfinished = await writer.move(await writer.start(eve), "composition")
    async with open_stream(service, user=eve) as stream, service.phone(eve) as phone:
        welcome = await stream.named("authenticated")
        assert (stream.blocks[0].retry, stream.blocks[1].id) == (1000, welcome["cursor"])
        assert stream.blocks[1].event == "authenticated"
        listed = (await service.get("/generations", eve))["generations"]
        assert welcome == {
            "ok": True,
            "userId": eve,
            "cursor": welcome["cursor"],
            "recovered": False,
            "generations": listed,
        }
        await writer.finish(unfinished)
        last = await writer.run_to_end(eve, "generate")
        await phone.until_over(unfinished.generation_id, last.generation_id)
        await stream.until_count(len(phone.events))
        assert stream.events == phone.events
        assert [data for _, data in stream.events] == await history(
            service, eve, unfinished.generation_id, last.generation_id
        )
        assert stream.ids[1:] == phone.cursors
    assert finished.generation_id in {each["generationId"] for each in listed}


async def test_headers_forbid_caching_and_buffering_and_nothing_is_compressed(service: Running, eve: str) -> None:
    async with open_stream(service, user=eve, **{"Accept-Encoding": "gzip, br"}) as stream:
        headers = stream.response.headers
        assert headers["content-type"] == "text/event-stream"
        assert headers["cache-control"] == "no-store"
        assert headers["x-accel-buffering"] == "no"
        assert "Accept" in headers["vary"]
        assert "content-encoding" not in headers


@pytest.mark.parametrize(
    ("accept", "streamed"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream", True),
        ("text/event-stream;q=0.1, application/json", True),
        ("application/json, text/event-stream; charset=utf-8", True),
        ("text/event-stream;q=0", False),
        ("text/event-stream ; q=0.000", False),
        ("text/event-stream;q=0, text/event-stream", True),
        ("text/event-stream;charset=utf-8; q=0", False),
        ("text/event-stream;q=0;level=1", False),
        ("text/event-stream;q=0.01;level=1", True),
        ("*/*", False),
        ("text/*", False),
        ("application/json", False),
        ("application/x; a=text/event-stream", False),
    ],
)
async def test_the_accept_header_decides(service: Running, eve: str, accept: str, streamed: bool) -> None:
    headers = {"Accept": accept, "X-User-Id": eve}
    async with service.http.stream("GET", "/events?limit=3", headers=headers) as answer:
        assert answer.headers["content-type"] == ("text/event-stream" if streamed else "application/json")
        assert "Accept" in answer.headers["vary"]


async def test_the_limit_of_a_stream_is_ignored(service: Running, writer: EventWriter, eve: str) -> None:
    start = (await service.get("/events", eve))["cursor"]
    await writer.run_to_end(eve)
    for limit in ("2", "x", "0"):
        async with open_stream(service, f"/events?after={start}&limit={limit}", eve) as stream:
            await stream.until_count(6)


async def test_a_position_is_a_cursor_of_any_kind_and_last_event_id_comes_first(
    service: Running, writer: EventWriter, eve: str
) -> None:
    async with service.phone(eve) as phone, open_stream(service, user=eve) as stream:
        await stream.named("authenticated")
        done = await writer.run_to_end(eve)
        await phone.until_over(done.generation_id)
        await stream.until_count(6)
    all_of_it = await history(service, eve, done.generation_id)
    for path, last in [
        (f"/events?after={phone.cursors[2]}", None),
        (f"/events?after={phone.cursors[5]}", stream.ids[3]),
        ("/events?after=nonsense", stream.ids[3]),
        (f"/events?after={stream.ids[3]}", ""),
    ]:
        async with open_stream(service, path, eve, last=last) as again:
            assert (await again.named("authenticated"))["recovered"] is True
            await again.until_count(3)
            assert [data for _, data in again.events] == all_of_it[3:]
    page = await service.get(f"/events?after={stream.ids[3]}", eve)
    assert [item["data"] for item in page["events"]] == all_of_it[3:]


async def test_an_unusable_position_starts_at_the_present(service: Running, writer: EventWriter, eve: str) -> None:
    await writer.run_to_end(eve)
    foreign = (await service.get("/events", "somebody"))["cursor"]
    for path, last in [
        (f"/events?after={foreign}", None),
        ("/events", foreign),
        ("/events", "\u00fcx".encode()),
        ("/events?after=", None),
    ]:
        async with open_stream(service, path, eve, last=last) as stream:
            welcome = await stream.named("authenticated")
            assert welcome["recovered"] is False
            assert len(welcome["generations"]) == 1
            assert stream.events == []


async def test_a_stream_cut_at_any_event_is_resumed_with_the_rest(
    service: Running, writer: EventWriter, eve: str
) -> None:
    """Also where it is cut within the replay of what was unfinished, and before the first event."""
    old = await writer.move(await writer.start(eve), "composition")
    other = await writer.start(eve, "generate")
    seen: list[JSON] = []
    last: str | None = None
    counts = [0, 1, 2, 0, 3, 1, 4, 2]
    for count in counts:
        async with open_stream(service, user=eve, last=last) as stream:
            assert (await stream.named("authenticated"))["recovered"] is (last is not None)
            await stream.until_count(min(count, 3 - len(seen)) if len(seen) < 3 else 0)
            seen += [data for _, data in stream.events]
            last = stream.ids[-1]
    await writer.finish(old)
    await writer.finish(other)
    async with open_stream(service, user=eve, last=last) as stream:
        total = len(await history(service, eve, old.generation_id, other.generation_id))
        await stream.until_count(total - len(seen))
        seen += [data for _, data in stream.events]
    for each in (old, other):
        of_it = [data for data in seen if data["generationId"] == each.generation_id]
        assert of_it == await service.events(each.generation_id, eve)


async def test_the_stream_of_one_generation_has_its_sequences_as_ids_and_ends_with_it(
    service: Running, writer: EventWriter, eve: str
) -> None:
    generation = await writer.move(await writer.start(eve), "composition")
    async with open_stream(service, of_generation(generation.generation_id), eve) as stream:
        await stream.until_count(2)
        await writer.run_to_end(eve)
        await writer.finish(generation)
        await stream.rest()
    every = await service.events(generation.generation_id, eve)
    assert [data for _, data in stream.events] == every
    assert stream.events[-1][0] == "generation_completed"
    assert [block.id for block in stream.blocks[1:]] == [str(event["sequence"]) for event in every]
    assert stream.blocks[0].retry == 1000


async def test_the_stream_of_one_generation_begins_after_a_position(
    service: Running, writer: EventWriter, eve: str
) -> None:
    done = await writer.run_to_end(eve)
    path = of_generation(done.generation_id)
    for query, last, first in [
        ("?after=0", None, 1),
        ("?after=2", None, 3),
        ("?after=5", "2", 3),
        ("?after=6", "0", 1),
        ("?after=4", "nonsense", 5),
        ("?after=4", "-1", 5),
        ("?after=4", "\u0662".encode(), 5),
        ("?after=4", "1" * 30, 5),
        ("", "5", 6),
    ]:
        async with open_stream(service, path + query, eve, last=last) as stream:
            await stream.rest()
            assert [data["sequence"] for _, data in stream.events] == list(range(first, 7)), (query, last)


async def test_a_position_at_the_end_is_answered_with_204_so_that_an_event_source_stops(
    service: Running, writer: EventWriter, eve: str
) -> None:
    path = of_generation((await writer.run_to_end(eve)).generation_id)
    for query, last in [("?after=6", None), ("?after=7", None), ("", "6"), ("?after=0", "999")]:
        headers = {**ACCEPT, "X-User-Id": eve} | ({"Last-Event-ID": last} if last else {})
        answer = await service.http.get(path + query, headers=headers)
        assert (answer.status_code, answer.content) == (204, b"")
        assert (await service.http.get(path + query, headers={"X-User-Id": eve})).status_code == 200


async def test_a_position_beyond_an_unfinished_generation_waits(
    service: Running, writer: EventWriter, eve: str
) -> None:
    generation = await writer.start(eve)
    path = of_generation(generation.generation_id)
    async with (
        open_stream(service, f"{path}?after=4", eve) as stream,
        open_stream(service, f"{path}?after=1000", eve) as never,
    ):
        await writer.finish(generation)
        await stream.rest()
        await never.rest()
    assert [data["sequence"] for _, data in stream.events] == [5, 6]
    assert never.events == []


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "", "9" * 30])
async def test_a_malformed_sequence_is_refused(service: Running, writer: EventWriter, eve: str, after: str) -> None:
    path = of_generation((await writer.run_to_end(eve)).generation_id)
    answer = await service.http.get(f"{path}?after={after}", headers={**ACCEPT, "X-User-Id": eve})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_the_generation_of_another_user_and_none_are_the_same_404(
    service: Running, writer: EventWriter, eve: str
) -> None:
    generation = await writer.run_to_end("somebody")
    answers = [
        await service.http.get(of_generation(each), headers={**ACCEPT, "X-User-Id": eve})
        for each in (generation.generation_id, "edit_1_9999999999999999", "nonsense")
    ]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.content for answer in answers}) == 1


async def test_head_answers_the_headers_of_the_stream_and_ends(service: Running, writer: EventWriter, eve: str) -> None:
    paths = ["/events", of_generation((await writer.start(eve)).generation_id)]
    for path in paths:
        answer = await service.http.head(path, headers={**ACCEPT, "X-User-Id": eve})
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"] == "text/event-stream"
    await service.until_all_disconnected()


async def test_a_page_of_an_allowed_origin_may_read_a_stream(service: Running, eve: str) -> None:
    async with open_stream(service, user=eve, Origin="http://localhost:5173") as stream:
        assert stream.response.headers.get_list("access-control-allow-origin") == ["http://localhost:5173"]
    answer = await service.http.get("/events", headers={**ACCEPT, "Origin": "https://example.com"})
    assert (answer.status_code, answer.json()["code"]) == (403, "origin_not_allowed")


async def test_http_1_0_gets_a_stream_without_chunks_that_ends_with_the_connection(
    service: Running, writer: EventWriter, eve: str
) -> None:
    path = of_generation((await writer.run_to_end(eve)).generation_id)
    lines = f"GET {path} HTTP/1.0\r\nHost: localhost\r\nX-User-Id: {eve}\r\nAccept: text/event-stream\r\n\r\n"
    head, _, body = (await exchange(service, lines.encode())).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body.startswith(b"retry: 1000\n\nevent: generation_started\nid: 1\ndata: {")
    assert body.count(b"\n\n") == 7


async def test_a_comment_is_sent_every_fifteen_seconds(service: Running, eve: str) -> None:
    headers = {**ACCEPT, "X-User-Id": eve}
    async with service.http.stream("GET", "/events", headers=headers) as answer:
        chunks = answer.aiter_raw()
        text = b""
        while b"authenticated" not in text:
            text += await anext(chunks)
        [stream] = service.service.streams.open
        await service.until(lambda: len(stream.buffer) == 0)
        for _ in range(31):  # Half-second checks; the service makes its own besides.
            await service.service.streams.check_progress()
        while not text.endswith(b"\n\n:\n\n"):
            text += await anext(chunks)


async def test_a_client_that_leaves_leaves_nothing_behind(service: Running, writer: EventWriter, eve: str) -> None:
    generation = await writer.start(eve)
    for path in ("/events", of_generation(generation.generation_id)):
        async with open_stream(service, path, eve) as stream:
            await stream.until_count(1)
        await service.until(lambda: eve not in service.service.hub.rooms and not service.service.streams.open)


class BrokenLog(MemoryLog):
    """Does not answer once it is broken."""

    broken = False

    async def head_cursor(self, user_id: str) -> Cursor:
        if self.broken:
            raise LogUnavailable
        return await super().head_cursor(user_id)


async def test_a_temporary_refusal_is_an_empty_stream_after_which_an_event_source_comes_back(tmp_path: Path) -> None:
    log = BrokenLog(epoch="e", credits=100, clock=now)
    async with running(tmp_path, overrides={"storage": memory_storage(log)}, max_sockets_per_user=1) as service:
        log.broken = True
        refused = await service.http.get("/events", headers=ACCEPT)
        assert (await service.http.get("/events")).json()["code"] == "log_unavailable"
        log.broken = False
        async with open_stream(service, user="demo"):
            too_many = await service.http.get("/events", headers=ACCEPT)
        for answer in (refused, too_many):
            assert (answer.status_code, answer.content) == (200, b"retry: 1000\n\n")
            assert answer.headers["content-type"] == "text/event-stream"
        await service.until_all_disconnected()
        async with open_stream(service, user="demo") as stream:
            await stream.named("authenticated")


async def test_shutdown_ends_streams_after_the_last_event_and_the_drain_does_not(tmp_path: Path) -> None:
    pause = Pause()
    async with running(tmp_path, overrides={"editor": ScriptedEditor(pause)}) as service:
        generation_id = await service.start("ada")
        await pause.reached.wait()
        async with open_stream(service) as feed, open_stream(service, of_generation(generation_id)) as one:
            await feed.named("authenticated")
            service.server.begin_shutdown()
            await service.until(lambda: service.service.workflow.draining)
            async with open_stream(service, of_generation(generation_id)) as during:
                await during.until_count(1)
                service.server.begin_shutdown(now=True)
                for stream in (feed, one, during):
                    await stream.rest()
                    assert stream.events[-1][1]["code"] == "interrupted"
        await service.until(lambda: service.server.should_exit)


async def reluctant(service: Running) -> socket.socket:
    """A stream of ada's feed that reads nothing after its head."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
    line.connect(("127.0.0.1", service.port))
    line.setblocking(False)
    await asyncio.get_running_loop().sock_sendall(
        line, b"GET /events HTTP/1.1\r\nHost: localhost\r\nX-User-Id: ada\r\nAccept: text/event-stream\r\n\r\n"
    )
    await service.until(lambda: bool(service.service.streams.open))
    return line


FLOOD = 1_000


async def test_a_stalled_reader_is_bounded_and_aborted_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 60.0)
    async with running(tmp_path) as service, service.phone("ada") as neighbour:
        with await reluctant(service) as line:
            [stalled] = service.service.streams.open
            async for _ in flood(service.service.log, "ada", "edit_1_0000000000000000", FLOOD):
                assert len(stalled.buffer) <= send_buffer.MAX_EVENTS + 2
                assert stalled.buffer.bytes <= send_buffer.MAX_BYTES + 1000
            await neighbour.until_over("edit_1_0000000000000000")
            monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 0.3)
            await service.until(lambda: not service.service.streams.open)
            text = b""
            while part := await asyncio.get_running_loop().sock_recv(line, 1 << 16):
                text += part
        assert not text.endswith(b"0\r\n\r\n"), "the response was ended instead of cut off"
        complete = text.rpartition(b"\n\n")[0]
        last, seen = complete.rpartition(b"id: ")[2].split(b"\n")[0].decode(), complete.count(b"\nid: ") - 1
        async with open_stream(service, last=last) as again:
            await again.until_count(FLOOD - seen)
            assert [data["sequence"] for _, data in again.events] == list(range(seen + 1, FLOOD + 1))


async def test_a_slow_reader_that_resumes_gets_every_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 60.0)
    async with running(tmp_path) as service:
        with await reluctant(service) as line:
            [slow] = service.service.streams.open
            async for _ in flood(service.service.log, "ada", "edit_1_0000000000000000", FLOOD):
                pass
            await service.until(lambda: len(slow.buffer) > send_buffer.MAX_EVENTS // 4)
            text = b""
            while b"generation_completed" not in text or not text.endswith(b"\n\n\r\n"):
                text += await asyncio.get_running_loop().sock_recv(line, 1 << 16)
        sequences = [
            json.loads(each[6:])["sequence"]
            for each in httpx_lines(text)
            if each.startswith("data: ") and '"sequence"' in each
        ]
        assert sequences == list(range(1, FLOOD + 1))


def httpx_lines(raw: bytes) -> list[str]:
    """The lines of a chunked response."""
    body, rest = b"", raw.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body.decode().split("\n")


async def test_a_feed_is_resumed_after_a_restart_with_a_durable_log(tmp_path: Path) -> None:
    log = f"sqlite:///{tmp_path}/log.db"
    async with running(tmp_path / "images", log=log) as service:
        writer = EventWriter(service.service.log, SteppableClock(now()))
        done = await writer.run_to_end()
        start = (await service.get("/events", "ada"))["cursor"]
        later = await writer.run_to_end("ada", "generate")
        async with open_stream(service, f"/events?after={start}") as stream:
            await stream.until_count(2)
            last = stream.blocks[3].id
            seen = [data for _, data in stream.events][:2]
    async with running(tmp_path / "images", log=log) as service:
        async with open_stream(service, last=last) as stream:
            assert (await stream.named("authenticated"))["recovered"] is True
            await stream.until_count(3)
            assert seen + [data for _, data in stream.events] == await service.events(later.generation_id)
        async with open_stream(service, of_generation(done.generation_id), last="4") as one:
            await one.rest()
            assert [data["sequence"] for _, data in one.events] == [5, 6]


async def test_a_log_that_has_lost_its_history_starts_the_feed_anew(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        writer = EventWriter(service.service.log, SteppableClock(now()))
        async with open_stream(service) as stream:
            await stream.named("authenticated")
            done = await writer.run_to_end()
            await stream.until_count(6)
        await service.service.storage.log.remove(done.generation_id, retention=False)
        async with open_stream(service, last=stream.ids[2]) as again:
            assert (await again.named("authenticated"))["recovered"] is False
