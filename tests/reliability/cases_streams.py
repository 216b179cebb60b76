"""The cases of Server-Sent Events: clients that resume by `Last-Event-ID`, and clients that read nothing."""

import asyncio
import itertools
import json
import random
import signal
from dataclasses import dataclass, field

import httpx2

from reliability.cases import Trial, case
from support.deployment import Deployment, RequestedGeneration, RetryingClient, task_group
from support.wire import JSON


@dataclass
class StreamReader:
    """What an EventSource does: it reconnects with the last id until it is answered with 204 or cancelled."""

    path: str
    user: str
    last_id: str = ""
    events: list[JSON] = field(default_factory=list)
    #: Of each connection to a feed, whether it continued from the last id.
    recovered: list[bool] = field(default_factory=list)
    connections: int = 0

    async def read(self, http: httpx2.AsyncClient) -> None:
        while True:
            try:
                headers = {"X-User-Id": self.user} | ({"Last-Event-ID": self.last_id} if self.last_id else {})
                async with http.sse(self.path, headers=headers) as source:
                    if source.response.status_code == 204:
                        return
                    assert source.response.status_code == 200, source.response.status_code
                    self.connections += 1
                    async for block in source:
                        self._take(block)
            except httpx2.TransportError:
                pass
            await asyncio.sleep(0.02)

    def _take(self, block: httpx2.ServerSentEvent) -> None:
        self.last_id = block.id or self.last_id
        if block.event == "authenticated":
            self.recovered.append(json.loads(block.data)["recovered"])
        elif block.data and block.event != "queue_position":
            self.events.append(json.loads(block.data))


@case(
    40,
    "{kills} times kill -9 of the service at random moments while {users} users, with a stream of the feed and one of "
    "each generation, run {each} generations each",
    "every stream resumes by its last id; in the end each has all events of the log, in order and once, and gets "
    "204 after the last",
    quick={"kills": 3, "users": 2, "each": 3, "alive": 0.4},
    long={"kills": 100, "users": 5, "each": 60, "alive": 0.8},
)
async def streams_of_a_killed_service(trial: Trial, kills: int, users: int, each: int, alive: float) -> None:
    chance = random.Random(40)
    flags = {"local_seconds": 0.1, "max_running": 2, "max_per_user": 1_000, "max_waiting": 1_000, "credits": "off"}
    deployment = Deployment(trial.folder / "streams", flags)
    names = [f"user-{number}" for number in range(users)]
    limits = httpx2.Limits(max_connections=None)
    async with (
        RetryingClient.open(deployment.url) as caller,
        httpx2.AsyncClient(base_url=deployment.url, timeout=60, limits=limits) as http,
        task_group() as group,
    ):
        async with deployment.serving():
            begin = {name: (await caller.get("/events", name))["cursor"] for name in names}
            feeds = {name: StreamReader("/events", name, last_id=begin[name]) for name in names}
            following = [group.create_task(feed.read(http)) for feed in feeds.values()]
            ones: list[StreamReader] = []

            async def run(name: str, number: int) -> None:
                wanted = RequestedGeneration(f"{name} {number}", "generate", {}, external=False)
                one = StreamReader(f"/generations/{await wanted.start(caller, name)}/events", name)
                ones.append(one)
                await one.read(http)

            running = [group.create_task(run(*which)) for which in itertools.product(names, range(each))]
            await asyncio.sleep(chance.uniform(0.1, alive))
        for _ in range(kills - 1):
            async with deployment.serving():
                await asyncio.sleep(chance.uniform(0, alive))
        async with deployment.serving() as life:
            async with asyncio.timeout(300):
                await asyncio.gather(*running)
            for name, feed in feeds.items():
                log = await caller.feed(name, begin[name])
                async with asyncio.timeout(60):
                    while len(feed.events) < len(log):
                        await asyncio.sleep(0.01)
                assert feed.events == log, "a feed's stream differs from the log"
                assert all(feed.recovered), "a stream did not resume"
            for one in ones:
                history = await caller.get(one.path, one.user)
                assert one.events == [item["data"] for item in history["events"]], "a stream differs from the log"
            for task in following:
                task.cancel()
            life.send(signal.SIGTERM)
            assert await life.ended() == 0
    trial.report("streams", len(ones) + users)
    trial.report("connections", sum(reader.connections for reader in (*ones, *feeds.values())))
    trial.report("events", sum(len(reader.events) for reader in (*ones, *feeds.values())))
