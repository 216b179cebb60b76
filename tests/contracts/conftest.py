"""Fixtures of the contract suites of logs."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from domain.ports.log import EventLog
from support.builders import LOGS, Scribe, SteppableClock
from support.event_log import Opener


@pytest.fixture(params=list(LOGS))
async def opener(request: pytest.FixtureRequest) -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:
        yield Opener(LOGS[request.param], stack, SteppableClock())


@pytest.fixture
async def scribe(opener: Opener) -> Scribe:
    return await opener()


@pytest.fixture
def log(scribe: Scribe) -> EventLog:
    return scribe.log
