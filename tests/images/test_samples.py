"""The sample pictures of the page and the demo."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from adapters.images.intake import PillowIntake
from support.pictures import THREADS

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "src" / "api" / "web" / "static" / "samples"
NAMES = ("portrait", "hat", "lake", "face")


def test_the_page_has_four_samples() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.webp" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
async def test_a_sample_is_admitted_and_small_and_has_no_metadata(name: str) -> None:
    data = (FOLDER / f"{name}.webp").read_bytes()
    assert len(data) < 80_000
    picture = await PillowIntake(THREADS).admit(data)
    assert picture.media_type in ("image/jpeg", "image/png", "image/webp")
    with Image.open(BytesIO(data)) as image:
        assert image.format == "WEBP"
        assert 600 <= max(image.size) <= 1000
        assert not {"exif", "icc_profile", "xmp"} & image.info.keys()
