"""Every end of a generation reaches the webhook, whatever befalls the receiver, the service and the log."""

import asyncio
import base64
import json
import logging
import os
import re
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
from standardwebhooks import Webhook

from adapters.outbound.retry_after import retry_after
from adapters.outbound.webhook_sender import WebhookSender
from adapters.sqlite.database import Database
from adapters.sqlite.log import SqliteLog
from adapters.system import now
from api import app
from domain import recorder
from domain.errors import LogUnavailable
from domain.feed import Logged
from domain.generation import Generation
from domain.ports import EventLog
from domain.webhooks import NotDelivered, Webhooks, message_of
from support.builders import LOGS, Scribe, SteppableClock, body
from support.doubles import Hold, Passing, ScriptedEditor
from support.harness import running
from support.node import ROOT, needs_node
from support.provider_faults import (
    Answer,
    Flood,
    Origin,
    Request,
    closed_port,
    drip,
    hang,
    head,
    listening,
    raw,
    reset,
    then,
)
from support.provider_faults import whole as answer_with

SECRET: Final = "whsec_" + base64.b64encode(bytes(range(32))).decode()

#: Trusts nobody; to read the system's certificates takes a while.
WARY: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

TAKEN: Final = answer_with(b"")


def status(code: int, **headers: str) -> Answer:
    return answer_with(b"whatever", code, "text/plain", **headers)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()


@dataclass
class Receiver:
    """A backend that listens for webhooks: takes each, unless something else was planned for its generation."""

    origin: Origin = field(init=False)
    #: What happens to the messages of a generation, one after the other, before they are taken.
    plans: dict[str, list[Answer]] = field(default_factory=dict)
    #: What happens always.
    always: dict[str, Answer] = field(default_factory=dict)
    #: What was taken.
    taken: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.origin = Origin(self.respond)

    def respond(self, request: Request) -> Answer:
        generation_id = request.headers["webhook-id"].partition(":")[0]
        if generation_id in self.always:
            return self.always[generation_id]
        plan = self.plans.get(generation_id)
        if plan:
            return plan.pop(0)
        self.taken.append(request)
        return TAKEN

    def posts(self, generation: Generation) -> list[Request]:
        """Every attempt for this generation."""
        prefix = f"{generation.generation_id}:"
        return [request for request in self.origin.requests if request.headers["webhook-id"].startswith(prefix)]

    @property
    def ids(self) -> list[str]:
        """The generations whose end was taken."""
        return [request.headers["webhook-id"].partition(":")[0] for request in self.taken]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.005)


async def all_told(log: EventLog) -> None:
    """Wait until the log has nothing left to tell."""
    async with asyncio.timeout(60):
        while await log.undelivered(1):
            await asyncio.sleep(0.005)


def ids(entries: Sequence[Logged]) -> list[str]:
    return [entry.generation_id for entry in entries]


def sender_to(origin: Origin, path: str = "/hook", secret: str | None = SECRET, **rest: Any) -> WebhookSender:
    return WebhookSender(origin.address + path, secret, **{"clock": now, "timeout": 60, "trust": WARY, **rest})


def webhooks_for(log: EventLog, poster: Any, *, backoff: float = 0.01, longest: float = 0.05) -> Webhooks:
    return Webhooks(log, poster, lambda: 0.5, backoff=backoff, longest=longest)


@asynccontextmanager
async def working(webhooks: Webhooks) -> AsyncIterator[None]:
    """The loop runs. If it dies of itself, so does the test."""
    running = asyncio.create_task(webhooks.run())
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


@pytest.fixture(params=LOGS)
async def log(request: pytest.FixtureRequest) -> AsyncIterator[EventLog]:
    async with LOGS[request.param](clock=SteppableClock(), outbox=True) as opened:
        yield opened


@pytest.fixture
async def memory() -> AsyncIterator[EventLog]:
    async with LOGS["memory"](clock=SteppableClock(), outbox=True) as opened:
        yield opened


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with listening(receiver.origin):
        yield receiver


@pytest.fixture
def port() -> Iterator[int]:
    """A port at which nobody listens yet."""
    with closed_port() as port:
        yield port


# --- what is told ------------------------------------------------------------------------------------------


