"""The parts of a service: chosen by the settings, replaced by name, and fixed afterwards."""

import dataclasses
from pathlib import Path

import pytest

from adapters.memory.queue import MemoryQueue
from api.settings import Settings
from api.wiring import wire


def settings(images: Path) -> Settings:
    return Settings(_env_file=None, images=images, editor="local", face_swap="local")


def test_a_misspelt_part_is_refused(tmp_path: Path) -> None:
    # Without the comment mypy refuses it too, and mypy reports a comment that is not needed.
    with pytest.raises(TypeError, match="qeue"):
        wire(settings(tmp_path), qeue=MemoryQueue())  # type: ignore[call-arg]
    assert list(tmp_path.iterdir()) == [], "no part was built"


async def test_a_replaced_part_is_used_and_no_part_can_be_changed_afterwards(tmp_path: Path) -> None:
    queue = MemoryQueue()
    parts = wire(settings(tmp_path), queue=queue)
    assert parts.queue is queue
    with pytest.raises(dataclasses.FrozenInstanceError):
        parts.queue = MemoryQueue()  # type: ignore[misc]
    await parts.log.close()
    await parts.images.close()
    parts.threads.close()
