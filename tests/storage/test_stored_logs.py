"""Logs written by earlier versions are read completely: one for each schema, as SQL, and what their service served.

A schema step comes with the log that the version before it wrote. A stored log is never changed afterwards.
"""

import json
import sqlite3
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

from adapters.sqlite.files import SCHEMA, examine
from domain.events import decode
from domain.ports.overview import Filter
from domain.rehydrate import generation_of
from support.builders import images_of
from support.harness import Running, running
from support.sqlite_files import opened
from support.wire import Wire

FOLDER: Final = Path(__file__).parent / "stored_logs"
#: Seconds: what they hold is never too old.
RETENTION: Final = 3_000_000_000

JSON = dict[str, Any]


@pytest.mark.parametrize("name", sorted(each.stem for each in FOLDER.glob("*.sql")))
async def test_a_log_of_an_earlier_version_is_served_unchanged(name: str, tmp_path: Path) -> None:
    file = tmp_path / "log.db"
    connection = sqlite3.connect(file)
    connection.executescript((FOLDER / f"{name}.sql").read_text())
    connection.close()
    stored = json.loads((FOLDER / "served.json").read_text())

    settings: JSON = {"log": f"sqlite:///{file}", "retention": RETENTION, "public_url": "http://localhost:3000"}
    settings["deadline"] = RETENTION  # Its pipelines are not late, either.
    async with running(tmp_path / "images", **settings) as service:
        for user, expected in stored["users"].items():
            await are_served(service, user, expected, stored["unfinished"].values())
        for cursor in stored["cursors"]:
            events = await service.feed("ada", cursor["cursor"])
            after = [[event["generationId"], event["sequence"]] for event in events]
            assert after[: len(cursor["after"])] == cursor["after"]
        assert (await service.get_response(f"/generations/{stored['deleted']}", "ada")).status_code == 404
        for key, generation_id in stored["keys"].items():
            begun = await service.service.log.find_by_idempotency_key("ada", key)
            assert begun is not None
            assert begun.generation_id == generation_id
        # Sessions are taken up where they were.
        wire = await Wire.open(service.port)
        hello = await wire.connect(pid=stored["session"]["pid"], offset=stored["session"]["offset"])
        assert hello["pid"] == stored["session"]["pid"]
        wire.abort()
        # What ran goes on, or ends refunded.
        ids = stored["unfinished"]
        async with service.phone("ada") as phone:
            await service.http.post(f"/generations/{ids['external']}/cancel", headers={"X-User-Id": "ada"})
            ends = [await ended(service, phone.user, each) for each in ids.values()]
            phone.events.clear()
        assert {end["code"] for end in ends} == {"interrupted", "storage_failed", "cancelled"}
        # A grant is not made twice.
        balance = (await service.get("/me"))["credit"]
        await service.http.post(
            "/users/ada/credit",
            json={"amount": stored["grant"]["amount"]},
            headers={"Idempotency-Key": stored["grant"]["key"]},
        )
        assert (await service.get("/me"))["credit"] == balance
        # The invariants know nothing of the grant, nor of what the deleted generation cost.
        await service.http.post("/users/ada/credit", json={"amount": 1 - stored["grant"]["amount"]})

    connection = sqlite3.connect(file)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(SCHEMA),)
    connection.close()


@pytest.mark.parametrize("name", sorted(each.stem for each in FOLDER.glob("*.sql")))
async def test_the_images_of_earlier_events_are_known_by_name_and_a_check_only_reads(name: str, tmp_path: Path) -> None:
    file = tmp_path / "log.db"
    connection = sqlite3.connect(file)
    connection.executescript((FOLDER / f"{name}.sql").read_text())
    connection.close()
    before = file.read_bytes()
    assert examine(file).damage == []
    assert file.read_bytes() == before

    named = 0
    async with opened(file) as life:
        failed = await life.log.listing(Filter(status="failed"), limit=100)
        codes = Counter(generation_of(history).outcome["code"] for history in failed.histories)
        assert codes == await life.log.failures(datetime.fromtimestamp(0, UTC)) != {}
        for user in ("ada", "bob"):
            for entry in (await life.log.feed(user, after=0, anchor=0, limit=1_000)).entries:
                assert entry.images == (images_of(decode(entry.event)) if entry.event else {})
                named += len(entry.images)
    assert named > 20


async def are_served(service: Running, user: str, expected: JSON, unfinished: Any) -> None:
    served = (await service.get("/generations?limit=100", user))["generations"]
    assert [each["generationId"] for each in served] == [each["generationId"] for each in expected["generations"]]
    for now, then in zip(served, expected["generations"], strict=True):
        events = await service.events(now["generationId"], user)
        known = expected["events"][now["generationId"]]
        assert events[: len(known)] == known
        if now["generationId"] not in unfinished:
            now.pop("expiresAt")
            assert now == then
            assert events == known


async def ended(service: Running, user: str, generation_id: str) -> JSON:
    async def snapshot() -> JSON:
        return await service.get(f"/generations/{generation_id}", user)

    while (generation := await snapshot())["status"] != "failed":
        assert generation["status"] != "completed"
    return generation
