"""The offline editor and face swap: labelled pictures, made without an AI."""

import asyncio
from typing import get_args

import pytest
from PIL import Image

from adapters.offline.editor import LocalEditor
from adapters.offline.face_swap import LocalFaceSwap
from domain.errors import Failure
from domain.ports.images import Picture
from domain.requests import AspectRatio, Options
from support.pictures import (
    BLUE,
    GREEN,
    RED,
    THREADS,
    Colour,
    alike,
    colour_at,
    differing,
    opened,
    picture,
    quarters,
    solid,
)

SHEET = picture(quarters((400, 560)))
SQUARE = Options(aspect_ratio="1:1")
SIZES = {"2:3": (1024, 1536), "1:1": (1024, 1024), "3:2": (1536, 1024)}


def mean(image: Image.Image) -> Colour:
    return colour_at(image.resize((1, 1), Image.Resampling.BOX), 0, 0)


class Reports:
    """Records reports."""

    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.messages: list[str] = []
        self.previews: list[Picture] = []

    async def __call__(self, fraction: float, message: str, preview: Picture | None = None) -> None:
        self.fractions.append(fraction)
        self.messages.append(message)
        if preview is not None:
            self.previews.append(preview)


async def drawn(
    kind: str, prompt: str = "a quiet harbour", options: Options = SQUARE, sheet: Picture = SHEET
) -> Picture:
    editor, reports = LocalEditor(THREADS, 0), Reports()
    draw = editor.edit if kind == "edit" else editor.generate
    made = await draw(sheet, prompt, options, reports)
    assert reports.fractions == []
    return made


both = pytest.mark.parametrize("kind", ["edit", "generate"])


# --- the editor ------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("ratio", get_args(AspectRatio))
async def test_picture_has_the_requested_size(kind: str, ratio: AspectRatio) -> None:
    image = opened(await drawn(kind, options=Options(aspect_ratio=ratio)))
    assert (image.size, image.mode) == (SIZES[ratio], "RGB")


@both
async def test_picture_depends_only_on_the_request(kind: str) -> None:
    first, again, other = [await drawn(kind, prompt) for prompt in ("sunset", "sunset", "sunrise")]
    assert first == again
    assert sum(differing(opened(first), opened(other), 20).histogram()[1:]) > 100_000


async def test_edit_and_generate_make_different_pictures() -> None:
    edited, generated = opened(await drawn("edit")), opened(await drawn("generate"))
    assert sum(differing(edited, generated, 20).histogram()[1:]) > 500_000


@both
async def test_picture_depends_on_the_sheet(kind: str) -> None:
    one = opened(await drawn(kind, sheet=solid(RED, (400, 560))))
    other = opened(await drawn(kind, sheet=solid(BLUE, (400, 560))))
    assert sum(differing(one, other, 20).histogram()[1:]) > 100_000


@both
async def test_blank_sheet_is_accepted(kind: str) -> None:
    assert opened(await drawn(kind, sheet=solid((255, 255, 255), (400, 560)))).size == (1024, 1024)


