"""The cases of the stores: one owner for each, damaged rows, and files that are lost while a service uses them.

They belong to the registry of `cases`.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from adapters.sqlite.files import examine
from reliability.cases import Trial, case
from support.deployment import Deployment, Life, RetryingClient, parts
from support.harness import PHOTO
from support.wire import JSON, Wire, hang_up

_WAYS: Final = ("moved", "wal", "removed", "replaced")
_LOST: Final = "the file of the log was removed, replaced or cut off"


@asynccontextmanager
async def _served(deployment: Deployment) -> AsyncIterator[tuple[Life, RetryingClient]]:
    async with deployment.serving() as life, RetryingClient.open(deployment.url) as caller:
        yield life, caller


async def _start(caller: RetryingClient, user: str = "ada") -> str:
    answer = await caller.once("POST", "/generations/edit", user, files=parts("a red hat", PHOTO))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["generationId"])


async def _completed(caller: RetryingClient, generation_id: str, user: str = "ada") -> JSON:
    async with asyncio.timeout(60):
        while (found := await caller.get(f"/generations/{generation_id}", user))["status"] != "completed":
            await asyncio.sleep(0.01)
    return found


async def _told(wire: Wire, count: int) -> None:
    await asyncio.wait_for(wire.until(lambda: len(wire.events) >= count), 60)


async def _check_pictures(caller: RetryingClient, *generations: JSON) -> int:
    urls = [found[key] for found in generations for key in ("compositionUrl", "editedImageUrl")]
    for url in urls:
        answer = await caller.once("GET", f"/images/{url.rpartition('/')[2]}", "ada")
        assert answer.status_code == 200, "a picture is gone"
    return len(urls)


async def _is_refused(life: Life) -> None:
    assert await life.ended() == 3, life.lines
    assert len(life.lines) == 1, life.lines


@case(
    26,
    "{rounds} times a service works on a folder, and others are started on it: in memory, on another file, on the same "
    "file by another name; the first is killed, and so again",
    "every other ends with 3 and one sentence; after each: no picture is missing; its own restart is served",
    quick={"rounds": 1},
    long={"rounds": 20},
)
async def one_owner(trial: Trial, rounds: int) -> None:
    deployment, refused, pictures = Deployment(trial.folder / "service"), 0, 0
    generations = list[JSON]()
    for number in range(rounds):
        hard, soft = trial.folder / f"hard-{number}.db", trial.folder / f"soft-{number}.db"
        async with _served(deployment) as (life, caller):
            generations.append(await _completed(caller, await _start(caller)))
            os.link(deployment.log, hard)
            soft.symlink_to(deployment.log)
            names = (f"sqlite:///{trial.folder}/other.db", f"sqlite:///{hard}", f"sqlite:///{soft}", "memory://")
            async with contextlib.AsyncExitStack() as stack:
                others = [Deployment(deployment.folder) for _ in names]
                lives = [
                    await stack.enter_async_context(other.life(log=log))
                    for other, log in zip(others, names, strict=True)
                ]
                await asyncio.gather(*map(_is_refused, lives))
            refused += len(names)
            pictures += await _check_pictures(caller, *generations)
            life.send(signal.SIGKILL)
            await life.ended()
        async with Deployment(deployment.folder).life(log="memory://") as other:
            await _is_refused(other)
        refused += 1
        async with _served(deployment) as (_, caller):
            pictures += await _check_pictures(caller, *generations)
    trial.report("refused with 3", refused)
    trial.report("pictures fetched, none missing", pictures)


@case(
    27,
    "{rounds} times random columns of random rows of a log with {users} users are overwritten while it is closed",
    "it starts; the damaged answer 404 and are listed by check; all others are listed, work and end as before; no line "
    "quotes a row",
    quick={"rounds": 1, "users": 2},
    long={"rounds": 100, "users": 10},
)
async def damaged_rows(trial: Trial, rounds: int, users: int) -> None:
    names, chance, found, served = [f"user-{number}" for number in range(users)], random.Random(27), 0, 0
    deployment = Deployment(trial.folder / "service")
    before = dict[str, tuple[str, JSON]]()
    async with _served(deployment) as (life, caller):
        for user in names:
            for _ in range(2):
                generation_id = await _start(caller, user)
                before[generation_id] = user, await _completed(caller, generation_id, user)
        life.send(signal.SIGTERM)
        assert await life.ended() == 0
    whole = trial.folder / "whole.db"
    shutil.copy(deployment.log, whole)
    for _ in range(rounds):
        for left in deployment.log.parent.glob("log.db-*"):
            left.unlink()
        shutil.copy(whole, deployment.log)
        victims = {_damage(deployment.log, chance) for _ in range(chance.randint(1, 3))}
        found += len(damage := examine(deployment.log).damage)
        assert all(any(victim in line for line in damage) for victim in victims), damage
        async with _served(deployment) as (life, caller):
            for generation_id, (user, snapshot) in before.items():
                answer = await caller.once("GET", f"/generations/{generation_id}", user)
                if generation_id in victims:
                    assert answer.status_code == 404, "a damaged generation answers"
                else:
                    assert answer.json() == snapshot, "another generation changed"
                    served += 1
            for user in names:
                listed = {each["generationId"] for each in await caller.generations(user)}
                assert listed == {each for each, (owner, _) in before.items() if owner == user} - victims
                page = await caller.get("/events", user)
                wire = await Wire.open(deployment.port)
                await wire.connect(userId=user)
                generation_id = await _start(caller, user)
                await _completed(caller, generation_id, user)
                events = await caller.feed(user, page["cursor"])
                await _told(wire, len(events))
                assert wire.events == events, "I4"
                await hang_up([wire])
                assert [event["sequence"] for event in events] == list(range(1, len(events) + 1)), "I1"
            assert not any("red hat" in line or "Traceback" in line for line in life.lines), "I9"
            assert sum("counts as deleted" in line for line in life.lines) == len(victims), life.lines
    trial.report("damaged generations found", found)
    trial.report("others, as before", served)


def _damage(log: Path, chance: random.Random) -> str:
    """Overwrite something of one generation that cannot be read without it, and return its id."""
    values = ("x'7b22'", "x'ff'", "'x'", "x''", "-1")
    with contextlib.closing(sqlite3.connect(log)) as connection:
        generations = connection.execute("SELECT id, generation_id FROM generations").fetchall()
        row, generation_id = chance.choice(generations)
        sequence, value = chance.randint(1, 6), chance.choice(values)
        column = chance.choice(("event", "sequence", "position"))
        if column != "event":
            value = "-1" if column == "sequence" else f"-{row}"
        on_event = f"UPDATE events SET {column} = {value} WHERE generation = {row} AND sequence = {sequence}"
        of_row = (
            f"UPDATE generations SET {chance.choice(('kind', 'order_json', 'end_position'))} = {value} WHERE id = {row}"
        )
        connection.execute(chance.choice((on_event, of_row)))
        connection.commit()
    return str(generation_id)


@case(
    38,
    "{rounds} times the file of the log is removed, replaced or moved away and back, or its write-ahead log removed, "
    "while a service works",
    "noticed by the next start; 503 log_unavailable, not ready, one line; what was answered is still served",
    quick={"rounds": 4},
    long={"rounds": 80},
)
async def lost_files(trial: Trial, rounds: int) -> None:
    turns, noticed = asyncio.Semaphore(4), list[float]()

    async def one(number: int) -> None:
        async with turns:
            deployment = Deployment(trial.folder / f"service-{number}")
            noticed.append(await _lose(deployment, _WAYS[number % len(_WAYS)]))

    async with asyncio.TaskGroup() as group:
        for number in range(rounds):
            group.create_task(one(number))
    trial.at_most("noticed after, at most", max(noticed), 5, "s", time=True)
    trial.report("answers still served", len(noticed))


async def _lose(deployment: Deployment, way: str) -> float:
    """Lose the log's file in this way. Return after how many seconds that was noticed."""
    async with _served(deployment) as (life, caller):
        generation = await _completed(caller, await _start(caller))
        away = deployment.log.with_name("away.db")
        (Path(f"{deployment.log}-wal") if way == "wal" else deployment.log).rename(away)
        if way == "replaced":
            shutil.copy(away, deployment.log)
        began = time.monotonic()
        while (ready := await caller.once("GET", "/health/ready", "ada")).status_code == 200:
            await asyncio.sleep(0.01)
        noticed = time.monotonic() - began
        assert ready.status_code == 503
        refusal = await caller.once("POST", "/generations/edit", "ada", files=parts("x", PHOTO))
        assert (refusal.status_code, refusal.json()["code"]) == (503, "log_unavailable"), refusal.text
        assert await caller.get(f"/generations/{generation['generationId']}") == generation, "an answer is lost"
        await _check_pictures(caller, generation)
        assert sum(_LOST in line for line in life.lines) == 1, life.lines
        if way == "moved":
            away.rename(deployment.log)
            await _completed(caller, await _start(caller))
        life.send(signal.SIGKILL)
        await life.ended()
    if way in ("moved", "wal"):
        async with _served(deployment) as (_, caller):
            assert await caller.get(f"/generations/{generation['generationId']}") == generation, "an answer is lost"
    return noticed
