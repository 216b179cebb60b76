"""Fixtures that more than one test file uses."""

import gc
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from tempfile import TemporaryDirectory
from typing import Final

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from support import postgres
from support.browser import chromium
from support.builders import IN_MEMORY
from support.http_app import Api, serve_api
from support.s3 import S3, serving_s3

# No test calls a paid provider, whatever keys the environment has, in this process or its children.
for _key in ("OPENAI_API_KEY", "REPLICATE_API_TOKEN"):
    os.environ.pop(_key, None)


#: What takes long begins first, so that no worker is left alone with it in the end.
_FIRST: Final = (
    "test_install",
    "test_balancers",
    "test_cases",
    "test_page_story",
    "test_page_connection",
    "test_recovery",
    "test_recovery_limits",
    "test_recovery_sessions",
)


# Nothing that collection makes is garbage: it is not searched for garbage, neither meanwhile nor by the tests.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in _FIRST)


@pytest.fixture(scope="session", autouse=True)
def _postgres() -> Iterator[None]:
    """Stops the server of this test run, which is started by the first test that opens a log in it."""
    yield
    postgres.shared.release()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    with serving_s3() as s3:
        yield s3


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """S3 without faults, and what its clients need in the environment."""
    for name, value in s3_server.variables.items():
        monkeypatch.setenv(name, value)
    s3_server.calm()
    yield s3_server
    s3_server.calm()


@pytest_asyncio.fixture(loop_scope="module")
async def api_app() -> AsyncIterator[Api]:
    async with serve_api() as api:
        yield api


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_api() -> AsyncIterator[Api]:
    """One that every test leaves as it is."""
    async with serve_api() as api:
        yield api


@pytest.fixture(params=["memory", "sqlite"])
def log_setting(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the log is: what goes by it is tried on every log, and no test waits for the disk."""
    with TemporaryDirectory(dir=IN_MEMORY) as folder:
        yield "memory://" if request.param == "memory" else f"sqlite:///{folder}/log.db"


_numbers: Final = itertools.count()


@pytest.fixture
def eve() -> str:
    """A user whom no other test knows."""
    return f"eve-{next(_numbers)}"
