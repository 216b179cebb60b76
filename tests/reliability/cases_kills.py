"""The cases of the durable log: lost replies and killed processes."""

import asyncio
import contextlib
import functools
import json
import random
import shutil
import signal
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from adapters.system import now
from domain.errors import Conflict, LogUnavailable
from domain.feed import Logged
from domain.generation import Generation
from domain.ports.log import Append, Start
from domain.recorder import Recorder
from domain.rehydrate import generation_of
from domain.stages import FLOWS
from reliability.cases import Trial, case
from support.builders import (
    EDIT,
    LOGS,
    RecordingFollower,
    WholeLog,
    make_generation,
    make_request,
    stage_fields,
    statuses,
)
from support.deployment import (
    Deployment,
    ReconnectingDevice,
    RetryingClient,
    pictures_of,
    task_group,
)
from support.doubles import ForwardingLog, plain_recorder
from support.node import Browsers, browsers
from support.openai_server import KEY, openai_server
from support.owners import CREDITS, PAID, Owner, Provider, check_owner, face_site, returns_of
from support.processes import together
from support.provider_faults import listening
from support.wire import Wire, hang_up, parse

# --- 3: lost replies --------------------------------------------------------------------------------------


class LosingReplies(ForwardingLog):
    """A line to the log on which half of all replies are lost, and then often another caller appends the next."""

    def __init__(self, log: WholeLog, recorder: Recorder) -> None:
        super().__init__(log)
        self._others = recorder
        self._chance = random.Random(3)
        self._made: dict[int, Logged] = {}
        self._first: dict[int, asyncio.Task[Logged]] = {}
        self.lost = self.overtaken = self.appends = 0

    async def append(self, entry: Append) -> Logged:
        first = self._first.get(entry.event_id)
        if first is None:
            self._first[entry.event_id] = first = asyncio.create_task(self._append(entry))
            return await asyncio.shield(first)  # It arrives, even if its caller has stopped waiting.
        await asyncio.wait([first])
        logged = await self.inner.append(entry)
        # The end of the generation may be known only by now.
        assert self._made[entry.event_id]._replace(end=None) == logged._replace(end=None), "another entry"
        return logged

    async def settled(self) -> None:
        """Wait until nothing is on the line."""
        await asyncio.wait(list(self._first.values()))

    async def _append(self, entry: Append) -> Logged:
        self.appends += 1
        logged = self._made[entry.event_id] = await self.inner.append(entry)
        if self._chance.random() < 0.5:
            return logged
        self.lost += 1
        if self._chance.random() < 0.5 and not entry.terminal:
            self.overtaken += 1
            history = await self.inner.generation(entry.generation_id)
            assert history is not None
            await _move_on(self._others, generation_of(history))
        raise LogUnavailable


async def _move_on(recorder: Recorder, generation: Generation) -> Generation:
    status = EDIT[EDIT.index(generation.status) + 1] if generation.sequence else EDIT[0]
    return await recorder.move(generation, status, stage_fields("edit", status))


@case(
    3,
    "{generations} generations on each log over a line that loses half of the replies; each such append is tried "
    "again, often after another caller appended the next",
    "one entry, success, the next append works; each user is charged once",
    quick={"generations": 40},
    long={"generations": 2_000},
)
async def lost_replies(trial: Trial, generations: int) -> None:
    for name, open_log in LOGS.items():
        follower = RecordingFollower()
        async with open_log(clock=now, credits=generations) as log, log.follow(follower):
            line = LosingReplies(log, plain_recorder(log))
            recorder = plain_recorder(line, patience=60)
            conflicts = await together(functools.partial(_write, recorder, line), generations)
            for number in range(generations):
                assert statuses(await log.generation(_id(number))) == list(EDIT), "not each event once"
            assert (await log.standing("ada")).credit == 0
            ids = [entry.event_id for entry in follower.entries]
            assert len(ids) == len(set(ids)) == (await log.feed("ada", after=0, anchor=0, limit=0)).head
            # Who was overtaken finds out with the next append, and only then.
            assert sum(conflicts) == line.overtaken, "an append that was made was taken for another caller's"
            assert line.overtaken > generations / 4
            trial.report(f"{name}: replies lost", f"{line.lost} of {line.appends}, {line.overtaken} overtaken")
            trial.report(f"{name}: entries", len(ids))


