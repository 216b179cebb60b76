"""The sample pictures can be used by URL, although private addresses are not fetched."""

from pathlib import Path

import pytest

from adapters.outbound.url_fetcher import UrlFetcher
from api.web.page import FOLDER
from support.harness import running
from support.pictures import opened
from support.sites import FORBIDDEN, INTAKE, FakeResolver, refused

BASE = "http://localhost:3000/static/samples"


async def test_samples_are_read_from_disk_and_other_urls_are_fetched() -> None:
    names = FakeResolver()
    fetcher = UrlFetcher(INTAKE, resolve=names, files={f"{BASE}/face.webp": FOLDER / "samples" / "face.webp"})
    assert opened(await fetcher.fetch(f"{BASE}/face.webp")).width > 100
    assert names.asked == []
    others = [f"{BASE}/../app.js", f"{BASE}/face.webp?", f"{BASE}/nobody.webp", f"{BASE}/", "http://localhost:3000/"]
    for url in others:
        assert (await refused(fetcher, url)).sentence.endswith(FORBIDDEN)
    assert names.asked == ["localhost"] * len(others)


@pytest.mark.parametrize("name", ["face.webp", "portrait.webp"])
async def test_face_swap_with_a_sample_needs_no_setting(tmp_path: Path, name: str) -> None:
    async with running(tmp_path) as service, service.phone("ada") as phone:
        url = f"{service.service.settings.public_url}/static/samples/{name}"
        generation_id = await service.start(imageUrls=url)
        await phone.until_over(generation_id)
        assert "faceSwapUrl" in phone.of(generation_id)[-1]
