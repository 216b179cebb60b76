"""The frames that wait for one client, whatever its transport."""

import asyncio

import pytest

from adapters.realtime import send_buffer
from adapters.realtime.send_buffer import MAX_BYTES, MAX_EVENTS, PROGRESS_INTERVAL, BoundedSendBuffer


class Transport:
    """Has a buffer of byte blocks, and counts how often it is aborted."""

    def __init__(self) -> None:
        self.aborted = 0
        self.buffer = BoundedSendBuffer[bytes](len, self.abort)

    def abort(self) -> None:
        self.aborted += 1


@pytest.fixture
def transport() -> Transport:
    return Transport()


@pytest.mark.parametrize(("size", "fits"), [(1, MAX_EVENTS), (MAX_BYTES // 4, 4), (MAX_BYTES, 1), (MAX_BYTES + 1, 0)])
def test_a_buffer_has_room_up_to_both_limits(transport: Transport, size: int, fits: int) -> None:
    buffer, frame = transport.buffer, b"x" * size
    while buffer.offer(frame):
        pass
    assert (len(buffer), buffer.bytes) == (fits, fits * size)


@pytest.mark.parametrize("size", [1, MAX_BYTES])
def test_too_many_frames_put_without_a_check_for_room_abort_the_transport(transport: Transport, size: int) -> None:
    for _ in range(3 * MAX_EVENTS):
        transport.buffer.put(b"x" * size)
    assert transport.aborted
    assert len(transport.buffer) <= 2 * MAX_EVENTS
    assert transport.buffer.bytes <= 5 * MAX_BYTES


async def test_frames_are_taken_in_order_and_in_batches(transport: Transport) -> None:
    buffer = transport.buffer
    taking = asyncio.create_task(buffer.take(2))
    await asyncio.sleep(0)
    for frame in (b"1", b"22", b"333"):
        buffer.put(frame)
    assert await taking == [b"1", b"22"]
    assert (len(buffer), buffer.bytes) == (1, 3)
    assert await buffer.take(2) == [b"333"]


async def test_a_closed_buffer_yields_its_frames_and_the_last_one_and_then_none(transport: Transport) -> None:
    buffer = transport.buffer
    buffer.put(b"1")
    buffer.close(b"last")
    buffer.put(b"too late")
    assert await buffer.take(8) == [b"1", b"last"]
    assert await buffer.take(8) == await buffer.take(8) == []


async def test_close_wakes_all_waiters(transport: Transport) -> None:
    buffer = transport.buffer
    takers = [asyncio.create_task(buffer.take(1)) for _ in range(2)]
    await asyncio.sleep(0)
    buffer.close()
    assert await asyncio.gather(*takers) == [[], []]
    full = Transport().buffer
    while full.offer(b"x"):
        pass
    drained, flushed = asyncio.create_task(full.drained()), asyncio.create_task(full.flushed())
    await asyncio.sleep(0)
    full.close()
    assert await drained is False
    await flushed


async def test_drained_waits_for_half_of_the_frames_and_flushed_for_all(transport: Transport) -> None:
    buffer = transport.buffer
    while buffer.offer(b"x"):
        pass
    drained, flushed = asyncio.create_task(buffer.drained()), asyncio.create_task(buffer.flushed())
    for left in range(MAX_EVENTS - 1, -1, -1):
        await buffer.take(1)
        for _ in range(3):
            await asyncio.sleep(0)
        assert (drained.done(), flushed.done()) == (left <= MAX_EVENTS // 2, left == 0)
    assert drained.result() is True


def checks(transport: Transport, unsent: int = 0, *, paused: bool = False) -> None:
    """As many checks as a client may fail, less one: it is aborted by the next one without progress."""
    for _ in range(round(send_buffer.STALL_TIMEOUT / PROGRESS_INTERVAL)):
        transport.buffer.check_progress(unsent, paused=paused)
    assert not transport.aborted


async def test_a_client_with_a_backlog_that_takes_nothing_is_aborted(transport: Transport) -> None:
    while transport.buffer.offer(b"x"):
        pass
    for _ in range(2):
        await transport.buffer.take(1)
        checks(transport)
    transport.buffer.check_progress(0)
    assert transport.aborted


def test_bytes_not_accepted_by_the_kernel_are_a_backlog(transport: Transport) -> None:
    checks(transport, unsent=9)
    checks(transport, unsent=8)
    transport.buffer.check_progress(8)
    assert transport.aborted


def test_a_client_without_a_backlog_or_that_cannot_read_now_is_kept(transport: Transport) -> None:
    for _ in range(3):
        checks(transport)
    while transport.buffer.offer(b"x"):
        pass
    for _ in range(3):
        checks(transport, paused=True)
