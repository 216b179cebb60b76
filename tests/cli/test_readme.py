"""What the README and the other documents show works as it stands there, and their links lead somewhere."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Final

import pytest

from support.harness import TIMEOUT, Running, running
from support.node import needs_node

ROOT: Final = Path(__file__).parent.parent.parent
DOCUMENTS: Final = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SAMPLE: Final = ROOT / "src/api/web/static/samples/portrait.webp"


def code(language: str, mark: str) -> str:
    """The one block of the README in this language that has this text in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    [block] = [block for block in blocks if mark in block]
    return str(block)


def anchors(document: Path) -> set[str]:
    """The names that a page's headings have, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_between_the_documents_resolves(document: Path) -> None:
    links = re.findall(r"""(?:\]\(|srcset="|src=")(?!https?:)([^)"\s]+)""", document.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


async def output(*command: str, cwd: Path = ROOT) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    printed, errors = await asyncio.wait_for(process.communicate(), TIMEOUT)
    assert process.returncode == 0, errors.decode()
    return printed.decode()


@needs_node
async def test_the_client_code_of_the_readme_shows_an_edit_to_its_end(tmp_path: Path) -> None:
    shutil.copy(SAMPLE, tmp_path / "photo.jpg")
    snippet = code("js", "socket.io-client") + 'socket.on("generation_completed", () => socket.close());\n'
    snippet = snippet.replace("// const photo =", "const photo =").replace(
        '"photo.jpg");', f'"{tmp_path}/photo.jpg");', 1
    )
    async with running(tmp_path / "service") as service:
        program = snippet.replace("http://localhost:3000", service.url)
        process = await asyncio.create_subprocess_exec(
            "node",
            *("--no-warnings", "--input-type=module", "--eval", program),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await asyncio.wait_for(process.communicate(), TIMEOUT)
        [generation] = await generations(service, "123")
    lines = printed.decode().splitlines()
    assert lines[0] == f"{generation['generationId']} started"
    assert lines[1].startswith("20% Composing images...")
    assert lines[-1] == generation["editedImageUrl"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_the_curl_commands_of_the_readme_start_and_list(tmp_path: Path) -> None:
    shutil.copy(SAMPLE, tmp_path / "photo.jpg")
    async with running(tmp_path / "service") as service:
        start, look = code("sh", "curl -F").replace("http://localhost:3000", service.url).splitlines()
        started = json.loads(await output("sh", "-c", start.replace("curl", "curl -sS"), cwd=tmp_path))
        assert started["status"] == "started"
        listed = json.loads(await output("sh", "-c", look.replace("curl", "curl -sS"), cwd=tmp_path))
        assert [each["generationId"] for each in listed["generations"]] == [started["generationId"]]


async def generations(service: Running, user: str) -> list[dict[str, str]]:
    answer = await service.http.get("/generations", headers={"X-User-Id": user})
    found: list[dict[str, str]] = answer.json()["generations"]
    return found
