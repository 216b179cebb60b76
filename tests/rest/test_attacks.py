"""Hostile requests against the real service: refused as documented, and nothing is left of them.

Each test ends in `AttackedService.aftermath`: nothing in the folders, no credit spent, health answers, and a device of
another user has had its events all the while.
"""

import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from adapters.serving.http_protocol import HttpProtocol
from api.rest.forms import MAX_BODY
from support.attacks import (
    CRLF,
    FILE,
    FORM,
    GOOD,
    LINUX,
    MEGABYTE,
    PROMPT,
    SECRET,
    TIMEOUT,
    AttackedService,
    RawUpload,
    Table,
    expect,
    form,
    names_in,
    outcome,
    part,
    served,
    token,
)
from support.harness import JSON, PHOTO


async def test_line_breaks_in_a_part_are_not_copied_to_headers(attacked: AttackedService) -> None:
    inject = b"X\r\nSet-Cookie: stolen=1\r\nLocation: http://evil.example/"
    for content in (
        form(PROMPT, part("images", PHOTO, inject)),
        form(part("prompt", inject), FILE),
        form(PROMPT, FILE, part("quality", inject)),
        form(PROMPT, FILE, b'Content-Disposition: form-data; name="' + inject + b'"\r\n\r\nx'),
    ):
        answer = await attacked.send(content)
        assert answer.status_code in (202, 400, 422)
        assert "set-cookie" not in answer.headers
        assert "evil" not in answer.headers.get("location", "")
        shown = answer.json().get("input", {}).pop("prompt", "")  # Its owner's text, and in JSON.
        assert "stolen" not in answer.text.replace(json.dumps(shown)[1:-1], "")
    await attacked.aftermath(accepted=2)


# --- forms -------------------------------------------------------------------------------------------------


async def test_malformed_multipart_is_rejected(attacked: AttackedService) -> None:
    bad, unsupported, invalid = "400 bad_request", "415 unsupported_media_type", "422 invalid_request"
    large = "413 content_too_large"
    inner = b"Content-Type: multipart/mixed; boundary=C\r\n" + CRLF + form(FILE, boundary=b"C")
    table = {
        "1,001 files": (large, form(PROMPT, *[part("images", b"x", b"a")] * 1_001), FORM),
        "1,001 fields": (large, form(FILE, *[part("prompt", b"x")] * 1_001), FORM),
        "1,001 unknown fields": (large, form(FILE, *(part(f"f{n}", b"x") for n in range(1_001))), FORM),
        "1,000 unknown fields": (invalid, form(*(part(f"f{n}", b"x") for n in range(1_000))), FORM),
        "six files": (invalid, form(PROMPT, *[FILE] * 6), FORM),
        "a form in a form": (invalid, form(PROMPT, part("images", form(FILE, boundary=b"C"))), FORM),
        "a form in a part": (invalid, form(PROMPT, b'Content-Disposition: form-data; name="images"\r\n' + inner), FORM),
        "a part that names nothing": (bad, form(PROMPT, b"Content-Type: image/png\r\n\r\nx"), FORM),
        "a part with 9 headers": (bad, form(PROMPT, part("images", PHOTO, b"a", *[b"X: y"] * 9)), FORM),
        "a header of 10 kB": (bad, form(PROMPT, part("images", PHOTO, b"a", b"X: " + b"y" * 10_000)), FORM),
        "a header without a name": (bad, form(PROMPT, part("images", PHOTO, b"a", b": y")), FORM),
        "a header of 3 kB": (bad, form(PROMPT, part("images", PHOTO, b'a"' + b';"' * 1_500)), FORM),
        "three texts of over 1 MB": (large, form(FILE, *[part("prompt", b"x" * 400_000)] * 3), FORM),
        "a hundred JSON texts": (large, form(FILE, *[part("prompt", b"[" + b"[]," * 100_000 + b"[]]")] * 100), FORM),
        "a field of over 1 MB": (large, form(part("prompt", b"x" * (MEGABYTE + 1)), FILE), FORM),
        "a name that is not UTF-8": (
            invalid,
            form(PROMPT, FILE, b'Content-Disposition: form-data; name="\xff\xed\xa0\x80"\r\n\r\nx'),
            FORM,
        ),
        "no boundary": (bad, GOOD, "multipart/form-data"),
        "an empty boundary": (bad, GOOD, "multipart/form-data; boundary="),
        "another boundary": (bad, GOOD, "multipart/form-data; boundary=C"),
        "two boundaries": (bad, GOOD, "multipart/form-data; boundary=B; boundary=C"),
        "an extended boundary": (bad, GOOD, "multipart/form-data; boundary*=utf-8''B"),
        "a boundary of 300": (
            bad,
            form(PROMPT, FILE, boundary=b"B" * 300),
            "multipart/form-data; boundary=" + "B" * 300,
        ),
        "a boundary of 2,000": (bad, GOOD, "multipart/form-data; boundary=" + "B" * 2_000),
        "a content type of 50 kB": (bad, GOOD, FORM + ';"' * 25_000),
        "another charset": (unsupported, GOOD, FORM + "; charset=utf-7"),
        "a list of media types": (unsupported, GOOD, "multipart/form-data, text/plain; boundary=B"),
        "urlencoded": (unsupported, b"prompt=x&images=y", "application/x-www-form-urlencoded"),
        "mixed": (unsupported, GOOD, "multipart/mixed; boundary=B"),
        "JSON": (unsupported, b"[" * 100_000, "application/json"),
        "nothing": (bad, b"", FORM),
        "only the end": (invalid, b"--B--\r\n", FORM),
        "line breaks alone": (bad, b"\r\n" * MEGABYTE, FORM),
    }
    begun = time.process_time()
    attacks: Table = {
        name: (expected, attacked.outcome(body, content_type)) for name, (expected, body, content_type) in table.items()
    }
    assert await expect(attacks) == 0
    assert time.process_time() - begun < 20
    await attacked.aftermath()


