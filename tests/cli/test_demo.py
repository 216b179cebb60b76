"""``stagecast demo``, as somebody meets it who has just installed Stagecast: a process, and what it shows."""

import asyncio
import fcntl
import os
import pty
import re
import signal
import socket
import struct
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import pytest
from PIL import Image

from api.cli.main import main
from api.settings import describe_settings
from domain.stages import FLOWS
from support.command_line import MODULE, stagecast
from support.guarded import SECRET
from support.harness import JSON

DEMO: Final = ("demo", "--local-seconds", "0")
PATH: Final = os.pathsep
STAGES: Final = [status for status in FLOWS["edit"] if status != "failed"]

#: Python imports this first. It notes whatever is connected to and looked up.
WATCHMAN: Final = """
import os, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        with open(os.environ["WATCHED"], "a") as file:
            print(address if isinstance(address, str) else address[0], file=file)

sys.addaudithook(note)
"""


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where it puts what it needs for itself."""
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def hostile(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Everything that is meant for another service, or for a provider that takes money."""
    for setting in describe_settings():
        if setting.variable not in ("STAGECAST_LOCAL_SECONDS", "STAGECAST_DEADLINE"):
            yield setting.variable, "nonsense"
    yield "STAGECAST_JWT_SECRET", SECRET
    yield "STAGECAST_IMAGES", str(tmp_path / "images")
    for name in ("OPENAI_API_KEY", "REPLICATE_API_TOKEN"):
        yield name, "sk-secret"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        yield name, "http://proxy.invalid:9"


async def test_the_demo_completes_an_edit_whatever_is_set_for_other_commands(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCHMAN)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "theirs.jpg").write_text("a picture of another service")
    (tmp_path / ".env").write_text("STAGECAST_CREDITS=0\nSTAGECAST_RETENTION=0.001\n")
    watched = tmp_path / "watched"
    variables: JSON = {"TMPDIR": str(scratch), "PYTHONPATH": PATH.join([str(tmp_path), *sys.path])}
    variables |= {"WATCHED": str(watched), "FORCE_COLOR": "1", **dict(hostile(tmp_path))}
    done = await stagecast(*DEMO, folder=tmp_path, program=MODULE, **variables)
    assert (done.code, done.errors) == (0, "")

    assert set(watched.read_text().split()) == {"127.0.0.1"}
    assert names(tmp_path / "images") == {"theirs.jpg"}
    assert names(scratch) == set()

    assert "\x1b" not in done.output
    assert "sk-secret" not in done.output
    assert "editor: local, face swap: local" in done.output
    lines = re.findall(r"^ *(\d+) %  (\w+) +(.+)$", done.output, re.MULTILINE)
    assert lines == [(str(FLOWS["edit"][status].progress), status, FLOWS["edit"][status].message) for status in STAGES]
    assert f"{len(STAGES)} events in " in done.output
    assert 'To go on:     "make run", then open http://localhost:3000\n' in done.output
    folder = tmp_path / "var" / "demo"
    [path, url] = re.findall(r"\S+face-swapped\.jpg", done.output)
    assert (path, url) == (str(folder / "face-swapped.jpg"), (folder / "face-swapped.jpg").as_uri())
    pictures = {name: picture(folder / f"{name}.jpg") for name in ("composition", "edited", "face-swapped")}
    assert names(folder) == {f"{name}.jpg" for name in pictures}
    assert pictures["edited"].size == pictures["face-swapped"].size == (1024, 1536)
    assert pictures["edited"].tobytes() != pictures["face-swapped"].tobytes()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


# --- in a terminal ---------------------------------------------------------------------------------------


