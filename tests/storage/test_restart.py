"""A service with a durable log is started again: everything acknowledged is there, and the work continues."""

import asyncio
import contextlib
import json
import resource
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from support.deployment import Deployment, RetryingClient, parts
from support.doubles import FACE_URL, Pause, ScriptedComposer, ScriptedEditor, ScriptedFaceSwapper, ScriptedFetcher
from support.harness import PHOTO, Running, running
from support.node import Script, needs_node, seed
from support.openai_server import KEY, OpenAIServer, openai_server
from support.provider_faults import hang
from support.wire import JSON, Wire, hang_up

USER: Final = 123
TERMINAL: Final = ("completed", "failed")


@pytest.fixture
def log(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


async def attach(service: Running, user: str = "ada", **auth: str) -> Wire:
    wire = await Wire.open(service.port)
    await wire.connect(userId=user, **auth)
    return wire


async def come_back(service: Running, wire: Wire) -> Wire:
    """Reconnect as the official client does: with its session and its last cursor."""
    other = await Wire.open(service.port, received=wire.received)
    await other.connect(**wire.offset)
    assert other.pid == wire.pid, "not recovered"
    return other


async def ended(wire: Wire, generation_id: str) -> JSON:
    """Its last event, once the device was sent it."""

    def ends() -> list[JSON]:
        return [each for each in wire.events if each["generationId"] == generation_id and each["status"] in TERMINAL]

    await wire.until(lambda: bool(ends()))
    return ends()[0]


@needs_node
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
async def test_the_seeds_client_misses_nothing_across_a_kill_and_restart(tmp_path: Path, stop: signal.Signals) -> None:
    deployment = Deployment(tmp_path / "service", {"max_running": 1, "drain": 0})
    async with (
        RetryingClient.open(deployment.url) as caller,
        deployment.serving(local_seconds=60) as life,
        seed(deployment.url, USER) as phone,
    ):
        beginning = (await caller.get("/events", f"{USER}"))["cursor"]
        await phone.until(lambda: bool(phone.named("connect")))
        left = [await start(caller), await start(caller)]
        await phone.until(lambda: shows(phone, left[0], "openai_editing") and shows(phone, left[1], "started"))
        life.send(stop)
        assert await life.ended() == (0 if stop == signal.SIGTERM else -signal.SIGKILL)
        async with deployment.serving():
            await phone.until(lambda: all(shows(phone, each, "completed") for each in left))
            assert phone.data == await caller.feed(f"{USER}", beginning)
            assert [event["status"] for event in phone.data].count("failed") == 0
            first, *returns = [line["recovered"] for line in phone.named("connect")]
            assert not first
            assert returns
            assert all(returns)
            assert [line["bars"] for line in phone.lines if "bars" in line][-1] == []
            assert (await caller.get("/me", f"{USER}"))["credit"] == 98


async def start(caller: RetryingClient) -> str:
    answer = await caller.ask("POST", "/generations/edit", f"{USER}", files=parts("a red hat", PHOTO))
    return str(answer.json()["generationId"])


def shows(phone: Script, generation_id: str, status: str) -> bool:
    return any((event["generationId"], event["status"]) == (generation_id, status) for event in phone.data)


async def test_sessions_cursors_keys_balances_grants_and_images_are_there_after_a_restart(
    tmp_path: Path, log: str
) -> None:
    images = tmp_path / "images"
    grant: JSON = {"headers": {"Idempotency-Key": "g"}, "json": {"amount": 7}}
    async with running(images, log=log) as first:
        wire = await attach(first)
        beginning = wire.notices[0][1]["cursor"]
        done = await first.start(key="k", metadata=json.dumps({"album": 7}))
        url = (await ended(wire, done))["editedImageUrl"]
        await ended(wire, await first.start())
        deleted = await first.start(user="bob")
        await first.service.leases.drain()
        assert (await first.http.delete(f"/generations/{deleted}", headers={"X-User-Id": "bob"})).status_code == 204
        assert (await first.http.post("/users/pat/credit", **grant)).json()["credit"] == 107
        before = [await first.get(path) for path in (f"/generations/{done}", f"/generations/{done}/events", "/me")]
        picture = (await first.http.get(f"/images/{url.rpartition('/')[2]}")).content
        await hang_up([wire])
    cursors = [beginning, *(wire.cursor_after(count) for count in range(1, len(wire.received) + 1))]
    stray = images / "edit_1_0000000000000000" / f"edit_1_0000000000000000-{'0' * 32}.png"
    stray.parent.mkdir()
    stray.write_bytes(picture)
    async with running(images, log=log) as again:
        after = [await again.get(path) for path in (f"/generations/{done}", f"/generations/{done}/events", "/me")]
        assert after == before
        assert (await again.http.get(f"/images/{url.rpartition('/')[2]}")).content == picture
        assert not stray.exists()
        for place, cursor in enumerate(cursors):
            assert await again.feed("ada", cursor) == wire.events[place:]
        answer = await again.post("ada", "edit", key="k", metadata=json.dumps({"album": 7}))
        assert (answer.status_code, answer.headers["location"]) == (202, f"/generations/{done}")
        assert (await again.post("ada", "edit", key="k")).json()["code"] == "idempotency_mismatch"
        assert (await again.get("/me"))["credit"] == 98
        assert (await again.http.post("/users/pat/credit", **grant)).json()["credit"] == 107
        assert (await again.get("/generations", "bob"))["generations"] == []
        assert (await again.get("/me", "bob"))["credit"] == 99
        back, other = await come_back(again, wire), await attach(again, cursor=cursors[-1])
        assert other.notices[0][1]["recovered"] is True
        new = await again.start()
        await ended(back, new)
        await ended(other, new)
        assert back.events[-6:] == other.events == await again.events(new)
        assert len(back.events) == 3 * 6, "something was told twice"
        await hang_up([back, other])


class Left(NamedTuple):
    """Where a generation is left, and how it goes on."""

    #: What holds it there.
    held_by: Callable[[Pause], JSON]
    status: str
    then: tuple[str, ...]
    code: str | None = None
    credit: int = 99


_LEFT: Final = {
    "composition": Left(
        lambda pause: {"composer": ScriptedComposer(pause)},
        "composition",
        ("composition_completed", "openai_editing", "openai_editing_completed", "completed"),
    ),
    "the edit": Left(
        lambda pause: {"editor": ScriptedEditor(pause)}, "openai_editing", ("failed",), "interrupted", credit=100
    ),
    "the face swap": Left(
        lambda pause: {
            "composer": ScriptedComposer(),
            "editor": ScriptedEditor(),
            "fetcher": ScriptedFetcher(),
            "face_swapper": ScriptedFaceSwapper(pause),
        },
        "face_swap",
        ("completed",),
        "interrupted",
    ),
}


@pytest.mark.parametrize("left", _LEFT.values(), ids=_LEFT)
async def test_after_a_restart_free_work_is_repeated_paid_work_is_ended_and_waiting_work_runs(
    tmp_path: Path, log: str, left: Left
) -> None:
    pause = Pause()
    async with running(tmp_path / "images", log=log, overrides=left.held_by(pause), max_running=1) as first:
        wire = await attach(first)
        swap: JSON = {"imageUrls": FACE_URL} if left.status == "face_swap" else {}
        stuck = await first.start(**swap)
        await pause.reached.wait()
        waiting = await first.start(user="bob")
        await wire.until(lambda: bool(wire.events) and wire.events[-1]["status"] == left.status)
        seen = len(wire.received)
        await hang_up([wire])
    async with running(tmp_path / "images", log=log) as again:
        back = await come_back(again, wire)
        end = await ended(back, stuck)
        assert tuple(event["status"] for event in back.events[seen:]) == left.then
        assert (end.get("code") or end.get("faceSwapError", {}).get("code")) == left.code
        assert end["credit"] == (await again.get("/me"))["credit"] == left.credit
        assert back.events == await again.events(stuck)
        await again.service.leases.drain()
        assert [event["status"] for event in await again.events(waiting, "bob")][-1] == "completed"
        named = {value.rpartition("/")[2] for event in back.events for key, value in event.items() if key[-3:] == "Url"}
        named |= {url.rpartition("/")[2] for url in back.events[0]["input"]["images"]}
        kept = {each.name for each in (tmp_path / "images" / stuck).glob("*")}
        assert kept == {name for name in named if name.startswith(stuck)}, "stray images"
        await hang_up([back])


async def test_a_pipeline_continues_after_a_restart_and_its_repeated_report_is_recognised(
    tmp_path: Path, log: str
) -> None:
    async with running(tmp_path / "images", log=log) as first:
        answer = await first.http.post(
            "/generations/edit?runner=external", files=parts("x"), headers={"X-User-Id": "ada"}
        )
        path = f"{answer.headers['location']}/transitions"
        reports: list[JSON] = [{"status": "composition"}, {"status": "composition_completed", "sequence": 3}]
        said = [(await first.http.post(path, json=report, headers={"X-User-Id": "ada"})).json() for report in reports]
    async with running(tmp_path / "images", log=log) as again:
        repeated = await again.http.post(path, json=reports[1], headers={"X-User-Id": "ada"})
        assert (repeated.status_code, repeated.json()) == (200, said[1])
        refused = await again.http.post(path, json=reports[0], headers={"X-User-Id": "ada"})
        assert (refused.status_code, refused.json()["code"]) == (409, "illegal_transition")
        for status in ("openai_editing", "openai_editing_completed", "completed"):
            answer = await again.http.post(path, json={"status": status}, headers={"X-User-Id": "ada"})
            assert answer.status_code == 200
        assert answer.json()["sequence"] == 6


async def test_a_pipeline_that_stays_silent_after_a_restart_fails(tmp_path: Path, log: str) -> None:
    async with running(tmp_path / "images", log=log) as first:
        beginning = (await first.get("/events", "ada"))["cursor"]
        answer = await first.http.post(
            "/generations/edit?runner=external", files=parts("x"), headers={"X-User-Id": "ada"}
        )
    async with running(tmp_path / "images", log=log, deadline=0.1) as again:
        wire = await attach(again, cursor=beginning)
        end = await ended(wire, answer.json()["generationId"])
        assert (end["code"], end["credit"]) == ("deadline_exceeded", 100)
        await hang_up([wire])


async def test_a_second_process_on_the_same_file_is_refused_with_3_and_a_sentence(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "service")
    async with running(deployment.images, log=f"sqlite:///{deployment.log}") as first:
        async with deployment.life() as second:
            assert await second.ended() == 3
            assert second.lines == [f"stagecast: The log {deployment.log} is in use by another process."]
        await first.start()
        await first.service.leases.drain()
    async with deployment.serving() as third, RetryingClient.open(deployment.url) as caller:
        [generation] = await caller.generations("ada")
        assert generation["status"] == "completed"
        third.send(signal.SIGTERM)
        assert await third.ended() == 0


async def test_an_upload_on_a_full_disk_is_refused(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "service")
    async with deployment.serving() as life, RetryingClient.open(deployment.url) as caller:
        resource.prlimit(life.pid.result(), resource.RLIMIT_FSIZE, (100_000, -1))
        answer = await caller.once("POST", "/generations/edit", "ada", files=parts("x", bytes(2_000_000)))
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_failed")


def paid(deployment: Deployment, server: OpenAIServer) -> Deployment:
    """The same deployment, with OpenAI as a provider."""
    deployment.environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.base_url}
    return deployment


