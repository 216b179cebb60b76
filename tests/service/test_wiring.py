"""The parts of a service: chosen by the settings, or given."""

from pathlib import Path

import pytest

from api.settings import Settings
from api.wiring import wire
from support.builders import memory_storage


def settings(images: Path) -> Settings:
    return Settings(_env_file=None, images=images, editor="local", face_swap="local")


async def test_a_misspelt_part_is_refused(tmp_path: Path) -> None:
    # Without the comment mypy refuses it too, and mypy reports a comment that is not needed.
    folder = tmp_path / "images"
    with pytest.raises(TypeError, match="storrage"):
        await wire(settings(folder), storrage=memory_storage())  # type: ignore[call-arg]
    assert not folder.exists(), "no part was built"


async def test_a_storage_that_is_given_is_used(tmp_path: Path) -> None:
    storage = memory_storage()
    parts = await wire(settings(tmp_path), storage=storage)
    assert parts.storage is storage
    await parts.storage.close()
    await parts.images.close()
    parts.threads.close()
