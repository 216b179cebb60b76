"""The programs on the page about one's own pipeline do what the page says, also when the line is bad."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import pytest
import pytest_asyncio

from domain.feed import Logged
from domain.ports.log import Notice
from support.guarded import SERVICE, guarded, token
from support.harness import JSON, Running, running
from support.node import ROOT, needs_node
from support.proxy import Fault, Proxy

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Program(NamedTuple):
    """One of the page's programs, and what it makes."""

    suffix: str
    command: str
    #: The line at which its work is done, and one at which it fails.
    last: str
    breaks: str
    received: tuple[tuple[str, int], ...]
    made: JSON


PROGRAMS: Final[Mapping[str, Program]] = {
    "js": Program(
        ".mjs",
        "node",
        'return "https://cdn.example.com/edited.png";',
        'throw new Error("The GPU is on fire");',
        (
            ("started", 0),
            ("composition", 20),
            ("composition_completed", 40),
            ("openai_editing", 60),
            ("openai_editing", 65),
            ("openai_editing", 70),
            ("openai_editing", 75),
            ("openai_editing_completed", 80),
            ("completed", 100),
        ),
        {
            "compositionUrl": "https://cdn.example.com/sheet.png",
            "editedImageUrl": "https://cdn.example.com/edited.png",
            "message": "Image editing completed successfully!",
        },
    ),
    "python": Program(
        ".py",
        sys.executable,
        'return "https://cdn.example.com/generated.png"',
        'raise RuntimeError("The GPU is on fire")',
        (
            ("started", 0),
            ("composition", 20),
            ("composition_completed", 40),
            ("ai_generation", 60),
            ("ai_generation", 70),
            ("ai_generation", 80),
            ("ai_generation", 90),
            ("completed", 100),
        ),
        {
            "compositionUrl": "https://cdn.example.com/sheet.png",
            "generatedImageUrl": "https://cdn.example.com/generated.png",
            "message": "Image generation completed successfully!",
        },
    ),
}

languages = pytest.mark.parametrize("language", [pytest.param("js", marks=needs_node), "python"])


def code(language: str) -> str:
    page = (ROOT / "docs" / "your-own-pipeline.md").read_text()
    [found] = re.findall(rf"<!-- executed by a test -->\n```{language}\n(.*?\n)```\n", page, re.DOTALL)
    return str(found)


async def execute(folder: Path, language: str, text: str, user: str, url: str, **more: str) -> tuple[int, str, str]:
    """Run the program for this user: its exit code, what it printed, and what it complained of."""
    program = PROGRAMS[language]
    file = folder / f"pipeline{program.suffix}"
    file.write_text(text)
    process = await asyncio.create_subprocess_exec(
        program.command,
        str(file),
        user,
        "A quiet sea",
        env={"PATH": os.environ["PATH"], "STAGECAST_URL": url, **more},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            printed, complaints = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, printed.decode(), complaints.decode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("images")) as running_service:
        yield running_service


@languages
async def test_a_pipeline_with_a_service_token_shows_every_stage_on_the_users_device(
    tmp_path: Path, language: str
) -> None:
    program = PROGRAMS[language]
    async with guarded(tmp_path) as service, service.phone(token=token("ada")) as phone:
        phone.user = "ada"
        done = await execute(tmp_path, language, code(language), "ada", service.url, STAGECAST_TOKEN=SERVICE)
        [generation] = (await service.get("/generations"))["generations"]
        assert done == (0, f"{generation['generationId']} {program.made['message']}\n", "")
        await phone.until_over(generation["generationId"])
        assert [(event["status"], event["progress"]) for _, event in phone.events] == [*program.received]
        assert phone.events[-1][1].items() >= program.made.items()


@languages
async def test_a_connection_that_keeps_breaking_changes_nothing(
    service: Running, tmp_path: Path, language: str
) -> None:
    program, user = PROGRAMS[language], f"{language} on a train"
    async with Proxy.open(service.port) as proxy:
        # The first request does not arrive whole; of others the answer is lost, or a part of it.
        proxy.plan.extend([Fault("reset", "up", 10), Fault("reset", "down", 1), Fault("close", "down", 1500)])
        proxy.plan.extend([Fault("reset", "down", 1), Fault("close", "down", 1500)])
        exit_code, _, complaints = await execute(tmp_path, language, code(language), user, proxy.url)
        assert (exit_code, complaints) == (0, "")
        assert proxy.struck == 5
    [generation] = (await service.get("/generations", user))["generations"]
    events = await service.events(generation["generationId"], user)
    assert [(event["status"], event["progress"]) for event in events] == [*program.received]
    assert (await service.get("/me", user))["credit"] == 99


@languages
async def test_a_pipeline_stops_when_the_user_cancels(service: Running, tmp_path: Path, language: str) -> None:
    user = f"{language} who changes their mind"
    cancels: list[asyncio.Task[str]] = []

    def cancel_half_way(entry: Notice) -> None:
        if isinstance(entry, Logged) and entry.user_id == user and entry.sequence == 5:
            cancels.append(asyncio.create_task(service.service.workflow.cancel(user, entry.generation_id)))

    async with service.service.log.follow(cancel_half_way):
        exit_code, printed, complaints = await execute(tmp_path, language, code(language), user, service.url)
    [cancel] = cancels
    assert await cancel == "cancelled"
    [generation] = (await service.get("/generations", user))["generations"]
    assert (exit_code, printed, complaints) == (0, f"{generation['generationId']} has ended meanwhile.\n", "")
    assert generation["code"] == "cancelled"


@languages
async def test_a_pipeline_failure_reaches_the_user_and_refunds_the_credit(
    service: Running, tmp_path: Path, language: str
) -> None:
    program, user = PROGRAMS[language], f"{language} in trouble"
    assert code(language).count(program.last) == 1
    broken = code(language).replace(program.last, program.breaks)
    exit_code, printed, complaints = await execute(tmp_path, language, broken, user, service.url)
    assert (exit_code, printed) == (1, "")
    assert "The GPU is on fire" in complaints
    [generation] = (await service.get("/generations", user))["generations"]
    assert (generation["status"], generation["code"]) == ("failed", "provider_unavailable")
    assert generation["error"].startswith("The picture could not be ")
    assert (await service.get("/me", user))["credit"] == 100
