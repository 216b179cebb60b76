"""The contract of `domain.ports.overview.Overview`: the generations of all users, and what failed."""

from datetime import timedelta
from typing import Any, Final, cast

import pytest

from domain.errors import FailureCode
from domain.generation import Generation
from domain.ports.overview import Filter, Overview
from support.builders import NOON, EventRecorder, WholeLog

#: Odd enough that no search in text finds the right one.
TRICKY: Final[dict[str, Any]] = {
    "metadata": {"code": "cancelled", "status": "openai_editing", "\u0000": '"code":"cancelled"'}
}


@pytest.fixture
def overview(log: WholeLog) -> Overview:
    return cast(Overview, log)


async def ids(overview: Overview, wanted: Filter = Filter(), limit: int = 100) -> list[str]:  # noqa: B008 (immutable)
    found = await overview.listing(wanted, limit=limit)
    assert found.next is None
    return [history.generation_id for history in found.histories]


async def fail(recorder: EventRecorder, generation: Generation, code: FailureCode) -> str:
    await recorder.move(generation, "failed", error='It broke: "code":"internal"', code=code, retryable=True)
    return generation.generation_id


async def test_generations_of_all_users_are_listed_newest_first_page_by_page(
    recorder: EventRecorder, overview: Overview
) -> None:
    assert await ids(overview) == []
    started = [(await recorder.start(user)).generation_id for user in ("ada", "bob", "ada", "cem", "bob")]
    assert await ids(overview) == started[::-1]
    pages, before = [], None
    while True:
        page = await overview.listing(Filter(), before=before, limit=2)
        pages.append([history.generation_id for history in page.histories])
        if (before := page.next) is None:
            break
        await recorder.start("dan")  # What comes meanwhile moves no page.
    assert pages == [started[:2:-1], started[2:0:-1], started[:1]]
    whole = await overview.listing(Filter(), limit=10)
    assert [history.user_id for history in whole.histories][-5:] == ["bob", "cem", "ada", "bob", "ada"]


async def test_filters_hold_alone_and_together(recorder: EventRecorder, log: WholeLog, overview: Overview) -> None:
    waiting = await recorder.start("ada", **TRICKY)
    working = await recorder.move(await recorder.start("bob", "generate", **TRICKY), "composition")
    completed = await recorder.run_to_end("ada", **TRICKY)
    cancelled = await fail(recorder, await recorder.start("bob", **TRICKY), "cancelled")
    internal = await fail(recorder, await recorder.start("ada", "generate", **TRICKY), "internal")
    every = [internal, cancelled, completed.generation_id, working.generation_id, waiting.generation_id]
    for wanted, expected in {
        Filter(): every,
        Filter(user_id="ada"): [every[0], every[2], every[4]],
        Filter(user_id="nobody"): [],
        Filter(kind="generate"): [every[0], every[3]],
        Filter(status="active"): every[3:],
        Filter(status="finished"): every[:3],
        Filter(status="started"): every[4:],
        Filter(status="composition"): [every[3]],
        Filter(status="openai_editing"): [],
        Filter(status="completed"): [every[2]],
        Filter(status="failed"): every[:2],
        Filter(code="cancelled"): [every[1]],
        Filter(code="provider_timeout"): [],
        Filter(generation_id=every[2]): [every[2]],
        Filter(generation_id="edit_1_unknown"): [],
        Filter(user_id="ada", kind="edit", status="finished"): [every[2]],
        Filter(user_id="bob", status="failed", code="cancelled"): [every[1]],
        Filter(user_id="bob", status="started"): [],
        Filter(user_id="ada", generation_id=every[1]): [],
    }.items():
        assert await ids(overview, wanted) == expected, wanted
    [listed] = (await overview.listing(Filter(generation_id=internal), limit=1)).histories
    assert listed == await log.summary(internal)


async def test_failures_are_counted_by_code_since_a_moment(recorder: EventRecorder, overview: Overview) -> None:
    await recorder.run_to_end()
    for code, seconds in (("internal", 30), ("cancelled", 30), ("cancelled", 30)):
        await fail(recorder, await recorder.start(**TRICKY), cast(FailureCode, code))
        recorder.clock.step(seconds)
    assert await overview.failures(NOON) == {"internal": 1, "cancelled": 2}
    assert await overview.failures(NOON + timedelta(seconds=30)) == {"cancelled": 2}
    assert await overview.failures(NOON + timedelta(seconds=61)) == {}


@pytest.mark.parametrize("retention", [False, True])
async def test_a_removed_generation_is_neither_listed_nor_counted(
    recorder: EventRecorder, log: WholeLog, overview: Overview, retention: bool
) -> None:
    removed = await fail(recorder, await recorder.start(), "internal")
    kept = await recorder.run_to_end()
    await log.remove(removed, retention=retention)
    for wanted in (Filter(), Filter(user_id="ada"), Filter(kind="edit"), Filter(status="finished")):
        assert await ids(overview, wanted) == [kept.generation_id], wanted
    assert await ids(overview, Filter(status="failed")) == []
    assert await ids(overview, Filter(generation_id=removed)) == []
    assert await overview.failures(NOON) == {}