async def test_every_end_is_told_once_in_the_bytes_of_the_log_and_nothing_but_ends(
    log: EventLog, receiver: Receiver
) -> None:
    scribe = Scribe(log)
    before = await scribe.whole("ada", "generate", metadata={"order": "ü 7"})
    async with working(webhooks_for(log, sender_to(receiver.origin))):
        failed = await scribe.short('Ünï 🎨 "quoted"')
        completed = await scribe.whole("bob", face_swap=True)
        await scribe.move(await scribe.start("bob"), "composition")
        await all_told(log)
    assert sorted(receiver.ids) == sorted(each.generation_id for each in (before, failed, completed))
    for request in receiver.origin.requests:
        message = Webhook(SECRET).verify(request.body, dict(request.headers))
        history = await log.generation(message["data"]["generationId"])
        assert history is not None
        end = history.events[-1]
        assert end.event is not None
        assert request.body.endswith(b'"data":' + end.event + b"}")
        assert message == {
            "type": "generation_failed" if end.generation_id == failed.generation_id else "generation_completed",
            "timestamp": body(end)["occurredAt"],
            "userId": history.user_id,
            "data": body(end),
        }
        assert (request.method, request.target) == ("POST", "/hook")
        assert request.headers["webhook-id"] == f"{end.generation_id}:{end.sequence}"
        assert request.headers["content-type"] == "application/json"
        assert request.headers["host"] == f"127.0.0.1:{receiver.origin.port}"


async def test_without_a_secret_nothing_is_signed(memory: EventLog, receiver: Receiver) -> None:
    async with working(webhooks_for(memory, sender_to(receiver.origin, secret=None))):
        await Scribe(memory).short()
        await all_told(memory)
    [request] = receiver.origin.requests
    assert "webhook-signature" not in request.headers
    assert {"webhook-id", "webhook-timestamp"} <= request.headers.keys()


async def test_who_the_url_names_is_who_calls_and_no_proxy_is_asked(
    memory: EventLog, receiver: Receiver, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    address = f"http://ad%40a:p%3Aw@127.0.0.1:{receiver.origin.port}/hook?key=1#there"
    async with working(webhooks_for(memory, WebhookSender(address, SECRET, clock=now, timeout=60))):
        await Scribe(memory).short()
        await all_told(memory)
    [request] = receiver.origin.requests
    assert request.target == "/hook?key=1"
    assert base64.b64decode(request.headers["authorization"].removeprefix("Basic ")) == b"ad@a:p:w"


@pytest.mark.parametrize(("url", "secret"), [("http://127.0.0.1/", "whsec_kk-_k"), ("http://127.0.0.1:kkk/", SECRET)])
def test_what_is_no_secret_or_no_url_is_refused_and_not_repeated(url: str, secret: str) -> None:
    with pytest.raises(ValueError, match=r"[a-z]") as caught:
        WebhookSender(url, secret, clock=now)
    assert "kk" not in str(caught.value)


# --- what is not taken -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param([status(500)], id="500"),
        pytest.param([status(400), status(404), status(409), status(451)], id="4xx"),
        pytest.param([status(301, Location="/hook")], id="a redirect"),
        pytest.param([status(429, Retry_After="0"), status(503, Retry_After="0")], id="asked to wait"),
        pytest.param([status(429, Retry_After="soon")], id="asked to wait for no time there is"),
        pytest.param([hang], id="no answer"),
        pytest.param([raw(b"HTTP/1.1 200 O")], id="a part of an answer"),
        pytest.param([drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100)], id="a head without end"),
        pytest.param([reset, hang_up], id="the line breaks"),
        pytest.param([raw(b"\x00\xff garbage\r\n\r\n")], id="garbage"),
    ],
)
async def test_what_is_not_taken_is_posted_again_until_it_is(
    memory: EventLog, receiver: Receiver, trouble: list[Answer]
) -> None:
    clock = iter(range(1_000))
    begun = now()
    sender = sender_to(receiver.origin, clock=lambda: begun + timedelta(seconds=next(clock)), timeout=0.3)
    generation = await Scribe(memory).short()
    receiver.plans[generation.generation_id] = list(trouble)
    async with working(webhooks_for(memory, sender)):
        await all_told(memory)
    posts = receiver.origin.requests
    # On a slow day an answer that says it was taken may come too late, as it would from a slow receiver.
    assert len(posts) == len(trouble) + len(receiver.taken)
    assert len({(post.headers["webhook-id"], post.body) for post in posts}) == 1
    assert len({post.headers["webhook-timestamp"] for post in posts}) == len(posts)
    assert len({post.headers["webhook-signature"] for post in posts}) == len(posts)
    for post in posts:
        Webhook(SECRET).verify(post.body, dict(post.headers))