async def test_a_truncated_form_is_rejected(attacked: AttackedService) -> None:
    whole = form(PROMPT, FILE, part("faceSwap", b"false"), part("quality", b"low"))
    end = len(b"--\r\n")
    cuts = [0, 1, 3, 20, 60, 90, 150, 300, *range(len(whole) - 190, len(whole) - end + 2, 6), len(whole) - end]
    for cut in cuts:
        assert await attacked.outcome(whole[:cut]) == "400 bad_request", whole[max(0, cut - 30) : cut]
    # What only follows the end need not be there.
    assert await attacked.outcome(whole[:-2]) == "202"
    await attacked.aftermath(accepted=1)


async def test_json_in_fields_is_bounded(attacked: AttackedService) -> None:
    digits = b"9" * 5_000
    url = b"http://127.0.0.1:1/a.png"
    table = {
        "deep": ("metadata", b'{"a":' * 500 + b"1" + b"}" * 500),
        "very deep": ("metadata", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "an unclosed depth": ("metadata", b"[" * 900_000),
        "a number of 5,000 digits": ("metadata", b'{"a":' + digits + b"}"),
        "a number out of bounds": ("metadata", b'{"a":1e99999}'),
        "a long fraction": ("metadata", b'{"a":0.' + digits + b"e-99999" + b"1" * 2_000 + b"}"[:0]),
        "not a number": ("metadata", b'{"a":NaN}'),
        "a lone surrogate": ("metadata", b'{"a":"\\udc00"}'),
        "a lone surrogate in a key": ("metadata", b'{"\\ud800":1}'),
        "an unfinished escape": ("metadata", b'{"a":"\\u00'),
        "a bare control character": ("metadata", b'{"a":"\0"}'),
        "not UTF-8": ("metadata", b'{"a":"\xed\xa0\x80"}'),
        "two": ("metadata", b"{}{}"),
        "a byte order mark": ("metadata", b"\xef\xbb\xbf{}"),
        "1 MB of spaces": ("metadata", b" " * 1_000_000),
        "1 MB of keys": ("metadata", b"{" + b",".join(b'"%d":0' % n for n in range(100_000)) + b"}"),
        "half a million URLs": ("imageUrls", b"[" + b"1," * 500_000 + b"1]"),
        "deep URLs": ("imageUrls", b"[" * 900_000),
        "a list of lists": ("imageUrls", b"[[[[[]]]]]"),
        "a URL with a NUL": ("imageUrls", b'["http://a\\u0000/"]'),
        "a URL with a line break": ("imageUrls", b'["http://a/\\r\\nHost: b"]'),
        "a URL with a surrogate": ("imageUrls", b'["http://a/\\ud800"]'),
        "a URL of a file": ("imageUrls", b'["file:///etc/passwd"]'),
        "a URL of 1 MB": ("imageUrls", b"http://" + b"a" * 1_000_000),
        "an array of 70 kB": ("imageUrls", b"[" + b" " * 70_000 + b"]"),
        "a URL that ends in a space": ("imageUrls", b"http://" + b"a" * 2_030 + b" "),
        "six URLs": ("imageUrls", b"[" + b",".join([b'"' + url + b'"'] * 6) + b"]"),
    }
    attacks: Table = {}
    for name, (where, value) in table.items():
        expected = "422 invalid_request"
        if name == "not UTF-8":
            expected = "202"  # Bytes that are no UTF-8 are read as Latin-1, as Starlette does.
        attacks[name] = expected, attacked.outcome(form(PROMPT, FILE, part(where, value)))
    begun = time.process_time()
    accepted = await expect(attacks)
    assert time.process_time() - begun < 20
    await attacked.aftermath(accepted=accepted)


async def test_unusual_valid_texts_are_returned_unchanged(attacked: AttackedService) -> None:
    odd: JSON = {"a\0b": "\0\x1b[2J\u202e\U0001f600", "huge": int("9" * 1_900), "": [[[]]], "__proto__": {"x": 1}}
    for prompt, metadata, received in (
        ("\U0001f600" * 4_000, json.dumps(odd), odd),
        ("".join(map(chr, range(1, 32))) + "\x7f\x85\u2028\ufeff\ufffe", '{"a": 1, "a": 2}', {"a": 2}),
        ("{{7*7}}${jndi:ldap://a}' OR 1=1--<script>", '{"a": -0.0, "b": 1e308}', {"a": -0.0, "b": 1e308}),
    ):
        answer = await attacked.send(form(part("prompt", prompt.encode()), FILE, part("metadata", metadata.encode())))
        assert answer.status_code == 202, answer.text
        assert answer.json()["metadata"] == received
        assert len(await served(attacked, answer.json()["generationId"])) >= 2
    for prompt in ("\U0001f600" * 4_001, "x" * 1_000_000, "\0", "a\0b"):
        assert await attacked.outcome(form(part("prompt", prompt.encode()), FILE)) == "422 invalid_request"
    await attacked.aftermath(accepted=3)


# --- the wire ----------------------------------------------------------------------------------------------


async def test_a_wrong_length_starts_nothing(attacked: AttackedService) -> None:
    async with attacked.connect() as short:
        await short.head(f"Content-Length: {len(GOOD) - 20}")
        await short.send(GOOD)
        # The rest is taken for another request, which is refused before this one is read.
        assert await short.answer() == "400 bad_request"
    async with attacked.connect() as long:
        await long.head(f"Content-Length: {len(GOOD) + 20}")
        await long.send(GOOD)
        long.writer.write_eof()
        async with asyncio.timeout(TIMEOUT):
            assert await long.reader.read() == b""
    for lengths in (
        ["Content-Length: -1"],
        ["Content-Length: 1e3"],
        [f"Content-Length: {2**70}"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked, identity"],
    ):
        async with attacked.connect() as wrong:
            await wrong.head(*lengths)
            await wrong.send(b"0\r\n\r\n")
            assert (await wrong.answer())[0] == "4"
    for broken in (b"zz\r\n", b"-1\r\n", b"fffffffffffffffff\r\n"):
        async with attacked.connect() as chunked:
            await chunked.head("Transfer-Encoding: chunked")
            await chunked.send(broken)
            assert (await chunked.answer())[0] == "4"
    await attacked.aftermath()


async def test_an_upload_that_breaks_off_leaves_nothing(attacked: AttackedService) -> None:
    upload = form(PROMPT, part("images", bytes(5 * MEGABYTE), b"a"))
    for sent in (10, 100, 1_000, 2 * MEGABYTE, len(upload) - 1):
        async with attacked.connect() as wire:
            await wire.head(f"Content-Length: {len(upload)}")
            await wire.send(upload[:sent])
            await asyncio.sleep(0.05)
    await attacked.aftermath()


async def test_slow_uploads_do_not_block_other_requests(attacked: AttackedService) -> None:
    async def drip(wire: RawUpload) -> None:
        await wire.head(f"Content-Length: {len(GOOD)}")
        for at in range(40):
            await wire.send(GOOD[at : at + 1])
            await asyncio.sleep(0.05)

    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(attacked.connect()) for _ in range(50)]
        # Bob's generation is begun and watched to its end meanwhile.
        await asyncio.gather(attacked.watch(), *map(drip, wires))
        await asyncio.gather(*(wire.send(GOOD[40:]) for wire in wires[:3]))
        assert [await wire.answer() for wire in wires[:3]] == ["202"] * 3
    await attacked.aftermath(accepted=3)


async def test_a_body_without_a_length_is_cut_at_the_first_byte_beyond_the_limit(attacked: AttackedService) -> None:
    head = b'--B\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    async with attacked.connect() as wire:
        await wire.head("Transfer-Encoding: chunked")
        await wire.chunk(head)
        left = MAX_BODY - len(head)
        while left:
            size = min(left, MEGABYTE)
            await wire.chunk(bytes(size))
            left -= size
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wire.reader.readexactly(1), 1)
        await wire.chunk(b"x")
        assert await wire.answer() == "413 content_too_large"
    await attacked.aftermath()


