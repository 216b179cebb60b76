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

from support.balancers import ALGORITHMS, balancer
from support.deployment import RetryingClient, parts, task_group
from support.harness import PHOTO
from support.node import Browser, Browsers, browsers, needs_node
from support.node_processes import Cluster
from support.postgres import fresh_database
from support.recovery import check

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAYS: Final[Mapping[str, list[str]]] = {
    "default": ["polling", "websocket"],
    "polling": ["polling"],
    "websocket": ["websocket"],
}
#: The balancers of the normal run.
_QUICK: Final = (("haproxy", "roundrobin"), ("nginx", "random"))
ENDS: Final = ("generation_completed", "generation_failed")
STATUSES: Final = ("completed", "failed")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    flags = {"max_lag_ms": "off", "credits": "off", "trusted_proxies": "127.0.0.1"}
    folder = tmp_path_factory.mktemp("cluster")
    async with fresh_database() as log, Cluster.open(folder, log, flags=flags) as cluster:
        await asyncio.sleep(1.1)  # With its next heartbeat each knows all others.
        yield cluster
        lines = [*cluster.logged, *(line for node in cluster.nodes for line in node.life.logged)]
        assert [line for line in lines if "Traceback" in line or "Exception" in line] == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def everybody() -> AsyncIterator[Browsers]:
    async with browsers() as everybody:
        yield everybody


@pytest_asyncio.fixture(
    loop_scope="module",
    params=[
        pytest.param(each, id="-".join(each), marks=() if each in _QUICK else pytest.mark.long)
        for each in ((name, algorithm) for name, algorithms in ALGORITHMS.items() for algorithm in algorithms)
    ],
)
async def url(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[str]:
    async with balancer(cluster.ports, *request.param) as url:
        yield url


@pytest_asyncio.fixture(loop_scope="module")
async def caller(url: str) -> AsyncIterator[RetryingClient]:
    async with RetryingClient.open(url) as caller:
        yield caller


async def start(caller: RetryingClient, user: str) -> str:
    answer = await caller.ask("POST", "/generations/edit", user, files=parts("a red hat", PHOTO))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["generationId"])


def over(client: Browser, generation_id: str) -> bool:
    return any(name in ENDS and data["generationId"] == generation_id for name, data in client.events)


@needs_node
async def test_official_clients_connect_at_the_first_attempt_and_get_each_event_once(
    url: str, caller: RetryingClient, everybody: Browsers
) -> None:
    user = url.rpartition(":")[2]
    clients = [
        everybody.open(url, first={"userId": user}, transports=way, agent=None)
        for way in WAYS.values()
        for _ in range(3)
    ]
    for client in clients:
        assert (await client.ack())["ok"] is True
    generation_id = await start(caller, user)
    for client in clients:
        await client.until(lambda client=client: over(client, generation_id))  # type: ignore[misc]
    history = await caller.events(generation_id, user)
    assert all([data for _, data in client.events] == history for client in clients)
    for number, client in enumerate(clients):
        assert (client.on("refused"), client.on("disconnect"), len(client.on("connect"))) == ([], [], 1)
        assert len(client.on("upgrade")) == (1 if number < 3 else 0)
    await everybody.forget_all()


@pytest.mark.parametrize("transports", [None, ["polling"], ["websocket"]], ids=["default", "polling", "websocket"])
async def test_the_python_client_connects_at_the_first_attempt_and_gets_each_event_once(
    url: str, caller: RetryingClient, transports: list[str] | None
) -> None:
    user = f"python-{url.rpartition(':')[2]}-{transports}"
    client = socketio.AsyncClient(reconnection=False, request_timeout=30)
    received: asyncio.Queue[Any] = asyncio.Queue()

    async def take(name: str, data: Any, *_: Any) -> None:
        await received.put(data)

    client.on("*", take)
    await client.connect(url, auth={"userId": user, "recovery": False}, transports=transports, wait_timeout=30)
    assert (await asyncio.wait_for(received.get(), 30))["ok"] is True
    generation_id = await start(caller, user)
    got = list[Any]()
    while not got or got[-1]["status"] not in ("completed", "failed"):
        event = await asyncio.wait_for(received.get(), 30)
        if "status" in event:
            event.pop("cursor")
            got.append(event)
    assert got == await caller.events(generation_id, user)
    await client.disconnect()


async def test_http_and_event_streams_need_no_particular_node(url: str, caller: RetryingClient) -> None:
    user = f"stream-{url.rpartition(':')[2]}"
    async with httpx2.AsyncClient(base_url=url, headers={"X-User-Id": user}, timeout=30) as http:
        async with http.stream("GET", "/events", headers={"Accept": "text/event-stream"}) as stream:
            generation_id = await start(caller, user)
            names = list[str]()
            async for line in stream.aiter_lines():
                if line.startswith("event: ") and line != "event: authenticated":
                    names.append(line.removeprefix("event: "))
                    if names[-1] in ENDS:
                        break
        names = [name for name in names if name != "queue_position"]
        assert len(names) == len(await caller.events(generation_id, user))
        snapshots = [(await http.get(f"/generations/{generation_id}")).json() for _ in range(6)]
        assert all(each == snapshots[0] for each in snapshots)
        image = snapshots[0]["editedImageUrl"].partition("/images/")[2]
        pictures = {(await http.get(f"/images/{image}")).content for _ in range(6)}
        assert len(pictures) == 1


# --- killed nodes ------------------------------------------------------------------------------------------


