"""Frames are made once for all receivers, and written past the buffer of each that keeps up."""

import asyncio
import json
from pathlib import Path

import pytest
import websockets
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from adapters.realtime import send_buffer
from adapters.realtime.frames import CURSOR_AS_ARGUMENT, CURSOR_AS_KEY, frame, packet_in
from domain.feed import Logged
from domain.ports.log import EventLog
from support.harness import flood, running, stalled_device

ENTRY = Logged("ada", 1, 7, "edit_1", 1, "continue", '{"message":"Görsel 🎉"}'.encode(), 1, None)


def parsed(data: bytes) -> Frame:
    """By the `websockets` library."""
    reader = StreamReader()
    reader.feed_data(data)
    parser = Frame.parse(reader.read_exact, mask=False)
    with pytest.raises(StopIteration) as stopped:
        next(parser)
    assert not reader.buffer
    result = stopped.value.value
    assert isinstance(result, Frame)
    return result


@pytest.mark.parametrize("size", [1, 125, 126, 65_535, 65_536])
def test_a_frame_is_one_unmasked_websocket_message_with_the_packet(size: int) -> None:
    packet = b"4" + b"x" * (size - 1)
    assert parsed(frame(packet)) == Frame(Opcode.TEXT, packet)
    assert packet_in(frame(packet)) == packet


def test_both_forms_of_an_event_have_its_bytes_and_its_cursor() -> None:
    as_argument, as_key = (packet_in(form.event(ENTRY, "c.1")) for form in (CURSOR_AS_ARGUMENT, CURSOR_AS_KEY))
    assert as_argument == b'42["continue",' + (ENTRY.event or b"") + b',"c.1"]'
    assert json.loads(as_key[2:]) == ["continue", {"message": "Görsel 🎉", "cursor": "c.1"}]
    assert packet_in(CURSOR_AS_KEY.announcement("x", b"{}")) == b'42["x",{}]'


async def test_an_offer_of_compression_is_not_accepted(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        address = f"ws://127.0.0.1:{service.port}/socket.io/?EIO=4&transport=websocket"
        async with websockets.connect(address, compression="deflate", proxy=None) as connection:
            assert connection.protocol.extensions == []


async def test_a_client_that_reads_now_and_then_gets_direct_and_waiting_frames_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 60.0)
    async with running(tmp_path) as service:
        client = await stalled_device(service)
        [socket] = service.service.sockets.eio.sockets.values()
        seen: list[int] = []
        for turn in range(3):
            generation_id = f"edit_{turn}_0000000000000000"
            await pour(service.service.log, generation_id, 400)
            await service.until(lambda: len(socket.buffer) > 0)
            assert socket.buffer.write is None
            client.transport.resume_reading()
            while len(seen) < 400 * (turn + 1):
                received = str(await client.recv())
                if received.startswith(('42["continue"', '42["generation')):
                    seen.append(json.loads(received[2:])[1]["sequence"])
            await service.until(lambda: socket.buffer.write is not None)
            client.transport.pause_reading()
        assert seen == 3 * list(range(1, 401))
        client.transport.resume_reading()
        await client.close()


async def test_a_live_event_does_not_wait_in_the_buffer_of_a_client_that_keeps_up(tmp_path: Path) -> None:
    async with running(tmp_path) as service, service.phone("ada") as phone:
        [socket] = service.service.sockets.eio.sockets.values()
        await service.until(lambda: socket.buffer.write is not None and bool(service.service.hub.rooms))
        [device] = service.service.hub.rooms["ada"]
        await device.flushed()
        async for _ in flood(service.service.log, "ada", "edit_1_0000000000000000", 50):
            assert len(socket.buffer) == 0
            assert socket.buffer.write is not None
        await phone.until_over("edit_1_0000000000000000")
        assert phone.sequences("edit_1_0000000000000000") == list(range(1, 51))


async def pour(log: EventLog, generation_id: str, count: int) -> None:
    async for _ in flood(log, "ada", generation_id, count):
        await asyncio.sleep(0)


async def test_frames_put_while_a_client_is_closed_are_followed_by_the_close(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        connection = await service.raw()
        [socket] = service.service.sockets.eio.sockets.values()
        await service.until(lambda: socket.buffer.write is not None)
        socket.buffer.put(frame(b'42["last",{}]'))
        socket.close()
        assert await connection.recv() == '42["last",{}]'
        with pytest.raises(websockets.ConnectionClosedOK):
            await connection.recv()