async def _write(recorder: Recorder, line: LosingReplies, number: int) -> int:
    """Write a generation to its end, going on from where others bring it. How often they were faster."""
    start = Start("edit", make_request().model_dump_json().encode(), f"key {number}", "same", 10**6)
    generation, conflicts = make_generation(generation_id=_id(number)), 0
    while not generation.finished:
        try:
            if generation.sequence:
                generation = await _move_on(recorder, generation)
            else:
                generation = await recorder.start(generation, start)
        except Conflict:
            conflicts += 1
            generation = await _known(line, generation)
        except LogUnavailable:  # A start is not tried for long, and that was long for a machine that is slow.
            generation = await _known(line, generation)
            conflicts += generation.sequence > 1
    return conflicts


async def _known(line: LosingReplies, generation: Generation) -> Generation:
    """The generation as the log has it, if it has it, with all that is still on its way."""
    await line.settled()
    history = await line.inner.generation(generation.generation_id)
    return generation if history is None else generation_of(history)


def _id(number: int) -> str:
    return f"edit_1_{number:016d}"


# --- 4: kill -9 -------------------------------------------------------------------------------------------

#: If the service dies just before the official client has upgraded to a WebSocket, only a missing ping makes the client
#: reconnect (see `test_recovery.py`). By default that takes up to 45 seconds.
_SHORT_PINGS: Final = """
import functools
from adapters.realtime.engineio_server import EngineServer
EngineServer.__init__ = functools.partialmethod(EngineServer.__init__, ping_interval=2, ping_timeout=3)
"""


class Left(NamedTuple):
    """An unfinished generation that a killed process has left."""

    kind: str
    status: str
    sequence: int


class Coroner:
    """Looks at what each killed process has left on the disk: in a copy, so that the next one finds it as it was."""

    def __init__(self, deployment: Deployment, owners: Sequence[Owner], paid: Collection[str]) -> None:
        """`paid`: the stages whose provider is not free."""
        self._deployment = deployment
        self._owners = owners
        self._paid = paid
        self._looked_at = {owner.name: 0 for owner in owners}
        #: What was left at first, and has to be ended by the next process that gets ready.
        self._unfinished: dict[str, Left] = {}
        #: In which stages generations were when their process was killed.
        self.found = Counter[str]()
        self.interrupted = self.repeated = 0

    def look(self, *, resumed: bool) -> None:
        """`resumed`: the process had been ready, and so had taken up all that it had found."""
        with self._copy() as log:
            assert log.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert log.execute("PRAGMA foreign_key_check").fetchall() == []
            self._check_order(log)
            self._check_credit(log)
            for owner in self._owners:
                self._check_promises(log, owner)
            if resumed:
                self._check_resumed(log)
            self._unfinished = {
                generation_id: Left(kind, json.loads(event)["status"], sequence)
                for generation_id, kind, sequence, event in log.execute(_LAST_OF_UNFINISHED)
            }
        self.found.update(left.status for left in self._unfinished.values())

    @contextmanager
    def _copy(self) -> Iterator[sqlite3.Connection]:
        with TemporaryDirectory(dir=self._deployment.folder) as folder:
            for file in (self._deployment.log, self._deployment.log.with_name("log.db-wal")):
                if file.exists():
                    shutil.copy(file, folder)
            with contextlib.closing(sqlite3.connect(f"{folder}/log.db")) as log:
                yield log

    def _check_order(self, log: sqlite3.Connection) -> None:
        """I1, I2, and positions without a gap."""
        for question in _NEVER:
            assert log.execute(question).fetchall() == [], question

    def _check_credit(self, log: sqlite3.Connection) -> None:
        """I6, exactly, at whatever moment."""
        for user, credit, reserved, refunded, granted in log.execute(_BALANCES):
            assert credit == CREDITS + granted - reserved + refunded, f"the balance of {user}"

    def _check_promises(self, log: sqlite3.Connection, owner: Owner) -> None:
        """What was answered, and what a device was sent, is there, byte for byte."""
        rows = log.execute(_EVENTS, (owner.name,)).fetchall()
        events = {(generation_id, sequence): event for generation_id, sequence, event in rows}
        for generation_id in owner.started - set(owner.deleted):
            assert (generation_id, 1) in events, "a 202 without its event"
        for event in owner.acknowledged:
            kept = events.get((event["generationId"], event["sequence"]))
            assert json.loads(kept or "null") == event or event["generationId"] in owner.deleted, "a report was lost"
        sent = owner.phone.wire.received[self._looked_at[owner.name] :]
        self._looked_at[owner.name] += len(sent)
        for each in sent:
            event = parse(each.text)[1]
            kept = events.get((event["generationId"], event["sequence"]))
            same = kept is not None and kept in each.text
            assert same or event["generationId"] in owner.deleted, "a device was sent what is not in the log"

    def _check_resumed(self, log: sqlite3.Connection) -> None:
        """What may have been paid for was ended at once (I7) and refunded; nothing else was interrupted."""
        for generation_id, left in self._unfinished.items():
            row = log.execute(_EVENT, (generation_id, left.sequence + 1)).fetchone()
            following = None if row is None or row[0] is None else json.loads(row[0])
            if left.status in self._paid:
                if following is None:
                    assert any(generation_id in owner.deleted for owner in self._owners), "left as it was"
                    continue
                assert (following["status"], following["code"]) == ("failed", "interrupted"), following
                self.interrupted += 1
            elif following is not None:
                assert "interrupted" not in (following.get("code"), following.get("faceSwapError", {}).get("code"))
                self.repeated += FLOWS[left.kind][left.status].repeats  # type: ignore[index]


