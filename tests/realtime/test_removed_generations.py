"""``generation_removed``, as official clients and event streams receive it."""

import asyncio
import json

import pytest

from support.event_stream import open_stream
from support.node import needs_node
from support.recovery import WAITS, WAYS, RecoveryHarness

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def remove(harness: RecoveryHarness, user: str, generation_id: str, *, retention: bool) -> None:
    if retention:
        assert await harness.service.service.storage.log.remove(generation_id, retention=True)
    else:
        answer = await harness.service.http.delete(f"/generations/{generation_id}", headers={"X-User-Id": user})
        assert answer.status_code == 204
    # The invariants compare the balance with the generations that are left.
    assert (await harness.service.http.post(f"/users/{user}/credit", json={"amount": 1})).status_code == 200


@needs_node
@pytest.mark.parametrize("retention", [False, True])
async def test_every_device_of_the_owner_is_told_after_the_events(harness: RecoveryHarness, retention: bool) -> None:
    user, other = harness.user(), harness.user()
    clients = [harness.open(user, way) for way in WAYS]
    stranger = harness.open(other, "websocket")
    for client in [*clients, stranger]:
        await client.ack()
    service = harness.service
    async with service.phone(user) as phone, service.phone() as plain, open_stream(service, user=user) as stream:

        async def until_events(count: int) -> None:
            for client in clients:
                await client.until(lambda client=client: len(client.events) == count)  # type: ignore[misc]
            for device in (phone, plain):
                await device.until(lambda device=device: len(device.events) == count)  # type: ignore[misc]
            await stream.until_count(count)

        await plain.authenticate(user, recovery=False)
        await stream.named("authenticated")
        ended = await harness.recorder.run_to_end(user)
        await until_events(6)  # One that had not read them would miss the events that are removed.
        await remove(harness, user, ended.generation_id, retention=retention)
        after = await harness.recorder.start(user)
        notice = {"generationId": ended.generation_id}
        await until_events(7)
        for client in clients:
            assert client.notices == [["generation_removed", notice]]
            names = [line["name"] for line in client.on("event")]
            assert names.index("generation_removed") == 6
            assert all(isinstance(further[-1], str) for further in client.further)
        for device in (phone, plain):
            assert device.notices == [("generation_removed", notice)]
        [removal] = [block for block in stream.blocks if block.event == "generation_removed"]
        assert (json.loads(removal.data), removal.id) == (notice, stream.blocks[stream.blocks.index(removal) - 1].id)
        assert [data["generationId"] for _, data in stream.events] == [ended.generation_id] * 6 + [after.generation_id]
        await harness.recorder.finish(after)
    assert stranger.notices == []


@needs_node
async def test_a_client_recovers_after_a_removal_without_a_second_notice(harness: RecoveryHarness) -> None:
    user = harness.user()
    client = harness.open(user, "websocket", **WAITS)
    await client.ack()
    ended = await harness.recorder.run_to_end(user)
    await client.until(lambda: len(client.events) == 6)
    await remove(harness, user, ended.generation_id, retention=False)
    await client.until(lambda: len(client.notices) == 1)
    client.do("cut")
    await client.disconnected()
    running = await harness.recorder.start(user)
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await client.until(lambda: len(client.events) == 7)
    await harness.recorder.finish(running)
    await client.until(lambda: len(client.events) == 12)
    assert [name for name, *_ in client.notices].count("generation_removed") == 1


async def test_curl_reads_the_removal_without_an_id(harness: RecoveryHarness) -> None:
    user = harness.user()
    ended = await harness.recorder.run_to_end(user)
    curl = await asyncio.create_subprocess_exec(
        *("curl", "-sN", "-H", "Accept: text/event-stream", f"{harness.service.url}/events?userId={user}"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert curl.stdout is not None
    try:
        async with asyncio.timeout(20):
            assert await curl.stdout.readuntil(b"event: authenticated\n")
            await curl.stdout.readuntil(b"\n\n")
            await remove(harness, user, ended.generation_id, retention=False)
            block = await curl.stdout.readuntil(b"\n\n")
    finally:
        curl.kill()
        await curl.wait()
    expected = f'event: generation_removed\ndata: {{"generationId":"{ended.generation_id}"}}\n\n'
    assert block.decode() == expected
