"""Fixtures of the contract suites of logs."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from support.builders import EventRecorder, SteppableClock, WholeLog
from support.event_log import LOGS, LogOpener


@pytest.fixture(params=list(LOGS))
async def opener(request: pytest.FixtureRequest) -> AsyncIterator[LogOpener]:
    async with AsyncExitStack() as stack:
        yield LogOpener(LOGS[request.param], stack, SteppableClock())


@pytest.fixture
async def recorder(opener: LogOpener) -> EventRecorder:
    return await opener()


@pytest.fixture
def log(recorder: EventRecorder) -> WholeLog:
    return recorder.log
