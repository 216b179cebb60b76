"""Fixtures of attacks on the service."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.attacks import AttackedService, attacked_service


@pytest.fixture
async def attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AttackedService]:
    async with attacked_service(tmp_path, monkeypatch) as attacked:
        yield attacked


@pytest.fixture
async def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AttackedService]:
    """With a key configured."""
    async with attacked_service(tmp_path, monkeypatch, key=True) as attacked:
        yield attacked
