"""The sample pictures can be used by URL, although private addresses are not fetched."""

from pathlib import Path

import pytest

from adapters.images.intake import PillowIntake
from adapters.outbound.sample_fetcher import SampleFetcher
from api.web.page import FOLDER
from support.doubles import ScriptedFetcher
from support.harness import running
from support.pictures import THREADS, opened

BASE = "http://localhost:3000/static/samples"


async def test_samples_are_read_from_disk_and_other_urls_are_fetched() -> None:
    web = ScriptedFetcher()
    fetcher = SampleFetcher(PillowIntake(THREADS), web, base=BASE, folder=FOLDER / "samples")
    assert opened(await fetcher.fetch(f"{BASE}/face.webp")).width > 100
    assert web.calls == []
    others = [f"{BASE}/../app.js", f"{BASE}/face.webp?", f"{BASE}/nobody.webp", f"{BASE}/", "http://localhost:3000/"]
    for url in others:
        await fetcher.fetch(url)
    assert web.calls == others


@pytest.mark.parametrize("name", ["face.webp", "portrait.webp"])
async def test_face_swap_with_a_sample_needs_no_setting(tmp_path: Path, name: str) -> None:
    async with running(tmp_path) as service, service.phone("ada") as phone:
        url = f"{service.service.settings.public_url}/static/samples/{name}"
        generation_id = await service.start(imageUrls=url)
        await phone.until_over(generation_id)
        assert "faceSwapUrl" in phone.of(generation_id)[-1]