@both
async def test_transparent_background_has_alpha(kind: str) -> None:
    image = opened(await drawn(kind, options=Options(background="transparent", aspect_ratio="1:1")))
    alpha = image.getchannel("A")
    assert image.mode == "RGBA"
    assert alpha.getpixel((0, 0)) == 0
    assert alpha.getpixel((image.width // 2, image.height // 2)) == 255


@pytest.mark.parametrize(
    "prompt",
    [
        "🌅🎨👩‍👩‍👧‍👦",
        "صورة جميلة لغروب الشمس فوق البحر",
        "תמונה יפה של שקיעה‏ \u202eabc\u202c",
        "夕日の油絵",
        "Gün batımında altın ışık, yağlı boya: İSTANBUL",
        "Äpfel — naïve façade, 20 €, Straße",
        "ﷺ" * 4000,
        "word " * 800,
        "w" * 4000,
        "\n".join("line" for _ in range(300)),
        "tab\tnull\0bell\a\x1b[31m\u2028\ufeff\ufffe",
        "\ud800 a lone surrogate",
        "e" + "\u0301" * 3999,
        " ",
    ],
    ids=range(14),
)
async def test_any_prompt_is_drawn(prompt: str) -> None:
    assert opened(await drawn("edit", prompt, SQUARE)).size == SIZES["1:1"]


async def test_prompts_without_drawable_letters_give_different_pictures() -> None:
    assert await drawn("edit", "夕日") != await drawn("edit", "朝日")


async def test_undecodable_sheet_is_provider_rejected() -> None:
    with pytest.raises(Failure) as failure:
        await drawn("edit", sheet=Picture(b"no picture", "image/png"))
    assert failure.value.code == "provider_rejected"


# --- the pace --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["edit", "generate", "swap"])
async def test_stage_takes_the_configured_time_with_rising_progress(stage: str) -> None:
    reports, seconds = Reports(), 0.4
    clock = asyncio.get_running_loop().time
    begun = clock()
    if stage == "swap":
        made = await LocalFaceSwap(THREADS, seconds).swap(SHEET, solid(GREEN), reports)
    else:
        editor = LocalEditor(THREADS, seconds)
        made = await (editor.edit if stage == "edit" else editor.generate)(SHEET, "sunset", SQUARE, reports)
    assert clock() - begun >= seconds

    assert len(reports.fractions) >= 2
    assert reports.fractions == sorted(set(reports.fractions))
    assert all(0 < fraction < 1 for fraction in reports.fractions)
    assert all(message.endswith("...") for message in reports.messages)
    assert len(set(reports.messages)) > 1

    assert len(reports.previews) == 1
    preview = opened(reports.previews[0])
    assert max(preview.size) <= 400
    assert alike(mean(preview), mean(opened(made)))


async def test_progress_is_reported_about_every_half_second(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_sleep(seconds: float) -> None: ...

    reports = Reports()
    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    await LocalEditor(THREADS, 3).edit(SHEET, "sunset", SQUARE, reports)
    assert reports.fractions == [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]


async def test_exception_from_a_report_ends_the_stage() -> None:
    async def over(fraction: float, message: str, preview: Picture | None) -> None:
        raise Failure("cancelled")

    with pytest.raises(Failure) as failure:
        await LocalEditor(THREADS, 0.2).edit(SHEET, "sunset", SQUARE, over)
    assert failure.value.code == "cancelled"


# --- the face swap ---------------------------------------------------------------------------------------


async def swapped(image: Image.Image, face: Picture) -> Image.Image:
    reports = Reports()
    made = opened(await LocalFaceSwap(THREADS, 0).swap(picture(image), face, reports))
    assert reports.fractions == []
    assert made.size == image.size
    return made


async def test_face_is_put_into_the_upper_right_corner_only() -> None:
    before = quarters((600, 900))
    after = await swapped(before, solid((250, 0, 250), (300, 400)))
    changed = differing(before, after, 40).getbbox()
    assert changed is not None
    left, top, right, bottom = changed
    assert left > 600 * 0.6
    assert right < 600
    assert top > 0
    assert bottom < 900 * 0.35
    assert alike(colour_at(after.crop(changed), 0.5, 0.4), (250, 0, 250))


async def test_label_is_drawn_over_any_face() -> None:
    picture_below = Image.new("RGB", (600, 900), (128, 128, 128))
    labels = []
    for colour in (RED, GREEN):
        after = await swapped(picture_below, solid(colour))
        box = differing(picture_below, after, 30).getbbox()
        assert box is not None
        labels.append(after.crop((box[0] + 40, box[3] - 16, box[2] - 40, box[3] - 4)))
    assert differing(labels[0], labels[1], 30).getbbox() is None
    dark, light = labels[0].convert("L").getextrema()
    assert isinstance(dark, int)
    assert isinstance(light, int)
    assert light - dark > 100


async def test_face_swap_keeps_transparency() -> None:
    image = Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    after = await swapped(image, solid(RED))
    assert after.mode == "RGBA"
    assert after.getchannel("A").getpixel((10, 290)) == 0
    assert after.getchannel("A").getpixel((230, 70)) == 255


@pytest.mark.parametrize("face", [(1, 1), (2, 3), (3000, 2), (2, 3000)])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (20, 900), (900, 20), (200, 200)])
async def test_tiny_and_extreme_sizes_are_accepted(size: tuple[int, int], face: tuple[int, int]) -> None:
    await swapped(Image.new("RGB", size, RED), solid(GREEN, face))


async def test_undecodable_face_is_provider_rejected() -> None:
    with pytest.raises(Failure) as failure:
        await swapped(quarters(), Picture(b"", "image/jpeg"))
    assert failure.value.code == "provider_rejected"
