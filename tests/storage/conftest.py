"""Fixtures of logs in files."""

from pathlib import Path

import pytest

from adapters.sqlite import files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stagecast.db"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes wait for a stranger for as long as a test may hold the file on a machine that is slow."""
    monkeypatch.setattr(files, "BUSY_TIMEOUT", 60)
