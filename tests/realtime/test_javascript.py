"""The seed's JavaScript, unchanged, with the official client."""

import asyncio
from pathlib import Path

from support.doubles import Pause, ScriptedEditor
from support.harness import running
from support.node import needs_node, seed

pytestmark = needs_node


async def test_the_seeds_snippet_shows_every_stage_on_both_devices_and_none_to_others(
    tmp_path: Path, log_setting: str
) -> None:
    async with (
        running(tmp_path, log=log_setting) as service,
        seed(service.url, 123) as phone,
        seed(service.url, 123) as laptop,
        seed(service.url, 7) as stranger,
    ):
        rooms = service.service.hub.rooms
        await service.until(lambda: len(rooms.get("123", ())) == 2 and "7" in rooms)
        generation_id = await service.start("123", images=2)
        await phone.until(lambda: bool(phone.named("generation_completed")))
        await laptop.until(lambda: bool(laptop.named("generation_completed")))
        history = await service.events(generation_id, "123")
        assert phone.data == laptop.data == history
        assert stranger.data == []
        bars = [line["bars"] for line in phone.lines if "bars" in line]
        assert [bar["width"] for [bar] in bars[:-1]] == ["0%", "20%", "40%", "60%", "80%"]
        assert [bar["message"] for [bar] in bars[:-1]] == [event["message"] for event in history[:-1]]
        assert bars[-1] == []

        # Every event carries its cursor as a last, string argument.
        await asyncio.gather(service.start("123"), service.start("123", "generate", images=3))
        await phone.until(lambda: len(phone.named("generation_completed")) == 3)
        further = [line["further"] for line in phone.lines if "data" in line]
        assert all(len(each) == 1 and isinstance(each[0], str) for each in further)
        assert len({each[0] for each in further}) == len(further) == 6 + 11


async def test_the_seeds_snippet_that_connects_late_shows_the_current_progress(
    tmp_path: Path, log_setting: str
) -> None:
    pause = Pause()
    async with running(tmp_path, log=log_setting, overrides={"editor": ScriptedEditor(pause)}) as service:
        generation_id = await service.start("123")
        await pause.reached.wait()
        async with seed(service.url, 123) as phone:
            await phone.until(lambda: len(phone.data) == 4)
            pause.released.set()
            await phone.until(lambda: bool(phone.named("generation_completed")))
            assert phone.data == await service.events(generation_id, "123")
