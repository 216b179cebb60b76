"""Every terminal event reaches the webhook, despite failures of the receiver, the service and the log."""

import asyncio
import base64
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Final

import pytest
from standardwebhooks import Webhook

from adapters.outbound.calls import retry_after
from adapters.outbound.webhook_sender import WebhookSender
from adapters.system import now
from api import service as api_service
from domain import recorder
from domain.feed import Logged
from domain.webhooks import NotDelivered, message_of
from support.builders import EventRecorder, WholeLog, body
from support.doubles import Pause, ScriptedEditor
from support.harness import running
from support.node import ROOT, needs_node
from support.provider_faults import Answer, Flood, Origin, drip, hang, head, listening, raw, reset, then
from support.provider_faults import whole as answer_with
from support.webhooks import (
    NO_TRUSTED_CAS,
    SECRET,
    Receiver,
    hang_up,
    sender_to,
    status,
    until,
    until_all_delivered,
    webhooks_for,
    working,
)

# --- what is told ------------------------------------------------------------------------------------------


async def test_each_terminal_event_is_posted_once_with_the_bytes_of_the_log(log: WholeLog, receiver: Receiver) -> None:
    recorder = EventRecorder(log)
    before = await recorder.run_to_end("ada", "generate", metadata={"order": "ü 7"})
    async with working(webhooks_for(log, sender_to(receiver.origin))):
        failed = await recorder.start_and_fail('Ünï 🎨 "quoted"')
        completed = await recorder.run_to_end("bob", face_swap=True)
        await recorder.move(await recorder.start("bob"), "composition")
        await until_all_delivered(log)
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


async def test_messages_are_unsigned_without_a_secret(memory: WholeLog, receiver: Receiver) -> None:
    async with working(webhooks_for(memory, sender_to(receiver.origin, secret=None))):
        await EventRecorder(memory).start_and_fail()
        await until_all_delivered(memory)
    [request] = receiver.origin.requests
    assert "webhook-signature" not in request.headers
    assert {"webhook-id", "webhook-timestamp"} <= request.headers.keys()