async def test_tiny_parts_are_refused_at_the_first_over_the_limit(attacked: AttackedService) -> None:
    one = b"--B\r\n" + PROMPT + CRLF
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(60):
            yield one * (MEGABYTE // len(one))
            sent += 1

    assert outcome(await attacked.send(endless())) == "413 content_too_large"
    await attacked.aftermath()


@pytest.mark.parametrize("length", [True, False])
async def test_a_request_without_a_token_is_refused_before_its_body_is_read(
    locked: AttackedService, monkeypatch: pytest.MonkeyPatch, length: bool
) -> None:
    consumed = 0
    take = HttpProtocol.data_received

    def count(self: HttpProtocol, data: bytes) -> None:
        nonlocal consumed
        consumed += len(data) if b"\0" * 100 in data else 0
        take(self, data)

    monkeypatch.setattr(HttpProtocol, "data_received", count)
    begin = form(PROMPT, part("images", b"", b"a"))[:-9]
    async with locked.connect() as wire:
        await wire.head(f"Content-Length: {100 * MEGABYTE}" if length else "Transfer-Encoding: chunked", user=None)
        send = wire.send if length else wire.chunk
        await send(begin)
        answer = asyncio.create_task(wire.answer())
        sent = 0
        while not answer.done() and sent < 100 * MEGABYTE:
            await send(bytes(65_536))
            sent += 65_536
            await asyncio.sleep(0)
        assert await answer == "401 unauthenticated"
    assert 0 < consumed < MEGABYTE
    await locked.aftermath()


async def test_an_invalid_token_is_rejected(locked: AttackedService) -> None:
    for credential in ("Bearer x", "Bearer " + "a" * 60_000, "Basic YTpi", "Bearer \xff", "bearer"):
        async with locked.connect() as wire:
            await wire.head(f"Content-Length: {100 * MEGABYTE}", f"Authorization: {credential}", user=None)
            assert (await wire.answer()).startswith("401 "), credential[:20]
    await locked.aftermath()


async def test_100_mb_with_a_token_are_refused_by_their_length(locked: AttackedService) -> None:
    async with locked.connect() as wire:
        await wire.head(f"Content-Length: {100 * MEGABYTE}")
        assert await wire.answer() == "413 content_too_large"
    await locked.aftermath()


async def test_an_endless_request_head_is_rejected(locked: AttackedService) -> None:
    for line in (b"X-A: " + b"a" * 60_000, b"X-A: a\r\n" * 7_000):
        async with locked.connect() as wire:
            answer = b""
            # Who is hung up on while still sending may not come to read why.
            async with asyncio.timeout(TIMEOUT):
                with contextlib.suppress(ConnectionError):
                    await wire.send(b"GET /me HTTP/1.1\r\nHost: localhost\r\n")
                    for _ in range(20):
                        await wire.send(line)
                    answer = await wire.reader.read(12)
            assert answer in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    await locked.aftermath()


# --- memory ------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """A service in a process of its own, and its memory."""

    pid: int
    http: httpx2.AsyncClient

    def _memory(self, name: str) -> int:
        """In MB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) // 1024

    def rest(self) -> int:
        """What is resident now; the peak is measured from here on."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self._memory("VmRSS")

    def peak(self) -> int:
        return self._memory("VmHWM")


@asynccontextmanager
async def measured(tmp_path: Path) -> AsyncIterator[Measured]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STAGECAST_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "api", "serve", "--port", "0", "--images", str(tmp_path / "images")),
        stdout=asyncio.subprocess.PIPE,
        env=environment | {"STAGECAST_JWT_SECRET": SECRET, "STAGECAST_LOCAL_SECONDS": "0", "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), TIMEOUT)).decode()
        port = int(re.findall(r"http://localhost:(\d+)", line)[0])
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT) as http:
            yield Measured(process.pid, http)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _stream(begin: bytes, each: bytes) -> AsyncIterator[bytes]:
    yield begin
    for _ in range(100):
        yield each