_LAST_OF_UNFINISHED: Final = """
    SELECT generation_id, kind, max(sequence), event FROM generations JOIN events ON generation = generations.id
    WHERE end_position IS NULL AND json_extract(order_json, '$.external') = 0 GROUP BY generations.id
"""
_EVENTS: Final = """
    SELECT generation_id, sequence, event FROM events
    JOIN generations ON generations.id = generation JOIN users ON users.id = events.owner
    WHERE user_id = ? AND event IS NOT NULL
"""
_EVENT: Final = """
    SELECT event FROM events JOIN generations ON generations.id = generation WHERE generation_id = ? AND sequence = ?
"""
_BALANCES: Final = """
    SELECT user_id, credit,
        (SELECT count(*) FROM generations WHERE owner = users.id AND reserved),
        (SELECT count(*) FROM events WHERE owner = users.id AND name = 'generation_failed'),
        (SELECT coalesce(sum(amount), 0) FROM grants WHERE owner = users.id)
    FROM users
"""
_NEVER: Final = (
    "SELECT generation FROM events GROUP BY generation HAVING min(sequence) <> 1 OR max(sequence) <> count(*)",
    "SELECT users.id FROM users JOIN events ON owner = users.id GROUP BY users.id"
    " HAVING max(position) <> count(*) OR max(position) <> head",
    """SELECT generations.id FROM generations JOIN events ON generation = generations.id GROUP BY generations.id HAVING
        sum(name IN ('generation_completed', 'generation_failed')) <> (end_position IS NOT NULL)
        OR coalesce(end_position, max(position)) <> max(position)""",
)


