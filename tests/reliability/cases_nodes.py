"""The cases of several nodes over one PostgreSQL. Their numbers are those of the promises, M1 and so on, plus 100."""

import asyncio
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx2

from adapters.postgres.database import SCHEMA
from reliability.cases import Trial, case
from support.deployment import ReconnectingDevice, free_port, parts, task_group
from support.harness import PHOTO
from support.node import Browsers, browsers
from support.node_processes import Cluster, Node, RoamingClient
from support.openai_server import KEY, openai_server
from support.owners import CREDITS, Owner, Provider, check_owner, face_site, returns_of
from support.postgres import new_server, replicated_servers, url_of
from support.provider_faults import listening
from support.proxy import Fault, Proxy
from support.wire import Wire, hang_up

#: Seconds after which a node is dead, and within which its work then goes on elsewhere.
LEASE: Final = 10.0
TAKEN_OVER: Final = 5.0

_FLAGS: Final = {"credits": CREDITS, "local_seconds": 0.2, "max_running": 3, "starts_per_minute": "off"}


class Crowd:
    """Users who do all kinds of things through any node, with a provider that counts what it is paid for."""

    def __init__(self, cluster: Cluster, caller: RoamingClient, owners: Sequence[Owner], provider: Provider) -> None:
        self.cluster = cluster
        self.caller = caller
        self.owners = owners
        self.provider = provider

    @classmethod
    @asynccontextmanager
    async def open(
        cls, folder: Path, log: str, *, users: int, pause: float = 0.05, **rest: Any
    ) -> AsyncIterator["Crowd"]:
        """Each of these users has a device that comes back to any node, and an official client at one node."""
        async with openai_server() as server, listening(face_site()) as faces, browsers() as everybody:
            options: dict[str, Any] = {
                "flags": {**_FLAGS, "editor": "openai", "fetch_allow": "127.0.0.0/8"},
                "environment": {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.base_url},
                "imports": ["openai", "asyncpg", "adapters.postgres.storage"],
            }
            async with (
                Cluster.open(folder, log, **options, **rest) as cluster,
                RoamingClient.to(*cluster.urls) as caller,
                task_group() as group,
            ):
                names = [f"user-{number}" for number in range(users)]
                owners = [
                    await _owner(name, cluster.nodes[number % 3], caller, everybody, faces.address)
                    for number, name in enumerate(names)
                ]
                crowd = cls(cluster, caller, owners, Provider(server))
                keeping = [group.create_task(owner.phone.keep(*cluster.ports)) for owner in owners]
                living = [group.create_task(owner.live(pause)) for owner in owners for _ in range(2)]
                yield crowd
                for owner in owners:
                    owner.over = True
                async with asyncio.timeout(120):
                    await asyncio.gather(*living)
                    for owner in owners:
                        while await caller.generations(owner.name, status="active"):
                            await asyncio.sleep(0.05)
                    for owner in owners:
                        await check_owner(owner, caller, crowd.provider.calls)
                await cluster.check_log(CREDITS)
                for each in keeping:
                    each.cancel()
                await everybody.forget_all()
                await hang_up([owner.phone.wire for owner in owners])

    def codes(self) -> set[str]:
        """Why generations have failed that this service did the work for."""
        own = {each.generation_id for owner in self.owners for each in owner.orders.values() if not each.external}
        events = [event for owner in self.owners for event in owner.phone.events if event["generationId"] in own]
        return {event["code"] for event in events if event["status"] == "failed"}

    def check_codes(self, *expected: str) -> None:
        """Generations have failed for these reasons only."""
        lines = [line for node in self.cluster.nodes for line in node.life.logged if " generation" in line]
        assert self.codes() <= {"cancelled", *expected}, "\n".join([str(self.codes()), *lines[-50:]])

    def count(self, code: str) -> int:
        """How many generations have failed so."""
        return sum(event.get("code") == code for owner in self.owners for event in owner.phone.events)

    def report(self, trial: Trial) -> None:
        owners = self.owners
        trial.report("generations", sum(len(owner.started) for owner in owners))
        trial.report("events sent to the devices", sum(len(each.received) + len(each.phone.events) for each in owners))
        trial.report(
            "returns, all recovered", sum(each.phone.returns + len(returns_of(each.browser)) for each in owners)
        )
        trial.report("calls without an answer, made again", self.caller.unanswered)
        trial.report("provider calls, at most one each", self.provider.calls.total())