async def test_url_credentials_are_sent_and_no_proxy_is_used(
    memory: WholeLog, receiver: Receiver, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    address = f"http://ad%40a:p%3Aw@127.0.0.1:{receiver.origin.port}/hook?key=1#there"
    async with working(webhooks_for(memory, WebhookSender(address, SECRET, clock=now, timeout=60))):
        await EventRecorder(memory).start_and_fail()
        await until_all_delivered(memory)
    [request] = receiver.origin.requests
    assert request.target == "/hook?key=1"
    assert base64.b64decode(request.headers["authorization"].removeprefix("Basic ")) == b"ad@a:p:w"


@pytest.mark.parametrize(("url", "secret"), [("http://127.0.0.1/", "whsec_kk-_k"), ("http://127.0.0.1:kkk/", SECRET)])
def test_invalid_secret_or_url_is_refused_without_quoting_it(url: str, secret: str) -> None:
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
async def test_failed_post_is_retried_until_it_succeeds(
    memory: WholeLog, receiver: Receiver, trouble: list[Answer]
) -> None:
    clock = iter(range(1_000))
    begun = now()
    sender = sender_to(receiver.origin, clock=lambda: begun + timedelta(seconds=next(clock)), timeout=0.3)
    generation = await EventRecorder(memory).start_and_fail()
    receiver.plans[generation.generation_id] = list(trouble)
    async with working(webhooks_for(memory, sender)):
        await until_all_delivered(memory)
    posts = receiver.origin.requests
    # On a slow machine a success may arrive after the timeout, as from a slow receiver.
    assert len(posts) == len(trouble) + len(receiver.taken)
    assert len({(post.headers["webhook-id"], post.body) for post in posts}) == 1
    assert len({post.headers["webhook-timestamp"] for post in posts}) == len(posts)
    assert len({post.headers["webhook-signature"] for post in posts}) == len(posts)
    for post in posts:
        Webhook(SECRET).verify(post.body, dict(post.headers))


async def test_receiver_that_answers_410_is_not_called_until_a_restart(
    log: WholeLog, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = EventRecorder(log)
    gone = await recorder.start_and_fail()
    receiver.plans[gone.generation_id] = [status(410, Retry_After="0")]
    webhooks = webhooks_for(log, sender_to(receiver.origin))
    async with working(webhooks):
        await webhooks.flushed()
        later = [await recorder.start_and_fail() for _ in range(3)]
        # The service can still stop in time.
        await webhooks.flushed()
        # Longer than the longest backoff.
        await asyncio.sleep(0.2)
    assert len(receiver.origin.requests) == 1
    [line] = [record for record in caplog.records if record.name == "domain.webhooks"]
    assert (line.levelname, "answered with 410" in line.getMessage()) == ("ERROR", True)
    async with working(webhooks_for(log, sender_to(receiver.origin))), asyncio.timeout(30):
        while len(receiver.ids) < 4:  # Nothing is due while the log still has the answer that the receiver gave.
            await asyncio.sleep(0.005)
        await until_all_delivered(log)
    assert sorted(receiver.ids) == sorted(each.generation_id for each in (gone, *later))


async def test_concurrent_410_responses_are_logged_once(
    memory: WholeLog, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = EventRecorder(memory)
    for _ in range(5):
        receiver.always[(await recorder.start_and_fail()).generation_id] = status(410)
    webhooks = webhooks_for(memory, sender_to(receiver.origin))
    async with working(webhooks):
        await webhooks.flushed()
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
async def test_success_status_counts_as_delivered_whatever_follows(
    memory: WholeLog, receiver: Receiver, answer: Answer
) -> None:
    generation = await EventRecorder(memory).start_and_fail()
    receiver.always[generation.generation_id] = answer
    async with working(webhooks_for(memory, sender_to(receiver.origin))):
        await until_all_delivered(memory)
    assert len(receiver.origin.requests) == 1


@pytest.mark.parametrize("code", [200, 500])
async def test_response_body_is_read_up_to_a_small_limit(memory: WholeLog, receiver: Receiver, code: int) -> None:
    flood = Flood(2_000)
    generation = await EventRecorder(memory).start_and_fail()
    receiver.plans[generation.generation_id] = [then(raw(head(code, length=2_000 * 1024 * 1024)), flood)]
    async with working(webhooks_for(memory, sender_to(receiver.origin))):
        await until_all_delivered(memory)
    assert flood.taken < 64
    assert len(receiver.origin.requests) == (1 if code == 200 else 2)


async def test_receiver_that_starts_late_gets_its_messages(memory: WholeLog, port: int) -> None:
    receiver = Receiver()
    receiver.origin.port = port
    recorder = EventRecorder(memory)
    webhooks = webhooks_for(memory, sender_to(receiver.origin))
    async with working(webhooks):
        ended = [await recorder.start_and_fail() for _ in range(3)]
        await webhooks.flushed()
        assert receiver.origin.requests == []
        async with listening(receiver.origin, port):
            await until_all_delivered(memory)
    assert sorted(receiver.ids) == [each.generation_id for each in ended]


@pytest.mark.parametrize("code", [429, 503])
async def test_retry_after_is_respected_for_429_and_503(receiver: Receiver, code: int) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    for said, least, most in (("7", 7, 7), (later, 60, 90), ("0", 0, 0), ("-5", 0, 0)):
        receiver.always["edit_1"] = status(code, Retry_After=said)
        with pytest.raises(NotDelivered) as caught:
            await sender_to(receiver.origin).post("edit_1:2", b"{}")
        assert caught.value.after is not None
        assert least <= caught.value.after <= most


@pytest.mark.parametrize("answer", [status(500, Retry_After="7"), status(429), status(503, Retry_After="inf"), hang_up])
async def test_missing_or_unusable_retry_after_gives_no_delay(receiver: Receiver, answer: Answer) -> None:
    receiver.always["edit_1"] = answer
    with pytest.raises(NotDelivered) as caught:
        await sender_to(receiver.origin).post("edit_1:2", b"{}")
    assert caught.value.after is None


@pytest.mark.parametrize("text", ["", "soon", "nan", "inf", "1 2", "Mon, 99 Foo 2026"])
def test_malformed_retry_after_header_is_ignored(text: str) -> None:
    assert retry_after(text) is None


# --- a whole service -------------------------------------------------------------------------------------


def hooked(origin: Origin) -> dict[str, Any]:
    """The settings of a service that posts to this receiver."""
    return {"webhook_url": f"{origin.address}/hook", "webhook_secret": SECRET}


async def test_webhook_has_the_same_event_as_the_devices(tmp_path: Path, receiver: Receiver) -> None:
    async with running(tmp_path, **hooked(receiver.origin)) as service, service.phone("ada") as phone:
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)
        await until(lambda: bool(receiver.taken))
    [request] = receiver.origin.requests
    message = Webhook(SECRET).verify(request.body, dict(request.headers))
    assert (message["type"], message["data"]) == phone.events[-1]


async def test_shutdown_posts_the_ends_that_it_causes(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its short wait may not suffice on a slow machine.
    monkeypatch.setattr(api_service, "_FLUSH", 60)
    pause = Pause()
    async with running(tmp_path, overrides={"editor": ScriptedEditor(pause)}, **hooked(receiver.origin)) as service:
        generation_id = await service.start("ada")
        await pause.reached.wait()
        service.server.begin_shutdown(now=True)
        await until(lambda: bool(receiver.taken))
    [request] = receiver.origin.requests
    data = json.loads(request.body)["data"]
    assert (data["generationId"], data["code"]) == (generation_id, "interrupted")


async def test_next_process_posts_undelivered_messages(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The disk of a busy machine may be slower than the timeout of a start.
    monkeypatch.setattr(recorder, "ATTENTION", 60)
    monkeypatch.setattr(recorder, "_TIMEOUT", 60)
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
    """The command that runs the receiver in this language from docs/webhooks.md."""
    page = (ROOT / "docs" / "webhooks.md").read_text()
    [code] = re.findall(rf"<!-- executed by a test -->\n```{language}\n(.*?)\n```\n", page, re.DOTALL)
    if language == "python":
        return [sys.executable, "-c", code]
    return ["node", "--input-type=module", "--eval", code]


@pytest.mark.parametrize("language", [pytest.param("js", marks=needs_node), "python"])
async def test_documented_receiver_accepts_only_signed_messages_once(
    memory: WholeLog, port: int, language: str
) -> None:
    address = f"http://127.0.0.1:{port}/hooks/stagecast"
    environment = {"PATH": os.environ["PATH"], "PORT": str(port), "STAGECAST_WEBHOOK_SECRET": SECRET}
    receiver = await asyncio.create_subprocess_exec(*program(language), env=environment, stdout=asyncio.subprocess.PIPE)
    try:
        assert receiver.stdout is not None
        recorder = EventRecorder(memory)
        async with working(webhooks_for(memory, WebhookSender(address, SECRET, clock=now, trust=NO_TRUSTED_CAS))):
            completed, failed = await recorder.run_to_end("ada"), await recorder.start_and_fail("bob")
            await until_all_delivered(memory)
        sent = sorted([await receiver.stdout.readline() for _ in range(2)])
        assert sent == [
            f"generation_completed ada {completed.generation_id}\n".encode(),
            f"generation_failed bob {failed.generation_id}\n".encode(),
        ]
        history = await memory.generation(completed.generation_id)
        assert history is not None
        id_and_body = message_of(history.events[-1])
        await WebhookSender(address, SECRET, clock=now, trust=NO_TRUSTED_CAS).post(*id_and_body)
        other = "whsec_" + base64.b64encode(b"k" * 32).decode()
        for stranger in (
            WebhookSender(address, other, clock=now, trust=NO_TRUSTED_CAS),
            WebhookSender(address, None, clock=now, trust=NO_TRUSTED_CAS),
            WebhookSender(address, SECRET, clock=lambda: now() - timedelta(minutes=6), trust=NO_TRUSTED_CAS),
            WebhookSender(address, SECRET, clock=lambda: now() + timedelta(minutes=6), trust=NO_TRUSTED_CAS),
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


async def test_log_has_neither_secrets_nor_the_receivers_text(
    memory: WholeLog, receiver: Receiver, everything_logged: pytest.LogCaptureFixture
) -> None:
    recorder = EventRecorder(memory)
    generations = [await recorder.start_and_fail() for _ in range(3)]
    said = "its own words\r\nERROR forged"
    for generation, answer in zip(
        generations, [answer_with(said.encode(), 500), hang_up, raw(b"HTTP/1.1 500 its own words\r\n\r\n")], strict=True
    ):
        receiver.plans[generation.generation_id] = [answer]
    address = f"http://ada:p4ssw0rd@127.0.0.1:{receiver.origin.port}/hook/p4th?key=qu3ry"
    async with working(webhooks_for(memory, WebhookSender(address, SECRET, clock=now))):
        await until_all_delivered(memory)
    assert "answered with 500" in everything_logged.text
    signatures = [request.headers["webhook-signature"].removeprefix("v1,") for request in receiver.origin.requests]
    credentials = base64.b64encode(b"ada:p4ssw0rd").decode()
    for secret in (SECRET, SECRET[6:], "p4ssw0rd", "p4th", "qu3ry", credentials, "ERROR forged", *signatures):
        assert secret not in everything_logged.text


def test_equal_events_give_equal_messages() -> None:
    entry = Logged("ada", 3, 1, "edit_1_0", 2, "generation_failed", EVENT, 1, 3)
    assert message_of(entry) == message_of(entry) == ("edit_1_0:2", MESSAGE)


EVENT: Final = (
    b'{"generationId":"edit_1_0","kind":"edit","sequence":2,"status":"failed","message":"Image editing failed!",'
    b'"progress":0,"occurredAt":"2026-11-22T12:00:00.123Z","credit":100}'
)
MESSAGE: Final = (
    b'{"type":"generation_failed","timestamp":"2026-11-22T12:00:00.123Z","userId":"ada","data":' + EVENT + b"}"
)
