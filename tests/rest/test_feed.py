"""`GET /events`: the feed for clients that poll, by the same cursors as over Socket.IO."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapters.system import now
from support.builders import EventWriter, SteppableClock
from support.harness import JSON, Running, running


@pytest.fixture
async def service(tmp_path: Path, log_setting: str) -> AsyncIterator[Running]:
    async with running(tmp_path / "images", log=log_setting) as service:
        yield service


@pytest.fixture
def recorder(service: Running) -> EventWriter:
    return EventWriter(service.service.log, SteppableClock(now()))


async def poll(service: Running, cursor: str, limit: int = 200, user: str = "ada") -> JSON:
    return await service.get(f"/events?after={cursor}&limit={limit}", user)


async def read_on(service: Running, cursor: str, limit: int) -> tuple[list[tuple[str, JSON]], str]:
    """Everything after a cursor, page by page."""
    found: list[tuple[str, JSON]] = []
    while True:
        page = await poll(service, cursor, limit)
        assert page["recovered"] is True
        assert len(page["events"]) <= limit
        found += [(item["event"], item["data"]) for item in page["events"]]
        if not page["events"]:
            return found, page["cursor"]
        cursor = page["cursor"]


async def test_without_a_cursor_the_feed_starts_at_the_current_state(service: Running, recorder: EventWriter) -> None:
    done = await recorder.run_to_end()
    running_one = await recorder.move(await recorder.start(), "composition")
    present = await service.get("/events")
    assert present.keys() == {"recovered", "cursor", "generations"}
    assert present["recovered"] is False
    listed = (await service.get("/generations"))["generations"]
    assert present["generations"] == listed
    assert [each["generationId"] for each in listed] == [running_one.generation_id, done.generation_id]
    events, cursor = await read_on(service, present["cursor"], 200)
    assert [data for _, data in events] == await service.events(running_one.generation_id)
    await recorder.finish(running_one)
    page = await poll(service, cursor)
    assert [item["data"] for item in page["events"]] == (await service.events(running_one.generation_id))[2:]


@pytest.mark.parametrize("limit", [1, 2, 3, 1000])
async def test_pages_of_any_size_hold_everything_once_in_order(
    service: Running, recorder: EventWriter, limit: int
) -> None:
    """Among them stretches that are not wanted: of what had ended when the reader came."""
    empty = (await service.get("/events"))["cursor"]
    first = await recorder.start()
    await recorder.run_to_end()
    await recorder.run_to_end()
    from_the_middle = (await service.get("/events"))["cursor"]
    await recorder.finish(first)
    await recorder.run_to_end()
    everything, end = await read_on(service, empty, limit)
    histories = [each["generationId"] for each in (await service.get("/generations"))["generations"]]
    for generation_id in histories:
        of_it = [data for _, data in everything if data["generationId"] == generation_id]
        assert of_it == await service.events(generation_id)
    assert len(everything) == sum([len(await service.events(each)) for each in histories])
    late, same_end = await read_on(service, from_the_middle, limit)
    ended = {each["generationId"] for each in (await service.get("/generations"))["generations"][1:3]}
    assert late == [(name, data) for name, data in everything if data["generationId"] not in ended]
    assert same_end == end
    assert everything[0][0] == "generation_started"
    assert everything[-1][0] == "generation_completed"


async def test_a_cursor_goes_from_a_socket_to_http_and_back(service: Running, recorder: EventWriter) -> None:
    async with service.phone("ada") as phone:
        generation = await recorder.start()
        await phone.until(lambda: len(phone.events) == 1)
        generation = await recorder.move(generation, "composition")
        page = await poll(service, phone.cursors[0])
        assert [item["data"]["sequence"] for item in page["events"]] == [2]
    await recorder.finish(generation)
    async with service.phone() as later:
        ack = await later.authenticate("ada", cursor=page["cursor"])
        assert ack["recovered"] is True
        await later.until_over(generation.generation_id)
        assert later.sequences(generation.generation_id) == [3, 4, 5, 6]


async def test_an_unusable_cursor_is_reported_with_a_usable_one(service: Running, recorder: EventWriter) -> None:
    await recorder.start("bob")
    bobs = (await service.get("/events", "bob"))["cursor"]
    generation = await recorder.start()
    cursor = (await service.get("/events"))["cursor"]
    await recorder.finish(generation)
    await service.service.storage.log.remove(generation.generation_id, retention=False)
    for unusable in (bobs, "made-up", "", cursor):
        page = await poll(service, unusable)
        assert (page["recovered"], page["generations"]) == (False, [])
        assert (await poll(service, page["cursor"])) == {"recovered": True, "cursor": page["cursor"], "events": []}


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_a_reader_that_never_saw_a_deleted_generation_reads_past_it(
    service: Running, recorder: EventWriter, limit: int
) -> None:
    """Wherever a page ends; over Socket.IO as well. A client that was sent its beginning must read again."""
    empty = (await service.get("/events"))["cursor"]
    gone, kept = await recorder.start(), await recorder.start()
    knowing = (await poll(service, empty, 1))["cursor"]
    await recorder.finish(kept)
    await recorder.move(gone, "failed")
    await service.service.storage.log.remove(gone.generation_id, retention=False)
    cursor = (await poll(service, empty, 1))["cursor"]
    events, _ = await read_on(service, empty, limit)
    assert [data for _, data in events] == await service.events(kept.generation_id)
    async with service.phone() as phone:
        assert (await phone.authenticate("ada", cursor=cursor))["recovered"] is True
        await phone.until_over(kept.generation_id)
        assert phone.sequences(kept.generation_id) == [2, 3, 4, 5, 6]
    assert (await poll(service, knowing))["recovered"] is False


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x"])
async def test_a_page_has_1_to_1000_events(service: Running, query: str) -> None:
    answer = await service.http.get(f"/events?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
