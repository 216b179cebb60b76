"""What is removed without anybody asking."""

import asyncio
from datetime import timedelta
from pathlib import Path

from domain.errors import LogUnavailable
from domain.housekeeping import Housekeeping
from support.builders import SteppableClock
from support.doubles import ForwardingLog, InMemoryBackend, Pause, ScriptedEditor, png
from support.harness import PHOTO, TIMEOUT, running


async def test_a_sweep_removes_only_pictures_that_no_event_names() -> None:
    pause = Pause()
    backend = InMemoryBackend()
    async with backend.open():
        done = await backend.make()
        named = dict(backend.images.kept)
        backend.editor.acts = [pause]
        await backend.start()
        await pause.reached.wait()
        needed = dict(backend.images.kept)
        await backend.images.save(done.generation_id, png("of a stage that was lost"))
        await backend.images.save("edit_1_0000000000000000", png("of a start that was lost"))
        await Housekeeping(backend.log, backend.log, backend.stored).sweep(now=backend.clock())
        assert backend.images.kept == needed
        assert named.items() <= needed.items()
        pause.released.set()
        await backend.settled()


async def test_finished_generations_go_with_their_pictures_when_retention_ends_and_running_ones_never() -> None:
    pause = Pause()
    backend = InMemoryBackend(clock=SteppableClock())
    async with backend.open():
        first = await backend.make()
        backend.clock.step(60)
        second = await backend.make()
        backend.editor.acts = [pause]
        running_one = await backend.start()
        await pause.reached.wait()
        backend.clock.step(30)
        keeper = Housekeeping(backend.log, backend.log, backend.stored)
        await keeper.purge(ended_before=backend.clock() - timedelta(seconds=60))
        assert await backend.log.generation(first.generation_id) is None
        assert await backend.log.generation(second.generation_id) is not None
        assert not any(name.startswith(first.generation_id) for name in backend.images.kept)
        backend.clock.step(100_000)
        await keeper.purge(ended_before=backend.clock())
        assert await backend.log.generation(second.generation_id) is None
        assert await backend.log.generation(running_one.generation_id) is not None
        pause.released.set()
        await backend.settled()


async def test_on_a_full_disk_retention_removes_pictures_so_that_the_log_can_remove_the_history() -> None:
    class Full(ForwardingLog):
        async def remove(self, generation_id: str, *, retention: bool) -> bool:
            if backend.images.kept:
                raise LogUnavailable
            return await super().remove(generation_id, retention=retention)

    backend = InMemoryBackend(line=Full, clock=SteppableClock())
    async with backend.open():
        done = await backend.make()
        await Housekeeping(backend.log, backend.log, backend.stored).purge(ended_before=backend.clock.step())
    assert not backend.images.kept
    assert await backend.memory.generation(done.generation_id) is None


async def test_the_service_removes_stray_and_expired_pictures_after_a_kill(tmp_path: Path) -> None:
    left = tmp_path / "edit_1_0000000000000000"
    left.mkdir()
    (left / f"edit_1_0000000000000000-{'0' * 32}.jpg").write_bytes(PHOTO)
    (tmp_path / ".stagecast").write_text('{"log": "memory", "epoch": "e0"}\n')
    async with running(tmp_path, retention=0.5) as service:
        assert not left.exists()
        generation_id = await service.start("ada")
        async with asyncio.timeout(TIMEOUT):
            while (await service.get("/generations"))["generations"]:
                await asyncio.sleep(0.02)
        await service.until(lambda: not any(each.is_dir() for each in tmp_path.iterdir()))
        answer = await service.http.get(f"/generations/{generation_id}", headers={"X-User-Id": "ada"})
        assert answer.status_code == 404
        ids = [item["generationId"] for item in (await service.get("/generations"))["generations"]]
        assert ids == []


async def test_a_restart_keeps_the_pictures_of_running_generations(tmp_path: Path) -> None:
    pause = Pause()
    editor = ScriptedEditor(pause)
    async with running(tmp_path, retention=0.3, overrides={"editor": editor}) as service:
        generation_id = await service.start("ada")
        done = await service.start("bob")
        # Both wait there, and no picture of either is on its way to the disk.
        await service.until(lambda: len(editor.calls) == 2)
        await service.http.post(f"/generations/{done}/cancel", headers={"X-User-Id": "bob"})
        await service.until(lambda: not (tmp_path / done).exists())
        assert (await service.get(f"/generations/{generation_id}"))["status"] == "openai_editing"
        pause.released.set()
        await service.until(lambda: not any(each.is_dir() for each in tmp_path.iterdir()))