@LINUX
async def test_memory_stays_bounded_for_any_body(tmp_path: Path) -> None:
    mine = {"Content-Type": FORM, "Authorization": f"Bearer {token('mallory')}"}
    nobody = {"Content-Type": FORM}
    file = b'--B\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    field_of_1_mb = b"--B\r\n" + part("prompt", b"\xff" * (MEGABYTE - 10)) + CRLF
    file_of_1_mb = b"--B\r\n" + part("images", bytes(MEGABYTE - 10), b"a") + CRLF
    tiny_parts = (b"--B\r\n" + PROMPT + CRLF) * 10_000  # 0.6 MB
    floods = {
        "100 MB, nobody's": (401, nobody, b"", bytes(MEGABYTE)),
        "100 MB in a file": (413, mine, file, bytes(MEGABYTE)),
        "100 MB of fields": (413, mine, b"", field_of_1_mb),
        "100 MB of files that stay in memory": (413, mine, b"", file_of_1_mb),
        "60 MB of tiny parts": (413, mine, b"", tiny_parts),
    }
    async with measured(tmp_path) as service:
        warm = await service.http.post("/generations/edit", content=GOOD, headers=mine)
        assert warm.status_code == 202, warm.text
        # What is measured is the floods, and not the work on a picture.
        async with asyncio.timeout(TIMEOUT):
            while (await service.http.get(warm.headers["Location"], headers=mine)).json()["status"] != "completed":
                await asyncio.sleep(0.05)
        grown = {}
        for name, (expected, headers, begin, each) in floods.items():
            before = service.rest()
            answer = await service.http.post("/generations/edit", content=_stream(begin, each), headers=headers)
            assert answer.status_code == expected, name
            grown[name] = service.peak() - before
        assert {name: growth for name, growth in grown.items() if growth >= 100} == {}
        assert (await service.http.get("/health/ready")).status_code == 200
    assert names_in(tmp_path) == ["images"]
