"""Free work is repeated after a crash: the service is killed while the offline editor or face swap works."""

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from support.deployment import Deployment, Life, RetryingClient, parts
from support.harness import PHOTO
from support.openai_server import KEY, openai_server
from support.pictures import GREEN, solid
from support.provider_faults import Origin, hang, listening, whole
from support.wire import JSON

USER: Final = "ada"
#: The first event of each stage says this, and no other does.
ENTRIES: Final = {
    "openai_editing": "OpenAI image editing started...",
    "ai_generation": "AI image generation started...",
    "face_swap": "Applying face swap...",
}


@asynccontextmanager
async def face() -> AsyncIterator[str]:
    """The URL of a picture."""
    origin = Origin(lambda _: whole(solid(GREEN).data, media_type="image/png"))
    async with listening(origin):
        yield f"{origin.address}/face.png"


async def start(caller: RetryingClient, kind: str, **fields: object) -> str:
    answer = await caller.ask("POST", f"/generations/{kind}", USER, files=parts("a red hat", PHOTO, **fields))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["generationId"])


async def reached(caller: RetryingClient, generation_id: str, status: str, progress: int) -> None:
    while True:
        snapshot = await caller.get(f"/generations/{generation_id}", USER)
        if (snapshot["status"], snapshot["progress"] >= progress) == (status, True):
            return
        assert snapshot["status"] not in ("completed", "failed"), snapshot
        await asyncio.sleep(0.01)


async def end(caller: RetryingClient, generation_id: str) -> list[JSON]:
    """All events, once it has ended: contiguous, rising, each stage entered once."""
    while True:
        events = await caller.events(generation_id, USER)
        if events[-1]["status"] in ("completed", "failed"):
            break
        await asyncio.sleep(0.02)
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    progress = [event["progress"] for event in events]
    assert progress == sorted(progress)
    for status, message in ENTRIES.items():
        of_stage = [event for event in events if event["status"] == status]
        assert [event["message"] for event in of_stage].count(message) == bool(of_stage)
        values = [event["progress"] for event in of_stage]
        assert len(values) == len(set(values)), "the same progress was reported twice"
    return events


async def kill(life: Life) -> None:
    life.send(signal.SIGKILL)
    await life.ended()


@pytest.mark.parametrize(
    ("kind", "status", "progress"),
    [
        ("edit", "openai_editing", 62),
        ("edit", "face_swap", 86),
        pytest.param("edit", "openai_editing", 60, marks=pytest.mark.long),
        pytest.param("generate", "ai_generation", 62, marks=pytest.mark.long),
    ],
)
async def test_a_generation_that_was_killed_in_an_offline_stage_completes_after_the_restart(
    tmp_path: Path, kind: str, status: str, progress: int
) -> None:
    async with face() as url:
        deployment = Deployment(tmp_path / "service", {"fetch_allow": "127.0.0.0/8"})
        async with RetryingClient.open(deployment.url) as caller:
            seconds = 2 if status == "face_swap" else 20
            async with deployment.serving(local_seconds=seconds) as life:
                fields = {"imageUrls": json.dumps([url])} if status == "face_swap" else {}
                generation_id = await start(caller, kind, **fields)
                await reached(caller, generation_id, status, progress)
                await kill(life)
            async with deployment.serving():
                events = await end(caller, generation_id)
            assert events[-1]["status"] == "completed"
            assert "faceSwapError" not in events[-1]
            assert ("faceSwapUrl" in events[-1]) == (status == "face_swap")


async def test_free_work_is_repeated_by_a_paid_editor_once_and_then_counts_as_paid(tmp_path: Path) -> None:
    async with openai_server() as server:
        deployment = Deployment(
            tmp_path / "service", environment={"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.base_url}
        )
        async with RetryingClient.open(deployment.url) as caller:
            done, cut = await left_in_the_editor(deployment, caller, 2)
            server.answer(server.draw, hang)
            async with deployment.serving(editor="openai", max_running=1) as life:
                events = await end(caller, done)
                assert events[-1]["status"] == "completed"
                while len(server.calls) < 2:
                    await asyncio.sleep(0.01)
                await kill(life)
            server.answer(server.draw)
            async with deployment.serving():
                events = await end(caller, cut)
                assert (events[-1]["code"], events[-1]["failedStage"]) == ("interrupted", "openai_editing")
                assert (await caller.get("/me", USER))["credit"] == 99
            assert len(server.calls) == 2


async def test_work_of_a_paid_editor_is_interrupted_also_where_the_next_editor_is_free(tmp_path: Path) -> None:
    async with openai_server() as server:
        server.answer(hang)
        deployment = Deployment(
            tmp_path / "service", environment={"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.base_url}
        )
        async with RetryingClient.open(deployment.url) as caller:
            async with deployment.serving(editor="openai") as life:
                generation_id = await start(caller, "edit")
                await server.origin.reached.wait()
                await kill(life)
            async with deployment.serving():
                events = await end(caller, generation_id)
                assert events[-1]["code"] == "interrupted"
                assert (await caller.get("/me", USER))["credit"] == 100


async def left_in_the_editor(deployment: Deployment, caller: RetryingClient, count: int) -> list[str]:
    """Generations whose process was killed while the offline editor worked on them, near the end of its stage."""
    async with deployment.serving(local_seconds=30) as life:
        started = [await start(caller, "edit") for _ in range(count)]
        for each in started:
            await reached(caller, each, "openai_editing", 61)
        await kill(life)
    return started


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_no_kill_at_any_moment_interrupts_free_work(tmp_path: Path) -> None:
    chance = random.Random(13)
    async with face() as url:
        flags = {"fetch_allow": "127.0.0.0/8", "local_seconds": 1, "credits": 120, "max_per_user": 120}
        deployment = Deployment(tmp_path / "service", flags)
        started, found = list[str](), set[str]()
        async with RetryingClient.open(deployment.url) as caller:
            for number in range(120):
                async with deployment.serving(fresh=number % 20 == 0) as life:
                    swap = chance.random() < 0.7
                    fields = {"imageUrls": json.dumps([url])} if swap else {}
                    started.append(await start(caller, "edit" if swap else "generate", **fields))
                    await asyncio.sleep(chance.uniform(0, 1.5))
                    found |= {each["status"] for each in await caller.generations(USER, status="active")}
                    await kill(life)
            async with deployment.serving():
                for each in started:
                    events = await end(caller, each)
                    assert events[-1]["status"] == "completed", events[-1]
                    assert "faceSwapError" not in events[-1]
                assert (await caller.get("/me", USER))["credit"] == 0
        assert found >= {"openai_editing", "ai_generation", "face_swap"}
