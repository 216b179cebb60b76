"""A service under attack: hostile requests, and a bystander who must not notice."""

import asyncio
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest

from adapters.system import now
from adapters.tokens.jwt_tokens import SecretKey, Tokens
from support.harness import JSON, PHOTO, Phone, Running, running
from support.log_lines import debug_log

SECRET: Final = "correct-horse-battery-staple-0123456789"

MEGABYTE: Final = 1024 * 1024

CRLF: Final = b"\r\n"

FORM: Final = "multipart/form-data; boundary=B"

#: Seconds after which something hangs, and is not slow: what is decoded stands back behind all others on a machine.
TIMEOUT: Final = 60

LINUX: Final = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def token(user: str, *, service: bool = False) -> str:
    return Tokens(SecretKey(SECRET.encode()), clock=now).issue(user, service=service, ttl=timedelta(hours=1))


def part(name: str, content: bytes, file: bytes | None = None, *headers: bytes) -> bytes:
    name_of_file = b"" if file is None else b'; filename="' + file + b'"'
    disposition = b'Content-Disposition: form-data; name="' + name.encode() + b'"' + name_of_file
    return CRLF.join((disposition, *headers, b"", content))


def form(*parts: bytes, boundary: bytes = b"B") -> bytes:
    line = b"--" + boundary
    return b"".join(line + CRLF + each + CRLF for each in parts) + line + b"--" + CRLF


PROMPT: Final = part("prompt", b"a red hat")

FILE: Final = part("images", PHOTO, b"a.jpg")

GOOD: Final = form(PROMPT, FILE)


@dataclass
class AttackedService:
    """A service, mallory who attacks it, and bob who watches his own generations."""

    service: Running
    temp: Path
    images: Path
    bob: Phone
    headers: dict[str, dict[str, str]]
    #: How many generations of bob's have been watched.
    watched: int = 0
    over: bool = False
    watching: asyncio.Task[None] = field(init=False)

    async def send(
        self, content: bytes | AsyncIterator[bytes], content_type: str = FORM, *, kind: str = "edit", **headers: str
    ) -> httpx2.Response:
        headers = {"Content-Type": content_type, **self.headers["mallory"], **headers}
        path = f"/generations/{kind}"
        return await self.service.http.post(path, content=content, headers=headers, timeout=TIMEOUT)

    async def outcome(self, content: bytes, content_type: str = FORM, **rest: Any) -> str:
        """The status, and the code of a problem: as a table of expectations has it."""
        return outcome(await self.send(content, content_type, **rest))

    def connect(self) -> "RawUpload":
        return RawUpload(self)

    async def watch(self) -> None:
        """One generation of bob's, whose device is sent all of it."""
        headers = {"Content-Type": FORM, **self.headers["bob"]}
        answer = await self.service.http.post("/generations/generate", content=GOOD, headers=headers, timeout=TIMEOUT)
        assert answer.status_code == 202, answer.text
        generation_id = answer.json()["generationId"]
        await self.bob.until_over(generation_id)
        assert self.bob.sequences(generation_id) == list(range(1, len(self.bob.of(generation_id)) + 1))
        self.watched += 1

    async def keep_watching(self) -> None:
        # However long it takes, bob's credit lasts.
        while not self.over and self.watched < 80:
            await self.watch()
            await asyncio.sleep(0.5)

    async def aftermath(self, *, accepted: int = 0) -> None:
        """What has to hold when `accepted` of mallory's requests were."""
        self.over = True
        await self.watching
        await self.watch()
        async with asyncio.timeout(TIMEOUT):
            await self.service.service.leases.drain()
        for path in ("/health/live", "/health/ready"):
            assert (await self.service.http.get(path)).status_code == 200
        account = (await self.service.http.get("/me", headers=self.headers["mallory"])).json()
        page = await self.service.http.get("/generations?limit=100", headers=self.headers["mallory"])
        generations = page.json()["generations"]
        assert len(generations) == accepted
        assert account["credit"] == 100 - sum(each["status"] == "completed" for each in generations)
        log = self.service.service.log
        sent = b""
        for user in ("mallory", "bob"):
            feed = await log.feed(user, after=0, anchor=0, limit=100_000)
            sent += b"".join(entry.event or b"" for entry in feed.entries)
        files = [path for path in self.images.rglob("*/*") if path.is_file()]
        assert [path for path in files if path.name.encode() not in sent] == []
        await self.service.until(lambda: [*self.temp.iterdir(), *self._open()] == [])

    def _open(self) -> list[str]:
        """The temporary files that have no name any more, but are held open."""
        if sys.platform != "linux":
            return []
        found = []
        for descriptor in Path("/proc/self/fd").iterdir():
            try:
                target = descriptor.readlink()
            except OSError:
                continue
            if target.is_relative_to(self.temp):
                found.append(str(target))
        return found


