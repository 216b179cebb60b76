"""``stagecast list`` and ``stagecast cancel``, with a service token, a user's own, and none."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from support.command_line import CommandResult, run_main
from support.guarded import MISSING, SERVICE, guarded, token
from support.harness import Running, running

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with guarded(tmp_path_factory.mktemp("images")) as service:
        yield service


async def external(service: Running, user: str) -> str:
    """One that runs until it is cancelled."""
    parts = [("prompt", (None, "a red hat"))]
    answer = await service.http.post("/generations/generate?runner=external", files=parts, headers={"X-User-Id": user})
    return str(answer.json()["generationId"])


async def call(service: Running, bearer: str, *arguments: str, folder: Path) -> CommandResult:
    return await run_main(*arguments, "--url", service.url, folder=folder, STAGECAST_TOKEN=bearer)


async def test_a_service_lists_and_cancels_generations_of_all_users(service: Running, tmp_path: Path) -> None:
    ids = [await external(service, user) for user in ("ada", "bob")]

    async def listed(*flags: str) -> list[str]:
        done = await call(service, SERVICE, "list", "--json", *flags, folder=tmp_path)
        assert (done.code, done.errors) == (0, "")
        return [json.loads(line)["generationId"] for line in done.output.splitlines()]

    assert await listed("--status", "active") == ids[::-1]
    assert await listed("--user", "ada", "--limit", "1") == ids[:1]
    assert await listed("--kind", "edit") == []
    done = await call(service, SERVICE, "list", "--limit", "1", folder=tmp_path)
    assert f"  {ids[1]}  bob    0 %  started " in done.output
    assert await call(service, SERVICE, "cancel", ids[0], folder=tmp_path) == (0, "cancelled\n", "")
    assert await call(service, SERVICE, "cancel", ids[0], folder=tmp_path) == (0, "already_finished\n", "")
    assert await call(service, SERVICE, "cancel", ids[1], "--user", "bob", folder=tmp_path) == (0, "cancelled\n", "")
    assert await listed("--status", "failed", "--limit", "2") == ids[::-1]


async def test_a_user_lists_and_cancels_only_their_own(service: Running, tmp_path: Path) -> None:
    mine, theirs = await external(service, "eve"), await external(service, "mallory")
    done = await call(service, token("eve"), "list", "--status", "active", folder=tmp_path)
    assert (done.code, mine in done.output, theirs in done.output) == (0, True, False)
    refused = await call(service, token("eve"), "cancel", theirs, folder=tmp_path)
    assert "There is no such generation." in refused.sentence(1)
    assert (await call(service, token("eve"), "list", "--user", "mallory", folder=tmp_path)).code == 1
    assert await call(service, token("eve"), "cancel", mine, folder=tmp_path) == (0, "cancelled\n", "")
    assert await call(service, SERVICE, "cancel", theirs, folder=tmp_path) == (0, "cancelled\n", "")


@pytest.mark.parametrize("generation_id", [MISSING, "../x?", "%"])
async def test_an_unknown_generation_is_not_cancelled(service: Running, tmp_path: Path, generation_id: str) -> None:
    for bearer in (SERVICE, token("ada")):
        done = await call(service, bearer, "cancel", generation_id, folder=tmp_path)
        assert "There is no" in done.sentence(1)


async def test_without_a_key_no_token_is_needed_and_replay_prints_json_too(tmp_path: Path) -> None:
    async with running(tmp_path) as service, service.phone("ada") as phone:
        generation_id = await service.start("ada")
        await phone.until_over(generation_id)
        url = ("--url", service.url)
        listed = await run_main("list", "--json", *url, folder=tmp_path)
        assert json.loads(listed.output)["generationId"] == generation_id
        cancelled = await run_main("cancel", generation_id, *url, folder=tmp_path)
        assert cancelled == (0, "already_finished\n", "")
        replayed = await run_main("replay", generation_id, "--user", "ada", "--json", *url, folder=tmp_path)
        lines = [json.loads(line) for line in replayed.output.splitlines()]
        assert [line["data"] for line in lines] == await service.events(generation_id)
        assert lines[0]["event"] == "generation_started"