@case(
    4,
    "{kills} times kill -9 of the service at random moments, one in {fresh} started by the command line, while {users} "
    "users with two devices each start, report, cancel, delete and are granted credit",
    "after each: every 202 and every event sent is in the log, balances hold, what was left is resumed or interrupted; "
    "in the end: devices equal the log, one call per paid stage, no stray image",
    quick={"kills": 12, "fresh": 12, "users": 3, "alive": 0.5},
    long={"kills": 500, "fresh": 10, "users": 5, "alive": 1.0},
)
async def killed_at_random(trial: Trial, kills: int, fresh: int, users: int, alive: float) -> None:
    chance = random.Random(4)
    async with openai_server() as server, listening(face_site()) as faces, browsers() as everybody:
        deployment = Deployment(
            trial.folder / "killed",
            {
                "credits": CREDITS,
                "editor": "openai",
                "local_seconds": 0.2,
                "max_running": 3,
                "fetch_allow": "127.0.0.0/8",
            },
            {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.base_url},
            ["openai"],
            _SHORT_PINGS,
        )
        provider, starts, unready = Provider(server), list[float](), 0
        async with RetryingClient.open(deployment.url) as caller, task_group() as group:
            async with deployment.serving(fresh=True) as life:
                names = [f"user-{number}" for number in range(users)]
                owners = [await _owner(name, deployment, caller, everybody, faces.address) for name in names]
                coroner = Coroner(deployment, owners, PAID)
                keeping = [group.create_task(owner.phone.keep(deployment.port)) for owner in owners]
                living = [group.create_task(owner.live(0.05)) for owner in owners for _ in range(2)]
                await asyncio.sleep(chance.uniform(0, alive))
            coroner.look(resumed=True)
            _check_words(life.logged, deployment)
            for number in range(1, kills):
                began = time.monotonic()
                async with deployment.life(fresh=number % fresh == 0) as life:
                    if chance.random() < 0.8:
                        await life.ready()
                        starts.append(time.monotonic() - began)
                        if chance.random() < 0.5:
                            await _told(owners, chance.choice((PAID, ("face_swap",))), alive)
                    await asyncio.sleep(chance.uniform(0, 0.15))
                unready += not life.was_ready
                coroner.look(resumed=life.was_ready)
                _check_words(life.logged, deployment)
            for owner in owners:
                owner.over = True
            async with deployment.serving() as life:
                began = time.monotonic()
                async with asyncio.timeout(100):
                    await asyncio.gather(*living)
                    for owner in owners:
                        while await caller.generations(owner.name, status="active"):
                            await asyncio.sleep(0.02)
                trial.at_most("all had ended after", time.monotonic() - began, 30, "s", time=True)
                life.send(signal.SIGTERM)
                assert await life.ended() == 0
            coroner.look(resumed=True)
            _check_words(life.logged, deployment)
            trial.report("images left by the killed", len(deployment.pictures))
            async with deployment.serving() as life:
                for owner in owners:
                    await check_owner(owner, caller, provider.calls)
                await _check_pictures(deployment, owners, caller)
                for each in keeping:
                    each.cancel()
                life.send(signal.SIGTERM)
                assert await life.ended() == 0
        await everybody.forget_all()
        await hang_up([owner.phone.wire for owner in owners])
    trial.report("kills", f"{kills}, {unready} of them before it was ready")
    trial.report("a start took", f"{statistics.median(starts):.2f} s, at most {max(starts):.2f}")
    trial.report("generations", sum(len(owner.started) for owner in owners))
    trial.report("in stages when killed", ", ".join(f"{name} {count}" for name, count in coroner.found.most_common()))
    trial.report("interrupted, and refunded", coroner.interrupted)
    trial.report("free face swaps made again", coroner.repeated)
    trial.report("events sent to the devices", sum(len(owner.received) + len(owner.phone.events) for owner in owners))
    trial.report(
        "returns, all recovered", sum(owner.phone.returns + len(returns_of(owner.browser)) for owner in owners)
    )
    trial.report("calls without an answer, made again", caller.unanswered)
    trial.report("provider calls, at most one each", provider.calls.total())


async def _owner(name: str, deployment: Deployment, caller: RetryingClient, everybody: Browsers, face: str) -> Owner:
    wire = await Wire.open(deployment.port)
    await wire.connect(userId=name)
    browser = everybody.open(deployment.url, first={"userId": name})  # Like the seed's: it authenticates once.
    assert (await browser.ack())["ok"] is True
    return Owner(name, caller, ReconnectingDevice(wire), browser, f"{face}/face.png")


async def _told(owners: Sequence[Owner], stages: Collection[str], seconds: float) -> None:
    """Wait until a device was sent one of these stages, or for so long."""
    lists = [(owner.phone.wire.received, len(owner.phone.wire.received)) for owner in owners]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not any(parse(each.text)[1]["status"] in stages for sent, seen in lists for each in sent[seen:]):
                await asyncio.sleep(0.01)


def _check_words(lines: Sequence[str], deployment: Deployment) -> None:
    """I9, of what was logged."""
    words = ("Traceback", "ERROR", KEY, str(deployment.folder))
    assert not any(word in line for line in lines for word in words), "\n".join(lines)


async def _check_pictures(deployment: Deployment, owners: Sequence[Owner], caller: RetryingClient) -> None:
    """Every picture that an event names is there, apart from lost inputs, and no other."""
    own, named = f"http://localhost:{deployment.port}/images/", set[str]()
    for owner in owners:
        named |= pictures_of(await caller.feed(owner.name, owner.phone.beginning), own)
    for name in named:
        assert (await caller.ask("GET", f"/images/{name}", "demo")).status_code == 200
    assert deployment.pictures == named, "stray images"
