"""Very many streams over HTTP/1.1."""

import asyncio
from pathlib import Path

import pytest

from adapters.system import now
from support.builders import EventWriter, SteppableClock
from support.event_stream import ACCEPT
from support.harness import TIMEOUT, running


@pytest.mark.parametrize("count", [50, pytest.param(1_000, marks=pytest.mark.long)])
async def test_every_one_of_many_streams_gets_every_event(tmp_path: Path, count: int) -> None:
    """A tenth of them stay for good; the others come and go meanwhile, and resume."""
    async with running(tmp_path) as service:
        writer = EventWriter(service.service.log, SteppableClock(now()))
        head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "localhost", **ACCEPT}.items())

        async def client(number: int) -> list[bytes]:
            """The ids that it got, over one connection or several."""
            ids: list[bytes] = []
            while len(ids) < 13:  # `authenticated`, and the events of two generations, the last of which is its sign.
                reader, line = await asyncio.open_connection("127.0.0.1", service.port)
                last = f"Last-Event-ID: {ids[-1].decode()}\r\n" if ids else ""
                line.write(f"GET /events?userId=user-{number % 10} HTTP/1.1\r\n{head}{last}\r\n".encode())
                welcome, stay = True, 13 if number % 10 == 0 else 3
                while stay and len(ids) < 13:
                    text = await reader.readuntil(b"\n")
                    if text.startswith(b"id: "):
                        # The position that a resumed stream begins at is the one that the client had.
                        assert not (welcome and ids) or text[4:-1] == ids[-1]
                        ids += [] if welcome and ids else [text[4:-1]]
                        welcome, stay = False, stay - 1
                line.transport.abort()
            return ids

        async with asyncio.timeout(4 * TIMEOUT):
            clients = [asyncio.create_task(client(number)) for number in range(count)]
            await service.until(lambda: len(service.service.streams.open) >= count, 2 * TIMEOUT)
            for _ in range(2):
                await asyncio.gather(*(writer.run_to_end(f"user-{number}") for number in range(10)))
            received = await asyncio.gather(*clients)
        for number, ids in enumerate(received):
            page = await service.get(f"/events?after={ids[0].decode()}", f"user-{number % 10}")
            assert (len(page["events"]), page["cursor"]) == (12, ids[-1].decode())
            assert len(set(ids)) == 13
