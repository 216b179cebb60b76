"""Cases 31 to 34 and 39: what one user may take of what all users share, and what happens beyond that."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
from PIL import Image

from reliability.cases import Trial, case
from support.case_server import ServedService
from support.deployment import files_in
from support.harness import PHOTO
from support.pictures import GREEN, RED, encoded, quarters, solid
from support.provider_faults import Origin, listening
from support.wire import JSON

FACE = solid(GREEN).data


async def post(
    served: ServedService, user: str, *images: bytes, key: str | None = None, **fields: Any
) -> httpx2.Response:
    """The answer to a start."""
    parts: list[tuple[str, Any]] = [("images", (f"{n}.jpg", data, "image/jpeg")) for n, data in enumerate(images)]
    parts += [(name, (None, str(value))) for name, value in {"prompt": "a red hat", **fields}.items()]
    headers = {"X-User-Id": user} | ({"Idempotency-Key": key} if key else {})
    return await served.http.post("/generations/edit", files=parts, headers=headers, timeout=900)


def code_of(answer: httpx2.Response) -> str:
    """``202``, or the code of the refusal."""
    if answer.status_code == 202:
        return "202"
    if answer.status_code in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1
    return str(answer.json()["code"])


async def cancel(served: ServedService, user: str, answer: httpx2.Response) -> JSON:
    path = f"{answer.headers['location']}/cancel"
    outcome = await served.http.post(path, headers={"X-User-Id": user})
    assert outcome.status_code == 200, outcome.text
    body: JSON = outcome.json()
    return body


async def made(served: ServedService, user: str) -> float:
    """Have an edit made, and return how many seconds it took."""
    began = time.monotonic()
    answer = await post(served, user, PHOTO)
    assert answer.status_code == 202, answer.text
    while (await served.get(answer.headers["location"], user))["status"] != "completed":
        await asyncio.sleep(0.01)
    return time.monotonic() - began


# --- 31: starts and cancels without end -------------------------------------------------------------------


@case(
    31,
    "a user starts and cancels {tries} times, as fast as it goes, of {limit} starts per minute",
    "as many are accepted, the others get 429 too_many_starts; no image is left; others start as ever",
    quick={"tries": 60, "limit": 20},
    long={"tries": 3_000, "limit": 600},
)
async def started_and_cancelled(trial: Trial, tries: int, limit: int) -> None:
    codes, began = Counter[str](), time.monotonic()

    async def one(served: ServedService) -> None:
        answer = await post(served, "mallory", PHOTO)
        codes[code_of(answer)] += 1
        if answer.status_code == 202:
            assert (await cancel(served, "mallory", answer))["outcome"] in ("cancelled", "already_finished")

    async with trial.serve(starts_per_minute=limit) as served:
        for _ in range(tries // 10):
            await asyncio.gather(*(one(served) for _ in range(10)))
        took = time.monotonic() - began
        trial.at_most("another user's edit", await made(served, "ada"), 5, "s", time=True)
        await served.until_idle()
        stored = sum(file.stat().st_size for file in files_in(trial.images))
        trial.report("bytes of images left, with the other user's", stored)
        await served.check("ada")
    trial.report("accepted", codes["202"])
    trial.report("refused", codes["too_many_starts"])
    assert set(codes) == {"202", "too_many_starts"}, codes
    assert limit <= codes["202"] <= limit * (1 + took // 60), codes


# --- 32: image URLs that never answer ---------------------------------------------------------------------


@case(
    32,
    "a user starts {tarpits} edits of image URLs whose site never answers, of {running} that may be worked on at once",
    "two fetch at a time; another user's edit takes no longer than before, with or without a URL",
    quick={"tarpits": 8, "running": 2},
    long={"tarpits": 20, "running": 8},
)
async def tarpit(trial: Trial, tarpits: int, running: int) -> None:
    async def never(writer: object) -> None:
        await asyncio.sleep(3_600)

    async with (
        listening(Origin(lambda _: never)) as pit,
        trial.serve(max_running=running, fetch_allow="127.0.0.0/8") as served,
    ):
        before = min([await made(served, "ada") for _ in range(3)])
        urls = {"imageUrls": f"{pit.address}/face.png"}
        stuck = [await post(served, "mallory", PHOTO, **urls) for _ in range(tarpits)]
        assert {code_of(answer) for answer in stuck} == {"202"}
        await asyncio.wait_for(pit.reached.wait(), 60)
        after = min([await made(served, "ada") for _ in range(3)])
        stages = Counter[str]()
        for answer in stuck:
            stages[(await served.get(answer.headers["location"], "mallory"))["status"]] += 1
        trial.report("an edit before", before, "s")
        trial.at_most("an edit meanwhile", after, 2 * before + 0.5, "s", time=True)
        trial.report("fetching, and waiting to", f"{stages['composition']}, {stages['started']}")
        assert stages == {"composition": 2, "started": tarpits - 2}, stages
        assert len(pit.requests) == 2
        for answer in reversed(stuck):
            await cancel(served, "mallory", answer)
        await served.until_idle()
        await served.check("ada", "mallory")


# --- 33: images that cost much more than they weigh -------------------------------------------------------


def costly(side: int) -> bytes:
    """A small JPEG of 99 scans."""
    data = encoded(Image.new("RGB", (side, side), RED), "JPEG", progressive=True, quality=30)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * (99 - data.count(b"\xff\xda")) + b"\xff\xd9"


@case(
    33,
    "a user with one credit sends {starts} starts at once, each of five JPEGs of {side} × {side} pixels in 99 scans; "
    "another user a tiny one meanwhile",
    "one is accepted, and the others get 402 (503 after 30 s), without being decoded; the other user waits for none",
    quick={"starts": 8, "side": 700},
    long={"starts": 60, "side": 5_000},
)
async def costly_images(trial: Trial, starts: int, side: int) -> None:
    image = costly(side)
    trial.report("bytes of an image", len(image))
    async with trial.serve(credits=1) as served:
        cpu = (await served.figures(reset=True)).cpu
        sent = [asyncio.create_task(post(served, "mallory", *[image] * 5)) for _ in range(starts)]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        tiny = await post(served, "bob", PHOTO)
        trial.at_most("the tiny start", time.monotonic() - began, 5, "s", time=True)
        assert tiny.status_code == 202
        codes = Counter(code_of(answer) for answer in await asyncio.gather(*sent))
        await served.until_idle()
        trial.report("CPU time of the service", (await served.figures()).cpu - cpu, "s")
        trial.report("statuses", ", ".join(f"{code} {count}" for code, count in codes.most_common()))
        # Where decoding takes longer than a start waits for another's credit, it is told to come again.
        assert codes["202"] == 1, codes
        assert codes["insufficient_credit"] + codes["overloaded"] == starts - 1, codes
        await served.check("mallory", "bob")


# --- 34: the largest images, from many users --------------------------------------------------------------


def largest(side: int) -> list[bytes]:
    """Five images of that size, of which each needs another way of decoding."""
    noise = Image.effect_noise((side // 5, side // 5), 90).resize((side, side)).convert("RGB")
    clear = quarters((side, side)).convert("RGBA")
    clear.putalpha(128)
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encoded(noise, "JPEG", quality=75),
        encoded(noise, "JPEG", quality=60, progressive=True, exif=exif),
        encoded(clear, "PNG", compress_level=1),
        encoded(noise.convert("CMYK"), "JPEG", quality=20),
        encoded(quarters((side, side)).convert("P"), "PNG", compress_level=1),
    ]


@case(
    34,
    "{users} users send five images of {side} × {side} pixels each at once",
    "all are accepted and made; the service has less than 500 MB in memory",
    quick={"users": 2, "side": 600},
    long={"users": 20, "side": 5_000},
    alone=True,
)
async def largest_images(trial: Trial, users: int, side: int) -> None:
    images = largest(side)
    trial.report("bytes of a start", sum(map(len, images)))
    async with trial.serve() as served:
        await made(served, "ada")
        before, began = await served.figures(reset=True), time.monotonic()
        answers = await asyncio.gather(*(post(served, f"user{number}", *images) for number in range(users)))
        trial.report("until all were accepted", time.monotonic() - began, "s")
        assert {code_of(answer) for answer in answers} == {"202"}, {code_of(answer) for answer in answers}
        await served.until_idle()
        after = await served.figures()
        trial.report("until all were made", time.monotonic() - began, "s")
        trial.report("memory before", before.rss / 1_000, "MB")
        trial.at_most("memory at most", after.peak / 1_000, 500, "MB")
        trial.at_most("event loop late by, at most", after.lag * 1_000, 250, "ms", time=True)
        await served.check(*(f"user{number}" for number in range(users)))


# --- 39: more than it can do ------------------------------------------------------------------------------


async def accepted(start: Callable[[], Awaitable[httpx2.Response]]) -> httpx2.Response:
    """The answer to the first of these starts that finds no overload."""
    async with asyncio.timeout(60):
        while (code := code_of(answer := await start())) != "202":
            assert code == "overloaded"
            await asyncio.sleep(0.02)
    return answer


@case(
    39,
    "{readers} clients read without a pause, so that the event loop is late by more than the {lag} ms allowed",
    "starts get 503 overloaded; reads, cancels, reports and repeated starts are served; it ends with the load",
    quick={"readers": 30, "lag": 25},
    long={"readers": 150, "lag": 100},
)
async def overload(trial: Trial, readers: int, lag: float) -> None:
    async with trial.serve(max_lag_ms=lag) as served:
        # A busy machine is late by itself now and then.
        first = await accepted(lambda: post(served, "ada", PHOTO, key="k1"))
        external = await accepted(
            lambda: served.http.post(
                "/generations/edit?runner=external", files=[("prompt", (None, "x"))], headers={"X-User-Id": "ada"}
            )
        )
        await served.until_idle()
        generation_id, _ = await served.flood("ada", 500)
        path = f"/generations/{generation_id}/events"

        async def read(statuses: Counter[int]) -> None:
            while not over.is_set():
                statuses[(await served.get_response(path, "ada")).status_code] += 1

        over, statuses = asyncio.Event(), Counter[int]()
        reading = [asyncio.create_task(read(statuses)) for _ in range(readers)]
        codes = Counter[str]()
        async with asyncio.timeout(60):
            while not codes["overloaded"]:
                codes[code_of(await post(served, "bob", PHOTO))] += 1
        served_still = [
            await post(served, "ada", PHOTO, key="k1"),
            await served.http.post(
                f"{external.headers['location']}/transitions",
                json={"status": "composition"},
                headers={"X-User-Id": "ada"},
            ),
            await served.http.post(f"{external.headers['location']}/cancel", headers={"X-User-Id": "ada"}),
        ]
        assert [answer.status_code for answer in served_still] == [202, 200, 200], [each.text for each in served_still]
        assert served_still[0].headers["location"] == first.headers["location"]
        over.set()
        await asyncio.gather(*reading)
        began = time.monotonic()
        await accepted(lambda: post(served, "bob", PHOTO))
        trial.at_most("until starts are accepted again", time.monotonic() - began, 2, "s", time=True)
        trial.report("starts accepted, and refused", f"{codes['202']}, {codes['overloaded']}")
        trial.report("reads meanwhile", statuses[200])
        assert set(statuses) == {200}, statuses
        await served.until_idle()
        await served.check("bob")
