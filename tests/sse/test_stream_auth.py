"""Access to event streams: tokens in the header or in the query, and their end."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from adapters.system import now
from support.builders import EventWriter, SteppableClock
from support.event_stream import ACCEPT, of_generation, open_stream
from support.guarded import EXPIRED, SERVICE, guarded, token
from support.harness import JSON, Running, running

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with guarded(tmp_path_factory.mktemp("images")) as service:
        del service.http.headers["Authorization"]
        yield service
        service.http.headers["Authorization"] = f"Bearer {SERVICE}"


@pytest.fixture(scope="module")
def writer(service: Running) -> EventWriter:
    return EventWriter(service.service.log, SteppableClock(now()))


def bearer(value: str) -> JSON:
    return {"Authorization": f"Bearer {value}"}


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ({"access_token": token("ada")}, {}),
        ({}, bearer(token("ada"))),
        ({"access_token": EXPIRED}, bearer(token("ada"))),
        ({"access_token": SERVICE, "userId": "ada"}, {}),
        ({"userId": "ada"}, bearer(SERVICE)),
        ({"access_token": SERVICE, "userId": "eve"}, {"X-User-Id": "ada"}),
    ],
)
async def test_the_query_may_hold_what_an_event_source_cannot_send(
    service: Running, writer: EventWriter, query: JSON, headers: JSON
) -> None:
    generation = await writer.start("ada")
    for path in ("/events", of_generation(generation.generation_id)):
        async with service.http.sse(path, params=query, headers=headers) as source:
            assert source.response.status_code == 200
        answer = await service.http.get(path, params=query, headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    await writer.finish(generation)


@pytest.mark.parametrize(
    ("query", "headers", "status", "code"),
    [
        ({}, {}, 401, "unauthenticated"),
        ({"access_token": ""}, {}, 401, "unauthenticated"),
        ({"access_token": "nonsense"}, {}, 401, "invalid_token"),
        ({"access_token": EXPIRED}, {}, 401, "token_expired"),
        ({"access_token": token("ada")}, bearer("nonsense"), 401, "invalid_token"),
        ({"access_token": token("ada"), "userId": "eve"}, {}, 403, "forbidden"),
        ({"access_token": SERVICE, "userId": ""}, {}, 422, "invalid_user_id"),
        ({"access_token": SERVICE, "userId": "a\nb"}, {}, 422, "invalid_user_id"),
    ],
)
async def test_what_is_refused_is_a_problem(
    service: Running, query: JSON, headers: JSON, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    for accept in ({}, ACCEPT):
        answer = await service.http.get("/events", params=query, headers={**headers, **accept})
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/problem+json"
    for value in filter(None, query.values()):
        assert value not in caplog.text


async def test_other_routes_take_no_token_in_the_query(service: Running) -> None:
    for path in ("/me", "/generations"):
        answer = await service.http.get(path, params={"access_token": token("ada")})
        assert answer.json()["code"] == "unauthenticated"


async def test_a_stream_is_notified_of_the_end_of_its_token_and_ends(service: Running, writer: EventWriter) -> None:
    generation = await writer.start("ada")
    end = time.time() + 1.5
    query = f"?access_token={token('ada', exp=end)}"
    async with (
        open_stream(service, f"/events{query}", None) as feed,
        open_stream(service, of_generation(generation.generation_id) + query, None) as one,
    ):
        welcome = await feed.named("authenticated")
        assert "expiresAt" in welcome
        for stream in (feed, one):
            await stream.rest()
            assert stream.blocks[-1].event == "authentication_expired"
            assert json.loads(stream.blocks[-1].data) == {"code": "token_expired"}
            assert stream.blocks[-1].id == stream.blocks[-2].id, "the position is kept"
        assert time.time() >= end
    await writer.finish(generation)
    async with open_stream(service, "/events", None, last=feed.ids[-1], **bearer(token("ada"))) as again:
        await again.until_count(5)
        assert [data["sequence"] for _, data in again.events] == [2, 3, 4, 5, 6]


async def test_in_open_mode_the_query_names_the_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "uvicorn")
    async with running(tmp_path) as service:
        for path, headers, user in [
            ("/events?userId=%C3%A9ve", {}, "\u00e9ve"),
            ("/events?userId=eve", {"X-User-Id": "ada"}, "ada"),
            ("/events", {}, "demo"),
        ]:
            async with open_stream(service, path, None, **headers) as stream:
                assert (await stream.named("authenticated"))["userId"] == user
        await asyncio.sleep(0)
    assert "userId" not in caplog.text


async def test_a_stream_of_another_user_is_not_found(service: Running, writer: EventWriter) -> None:
    generation = await writer.run_to_end("ada")
    answers: list[Any] = [
        await service.http.get(of_generation(each), params={"access_token": token("eve")}, headers=ACCEPT)
        for each in (generation.generation_id, "edit_1_9999999999999999")
    ]
    assert {(answer.status_code, answer.content) for answer in answers} == {(404, answers[0].content)}
