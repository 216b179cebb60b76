"""The official JavaScript client, through Node; tests that need it are skipped, loudly, where it is not."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

TESTS: Final = Path(__file__).parent
ROOT: Final = TESTS.parent

_CLIENT: Final = ROOT / "src" / "api" / "static" / "vendor" / "socket.io.min.js"

#: In CI nothing is skipped: what is missing there is a failure.
_CI: Final = "CI" in os.environ

needs_node: Final = pytest.mark.skipif(
    not _CI and (shutil.which("node") is None or not (ROOT / "node_modules" / "jsdom").is_dir()),
    reason="needs Node and the official socket.io-client: install Node and npm, then `make test`",
)

needs_client: Final = pytest.mark.skipif(
    not _CI and not _CLIENT.is_file(), reason="needs the official socket.io-client: install npm, then `make test`"
)


@dataclass
class Script:
    """A running program that prints lines of JSON."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def listen(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            async with self._changed:
                self.lines.append(json.loads(line))
                self._changed.notify_all()

    async def until(self, happened: Callable[[], bool]) -> None:
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(happened), 20)

    def named(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    @property
    def data(self) -> list[dict[str, Any]]:
        """What came with the seed's four events, in order."""
        return [line["data"] for line in self.lines if "data" in line]


@asynccontextmanager
async def seed(url: str, user: int) -> AsyncIterator[Script]:
    """The seed's own JavaScript, not a character of it changed but for the address of the server."""
    snippet = (TESTS / "seed.mjs").read_text()
    assert snippet.count('"http://localhost:3000"') == 1
    process = await asyncio.create_subprocess_exec(
        "node",
        "--import",
        str(TESTS / "seed_prelude.mjs"),
        "--input-type=module",
        "--eval",
        snippet.replace("http://localhost:3000", url),
        cwd=ROOT,
        env={**os.environ, "SEED_USER": str(user)},
        stdout=asyncio.subprocess.PIPE,
    )
    script = Script()
    assert process.stdout is not None
    listening = asyncio.create_task(script.listen(process.stdout))
    try:
        yield script
    finally:
        process.kill()
        await process.wait()
        await listening
