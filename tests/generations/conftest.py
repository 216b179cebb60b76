"""Fixtures of tests that run on every log."""

from collections.abc import AsyncIterator

import pytest

from support.builders import SteppableClock, WholeLog
from support.event_log import LOGS


@pytest.fixture
def clock() -> SteppableClock:
    return SteppableClock()


@pytest.fixture(params=list(LOGS))
async def log(request: pytest.FixtureRequest, clock: SteppableClock) -> AsyncIterator[WholeLog]:
    async with LOGS[request.param](clock=clock, credits=10) as opened:
        yield opened
