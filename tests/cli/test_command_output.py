"""The commands whose output cannot be written, and those that are interrupted: no traceback, and an exit code."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx2
import pytest
from aiohttp import web

from support.command_line import COMMANDS, STAGECAST, environment, other_server, run_main
from support.deployment import free_port
from support.guarded import SECRET
from support.harness import running

CHECKED: Final = ("check",)
TOKEN: Final = ("token", "ada")
HELP: Final = ("serve", "--help")
VERSION: Final = ("--version",)


@pytest.fixture
def closed() -> Iterator[int]:
    """A pipe of which the reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.fixture
def full() -> Iterator[int]:
    """A file on a disk that is full."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("wb") as file:
        yield file.fileno()


async def writing_to(output: int, *arguments: str, folder: Path, **variables: str) -> tuple[int | None, str]:
    """The exit code, and what stands on standard error."""
    process = await asyncio.create_subprocess_exec(
        *STAGECAST,
        *arguments,
        stdout=output,
        stderr=asyncio.subprocess.PIPE,
        env=environment({"STAGECAST_JWT_SECRET": SECRET, "PYTHONUNBUFFERED": "", **variables}),
        cwd=folder,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, errors.decode()


@pytest.mark.parametrize("arguments", [CHECKED, TOKEN, HELP, VERSION], ids=" ".join)
async def test_a_command_exits_silently_if_its_output_pipe_is_closed(
    arguments: tuple[str, ...], closed: int, tmp_path: Path
) -> None:
    assert await writing_to(closed, *arguments, folder=tmp_path) == (128 + signal.SIGPIPE, "")


async def test_a_command_that_calls_a_service_exits_silently_if_its_output_pipe_is_closed(
    closed: int, tmp_path: Path
) -> None:
    async with running(tmp_path / "images") as service:
        for arguments in (("credit", "eve", "5"), ("replay", await service.start("ada"), "--user", "ada")):
            ended = await writing_to(closed, *arguments, folder=tmp_path, STAGECAST_URL=service.url)
            assert ended == (128 + signal.SIGPIPE, ""), arguments


@pytest.mark.parametrize("arguments", [CHECKED, TOKEN], ids=" ".join)
async def test_a_command_reports_a_full_disk(arguments: tuple[str, ...], full: int, tmp_path: Path) -> None:
    ended = await writing_to(full, *arguments, folder=tmp_path)
    assert ended == (1, "stagecast: the output: No space left on device.\n")


async def test_the_service_starts_with_a_closed_output_pipe(closed: int, tmp_path: Path) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(*STAGECAST, "serve", "--port", f"{port}", "--log-level", "warning"),
        stdout=closed,
        stderr=asyncio.subprocess.PIPE,
        env=environment({}),
        cwd=tmp_path,
    )
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http, asyncio.timeout(60):
            while not await is_ready(http):
                assert process.returncode is None
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert (process.returncode, errors.decode()) == (0, "")
    finally:
        if process.returncode is None:
            process.kill()


async def is_ready(http: httpx2.AsyncClient) -> bool:
    try:
        return (await http.get("/health/ready")).is_success
    except httpx2.TransportError:
        return False


async def test_an_interrupted_command_exits_silently(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def never(_: web.Request) -> web.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with other_server(never) as url:
        process = await asyncio.create_subprocess_exec(
            *(*STAGECAST, "credit", "ada", "5", "--url", url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment({}),
            cwd=tmp_path,
        )
        await asyncio.wait_for(asked.wait(), 60)
        process.send_signal(signal.SIGINT)
        output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, output, errors.decode()) == (128 + signal.SIGINT, b"", "")


@pytest.mark.parametrize("command", COMMANDS)
async def test_help_fits_the_terminal(command: str) -> None:
    done = await run_main(command, "--help", COLUMNS="80")
    assert [line for line in done.output.splitlines() if len(line) > 80] == []
