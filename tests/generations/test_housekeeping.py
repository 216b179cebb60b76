"""What is removed without anybody asking."""

from datetime import timedelta
from pathlib import Path

from domain.housekeeping import Housekeeping
from support.builders import SteppableClock
from support.doubles import Hold, ScriptedEditor, Studio, png
from support.harness import PHOTO, running


async def test_a_sweep_removes_what_no_event_names_and_nothing_else() -> None:
    hold = Hold()
    studio = Studio()
    async with studio.open():
        done = await studio.make()
        named = dict(studio.images.kept)
        studio.editor.acts = [hold]
        await studio.start()
        await hold.reached.wait()
        needed = dict(studio.images.kept)
        await studio.images.save(done.generation_id, png("of a stage that was lost"))
        await studio.images.save("edit_1_0000000000000000", png("of a start that was lost"))
        assert await Housekeeping(studio.log, studio.stored).sweep(stored_before=studio.clock()) == 2
        assert studio.images.kept == needed
        assert named.items() <= needed.items()
        hold.let_go.set()
        await studio.settled()


async def test_finished_generations_go_with_their_pictures_when_retention_ends_and_running_ones_never() -> None:
    hold = Hold()
    studio = Studio(clock=SteppableClock())
    async with studio.open():
        first = await studio.make()
        studio.clock.step(60)
        second = await studio.make()
        studio.editor.acts = [hold]
        running_one = await studio.start()
        await hold.reached.wait()
        studio.clock.step(30)
        keeper = Housekeeping(studio.log, studio.stored)
        assert await keeper.purge(ended_before=studio.clock() - timedelta(seconds=60)) == 1
        assert await studio.log.generation(first.generation_id) is None
        assert await studio.log.generation(second.generation_id) is not None
        assert not any(name.startswith(first.generation_id) for name in studio.images.kept)
        studio.clock.step(100_000)
        assert await keeper.purge(ended_before=studio.clock()) == 1
        assert await studio.log.generation(running_one.generation_id) is not None
        hold.let_go.set()
        await studio.settled()


async def test_the_service_removes_what_a_killed_one_left_and_what_retention_ends(tmp_path: Path) -> None:
    left = tmp_path / "edit_1_0000000000000000"
    left.mkdir()
    (left / f"edit_1_0000000000000000-{'0' * 32}.jpg").write_bytes(PHOTO)
    (tmp_path / ".stagecast").write_text('{"log": "memory", "epoch": "e0"}\n')
    async with running(tmp_path, retention=0.5) as service:
        assert not left.exists()
        generation_id = await service.start("ada")
        await service.until(lambda: not any(each.is_dir() for each in tmp_path.iterdir()))
        answer = await service.http.get(f"/generations/{generation_id}", headers={"X-User-Id": "ada"})
        assert answer.status_code == 404
        ids = [item["generationId"] for item in (await service.get("/generations"))["generations"]]
        assert ids == []


async def test_a_service_keeps_what_still_runs(tmp_path: Path) -> None:
    hold = Hold()
    editor = ScriptedEditor(hold)
    async with running(tmp_path, retention=0.3, overrides={"editor": editor}) as service:
        generation_id = await service.start("ada")
        done = await service.start("bob")
        # Both wait there, and no picture of either is on its way to the disk.
        await service.until(lambda: len(editor.calls) == 2)
        await service.http.post(f"/generations/{done}/cancel", headers={"X-User-Id": "bob"})
        await service.until(lambda: not (tmp_path / done).exists())
        assert (await service.get(f"/generations/{generation_id}"))["status"] == "openai_editing"
        hold.let_go.set()
        await service.until(lambda: not any(each.is_dir() for each in tmp_path.iterdir()))
