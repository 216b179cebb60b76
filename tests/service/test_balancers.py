"""Three nodes behind HAProxy and nginx, which know nothing of sessions: clients connect at the first attempt, and miss
nothing while nodes are killed.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import httpx2
import pytest
import pytest_asyncio
import socketio

from support.cluster import ALGORITHMS, NodeCluster, balancer, node_cluster
from support.deployment import RetryingClient, parts
from support.harness import PHOTO
from support.node import Browser, Browsers, browsers, needs_node
from support.postgres import fresh_database

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAYS: Final[Mapping[str, list[str]]] = {
    "default": ["polling", "websocket"],
    "polling": ["polling"],
    "websocket": ["websocket"],
}
ENDS: Final = ("generation_completed", "generation_failed")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NodeCluster]:
    async with (
        fresh_database() as log,
        node_cluster(log, tmp_path_factory.mktemp("cluster"), max_lag_ms="off", credits="off") as cluster,
    ):
        yield cluster
        assert cluster.problems() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def everybody() -> AsyncIterator[Browsers]:
    async with browsers() as everybody:
        yield everybody


@pytest_asyncio.fixture(
    loop_scope="module",
    params=[(name, algorithm) for name, each in ALGORITHMS.items() for algorithm in each],
    ids=lambda param: "-".join(param),
)
async def url(request: pytest.FixtureRequest, cluster: NodeCluster) -> AsyncIterator[str]:
    async with balancer(cluster, *request.param) as url:
        yield url


async def start(url: str, user: str) -> str:
    async with RetryingClient.open(url) as caller:
        key = f"{random.getrandbits(64)}"
        answer = await caller.ask("POST", "/generations/edit", user, key=key, files=parts("a red hat", PHOTO))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["generationId"])


async def events(url: str, generation_id: str, user: str) -> list[Any]:
    async with RetryingClient.open(url) as caller:
        return await caller.events(generation_id, user)


def of(client: Browser, generation_id: str) -> list[Any]:
    return [data for _, data in client.events if data["generationId"] == generation_id]


def over(client: Browser, generation_id: str) -> bool:
    return any(name in ENDS and data["generationId"] == generation_id for name, data in client.events)


@needs_node
async def test_official_clients_connect_at_the_first_attempt_and_get_each_event_once(
    url: str, everybody: Browsers
) -> None:
    user = url.rpartition(":")[2]
    clients = [
        everybody.open(url, first={"userId": user}, transports=way, agent=None)
        for way in WAYS.values()
        for _ in range(4)
    ]
    for client in clients:
        assert (await client.ack())["ok"] is True
    generation_ids = [await start(url, user) for _ in range(2)]
    for generation_id in generation_ids:
        for client in clients:
            await client.until(lambda client=client, each=generation_id: over(client, each))  # type: ignore[misc]
            assert of(client, generation_id) == await events(url, generation_id, user)
    for number, client in enumerate(clients):
        assert (client.on("refused"), client.on("disconnect"), len(client.on("connect"))) == ([], [], 1)
        assert len(client.on("upgrade")) == (1 if number < 4 else 0)
    await everybody.forget_all()


@pytest.mark.parametrize("transports", [None, ["polling"], ["websocket"]], ids=["default", "polling", "websocket"])
async def test_the_python_client_connects_at_the_first_attempt_and_gets_each_event_once(
    url: str, transports: list[str] | None
) -> None:
    user = f"python-{url.rpartition(':')[2]}-{transports}"
    client = socketio.AsyncClient(reconnection=False, request_timeout=30)
    received: asyncio.Queue[Any] = asyncio.Queue()

    async def take(name: str, data: Any, *_: Any) -> None:
        await received.put(data)

    client.on("*", take)
    await client.connect(url, auth={"userId": user, "recovery": False}, transports=transports, wait_timeout=30)
    assert (await asyncio.wait_for(received.get(), 30))["ok"] is True
    generation_id = await start(url, user)
    got = list[Any]()
    while not got or got[-1]["status"] not in ("completed", "failed"):
        event = await asyncio.wait_for(received.get(), 30)
        if "status" in event:
            event.pop("cursor")
            got.append(event)
    assert got == await events(url, generation_id, user)
    await client.disconnect()


async def test_http_and_event_streams_need_no_particular_node(url: str) -> None:
    user = f"stream-{url.rpartition(':')[2]}"
    async with httpx2.AsyncClient(base_url=url, headers={"X-User-Id": user}, timeout=30) as http:
        async with http.stream("GET", "/events", headers={"Accept": "text/event-stream"}) as stream:
            generation_id = await start(url, user)
            names = list[str]()
            async for line in stream.aiter_lines():
                if line.startswith("event: ") and line != "event: authenticated":
                    names.append(line.removeprefix("event: "))
                    if names[-1] in ENDS:
                        break
        names = [name for name in names if name != "queue_position"]
        assert len(names) == len(await events(url, generation_id, user))
        snapshots = [(await http.get(f"/generations/{generation_id}")).json() for _ in range(6)]
        assert all(each == snapshots[0] for each in snapshots)
        image = snapshots[0]["editedImageUrl"].partition("/images/")[2]
        pictures = {(await http.get(f"/images/{image}")).content for _ in range(6)}
        assert len(pictures) == 1
