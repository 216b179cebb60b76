"""Runs commands of ``stagecast``: as a process, or in a thread of this one."""

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Final, NamedTuple
from unittest.mock import patch

from aiohttp import web

from api.cli.main import main

STAGECAST: Final = (str(Path(sys.executable).with_name("stagecast")),)

MODULE: Final = (sys.executable, "-m", "api")


class CommandResult(NamedTuple):
    """A process that has ended."""

    code: int
    output: str
    errors: str

    def sentence(self, code: int) -> str:
        """The one sentence that it ended with, and this code. It printed nothing else."""
        assert (self.code, self.output) == (code, ""), self
        assert re.fullmatch(r"stagecast: [^\n]+\n", self.errors), self.errors
        return self.errors


def environment(variables: dict[str, str]) -> dict[str, str]:
    """This process's, of which no setting counts, and these."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("STAGECAST_")}
    return others | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "80"} | variables


async def stagecast(
    *arguments: str | bytes, folder: Path | None = None, program: tuple[str, ...] = STAGECAST, **variables: str
) -> CommandResult:
    """Run a command in a folder without a ``.env`` file."""
    child = await asyncio.create_subprocess_exec(
        *program,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(variables),
        cwd=folder or "/",
    )
    output, errors = await asyncio.wait_for(child.communicate(), 60)
    assert child.returncode is not None
    assert b"Traceback" not in errors, errors.decode()
    return CommandResult(child.returncode, output.decode(), errors.decode())


async def run_main(*arguments: str | bytes, folder: Path | None = None, **variables: str) -> CommandResult:
    """The same in a thread of this process. Not for a ``serve`` that begins: it would not end."""
    output, errors = TextIOWrapper(BytesIO(), "utf-8"), TextIOWrapper(BytesIO(), "utf-8", "backslashreplace")

    def run() -> int:
        try:
            return main([os.fsdecode(argument) for argument in arguments])
        except SystemExit as end:
            return int(end.code or 0)

    with (
        patch.dict(os.environ, environment(variables), clear=True),
        contextlib.chdir(folder or "/"),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        code = await asyncio.wait_for(asyncio.to_thread(run), 60)
    for stream in (output, errors):
        stream.seek(0)
    return CommandResult(code, output.read(), errors.read())


Run = Callable[..., Awaitable[CommandResult]]


#: One that would not begin with a good secret either.
SERVE: Final = ("serve", "--images", "/dev/null/none")


COMMANDS: Final = ("serve", "demo", "check", "migrate", "token", "credit", "list", "cancel", "replay", "watch")


# --- a service that is not there -------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def other_server(serve: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """The URL of a web server that is not Stagecast."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