async def test_a_receiver_that_answers_410_is_not_called_again_until_a_restart(
    log: EventLog, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    scribe = Scribe(log)
    gone = await scribe.short()
    receiver.plans[gone.generation_id] = [status(410, Retry_After="0")]
    webhooks = webhooks_for(log, sender_to(receiver.origin))
    async with working(webhooks):
        await webhooks.settled()
        later = [await scribe.short() for _ in range(3)]
        # The service can still leave in time.
        await webhooks.settled()
        # Longer than the longest pause before another attempt.
        await asyncio.sleep(0.2)
    assert len(receiver.origin.requests) == 1
    [line] = [record for record in caplog.records if record.name == "domain.webhooks"]
    assert (line.levelname, "answered with 410" in line.getMessage()) == ("ERROR", True)
    async with working(webhooks_for(log, sender_to(receiver.origin))):
        await all_told(log)
    assert sorted(receiver.ids) == sorted(each.generation_id for each in (gone, *later))


async def test_several_answers_of_410_at_once_are_reported_once(
    memory: EventLog, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    scribe = Scribe(memory)
    for _ in range(5):
        receiver.always[(await scribe.short()).generation_id] = status(410)
    webhooks = webhooks_for(memory, sender_to(receiver.origin))
    async with working(webhooks):
        await webhooks.settled()
        posted = len(receiver.origin.requests)
        await asyncio.sleep(0.2)
    assert len(receiver.origin.requests) == posted <= 5
    assert len([record for record in caplog.records if record.name == "domain.webhooks"]) == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(status(201), id="201"),
        pytest.param(raw(b"HTTP/1.1 204 No Content\r\n\r\n"), id="204"),
        pytest.param(then(raw(head(200, length=5)), hang), id="a body that never comes"),
        pytest.param(then(raw(head(200)), drip(b"x")), id="a body without end"),
        pytest.param(then(raw(head(200, length=5)), reset), id="the line breaks behind the head"),
    ],
)
async def test_what_was_answered_with_success_is_taken_whatever_follows(
    memory: EventLog, receiver: Receiver, answer: Answer
) -> None:
    generation = await Scribe(memory).short()
    receiver.always[generation.generation_id] = answer
    async with working(webhooks_for(memory, sender_to(receiver.origin))):
        await all_told(memory)
    assert len(receiver.origin.requests) == 1


@pytest.mark.parametrize("code", [200, 500])
async def test_of_what_the_receiver_says_hardly_anything_is_read(
    memory: EventLog, receiver: Receiver, code: int
) -> None:
    flood = Flood(2_000)
    generation = await Scribe(memory).short()
    receiver.plans[generation.generation_id] = [then(raw(head(code, length=2_000 * 1024 * 1024)), flood)]
    async with working(webhooks_for(memory, sender_to(receiver.origin))):
        await all_told(memory)
    assert flood.taken < 64
    assert len(receiver.origin.requests) == (1 if code == 200 else 2)


async def test_a_receiver_that_is_down_at_first_is_told_once_it_is_there(memory: EventLog, port: int) -> None:
    receiver = Receiver()
    receiver.origin.port = port
    scribe = Scribe(memory)
    webhooks = webhooks_for(memory, sender_to(receiver.origin))
    async with working(webhooks):
        ended = [await scribe.short() for _ in range(3)]
        await webhooks.settled()
        assert receiver.origin.requests == []
        async with listening(receiver.origin, port):
            await all_told(memory)
    assert sorted(receiver.ids) == [each.generation_id for each in ended]


@pytest.mark.parametrize("code", [429, 503])
async def test_who_asks_to_be_left_alone_is_heard(receiver: Receiver, code: int) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    for said, least, most in (("7", 7, 7), (later, 60, 90), ("0", 0, 0), ("-5", 0, 0)):
        receiver.always["edit_1"] = status(code, Retry_After=said)
        with pytest.raises(NotDelivered) as caught:
            await sender_to(receiver.origin).post("edit_1:2", b"{}")
        assert caught.value.after is not None
        assert least <= caught.value.after <= most


