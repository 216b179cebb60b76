"""``queuePosition`` and ``queue_position``, as official clients, event streams and HTTP clients receive them."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest

from domain import queue_positions
from support.doubles import ScriptedComposer
from support.event_stream import open_stream
from support.harness import JSON, Running, running
from support.node import browsers, needs_node
from support.page import PromptedEditor

NAME = "queue_position"


@pytest.fixture
async def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Running, PromptedEditor]]:
    """A service with one worker, which works for zoe until her pause ends. Positions are sent soon."""
    monkeypatch.setattr(queue_positions, "_PAUSE", 0.05)
    editor = PromptedEditor()
    overrides = {"editor": editor, "composer": ScriptedComposer()}
    async with running(tmp_path, overrides=overrides, max_running=1) as service:
        yield service, editor


async def occupy(service: Running, editor: PromptedEditor) -> tuple[str, asyncio.Event]:
    """Let the worker be busy until the event is set."""
    pause = editor.pause("busy")
    occupying = await service.start("zoe", prompt="busy")
    await pause.reached.wait()
    return occupying, pause.released


def position(generation_id: str, place: int) -> JSON:
    return {"generationId": generation_id, "queuePosition": place}


async def place(service: Running, generation_id: str, user: str = "ada") -> int | None:
    return (await service.get(f"/generations/{generation_id}", user)).get("queuePosition")


@needs_node
async def test_every_device_of_the_owner_sees_the_place_in_line(busy: tuple[Running, PromptedEditor]) -> None:
    service, editor = busy
    occupying, release = await occupy(service, editor)
    assert await place(service, occupying, "zoe") is None
    async with (
        browsers() as everybody,
        service.phone("ada") as phone,
        service.phone() as plain,
        service.phone("bob") as stranger,
        open_stream(service) as stream,
    ):
        await plain.authenticate("ada", recovery=False)
        script = everybody.open(service.url, first={"userId": "ada"})
        cursor = (await script.ack())["cursor"]
        await stream.named("authenticated")
        answer = await service.post("ada", "edit")
        first = answer.json()["generationId"]
        assert answer.json()["queuePosition"] == 1
        second, foreign = await service.start("ada"), await service.start("bob")
        wanted = [position(first, 1), position(second, 3)]
        for device in (phone, plain):
            await device.until(lambda device=device: (NAME, wanted[1]) in device.notices)  # type: ignore[misc]
        assert [await place(service, each) for each in (first, second)] == [1, 3]
        assert await place(service, foreign, "bob") == 2
        listed = (await service.get("/generations?status=active"))["generations"]
        assert [each["queuePosition"] for each in listed] == [3, 1]
        assert (await phone.call("subscribe_to_generation", {"generationId": second}))["queuePosition"] == 3
        again = await phone.call("authenticate", {"userId": "ada"})
        assert [each["queuePosition"] for each in again["generations"]] == [3, 1]

        removed = await service.http.post(f"/generations/{first}/cancel", headers={"X-User-Id": "ada"})
        assert removed.status_code == 200
        wanted.append(position(second, 1))
        await phone.until(lambda: (NAME, wanted[-1]) in phone.notices)
        release.set()
        await phone.until_over(second)
        await stranger.until_over(foreign)
        await plain.until_over(second)
        await script.until(lambda: len(script.events) == len(phone.events))
        await stream.until_count(len(phone.events))

        from_script = [data for _, data in script.notices]
        from_stream = [json.loads(block.data) for block in stream.blocks if block.event == NAME]
        for notices in (
            [data for _, data in phone.notices],
            [data for _, data in plain.notices],
            from_script,
            from_stream,
        ):
            assert {each["generationId"] for each in notices} <= {first, second}
            of_second = [each["queuePosition"] for each in notices if each["generationId"] == second]
            assert 3 in of_second
            assert all(before != after for before, after in pairwise(of_second))
        assert {data["generationId"] for _, data in stranger.notices} == {foreign}
        assert all(len(rest) == 1 for _, *rest in script.notices)
        assert all(isinstance(further[-1], str) for further in script.further)
        for before, block in pairwise(stream.blocks):
            if block.event == NAME:
                assert block.id == before.id
        # After the event with which it leaves the line, nothing is sent about its place.
        for generation_id in (first, second):
            names = [
                line["name"] for line in script.on("event") if line["args"][0].get("generationId") == generation_id
            ]
            assert names[0] == "generation_started"
            after = next(index for index, name in enumerate(names) if name in ("continue", "generation_failed"))
            assert NAME in names[:after]
            assert NAME not in names[after:]
            assert "queuePosition" not in await service.get(f"/generations/{generation_id}")

        page = await service.get(f"/events?after={cursor}")
        assert {each["event"] for each in page["events"]} & {NAME} == set()
        assert [each["data"] for each in page["events"]] == [data for _, data in phone.events]
        assert "queuePosition" not in json.dumps(page)


async def test_a_device_that_recovers_gets_no_old_positions(busy: tuple[Running, PromptedEditor]) -> None:
    service, editor = busy
    _, release = await occupy(service, editor)
    async with service.phone("ada") as phone:
        first = await service.start()
        await phone.until(lambda: len(phone.notices) == 1)
        cursor = phone.cursors[-1]
    second = await service.start()
    async with service.phone() as back:
        ack = await back.authenticate("ada", cursor=cursor)
        assert ack["recovered"] is True
        assert [each["queuePosition"] for each in ack["generations"]] == [2, 1]
        await back.until(lambda: len(back.events) == 1)
        assert back.sequences(second) == [1]
        release.set()
        await back.until_over(first, second)


async def test_curl_reads_a_position_without_an_id(busy: tuple[Running, PromptedEditor]) -> None:
    service, editor = busy
    _, release = await occupy(service, editor)
    curl = await asyncio.create_subprocess_exec(
        *("curl", "-sN", "-H", "Accept: text/event-stream", f"{service.url}/events?userId=ada"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert curl.stdout is not None
    try:
        async with asyncio.timeout(20):
            await curl.stdout.readuntil(b"event: authenticated\n")
            generation_id = await service.start()
            await curl.stdout.readuntil(b"event: queue_position\n")
            line = await curl.stdout.readuntil(b"\n\n")
    finally:
        curl.kill()
        await curl.wait()
    assert line.decode() == f'data: {{"generationId":"{generation_id}","queuePosition":1}}\n\n'
    release.set()


async def test_the_stream_of_one_generation_has_no_positions(busy: tuple[Running, PromptedEditor]) -> None:
    service, editor = busy
    _, release = await occupy(service, editor)
    generation_id = await service.start()
    async with (
        service.phone("ada") as phone,
        open_stream(service, f"/generations/{generation_id}/events") as stream,
    ):
        await service.start("bob")
        later = await service.start()
        await phone.until(lambda: any(data["generationId"] == later for _, data in phone.notices))
        release.set()
        await stream.rest()
        assert {block.event for block in stream.blocks if block.data} == {
            "generation_started",
            "continue",
            "generation_completed",
        }
        await phone.until_over(later)