class Chaos:
    """Clients that drop at random and work that goes on, while nodes are killed: nobody may miss anything."""

    def __init__(self, cluster: Cluster, url: str, everybody: Browsers, count: int) -> None:
        self.cluster, self.url = cluster, url
        self.random = random.Random(1)
        self.users = [f"{url}-{number}" for number in range(max(count // 5, 2))]
        ways = list(WAYS.values())
        options = {"agent": None, "reconnectionDelay": 200, "reconnectionDelayMax": 1000}
        #: Each with its user.
        self.clients = list[tuple[str, Browser]]()
        for number in range(count):
            user = self.users[number % len(self.users)]
            client = everybody.open(url, auth={"userId": user}, transports=ways[number % 3], **options)
            self.clients.append((user, client))
        #: The user of each generation.
        self.owners = dict[str, str]()

    async def run(self, kills: int, *, every: float, internal: bool) -> None:
        """End a node every so many seconds; two of three are killed, and one is asked to stop.

        `internal`: the nodes work, too; otherwise only pipelines of the operator's own.
        """
        for _, client in self.clients:
            await client.until(lambda client=client: bool(client.notices))  # type: ignore[misc]
        cursors = [client.notices[0][1]["cursor"] for _, client in self.clients]
        async with RetryingClient.open(self.url) as caller:
            async with task_group() as group:
                killing = group.create_task(self._kill(kills, every))
                group.create_task(self._drop(killing))
                while not killing.done():
                    work = self._start if internal and self.random.random() < 0.1 else self._report
                    group.create_task(work(caller, self.random.choice(self.users)))
                    await asyncio.sleep(0.2)
            await asyncio.gather(*(self._check_generation(caller, *each) for each in self.owners.items()))
            feeds = list[list[Any]]()
            for (user, client), cursor in zip(self.clients, cursors, strict=True):
                feed = await caller.feed(user, cursor)
                feeds.append(feed)
                await client.until(lambda client=client, feed=feed: len(client.events) >= len(feed))  # type: ignore[misc]
        for (user, client), feed in zip(self.clients, feeds, strict=True):
            assert [data for _, data in client.events] == feed, "I4"
            assert all(self.owners[data["generationId"]] == user for _, data in client.events), "I5"
            assert all(line["recovered"] for line in client.on("connect")[1:]), "a session was lost"
            check(client)

    async def _check_generation(self, caller: RetryingClient, generation_id: str, user: str) -> None:
        async with asyncio.timeout(240):
            while (snapshot := await caller.get(f"/generations/{generation_id}", user))["status"] not in STATUSES:
                await asyncio.sleep(0.5)
        history = await caller.events(generation_id, user)
        assert [each["sequence"] for each in history] == list(range(1, len(history) + 1)), "I1"
        assert [each["status"] in STATUSES for each in history] == [False] * (len(history) - 1) + [True], "I2"
        assert [snapshot[key] for key in ("status", "progress")] == [history[-1][key] for key in ("status", "progress")]

    async def _kill(self, kills: int, every: float) -> None:
        due = asyncio.get_running_loop().time()
        for number in range(kills):
            due += every
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            node = self.cluster.nodes[number % len(self.cluster.nodes)]
            await (self.cluster.stop(node) if number % 3 == 1 else self.cluster.kill(node))
            await asyncio.sleep(0.3)
            await self.cluster.start(node)

    async def _drop(self, killing: asyncio.Task[None]) -> None:
        while not killing.done():
            self.random.choice(self.clients)[1].do(self.random.choice(["close", "cut"]))
            await asyncio.sleep(min(5 / len(self.clients), 0.5))

    async def _start(self, caller: RetryingClient, user: str) -> None:
        key = f"{self.random.getrandbits(64)}"
        answer = await caller.ask("POST", "/generations/edit", user, key=key, files=parts("a red hat", PHOTO))
        if answer.status_code != 429:
            assert answer.status_code == 202, answer.text
            self.owners[answer.json()["generationId"]] = user

    async def _report(self, caller: RetryingClient, user: str) -> None:
        key = f"{self.random.getrandbits(64)}"
        answer = await caller.ask("POST", "/generations/edit?runner=external", user, key=key, files=parts("a red hat"))
        if answer.status_code == 429:
            return
        assert answer.status_code == 202, answer.text
        generation_id = answer.json()["generationId"]
        self.owners[generation_id] = user
        for sequence, status in enumerate(("composition", "composition_completed", "openai_editing", "failed"), 2):
            await asyncio.sleep(self.random.random() / 2)
            body = {"status": status, "sequence": sequence}
            answer = await caller.ask("POST", f"/generations/{generation_id}/transitions", user, json=body)
            assert answer.status_code == 200, answer.text


@needs_node
async def test_nobody_misses_anything_while_nodes_are_killed(cluster: Cluster, everybody: Browsers) -> None:
    async with balancer(cluster.ports, "haproxy", "random") as url:
        await Chaos(cluster, url, everybody, count=10).run(2, every=1, internal=False)
    await everybody.forget_all()


@pytest.mark.long
@needs_node
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ALGORITHMS)
async def test_200_clients_miss_nothing_while_a_node_is_killed_every_ten_seconds(
    cluster: Cluster, everybody: Browsers, name: str
) -> None:
    async with balancer(cluster.ports, name, "random") as url:
        await Chaos(cluster, url, everybody, count=200).run(6, every=10, internal=True)
    await everybody.forget_all()