@pytest.mark.parametrize("answer", [status(500, Retry_After="7"), status(429), status(503, Retry_After="inf"), hang_up])
async def test_who_does_not_ask_is_not_left_alone(receiver: Receiver, answer: Answer) -> None:
    receiver.always["edit_1"] = answer
    with pytest.raises(NotDelivered) as caught:
        await sender_to(receiver.origin).post("edit_1:2", b"{}")
    assert caught.value.after is None


@pytest.mark.parametrize("text", ["", "soon", "nan", "inf", "1 2", "Mon, 99 Foo 2026"])
def test_what_is_neither_seconds_nor_a_date_asks_for_nothing(text: str) -> None:
    assert retry_after(text) is None


# --- the loop ----------------------------------------------------------------------------------------------


class Scripted:
    """`domain.webhooks.Poster` that does to each generation's messages what is planned, and takes the rest."""

    def __init__(self) -> None:
        #: What is raised, one after the other; the last one for ever.
        self.plans: dict[str, list[Exception]] = {}
        self.posts: list[str] = []
        self.taken: list[str] = []

    async def post(self, message_id: str, body: bytes) -> None:
        generation_id = json.loads(body)["data"]["generationId"]
        self.posts.append(generation_id)
        await asyncio.sleep(0)
        plan = self.plans.get(generation_id)
        if plan:
            raise plan.pop(0) if len(plan) > 1 else plan[0]
        self.taken.append(generation_id)


async def test_the_oldest_end_is_told_first(log: EventLog) -> None:
    scribe = Scribe(log)
    late = await scribe.start("ada")
    ended = [await scribe.short(f"user {index}") for index in range(30)]
    ended.append(await scribe.finish(late))
    poster = Scripted()
    async with working(webhooks_for(log, poster)):
        await all_told(log)
    assert poster.posts == [each.generation_id for each in ended]


async def test_a_crowd_of_ends_is_told_once_each(log: EventLog) -> None:
    scribe = Scribe(log)
    poster = Scripted()
    async with working(webhooks_for(log, poster)):
        ended = [await scribe.short(f"user {index % 7}") for index in range(300)]
        await all_told(log)
    assert sorted(poster.posts) == sorted(each.generation_id for each in ended)


async def test_what_the_receiver_is_slow_with_holds_up_nothing_else(memory: EventLog, receiver: Receiver) -> None:
    scribe = Scribe(memory)
    slow = await scribe.short()
    receiver.always[slow.generation_id] = hang
    async with working(webhooks_for(memory, sender_to(receiver.origin))):
        others = [await scribe.short() for _ in range(30)]
        await until(lambda: len(receiver.ids) == len(others) and bool(receiver.posts(slow)))
        async with asyncio.timeout(60):
            while ids(await memory.undelivered(10)) != [slow.generation_id]:
                await asyncio.sleep(0.005)
    assert sorted(receiver.ids) == [each.generation_id for each in others]
    assert len(receiver.posts(slow)) == 1


async def test_what_is_never_taken_however_much_of_it_leaves_room_for_the_rest(
    memory: EventLog, receiver: Receiver
) -> None:
    scribe = Scribe(memory)
    poison = [await scribe.short() for _ in range(25)]
    receiver.always = {each.generation_id: hang for each in poison}
    webhooks = webhooks_for(memory, sender_to(receiver.origin, timeout=0.1))
    async with working(webhooks):
        await webhooks.settled()
        others = [await scribe.short() for _ in range(30)]
        await until(lambda: {*receiver.ids} == {each.generation_id for each in others})
        # And all of it is posted again all the same.
        await until(lambda: all(len(receiver.posts(each)) > 1 for each in poison))


async def test_only_a_few_are_posted_at_once(memory: EventLog) -> None:
    class Counting(Scripted):
        at_once = most = 0

        async def post(self, message_id: str, body: bytes) -> None:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            await asyncio.sleep(0.001)
            self.at_once -= 1
            await super().post(message_id, body)

    poster = Counting()
    scribe = Scribe(memory)
    for _ in range(50):
        await scribe.short()
    async with working(webhooks_for(memory, poster)):
        await all_told(memory)
    assert poster.most == 8