async def test_a_restart_on_a_full_disk_ends_unfinished_work_once_there_is_room(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "service")
    async with (
        openai_server() as server,
        paid(deployment, server).serving(editor="openai") as life,
        RetryingClient.open(deployment.url) as caller,
    ):
        server.answer(hang)
        with contextlib.closing(sqlite3.connect(f"{deployment.log.as_uri()}?mode=ro", uri=True)) as stranger:
            # A reader keeps the write-ahead log from being truncated, however long this takes.
            stranger.execute("BEGIN")
            stranger.execute("SELECT count(*) FROM events").fetchall()
            left = await start(caller)
            while (await caller.get(f"/generations/{left}", f"{USER}"))["status"] != "openai_editing":
                await asyncio.sleep(0.01)
            life.send(signal.SIGKILL)
            await life.ended()
    # The file can be opened, and nothing can be added to it.
    assert deployment.log.with_name("log.db-wal").stat().st_size > 40_000
    deployment.prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, -1))"
    async with deployment.serving() as life, RetryingClient.open(deployment.url) as caller:
        refused = await caller.once("POST", "/generations/edit?runner=external", f"{USER}", files=parts("x"))
        assert (refused.status_code, refused.json()["code"]) == (503, "log_unavailable")
        # A checkpoint stops half-way, too.
        while not any("cannot be written back" in line for line in life.lines):
            await asyncio.sleep(0.01)
        resource.prlimit(life.pid.result(), resource.RLIMIT_FSIZE, (-1, -1))
        while (ended := await caller.get(f"/generations/{left}", f"{USER}"))["status"] != "failed":
            await asyncio.sleep(0.01)
        assert ended["code"] == "interrupted"
        assert not any("Traceback" in line for line in life.lines)
