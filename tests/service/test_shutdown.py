"""Shutdown includes what is being accepted: processes that are signalled while starts arrive and are decoded."""

import asyncio
import contextlib
import json
import random
import signal
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest

from support.harness import JSON, PHOTO
from support.pictures import RED, solid
from support.processes import until_decoding, until_handled
from support.serve_process import TIMEOUT, Process, last_of, patient, serving, stagecast, talk, watching

WHO: Final = {"X-User-Id": "ada"}
#: Takes the decoder about a second.
LARGE: Final = solid(RED, (5_000, 5_000), "JPEG").data
BOUNDARY: Final = "cut"


def form(picture: bytes) -> bytes:
    part = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="'
    return b"".join(
        [
            f'{part}prompt"\r\n\r\na red hat\r\n'.encode(),
            f'{part}images"; filename="a.jpg"\r\ncontent-type: image/jpeg\r\n\r\n'.encode(),
            picture,
            f"\r\n--{BOUNDARY}--\r\n".encode(),
        ]
    )


def head(length: int) -> bytes:
    return (
        "POST /generations/edit HTTP/1.1\r\nHost: localhost\r\nX-User-Id: ada\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, JSON]:
    """One whole answer: its status and its JSON."""
    async with asyncio.timeout(TIMEOUT):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        [length] = [int(line.split(":")[1]) for line in lines if line.startswith("content-length:")]
        return int(lines[0].split()[1]), json.loads(await reader.readexactly(length))


async def test_a_body_in_transfer_at_sigterm_is_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, contextlib.AsyncExitStack() as talks:
        whole = form(PHOTO)
        reader, writer = await talk(int(service.url.rpartition(":")[2]), talks)
        writer.write(head(len(whole)) + whole[:-100])
        await writer.drain()
        async with patient() as http:  # What came before has been read by now.
            await http.get(f"{service.url}/health/live")
        service.process.send_signal(signal.SIGTERM)
        status, problem = await answer_of(reader)
        assert (status, problem["code"]) == (503, "draining")
        assert await service.ended() == (0, "")


async def test_a_request_that_comes_while_the_service_drains_is_refused_before_its_body_is_there(
    tmp_path: Path,
) -> None:
    async with (
        serving(tmp_path, "--local-seconds", "60") as service,
        patient() as http,
        contextlib.AsyncExitStack() as talks,
    ):
        key = {**WHO, "Idempotency-Key": "once"}
        files: dict[str, Any] = {"images": ("a.jpg", PHOTO), "prompt": (None, "a red hat")}
        begun = await http.post(f"{service.url}/generations/edit", files=files, headers=key)
        service.process.send_signal(signal.SIGTERM)
        await service.draining(http)
        reader, writer = await talk(int(service.url.rpartition(":")[2]), talks)
        writer.write(head(100_000))
        status, problem = await answer_of(reader)
        assert (status, problem["code"]) == (503, "draining")
        again = await http.post(f"{service.url}/generations/edit", files=files, headers=key)
        assert (again.status_code, again.headers["location"]) == (202, begun.headers["location"])
        service.process.send_signal(signal.SIGTERM)
        assert await service.ended() == (0, "")


async def signalled(
    service: Process, *signals: signal.Signals, after: float | None = None
) -> tuple[httpx2.Response, list[JSON]]:
    """Send the signals while a large picture is decoded, or after so many seconds.

    Return the answer, and the events that its owner received.
    """
    async with patient() as http, watching(service.url) as events:
        files: dict[str, Any] = {"images": ("a.jpg", LARGE), "prompt": (None, "a red hat"), "faceSwap": (None, "false")}
        starting = asyncio.create_task(http.post(f"{service.url}/generations/edit", files=files, headers=WHO))
        if after is None:
            await until_decoding(service.process.pid)
        else:
            await asyncio.sleep(after)
        for each in signals:
            service.process.send_signal(each)
            await asyncio.sleep(0.1)
        answer = await starting
        if answer.status_code == 202:
            await last_of(events)
        return answer, events


@pytest.mark.parametrize("log", ["memory://", "sqlite"])
async def test_a_start_that_is_decoded_at_sigterm_is_accepted_and_finished(tmp_path: Path, log: str) -> None:
    address = f"sqlite:///{tmp_path}/log.db" if log == "sqlite" else log
    async with serving(tmp_path, "--log", address, "--local-seconds", "0") as service:
        answer, events = await signalled(service, signal.SIGTERM)
        assert await service.ended() == (0, "")
        assert answer.status_code == 202, answer.text
        assert events[-1]["status"] == "completed"


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]], ids=["SIGINT", "twice"])
async def test_a_start_decoded_after_the_drain_is_refused_and_leaves_nothing(
    tmp_path: Path, signals: list[signal.Signals]
) -> None:
    async with serving(tmp_path, "--local-seconds", "0") as service:
        answer, events = await signalled(service, *signals)
        assert await service.ended() == (0, "")
        if answer.status_code == 202:  # It was decoded before the signal.
            assert events[-1]["status"] in ("completed", "failed")
        else:
            assert (answer.status_code, answer.json()["code"]) == (503, "draining")
            assert "retry-after" in answer.headers


async def _before_it_listens(tmp_path: Path, number: signal.Signals, after: float) -> None:
    options = ["--port", "0", "--log-level", "warning", "--images", str(tmp_path / "images")]
    process = await stagecast("serve", *options)
    await until_handled(process.pid, signal.SIGTERM)  # Python itself takes a moment to start.
    await asyncio.sleep(after)
    process.send_signal(number)
    _, errors = await asyncio.wait_for(process.communicate(), TIMEOUT)
    assert (process.returncode, errors.decode()) == (0, ""), after


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_before_it_listens_is_a_clean_exit(tmp_path: Path, number: signal.Signals) -> None:
    """The last one may be serving already, depending on the machine."""
    await asyncio.gather(*(_before_it_listens(tmp_path / str(after), number, after) for after in (0, 0.2, 0.5, 1)))


@pytest.mark.long
async def test_no_moment_of_a_signal_cuts_a_start_short(tmp_path: Path) -> None:
    chance = random.Random(12)
    for turn in range(40):
        signals = chance.choice([[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
        log = chance.choice(["memory://", f"sqlite:///{tmp_path}/{turn}.db"])
        async with serving(tmp_path / str(turn), "--log", log, "--local-seconds", "0") as service:
            answer, _ = await signalled(service, *signals, after=chance.uniform(0, 1.5))
            assert await service.ended() == (0, "")
            assert answer.status_code == 202 or answer.json()["code"] == "draining", (turn, answer.text)
        await _before_it_listens(tmp_path / str(turn), signals[0], chance.uniform(0, 1.5))
