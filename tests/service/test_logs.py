"""The log on standard error: one line for each record, and for repeats one in a while."""

import io
import logging
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from api import logs
from api.logs import OneLine, RepeatHandler


@pytest.fixture
def interval(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """The seconds for which repeats are counted."""
    seconds: float = getattr(request, "param", logs.REPEAT_INTERVAL)
    monkeypatch.setattr(logs, "REPEAT_INTERVAL", seconds)
    return seconds


@pytest.fixture
def handler(interval: float) -> Iterator[RepeatHandler]:
    handler = RepeatHandler(io.StringIO())
    handler.setFormatter(OneLine(as_json=False))
    names = ("repeats.one", "repeats.two")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield handler
    for name in names:
        logging.getLogger(name).removeHandler(handler)
    handler.close()


def lines(handler: RepeatHandler) -> list[str]:
    """What was written, without the times."""
    assert isinstance(handler.stream, io.StringIO)
    return [line.split(" ", 2)[2] for line in handler.stream.getvalue().splitlines()]


def test_a_record_is_written_at_once_and_its_repeats_are_counted(handler: RepeatHandler) -> None:
    for _ in range(1_000):
        logging.getLogger("repeats.one").warning("the disk is %s", "full")
    assert lines(handler) == ["WARNING repeats.one: the disk is full"]
    handler.close()
    assert lines(handler)[1:] == ["WARNING repeats.one: the disk is full repeats=999"]


def test_other_texts_levels_and_loggers_are_not_counted_as_repeats(handler: RepeatHandler) -> None:
    one, two = logging.getLogger("repeats.one"), logging.getLogger("repeats.two")
    for log in (one.warning, one.error, two.warning):
        log("the disk is %s", "full")
        log("the disk is %s", "slow")
    assert len(lines(handler)) == 6
    handler.close()
    assert len(lines(handler)) == 6


def test_a_record_may_say_what_it_repeats(handler: RepeatHandler) -> None:
    for number in range(5):
        logging.getLogger("repeats.one").warning("refused for user %d", number, extra={"repeat_key": ("code", "route")})
    logging.getLogger("repeats.one").warning("refused for user 9", extra={"repeat_key": ("code", "another route")})
    handler.close()
    assert [line.partition("user ")[2] for line in lines(handler)] == ["0", "9", "4 repeats=4"]


def test_a_record_may_say_that_it_repeats_nothing(handler: RepeatHandler) -> None:
    for _ in range(3):
        logging.getLogger("repeats.one").warning("started", extra={"repeat_key": None})
    assert len(lines(handler)) == 3


@pytest.mark.parametrize("interval", [0.2], indirect=True)
def test_while_it_repeats_one_line_is_written_per_interval(handler: RepeatHandler) -> None:
    began, sent = time.monotonic(), 0
    while time.monotonic() < began + 0.7:
        logging.getLogger("repeats.one").warning("again")
        sent += 1
        time.sleep(0.01)
    handler.close()
    first, *rest = lines(handler)
    assert first == "WARNING repeats.one: again"
    assert 3 <= len(rest) <= 5
    assert sum(int(line.rpartition("=")[2]) for line in rest) == sent - 1


@pytest.mark.parametrize("interval", [0.01], indirect=True)
def test_records_that_are_not_repeated_are_forgotten(handler: RepeatHandler) -> None:
    for number in range(100):
        logging.getLogger("repeats.one").warning("number %d", number)
    time.sleep(0.02)
    for _ in range(100):
        logging.getLogger("repeats.one").warning("number 0")
        time.sleep(0.0005)
    assert len(handler._intervals) < 5
    assert lines(handler)[100] == "WARNING repeats.one: number 0"


def test_repeats_of_exceptions_name_their_type_and_keep_nothing_else(handler: RepeatHandler) -> None:
    for secret in ("one", "two"):
        try:
            raise ValueError(secret)
        except ValueError:
            logging.getLogger("repeats.one").exception("it failed\n")
    [pending] = handler._intervals.values()
    assert pending.last is not None
    assert pending.last.exc_info is not None
    assert pending.last.exc_info[1:] == (None, None)
    handler.close()
    assert lines(handler) == [
        "ERROR repeats.one: it failed error=ValueError",
        "ERROR repeats.one: it failed error=ValueError repeats=1",
    ]


@pytest.mark.parametrize(("ends", "logged"), [("server.begin_shutdown(now=True)", 0), ("request.cancel()", 1)])
def test_only_a_request_that_a_shutdown_cancels_is_no_error(ends: str, logged: int) -> None:
    program = f"""
import asyncio, socket
from adapters.serving.uvicorn_server import Server
from api import logs
logs.configure()

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            await send({{"type": (await receive())["type"] + ".complete"}})
    request = asyncio.current_task()
    asyncio.get_running_loop().call_later(0.05, lambda: {ends})
    asyncio.get_running_loop().call_later(0.2, lambda: server.begin_shutdown(now=True))
    await asyncio.get_running_loop().create_future()

async def drain(force):
    pass

async def main():
    global server
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    client.send(b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    server = Server(app, drain, lambda: None)
    await server.serve(sockets=[listener])

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "Exception in ASGI application" in line]
    assert len(lines) == logged, done.stderr
