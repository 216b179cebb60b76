"""Fixtures that more than one test file uses."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from http_app import Api, serve_api

# Nothing here is paid for, whatever keys lie about: neither in this process nor in those that it starts.
for _key in ("OPENAI_API_KEY", "REPLICATE_API_TOKEN"):
    os.environ.pop(_key, None)


@pytest.fixture
async def api_app() -> AsyncIterator[Api]:
    async with serve_api() as api:
        yield api


@pytest.fixture(params=["memory", "sqlite"])
def log_setting(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the log is: what goes by it is tried on every log."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/log.db"
