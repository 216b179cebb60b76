"""Pictures whose event is on its way into the log when the work stops: what the log names is kept, all else goes."""

from dataclasses import replace

import pytest

from domain.housekeeping import Housekeeping
from support.builders import SteppableClock, WholeLog
from support.doubles import FlakyLog, InMemoryBackend, StartArguments, picture_of, start_arguments, swap_arguments

#: Started with what, the append that brings a picture, and the picture.
PICTURES = {
    "sheet": (start_arguments(), 3, "composition_url", b"one+two"),
    "edit": (start_arguments(), 5, "edited_image_url", b"edited"),
    "swap": (swap_arguments(), 7, "face_swap_url", b"swapped"),
    "end": (start_arguments("generate"), 5, "generated_image_url", b"edited"),
}


def restarted(backend: InMemoryBackend) -> InMemoryBackend:
    """The process that comes after this one, with a log that answers."""
    return replace(backend, line=lambda log: log)


@pytest.mark.parametrize("trouble", ["slow", "after"], ids=["shutdown", "no answer"])
@pytest.mark.parametrize(("wanted", "event", "field", "data"), PICTURES.values(), ids=PICTURES)
async def test_a_picture_is_kept_if_the_log_takes_its_event_without_an_answer(
    log: WholeLog, clock: SteppableClock, trouble: str, wanted: StartArguments, event: int, field: str, data: bytes
) -> None:
    flaky = FlakyLog(log, ["-"] * (event - 1) + [trouble])
    backend = InMemoryBackend(shared_log=log, line=lambda _: flaky, clock=clock, patience=0)
    async with backend.open():
        begun = await backend.start(wanted)
        await (flaky.stuck.wait() if trouble == "slow" else backend.settled())
    assert len(await backend.events(begun)) == event
    again = restarted(backend)
    async with again.open():
        await again.runner.resume()
        await again.settled()
    done = await again.workflow.snapshot("ada", begun.generation_id)
    assert (done.status, picture_of(again, getattr(done, field))) == ("completed", data)
    assert len(backend.editor.calls) == 1
    await again.check()


async def test_the_sweep_removes_a_picture_whose_event_is_lost(log: WholeLog, clock: SteppableClock) -> None:
    flaky = FlakyLog(log, ["-"] * 4 + ["before"])
    backend = InMemoryBackend(shared_log=log, line=lambda _: flaky, clock=clock, patience=0)
    async with backend.open():
        await backend.start()
        await backend.settled()
    again = restarted(backend)
    async with again.open():
        await again.runner.resume()
        await again.settled()
    await Housekeeping(again.log, again.memory, again.stored).sweep(now=clock())
    assert {picture.data for picture in again.images.kept.values()} == {b"one", b"two", b"one+two"}
    await again.check()
