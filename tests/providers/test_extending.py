"""The code in docs/extending.md works as printed."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
from PIL import Image

from support.deployment import free_port, parts
from support.harness import PHOTO

ROOT: Final = Path(__file__).resolve().parent.parent.parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    [editor] = blocks("python")
    (tmp_path / "my_editor.py").write_text(editor)
    return tmp_path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of `src` with the stage of the walk-through."""
    copy = tmp_path / "src"
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for block in blocks("diff"):
        name, *lines = block.splitlines()
        path = tmp_path / name.removeprefix("--- ")
        before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        text = path.read_text()
        assert text.count(before) == 1, block
        path.write_text(text.replace(before, after))
    return copy


@asynccontextmanager
async def started(command: str, folder: Path, **environment: str) -> AsyncIterator[tuple[str, httpx2.AsyncClient]]:
    """The line that the service prints when it is ready, and a client of it."""
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    others = {name: value for name, value in os.environ.items() if not name.startswith("STAGECAST_")}
    process = await asyncio.create_subprocess_shell(
        f"exec env {command.strip()}",
        cwd=folder,
        env=others | {"PATH": path, "STAGECAST_PORT": f"{port}"} | environment,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        ready = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield ready, http
    finally:
        process.terminate()
        assert await process.wait() == 0


async def completed(http: httpx2.AsyncClient, kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A completed generation and its events."""
    place = (await http.post(f"/generations/{kind}", files=parts("in grey", PHOTO))).headers["location"]
    while (generation := (await http.get(place)).json())["status"] != "completed":
        assert generation["status"] != "failed", generation
        await asyncio.sleep(0.02)
    return generation, [item["data"] for item in (await http.get(f"{place}/events")).json()["events"]]


async def test_documented_editor_works_when_the_service_is_started_as_shown(folder: Path) -> None:
    [command] = blocks("sh")
    async with started(command, folder) as (ready, http):
        assert "editor: my_editor:make; " in ready
        for kind, key in (("edit", "editedImageUrl"), ("generate", "generatedImageUrl")):
            generation, events = await completed(http, kind)
            assert "Mixing the greys..." in [event["message"] for event in events]
            picture = (await http.get(f"/images/{generation[key].rpartition('/')[2]}")).content
            assert Image.open(BytesIO(picture)).mode == "L"


async def test_documented_upscale_stage_makes_its_own_picture(source: Path, tmp_path: Path) -> None:
    settings = {"PYTHONPATH": f"{source}", "STAGECAST_LOCAL_SECONDS": "0", "STAGECAST_EDITOR": "local"}
    async with started("python -m api serve", tmp_path, **settings) as (_, http):
        stages = {stage["status"]: stage for stage in (await http.get("/stages")).json()["edit"]}
        assert stages["openai_editing"]["next"] == ["upscale", "failed"]
        assert (stages["upscale"]["progress"], stages["upscale"]["repeats"]) == (70, True)
        generation, events = await completed(http, "edit")
        assert [(event["status"], event["progress"]) for event in events if event["progress"] in range(60, 81)] == [
            ("openai_editing", 60),
            ("upscale", 70),
            ("openai_editing_completed", 80),
        ]
        url = generation["upscaledImageUrl"]
        assert [event["status"] for event in events if event.get("upscaledImageUrl") == url] == [
            "openai_editing_completed",
            "completed",
        ]
        assert url != generation["editedImageUrl"]
        assert Image.open(BytesIO((await http.get(f"/images/{url.rpartition('/')[2]}")).content)).width > 1
        assert "upscaledImageUrl" not in (await completed(http, "generate"))[0]


@pytest.mark.long
def test_documented_upscale_stage_passes_type_checks(source: Path) -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "-p", "domain", "-p", "api"],
        cwd=source,
        capture_output=True,
        text=True,
        env=os.environ | {"MYPYPATH": f"{source}"},
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.long
def test_documented_editor_passes_type_checks(folder: Path) -> None:
    """Checked against the installed packages, like a user's code."""
    assert (ROOT / "src" / "domain" / "py.typed").is_file()
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "my_editor.py"], cwd=folder, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