async def test_what_has_been_taken_or_removed_is_forgotten(memory: EventLog) -> None:
    class Watched(Passing):
        limits: ClassVar[list[int]] = []

        async def undelivered(self, limit: int) -> Sequence[Logged]:
            self.limits.append(limit)
            return await super().undelivered(limit)

    scribe, poster = Scribe(memory), Scripted()
    refused = [await scribe.short() for _ in range(20)]
    poster.plans = {each.generation_id: [NotDelivered("answered with 500")] for each in refused}
    watched = Watched(memory)
    webhooks = webhooks_for(watched, poster)
    async with working(webhooks):
        await webhooks.settled()
        for each in refused[:10]:
            await memory.remove(each.generation_id, retention=False)
        poster.plans.clear()
        await all_told(memory)
        for _ in range(2):
            await scribe.short()
            await webhooks.settled()
    assert max(watched.limits) > watched.limits[0]
    assert watched.limits[-1] == watched.limits[0]


async def test_the_pauses_double_up_to_a_limit_and_are_told_less_and_less_often(
    memory: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    generation = await Scribe(memory).short()
    poster = Scripted()
    poster.plans[generation.generation_id] = [NotDelivered("answered with 500")]
    async with working(Webhooks(memory, poster, lambda: 0.0, backoff=0.01, longest=0.05)):
        await until(lambda: len(poster.posts) > 8)
    lines = [record for record in caplog.records if record.name == "domain.webhooks"]
    pauses = [record.args[-1] for record in lines if isinstance(record.args, tuple)]
    assert pauses == [0.01, 0.02, 0.05, 0.05]
    assert f"webhook {generation.generation_id}:2 was not delivered, attempt 4: answered with 500" in caplog.text


@pytest.mark.parametrize(("chance", "pause"), [(0.0, 8.0), (1.0, 4.0)])
async def test_a_part_of_a_pause_is_left_to_chance(
    memory: EventLog, caplog: pytest.LogCaptureFixture, chance: float, pause: float
) -> None:
    poster = Scripted()
    poster.plans[(await Scribe(memory).short()).generation_id] = [NotDelivered("answered with 500")]
    webhooks = Webhooks(memory, poster, lambda: chance, backoff=8)
    async with working(webhooks):
        await webhooks.settled()
    assert f"again in {pause:.0f} s" in caplog.text


async def test_who_asks_to_be_left_alone_is_and_others_are_told_meanwhile(
    memory: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    scribe = Scribe(memory)
    patient, greedy, plain = [await scribe.short() for _ in range(3)]
    poster = Scripted()
    poster.plans[patient.generation_id] = [NotDelivered("answered with 429", after=60)]
    poster.plans[greedy.generation_id] = [NotDelivered("answered with 503", after=1e9)]
    poster.plans[plain.generation_id] = [NotDelivered("answered with 500")]
    async with working(webhooks_for(memory, poster)):
        await until(lambda: poster.posts.count(plain.generation_id) > 8)
    assert poster.posts.count(patient.generation_id) == 1
    assert "429; again in 60 s" in caplog.text
    assert "503; again in 3600 s" in caplog.text


async def test_a_poster_that_breaks_ends_nothing(memory: EventLog, caplog: pytest.LogCaptureFixture) -> None:
    scribe = Scribe(memory)
    poster = Scripted()
    broken = await scribe.short()
    poster.plans[broken.generation_id] = [ZeroDivisionError("secret")] * 2 + [NotDelivered("answered with 500")]
    async with working(webhooks_for(memory, poster)):
        await until(lambda: poster.posts.count(broken.generation_id) > 3)
        del poster.plans[broken.generation_id]
        await all_told(memory)
    assert poster.taken == [broken.generation_id]
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text


async def test_a_generation_that_is_removed_is_not_told_any_more(log: EventLog) -> None:
    scribe, poster = Scribe(log), Scripted()
    before, refused, last = [await scribe.short() for _ in range(3)]
    await log.remove(before.generation_id, retention=False)
    poster.plans[refused.generation_id] = [NotDelivered("answered with 500")]
    async with working(webhooks_for(log, poster)):
        await until(lambda: poster.posts.count(refused.generation_id) > 2)
        await log.remove(refused.generation_id, retention=True)
        await all_told(log)
        # What may have been read of the log before that is posted before this is.
        marker = await scribe.short("bob")
        await all_told(log)
        tries = poster.posts.count(refused.generation_id)
        poster.plans.clear()
        again = await scribe.short("bob")
        await all_told(log)
    assert poster.posts.count(refused.generation_id) == tries
    assert poster.taken == [each.generation_id for each in (last, marker, again)]
    assert before.generation_id not in poster.posts


# --- restarts, and a log that does not answer -------------------------------------------------------------


@asynccontextmanager
async def life(path: Path) -> AsyncIterator[EventLog]:
    """One life of a durable log."""
    opened = SqliteLog(Database(path, epoch="e1"), credits=100, clock=SteppableClock(), outbox=True)
    try:
        yield opened
    finally:
        await opened.close()


async def test_what_was_not_taken_before_a_restart_is_told_after_it_and_nothing_twice(
    tmp_path: Path, receiver: Receiver
) -> None:
    earlier = Receiver()
    async with life(tmp_path / "log.db") as log, listening(earlier.origin):
        scribe = Scribe(log)
        taken, refused, unanswered = [await scribe.short() for _ in range(3)]
        earlier.always = {refused.generation_id: status(500), unanswered.generation_id: hang}
        async with working(webhooks_for(log, sender_to(earlier.origin))):
            await until(lambda: len(earlier.posts(refused)) > 1 and bool(earlier.posts(unanswered)))
            while len(await log.undelivered(10)) > 2:
                await asyncio.sleep(0.005)
        late = await scribe.short()
    async with life(tmp_path / "log.db") as log:
        assert ids(await log.undelivered(10)) == [each.generation_id for each in (refused, unanswered, late)]
        async with working(webhooks_for(log, sender_to(receiver.origin))):
            await all_told(log)
    assert earlier.ids == [taken.generation_id]
    assert sorted(receiver.ids) == [each.generation_id for each in (refused, unanswered, late)]
    assert len({post.body for post in (*earlier.posts(refused), *receiver.posts(refused))}) == 1


class Absent(Passing):
    """A log that does not answer the next so many questions of each kind."""

    reads = 0
    marks = 0

    async def undelivered(self, limit: int) -> Sequence[Logged]:
        if self.reads:
            self.reads -= 1
            raise LogUnavailable
        return await super().undelivered(limit)

    async def delivered(self, generation_id: str) -> None:
        if self.marks:
            self.marks -= 1
            raise LogUnavailable
        await super().delivered(generation_id)


async def test_a_log_that_does_not_answer_is_asked_again_and_nothing_is_told_twice(memory: EventLog) -> None:
    absent = Absent(memory)
    absent.reads, absent.marks = 2, 2
    generation = await Scribe(memory).short()
    poster = Scripted()
    async with working(webhooks_for(absent, poster)):
        await all_told(memory)
    assert (absent.reads, absent.marks) == (0, 0)
    assert poster.posts == [generation.generation_id]


class Stale(Passing):
    """A log that, having read of two ends, waits until the first of them has been taken before it tells of both."""

    def __init__(self, log: EventLog) -> None:
        super().__init__(log)
        self.has_read_both = asyncio.Event()

    async def undelivered(self, limit: int) -> Sequence[Logged]:
        entries = await super().undelivered(limit)
        if len(entries) == 2 and not self.has_read_both.is_set():
            self.has_read_both.set()
            while len(await self.inner.undelivered(2)) == 2:
                await asyncio.sleep(0.005)
        return entries


async def test_what_is_taken_while_the_log_is_read_is_not_told_again(memory: EventLog) -> None:
    stale = Stale(memory)

    class Slow(Scripted):
        async def post(self, message_id: str, body: bytes) -> None:
            await super().post(message_id, body)
            await stale.has_read_both.wait()

    scribe = Scribe(memory)
    poster = Slow()
    async with working(webhooks_for(stale, poster)):
        first = await scribe.short()
        await until(lambda: poster.posts == [first.generation_id])
        second = await scribe.short()
        await all_told(memory)
    assert poster.posts == [first.generation_id, second.generation_id]


async def test_what_it_waits_for_is_left_at_once_when_it_has_to_stop(memory: EventLog, receiver: Receiver) -> None:
    generation = await Scribe(memory).short()
    receiver.always[generation.generation_id] = hang
    async with working(webhooks_for(memory, sender_to(receiver.origin))):
        await asyncio.wait_for(receiver.origin.reached.wait(), 20)
    await asyncio.wait_for(receiver.origin.left.wait(), 20)
    assert ids(await memory.undelivered(1)) == [generation.generation_id]


async def test_who_leaves_can_wait_until_every_end_has_been_posted(memory: EventLog) -> None:
    scribe = Scribe(memory)
    poster = Scripted()
    refused = await scribe.short()
    poster.plans[refused.generation_id] = [NotDelivered("answered with 500", after=60)]
    webhooks = webhooks_for(memory, poster)
    async with working(webhooks):
        await webhooks.settled()
        assert poster.posts == [refused.generation_id]
        ended = [await scribe.short() for _ in range(20)]
        await webhooks.settled()
        assert poster.taken == [each.generation_id for each in ended]


class Overtaken(Passing):
    """A log in which another generation ends while the first reader waits for what it has read."""

    def __init__(self, log: EventLog, end: Callable[[], Awaitable[object]]) -> None:
        super().__init__(log)
        self.ends = [end]

    async def undelivered(self, limit: int) -> Sequence[Logged]:
        entries = await super().undelivered(limit)
        while self.ends:
            await self.ends.pop()()
        return entries


async def test_what_ends_while_the_log_is_read_is_waited_for_too(memory: EventLog) -> None:
    poster = Scripted()
    webhooks = webhooks_for(Overtaken(memory, Scribe(memory).short), poster)
    async with working(webhooks):
        await webhooks.settled()
        assert len(poster.posts) == 1


# --- a whole service -------------------------------------------------------------------------------------


def hooked(origin: Origin) -> dict[str, Any]:
    """The settings of a service that tells this receiver."""
    return {"webhook_url": f"{origin.address}/hook", "webhook_secret": SECRET}


async def test_a_backend_is_told_what_the_devices_are_told(tmp_path: Path, receiver: Receiver) -> None:
    async with running(tmp_path, **hooked(receiver.origin)) as service, service.phone("ada") as phone:
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)
        await until(lambda: bool(receiver.taken))
    [request] = receiver.origin.requests
    message = Webhook(SECRET).verify(request.body, dict(request.headers))
    assert (message["type"], message["data"]) == phone.events[-1]


async def test_a_service_that_stops_tells_what_it_has_to_end(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It does not wait for long, which may be too short where everything is slow.
    monkeypatch.setattr(app, "_FLUSH", 60)
    hold = Hold()
    async with running(tmp_path, overrides={"editor": ScriptedEditor(hold)}, **hooked(receiver.origin)) as service:
        generation_id = await service.start("ada")
        await hold.reached.wait()
        service.server.begin_shutdown(now=True)
        await until(lambda: bool(receiver.taken))
    [request] = receiver.origin.requests
    data = json.loads(request.body)["data"]
    assert (data["generationId"], data["code"]) == (generation_id, "interrupted")


async def test_what_one_service_could_not_tell_the_next_one_does(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The disk of a busy machine may need longer than somebody who starts one is kept waiting.
    monkeypatch.setattr(recorder, "ATTENTION", 60)
    monkeypatch.setattr(recorder, "_UNANSWERED", 60)
    images, log = tmp_path / "images", f"sqlite:///{tmp_path / 'log.db'}"
    async with (
        listening(Origin(lambda request: status(500))) as earlier,
        running(images, log=log, **hooked(earlier)) as service,
        service.phone("ada") as phone,
    ):
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)
        await until(lambda: bool(earlier.requests))
    async with running(images, log=log, **hooked(receiver.origin)):
        await until(lambda: bool(receiver.taken))
    assert receiver.ids == [generation_id]


# --- the programs of the page ------------------------------------------------------------------------------


def program(language: str) -> list[str]:
    """The command that runs this language's receiver on the page about webhooks."""
    page = (ROOT / "docs" / "webhooks.md").read_text()
    [code] = re.findall(rf"<!-- executed by a test -->\n```{language}\n(.*?)\n```\n", page, re.DOTALL)
    if language == "python":
        return [sys.executable, "-c", code]
    return ["node", "--input-type=module", "--eval", code]


@pytest.mark.parametrize("language", [pytest.param("js", marks=needs_node), "python"])
async def test_a_receiver_of_the_page_takes_what_is_ours_once_and_nothing_else(
    memory: EventLog, port: int, language: str
) -> None:
    address = f"http://127.0.0.1:{port}/hooks/stagecast"
    environment = {"PATH": os.environ["PATH"], "PORT": str(port), "STAGECAST_WEBHOOK_SECRET": SECRET}
    receiver = await asyncio.create_subprocess_exec(*program(language), env=environment, stdout=asyncio.subprocess.PIPE)
    try:
        assert receiver.stdout is not None
        scribe = Scribe(memory)
        async with working(webhooks_for(memory, WebhookSender(address, SECRET, clock=now, trust=WARY))):
            completed, failed = await scribe.whole("ada"), await scribe.short("bob")
            await all_told(memory)
        told = sorted([await receiver.stdout.readline() for _ in range(2)])
        assert told == [
            f"generation_completed ada {completed.generation_id}\n".encode(),
            f"generation_failed bob {failed.generation_id}\n".encode(),
        ]
        history = await memory.generation(completed.generation_id)
        assert history is not None
        id_and_body = message_of(history.events[-1])
        await WebhookSender(address, SECRET, clock=now, trust=WARY).post(*id_and_body)
        other = "whsec_" + base64.b64encode(b"k" * 32).decode()
        for stranger in (
            WebhookSender(address, other, clock=now, trust=WARY),
            WebhookSender(address, None, clock=now, trust=WARY),
            WebhookSender(address, SECRET, clock=lambda: now() - timedelta(minutes=6), trust=WARY),
            WebhookSender(address, SECRET, clock=lambda: now() + timedelta(minutes=6), trust=WARY),
        ):
            with pytest.raises(NotDelivered, match="401"):
                await stranger.post("edit_1:2", b"{}")
    finally:
        receiver.kill()
        rest, _ = await receiver.communicate()
    assert rest == b""


# --- what the operator reads -------------------------------------------------------------------------------


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


async def test_no_log_line_tells_a_secret_or_what_the_receiver_says(
    memory: EventLog, receiver: Receiver, everything_logged: pytest.LogCaptureFixture
) -> None:
    scribe = Scribe(memory)
    generations = [await scribe.short() for _ in range(3)]
    said = "its own words\r\nERROR forged"
    for generation, answer in zip(
        generations, [answer_with(said.encode(), 500), hang_up, raw(b"HTTP/1.1 500 its own words\r\n\r\n")], strict=True
    ):
        receiver.plans[generation.generation_id] = [answer]
    address = f"http://ada:p4ssw0rd@127.0.0.1:{receiver.origin.port}/hook/p4th?key=qu3ry"
    async with working(webhooks_for(memory, WebhookSender(address, SECRET, clock=now))):
        await all_told(memory)
    assert "answered with 500" in everything_logged.text
    signatures = [request.headers["webhook-signature"].removeprefix("v1,") for request in receiver.origin.requests]
    credentials = base64.b64encode(b"ada:p4ssw0rd").decode()
    for secret in (SECRET, SECRET[6:], "p4ssw0rd", "p4th", "qu3ry", credentials, "ERROR forged", *signatures):
        assert secret not in everything_logged.text


def test_the_same_event_makes_the_same_message() -> None:
    entry = Logged("ada", 3, 1, "edit_1_0", 2, "generation_failed", EVENT, 1, 3)
    assert message_of(entry) == message_of(entry) == ("edit_1_0:2", MESSAGE)


EVENT: Final = (
    b'{"generationId":"edit_1_0","kind":"edit","sequence":2,"status":"failed","message":"Image editing failed!",'
    b'"progress":0,"occurredAt":"2026-11-22T12:00:00.123Z","credit":100}'
)
MESSAGE: Final = (
    b'{"type":"generation_failed","timestamp":"2026-11-22T12:00:00.123Z","userId":"ada","data":' + EVENT + b"}"
)
