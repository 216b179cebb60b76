"""The commands in docs/providers.md work as printed, against a server with OpenAI's protocol."""

import asyncio
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import httpx2
import pytest

from adapters.providers import openai as openai_editor
from adapters.providers import replicate as replicate_face_swap
from api.settings import describe_settings
from support.deployment import free_port, parts
from support.harness import PHOTO
from support.openai_server import KEY, openai_server
from support.replicate_server import TOKEN

ROOT: Final = Path(__file__).parent.parent.parent
OFFLINE: Final = "local, an offline preview"


def commands() -> dict[str, str]:
    """The commands with keys, up to their first comment."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/providers.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return {line: line.replace("sk-…", KEY).replace("r8_…", TOKEN) for line in lines}


COMMANDS: Final = commands()
SERVING: Final = {
    "OPENAI_API_KEY=sk-… STAGECAST_EDITOR=openai make run": ("openai", OFFLINE, "gpt-image-2.5-flare"),
    "REPLICATE_API_TOKEN=r8_… STAGECAST_FACE_SWAP=replicate make run": (OFFLINE, "replicate", None),
    "OPENAI_API_KEY=sk-… stagecast serve": ("openai", OFFLINE, "gpt-image-2.5-flare"),
    "OPENAI_API_KEY=sk-… STAGECAST_EDITOR=local stagecast serve": (OFFLINE, OFFLINE, None),
    "OPENAI_API_KEY=sk-… OPENAI_BASE_URL=http://localhost:4000/v1 STAGECAST_OPENAI_MODEL=my-model stagecast serve": (
        "openai",
        OFFLINE,
        "my-model",
    ),
}
DEMO: Final = "OPENAI_API_KEY=sk-… stagecast demo --editor openai"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like an installed clone, so that make has nothing to install."""
    (tmp_path / ".venv").mkdir()
    for name in (".venv/bin", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "package.json"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".venv/installed").touch()
    return tmp_path


def environment(**variables: str) -> dict[str, str]:
    own = ("STAGECAST_", "OPENAI_", "REPLICATE_", "MAKE")
    others = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{others['PATH']}"
    return others | {"PATH": path, "PYTHONIOENCODING": "utf-8", **variables}


@asynccontextmanager
async def served(command: str, folder: Path, **variables: str) -> AsyncIterator[tuple[str, httpx2.AsyncClient]]:
    """Start the service with this command; yields the line that it prints when ready, and a client."""
    port = free_port()
    process = await asyncio.create_subprocess_shell(
        command,
        cwd=folder,
        env=environment(STAGECAST_PORT=f"{port}", STAGECAST_LOCAL_SECONDS="0", **variables),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield line, http
    finally:
        os.killpg(process.pid, 15)
        await process.wait()


async def made(http: httpx2.AsyncClient) -> None:
    """A finished edit."""
    place = (await http.post("/generations/edit", files=parts("a red hat", PHOTO))).headers["location"]
    while (generation := (await http.get(place)).json())["status"] != "completed":
        assert generation["status"] != "failed", generation
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("variable", "model"),
    [
        ("STAGECAST_OPENAI_MODEL", openai_editor.DEFAULT_MODEL),
        ("STAGECAST_REPLICATE_MODEL", replicate_face_swap.DEFAULT_MODEL.partition(":")[0]),
    ],
)
def test_default_models_are_documented(variable: str, model: str) -> None:
    [setting] = [setting for setting in describe_settings() if setting.variable == variable]
    assert setting.default == model
    assert f"`{model}`" in (ROOT / "docs/providers.md").read_text()


def test_every_documented_command_is_tested() -> None:
    assert set(COMMANDS) == {*SERVING, DEMO}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("command", SERVING)
async def test_documented_command_starts_a_service_with_those_providers(checkout: Path, command: str) -> None:
    editor, face_swap, model = SERVING[command]
    async with openai_server() as server:
        line = COMMANDS[command].replace("http://localhost:4000/v1", server.base_url)
        async with served(line, checkout, OPENAI_BASE_URL=server.base_url) as (ready, http):
            assert f"; editor: {editor}; face swap: {face_swap})" in ready
            await made(http)
        assert [call.fields["model"] for call in server.calls] == ([] if model is None else [model])


async def test_demo_makes_one_image_with_the_key(checkout: Path) -> None:
    async with openai_server() as server:
        process = await asyncio.create_subprocess_shell(
            COMMANDS[DEMO], cwd=checkout, env=environment(OPENAI_BASE_URL=server.base_url, STAGECAST_LOCAL_SECONDS="0")
        )
        assert await asyncio.wait_for(process.wait(), 60) == 0
        assert len(server.calls) == 1
    assert (checkout / "var/demo").is_dir()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("file", "variables", "paid"),
    [
        ("", {"OPENAI_API_KEY": KEY, "REPLICATE_API_TOKEN": TOKEN}, False),
        pytest.param(f"OPENAI_API_KEY={KEY}\nSTAGECAST_EDITOR=''\n", {}, False, marks=pytest.mark.long),
        (f'OPENAI_API_KEY={KEY}\nexport STAGECAST_EDITOR = "openai"\n', {}, True),
        pytest.param(
            f"OPENAI_API_KEY={KEY}\nSTAGECAST_EDITOR=openai\n",
            {"STAGECAST_EDITOR": "local"},
            False,
            marks=pytest.mark.long,
        ),
    ],
)
async def test_make_run_is_free_unless_configured_otherwise(
    checkout: Path, file: str, variables: dict[str, str], paid: bool
) -> None:
    (checkout / ".env").write_text(file)
    async with served("make run", checkout, **variables) as (ready, _):
        assert f"editor: {'openai' if paid else OFFLINE}; face swap: {OFFLINE})" in ready
