"""The page in Debian's Firefox, over WebDriver BiDi, which it speaks by itself."""

import asyncio
import itertools
import json
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest
import websockets

_FIREFOX: Final = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
#: Seconds after which what is waited for counts as hung.
_TIMEOUT: Final = 60

needs_firefox: Final = pytest.mark.skipif(_FIREFOX is None, reason="needs Firefox: install firefox-esr")


class FirefoxTab:
    """One tab. Records the errors in its console."""

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count()
        self.context = ""
        self.errors: list[str] = []

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        identifier = next(self._ids)
        await self._socket.send(json.dumps({"id": identifier, "method": method, "params": params}))
        while True:
            answer = json.loads(await asyncio.wait_for(self._socket.recv(), _TIMEOUT))
            if answer.get("method") == "log.entryAdded" and answer["params"]["level"] == "error":
                self.errors.append(answer["params"]["text"])
            if answer.get("id") == identifier:
                assert answer["type"] == "success", answer
                result: dict[str, Any] = answer["result"]
                return result

    async def _run(self, expression: str) -> dict[str, Any]:
        target = {"context": self.context}
        answer = await self.send("script.evaluate", expression=expression, target=target, awaitPromise=True)
        assert answer["type"] == "success", answer
        result: dict[str, Any] = answer["result"]
        return result

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression: a string, a number or a boolean."""
        return (await self._run(expression)).get("value")

    async def until(self, expression: str, expected: Any = True) -> None:
        """Wait until an expression has this value."""
        async with asyncio.timeout(_TIMEOUT):
            while await self.evaluate(expression) != expected:
                await asyncio.sleep(0.1)

    async def choose(self, selector: str, *files: Path) -> None:
        """Choose files as the user does."""
        element = {"sharedId": (await self._run(f"document.querySelector({selector!r})"))["sharedId"]}
        names = [str(file) for file in files]
        await self.send("input.setFiles", context=self.context, element=element, files=names)

    async def press(self, *keys: str) -> None:
        """Press these keys one after another; a name such as `Ctrl+Enter` holds the first one."""
        special = {"Enter": "\ue007", "Tab": "\ue004", "Ctrl": "\ue009"}
        actions: list[dict[str, str]] = []
        for key in keys:
            codes: Sequence[str] = [special.get(part, part) for part in key.split("+")]
            actions += [{"type": "keyDown", "value": code} for code in codes]
            actions += [{"type": "keyUp", "value": code} for code in reversed(codes)]
        source = {"type": "key", "id": "keyboard", "actions": actions}
        await self.send("input.performActions", context=self.context, actions=[source])


@asynccontextmanager
async def firefox(url: str) -> AsyncIterator[FirefoxTab]:
    """A new Firefox that shows this address."""
    assert _FIREFOX is not None
    with TemporaryDirectory() as profile:
        process = await asyncio.create_subprocess_exec(
            *(_FIREFOX, "--headless", "--remote-debugging-port", "0", "--profile", profile),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            address = None
            while address is None:
                line = (await asyncio.wait_for(process.stderr.readline(), _TIMEOUT)).decode()
                assert line, "Firefox has ended."
                address = re.search(r"WebDriver BiDi listening on (\S+)", line)
            async with websockets.connect(f"{address[1]}/session", max_size=None) as socket:
                tab = FirefoxTab(socket)
                await tab.send("session.new", capabilities={})
                await tab.send("session.subscribe", events=["log.entryAdded"])
                [context] = (await tab.send("browsingContext.getTree"))["contexts"]
                tab.context = context["context"]
                await tab.send("browsingContext.navigate", context=tab.context, url=url, wait="complete")
                yield tab
        finally:
            process.terminate()
            await process.wait()
