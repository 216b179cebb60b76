"""`typicalSeconds` of `GET /stages`: how long the stages take."""

import json
import statistics
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest

from domain.stage_times import Entered, StageTimes
from domain.stages import FLOWS
from support.builders import NOON
from support.doubles import ScriptedComposer, ScriptedEditor, fails, reports
from support.harness import Running, running


async def typical(service: Running) -> dict[str, dict[str, float]]:
    stages = (await service.http.get("/stages")).json()
    return {
        kind: {stage["status"]: stage["typicalSeconds"] for stage in flow if "typicalSeconds" in stage}
        for kind, flow in stages.items()
    }


async def test_typical_seconds_are_the_medians_of_completed_generations(tmp_path: Path) -> None:
    editor = ScriptedEditor(reports(0.2), reports(0.5))
    async with running(tmp_path, overrides={"editor": editor, "composer": ScriptedComposer()}) as service:
        ids = list[str]()
        for count in range(5):
            assert await typical(service) == {"edit": {}, "generate": {}}, count
            ids.append(await service.start())
            await service.service.leases.drain()
        shown = await typical(service)
        assert shown["generate"] == {}
        statuses = [status for status, stage in FLOWS["edit"].items() if not stage.terminal and "swap" not in status]
        assert list(shown["edit"]) == statuses
        times: dict[str, list[float]] = {status: [] for status in statuses}
        for generation_id in ids:
            first: dict[str, datetime] = {}
            for event in await service.events(generation_id):
                first.setdefault(event["status"], datetime.fromisoformat(event["occurredAt"]))
            for status, following in zip(statuses, [*statuses[1:], "completed"], strict=True):
                times[status].append((first[following] - first[status]).total_seconds())
        assert shown["edit"] == {status: round(statistics.median(seconds), 1) for status, seconds in times.items()}


async def test_failed_and_external_generations_do_not_count(tmp_path: Path) -> None:
    editor = ScriptedEditor(fails("provider_rejected"))
    async with running(tmp_path, overrides={"editor": editor, "composer": ScriptedComposer()}) as service:
        for _ in range(6):
            await service.start()
            external = (await service.post("ada", "generate?runner=external", images=0)).json()["generationId"]
            for status in ("composition", "composition_completed", "ai_generation", "completed"):
                report: dict[str, Any] = {"status": status}
                if status == "completed":
                    report["generatedImageUrl"] = "https://example.com/a.png"
                headers = {"X-User-Id": "ada"}
                path = f"/generations/{external}/transitions"
                answer = await service.http.post(path, content=json.dumps(report), headers=headers)
                assert answer.status_code == 200, answer.text
            await service.service.leases.drain()
        assert await typical(service) == {"edit": {}, "generate": {}}


@pytest.mark.parametrize("count", [5, 6, 99, 1000])
def test_the_median_is_that_of_all_runs(count: int) -> None:
    chance, times = Random(count), StageTimes()
    seconds = [round(chance.expovariate(0.1), 3) for _ in range(count)]
    for each in seconds:
        end = NOON + timedelta(seconds=each)
        times.add("edit", [Entered("composition", NOON), Entered("composition_completed", end)])
    expected = statistics.median(seconds)
    shown = times.typical("edit", "composition")
    assert shown is not None
    assert abs(shown - expected) <= 0.0501
    assert shown == round(shown, 1)
    assert times.typical("edit", "composition_completed") is None
    assert times.typical("generate", "composition") is None
