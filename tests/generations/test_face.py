"""The face of a face swap: any of the images, by its index."""

from typing import Any

import pytest

from domain.rehydrate import generation_of
from domain.requests import GenerationRequest
from support.doubles import (
    BASE,
    FACE_URL,
    InMemoryBackend,
    InMemoryUpload,
    Pause,
    ScriptedFaceSwapper,
    StartArguments,
    png,
)

OTHER_URL = "http://pictures.test/other.png"


async def swap_of(backend: InMemoryBackend, face: int | None, **request: Any) -> StartArguments:
    """An edit of an upload, a stored image and two URLs."""
    source = await backend.make(StartArguments("edit", GenerationRequest(prompt="x"), [InMemoryUpload(b"stored")]))
    assert source.input is not None
    wanted = GenerationRequest(
        prompt="a red hat",
        images=(source.input.images[0].removeprefix(BASE),),
        image_urls=(FACE_URL, OTHER_URL),
        face_swap=True,
        face=face,
        **request,
    )
    return StartArguments("edit", wanted, [InMemoryUpload(b"upload")])


@pytest.mark.parametrize(
    ("face", "index", "data"),
    [
        (None, 2, png(f"<{FACE_URL}>").data),
        (0, 0, b"upload"),
        (1, 1, b"stored"),
        (2, 2, png(f"<{FACE_URL}>").data),
        (3, 3, png(f"<{OTHER_URL}>").data),
    ],
)
async def test_the_face_is_the_image_at_its_index(face: int | None, index: int, data: bytes) -> None:
    backend = InMemoryBackend()
    async with backend.open():
        done = await backend.make(await swap_of(backend, face))
        await backend.check()
    assert done.input is not None
    assert (done.status, done.input.face, done.input.face_swap) == ("completed", index, True)
    [(_, used)] = backend.face_swapper.calls
    assert used.data == data
    # All are on the sheet, in order; what was fetched is fetched once.
    assert backend.fetcher.calls == [FACE_URL, OTHER_URL]
    assert [picture.data for picture in backend.composer.calls[-1]] == [
        b"upload",
        b"stored",
        png(f"<{FACE_URL}>").data,
        png(f"<{OTHER_URL}>").data,
    ]


@pytest.mark.parametrize(("face", "fetched"), [(0, []), (1, []), (2, [FACE_URL]), (3, [OTHER_URL]), (None, [FACE_URL])])
async def test_a_repeated_face_swap_fetches_only_the_face(face: int | None, fetched: list[str]) -> None:
    pause = Pause()
    first = InMemoryBackend(face_swapper=ScriptedFaceSwapper(pause, free=True))
    async with first.open():
        begun = await first.start(await swap_of(first, face))
        await pause.reached.wait()
    # The process has ended; another one goes on.
    second = InMemoryBackend(
        shared_log=first.memory, images=first.images, face_swapper=ScriptedFaceSwapper(free=True), clock=first.clock
    )
    await second.runner.resume()
    async with second.open():
        await second.settled()
    [(_, used)] = second.face_swapper.calls
    [(_, before)] = first.face_swapper.calls
    assert used == before
    assert second.fetcher.calls == fetched
    history = await second.memory.generation(begun.generation_id)
    assert history is not None
    assert generation_of(history).status == "completed"


def test_a_stored_request_without_a_face_means_the_first_url() -> None:
    stored = b'{"prompt":"x","options":{},"images":["a","b"],"image_urls":["http://x/1"],"face_swap":true}'
    assert GenerationRequest.decode(stored).face_index == 2
