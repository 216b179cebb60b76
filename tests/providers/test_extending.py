"""What docs/extending.md shows works as it stands there."""

import asyncio
import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Final

import httpx2
import pytest
from PIL import Image

from reliability.cases import free_port
from reliability.chaos import parts
from support.harness import PHOTO

ROOT: Final = Path(__file__).resolve().parent.parent.parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    [source] = blocks("python")
    (tmp_path / "my_editor.py").write_text(source)
    return tmp_path


async def test_the_editor_makes_a_picture_when_the_service_is_started_as_shown(folder: Path) -> None:
    [command] = blocks("sh")
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    others = {name: value for name, value in os.environ.items() if not name.startswith("STAGECAST_")}
    process = await asyncio.create_subprocess_shell(
        f"exec env {command.strip()}",
        cwd=folder,
        env=others | {"PATH": path, "STAGECAST_PORT": f"{port}"},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        ready = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        assert "editor: my_editor:make; " in ready
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            for kind, key in (("edit", "editedImageUrl"), ("generate", "generatedImageUrl")):
                form = parts("in grey", PHOTO)
                place = (await http.post(f"/generations/{kind}", files=form)).headers["location"]
                while (generation := (await http.get(place)).json())["status"] != "completed":
                    assert generation["status"] != "failed", generation
                    await asyncio.sleep(0.02)
                events = [item["data"] for item in (await http.get(f"{place}/events")).json()["events"]]
                assert "Mixing the greys..." in [event["message"] for event in events]
                picture = (await http.get(f"/images/{generation[key].rpartition('/')[2]}")).content
                assert Image.open(BytesIO(picture)).mode == "L"
    finally:
        process.terminate()
        assert await process.wait() == 0


@pytest.mark.long
def test_the_editor_is_typed(folder: Path) -> None:
    """Checked as a user's code is: against the installed packages, which say that they are typed."""
    assert (ROOT / "src" / "domain" / "py.typed").is_file()
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "my_editor.py"], cwd=folder, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