async def _owner(name: str, node: Node, caller: RoamingClient, everybody: Browsers, face: str) -> Owner:
    wire = await Wire.open(node.port)
    await wire.connect(userId=name)
    browser = everybody.open(node.deployment.url, first={"userId": name})
    assert (await browser.ack())["ok"] is True
    return Owner(name, caller, ReconnectingDevice(wire), browser, f"{face}/face.png")


# --- M3 ----------------------------------------------------------------------------------------------------


@case(
    103,
    "{kills} times kill -9 of one of three nodes at random moments, while {users} users with two devices each start, "
    "report, cancel, delete and are granted credit through any node",
    "after each: its generations go on elsewhere within the lease and 5 s, feeds and balances hold; "
    "in the end: devices equal the log, every 202 is there, one call per paid stage",
    quick={"kills": 3, "users": 2, "pause": 0.3},
    long={"kills": 200, "users": 4, "pause": 0.5},
    alone=True,
)
async def killed_nodes(trial: Trial, kills: int, users: int, pause: float) -> None:
    chance, taken_over, holding = random.Random(3), list[float](), 0
    with new_server() as server:
        async with Crowd.open(trial.folder, server.url(), users=users) as crowd, asyncio.TaskGroup() as watches:
            cluster = crowd.cluster

            async def watch(node_id: str) -> None:
                nonlocal holding
                holding += bool(await cluster.held_by(node_id))
                taken_over.append(await cluster.seconds_until_taken_over(node_id))

            for number in range(kills):
                # One node lives on for a while: who has not watched the others for a lease takes nothing over.
                spared = cluster.nodes[number // 20 % 3]
                if number and number % 20 == 0:
                    await asyncio.sleep(LEASE)
                node = chance.choice([each for each in cluster.nodes if each is not spared])
                await asyncio.sleep(chance.uniform(0, pause))
                await cluster.kill(node)
                watches.create_task(watch(node.id))
                await asyncio.sleep(chance.uniform(0, pause))
                await cluster.start(node)
                if number % 5 == 0:
                    await cluster.check_log(CREDITS)
        crowd.report(trial)
        _check_words(cluster.logged, trial.folder)
    trial.report("kills", f"{kills}, {holding} of them of a node that held something")
    trial.report("taken over after, median", statistics.median(taken_over), "s")
    trial.at_most("taken over after", max(taken_over), LEASE + TAKEN_OVER, "s", time=True)


def _check_words(lines: Sequence[str], folder: Path) -> None:
    """I9, of what was logged."""
    words = ("Traceback", KEY, str(folder))
    assert not any(word in line for line in lines for word in words), "\n".join(lines[-50:])


# --- M4, M5 ------------------------------------------------------------------------------------------------


@case(
    104,
    "{rounds} times one of three nodes is stopped with SIGTERM and started again, and a fourth comes and goes, while "
    "the others work on paid stages",
    "nothing is interrupted, the clients of the stopped node go on elsewhere, every request is answered",
    quick={"rounds": 1, "users": 2},
    long={"rounds": 10, "users": 4},
    alone=True,
)
async def stopped_nodes(trial: Trial, rounds: int, users: int) -> None:
    chance = random.Random(4)
    with new_server() as server:
        async with Crowd.open(trial.folder, server.url(), users=users) as crowd:
            cluster = crowd.cluster
            for number in range(rounds):
                await asyncio.sleep(chance.uniform(0.2, 1))
                await cluster.stop(cluster.nodes[number % 3])
                await cluster.start(cluster.nodes[number % 3])
                fourth = await cluster.add(3 + number)
                await asyncio.sleep(chance.uniform(0.2, 1))
                await cluster.stop(fourth)
                cluster.nodes.remove(fourth)
        crowd.report(trial)
        crowd.check_codes()
        _check_words(cluster.logged, trial.folder)
    trial.report("stops", 2 * rounds)


@case(
    105,
    "one of three nodes frozen (SIGSTOP) for {seconds} s and then continued, while {users} users go on",
    "its work is taken over, its late appends are refused, its sockets catch up or come back",
    quick={"seconds": 4, "lease": 1.5, "users": 2},
    long={"seconds": 30, "lease": LEASE, "users": 4},
    alone=True,
)
async def frozen_node(trial: Trial, seconds: float, lease: float, users: int) -> None:
    prelude = f"from adapters.postgres import nodes; nodes.LEASE = {lease}"
    with new_server() as server:
        async with Crowd.open(trial.folder, server.url(), users=users, prelude=prelude) as crowd:
            cluster = crowd.cluster
            node = cluster.nodes[0]
            async with asyncio.timeout(60):
                while not await cluster.held_by(node.id):
                    await asyncio.sleep(0.02)
            began = time.monotonic()
            node.life.send(signal.SIGSTOP)
            trial.at_most(
                "taken over after", await cluster.seconds_until_taken_over(node.id), lease + TAKEN_OVER, "s", time=True
            )
            await asyncio.sleep(max(0, seconds - (time.monotonic() - began)))
            node.life.send(signal.SIGCONT)
            await cluster.until_ready()
        crowd.report(trial)
    trial.report("interrupted, and refunded", crowd.count("interrupted"))


# --- M6 ----------------------------------------------------------------------------------------------------


@case(
    106,
    "{kills} times PostgreSQL killed under load and started again, with {users} users at three nodes",
    "nothing acknowledged is lost, no work is interrupted, readiness is back and devices equal the log",
    quick={"kills": 2, "users": 2, "away": 0.5},
    long={"kills": 50, "users": 4, "away": 3.0},
    alone=True,
)
async def killed_database(trial: Trial, kills: int, users: int, away: float) -> None:
    chance, back = random.Random(6), list[float]()
    with new_server() as server:
        async with Crowd.open(trial.folder, server.url(), users=users) as crowd:
            for _ in range(kills):
                await asyncio.sleep(chance.uniform(0.5, 2))
                await asyncio.to_thread(server.stop)
                await asyncio.sleep(chance.uniform(0, away))
                await asyncio.to_thread(server.start)
                back.append(await crowd.cluster.until_ready())
                await crowd.cluster.reconnect()
                await crowd.cluster.check_log(CREDITS)
        crowd.report(trial)
        crowd.check_codes()
    trial.report("kills", kills)
    trial.report("ready again after, median", statistics.median(back), "s")
    trial.at_most("ready again after", max(back), 5, "s", time=True)


# --- M7 ----------------------------------------------------------------------------------------------------


def _silence(links: Sequence[Proxy]) -> None:
    """Nothing passes any more, on connections that are there and on new ones."""
    for link in links:
        link.strike("stall")
        link.plan.extend([Fault("stall", "up")] * 1_000)


def _resume(links: Sequence[Proxy]) -> None:
    for link in links:
        link.plan.clear()
        link.resume()


@case(
    107,
    "the link to PostgreSQL silent for {seconds} s, for one node and then for all three, with {users} users",
    "typed failures within 2 s, a quick event loop, not ready within 6 s; afterwards everything goes on",
    quick={"seconds": 7, "users": 2, "rounds": (1,)},
    long={"seconds": 10, "users": 4, "rounds": (1, 3)},
    alone=True,
)
async def silent_link(trial: Trial, seconds: float, users: int, rounds: Sequence[int]) -> None:
    port = free_port()
    with new_server(listen_addresses="'127.0.0.1'", port=str(port)):
        url = f"postgresql://stagecast@127.0.0.1:{port}/postgres"
        async with AsyncExitStack() as stack:
            links = [await stack.enter_async_context(Proxy.open(port)) for _ in range(3)]
            urls = [url.replace(str(port), str(link.port)) for link in links]
            crowd = await stack.enter_async_context(Crowd.open(trial.folder, url, users=users, links=urls))
            for count in rounds:
                await asyncio.sleep(1)
                began = time.monotonic()
                _silence(links[:count])
                silent = crowd.cluster.nodes[:count]
                async with httpx2.AsyncClient(base_url=silent[0].deployment.url, timeout=20) as http:
                    form = parts("late", PHOTO)
                    refused = await http.post("/generations/edit", files=form, headers={"X-User-Id": "late"})
                    name = f"{count} silent: "
                    trial.at_most(f"{name}refused after", time.monotonic() - began, 2, "s", time=True)
                    assert (refused.status_code, refused.json()["code"]) == (503, "log_unavailable"), refused.text
                    pauses = list[float]()
                    while time.monotonic() - began < seconds:
                        asked = time.monotonic()
                        assert (await http.get("/health/live")).status_code == 200
                        pauses.append(time.monotonic() - asked)
                        await asyncio.sleep(0.05)
                    trial.at_most(f"{name}live after, median", 1_000 * statistics.median(pauses), 100, "ms", time=True)
                    assert (await http.get("/health/ready")).status_code == 503
                _resume(links)
                trial.at_most(f"{name}ready again after", await crowd.cluster.until_ready(), 5, "s", time=True)
        crowd.report(trial)
        crowd.check_codes("interrupted")


# --- M8 ----------------------------------------------------------------------------------------------------


@case(
    108,
    "the primary killed and its synchronous standby promoted under load, {rounds} times, with {users} users",
    "nothing acknowledged is lost; everything goes on at the new primary",
    quick={"rounds": 1, "users": 2},
    long={"rounds": 5, "users": 4},
    alone=True,
)
async def promoted_standby(trial: Trial, rounds: int, users: int) -> None:
    chance, back = random.Random(8), list[float]()
    with replicated_servers(rounds + 1) as servers:
        async with Crowd.open(trial.folder, url_of(servers), users=users) as crowd:
            for number in range(rounds):
                primary, standby = servers[number : number + 2]
                await asyncio.to_thread(standby.follow, primary)
                await asyncio.sleep(chance.uniform(0.5, 2))
                await asyncio.to_thread(primary.stop)
                await asyncio.to_thread(standby.promote)
                back.append(await crowd.cluster.until_ready())
                await crowd.cluster.reconnect()
                await crowd.cluster.check_log(CREDITS)
        crowd.report(trial)
        crowd.check_codes()
    trial.report("promotions", rounds)
    trial.at_most("ready again after", max(back), 10, "s", time=True)


# --- M12 ---------------------------------------------------------------------------------------------------

#: A step as it may come next: tables get columns, and functions get successors.
_NEXT_STEP: Final = """
ALTER TABLE stagecast.users ADD COLUMN note text;
ALTER TABLE stagecast.generations ADD COLUMN note text;
ALTER TABLE stagecast.events ADD COLUMN note text;
ALTER TABLE stagecast.sessions ADD COLUMN note text;
ALTER TABLE stagecast.leases ADD COLUMN note text;
CREATE INDEX next_index ON stagecast.events (name);
CREATE FUNCTION stagecast.release_v2(node text, the_generation text) RETURNS void LANGUAGE sql AS
    'SELECT stagecast.release_v1(node, the_generation)';
"""
_NEXT_VERSION: Final = f"""
from adapters.postgres import database
database.SCHEMA = (*database.SCHEMA, {_NEXT_STEP!r})
"""


@case(
    112,
    "a node of the next schema version starts under load and migrates, and nodes of both versions work together",
    "every request is answered, nothing is interrupted",
    quick={"users": 2, "seconds": 1},
    long={"users": 4, "seconds": 20},
    alone=True,
)
async def two_versions(trial: Trial, users: int, seconds: float) -> None:
    with new_server() as server:
        async with Crowd.open(trial.folder, server.url(), users=users) as crowd:
            cluster = crowd.cluster
            await asyncio.sleep(seconds)
            await cluster.add(3, prelude=_NEXT_VERSION)
            version = await cluster.database.fetchval("SELECT version FROM stagecast.log")
            assert version == len(SCHEMA) + 1
            await asyncio.sleep(seconds)
            assert crowd.caller.unanswered == 0, "a client saw the migration"
            await cluster.stop(cluster.nodes[0])
            await cluster.start(cluster.nodes[0])  # A node of the present version starts on the next schema.
            await asyncio.sleep(seconds)
        crowd.report(trial)
        crowd.check_codes()
        _check_words(cluster.logged, trial.folder)
