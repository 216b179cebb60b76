"""``stagecast watch``: progress in the terminal, over Server-Sent Events."""

import asyncio
import contextlib
import os
import pty
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from adapters.system import now
from api.cli import watch
from support.builders import EventWriter, SteppableClock
from support.command_line import STAGECAST, environment, run_main
from support.harness import TIMEOUT, Running, running
from support.page import PromptedEditor, QuickComposer
from support.proxy import Fault, Proxy

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("images")) as service:
        yield service


@pytest.fixture(scope="module")
def writer(service: Running) -> EventWriter:
    return EventWriter(service.service.log, SteppableClock(now()))


async def test_it_shows_a_generation_to_its_end(service: Running, writer: EventWriter, eve: str) -> None:
    generation = await writer.move(await writer.start(eve), "composition")
    watching = asyncio.create_task(run_main("watch", generation.generation_id, "--url", service.url, "--user", eve))
    await service.until(lambda: bool(service.service.streams.open))
    await writer.finish(generation)
    result = await watching
    assert (result.code, result.errors) == (0, "")
    events = await service.events(generation.generation_id, eve)
    assert [line.split()[0] for line in result.output.splitlines()] == [str(event["progress"]) for event in events]
    assert events[-1]["message"] in result.output


async def test_a_generation_that_failed_is_an_error(service: Running, writer: EventWriter, eve: str) -> None:
    failed = await writer.start_and_fail(eve)
    result = await run_main("watch", failed.generation_id, "--url", service.url, "--user", eve)
    assert result.code == 1
    assert len(result.output.splitlines()) >= 2


@pytest.mark.parametrize("generation", ["edit_1_9999999999999999", "../me", ""])
async def test_an_unknown_generation_is_refused(service: Running, generation: str) -> None:
    result = await run_main("watch", generation, "--url", service.url)
    assert "stagecast: There is no" in result.sentence(1)


async def test_a_service_that_is_not_there_is_one_sentence() -> None:
    (await run_main("watch", "--url", "http://127.0.0.1:9")).sentence(3)


async def test_a_connection_that_breaks_loses_nothing(service: Running, writer: EventWriter, eve: str) -> None:
    generation = await writer.start(eve)
    async with Proxy.open(service.port) as proxy:
        proxy.plan.extend([Fault("reset", "down", 10**9), Fault("reset", "down", 500)])
        watching = asyncio.create_task(run_main("watch", generation.generation_id, "--url", proxy.url, "--user", eve))
        await service.until(lambda: bool(service.service.streams.open))
        await writer.finish(generation)
        result = await watching
    assert result.code == 0
    assert [int(line.split()[0]) for line in result.output.splitlines()] == [0, 20, 40, 60, 80, 100]


async def watched(url: str, user: str, *until: str, lines: list[str] | None = None) -> list[str]:
    """The lines that `stagecast watch` prints into a pipe, up to one with each of these texts, in order.

    They are added to `lines` as they come.
    """
    command = [*STAGECAST, "watch", "--url", url, "--user", user]
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment({}))
    assert child.stdout is not None
    lines = [] if lines is None else lines
    try:
        async with asyncio.timeout(TIMEOUT):
            for text in until:
                while not lines or text not in lines[-1]:
                    line = await child.stdout.readline()
                    assert line, lines
                    lines.append(line.decode())
    finally:
        child.send_signal(2)
        assert await asyncio.wait_for(child.wait(), TIMEOUT) == 130
    return lines


async def test_a_quiet_stream_that_breaks_is_given_the_full_time_to_come_back(
    service: Running, writer: EventWriter, eve: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_GIVE_UP", 0.01)
    generation = await writer.start(eve)
    async with Proxy.open(service.port) as proxy:
        watching = asyncio.create_task(run_main("watch", generation.generation_id, "--url", proxy.url, "--user", eve))
        await service.until(lambda: bool(service.service.streams.open))
        await asyncio.sleep(0.05)
        monkeypatch.setattr(watch, "_GIVE_UP", 10.0)
        proxy.strike("reset")
        await writer.finish(generation)
        result = await watching
    assert (result.code, result.errors) == (0, "")


async def test_a_generation_whose_end_was_missed_is_shown_as_ended(
    service: Running, writer: EventWriter, eve: str
) -> None:
    """The position is lost: the end is not among the events that follow, only among the snapshots."""
    lost = await writer.start(eve)
    generation = await writer.start(eve, "generate")
    lost = await writer.move(lost, "composition")
    async with Proxy.open(service.port) as proxy:
        lines: list[str] = []
        watching = asyncio.create_task(watched(proxy.url, eve, "20 %", "100 %", lines=lines))
        await service.until(lambda: "20 %" in "".join(lines))
        proxy.strike("reset")
        await writer.finish(lost)
        await service.service.storage.log.remove(lost.generation_id, retention=False)
        await writer.finish(generation)
        await watching
    assert [int(line.split()[1]) for line in lines] == [0, 0, 20, 100], "each event is shown once"
    assert generation.generation_id in lines[-1]


async def test_all_generations_of_a_user_are_live_bars_in_a_terminal(
    service: Running, writer: EventWriter, eve: str, tmp_path: Path
) -> None:
    generation = await writer.move(await writer.start(eve), "composition")
    ours, theirs = pty.openpty()
    command = [*STAGECAST, "watch", "--url", service.url, "--user", eve]
    child = await asyncio.create_subprocess_exec(
        *command, stdout=theirs, stderr=theirs, env=environment({"TERM": "xterm-256color", "COLUMNS": "120"}), cwd="/"
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    screen = b""

    def shows(text: str) -> bool:
        nonlocal screen
        with contextlib.suppress(BlockingIOError):
            screen += os.read(ours, 1 << 16)
        return text in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode(errors="replace"))

    await service.until(lambda: shows(generation.generation_id))
    await service.until(lambda: shows("Composing images..."))
    assert "━" in screen.decode(errors="replace")
    await writer.finish(generation)
    await service.until(lambda: shows("100 %"))
    child.send_signal(2)
    assert await asyncio.wait_for(child.wait(), TIMEOUT) == 130
    os.close(ours)


async def test_the_place_in_line_is_shown_until_the_work_begins(tmp_path: Path) -> None:
    editor = PromptedEditor()
    pause = editor.pause("busy")
    overrides = {"editor": editor, "composer": QuickComposer()}
    async with running(tmp_path, overrides=overrides, max_running=1) as busy:
        await busy.start(prompt="busy")
        await pause.reached.wait()
        before, after = await busy.start(), await busy.start()
        expected = ("Waiting: next in line", "Waiting: number 2 in line", "Waiting: next in line", "100 %")
        shown = list[str]()
        watching = asyncio.create_task(watched(busy.url, "ada", *expected, lines=shown))
        await busy.until(lambda: bool(busy.service.streams.open))
        assert (await busy.http.post(f"/generations/{before}/cancel", headers={"X-User-Id": "ada"})).is_success
        await busy.until(lambda: any(after in line and "next in line" in line for line in shown))
        pause.released.set()
        lines = [line for line in await watching if after in line]
    assert ["Waiting" in line for line in lines] == [True, True] + [False] * (len(lines) - 2)