class Terminal:
    """The process, and all that it has written."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader) -> None:
        self.process = process
        self.reader = reader
        self.written = ""

    async def until(self, text: str) -> None:
        async with asyncio.timeout(60):
            while text not in self.written:
                await self._read()

    async def ended(self) -> int:
        async with asyncio.timeout(60):
            while await self._read():
                pass
            return await self.process.wait()

    async def _read(self) -> bytes:
        data = b""
        with suppress(OSError):  # That is how Linux says that the other side has closed.
            data = await self.reader.read(65536)
        self.written += data.decode(errors="replace")
        return data


@asynccontextmanager
async def terminal(
    scratch: Path, *arguments: str, size: tuple[int, int] = (24, 80), **variables: str
) -> AsyncIterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("STAGECAST_", "NO_COLOR"))}
    plain |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "TMPDIR": str(scratch), "PYTHONIOENCODING": "utf-8"}
    process = await asyncio.create_subprocess_exec(
        *MODULE, "demo", "--folder", str(scratch.parent / "kept"), *arguments,
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=scratch, env=plain | variables,
    )  # fmt: skip
    os.close(theirs)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", buffering=0)
    )
    try:
        yield Terminal(process, reader)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        transport.close()


def left_alone(terminal: Terminal) -> None:
    """The cursor is there again, and no trace of a fault."""
    assert terminal.written.rfind("\x1b[?25h") > terminal.written.rfind("\x1b[?25l") >= 0
    assert "Traceback" not in terminal.written


async def test_a_terminal_shows_a_progress_bar_and_where_the_picture_is(scratch: Path) -> None:
    async with terminal(scratch, "--local-seconds", "0.3") as shown:
        assert await shown.ended() == 0
    left_alone(shown)
    # Between 0 and 100 % the bar has both of its colours.
    assert re.search(r"\x1b\[36m━+\x1b\[0m.*\x1b\[38;5;237m━", shown.written)
    percentages = [int(number) for number in re.findall(r"(\d+) %", shown.written)]
    assert percentages == sorted(percentages)
    assert (percentages[0], percentages[-1]) == (0, 100)
    assert len(set(percentages)) > 4
    for status in STAGES:
        assert re.search(rf"✔\S* {status} +", shown.written), status
    assert str(scratch.parent / "kept" / "face-swapped.jpg") in shown.written


async def test_a_failure_exits_with_1_and_one_sentence_that_respects_no_color(
    scratch: Path,
) -> None:
    async with terminal(scratch, NO_COLOR="1", STAGECAST_DEADLINE="0.001") as shown:
        assert await shown.ended() == 1
    left_alone(shown)
    assert "━" in shown.written
    assert "✘" in shown.written
    assert not re.search(r"\x1b\[[\d;]*\b[34]\d\b[\d;]*m", shown.written)
    sent = shown.written[shown.written.rfind("\x1b[?25h") :].removeprefix("\x1b[?25h")
    assert sent == "stagecast: The generation took too long and was stopped. Please try again.\r\n"


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
async def test_the_demo_can_be_interrupted_and_leaves_nothing_behind(scratch: Path, stop: signal.Signals) -> None:
    async with terminal(scratch, "--local-seconds", "60") as shown:
        await shown.until("OpenAI image editing started...")
        shown.process.send_signal(stop)
        assert await shown.ended() == 130
    left_alone(shown)
    assert names(scratch) == set()


# --- what can be wrong -----------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's ``.env`` and no variable counts."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("STAGECAST_"):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("alone")
def test_the_demo_exits_with_3_if_the_port_is_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 3
    assert capsys.readouterr() == ("", f"stagecast: port {port} is taken; choose another with --port.\n")
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--folder", "/dev/null/x"], "--folder"),
        (["--editor", "nonsense"], "STAGECAST_EDITOR"),
        (["--port", "-1"], "STAGECAST_PORT"),
        (["--local-seconds", "soon"], "STAGECAST_LOCAL_SECONDS"),
    ],
)
def test_the_demo_exits_with_2_for_invalid_settings(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(rf"stagecast: {named} must be [^\n]+\n", errors)


async def test_the_demo_exits_if_its_output_pipe_is_closed(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *MODULE, *DEMO, stdout=writing, stderr=asyncio.subprocess.PIPE, cwd=tmp_path
    )
    os.close(writing)
    os.close(reading)
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, errors.decode()) == (141, "")
