"""The snippets of the README and of the clients' pages, as they stand there, with the connection cut in between."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from api.auth import DEFAULT_USER
from support.browser import PHOTO as CHOSEN
from support.browser import needs_chromium
from support.client_services import served
from support.documents import ROOT, snippet
from support.harness import PHOTO, TIMEOUT, Running, running
from support.javascript_package import project, run
from support.node import needs_node
from support.page import PromptedEditor, QuickComposer
from support.proxy import Proxy

pytestmark = pytest.mark.asyncio(loop_scope="session")

EDITOR: Final = PromptedEditor()
EDIT: Final = "Make the hat red"
#: The percentages of an edit and of a generate.
STEPS: Final = {"edit": [0, 20, 40, 60, 80, 100], "generate": [0, 20, 40, 60, 100]}
needs_curl: Final = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    overrides = {"editor": EDITOR, "composer": QuickComposer()}
    async with running(tmp_path_factory.mktemp("images"), overrides=overrides) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="session")
async def proxy(service: Running) -> AsyncIterator[Proxy]:
    async with Proxy.open(service.port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def installed() -> Iterator[Path]:
    """A project that has the npm package, and a photograph."""
    with project() as folder:
        (folder / "photo.jpg").write_bytes(PHOTO)
        yield folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    return tmp_path


@asynccontextmanager
async def output(*command: str, cwd: Path) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """Runs a program. What is yielded returns what it has printed, once a text is there; "" is its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "clients/python/src"), "PYTHONUNBUFFERED": "1"}
    process = await asyncio.create_subprocess_exec(*command, cwd=cwd, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    stream, printed = process.stdout, bytearray()

    async def until(text: str) -> str:
        async with asyncio.timeout(TIMEOUT):
            while (text.encode() not in printed or not text) and (part := await stream.read(4096)):
                printed.extend(part)
        assert text in printed.decode()
        return printed.decode()

    try:
        yield until
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)  # A client that polls says goodbye: the service would wait for its pong.
        try:
            await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()


def placed(code: str, proxy: Proxy) -> str:
    """The snippet for the service behind the proxy."""
    return code.replace("localhost:3000", f"127.0.0.1:{proxy.port}")


def percentages(printed: str) -> list[int]:
    return [int(found) for found in re.findall(r"(?:^| )(\d+)%", printed, re.MULTILINE)]


async def cut_in_the_middle(proxy: Proxy, prompt: str) -> None:
    """Break all connections while the editor works, and let it go on."""
    pause = EDITOR.pause(prompt)
    await asyncio.wait_for(pause.reached.wait(), TIMEOUT)
    proxy.strike("reset")
    pause.released.set()


@needs_node
@pytest.mark.parametrize(
    ("document", "mark", "prompt"),
    [("README.md", "stagecast-client", EDIT), ("docs/javascript.md", "openAsBlob", EDIT)],
    ids=["readme", "javascript"],
)
async def test_the_module_in_node(
    service: Running, proxy: Proxy, installed: Path, document: str, mark: str, prompt: str
) -> None:
    user = DEFAULT_USER if document == "README.md" else "123"
    before = (await service.get("/me", user))["credit"]
    code = placed(snippet(document, "js", mark), proxy)
    if "const photo" not in code and "openAsBlob" not in code:
        code = 'const photo = await (await import("node:fs")).openAsBlob("photo.jpg");\n' + code
        code += 'stagecast.on("event", ({ status }) => status === "completed" && stagecast.close());\n'
    cutting = asyncio.create_task(cut_in_the_middle(proxy, prompt))
    async with output("node", "--no-warnings", "--input-type=module", "--eval", code, cwd=installed) as printed:
        await cutting
        text = await printed("")
    assert percentages(text) == STEPS["edit"]
    assert (await service.get("/me", user))["credit"] == before - 1


@needs_node
async def test_the_program_in_node_ignores_other_generations(service: Running, proxy: Proxy, installed: Path) -> None:
    other, own = EDITOR.pause("A quiet sea"), EDITOR.pause(EDIT)
    await service.start("123", kind="generate", prompt="A quiet sea")
    await asyncio.wait_for(other.reached.wait(), TIMEOUT)
    code = placed(snippet("docs/javascript.md", "js", "openAsBlob"), proxy)
    async with output("node", "--no-warnings", "--input-type=module", "--eval", code, cwd=installed) as printed:
        await asyncio.wait_for(own.reached.wait(), TIMEOUT)
        await printed("60%")
        other.released.set()
        async with asyncio.timeout(TIMEOUT):
            while (await service.get("/generations?status=active", "123"))["generations"][1:]:
                await asyncio.sleep(0.02)
        own.released.set()
        text = await printed("")
    [edit, *_] = (await service.get("/generations", "123"))["generations"]
    assert percentages(text) == STEPS["edit"]
    assert text.splitlines()[-1] == edit["editedImageUrl"]


