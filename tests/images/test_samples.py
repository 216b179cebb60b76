"""The sample pictures are what ``docs/samples.py`` draws: nobody else's, and nothing else."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Protocol, cast

import pytest
from PIL import Image, ImageChops, ImageStat

from adapters.images.intake import PillowIntake
from support.pictures import THREADS

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "src" / "api" / "web" / "static" / "samples"
NAMES = ("portrait", "hat", "lake", "face")


class Painter(Protocol):
    SAMPLES: Mapping[str, Callable[[], Image.Image]]


@cache
def painter() -> Painter:
    spec = importlib.util.spec_from_file_location("docs_samples", ROOT / "docs" / "samples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Painter, module)


def test_there_are_these_four() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.webp" for name in NAMES}
    assert tuple(painter().SAMPLES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_what_the_command_draws(name: str) -> None:
    """But for what an encoder leaves out, which depends on its version."""
    drawn = painter().SAMPLES[name]()
    with Image.open(FOLDER / f"{name}.webp") as file:
        kept = file.convert("RGB")
    assert drawn.size == kept.size
    # Blurred, so that neither the finest lines nor the encoder's own noise count.
    difference = ImageChops.difference(drawn.reduce(4), kept.reduce(4))
    assert max(ImageStat.Stat(difference).mean) < 2
    assert max(high for _, high in ImageStat.Stat(difference).extrema) < 40


@pytest.mark.parametrize("name", NAMES)
async def test_the_service_takes_it_and_it_is_small_and_says_nothing_about_anybody(name: str) -> None:
    data = (FOLDER / f"{name}.webp").read_bytes()
    assert len(data) < 80_000
    picture = await PillowIntake(THREADS).admit(data)
    assert picture.media_type in ("image/jpeg", "image/png", "image/webp")
    with Image.open(BytesIO(data)) as image:
        assert image.format == "WEBP"
        assert 600 <= max(image.size) <= 1000
        assert not {"exif", "icc_profile", "xmp"} & image.info.keys()