class RawUpload:
    """One bare connection, for what no client would send."""

    def __init__(self, attacked: AttackedService) -> None:
        self._attacked = attacked

    async def __aenter__(self) -> "RawUpload":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._attacked.service.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def head(self, *headers: str, user: str | None = "mallory", path: str = "/generations/edit") -> None:
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {FORM}", *headers]
        if user is not None:
            lines += [f"{name}: {value}" for name, value in self._attacked.headers[user].items()]
        await self.send("\r\n".join([*lines, "", ""]).encode())

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def answer(self) -> str:
        """The outcome of the next answer."""
        async with asyncio.timeout(TIMEOUT):
            status = int((await self.reader.readline()).split()[1])
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            body = await self.reader.readexactly(int(length[1])) if length else b""
        problem = b"application/problem+json" in head
        return f"{status} {json.loads(body)['code']}" if problem else str(status)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def outcome(answer: httpx2.Response) -> str:
    if answer.status_code == 202:
        return "202"
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert len(answer.content) < 20_000
    return f"{answer.status_code} {problem['code']}"


@asynccontextmanager
async def attacked_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, key: bool = False
) -> AsyncIterator[AttackedService]:
    temp, images = tmp_path / "temp", tmp_path / "images"
    temp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    settings: JSON = {"jwt_secret": SECRET} if key else {}
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(debug_log(str(tmp_path)))
        service = await stack.enter_async_context(running(images, **settings))
        headers = {user: {"X-User-Id": user} for user in ("mallory", "bob")}
        if key:
            headers = {user: {"Authorization": f"Bearer {token(user)}"} for user in headers}
            # For what the harness asks in the end.
            service.http.headers["Authorization"] = f"Bearer {token('harness', service=True)}"
        async with service.phone() as bob:
            await bob.authenticate("bob", **({"token": token("bob")} if key else {}))
            attacked = AttackedService(service, temp, images, bob, headers)
            attacked.watching = asyncio.create_task(attacked.keep_watching())
            try:
                yield attacked
            finally:
                attacked.over = True
                await attacked.watching


Table = dict[str, tuple[str, Awaitable[str]]]


async def expect(table: Table) -> int:
    """Every attack ends as the table says. Return how many were accepted."""
    got = {name: await attack for name, (_, attack) in table.items()}
    assert got == {name: expected for name, (expected, _) in table.items()}
    return list(got.values()).count("202")


async def served(attacked: AttackedService, generation_id: str) -> list[httpx2.Response]:
    """Everything that is served of a generation, once it has ended."""
    await attacked.service.service.leases.drain()
    path = f"/generations/{generation_id}/events"
    history = await attacked.service.http.get(path, headers=attacked.headers["mallory"])
    assert history.json()["status"] == "completed", history.text
    assert b"SECRET" not in history.content
    names = set(re.findall(rb"/images/[^\"]+", history.content))
    assert len(names) >= 2
    return [await attacked.service.http.get(name.decode()) for name in names]
