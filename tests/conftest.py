"""Fixtures that more than one test file uses."""

from collections.abc import AsyncIterator

import pytest

from http_app import Api, serve_api


@pytest.fixture
async def api_app() -> AsyncIterator[Api]:
    async with serve_api() as api:
        yield api
