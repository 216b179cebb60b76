"""Official clients and a service, shared by the tests of a module."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio

from adapters.system import now
from support.builders import IN_MEMORY, EventWriter, SteppableClock
from support.harness import running
from support.node import browsers
from support.recovery import RecoveryHarness


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["memory", "sqlite"])
async def shared_harness(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[RecoveryHarness]:
    images: Path = tmp_path_factory.mktemp("images")
    with TemporaryDirectory(dir=IN_MEMORY) as folder:
        log = "memory://" if request.param == "memory" else f"sqlite:///{folder}/log.db"
        async with running(images, log=log) as service, AsyncExitStack() as listening, browsers() as everybody:
            harness = RecoveryHarness(
                service, everybody, EventWriter(service.service.log, SteppableClock(now())), listening
            )
            yield harness
            await harness.close()


@pytest_asyncio.fixture(loop_scope="module")
async def harness(shared_harness: RecoveryHarness) -> AsyncIterator[RecoveryHarness]:
    yield shared_harness
    await shared_harness.close()