@needs_node
async def test_the_official_client(service: Running, proxy: Proxy, installed: Path) -> None:
    code = placed(snippet("docs/socket-io.md", "js", "socket.io-client"), proxy)
    code = code.replace("// const photo =", "const photo =")
    code += 'socket.on("generation_completed", () => socket.close());\n'
    pause = EDITOR.pause(EDIT)
    async with output("node", "--no-warnings", "--input-type=module", "--eval", code, cwd=installed) as printed:
        await printed("60%")  # Socket.IO sends `authenticate` only once.
        proxy.strike("reset")
        pause.released.set()
        text = await printed("")
    [generation, *_] = (await service.get("/generations", "123"))["generations"]
    assert text.startswith(f"{generation['generationId']} started\n20% ")
    assert percentages(text) == STEPS["edit"][1:-1]
    assert text.endswith(f"{generation['editedImageUrl']}\n")


@needs_chromium
async def test_the_page_without_a_build_step(proxy: Proxy, browser: Browser, folder: Path) -> None:
    (folder / "index.html").write_text(placed(snippet("docs/javascript.md", "html"), proxy))
    cutting = asyncio.create_task(cut_in_the_middle(proxy, EDIT))
    with served(folder) as origin:
        page = await browser.new_page()
        await page.goto(origin)
        await page.set_input_files("input[type=file]", [CHOSEN])
        await page.click("text=Start")
        await cutting
        await expect(page.locator("li").first).to_have_text("100% Image editing completed successfully!")
        await page.close()


@needs_node
async def test_the_react_application_is_right_for_typescript(installed: Path) -> None:
    (installed / "App.tsx").write_text(snippet("docs/react.md", "tsx"))
    options = "--noEmit --strict --jsx react-jsx --target es2022 --lib es2022,dom --types react --module esnext"
    command = ["node", "node_modules/typescript/bin/tsc", *options.split(), "--moduleResolution", "bundler", "App.tsx"]
    await asyncio.to_thread(run, command, installed)


@pytest.mark.parametrize(
    ("document", "mark", "kind", "prompt"),
    [
        ("README.md", "run(", "edit", EDIT),
        ("docs/python.md", "GenerationFailed", "edit", EDIT),
        ("docs/python.md", "AsyncStagecast", "generate", "A quiet sea"),
    ],
    ids=["readme", "run", "async"],
)
async def test_the_python_package(
    service: Running, proxy: Proxy, folder: Path, document: str, mark: str, kind: str, prompt: str
) -> None:
    cutting = asyncio.create_task(cut_in_the_middle(proxy, prompt))
    async with output(sys.executable, "-c", placed(snippet(document, "python", mark), proxy), cwd=folder) as printed:
        await cutting
        text = await printed("")
    if "Async" in mark:  # The states that were missed are not shown.
        assert set(percentages(text)) <= set(STEPS[kind])
        assert percentages(text)[-1] == 100
    elif document == "README.md":  # It prints the messages alone.
        assert len(text.splitlines()) == len(STEPS[kind]) + 1
    else:
        assert percentages(text) == STEPS[kind]
    user = DEFAULT_USER if document == "README.md" else "123"  # The page next to the README's snippets shows that one.
    [generation, *_] = (await service.get("/generations", user))["generations"]
    assert generation["message"] in text
    assert kind == "generate" or text.splitlines()[-1] == generation["editedImageUrl"]


@pytest.mark.parametrize(
    ("document", "mark"),
    [
        pytest.param("docs/python.md", "import socketio", id="python-socketio"),
        pytest.param("docs/other-clients.md", "import websockets", id="websocket"),
    ],
)
async def test_clients_that_only_listen(service: Running, proxy: Proxy, folder: Path, document: str, mark: str) -> None:
    code = placed(snippet(document, "python", mark), proxy)
    delay = "__import__('time').sleep((100 - data.get('progress', 100)) / 200)"  # Earlier events take longer.
    code = code.replace('    print(f"{name}', f'    {delay}\n    print(f"{{name}}')
    async with output(sys.executable, "-c", code, cwd=folder) as printed:
        await printed("authenticated")
        pause = EDITOR.pause(EDIT)
        await service.start("123", prompt=EDIT)
        await asyncio.wait_for(pause.reached.wait(), TIMEOUT)
        if "websockets" in mark:  # The other one polls, and sends no cursor: it may miss the rest.
            proxy.strike("reset")
        pause.released.set()
        text = await printed("generation_completed 100")
    found = [int(number) for number in re.findall(r"(?:continue|generation_\w+) (\d+)", text)]
    assert found == STEPS["edit"], "each event comes once, in order"


@needs_curl
async def test_the_curl_commands_of_the_readme(service: Running, folder: Path) -> None:
    start, watch = snippet("README.md", "sh", "curl -F").replace("http://localhost:3000", service.url).splitlines()
    pause = EDITOR.pause(EDIT)
    async with output("sh", "-c", watch.replace("curl", "exec curl -s"), cwd=folder) as printed:
        await printed("event: authenticated")
        started = await asyncio.to_thread(run, ["sh", "-c", start.replace("curl", "curl -sS")], folder)
        assert '"status":"started"' in started
        pause.released.set()
        text = await printed("event: generation_completed")
    assert [text.count(f"event: {name}\n") for name in ("generation_started", "continue", "generation_completed")] == [
        1,
        4,
        1,
    ]
